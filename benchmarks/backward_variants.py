"""What do the backward kernels that we do not use cost, beside those that we do?

(a) Two passes, dQ/dR and dK/dV, with 11 tile products: `parallax.kernels.backward`, as in training.
(b) One pass with 8 products: a program owns a tile of keys, keeps its dK and dV, and adds K^T G^T and K^T U^T
    to dQ and dR in fp32 buffers [B, H, K, T], by reductions of the tensor memory accelerator ("tma") or by
    atomics. Row constants and zeros before and the conversion after it are counted. It leaves out (13), which
    favours it. Its additions come in any order: not the same bits every time; a fixed order would cost more.
(c) Two passes with stacked operands: [G; U] K as one product with twice the rows, [G^T U^T] [Q; R] as one
    with twice the inner length. Triton joins and splits tiles in registers, not in shared memory. G and U are
    joined there, without an exchange between threads. Q and R lie in one tensor [2, B, T, H, K], from which
    one descriptor loads 2 BT rows; S and T come out of one product too. Outside the ratio to (a) are the copy
    into that tensor, which a model could write itself, and the row constants, which (a) computes with dQ/dR.
    [Q; R] K^T in dQ/dR is not tried: with 4 warps it spills 270 bytes a thread.

Predicted for B = 8, T = 4096, 16 query / 8 kv heads, width 128 on one H100: (b) saves 3 of 11 products, 1.2
ms at best, and adds 17 GB in memory with tiles of 64 keys, 7 ms at 2.4 TB/s, half with 128 keys, and 0.6 ms
before and after. (c) saves no product and no read of shared memory: the tensor cores read the right operand
anew for every 64 rows of the left one.

`python -m benchmarks.backward_variants --out FILE.json` compares each gradient with fp64 (T = 1024) and times
what is right in turns: medians over CUDA events of every step, a cold L2 cache before the first. T is a
multiple of 128, K 64 or 128; causal, no windows, no packed documents. On the CPU, fp32, atomics for "tma":
`TRITON_INTERPRET=1 python -m benchmarks.backward_variants --check`.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.attention import BARS
from benchmarks.machine import RESULTS, write_result
from parallax.kernels import backward, forward
from parallax.kernels.addressing import (
    LOG2E,
    Mask,
    describe,
    heads_per_section,
    in_registers,
    load_tile,
    program_of,
)
from parallax.kernels.backward import _load_row_constant
from parallax.kernels.row_sums import add_row_sums
from parallax.kernels.tiles import Tile
from parallax.reference import parallax_reference
from parallax.testing import Inputs, make_inputs, output_and_gradients, relative_error

Gradients = dict[str, Tensor]


@triton.jit(do_not_specialize=["T"])
def _constants_kernel(do, o, vbar, lse, tbar, rows, strides, T, scale, H: tl.constexpr, K: tl.constexpr,
                      BT: tl.constexpr):  # fmt: skip
    """Write the row constants of `parallax.kernels.backward` for BT rows of one head."""
    i_bh = tl.program_id(1)
    i_b, i_h, i_t = i_bh // H, i_bh % H, tl.program_id(0) * BT
    o_t = i_t + tl.arange(0, BT)
    b_do = load_tile(do, strides, i_b, i_h, i_t, T, BT, K, K, False).to(tl.float32)
    b_total = tl.sum(b_do * load_tile(o, strides, i_b, i_h, i_t, T, BT, K, K, False), 1)
    b_b = tl.sum(b_do * load_tile(vbar, strides, i_b, i_h, i_t, T, BT, K, K, False), 1)
    p_t, p_rows = tl.cast(i_bh, tl.int64) * T + o_t, rows + tl.cast(i_bh, tl.int64) * 4 * T + o_t
    tl.store(p_rows, tl.load(lse + p_t) * LOG2E)
    tl.store(p_rows + T, (tl.load(tbar + p_t) + 1.0) * scale)
    tl.store(p_rows + 2 * T, b_b / scale)
    tl.store(p_rows + 3 * T, b_b - b_total)


@triton.jit
def _add_product(x, b_x, b_k, i_bh, i_t, T, BT: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr):
    """Add K^T X^T [K, BT] to fp32 memory, from X^T [BS, BT]; X K would want 64 queries at least."""
    b_y = tl.dot(tl.trans(b_k), b_x, input_precision="ieee")
    if TMA:
        x.atomic_add([i_bh * K, i_t], b_y)
    else:
        p_x = x + tl.cast(i_bh, tl.int64) * K * T + i_t
        p_x = p_x + (tl.arange(0, K)[:, None] * T + tl.arange(0, BT)[None, :])
        tl.atomic_add(p_x, b_y, sem="relaxed")


@triton.jit(do_not_specialize=["T"])
def _convert_kernel(x, dq, T, scale, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr):
    """Write BT rows of one head's dQ, or dR, from its fp32 buffer."""
    i_t, i_bh = tl.program_id(0) * BT, tl.program_id(1)
    p_x = tl.cast(i_bh, tl.int64) * K * T + i_t + (tl.arange(0, K)[:, None] * T + tl.arange(0, BT)[None, :])
    b_dq = (tl.trans(tl.load(x + p_x)) * scale).to(dq.dtype)
    dq.store([i_bh // H, i_bh % H, i_t, 0], b_dq.reshape(1, 1, BT, K))


@triton.jit(do_not_specialize=["T", "num_heads", "section"])
def _keys_kernel(
    q, r, k, v, do, rows, dq, dr, dk, dv, T, num_heads, section, scale, H: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, OPTION: tl.constexpr):  # fmt: skip
    """Compute BS rows of one kv head's dK and dV, and for (b) what they add to dQ / scale and dR / scale."""
    ONE_PASS: tl.constexpr = OPTION == "tma" or OPTION == "atomics"
    i_rank, i_bg = program_of(tl.program_id(0), T // BS, num_heads, section)
    i_s = i_rank * BS
    i_b, i_g = i_bg // G, i_bg % G
    b_k = load_tile(k, 0, i_b, i_g, i_s, T, BS, K, K, True)
    b_v = load_tile(v, 0, i_b, i_g, i_s, T, BS, K, K, True)
    if OPTION == "K in registers":
        b_k = in_registers(b_k, K)
    b_dk, b_dv = tl.zeros([BS, K], tl.float32), tl.zeros([BS, K], tl.float32)
    i_unmasked = tl.cdiv(i_s + BS, BT) * BT
    # each zone runs over all heads of the group in one loop, as in `parallax.kernels.backward`
    for ZONE in tl.static_range(2):
        i_first, i_end = (i_s // BT * BT, i_unmasked) if ZONE == 0 else (i_unmasked, T)
        i_h, i_t = i_g * (H // G), i_first
        for _ in tl.range(0, (i_end - i_first) // BT * (H // G), disable_licm=True):
            i_bh = i_b * H + i_h
            # [BT, K], stacked [Q; R] [2 BT, K]; then [BS, BT]
            if ONE_PASS:
                b_q = load_tile(q, 0, i_b, i_h, i_t, T, BT, K, K, True)
                b_r = load_tile(r, 0, i_b, i_h, i_t, T, BT, K, K, True)
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
                b_t = tl.dot(b_k, tl.trans(b_r), input_precision="ieee")
            else:
                b_q = q.load([i_b, i_h, 0, i_t, 0]).reshape(2 * BT, K)
                b_r = b_q
                b_st = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
                b_s, b_t = tl.split(b_st.reshape(BS, 2, BT).permute(0, 2, 1))
            b_do = load_tile(do, 0, i_b, i_h, i_t, T, BT, K, K, True)
            b_a = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
            # scale * (1 + tbar - t) and (b - a) / scale
            b_s = b_s * (scale * LOG2E) - _load_row_constant(rows, i_bh, 0, i_t, T, BT, True)[None, :]
            b_p = tl.math.exp2(b_s)
            b_t = _load_row_constant(rows, i_bh, 1, i_t, T, BT, True)[None, :] - b_t * scale
            b_a = _load_row_constant(rows, i_bh, 2, i_t, T, BT, True)[None, :] - b_a * (1.0 / scale)
            if ZONE == 0:
                o_t, o_s = i_t + tl.arange(0, BT), i_s + tl.arange(0, BS)
                b_p = tl.where(o_s[:, None] <= o_t[None, :], b_p, 0.0)
            b_w = b_p * b_t
            b_u = (b_p * b_a).to(b_do.dtype)
            b_g = b_p * _load_row_constant(rows, i_bh, 3, i_t, T, BT, True)[None, :] - b_w * b_a
            b_g = b_g.to(b_do.dtype)
            # [BS, K]
            b_dv = tl.dot(b_w.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
            if ONE_PASS:
                b_dk = tl.dot(b_g, b_q, b_dk, input_precision="ieee")
                b_dk = tl.dot(b_u, b_r, b_dk, input_precision="ieee")
                _add_product(dq, b_g, b_k, i_bh, i_t, T, BT, K, OPTION == "tma")
                _add_product(dr, b_u, b_k, i_bh, i_t, T, BT, K, OPTION == "tma")
            else:
                b_gu = tl.join(b_g, b_u).permute(0, 2, 1).reshape(BS, 2 * BT)
                b_dk = tl.dot(b_gu, b_q, b_dk, input_precision="ieee")
            i_t += BT
            i_h = tl.where(i_t >= i_end, i_h + 1, i_h)
            i_t = tl.where(i_t >= i_end, i_first, i_t)
    dk.store([i_b, i_g, i_s, 0], (b_dk * scale).to(dk.dtype).reshape(1, 1, BS, K))
    dv.store([i_b, i_g, i_s, 0], (b_dv / scale).to(dv.dtype).reshape(1, 1, BS, K))


@triton.jit(do_not_specialize=["T", "num_heads", "section"])
def _queries_kernel(
    q, r, k, v, do, rows, dq, dr, T, num_heads, section, scale, H: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """Compute BT rows of one head's dQ and dR with [G; U] K as one product."""
    i_rank, i_bh = program_of(tl.program_id(0), T // BT, num_heads, section)
    i_t = (T // BT - 1 - i_rank) * BT
    i_b, i_h, i_g = i_bh // H, i_bh % H, i_bh % H // (H // G)
    b_lse = _load_row_constant(rows, i_bh, 0, i_t, T, BT, True)
    b_t1 = _load_row_constant(rows, i_bh, 1, i_t, T, BT, True)
    b_b = _load_row_constant(rows, i_bh, 2, i_t, T, BT, True)
    b_e = _load_row_constant(rows, i_bh, 3, i_t, T, BT, True)
    b_q = load_tile(q, 0, i_b, i_h, i_t, T, BT, K, K, True)
    b_r = load_tile(r, 0, i_b, i_h, i_t, T, BT, K, K, True)
    b_do = load_tile(do, 0, i_b, i_h, i_t, T, BT, K, K, True)
    b_d = tl.zeros([2 * BT, K], tl.float32)
    b_g_sum, b_u_sum = tl.zeros([BT, 8], tl.float32), tl.zeros([BT, 8], tl.float32)
    i_diagonal = i_t // BS * BS
    for ZONE in tl.static_range(2):
        i_first, i_end = (i_diagonal, i_t + BT) if ZONE == 0 else (0, i_diagonal)
        for i_s in tl.range(i_first, i_end, BS, disable_licm=True):
            b_k = load_tile(k, 0, i_b, i_g, i_s, T, BS, K, K, True)
            b_v = load_tile(v, 0, i_b, i_g, i_s, T, BS, K, K, True)
            # [BT, BS]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_t = tl.dot(b_r, tl.trans(b_k), input_precision="ieee")
            b_a = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
            b_p = tl.math.exp2(b_s * (scale * LOG2E) - b_lse[:, None])
            b_t = b_t1[:, None] - b_t * scale
            b_a = b_b[:, None] - b_a * (1.0 / scale)
            if ZONE == 0:
                o_t, o_s = i_t + tl.arange(0, BT), i_s + tl.arange(0, BS)
                b_p = tl.where(o_s[None, :] <= o_t[:, None], b_p, 0.0)
            b_u = b_p * b_a
            b_g = (b_p * b_e[:, None] - b_t * b_u).to(b_k.dtype)
            b_u = b_u.to(b_k.dtype)
            # [2 BT, K]
            b_gu = tl.join(b_g, b_u).permute(2, 0, 1).reshape(2 * BT, BS)
            b_d = tl.dot(b_gu, b_k, b_d, input_precision="ieee")
            b_g_sum = add_row_sums(b_g, b_g_sum)
            b_u_sum = add_row_sums(b_u, b_u_sum)
    b_k_ref = tl.sum(load_tile(k, 0, i_b, i_g, i_diagonal, T, BS, K, K, True).to(tl.float32), 0) / BS
    b_dq, b_dr = tl.split(b_d.reshape(2, BT, K).permute(1, 2, 0))
    b_dq = (b_dq - tl.max(b_g_sum, 1)[:, None] * b_k_ref[None, :]) * scale
    b_dr = (b_dr - tl.max(b_u_sum, 1)[:, None] * b_k_ref[None, :]) * scale
    dq.store([i_b, i_h, i_t, 0], b_dq.to(dq.dtype).reshape(1, 1, BT, K))
    dr.store([i_b, i_h, i_t, 0], b_dr.to(dr.dtype).reshape(1, 1, BT, K))


class Problem:
    """Inputs, and what a backward needs of the forward."""

    def __init__(self, inputs: Inputs) -> None:
        """Run the forward."""
        self.operands = backward.Operands(*inputs)
        batch_size, self.num_tokens, self.num_heads, self.head_dim = inputs.q.shape
        self.num_programs = batch_size * self.num_heads
        self.scale, self.mask = self.head_dim**-0.5, Mask(None, None, None)
        self.saved = forward.forward(*inputs[:4], None, self.scale, None, save_vbar=True)
        self.rows = self.constants()

    def over_rows(self, kernel: Any, *arguments: object) -> None:
        """Launch a kernel over 64 rows of each head."""
        grid = self.num_tokens // 64, self.num_programs
        kernel[grid](*arguments, self.num_tokens, self.scale, H=self.num_heads, K=self.head_dim, BT=64)

    def constants(self) -> Tensor:
        """Return the row constants `[B * H, 4, T]`."""
        do = self.operands.do
        rows = torch.empty(self.num_programs, 4, self.num_tokens, dtype=torch.float32, device=do.device)
        self.over_rows(_constants_kernel, do, *self.saved, rows, do.stride()[:3])
        return rows

    def launch(
        self, kernel: Any, tile: Tile, rows: Tensor, q: object = None, *buffers: object, **option: str
    ) -> tuple[Tensor, Tensor]:
        """Launch a kernel, q in place of the described Q if given; return dk, dv or dq, dr."""
        is_keys = kernel is _keys_kernel
        x, block = (self.operands.k, tile.block_s) if is_keys else (self.operands.q, tile.block_t)
        gradients = torch.empty_like(x), torch.empty_like(x)
        described = self.operands.described(tile)
        num_programs = x.shape[0] * x.shape[2]
        group = self.num_heads // self.operands.k.shape[2]
        num_streamed, unit = (3 * group, 1) if is_keys else (2, group)
        section = heads_per_section(num_programs, unit, num_streamed * x[0, :, 0].nbytes)
        kernel[(self.num_tokens // block * num_programs,)](
            q or described[0], *described[1:], TensorDescriptor.from_tensor(rows, [1, 1, tile.block_t]),
            *buffers, *(describe(g, block, self.head_dim) for g in gradients), self.num_tokens, num_programs,
            section, self.scale, H=self.num_heads, G=self.operands.k.shape[2], K=self.head_dim,
            BT=tile.block_t, BS=tile.block_s, num_warps=tile.num_warps, num_stages=tile.num_stages, **option,
        )  # fmt: skip
        return gradients


def _two_passes(p: Problem, tile: Tile, option: str, out: Gradients) -> Iterator[str]:
    out["dq"], out["dr"], rows = backward.query_gradients(p.operands, *p.saved, p.mask, p.scale)
    yield "dQ/dR"
    out["dk"], out["dv"] = backward.key_gradients(p.operands, rows, p.mask, p.scale)
    yield "dK/dV"


def _one_pass(p: Problem, tile: Tile, option: str, out: Gradients) -> Iterator[str]:
    rows = p.constants()
    yield "constants"
    sums = [rows.new_zeros(p.num_programs * p.head_dim, p.num_tokens) for _ in range(2)]
    yield "zeros"
    described = [TensorDescriptor.from_tensor(x, [p.head_dim, tile.block_t]) for x in sums]
    buffers = described if option == "tma" else sums
    out["dk"], out["dv"] = p.launch(_keys_kernel, tile, rows, None, *buffers, OPTION=option)
    yield "one pass"
    for name, x in zip(("dq", "dr"), sums, strict=True):
        out[name] = torch.empty_like(p.operands.q)
        p.over_rows(_convert_kernel, x, describe(out[name], 64, p.head_dim))
    yield "conversion"


def _stacked_dqdr(p: Problem, tile: Tile, option: str, out: Gradients) -> Iterator[str]:
    out["dq"], out["dr"] = p.launch(_queries_kernel, tile, p.rows)
    yield "dQ/dR"


def _stacked_dkdv(p: Problem, tile: Tile, option: str, out: Gradients) -> Iterator[str]:
    qr = torch.stack([x for x in p.operands[:2] if x is not None])
    yield "copy"
    size, strides = ([x[i] for i in (1, 3, 0, 2, 4)] for x in (qr.shape, qr.stride()))
    queries = TensorDescriptor(qr, size, strides, [1, 1, 2, tile.block_t, p.head_dim])
    out["dk"], out["dv"] = p.launch(_keys_kernel, tile, p.rows, queries, None, None, OPTION=option)
    yield "dK/dV"


WAYS = {"(a)": _two_passes, "(b)": _one_pass, "(c) dQ/dR": _stacked_dqdr, "(c) dK/dV": _stacked_dkdv}

CANDIDATES: list[tuple[str, str, tuple[int, int, int, int]]] = [
    ("(a)", "", (0, 0, 0, 0)),
    ("(b)", "tma", (32, 64, 4, 2)),
    ("(b)", "tma", (64, 64, 8, 2)),
    ("(b)", "tma", (32, 128, 8, 2)),
    ("(b)", "tma", (64, 128, 8, 2)),
    ("(b)", "atomics", (32, 64, 4, 2)),
    ("(b)", "atomics", (32, 128, 8, 2)),
    ("(c) dQ/dR", "", (64, 64, 4, 2)),
    ("(c) dK/dV", "", (32, 64, 4, 3)),
    ("(c) dK/dV", "K in registers", (32, 64, 4, 3)),
]
"""Way, option, tile (queries, keys, warps, stages; of (a) those in tiles.py). 64 x 128 spills 216 bytes."""


@dataclass
class Candidate:
    """One of `CANDIDATES`; relative errors; milliseconds of each step, all and median; or why not timed."""

    way: str
    option: str
    tile: Tile
    errors: dict[str, float] = field(default_factory=dict)
    rounds_ms: dict[str, list[float]] = field(default_factory=dict)
    steps_ms: dict[str, float] = field(default_factory=dict)
    refused: str = ""

    def compare(self, problem: Problem, truth: Gradients, bars: dict[str, float]) -> None:
        """Fill in the errors; refuse what does not run or is above its bar."""
        out: Gradients = {}
        try:
            list(WAYS[self.way](problem, self.tile, self.option, out))
            self.errors = {name: relative_error(x, truth[name]) for name, x in sorted(out.items())}
        except Exception as error:  # a candidate may ask for more than the GPU has
            self.refused = f"refused, {type(error).__name__}: {str(error)[-150:]}".replace("\n", " ")
        if not all(error <= bars[name] for name, error in self.errors.items()):
            self.refused = "refused, wrong"


def measure(found: list[Candidate], problem: Problem, num_rounds: int = 20) -> None:
    """Time the steps of all candidates in turns."""
    flushed = torch.empty(2**26, dtype=torch.int32, device="cuda")
    for i_round in range(num_rounds):
        for c in found[i_round % len(found) :] + found[: i_round % len(found)]:
            # a cold L2 cache, and time for the host to run ahead of the GPU
            flushed.zero_()
            torch.cuda._sleep(4_000_000)
            events = [("", torch.cuda.Event(enable_timing=True))]
            events[0][1].record()
            for name in WAYS[c.way](problem, c.tile, c.option, {}):
                events.append((name, torch.cuda.Event(enable_timing=True)))
                events[-1][1].record()
            torch.cuda.synchronize()
            for (_, before), (name, after) in pairwise(events):
                c.rounds_ms.setdefault(name, []).append(before.elapsed_time(after))
    for c in found:
        c.steps_ms = {name: statistics.median(times) for name, times in c.rounds_ms.items()}


def table(found: list[Candidate]) -> str:
    """Return the Markdown table; (b) beside the sum of (a), each pass of (c) beside that of (a)."""
    lines = ["| variant, queries, keys, warps, stages | ms | sum | times (a) | errors |\n|" + "---|" * 5]
    ours = found[0].steps_ms
    for c in found:
        pairs = [(x, ours.get(name, 0.0)) for name, x in c.steps_ms.items() if c.way == "(b)" or name in ours]
        base = sum(ours.values()) if c.way == "(b)" else sum(x for _, x in pairs)
        ratio = f"{sum(x for x, _ in pairs) / base:.2f}" if base and pairs else ""
        steps = " + ".join(f"{name} {x:.2f}" for name, x in c.steps_ms.items()) or c.refused
        errors = ", ".join(f"{name} {x:.1e}" for name, x in c.errors.items())
        label = f"{c.way} {c.option} {c.tile[:4]}" if any(c.tile[:4]) else c.way
        total = sum(c.steps_ms.values())
        lines.append(f"| {label} | {steps} | {total:.2f} | {ratio} | {errors} |")
    return "\n".join(lines)


def main() -> None:
    """Compare, time, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only, in fp32 on the CPU")
    parser.add_argument("--shape", type=int, nargs=5, default=[8, 4096, 16, 8, 128], help="B T H G K")
    parser.add_argument("--out", type=Path, default=RESULTS / "backward_variants.json")
    args = parser.parse_args()
    found = [Candidate(way, option, Tile(*tile)) for way, option, tile in CANDIDATES]
    small, dtype, device, bars = (1, 1024, *args.shape[2:]), torch.bfloat16, "cuda", BARS
    if args.check:
        small, dtype, device, bars = (2, 256, 4, 2, 64), torch.float32, "cpu", dict.fromkeys(BARS, 1e-5)
        found = [Candidate(c.way, c.option.replace("tma", "atomics"), c.tile) for c in found]
    inputs = make_inputs(*small, dtype=dtype, device=device)
    truth = output_and_gradients(parallax_reference, inputs.to(torch.float64))
    problem = Problem(inputs)
    for c in found:
        c.compare(problem, truth, bars)
        print(c.way, c.option, c.tile[:4], c.errors, c.refused, file=sys.stderr, flush=True)
    if args.check:
        sys.exit(any(c.refused for c in found))
    problem = Problem(make_inputs(*args.shape, dtype=dtype, device=device))
    measure([c for c in found if not c.refused], problem)
    print(table(found))
    command = shlex.join(["python", "-m", "benchmarks.backward_variants", *sys.argv[1:]])
    result = {"command": command, "shape": args.shape, "candidates": [asdict(c) for c in found]}
    print(write_result(args.out.stem, result, args.out.parent))


if __name__ == "__main__":
    main()
