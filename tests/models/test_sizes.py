"""The controls match parameters and FLOPs, and the size table."""

import runpy
import sys
from dataclasses import replace
from typing import get_args

import pytest
import torch

from models.config import (
    AttentionConfig,
    GatedDeltaNetConfig,
    KimiDeltaConfig,
    Mamba2Config,
    MesaNetConfig,
    ParallaxConfig,
    SoftmaxConfig,
)
from models.size_table import SEQ_LEN, build_row, parameter_mismatch, size_table
from models.sizes import CONTROLS, SIZES, split_size

MATCHED = [size for size in SIZES if split_size(size)[1] is not None]
BASELINES = (GatedDeltaNetConfig(), KimiDeltaConfig(), MesaNetConfig(), Mamba2Config())
CONFIGS: dict[str, AttentionConfig] = {
    config.kind: config for config in (SoftmaxConfig(), ParallaxConfig(), *BASELINES)
}


def num_parameters(size: str, kind: str) -> int:
    return build_row(size, CONFIGS[kind]).num_parameters()["total"]


@pytest.mark.parametrize("size", ["60m", "0.6b", "1.7b"])
def test_added_query_heads_match_the_parameters_of_w_r_without_its_norm(size: str) -> None:
    plain, matched = SIZES[size], SIZES[f"{size}_parameter_matched"]
    assert matched == replace(plain, num_heads=plain.num_heads + (4 if size == "60m" else 8))
    difference = num_parameters(size, "parallax") - num_parameters(f"{size}_parameter_matched", "softmax")
    assert difference == plain.num_layers * plain.head_dim


@pytest.mark.parametrize("size", ["60m", "0.6b", "1.7b"])
def test_compute_matched_has_the_forward_flops_of_softmax(size: str) -> None:
    plain = SIZES[size]
    for control in ("compute_matched", "compute_parameter_matched"):
        matched = SIZES[f"{size}_{control}"]
        assert 4 * matched.num_heads * matched.head_dim == 2 * plain.num_heads * plain.head_dim
        assert matched.num_heads // matched.num_kv_heads == plain.num_heads // plain.num_kv_heads
        assert size == "60m" or matched.head_dim == 64


def test_half_width_has_the_head_width_of_the_other_sizes_controls() -> None:
    plain, matched, half = (SIZES[size] for size in ("60m", "60m_compute_matched", "60m_half_width"))
    assert half == replace(plain, head_dim=plain.head_dim // 2, mlp_width=matched.mlp_width)
    assert (
        num_parameters("60m_half_width", "parallax")
        == num_parameters("60m_compute_matched", "parallax") - 16 * 3 * 32
    )


@pytest.mark.parametrize("size", ["60m", "0.6b", "1.7b"])
def test_parameter_neutral_parallax_has_a_narrower_mlp_and_nothing_else(size: str) -> None:
    plain, neutral = SIZES[size], SIZES[f"{size}_parameter_neutral"]
    assert neutral == replace(plain, mlp_width=neutral.mlp_width)
    # W_R is D x HK, and the MLP has three matrices of D x F
    assert abs(3 * (plain.mlp_width - neutral.mlp_width) - plain.num_heads * plain.head_dim) <= 3 * 4


@pytest.mark.parametrize("size", [size for size in MATCHED if split_size(size)[1] != "parameter_matched"])
def test_mlp_widths_are_the_best_multiples_of_eight(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, control = split_size(size)
    assert control is not None
    target = num_parameters(plain, CONTROLS[control].reference)
    mismatch = {}
    for change in (-8, 0, 8):
        row = replace(SIZES[size], mlp_width=SIZES[size].mlp_width + change)
        monkeypatch.setitem(SIZES, f"{plain}_changed", row)
        mismatch[change] = abs(num_parameters(f"{plain}_changed", CONTROLS[control].attention) - target)
    assert SIZES[size].mlp_width % 8 == 0
    assert min(mismatch, key=mismatch.__getitem__) == 0


@pytest.mark.parametrize("size", MATCHED)
def test_controls_match_parameters_within_two_thousandths(size: str) -> None:
    values = {kind: parameter_mismatch(size, config) for kind, config in CONFIGS.items()}
    ours = CONTROLS[size.partition("_")[2]].attention
    assert [kind for kind, value in values.items() if value is not None] == [ours]
    value = values[ours]
    assert value is not None
    assert abs(value) < 2e-3


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_command_prints_parameters_flops_and_cache(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["size_table"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("models.size_table", run_name="__main__")
    assert exit_.value.code == 0
    table = capsys.readouterr().out
    assert table == size_table() + "\n"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert len({len(row) for row in rows}) == 1
    # W_R: 28 x 1024 x 2048; cache: 28 layers x 2 x 8 heads x 128 x 2 bytes
    assert ["0.6b", "softmax", "596.05", "176.16", "0.00", "264.24", "4.986", "114,688", ""] in rows
    assert ["0.6b", "parallax", "654.77", "234.88", "58.72", "264.24", "6.278", "114,688", ""] in rows
    mismatch = {row[0].removeprefix("0.6b_"): row[-1] for row in rows if row[0].startswith("0.6b_")}
    assert mismatch == {
        "parameter_matched": "-0.0005%",
        "compute_matched": "+0.0342%",
        "compute_parameter_matched": "-0.0388%",
        "parameter_neutral": "+0.0391%",
        "gated-deltanet": "-0.0276%",
        "kda": "-0.0102%",
        "mesanet": "-0.0342%",
        "mamba2": "-0.0525%",
    }
    assert {row[0] for row in rows[2:]} == set(SIZES)


def test_the_table_has_the_bytes_of_the_allocated_cache() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in size_table().splitlines()]
    printed = {row[1]: row[7] for row in rows if row[0] == "debug"}
    for config in (attention() for attention in get_args(AttentionConfig)):
        states = [
            module.new_state(1, SEQ_LEN, device=torch.device("cpu"), dtype=torch.bfloat16)
            for module in build_row("debug", config).attention_modules()
        ]
        num_bytes = sum(x.untyped_storage().nbytes() for state in states for x in state.values())
        assert printed[config.kind] == f"{num_bytes / SEQ_LEN:,.0f}", config.kind
