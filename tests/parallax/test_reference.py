"""The reference against the definition, written out row by row, and against torch; invariances."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallax.reference import parallax_reference, parallax_reference_stats, visible_keys
from parallax.testing import CASES, Case, Inputs, cu_seqlens_of, make_inputs, output_and_gradients

SMALL_CASES = [
    Case("causal", 6, num_heads=2, num_kv_heads=2, head_dim=3, batch_size=2),
    Case("gqa", 5, num_heads=4, num_kv_heads=2, head_dim=2),
    Case("window", 6, head_dim=3, window_size=2),
    Case("packed", 7, head_dim=3, documents=(1, 0, 4, 2)),
    Case("packed_window", 7, head_dim=3, documents=(5, 2), window_size=3),
]


def case_id(case: Case) -> str:
    return case.name


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    heads_q, heads_k, heads_v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(heads_q, heads_k, heads_v, attn_mask=visible, enable_gqa=True)
    return o.transpose(1, 2)


def defined_output(inputs: Inputs, case: Case, scale: float) -> Tensor:
    """Compute (4) literally: one row at a time, with an explicit covariance."""
    q, r, k, v, _ = inputs
    documents = case.documents or (case.num_tokens,)
    first_of_document = [sum(documents[:n]) for n, length in enumerate(documents) for _ in range(length)]
    o = torch.zeros_like(q)
    for b in range(case.batch_size):
        for i in range(case.num_tokens):
            first = first_of_document[i]
            if case.window_size is not None:
                first = max(first, i + 1 - case.window_size)
            for h in range(case.num_heads):
                g = h * case.num_kv_heads // case.num_heads
                keys, values = k[b, first : i + 1, g], v[b, first : i + 1, g]
                weight = torch.exp(scale * keys @ q[b, i, h])
                p = weight / weight.sum()
                covariance = torch.zeros(case.head_dim, case.head_dim, dtype=q.dtype)
                for j in range(len(p)):
                    covariance += p[j] * torch.outer(values[j] - p @ values, keys[j] - p @ keys)
                o[b, i, h] = p @ values - covariance @ r[b, i, h]
    return o


@pytest.mark.parametrize("case", SMALL_CASES, ids=case_id)
def test_reference_equals_the_definition(case: Case) -> None:
    inputs = case.inputs(torch.float64)
    for scale in (None, 0.3):
        expected = defined_output(inputs, case, case.head_dim**-0.5 if scale is None else scale)
        actual = parallax_reference(*inputs[:4], scale=scale, **case.masking())
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("case", SMALL_CASES, ids=case_id)
def test_reference_gradients_equal_finite_differences(case: Case) -> None:
    leaves = [x.requires_grad_() for x in case.inputs(torch.float64)[:4]]
    masking = case.masking()
    assert torch.autograd.gradcheck(lambda *x: parallax_reference(*x, **masking), leaves)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_statistics_are_softmax_attention_of_values_and_of_probe_scores(case: Case) -> None:
    q, r, k, v, _ = case.inputs(torch.float64)
    stats = parallax_reference_stats(q, r, k, v, **case.masking())
    visible = visible_keys(case.num_tokens, **case.masking())
    torch.testing.assert_close(stats.vbar, softmax_attention(q, k, v, visible))
    # with the keys as values, softmax attention gives the mean key; tbar is r times it
    kbar = softmax_attention(q, k, k, visible)
    torch.testing.assert_close(stats.tbar, (r * kbar).sum(-1))
    scores = torch.einsum("bthk,bshk->bths", q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2))
    weights = torch.where(visible[:, None], (scores * case.head_dim**-0.5).exp(), 0.0)
    torch.testing.assert_close(stats.lse, weights.sum(-1).log())


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_zero_probe_gives_softmax_attention(case: Case) -> None:
    inputs = case.inputs(torch.float64, r_scale=0.0)
    visible = visible_keys(case.num_tokens, **case.masking())

    def softmax_without_probe(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(q, k, v, visible) + 0 * r

    expected = output_and_gradients(softmax_without_probe, inputs)
    actual = output_and_gradients(parallax_reference, inputs, **case.masking())
    for name in ("o", "dq", "dk", "dv"):
        torch.testing.assert_close(actual[name], expected[name])
    assert case.num_tokens == 1 or case.window_size == 1 or actual["dr"].abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_first_row_is_the_first_value_exactly(dtype: torch.dtype) -> None:
    q, r, k, v, _ = make_inputs(2, 9, 4, 2, 16, dtype=dtype, r_scale=50.0)
    o = parallax_reference(q, r, k, v)
    assert o.dtype == dtype
    assert torch.equal(o[:, 0], v[:, 0].repeat_interleave(2, dim=1))


def test_equal_values_are_returned_unchanged() -> None:
    q, r, k, v, _ = make_inputs(1, 50, 2, 1, 8, dtype=torch.float64, r_scale=5.0)
    v = v[:, :1].expand_as(v)
    torch.testing.assert_close(parallax_reference(q, r, k, v), v.expand_as(q))


def test_common_part_of_keys_changes_neither_output_nor_gradients() -> None:
    plain = make_inputs(2, 40, 4, 2, 8, dtype=torch.float64)
    shifted = make_inputs(2, 40, 4, 2, 8, dtype=torch.float64, key_offset=8.0)
    assert not torch.allclose(plain.k, shifted.k)
    expected = output_and_gradients(parallax_reference, plain)
    actual = output_and_gradients(parallax_reference, shifted)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-10)


def test_later_tokens_leave_earlier_outputs_bit_identical() -> None:
    inputs = make_inputs(1, 30, 2, 1, 8, dtype=torch.float64)
    expected = parallax_reference(*inputs[:4])[:, :17]
    order = torch.cat([torch.arange(17), 17 + torch.randperm(13, generator=torch.Generator().manual_seed(1))])
    actual = parallax_reference(*(x[:, order] for x in inputs[:4]))
    assert torch.equal(actual[:, :17], expected)
    assert not torch.allclose(actual[:, 17:], parallax_reference(*inputs[:4])[:, 17:])


def test_packed_documents_equal_separate_calls() -> None:
    lengths = (1, 5, 0, 64, 7)
    inputs = make_inputs(1, sum(lengths), 4, 2, 8, dtype=torch.float64)
    packed = output_and_gradients(parallax_reference, inputs, cu_seqlens=cu_seqlens_of(lengths))
    pieces = zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)
    separate = [output_and_gradients(parallax_reference, Inputs(*piece)) for piece in pieces]
    for name in packed:
        torch.testing.assert_close(packed[name], torch.cat([piece[name] for piece in separate], dim=1))


@pytest.mark.parametrize("window_size", [1, 4, 100])
def test_window_keeps_exactly_that_many_keys(window_size: int) -> None:
    visible = visible_keys(120, window_size=window_size)
    assert visible.sum(-1).tolist() == [min(i + 1, window_size) for i in range(120)]
    assert bool(visible.diagonal().all())
