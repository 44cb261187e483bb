"""Our models in lm-evaluation-harness: resumable, the same on all ranks, clear about bad files."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import multiprocessing as mp

pytest.importorskip("lm_eval", reason="wants the extra `eval`")

from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from config import to_table, to_toml
from data.tokenizer import Tokenizer
from eval.downstream import HarnessModel, evaluate_tasks, load_tasks, main
from eval.scoring.groups import Group, Scores
from eval.scoring.language_model import Qwen3Model
from eval.scoring.scorer import Scorer, windows
from eval.task_results import ACCURACIES, NORMALIZED, PAPER
from models.qwen3 import Qwen3
from tests.eval.conftest import build


class Breaking(Qwen3Model):
    """Breaks after so many batches."""

    def __init__(self, model: Qwen3, *, breaks_after: int) -> None:
        super().__init__(model, max_length=96, identity="debug")
        self.left = breaks_after

    def score(self, groups: Sequence[Group]) -> list[list[Scores]]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().score(groups)


class Knowing(Qwen3Model):
    """Says the letter whose answer is the right one, and keeps what it was asked."""

    def __init__(self, model: Qwen3, tokenizer: Tokenizer) -> None:
        super().__init__(model, max_length=2000)
        self.tokenizer = tokenizer
        self.asked: list[Group] = []

    def score(self, groups: Sequence[Group]) -> list[list[Scores]]:
        self.asked += groups
        return [[self._score(group, each) for each in group.continuations] for group in groups]

    def _score(self, group: Group, continuation: tuple[int, ...]) -> Scores:
        is_right = f"{self.tokenizer.decode(continuation).strip()} right" in self.tokenizer.decode(
            group.context
        )
        return Scores([0.0 if is_right else -1.0] * len(continuation), [is_right] * len(continuation))


def test_answers_in_drawn_order_are_judged_as_asked_and_asked_alike_by_every_process(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    # the harness shuffles the answers with Python's random numbers
    wrong = {f"Incorrect Answer {n}": f"wrong {n}" for n in (1, 2, 3)}
    documents = [{"Question": f"{n}?", "Correct Answer": "right", **wrong} for n in range(20)]
    file = tmp_path / "gpqa_main_zeroshot.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in documents))
    network = build(vocab_size=tokenizer.vocab_size + 4)
    asked = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        states = random.getstate(), repr(np.random.get_state())
        model = Knowing(network, tokenizer)
        results = evaluate_tasks(model, tokenizer, ["gpqa_main_zeroshot"], data=tmp_path)
        assert results.metrics["gpqa_main_zeroshot"]["acc"] == 1.0
        assert (random.getstate(), repr(np.random.get_state())) == states
        asked.append(model.asked)
    assert asked[0] == asked[1]
    orders = {tokenizer.decode(group.context).split("?", 1)[1] for group in asked[0]}
    assert len(orders) > 5


def test_what_ends_a_text_is_looked_for_in_its_last_tokens(
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
    num_new = sizes.pop()
    assert num_new < 40
    assert len(sizes) == num_new
    assert max(sizes) == len("never") + 1


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


def test_the_paper_s_mean_and_standard_errors(tasks_folder: Path, tokenizer: Tokenizer) -> None:
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


def test_an_interrupted_evaluation_is_resumed(
    tasks_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    network = build(vocab_size=tokenizer.vocab_size + 4)
    where = {"data": tasks_folder, "token_budget": 1000, "cache_file": tmp_path / "requests.jsonl"}
    tasks = ["piqa", "hellaswag", "wikitext"]
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(Breaking(network, breaks_after=3), tokenizer, tasks, **where)
    again = Breaking(network, breaks_after=100)
    resumed = evaluate_tasks(again, tokenizer, tasks, **where)
    whole_model = Breaking(network, breaks_after=100)
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


def test_two_ranks_give_the_results_of_one(tasks_folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    mp.spawn(_evaluate_on_two, (str(tmp_path), str(tasks_folder), tokenizer), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    model = Qwen3Model(build(vocab_size=tokenizer.vocab_size + 4), max_length=96)
    one = evaluate_tasks(model, tokenizer, ["piqa", "lambada_openai"], data=tasks_folder)
    for task, metrics in one.metrics.items():
        assert first[0][task] == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, r"has no documents of piqa: wanted piqa.jsonl or piqa.arrow"),
        ("", r"piqa.jsonl holds no document of piqa"),
        ('{"goal": "a", "sol1": "b"\n', r"piqa.jsonl, line 1 is no JSON"),
        ("[1]\n", r"piqa.jsonl, line 1 is list, wanted a JSON object"),
        (
            '{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n{"goal": "a", "sol1": "b", "label": 1}\n',
            r"piqa.jsonl, document 2 has no sol2, which piqa needs; it has goal, label, sol1",
        ),
    ],
)
def test_a_file_that_is_missing_or_malformed_is_named(
    tmp_path: Path, tokenizer: Tokenizer, content: str | None, complaint: str
) -> None:
    if content is not None:
        (tmp_path / "piqa.jsonl").write_text(content)
    model = Qwen3Model(build(), max_length=96)
    with pytest.raises(ValueError, match=complaint):
        evaluate_tasks(model, tokenizer, ["piqa"], data=tmp_path)


def test_a_damaged_arrow_file_and_an_unknown_task_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "sciq.arrow").write_bytes(b"no arrow at all")
    model = Qwen3Model(build(), max_length=96)
    with pytest.raises(ValueError, match=r"sciq.arrow is no Arrow file that can be read"):
        evaluate_tasks(model, tokenizer, ["sciq"], data=tmp_path)
    with pytest.raises(ValueError, match=r"has no task hellaswagg"):
        evaluate_tasks(model, tokenizer, ["hellaswagg"], data=tmp_path)


def test_a_few_shot_task_wants_examples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    document = json.dumps({"question": "1 + 1?", "answer": "so #### 2"})
    (tmp_path / "gsm8k.jsonl").write_text(document + "\n")
    model = Qwen3Model(build(), max_length=96)
    with pytest.raises(ValueError, match=r"gsm8k shows 5 examples: put some into .*gsm8k.train.jsonl"):
        evaluate_tasks(model, tokenizer, ["gsm8k"], data=tmp_path)


def save_run(folder: Path, tokenizer_folder: Path, model: Qwen3, **data: object) -> None:
    table = {
        "model": to_table(model.config),
        "data": {"tokenizer": str(tokenizer_folder), "end_of_document": "<|endoftext|>", **data},
        "training": {"seq_len": 96},
    }
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(table))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    dcp.save(weights, checkpoint_id=folder / "checkpoint" / "step-7", no_dist=True)


def test_the_command_prints_a_table_and_writes_results(
    tasks_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(vocab_size=304)
    save_run(tmp_path / "run", corpus, model)
    words = ["--checkpoint", f"{tmp_path}/run", "--tasks", "paper", "--data", f"{tasks_folder}"]
    main([*words, "--limit", "4", "--out", f"{tmp_path}/out"])
    printed = capsys.readouterr().out
    assert "mean of eight" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["checkpoint"].endswith("step-7")
    assert results["harness"] == "0.4.13"
    assert results["tokenizer_fingerprint"] == Tokenizer.load(corpus).fingerprint
    assert (results["max_length"], results["dtype"]) == (96, "float32")
    assert set(results["metrics"]) == set(PAPER)
    assert f"{results['mean_accuracy']:.4f}" in printed
    main([*words, "--limit", "4", "--out", f"{tmp_path}/out"])
    assert "were taken from an earlier evaluation" in capsys.readouterr().out
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["metrics"] == results["metrics"]
    assert again["num_tokens"] == 0
    with pytest.raises(SystemExit, match=r"eval.downstream: .* is no checkpoint"):
        main(["--checkpoint", f"{tmp_path}/none", "--tasks", "paper"])
    with pytest.raises(SystemExit, match=r"eval.downstream: --limit is 0, must be at least 1"):
        main([*words, "--limit", "0"])


def test_a_hub_out_of_reach_is_one_line_that_names_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'sciq' on the Hub\n(LocalEntryNotFoundError)")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"^no documents of sciq: the hub could not be .*--data DIR$"
    ) as raised:
        load_tasks(["sciq"], None)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value.__cause__, ConnectionError)
