"""Held-out loss: every token has the same weight, on any number of ranks; errors over documents."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.config import DataConfig, ParquetSource
from data.loading.held_out import HeldOutBatch, HeldOutLoader
from data.sources.open import open_source
from data.titan import build_validation_loader
from data.tokenizer import Tokenizer
from eval.held_out import HeldOutLoss, held_out_loss
from tests.conftest import write_parquet
from tests.ranks import run_ranks
from tokens import IGNORE_INDEX

CPU = torch.device("cpu")


def label_as_loss(tokens: torch.Tensor, *, labels_BT: torch.Tensor, **_: object) -> torch.Tensor:
    """A model whose loss at a position is the label's id."""
    return torch.where(labels_BT == IGNORE_INDEX, 0, labels_BT).float()


def batch(labels: list[int], documents: list[int] | None = None) -> HeldOutBatch:
    rows, numbers = torch.tensor([labels]), torch.tensor([documents or [0] * len(labels)])
    return HeldOutBatch({"input": rows.clone()}, rows, numbers, int(numbers.max()) + 1, 0, 1.0)


def test_tokens_have_equal_weight_over_batches_of_different_sizes() -> None:
    batches = [batch([1, 1, 1]), batch([5]), batch([IGNORE_INDEX, 2])]
    result = held_out_loss(label_as_loss, batches, vocab_size=9, max_seqlen=3, device=CPU)
    assert result.num_tokens == 5
    assert result.loss == pytest.approx(10 / 5)
    assert result.perplexity == pytest.approx(math.exp(2))
    expected = -(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2))
    assert result.unigram_entropy == pytest.approx(expected)
    # one document has no standard error
    assert (result.num_documents, result.standard_error) == (1, None)
    assert "+/-" not in str(result)


def test_document_boundaries_are_passed_to_the_model() -> None:
    received: list[dict[str, Any]] = []

    def model(tokens: torch.Tensor, **given: Any) -> torch.Tensor:
        received.append(given)
        return torch.zeros(tokens.shape)

    one = batch([1, 2])
    one.inputs["cu_seqlens"] = torch.tensor([0, 1, 2], dtype=torch.int32)
    held_out_loss(model, [one], vocab_size=3, max_seqlen=2, device=CPU)
    assert received[0]["max_seqlen"] == 2
    assert torch.equal(received[0]["cu_seqlens"], one.inputs["cu_seqlens"])


def test_a_huge_loss_has_infinite_perplexity_and_a_text_without_tokens_is_an_error() -> None:
    result = held_out_loss(label_as_loss, [batch([800])], vocab_size=801, max_seqlen=1, device=CPU)
    assert result.perplexity == math.inf
    with pytest.raises(ValueError, match="no token to predict"):
        held_out_loss(label_as_loss, [batch([IGNORE_INDEX])], vocab_size=3, max_seqlen=1, device=CPU)


