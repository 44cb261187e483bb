"""Progress of evaluations: lines with the time left, few of them, and fractions that grow to 1."""

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data.config import JsonlSource, MixtureSource, ShardsSource
from data.loading.held_out import HeldOutLoader
from data.progress import Progress
from data.shards import __main__ as shards
from data.sources.base import DocumentSource
from data.sources.document_sample import draw_sample
from data.sources.held_out import FirstTokens
from data.sources.open import open_source
from data.tokenizer import Tokenizer
from eval.scoring.language_model import Qwen3Model
from eval.scoring.scorer import Scorer
from eval.text_loss import text_loss
from tests.conftest import make_text
from tests.eval.conftest import build, ids


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of the monotonic clock, to be set."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_a_minute_and_none_of_short_work(clock: list[float]) -> None:
    lines: list[str] = []
    progress = Progress(lines.append)
    progress.start("loss")
    for second in range(1, 181):
        clock[0] = 1000.0 + second
        progress.update(second / 240)
    assert lines == ["loss  25%, 3m00s left", "loss  50%, 2m00s left", "loss  75%, 1m00s left"]
    progress.start("tasks")
    clock[0] += 59
    progress.update(1.0)
    progress.close()
    assert len(lines) == 3


def test_a_terminal_gets_one_line_that_moves_and_is_cleared(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress()
    progress.start("loss")
    progress.update(0.1)
    assert terminal.getvalue() == ""
    clock[0] += 10
    progress.update(0.1)
    clock[0] += 1
    progress.update(0.5)
    assert terminal.getvalue() == "\rloss  10%, 1m30s left\rloss  50%, 11s left  "
    progress.close()
    assert terminal.getvalue().endswith("left  \r" + " " * 19 + "\r")


class Recorded(Progress):
    """Keeps all fractions."""

    def __init__(self) -> None:
        super().__init__()
        self.fractions: list[float] = []

    def update(self, fraction: float) -> None:
        self.fractions.append(fraction)


def open_kinds(folder: Path, tokenizer: Tokenizer) -> dict[str, DocumentSource]:
    texts = [make_text(seed, 3 + seed % 20) for seed in range(60)]
    for name, rows in (("a", texts[:20]), ("b", texts[20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    tokenizer.save(folder / "tokenizer.json")
    words = ["prepare", "--files", f"{folder}/*.jsonl", "--tokenizer", f"{folder}/tokenizer.json"]
    shards.main([*words, "--out", f"{folder}/shards", "--processes", "0"])
    jsonl = JsonlSource(files=[f"{folder}/*.jsonl"])
    single = JsonlSource(files=[f"{folder}/a.jsonl"])
    mixture = MixtureSource(weights={"x": 1.0, "y": 3.0}, sources={"x": jsonl, "y": single})
    prepared = ShardsSource(folder=f"{folder}/shards")
    kinds = {"jsonl": jsonl, "mixture": mixture, "shards": prepared}
    opened = {
        name: open_source(source, tokenizer_fingerprint=tokenizer.fingerprint, split="all")
        for name, source in kinds.items()
    }
    sample = draw_sample([opened["jsonl"]], tokenizer, 300, "sample")
    return {**opened, "first tokens": FirstTokens(opened["shards"], 300), "sample": sample}


def test_the_fraction_of_every_kind_of_source_grows_to_1(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name, source in open_kinds(tmp_path, tokenizer).items():
        recorded = Recorded()
        if name != "first tokens":
            draw_sample([source, source], tokenizer, 100, "x", recorded)
            assert recorded.fractions == sorted(recorded.fractions), name
            assert recorded.fractions[-1] == 1.0, name
        positions = [None, *(row.next_position for row in source.read(repeat=False))]
        fractions = [source.progress(position) for position in positions]
        assert fractions == sorted(fractions), name
        assert (fractions[0], fractions[-1]) == (0.0, 1.0), name
        assert 0.2 < fractions[len(fractions) // 2] < 0.8, name
        loader = HeldOutLoader(source, tokenizer, seq_len=32, local_batch_size=1)
        batches = [batch.fraction for batch in loader]
        assert batches == sorted(batches), name
        assert batches[-1] == 1.0, name
        assert batches[0] < 0.3, name


def test_the_loss_on_text_and_the_scorer_tell_how_much_is_done(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = Qwen3Model(build(), max_length=64)
    source = open_kinds(tmp_path, tokenizer)["jsonl"]
    recorded = Recorded()
    fractions = recorded.fractions
    choices: tuple[dict[str, Any], ...] = ({}, {"limit": 15}, {"max_tokens": 200})
    for options in choices:
        fractions.clear()
        text_loss(model, tokenizer, source, token_budget=16, progress=recorded, **options)
        assert len(fractions) > 5
        assert fractions == sorted(fractions)
        assert fractions[-1] == pytest.approx(1.0)
        assert fractions[0] < 0.5
    scorer = Scorer(model, token_budget=100, progress=recorded)
    fractions.clear()
    scorer.log_likelihoods([(ids(n, 5 + n), ids(50 + n, 3)) for n in range(20)])
    assert len(fractions) > 3
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1.0)
    fractions.clear()
    scorer.generate([list(ids(n, 5)) for n in range(20)], [[]] * 20, 4, (), lambda _row, _tokens: False)
    assert len(fractions) > 1
    assert fractions[-1] == 1.0
