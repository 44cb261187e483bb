"""Where a continuation starts, whatever the token at the join; and which contexts are cut to fit, by task."""

import functools
import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from lm_eval.api.instance import Instance
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from data.tokenizer import Tokenizer
from errors import UserError
from eval.harness import HarnessModel, evaluate_tasks
from eval.report.task_records import task_record
from eval.scoring.groups import Group
from eval.scoring.language_model import Qwen3Model
from eval.scoring.requests import continuation_start
from eval.scoring.scorer import Scorer
from eval.task_results import CutCounts, TaskResults, format_table
from tests.conftest import make_text
from tests.eval.conftest import build


def byte_level(merges: list[tuple[str, str]], normalizer: Any = None) -> Tokenizer:
    """Build a byte-level tokenizer that merges across words."""
    names = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [left + right for left, right in merges]
    backend = Backend(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


@functools.cache
def model_of(vocab_size: int) -> Qwen3Model:
    return Qwen3Model(build(vocab_size=vocab_size), max_length=96)


def log_likelihoods(tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    model = model_of(tokenizer.vocab_size)
    lm = HarnessModel(model, tokenizer, Scorer(model, token_budget=500))
    return lm.loglikelihood([Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)])


def log_probability(tokenizer: Tokenizer, context: list[int], continuation: list[int]) -> float:
    (scores,) = model_of(tokenizer.vocab_size).score([Group(tuple(context), (tuple(continuation),))])[0]
    return sum(scores.log_probs)


def test_a_token_across_the_join_is_predicted_as_a_whole() -> None:
    tokenizer = byte_level([("p", "r"), ("pr", "i"), ("n", "t"), ("pri", "nt")])
    call, _print = tokenizer.encode("call "), tokenizer.encode("print")
    assert len(_print) == 1
    pairs = [("call pri", "ze"), ("call pri", "nt"), ("call pri", "nt(a)")]
    wrong, right, longer = log_likelihoods(tokenizer, pairs)
    assert right[0] < 0
    assert right[0] == pytest.approx(log_probability(tokenizer, call, _print), abs=1e-4)
    parts = [*_print, *tokenizer.encode("(a)")]
    assert longer[0] == pytest.approx(log_probability(tokenizer, call, parts), abs=1e-4)
    pri, ze = tokenizer.encode("call pri"), tokenizer.encode("ze")
    assert wrong[0] == pytest.approx(log_probability(tokenizer, pri, ze), abs=1e-4)


def test_a_character_whose_bytes_are_one_token_across_the_join_is_predicted() -> None:
    first, last = map(_spelled, ("\u5317", "\u4eac"))
    merges = [(first[0], first[1]), (first[:2], first[2]), (last[0], last[1]), (last[:2], last[2])]
    tokenizer = byte_level([*merges, (first, last)])
    assert len(tokenizer.encode("\u5317\u4eac")) == 1
    ((score, _),) = log_likelihoods(tokenizer, [("\u9996\u90fd\u662f\u5317", "\u4eac")])
    context, whole = (tokenizer.encode("\u9996\u90fd\u662f" + tail) for tail in ("", "\u5317\u4eac"))
    assert score == pytest.approx(log_probability(tokenizer, context, whole[len(context) :]), abs=1e-4)
    assert score < 0


def _spelled(text: str) -> str:
    """Spell the bytes of a text as a byte-level vocabulary does."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in plain.pre_tokenize_str(text))


@pytest.mark.parametrize("seed", range(30))
def test_the_parts_of_any_split_are_the_tokens_of_the_whole_and_only_an_empty_one_scores_0(
    tokenizer: Tokenizer, seed: int
) -> None:
    drawn = random.Random(seed)
    text = make_text(seed, 4)
    at = drawn.randrange(len(text))
    context, continuation = text[:at].rstrip(), text[len(text[:at].rstrip()) :]
    whole = tokenizer.encode_prompts([text])[0]
    before = tokenizer.encode_prompts([context])[0]
    first = continuation_start(before, whole)
    assert 0 <= first < len(whole)
    assert before[:first] == whole[:first]
    assert first == len(before) or before[first] != whole[first]
    (score, _), nothing = log_likelihoods(tokenizer, [(context, continuation), (context, "")])
    end = tokenizer.end_of_document_id
    expected = log_probability(tokenizer, whole[:first] or [end], whole[first:])
    assert score == pytest.approx(expected, abs=1e-4)
    assert score < 0
    assert nothing == (0.0, True)


def test_a_continuation_that_the_normalizer_removes_does_not_score_0() -> None:
    tokenizer = byte_level([], normalizers.Replace("~", ""))
    assert tokenizer.encode("ab~") == tokenizer.encode("ab")
    (score, _), empty, after_space = log_likelihoods(tokenizer, [("ab", "~"), ("ab", ""), ("ab ", "")])
    assert score < 0
    assert empty == after_space == (0.0, True)
    with pytest.raises(UserError, match="'~' after '~' has no token"):
        log_likelihoods(tokenizer, [("~", "~")])


def gsm8k(folder: Path, number: int) -> None:
    """Write questions and few-shot examples of gsm8k."""
    for name, seeds in (("gsm8k", range(number)), ("gsm8k.train", range(100, 106))):
        rows = [{"question": make_text(seed, 12), "answer": f"so {seed} #### {seed}"} for seed in seeds]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_cut_prompts_are_counted_by_task_on_screen_in_the_results_and_in_the_report_s_data(
    tasks_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    gsm8k(tmp_path, 3)
    (tmp_path / "piqa.jsonl").write_text((tasks_folder / "piqa.jsonl").read_text())
    model = Qwen3Model(build(vocab_size=tokenizer.vocab_size), max_length=300)
    results = evaluate_tasks(model, tokenizer, ["gsm8k", "piqa"], data=tmp_path, limit=3)
    cut = results.cut["gsm8k"]
    assert (cut.num_requests, cut.num_cut) == (3, 3)
    # 256 of the 300 tokens are for the answer
    assert cut.num_tokens - cut.num_dropped == 3 * 44
    assert results.cut["piqa"] == CutCounts(6, 0, results.cut["piqa"].num_tokens, 0)
    printed = format_table(results)
    assert f"gsm8k: 3 of 3 requests did not fit: {cut.num_dropped:,} of {cut.num_tokens:,} tokens" in printed
    assert "piqa: " not in printed
    assert results.num_fewshot == {"gsm8k": 5, "piqa": 0}
    record = task_record(
        {"metrics": {}, "num_documents": {}, "mean_accuracy": None, "mean_plain_accuracy": None}
        | {"cut": {"gsm8k": {"num_requests": 3, "num_cut": 2}}}
    )
    assert record == {"tasks/gsm8k/num_cut": 2}


@pytest.mark.parametrize("max_length", [8, 14, 20])
def test_cut_contexts_and_texts_in_several_windows_are_counted(tokenizer: Tokenizer, max_length: int) -> None:
    model = Qwen3Model(build(vocab_size=tokenizer.vocab_size), max_length=max_length)
    lm = HarnessModel(model, tokenizer, Scorer(model, token_budget=500))
    pairs = [(make_text(seed, 1 + seed), " to") for seed in range(12)]
    lm.loglikelihood([Instance("loglikelihood", {}, pair, n, ("a", n, 1)) for n, pair in enumerate(pairs)])
    texts = [make_text(seed, 2 + 3 * seed) for seed in range(6)]
    lm.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), n, ("b", n, 1)) for n, text in enumerate(texts)]
    )
    # the last token of a continuation is no input
    encoded = [tuple(tokenizer.encode_prompts([a, a + b])) for a, b in pairs]
    excess = [max(len(whole) - max_length - 1, 0) for _, whole in encoded]
    assert lm.cut["a"].num_requests == 12
    assert lm.cut["a"].num_cut == sum(each > 0 for each in excess) > 0
    assert lm.cut["a"].num_dropped == sum(excess)
    lengths = [len(ids) for ids in tokenizer.encode_prompts(texts)]
    assert lm.cut["b"] == CutCounts(6, sum(each > max_length for each in lengths), sum(lengths), 0)


def test_the_number_of_few_shot_examples_is_chosen_and_written_down(
    tasks_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    gsm8k(tmp_path, 2)
    for name in ("sciq", "wikitext"):
        (tmp_path / f"{name}.jsonl").write_text((tasks_folder / f"{name}.jsonl").read_text())
    (tmp_path / "sciq.train.jsonl").write_text((tasks_folder / "sciq.jsonl").read_text())
    model = Qwen3Model(build(vocab_size=tokenizer.vocab_size), max_length=300)
    tasks = ["gsm8k", "sciq", "wikitext"]

    def run(num_fewshot: int | None) -> TaskResults:
        return evaluate_tasks(model, tokenizer, tasks, data=tmp_path, limit=2, num_fewshot=num_fewshot)

    own, two = run(None), run(2)
    assert own.num_fewshot == {"gsm8k": 5, "sciq": 0, "wikitext": 0}
    # there is no place for examples before a whole text
    assert two.num_fewshot == {"gsm8k": 2, "sciq": 2, "wikitext": 0}
    assert two.cut["sciq"].num_tokens > 2 * own.cut["sciq"].num_tokens
    assert two.cut["gsm8k"].num_tokens < own.cut["gsm8k"].num_tokens
    assert two.metrics["wikitext"] == own.metrics["wikitext"]
    with pytest.raises(UserError, match=r"piqa has 2 few-shot examples: want them in .*piqa.train.jsonl"):
        evaluate_tasks(model, tokenizer, ["piqa"], data=tasks_folder, num_fewshot=2)


class Written(Scorer):
    """Writes given tokens until it is stopped."""

    def __init__(self, model: Qwen3Model, tokens: list[int]) -> None:
        super().__init__(model, token_budget=100)
        self.tokens = tokens
        self.num_written = 0

    def generate(self, prompts: Any, until: Any, max_new_tokens: int, stop_ids: Any, stop: Any) -> Any:
        counts = range(1, len(self.tokens) + 1)
        self.num_written = next((n for n in counts if stop(0, self.tokens[:n])), len(self.tokens))
        return [self.tokens[: self.num_written]]


def test_an_answer_keeps_the_space_that_its_first_token_begins_with() -> None:
    names = ["<|endoftext|>", "\u2581", "return", "cur", "\u2581return", "\u2581cur"]
    merges = [("\u2581", "return"), ("\u2581", "cur")]
    backend = Backend(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_tokens(["".join(each) for each in merges])
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    cur, back = names.index("\u2581cur"), names.index("\u2581return")
    assert tokenizer.decode([cur]) == "cur"
    model = model_of(tokenizer.vocab_size)
    for prompt, until, expected, num_written in (
        ("\u2581return", [], " cur return", 2),
        ("\u2581return", [" cur"], "", 1),
        ("\u2581return", [" return"], " cur", 2),
        ("", [], "cur return", 2),
    ):
        scorer = Written(model, [cur, back])
        lm = HarnessModel(model, tokenizer, scorer)
        options = {"until": until, "max_gen_toks": 4}
        assert lm.generate_until([Instance("generate_until", {}, (prompt, options), 0)]) == [expected]
        assert scorer.num_written == num_written
