"""Scores of packed and padded batches equal those of single requests."""

from typing import Any

import pytest
import torch

from eval.scoring import head_scores, shared_prefix
from eval.scoring.groups import Group, Scores, rows_of
from eval.scoring.language_model import LanguageModel, Qwen3Model
from eval.scoring.transformers_model import TransformersModel
from models.config import ParallaxConfig, SoftmaxConfig, ValueAverageConfig
from models.qwen3 import Head, Qwen3
from tests.eval.conftest import build, ids

GROUPS = [
    Group(ids(1, 9), (ids(2, 1), ids(3, 1), ids(4, 1))),
    Group(ids(5, 3), (ids(6, 4), ids(6, 4)[:2], ids(7, 5), ids(8, 1))),
    Group(ids(9, 1), (ids(10, 1),)),
    Group(ids(11, 17), (ids(12, 12),)),
]


def one_by_one(model: Qwen3, groups: list[Group]) -> list[list[Scores]]:
    """Score each request in a forward of its own, log-softmax in fp64."""
    scores: list[list[Scores]] = []
    for group in groups:
        scores.append([])
        for continuation in group.continuations:
            tokens = torch.tensor([group.context + continuation])
            logits = model(tokens[:, :-1])[0, len(group.context) - 1 :].double()
            targets = torch.tensor(continuation)
            log_probs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            greedy = logits.argmax(-1) == targets
            scores[-1].append(Scores(log_probs.tolist(), greedy.tolist()))
    return scores


def assert_same(found: list[list[Scores]], expected: list[list[Scores]]) -> None:
    for group_found, group_expected in zip(found, expected, strict=True):
        for each, truth in zip(group_found, group_expected, strict=True):
            assert each.log_probs == pytest.approx(truth.log_probs, abs=2e-4)
            assert each.greedy == truth.greedy


def with_greedy_answers(model: Qwen3, groups: list[Group]) -> list[Group]:
    """Add the model's greedy continuation of three tokens to each group."""
    extended = []
    for group in groups:
        tokens = list(group.context)
        for _ in range(3):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        own = tuple(tokens[len(group.context) :])
        extended.append(Group(group.context, tuple(dict.fromkeys((*group.continuations, own)))))
    return extended


@pytest.mark.parametrize("attention", [SoftmaxConfig(), SoftmaxConfig(window_size=5), ParallaxConfig()])
def test_packed_scores_equal_those_of_single_requests(attention: SoftmaxConfig | ParallaxConfig) -> None:
    model = build(attention)
    groups = with_greedy_answers(model, GROUPS)
    wanted = one_by_one(model, groups)
    assert any(all(each.greedy) for group in wanted for each in group)
    assert_same(Qwen3Model(model, max_length=64).score(groups), wanted)


def test_padded_scores_of_transformers_equal_those_of_single_requests() -> None:
    comparison = pytest.importorskip("benchmarks.harness_comparison", reason="needs lm_eval and transformers")
    model = build()
    groups = with_greedy_answers(model, GROUPS)
    wrapped: LanguageModel = TransformersModel(comparison.to_transformers(model), max_length=64)
    assert_same(wrapped.score(groups), one_by_one(model, groups))


def test_continuations_of_one_token_and_prefixes_of_others_have_no_row_of_their_own() -> None:
    assert rows_of(GROUPS[0]).tails == [()]
    rows = rows_of(GROUPS[1])
    assert sorted(map(len, rows.tails)) == [3, 4]
    for continuation, row in zip(GROUPS[1].continuations, rows.row_of, strict=True):
        assert rows.tails[row][: len(continuation) - 1] == continuation[:-1]


def test_the_head_computes_each_position_once_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_scores, "CHUNK_TOKENS", 4)
    sizes: list[int] = []
    plain = Head.logits

    def counted(head: Head, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 2:  # scored positions; a forward of the whole model has [B, T, D]
            sizes.append(len(x))
        return plain(head, x)

    monkeypatch.setattr(Head, "logits", counted)
    model = build()
    assert_same(Qwen3Model(model, max_length=64).score(GROUPS), one_by_one(model, GROUPS))
    # one position for three continuations of one token; 4 + 5 of the second group's two rows; 1; 12
    assert sum(sizes) == 1 + 4 + 5 + 1 + 12
    assert max(sizes) == 4


SHARED = [
    Group(ids(20, 30), (ids(21, 3), ids(22, 5), ids(23, 1), ids(22, 5)[:3])),
    Group(ids(24, 41), (ids(25, 2), ids(26, 2))),
    Group(ids(27, 19), tuple(ids(28 + each, 1 + each) for each in range(12))),
]


@pytest.mark.parametrize("attention", [SoftmaxConfig(), SoftmaxConfig(window_size=7), ParallaxConfig()])
def test_a_shared_context_is_prefilled_once(
    attention: SoftmaxConfig | ParallaxConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(attention)
    groups = [GROUPS[3], *with_greedy_answers(model, SHARED), GROUPS[0]]
    prefilled: list[int] = []
    extended: list[tuple[int, ...]] = []
    prefill, extend = shared_prefix.prefill, shared_prefix.extend

    def recorded_prefill(model: Qwen3, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        prefilled.append(tokens.numel())
        return prefill(model, tokens, *rest)

    def recorded_extend(model: Qwen3, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        extended.append(tuple(tokens.shape))
        return extend(model, tokens, cache)

    monkeypatch.setattr(shared_prefix, "prefill", recorded_prefill)
    monkeypatch.setattr(shared_prefix, "extend", recorded_extend)
    wrapped = Qwen3Model(model, max_length=64)
    assert_same(wrapped.score(groups), one_by_one(model, groups))
    assert prefilled == [30 + 41 + 19]
    num_tokens = 30 + 41 + 19 + sum(rows * length for rows, length in extended)
    assert num_tokens == sum(sum(wrapped.row_lengths(group)) for group in groups[1:-1])
    assert num_tokens < sum(len(g.context) + len(t) for g in groups[1:-1] for t in rows_of(g).tails) * 0.75
    # a small cache: the same scores in several parts
    monkeypatch.setattr(shared_prefix, "_MAX_CACHE_ELEMENTS", 20 * model.num_cache_elements(105))
    assert_same(wrapped.score(groups), one_by_one(model, groups))
    assert len(prefilled) > 2


def test_contexts_are_not_shared_where_that_does_not_pay() -> None:
    for group in (*GROUPS, Group(ids(1, 30), (ids(2, 70), ids(3, 70)))):
        assert shared_prefix.shared_length(group, rows_of(group)) is None
    model = Qwen3Model(build(), max_length=64)
    assert model.row_lengths(SHARED[1]) == [41, 1, 1]
    with torch.autocast("cpu", torch.bfloat16):
        assert model.row_lengths(SHARED[1]) == [42, 42]


def test_attention_without_a_kv_cache_scores_whole_rows() -> None:
    model = build(ValueAverageConfig())
    wrapped = Qwen3Model(model, max_length=64)
    assert wrapped.row_lengths(SHARED[1]) == [42, 42]
    assert_same(wrapped.score(SHARED), one_by_one(model, SHARED))