def make_texts(seed: int, count: int) -> list[str]:
    """The first half of the documents has other words than the second, and one document is long."""
    generator = random.Random(seed)
    words = ["~~~~", "!!!!"]
    counts = [generator.randrange(1, 30) for _ in range(count)]
    counts[1] = 200
    return [f"{n} " + " ".join([words[2 * n // count]] * times) for n, times in enumerate(counts)]


def by_document(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Loss sums of label_as_loss, and numbers of predicted tokens."""
    documents = [[*tokenizer.encode(text), tokenizer.end_of_document_id] for text in texts]
    sums, tokens = zip(*((sum(each[1:]), len(each) - 1) for each in documents), strict=True)
    return np.array(sums, dtype=float), np.array(tokens, dtype=float)


@pytest.mark.parametrize("seed", range(5))
def test_the_standard_error_is_the_jackknife_s_over_documents(
    seed: int, corpus: Path, tmp_path: Path
) -> None:
    texts, tokenizer = make_texts(seed, 400), Tokenizer.load(corpus)
    write_parquet(tmp_path / "texts.parquet", texts)
    source = open_source(
        ParquetSource(files=[str(tmp_path / "texts.parquet")]), tokenizer_fingerprint="", split="all"
    )
    loader = HeldOutLoader(source, tokenizer, seq_len=16, local_batch_size=3)
    result = held_out_loss(label_as_loss, loader, vocab_size=300, max_seqlen=16, device=CPU)
    nats, tokens = by_document(tokenizer, texts)
    assert (result.num_tokens, result.num_documents) == (tokens.sum(), 400)
    assert result.loss == pytest.approx(nats.sum() / tokens.sum(), rel=1e-12)
    residuals = nats - result.loss * tokens
    variance = residuals.var(ddof=1) / len(nats) / tokens.mean() ** 2
    assert result.standard_error == pytest.approx(math.sqrt(variance), rel=1e-9)
    # another way to estimate it, which knows nothing of the formula
    left_out = (nats.sum() - nats) / (tokens.sum() - tokens)
    jackknife = math.sqrt((len(nats) - 1) * left_out.var())
    assert result.standard_error == pytest.approx(jackknife, rel=0.1)


def test_the_first_documents_were_taken_for_the_whole_set(corpus: Path, tmp_path: Path) -> None:
    tokenizer, inside = Tokenizer.load(corpus), []
    for seed in range(5):
        texts = make_texts(seed, 4000)
        write_parquet(tmp_path / f"{seed}.parquet", texts)
        source = ParquetSource(files=[str(tmp_path / f"{seed}.parquet")])
        result = evaluate(source, tokenizer, tmp_path / "kept", max_tokens=20_000)
        nats, tokens = by_document(tokenizer, texts)
        whole = nats.sum() / tokens.sum()
        assert result.standard_error is not None
        inside.append(abs(result.loss - whole) < 2 * result.standard_error)
        count = int(np.searchsorted(tokens.cumsum(), 20_000))
        first = nats[:count].sum() / tokens[:count].sum()
        assert abs(first - whole) > 10 * result.standard_error
    assert all(inside)


def long_and_short_texts(seed: int) -> list[str]:
    """Documents of one of two words each; a few are very long, and hold most of the tokens."""
    generator = random.Random(seed)
    words = ["~~~~", "!!!!"]
    lengths = [min(int(2 * generator.paretovariate(1.1)), 500) for _ in range(1000)]
    return [f"{n} " + " ".join([generator.choice(words)] * length) for n, length in enumerate(lengths)]


def test_a_draw_of_whole_documents_hid_small_differences_of_models(corpus: Path, tmp_path: Path) -> None:
    # the mean label stands for a difference of two models that is another one in each document
    tokenizer, errors, errors_of_documents = Tokenizer.load(corpus), [], []
    for seed in range(8):
        texts = long_and_short_texts(seed)
        write_parquet(tmp_path / f"{seed}.parquet", texts)
        source = ParquetSource(files=[str(tmp_path / f"{seed}.parquet")])
        nats, tokens = by_document(tokenizer, texts)
        whole = nats.sum() / tokens.sum()
        max_tokens = int(0.4 * tokens.sum())
        result = evaluate(source, tokenizer, tmp_path / "kept", max_tokens=max_tokens)
        assert result.num_tokens < 1.01 * max_tokens
        errors.append(result.loss - whole)
        for draw in range(20):
            order = np.random.default_rng(draw).permutation(len(texts))
            order = order[: np.searchsorted(tokens[order].cumsum(), max_tokens) + 1]
            errors_of_documents.append(nats[order].sum() / tokens[order].sum() - whole)
    assert np.sqrt(np.mean(np.square(errors))) < 0.3 * np.sqrt(np.mean(np.square(errors_of_documents)))


def evaluate(
    source: ParquetSource,
    tokenizer: Tokenizer,
    kept: Path,
    max_tokens: int | None,
    rank: int = 0,
    world: int = 1,
) -> HeldOutLoss:
    loader = build_validation_loader(
        DataConfig(tokenizer="given", train=source, validation=source),
        tokenizer=tokenizer,
        seq_len=16,
        local_batch_size=2,
        max_tokens=max_tokens,
        kept_in=kept,
        dp_rank=rank,
        dp_world_size=world,
    )
    return held_out_loss(label_as_loss, loader, vocab_size=300, max_seqlen=16, device=CPU)


def evaluate_on_rank(rank: int, world: int, source: ParquetSource, corpus: Path, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world
    )
    results = [
        evaluate(source, Tokenizer.load(corpus), folder / f"kept{world}", max_tokens, rank, world)
        for max_tokens in (None, 3000)
    ]
    if rank == world - 1:
        torch.save([vars(each) for each in results], folder / f"{world}.pt")
    torch.distributed.destroy_process_group()


def test_one_two_and_three_ranks_have_the_same_result(corpus: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "texts.parquet", make_texts(0, 300))
    source = ParquetSource(files=[str(tmp_path / "texts.parquet")])
    tokenizer = Tokenizer.load(corpus)
    one = [vars(evaluate(source, tokenizer, tmp_path / "kept1", limit)) for limit in (None, 3000)]
    for world in (2, 3):
        run_ranks(evaluate_on_rank, world, world, source, corpus, tmp_path)
        other = torch.load(tmp_path / f"{world}.pt")
        for found, wanted in zip(other, one, strict=True):
            assert found == pytest.approx(wanted, rel=1e-12)
    assert one[0]["num_documents"] == 300
    assert one[1]["num_tokens"] <= 3000 < one[0]["num_tokens"]
