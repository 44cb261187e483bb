"""Loss on text: windows, bytes and words are counted as documented, on one rank and on two."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import BPE

from data.config import JsonlSource, ParquetSource
from data.loading.held_out import HeldOutLoader
from data.sources.base import DocumentSource
from data.sources.open import open_source
from data.tokenizer import Tokenizer
from eval import text_loss as text_loss_module
from eval.held_out import held_out_loss
from eval.scored_text import Mode, read_texts
from eval.scoring.groups import Group, Scores
from eval.scoring.language_model import Qwen3Model
from eval.standard_error import ratio_standard_error
from eval.text_loss import format_result, text_loss
from models.qwen3 import Qwen3
from tests.conftest import make_text
from tests.eval.conftest import build
from tests.ranks import run_ranks


def documents(folder: Path, texts: list[str], tokenizer: Tokenizer) -> DocumentSource:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return open_source(
        JsonlSource(files=[str(path)]), tokenizer_fingerprint=tokenizer.fingerprint, split="all"
    )


def log_probs(model: Qwen3, tokens: list[int]) -> torch.Tensor:
    """Compute log-probabilities of all tokens but the first, fp64 `[T - 1]`."""
    logits = model(torch.tensor([tokens[:-1]]))[0].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def test_documents_that_fit_have_the_held_out_loss_of_training(corpus: Path, tokenizer: Tokenizer) -> None:
    source = ParquetSource(files=[str(corpus / "validation.parquet")])
    opened = open_source(source, tokenizer_fingerprint=tokenizer.fingerprint, split="all")
    model = build()
    found = text_loss(Qwen3Model(model, max_length=4096), tokenizer, opened, token_budget=300)
    loader = HeldOutLoader(opened, tokenizer, seq_len=4096, local_batch_size=1)
    device = torch.device("cpu")
    wanted = held_out_loss(model, loader, vocab_size=320, max_seqlen=4096, device=device)
    assert found.num_documents == 10
    assert found.num_tokens == wanted.num_tokens
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert found.perplexity == pytest.approx(wanted.perplexity, rel=1e-4)
    assert wanted.num_documents == 10
    assert found.standard_error == pytest.approx(wanted.standard_error, rel=1e-4)


def test_bits_per_byte_count_the_predicted_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
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


def test_without_a_predicted_byte_there_are_no_bits_per_byte(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = documents(tmp_path, ["a"], tokenizer)
    found = text_loss(Qwen3Model(build(), max_length=64), tokenizer, source)
    assert (found.num_tokens, found.num_bytes, found.bits_per_byte) == (1, 0, None)
    assert "bits/byte" not in format_result(found)


def test_bits_per_byte_count_the_bytes_of_a_character_of_several_tokens(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    text = "\U0001f600 hi"
    tokens = [*tokenizer.encode(text), tokenizer.end_of_document_id]
    assert [tokenizer.num_bytes(token) for token in tokens[:4]] == [1] * 4
    model = build()
    found = text_loss(Qwen3Model(model, max_length=64), tokenizer, documents(tmp_path, [text], tokenizer))
    bits = -float(log_probs(model, tokens)[:-1].sum()) / math.log(2)
    assert found.bits_per_byte == pytest.approx(bits / 6, rel=1e-5)

    # a vocabulary with byte fallback
    names = ["<|endoftext|>", "a", "\u2581", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.save(str(tmp_path / "fallback.json"))
    fallback = Tokenizer.load(tmp_path / "fallback.json", end_of_document="<|endoftext|>")
    assert [fallback.num_bytes(token) for token in fallback.encode("\u00e9a")] == [1, 1, 1]


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_sliding_windows_give_each_token_the_stated_context(
    tmp_path: Path, tokenizer: Tokenizer, stride: int
) -> None:
    model, text = build(), make_text(3, 12)
    opened = documents(tmp_path, [text], tokenizer)
    found = text_loss(Qwen3Model(model, max_length=8), tokenizer, opened, stride=stride)
    tokens = [*tokenizer.encode(text), tokenizer.end_of_document_id]
    assert len(tokens) > 20
    nats, lengths = [], []
    predicted, end = 1, 9
    while predicted < len(tokens):
        end = min(end, len(tokens))
        start = max(end - 9, 0)
        nats += (-log_probs(model, tokens[start:end]))[predicted - end :].tolist()
        lengths += range(predicted - start, end - start)
        predicted, end = end, end + stride
    assert found.num_tokens == len(nats) == len(tokens) - 1
    assert found.loss == pytest.approx(np.mean(nats), rel=1e-5)
    for each in found.per_position:
        own = [n for n, length in zip(nats, lengths, strict=True) if each.first <= length <= each.last]
        assert each.num_tokens == len(own)
        assert each.loss == pytest.approx(np.mean(own), rel=1e-5)
    assert sum(each.num_tokens for each in found.per_position) == found.num_tokens


def test_wikitext_and_last_words_have_the_metrics_of_the_harness(
    tmp_path: Path, tasks_folder: Path, tokenizer: Tokenizer
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    from eval.harness import evaluate_tasks

    model = Qwen3Model(build(), max_length=96)
    theirs = evaluate_tasks(model, tokenizer, ["wikitext", "lambada_openai"], data=tasks_folder)

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


def test_white_space_around_a_page_counts_as_in_the_harness(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    from eval.harness import evaluate_tasks

    # the harness removes spaces beside line ends: its text would be another one
    pages = [f"  {make_text(1, 20)} \t ", f"{make_text(2, 9)}  ", f"\n{make_text(3, 5)}\n"]
    lines = [json.dumps({"page": page}) + "\n" for page in pages]
    (tmp_path / "wikitext.jsonl").write_text("".join(lines))
    model = Qwen3Model(build(), max_length=96)
    theirs = evaluate_tasks(model, tokenizer, ["wikitext"], data=tmp_path).metrics["wikitext"]
    ours = text_loss(model, tokenizer, documents(tmp_path, pages, tokenizer), mode="wikitext")
    assert ours.word_perplexity == pytest.approx(theirs["word_perplexity"], rel=1e-4)
    assert ours.bits_per_byte == pytest.approx(theirs["bits_per_byte"], rel=1e-5)


class GreedyModel(Qwen3Model):
    """A model for which every token but one is greedy, at 1 nat."""

    def __init__(self, unexpected: int) -> None:
        super().__init__(build(), max_length=8)
        self.unexpected = unexpected

    def score(self, groups: Sequence[Group]) -> list[list[Scores]]:
        return [
            [Scores([-1.0] * len(each), [token != self.unexpected for token in each])]
            for group in groups
            for each in group.continuations
        ]


def test_a_last_word_in_several_windows_counts_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    context = make_text(1, 12)
    (unexpected,) = tokenizer.encode("7")
    opened = documents(tmp_path, [f"{context} 0123456", f"{context} 07234567", context + " 8"], tokenizer)
    found = text_loss(GreedyModel(unexpected), tokenizer, opened, mode="last-word", stride=1, token_budget=10)
    assert found.num_tokens > 3 * 3
    assert found.last_word_accuracy == pytest.approx(2 / 3)


def test_a_first_token_of_several_bytes_is_not_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = " the model reads"
    ids = tokenizer.encode(text)
    assert tokenizer.num_bytes(ids[0]) > 1
    found = text_loss(GreedyModel(0), tokenizer, documents(tmp_path, [text], tokenizer))
    num_bytes = len(text) - tokenizer.num_bytes(ids[0])
    assert found.bits_per_byte == pytest.approx((len(ids) - 1) / math.log(2) / num_bytes)


def test_the_end_of_document_written_out_is_text_in_documents_and_a_token_in_tasks(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    text, end = "a <|endoftext|> b", tokenizer.end_of_document_id
    opened = documents(tmp_path, [text], tokenizer)
    modes: tuple[Mode, ...] = ("documents", "wikitext", "last-word")
    counts = {
        mode: [each.tokens.count(end) for each in read_texts(opened, tokenizer, mode, Counter())]
        for mode in modes
    }
    # a document ends with one, a page begins with one
    assert counts == {"documents": [1], "wikitext": [2], "last-word": [1]}


@pytest.mark.parametrize("stride", [None, 1, 5])
def test_bits_per_byte_over_several_windows_leave_out_one_end_of_document_token(
    tmp_path: Path, tokenizer: Tokenizer, stride: int | None
) -> None:
    texts = [make_text(seed, 12) for seed in (3, 4)]
    found = text_loss(GreedyModel(0), tokenizer, documents(tmp_path, texts, tokenizer), stride=stride)
    ids = [tokenizer.encode(text) for text in texts]
    num_bytes = sum(map(len, texts)) - sum(tokenizer.num_bytes(each[0]) for each in ids)
    # each token has 1 nat; a document's first is not predicted, and its end is predicted but no text
    assert found.num_tokens == sum(map(len, ids)) > 4 * 8
    num_text_tokens = sum(map(len, ids)) - len(ids)
    assert found.bits_per_byte == pytest.approx(num_text_tokens / math.log(2) / num_bytes)


def test_the_standard_error_counts_a_document_of_several_windows_once(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    texts = [make_text(seed, 4 + 7 * seed) for seed in range(4)]
    model = Qwen3Model(build(), max_length=8)
    found = text_loss(model, tokenizer, documents(tmp_path, texts, tokenizer))
    alone = [text_loss(model, tokenizer, documents(tmp_path, [text], tokenizer)) for text in texts]
    tokens = torch.tensor([each.num_tokens for each in alone])
    nats = torch.tensor([each.loss for each in alone], dtype=torch.float64) * tokens
    assert found.standard_error == pytest.approx(ratio_standard_error(nats, tokens), rel=1e-4)


def test_pending_windows_of_a_long_document_are_bounded(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending: list[int] = []
    plain = text_loss_module.score_groups

    def recorded(model: Qwen3Model, groups: list[Group], token_budget: int) -> object:
        pending.append(sum(len(group.context) + len(group.continuations[0]) for group in groups))
        return plain(model, groups, token_budget)

    monkeypatch.setattr(text_loss_module, "score_groups", recorded)
    opened = documents(tmp_path, [make_text(3, 150)], tokenizer)
    found = text_loss(GreedyModel(0), tokenizer, opened, stride=1, token_budget=10)
    assert found.loss == 1.0
    assert sum(pending) > 8 * 160
    assert max(pending) <= 16 * 10 + 9
    # and each call but the last has as many as may wait
    assert min(pending[:-1]) > 16 * 10


def test_a_text_without_a_last_word_and_a_stride_that_does_not_fit_are_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = Qwen3Model(build(), max_length=16)
    opened = documents(tmp_path, ["one"], tokenizer)
    with pytest.raises(ValueError, match=r"no token to predict \(rows skipped: 1 one_word\)"):
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


def test_two_ranks_return_the_loss_of_one(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = str(corpus / "validation.parquet")
    run_ranks(_loss_on_two, 2, str(tmp_path), tokenizer, path)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    opened = open_source(
        ParquetSource(files=[path]), tokenizer_fingerprint=tokenizer.fingerprint, split="all"
    )
    one = text_loss(Qwen3Model(build(), max_length=32), tokenizer, opened, token_budget=200)
    num_tokens, loss = first.split()
    assert int(num_tokens) == one.num_tokens
    assert float(loss) == pytest.approx(one.loss, rel=1e-6)
