"""Perplexity of text: windows, bytes and words count as stated, and the command reads what a run has."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import BPE
from torch import multiprocessing as mp

from config import to_table, to_toml
from data.config import JsonlSource, MixtureSource, ParquetSource, ShardsSource
from data.loading.loader import PackedLoader
from data.sources.base import DocumentSource
from data.sources.open import open_source
from data.tokenizer import Tokenizer
from data.train_tokenizer import train_byte_level_bpe
from eval import perplexity as text_loss_module
from eval.held_out import held_out_loss
from eval.perplexity import main, saved_source, text_loss
from eval.scoring.groups import Group, Scores
from eval.scoring.language_model import Qwen3Model
from models.qwen3 import Qwen3
from tests.conftest import make_text
from tests.eval.conftest import build


def documents(folder: Path, texts: list[str], tokenizer: Tokenizer) -> DocumentSource:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return open_source(
        JsonlSource(files=[str(path)]), tokenizer_fingerprint=tokenizer.fingerprint, split="all"
    )


def log_probs(model: Qwen3, tokens: list[int]) -> torch.Tensor:
    """Of every token but the first, given all before it, fp64 `[T - 1]`."""
    logits = model(torch.tensor([tokens[:-1]]))[0].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def test_documents_that_fit_have_the_loss_that_training_measures(corpus: Path, tokenizer: Tokenizer) -> None:
    source = ParquetSource(files=[str(corpus / "validation.parquet")])
    opened = open_source(source, tokenizer_fingerprint=tokenizer.fingerprint, split="all")
    model = build()
    found = text_loss(Qwen3Model(model, max_length=4096), tokenizer, opened, token_budget=300)
    loader = PackedLoader(
        opened,
        tokenizer,
        seq_len=4096,
        local_batch_size=1,
        global_batch_size=1,
        dp_rank=0,
        dp_world_size=1,
        repeat=False,
        prefetch_batches=0,
    )
    device = torch.device("cpu")
    wanted = held_out_loss(model, loader, vocab_size=320, max_seqlen=4096, device=device)
    assert found.num_documents == 10
    assert found.num_tokens == wanted.num_tokens
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert found.perplexity == pytest.approx(wanted.perplexity, rel=1e-4)


def test_bits_per_byte_are_of_the_bytes_that_were_predicted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "the model reads \u00e9t\u00e9 tokens"
    model = build()
    found = text_loss(Qwen3Model(model, max_length=64), tokenizer, documents(tmp_path, [text], tokenizer))
    tokens = [*tokenizer.encode(text), tokenizer.end_of_document_id]
    nats = -log_probs(model, tokens)
    assert found.loss == pytest.approx(float(nats.mean()), rel=1e-5)
    first = tokenizer.decode(tokens[:1]).encode()
    bits = float(nats[:-1].sum()) / math.log(2)
    assert found.bits_per_byte == pytest.approx(bits / (len(text.encode()) - len(first)), rel=1e-5)
    assert found.word_perplexity is None


def test_bits_per_byte_count_a_character_of_several_tokens_by_its_bytes(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    text = "\U0001f600 hi"
    tokens = [*tokenizer.encode(text), tokenizer.end_of_document_id]
    assert [tokenizer.num_bytes(token) for token in tokens[:4]] == [1] * 4
    model = build()
    found = text_loss(Qwen3Model(model, max_length=64), tokenizer, documents(tmp_path, [text], tokenizer))
    bits = -float(log_probs(model, tokens)[:-1].sum()) / math.log(2)
    assert found.bits_per_byte == pytest.approx(bits / 6, rel=1e-5)

    # a vocabulary whose unknown characters fall back to bytes
    names = ["<|endoftext|>", "a", "\u2581", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.save(str(tmp_path / "fallback.json"))
    fallback = Tokenizer.load(tmp_path / "fallback.json", end_of_document="<|endoftext|>")
    assert [fallback.num_bytes(token) for token in fallback.encode("\u00e9a")] == [1, 1, 1]


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_sliding_windows_give_each_token_the_context_that_they_say(
    tmp_path: Path, tokenizer: Tokenizer, stride: int
) -> None:
    model, text = build(), make_text(3, 12)
    opened = documents(tmp_path, [text], tokenizer)
    found = text_loss(Qwen3Model(model, max_length=8), tokenizer, opened, stride=stride)
    tokens = [*tokenizer.encode(text), tokenizer.end_of_document_id]
    assert len(tokens) > 20
    nats, seen = [], []
    begin, last = 1, 9
    while begin < len(tokens):
        last = min(last, len(tokens))
        first = max(last - 9, 0)
        nats += (-log_probs(model, tokens[first:last]))[begin - last :].tolist()
        seen += range(begin - first, last - first)
        begin, last = last, last + stride
    assert found.num_tokens == len(nats) == len(tokens) - 1
    assert found.loss == pytest.approx(np.mean(nats), rel=1e-5)
    for each in found.per_position:
        own = [n for n, s in zip(nats, seen, strict=True) if each.first <= s <= each.last]
        assert each.num_tokens == len(own)
        assert each.loss == pytest.approx(np.mean(own), rel=1e-5)
    assert sum(each.num_tokens for each in found.per_position) == found.num_tokens


def test_wikitext_and_last_words_are_what_the_harness_says(
    tmp_path: Path, tasks_folder: Path, tokenizer: Tokenizer
) -> None:
    downstream = pytest.importorskip("eval.downstream", reason="wants the extra `eval`")
    model = Qwen3Model(build(), max_length=96)
    theirs = downstream.evaluate_tasks(model, tokenizer, ["wikitext", "lambada_openai"], data=tasks_folder)

    def read(task: str, key: str) -> DocumentSource:
        lines = (tasks_folder / f"{task}.jsonl").read_text().splitlines()
        return documents(tmp_path, [json.loads(line)[key] for line in lines], tokenizer)

    wikitext = text_loss(model, tokenizer, read("wikitext", "page"), mode="wikitext")
    metrics = theirs.metrics["wikitext"]
    assert wikitext.word_perplexity == pytest.approx(metrics["word_perplexity"], rel=1e-4)
    assert wikitext.bits_per_byte == pytest.approx(metrics["bits_per_byte"], rel=1e-5)
    lambada = text_loss(model, tokenizer, read("lambada_openai", "text"), mode="last-word")
    metrics = theirs.metrics["lambada_openai"]
    assert lambada.word_perplexity == pytest.approx(metrics["perplexity"], rel=1e-4)
    assert lambada.last_word_accuracy == metrics["acc"]


class Knowing(Qwen3Model):
    """Expects every token but one."""

    def __init__(self, unexpected: int) -> None:
        super().__init__(build(), max_length=8)
        self.unexpected = unexpected

    def score(self, groups: Sequence[Group]) -> list[list[Scores]]:
        return [
            [Scores([-1.0] * len(each), [token != self.unexpected for token in each])]
            for group in groups
            for each in group.continuations
        ]


def test_a_last_word_of_many_windows_counts_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    context = make_text(1, 12)
    (unexpected,) = tokenizer.encode("7")
    opened = documents(tmp_path, [f"{context} 0123456", f"{context} 01234567", context + " 8"], tokenizer)
    found = text_loss(Knowing(unexpected), tokenizer, opened, mode="last-word", stride=1, token_budget=10)
    assert found.num_tokens > 3 * 3
    assert found.last_word_accuracy == pytest.approx(2 / 3)


def test_windows_of_a_long_document_do_not_pile_up(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[int] = []
    plain = text_loss_module.score_groups

    def seen(model: Qwen3Model, groups: list[Group], token_budget: int) -> object:
        waiting.append(sum(len(group.context) + len(group.continuations[0]) for group in groups))
        return plain(model, groups, token_budget)

    monkeypatch.setattr(text_loss_module, "score_groups", seen)
    opened = documents(tmp_path, [make_text(3, 150)], tokenizer)
    found = text_loss(Knowing(0), tokenizer, opened, stride=1, token_budget=10)
    assert found.loss == 1.0
    assert sum(waiting) > 8 * 160
    assert max(waiting) <= 16 * 10 + 9


def test_a_text_without_anything_to_predict_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = Qwen3Model(build(), max_length=16)
    opened = documents(tmp_path, ["one"], tokenizer)
    with pytest.raises(ValueError, match="last-word mode needs a space"):
        text_loss(model, tokenizer, opened, mode="last-word")
    with pytest.raises(ValueError, match="stride is 17, must be from 1 to 16"):
        text_loss(model, tokenizer, opened, stride=17)


def _loss_on_two(rank: int, folder: str, tokenizer: Tokenizer, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    source = ParquetSource(files=[path])
    opened = open_source(source, tokenizer_fingerprint=tokenizer.fingerprint, split="all")
    found = text_loss(Qwen3Model(build(), max_length=32), tokenizer, opened, token_budget=200)
    Path(folder, f"{rank}.txt").write_text(f"{found.num_tokens} {found.loss!r}")
    dist.destroy_process_group()


def test_two_ranks_give_the_loss_of_one(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = str(corpus / "validation.parquet")
    mp.spawn(_loss_on_two, (str(tmp_path), tokenizer, path), nprocs=2)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    opened = open_source(
        ParquetSource(files=[path]), tokenizer_fingerprint=tokenizer.fingerprint, split="all"
    )
    one = text_loss(Qwen3Model(build(), max_length=32), tokenizer, opened, token_budget=200)
    num_tokens, loss = first.split()
    assert int(num_tokens) == one.num_tokens
    assert float(loss) == pytest.approx(one.loss, rel=1e-6)


def make_run(run: Path, corpus: Path, tokenizer: Path) -> None:
    """A run folder with a checkpoint of random weights."""
    model = build(vocab_size=304)
    validation = to_table(ParquetSource(files=[str(corpus / "validation.parquet")]))
    data = {"tokenizer": str(tokenizer), "end_of_document": "<|endoftext|>", "validation_documents": "all"}
    table = {
        "model": to_table(model.config),
        "data": {**data, "validation": validation},
        "training": {"seq_len": 48},
    }
    (run / "checkpoint").mkdir(parents=True)
    (run / "config.toml").write_text(to_toml(table))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    dcp.save(weights, checkpoint_id=run / "checkpoint" / "step-2", no_dist=True)


def test_the_command_reads_the_run_s_held_out_text_or_another(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    make_run(run, corpus, corpus)
    main(["--checkpoint", f"{run}", "--out", f"{tmp_path}/out"])
    own = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert own["stride"] == own["max_length"] == 48
    assert f"{own['loss']:.4f} nats/token" in capsys.readouterr().out
    main(["--checkpoint", f"{run}", "--files", f"{corpus}/train.parquet", "--stride", "16"])
    assert "of 200 documents" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"eval.perplexity: .*nothing.parquet"):
        main(["--checkpoint", f"{run}", "--files", f"{corpus}/nothing.parquet"])


def test_a_tokenizer_that_has_changed_since_the_training_is_refused_unless_it_was_chosen(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    run, other = tmp_path / "run", tmp_path / "other.json"
    make_run(run, corpus, other)
    launches = [{"step": 0, "launch": {"tokenizer_fingerprint": tokenizer.fingerprint}}, {"step": 2}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in launches))
    train_byte_level_bpe(["other text of other letters"], 260).save(str(other))
    found = Tokenizer.load(other)
    said = f"{other} has fingerprint {found.fingerprint}, but {run} was .*{tokenizer.fingerprint}"
    with pytest.raises(SystemExit, match=f"{said}: put that one back, or name one with --tokenizer"):
        main(["--checkpoint", f"{run}"])
    for name, path, wanted in (("a", other, found), ("b", corpus, tokenizer)):
        main(["--checkpoint", f"{run}", "--tokenizer", f"{path}", "--out", f"{tmp_path}/{name}"])
        facts = json.loads((tmp_path / name / "perplexity.json").read_text())
        assert facts["tokenizer_fingerprint"] == wanted.fingerprint
        assert facts["dtype"] == "float32"


def test_the_command_refuses_what_it_cannot_use_before_it_evaluates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    run = ["--checkpoint", f"{tmp_path}/none"]
    for out in (file, file / "below"):
        with pytest.raises(SystemExit, match=f"--out is {out}, but {file} is a file; want a folder"):
            main([*run, "--out", f"{out}"])
    for words in (["--fles", "a.parquet"], ["--files", "a.parquet", "--strde=3"], ["stray"]):
        with pytest.raises(SystemExit, match="2"):
            main([*run, *words])
        wrong = words[-1] if len(words) != 2 else words[0]
        assert f"unrecognized arguments: {wrong}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--files GLOB", "--hub-files", "--min-score", "--stride"))


def test_every_saved_source_becomes_what_it_was() -> None:
    leaf = ParquetSource(files=["a.parquet"], min_score=0.5)
    mixture = MixtureSource(weights={"a": 1.0, "b": 2.0}, sources={"a": leaf, "b": ShardsSource(folder="x")})
    for source in (leaf, mixture):
        table = {"validation": to_table(source), "validation_documents": "held_out"}
        assert saved_source(table) == (source, "held_out")
    with pytest.raises(ValueError, match=r"the run has no data.validation: name a text"):
        saved_source({"validation": "none", "validation_documents": "all"})
