"""Reductions of rows to heads and context lengths, and the sampling error."""

import math
import statistics

import pytest
import torch

from eval.diagnostics import sample as sample_module
from eval.diagnostics.quantities import QUANTITIES
from eval.diagnostics.sample import QuerySample, draw_queries
from eval.diagnostics.summary import Values, context_bounds, context_counts, rounded, summarize
from tests.eval.diagnostics.batches import make_batch

LENGTHS = [5, 90, 1, 223, 40, 2, 160, 77]
SEQ_LEN = 64


def values_of(sample: QuerySample, seed: int = 0) -> torch.Tensor:
    """A value of each position and head, `[B, N, 3]`, the same for every sample."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(*sample.tokens_BT.shape, 3, generator=generator).exp()
    return table[torch.arange(len(sample.query_BN))[:, None], sample.query_BN]


def summarize_one(
    statistics: dict[str, torch.Tensor], sample: QuerySample
) -> tuple[dict[str, Values], dict[str, dict[str, Values]]]:
    """The summary of one layer, `[B, N, H]`, as the second of two."""
    both = {name: torch.stack((x.flip(2).exp(), x)) for name, x in statistics.items()}
    return summarize(both, sample, sample.visible_keys(None))[1]


def numbers(values: Values) -> list[float]:
    return [value for value in values if value is not None]


def test_reductions_are_those_of_the_sampled_rows_alone() -> None:
    sample = draw_queries(make_batch(LENGTHS, SEQ_LEN), SEQ_LEN, num_queries=100)
    assert not sample.is_sampled_BN.all()  # rows repeat queries
    visible = sample.visible_keys(None)
    x = values_of(sample)
    names = ("correction_ratio", "first_mass", "smallest_weight", "largest_logit")
    heads, by_context = summarize_one(dict.fromkeys(names, x), sample)
    pairs = sample.is_sampled_BN.nonzero().tolist()
    sees_start = [bool(visible.is_document_start_BN[b, n]) for b, n in pairs]
    assert 5 < sum(sees_start) < 95
    for head in range(3):
        rows = [float(x[b, n, head]) for b, n in pairs]
        starts = [row for row, flag in zip(rows, sees_start, strict=True) if flag]
        others = [row for row, flag in zip(rows, sees_start, strict=True) if not flag]
        wanted = {
            "correction_ratio/mean": statistics.fmean(rows),
            "correction_ratio/median": statistics.median(rows),
            "correction_ratio/p95": float(torch.tensor(rows).quantile(0.95)),
            "first_mass/mean": statistics.fmean(starts),
            "first_mass/middle_mean": statistics.fmean(others),
            "smallest_weight/min": min(rows),
            "largest_logit/max": max(rows),
            "first_mass/stderr": statistics.stdev(starts)
            / math.sqrt(len(starts))
            * math.sqrt(1 - 100 / sample.num_candidates),
        }
        for name, value in wanted.items():
            assert heads[name][head] == pytest.approx(value, rel=1e-5), name
    contexts = [int(sample.query_BN[b, n] - sample.start_BN[b, n] + 1) for b, n in pairs]
    counts = context_counts(sample)
    assert counts["bounds"] == [[1, 16], [17, 64]]
    for index, (low, high) in enumerate(context_bounds(SEQ_LEN)):
        inside = [
            float(x[b, n].mean()) for (b, n), c in zip(pairs, contexts, strict=True) if low <= c <= high
        ]
        assert counts["num_queries"][index] == len(inside)
        assert by_context["correction_ratio"]["mean"][index] == pytest.approx(
            statistics.fmean(inside), rel=1e-5
        )
    assert "smallest_weight" not in by_context


def test_context_lengths_cover_a_row() -> None:
    assert context_bounds(1) == [(1, 1)]
    assert context_bounds(4096) == [(1, 16), (17, 64), (65, 256), (257, 1024), (1025, 4096)]
    assert context_bounds(4097)[-1] == (4097, 4097)


def test_means_over_samples_are_within_their_standard_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(LENGTHS, SEQ_LEN)
    everything = draw_queries(batch, SEQ_LEN, num_queries=None)
    x = {"entropy": values_of(everything)}
    exact, _ = summarize_one(x, everything)
    assert exact["entropy/stderr"] == [0.0, 0.0, 0.0]
    wanted = numbers(exact["entropy/mean"])
    errors, stated = [], []
    for seed in range(300):
        monkeypatch.setattr(sample_module, "SEED", seed)
        sample = draw_queries(batch, SEQ_LEN, num_queries=120)
        heads, _ = summarize_one({"entropy": values_of(sample)}, sample)
        errors += [a - b for a, b in zip(numbers(heads["entropy/mean"]), wanted, strict=True)]
        stated += numbers(heads["entropy/stderr"])
    # without bias, and of the stated size, which without 1 - R / M would be a quarter larger
    assert abs(statistics.fmean(errors)) < 4 * statistics.stdev(errors) / math.sqrt(300)
    assert statistics.fmean(e**2 for e in errors) == pytest.approx(
        statistics.fmean(s**2 for s in stated), rel=0.12
    )
    outside = sum(abs(e) > 2 * s for e, s in zip(errors, stated, strict=True)) / len(errors)
    assert 0.02 < outside < 0.08


def test_rows_without_a_value_are_left_out_and_a_group_without_rows_is_none() -> None:
    sample = draw_queries(make_batch([40], 64), 64, num_queries=None)
    x = values_of(sample)
    x[:, 0] = torch.nan
    heads, by_context = summarize_one({"probe_alignment": x, "combined_first_mass": x}, sample)
    assert heads["probe_alignment/mean"] == pytest.approx(x[0, 1:39].double().mean(0).tolist(), rel=1e-5)
    assert heads["combined_first_mass/middle_mean"] == [None] * 3
    assert None not in by_context["combined_first_mass"]["mean"]
    assert rounded(math.inf) is rounded(math.nan) is None
    assert rounded(1234567.0) == 1234570.0


def test_quantities_have_labels() -> None:
    assert all(quantity.label for quantity in QUANTITIES.values())
