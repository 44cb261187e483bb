"""Prefill and decoding with a cache equal the full forward, for every attention."""

import pytest
import torch

from errors import UserError
from models import sizes
from models.config import AttentionConfig, ParallaxConfig, SoftmaxConfig
from models.generation.cache import Cache, extend, prefill
from models.qwen3 import Qwen3
from tests.models.test_qwen3 import ATTENTIONS, TINY, build, tokens

each_attention = pytest.mark.parametrize("attention", ATTENTIONS, ids=lambda a: str(a).split("(", 1)[1][:60])


@pytest.fixture(autouse=True)
def _tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "tiny", TINY)


def prefilled(model: Qwen3, rows: list[torch.Tensor], max_seqlen: int) -> tuple[Cache, torch.Tensor]:
    cache = Cache.new(model, len(rows), max_seqlen)
    bounds = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()
    return cache, prefill(model, torch.cat(rows).unsqueeze(0), bounds, cache)


@each_attention
@torch.no_grad()
def test_prefill_and_extend_equal_the_full_forward(attention: AttentionConfig) -> None:
    model = build(attention, torch.float64)
    lengths, steps = (1, 5, 23), (1, 1, 3, 9)
    rows = [tokens(1, n + sum(steps), seed=n)[0] for n in lengths]
    expected = [model(row.unsqueeze(0))[0] for row in rows]

    cache, x_1TD = prefilled(model, [row[:n] for row, n in zip(rows, lengths, strict=True)], 40)
    got = model.output(x_1TD, None)[0].split(lengths)
    for logits, whole, n in zip(got, expected, lengths, strict=True):
        torch.testing.assert_close(logits, whole[:n], atol=1e-8, rtol=1e-8)
    done = 0
    for step in steps:
        new = torch.stack([row[n + done : n + done + step] for row, n in zip(rows, lengths, strict=True)])
        logits_BTV = model.output(extend(model, new, cache), None)
        for logits, whole, n in zip(logits_BTV, expected, lengths, strict=True):
            torch.testing.assert_close(logits, whole[n + done : n + done + step], atol=1e-8, rtol=1e-8)
        done += step
    assert cache.lengths_B.tolist() == [n + done for n in lengths]


@pytest.mark.parametrize(
    "attention", [SoftmaxConfig(window_size=6), ParallaxConfig()], ids=["softmax", "parallax"]
)
@torch.no_grad()
def test_extending_by_more_than_64_tokens_uses_the_training_forward(
    attention: AttentionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(attention, torch.float64)
    lengths = (2, 30)
    rows = [tokens(1, n + 80, seed=n)[0] for n in lengths]
    cache, _ = prefilled(model, [row[:n] for row, n in zip(rows, lengths, strict=True)], 120)
    for layer in model.layers:
        monkeypatch.setattr(layer.attention, "attend_cached", None)
    new = torch.stack([row[n:] for row, n in zip(rows, lengths, strict=True)])
    logits_BTV = model.output(extend(model, new, cache), None)
    for logits, row, n in zip(logits_BTV, rows, lengths, strict=True):
        torch.testing.assert_close(logits, model(row.unsqueeze(0))[0, n:], atol=1e-8, rtol=1e-8)


@each_attention
@torch.no_grad()
def test_selected_rows_are_independent_copies_and_reset_empties_the_cache(attention: AttentionConfig) -> None:
    model = build(attention)
    rows = [tokens(1, n, seed=n)[0] for n in (3, 8)]
    cache, _ = prefilled(model, rows, 16)
    twice = cache.select(torch.tensor([1, 1, 0]))
    new = tokens(3, 2, seed=5)
    x_BTD = extend(model, new, twice)
    for x_TD, row, tail in zip(x_BTD, (rows[1], rows[1], rows[0]), new, strict=True):
        whole = model(torch.cat((row, tail)).unsqueeze(0))[0, -2:]
        torch.testing.assert_close(model.output(x_TD, None), whole, atol=1e-4, rtol=1e-4)
    assert cache.lengths_B.tolist() == [3, 8]
    cache.reset()
    x_BTD = extend(model, new[:2], cache)
    torch.testing.assert_close(model.output(x_BTD, None), model(new[:2]), atol=1e-4, rtol=1e-4)


def test_empty_and_too_long_prompts_raise() -> None:
    model = build(SoftmaxConfig())
    with pytest.raises(UserError, match="a prompt has 9 tokens, the cache holds 8"):
        prefilled(model, [tokens(1, 9)[0]], 8)
    with pytest.raises(UserError, match="a prompt is empty"):
        prefilled(model, [tokens(1, 3)[0], torch.empty(0, dtype=torch.int64)], 8)
