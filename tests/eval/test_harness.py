"""Our models in lm-evaluation-harness: resumable, the same on all ranks, with clear errors for bad files."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch.distributed as dist

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from data.tokenizer import Tokenizer
from errors import UserError
from eval.harness import HarnessModel, evaluate_tasks, load_tasks
from eval.scoring.groups import Group, Scores
from eval.scoring.language_model import Qwen3Model
from eval.scoring.scorer import Scorer, windows
from eval.task_results import ACCURACIES, NORMALIZED, PAPER, format_table
from models.qwen3 import Qwen3
from tests.eval.conftest import build
from tests.ranks import run_ranks


class InterruptedModel(Qwen3Model):
    """Interrupted after a number of batches."""

    def __init__(self, model: Qwen3, *, interrupt_after: int) -> None:
        super().__init__(model, max_length=96, identity="debug")
        self.left = interrupt_after

    def score(self, groups: Sequence[Group]) -> list[list[Scores]]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().score(groups)


class OracleModel(Qwen3Model):
    """Prefers the letter of the right answer, and records its requests."""

    def __init__(self, model: Qwen3, tokenizer: Tokenizer) -> None:
        super().__init__(model, max_length=2000)
        self.tokenizer = tokenizer
        self.groups: list[Group] = []

    def score(self, groups: Sequence[Group]) -> list[list[Scores]]:
        self.groups += groups
        return [[self._score(group, each) for each in group.continuations] for group in groups]

    def _score(self, group: Group, continuation: tuple[int, ...]) -> Scores:
        is_right = f"{self.tokenizer.decode(continuation).strip()} right" in self.tokenizer.decode(
            group.context
        )
        return Scores([0.0 if is_right else -1.0] * len(continuation), [is_right] * len(continuation))


def test_shuffled_answers_keep_their_order_within_an_evaluation_and_between_processes(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    # the harness shuffles the answers with Python's random module
    wrong = {f"Incorrect Answer {n}": f"wrong {n}" for n in (1, 2, 3)}
    documents = [{"Question": f"{n}?", "Correct Answer": "right", **wrong} for n in range(20)]
    file = tmp_path / "gpqa_main_zeroshot.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in documents))
    network = build(vocab_size=tokenizer.vocab_size + 4)
    requests = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        states = random.getstate(), repr(np.random.get_state())
        model = OracleModel(network, tokenizer)
        results = evaluate_tasks(model, tokenizer, ["gpqa_main_zeroshot"], data=tmp_path)
        assert results.metrics["gpqa_main_zeroshot"]["acc"] == 1.0
        assert (random.getstate(), repr(np.random.get_state())) == states
        requests.append(model.groups)
    assert requests[0] == requests[1]
    orders = {tokenizer.decode(group.context).split("?", 1)[1] for group in requests[0]}
    assert len(orders) > 5


def test_stop_strings_are_searched_in_the_last_tokens_alone(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Qwen3Model(build(vocab_size=tokenizer.vocab_size), max_length=96)
    lm = HarnessModel(model, tokenizer, Scorer(model, token_budget=150))
    sizes: list[int] = []
    plain = Tokenizer.decode

    def counted(self: Tokenizer, tokens: Sequence[int]) -> str:
        sizes.append(len(tokens))
        return plain(self, tokens)

    def run(until: list[str]) -> str:
        options = {"until": until, "max_gen_toks": 40}
        return lm.generate_until([Instance("generate_until", {}, ("the model", options), 0)])[0]

    whole = run([])
    monkeypatch.setattr(Tokenizer, "decode", counted)
    end = whole[len(whole) // 2 :][:3]
    assert run(["never", end]) == whole.split(end)[0]
    # the answer is decoded at the end, behind the last token of the prompt
    num_new = sizes.pop() - 1
    assert num_new < 40
    # and so is each tail of at most six tokens, behind at most 16 tokens
    assert max(sizes) <= 16 + len("never") + 1


def test_a_stop_string_of_several_bytes_per_character_is_found(tokenizer: Tokenizer) -> None:
    text = "the model \u00e9t\u00e9\u00e9\u00e9 reads"
    tokens = tokenizer.encode(text)

    class Written(Scorer):
        """Writes the text until it is stopped."""

        def generate(self, prompts: Any, until: Any, max_new_tokens: int, stop_ids: Any, stop: Any) -> Any:
            num = next(n for n in range(1, len(tokens) + 1) if n == len(tokens) or stop(0, tokens[:n]))
            self.num_tokens = num
            return [tokens[:num]]

    model = Qwen3Model(build(vocab_size=tokenizer.vocab_size), max_length=96)
    scorer = Written(model, token_budget=150)
    options = {"until": ["\u00e9t\u00e9\u00e9\u00e9"], "max_gen_toks": 40}
    lm = HarnessModel(model, tokenizer, scorer)
    assert lm.generate_until([Instance("generate_until", {}, ("a", options), 0)]) == ["the model "]
    assert scorer.num_tokens == len(tokenizer.encode("the model \u00e9t\u00e9\u00e9\u00e9"))


def test_a_long_prompt_keeps_its_end_for_generation(tokenizer: Tokenizer) -> None:
    seen: list[list[int]] = []

    class Recorded(Scorer):
        """Records the prompts, and writes nothing."""

        def generate(self, prompts: Any, until: Any, max_new_tokens: int, stop_ids: Any, stop: Any) -> Any:
            seen.extend(prompts)
            return [[] for _ in prompts]

    model = Qwen3Model(build(vocab_size=tokenizer.vocab_size), max_length=20)
    lm = HarnessModel(model, tokenizer, Recorded(model, token_budget=150))
    text = "the model reads keys and values " * 9
    options = {"until": [], "max_gen_toks": 15}
    lm.generate_until([Instance("generate_until", {}, (text, options), 0)])
    assert seen == [tokenizer.encode(text)[-5:]]


def test_rolling_windows_are_those_of_the_harness() -> None:
    for num_tokens in (1, 7, 8, 9, 30):
        tokens = list(range(100, 100 + num_tokens))
        theirs = map(make_disjoint_window, get_rolling_token_windows(tokens, 0, 8, 1))
        whole = [0, *tokens]
        ours = [(whole[a:b], whole[b:c]) for a, b, c in windows(len(whole), 8)]
        assert ours == [(list(context), list(text)) for context, text in theirs]


def test_empty_contexts_and_continuations(tokenizer: Tokenizer) -> None:
    model = Qwen3Model(build(vocab_size=tokenizer.vocab_size + 4), max_length=96)
    lm = HarnessModel(model, tokenizer, Scorer(model, token_budget=100))
    pairs = [("", "the model"), ("<|endoftext|>", ""), ("the", ""), ("the ", "model"), ("the", " model")]
    found = lm.loglikelihood([Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)])
    end, text = tokenizer.end_of_document_id, tokenizer.encode("the model")
    (scores,) = model.score([Group((end,), (tuple(text),))])[0]
    assert found[0][0] == pytest.approx(sum(scores.log_probs), abs=1e-4)
    assert found[1] == found[2] == (0.0, True)
    assert found[3] == found[4]
    assert found[3][0] < 0


def test_an_added_token_in_task_text_is_that_token(tokenizer: Tokenizer) -> None:
    model = Qwen3Model(build(vocab_size=tokenizer.vocab_size), max_length=96)
    lm = HarnessModel(model, tokenizer, Scorer(model, token_budget=100))
    end, (before, after) = tokenizer.end_of_document_id, tokenizer.encode_batch(["the", "model"])
    assert lm.tok_encode("the<|endoftext|>model") == [*before, end, *after]
    pair = ("the<|endoftext|>", "model")
    (found,) = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0)])
    (scores,) = model.score([Group((*before, end), (tuple(after),))])[0]
    assert found[0] == pytest.approx(sum(scores.log_probs), abs=1e-4)


def test_the_mean_of_the_paper_s_accuracies_and_standard_errors(
    tasks_folder: Path, tokenizer: Tokenizer
) -> None:
    model = Qwen3Model(build(vocab_size=tokenizer.vocab_size + 4), max_length=96)
    results = evaluate_tasks(model, tokenizer, ["paper"], data=tasks_folder, limit=10, token_budget=2000)
    assert set(results.metrics) == set(PAPER)
    assert set(results.num_documents.values()) == {10}
    best = [results.metrics[t]["acc_norm" if t in NORMALIZED else "acc"] for t in ACCURACIES]
    assert results.mean_accuracy == pytest.approx(sum(best) / 8)
    plain = [results.metrics[task]["acc"] for task in ACCURACIES]
    assert results.mean_plain_accuracy == pytest.approx(sum(plain) / 8)
    p = results.metrics["boolq"]["acc"]
    assert results.metrics["boolq"]["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 9))
    assert results.metrics["wikitext"]["word_perplexity"] > 1
    assert "word_perplexity_stderr" not in results.metrics["wikitext"]
    assert results.metrics["lambada_openai"]["perplexity_stderr"] > 0


def test_a_perplexity_that_overflows_is_infinite_and_leaves_the_other_tasks(
    tasks_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    # without a space a page is one word, of thousands of nats
    (tmp_path / "wikitext.jsonl").write_text(json.dumps({"page": "\u8a9e" * 400}) + "\n")
    (tmp_path / "sciq.jsonl").write_bytes((tasks_folder / "sciq.jsonl").read_bytes())
    model = Qwen3Model(build(vocab_size=tokenizer.vocab_size + 4), max_length=96)
    results = evaluate_tasks(model, tokenizer, ["wikitext", "sciq"], data=tmp_path)
    assert results.metrics["wikitext"]["word_perplexity"] == math.inf
    assert 0 < results.metrics["wikitext"]["bits_per_byte"] < math.inf
    assert "acc_stderr" in results.metrics["sciq"]
    assert " inf " in format_table(results)


def test_the_standard_error_of_a_perplexity_is_that_of_its_logarithm_times_itself(
    tasks_folder: Path, tokenizer: Tokenizer
) -> None:
    model = Qwen3Model(build(), max_length=96)
    results = evaluate_tasks(model, tokenizer, ["lambada_openai"], data=tasks_folder)
    metrics = results.metrics["lambada_openai"]
    lm = HarnessModel(model, tokenizer, Scorer(model, token_budget=2000))
    lines = (tasks_folder / "lambada_openai.jsonl").read_text().splitlines()
    pairs = [json.loads(line)["text"].rsplit(" ", 1) for line in lines]
    requests = [Instance("loglikelihood", {}, (a, f" {b}"), i) for i, (a, b) in enumerate(pairs)]
    log_probs = np.array([log_prob for log_prob, _ in lm.loglikelihood(requests)])
    assert metrics["perplexity"] == pytest.approx(np.exp(-log_probs.mean()), rel=1e-5)
    error = metrics["perplexity"] * log_probs.std(ddof=1) / len(pairs) ** 0.5
    assert metrics["perplexity_stderr"] == pytest.approx(error, rel=1e-4)
    assert metrics["acc_stderr"] == pytest.approx(
        (metrics["acc"] * (1 - metrics["acc"]) / (len(pairs) - 1)) ** 0.5
    )


def test_saved_results_are_of_one_model_one_max_length_and_one_tokenizer(
    tasks_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def run(max_length: int = 96, identity: str = "debug") -> int:
        model = Qwen3Model(build(), max_length=max_length, identity=identity)
        file = tmp_path / "requests.jsonl"
        found = evaluate_tasks(model, tokenizer, ["sciq"], data=tasks_folder, limit=2, cache_file=file)
        return found.num_reused

    assert run() == 0
    assert run() > 0
    for changes in ({"max_length": 64}, {"identity": "other"}):
        with pytest.raises(UserError, match="holds results of another checkpoint or tokenizer"):
            run(**changes)  # pyrefly: ignore [bad-argument-type]


def test_an_interrupted_evaluation_resumes(tasks_folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    network = build(vocab_size=tokenizer.vocab_size + 4)
    where = {"data": tasks_folder, "token_budget": 1000, "cache_file": tmp_path / "requests.jsonl"}
    tasks = ["piqa", "hellaswag", "wikitext"]
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(InterruptedModel(network, interrupt_after=3), tokenizer, tasks, **where)
    again = InterruptedModel(network, interrupt_after=100)
    resumed = evaluate_tasks(again, tokenizer, tasks, **where)
    whole_model = InterruptedModel(network, interrupt_after=100)
    whole = evaluate_tasks(whole_model, tokenizer, tasks, data=tasks_folder, token_budget=1000)
    assert resumed.num_reused > 0
    assert again.left > whole_model.left
    for task in tasks:
        assert resumed.metrics[task] == pytest.approx(whole.metrics[task], rel=1e-6)
    other = Qwen3Model(network, max_length=96, identity="another")
    with pytest.raises(ValueError, match="holds results of another checkpoint"):
        evaluate_tasks(other, tokenizer, tasks, **where)
    with pytest.raises(ValueError, match="has no identity"):
        evaluate_tasks(Qwen3Model(network, max_length=96), tokenizer, tasks, **where)


def _evaluate_on_two(rank: int, folder: str, tasks: str, tokenizer: Tokenizer) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = Qwen3Model(build(vocab_size=tokenizer.vocab_size + 4), max_length=96, identity="x")
    results = evaluate_tasks(
        model,
        tokenizer,
        ["piqa", "lambada_openai"],
        data=Path(tasks),
        token_budget=500,
        cache_file=Path(folder, "requests.jsonl"),
    )
    Path(folder, f"{rank}.json").write_text(json.dumps([results.metrics, results.num_documents]))
    dist.destroy_process_group()


def test_two_ranks_return_the_results_of_one(
    tasks_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    run_ranks(_evaluate_on_two, 2, str(tmp_path), str(tasks_folder), tokenizer)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    model = Qwen3Model(build(vocab_size=tokenizer.vocab_size + 4), max_length=96)
    one = evaluate_tasks(model, tokenizer, ["piqa", "lambada_openai"], data=tasks_folder)
    for task, metrics in one.metrics.items():
        assert first[0][task] == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, r"has no documents of piqa: want piqa.jsonl or piqa.arrow"),
        ("", r"piqa.jsonl has no documents of piqa"),
        ('{"goal": "a", "sol1": "b"\n', r"piqa.jsonl, line 1 is not valid JSON"),
        (
            b'{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n{"goal": "caf\xe9"}\n',
            r"piqa.jsonl is not UTF-8: byte 14 of line 2 is 0xe9",
        ),
        (
            r'{"goal": "a", "sol1": "b\ud83d", "sol2": "c", "label": 0}' + "\n",
            r"piqa.jsonl, line 1, sol1 has '\\ud83d' as character 2, half of a surrogate pair",
        ),
        (
            r'{"goal": "a", "sol1": "b", "sol2": "c", "label": 0, "more": {"x": ["y", "\udc00"]}}' + "\n",
            r"piqa.jsonl, line 1, more has '\\udc00' as character 1",
        ),
        ("[1]\n", r"piqa.jsonl, line 1 is a list, want a JSON object"),
        (
            '{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n{"goal": "a", "sol1": "b", "label": 1}\n',
            r"piqa.jsonl, document 2 has no sol2, required by piqa; it has goal, label, sol1",
        ),
    ],
)
def test_a_file_that_is_missing_or_malformed_is_named(
    tmp_path: Path, tokenizer: Tokenizer, content: str | bytes | None, complaint: str
) -> None:
    if content is not None:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / "piqa.jsonl").write_bytes(data)
    model = Qwen3Model(build(), max_length=96)
    with pytest.raises(ValueError, match=complaint):
        evaluate_tasks(model, tokenizer, ["piqa"], data=tmp_path)


def test_a_damaged_arrow_file_and_an_unknown_task_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "sciq.arrow").write_bytes(b"no arrow at all")
    model = Qwen3Model(build(), max_length=96)
    with pytest.raises(ValueError, match=r"sciq.arrow is not a readable Arrow file"):
        evaluate_tasks(model, tokenizer, ["sciq"], data=tmp_path)
    # "caf" and a byte that is not UTF-8, in a column that says it is
    raw = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"caf\xe9")]
    )
    table = pa.table({"question": raw})
    with pa.OSFile(str(tmp_path / "sciq.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=r"sciq.arrow is not a readable Arrow file \(.*UTF8"):
        evaluate_tasks(model, tokenizer, ["sciq"], data=tmp_path)
    with pytest.raises(ValueError, match=r"has no task hellaswagg; nearest is hellaswag; "):
        evaluate_tasks(model, tokenizer, ["hellaswagg"], data=tmp_path)
    with pytest.raises(UserError, match=r"has no task piqa,sciq; .*separate names by spaces"):
        evaluate_tasks(model, tokenizer, ["piqa,sciq"], data=tmp_path)


def test_a_few_shot_task_needs_examples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    document = json.dumps({"question": "1 + 1?", "answer": "so #### 2"})
    (tmp_path / "gsm8k.jsonl").write_text(document + "\n")
    model = Qwen3Model(build(), max_length=96)
    with pytest.raises(ValueError, match=r"gsm8k has 5 few-shot examples: want them in .*gsm8k.train.jsonl"):
        evaluate_tasks(model, tokenizer, ["gsm8k"], data=tmp_path)


def test_an_unreachable_hub_is_an_error_of_one_line_that_names_the_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'sciq' on the Hub\n(LocalEntryNotFoundError)")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"^no documents of sciq: the hub could not be .*--data DIR$"
    ) as raised:
        load_tasks(["sciq"], None)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value.__cause__, ConnectionError)
