"""Training speed of Parallax and of our softmax attention, compared with other implementations.

`python -m benchmarks.attention` checks the accuracy first and reports no speed if ours fails. Then every
length at 32k tokens is timed in two ways. In turns: all providers run in rotation, so that clocks and
temperature affect them equally. Alone: each runs again and again for --alone-seconds, which brings the GPU to
its power limit; in turns, kernels that draw less power hide that. Times are medians over CUDA events; the
forward saves what a backward needs. FLOPs count the causal half of each product: softmax 2 forward and 5
backward, Parallax 4 and 8, regardless of how many a kernel executes. Memory is the peak of one forward and
backward above the inputs.

Providers are ours, torch's softmax attention with the FlashAttention-2 and the cuDNN backend, compiled
FlexAttention (softmax), Parallax from flash-linear-attention, FlashAttention-4 (`flash_attn.cute`, softmax),
and with `--authors DIR` the Triton and the Helion kernels of the authors' package `parallax-kernel` in DIR,
in a process of its own. What is not installed is left out with a line that says so.
"""

import argparse
import itertools
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention_authors
from benchmarks.attention_authors import AuthorsProcess, AuthorsRunner
from benchmarks.attention_providers import PROVIDERS, missing_module, parse_heads
from benchmarks.attention_table import accuracy_header, accuracy_row, format_tables
from benchmarks.attention_timing import Cell, LocalRunner, Runner, Shape, draw, measure
from benchmarks.command import make_parser, parse
from benchmarks.machine import versions, write_result
from errors import UserError, run_command
from parallax.kernels import tiles
from parallax.reference import parallax_reference
from parallax.testing import Inputs, make_inputs, output_and_gradients, relative_error

BARS = {"o": 0.0026, "dq": 0.0032, "dr": 0.0032, "dk": 0.0032, "dv": 0.0032}
"""Maximum permitted relative norm errors of ours against fp64 in bf16."""

KEY_OFFSETS = (0.0, 3.0, 8.0)

ACCURACY_LENGTHS = (tiles.SHORT, 2 * tiles.SHORT)
"""The Hopper forward has another tile and loop for long rows; peers are checked at the first length."""

FLEX_LENGTHS = (4096, 16384)
"""FlexAttention takes seconds to compile per shape, so it is timed at these lengths only."""

OURS = ("ours", "ours_softmax")
ALL_PROVIDERS = {**PROVIDERS, **attention_authors.PROVIDERS}
PEERS_WIDTHS = (64, 128)
"""Head widths at which others than ours are timed."""


class Bench:
    """The providers of one run of the benchmark.

    Args:
        names: Their names.
        authors: The process of the authors' package, or None without it.
    """

    def __init__(self, names: Sequence[str], authors: AuthorsProcess | None) -> None:
        self.names, self.authors = names, authors

    def results(self, name: str, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Return output and gradients of a provider by name; see LocalRunner.results."""
        if name in attention_authors.PROVIDERS:
            assert self.authors is not None
            return self.authors.results(name, inputs)
        return LocalRunner(PROVIDERS[name], inputs).results()

    def names_at(self, shape: Shape, flex_lengths: Sequence[int]) -> list[str]:
        """Return the providers that are timed at a shape."""
        if shape.head_dim not in PEERS_WIDTHS:
            return [name for name in self.names if name in OURS]
        is_flexed = shape.num_tokens in flex_lengths and shape.num_heads != shape.num_kv_heads
        return [name for name in self.names if name != "flex" or is_flexed]

    def runners(self, shape: Shape, names: Sequence[str]) -> dict[str, Runner]:
        """Return providers with their inputs at a shape."""
        inputs, found = draw(shape), dict[str, Runner]()
        for name in names:
            if name in attention_authors.PROVIDERS:
                assert self.authors is not None
                found[name] = AuthorsRunner(self.authors, name, shape)
            else:
                found[name] = LocalRunner(PROVIDERS[name], inputs)
        return found

    def check_accuracy(self, head_dims: Sequence[int]) -> list[dict[str, Any]]:
        """Measure, print and return errors against fp64, 16 query and 8 kv heads.

        Raises:
            SystemExit: An error of ours exceeds its bar, so no speed may be reported.
        """
        rows, failures = [], []
        print(accuracy_header())
        for num_tokens, head_dim, key_offset in itertools.product(ACCURACY_LENGTHS, head_dims, KEY_OFFSETS):
            inputs = make_inputs(
                1, num_tokens, 16, 8, head_dim, dtype=torch.bfloat16, device="cuda", key_offset=key_offset
            )
            place = {"num_tokens": num_tokens, "head_dim": head_dim, "key_offset": key_offset}
            has_peers = num_tokens == ACCURACY_LENGTHS[0] and head_dim in PEERS_WIDTHS
            # FlexAttention would compile for seconds
            names = [name for name in self.names if name in OURS or (has_peers and name != "flex")]
            for name, errors in self._errors(names, inputs):
                rows.append({"attention": ALL_PROVIDERS[name].label, **place, **errors})
                print(accuracy_row(rows[-1]), flush=True)
                too_large = [each for each in errors if not errors[each] <= BARS[each]]
                if name in OURS and too_large:
                    failures.append(f"{name}, {place}: {', '.join(too_large)} above {BARS}")
        if failures:
            sys.exit("no speed is reported, the accuracy check failed: " + "; ".join(failures))
        return rows

    def _errors(self, names: Sequence[str], inputs: Inputs) -> Iterator[tuple[str, dict[str, float]]]:
        """Yield providers with their relative norm errors; peers that fail are printed and left out."""
        for is_parallax in (True, False):
            same = inputs if is_parallax else inputs.without_probes()
            truth = output_and_gradients(parallax_reference, same.to(torch.float64))
            for name in (name for name in names if ALL_PROVIDERS[name].is_parallax == is_parallax):
                try:
                    actual = self.results(name, inputs)
                except Exception as error:  # a peer may not support the inputs
                    if name in OURS:
                        raise
                    print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                    continue
                yield (
                    name,
                    {key: relative_error(actual[key].to(truth[key].device), truth[key]) for key in truth},
                )


def choose_providers(asked: Sequence[str] | None, has_authors: bool) -> list[str]:
    """Return the providers to time, ours first, and print which are left out because they are not installed.

    Args:
        asked: Those of the command line; None for all.
        has_authors: Whether the authors' package is given.

    Raises:
        UserError: The authors' kernels are asked for without their package.
    """
    theirs = [name for name in asked or () if name in attention_authors.PROVIDERS]
    if theirs and not has_authors:
        raise UserError(
            f"--providers has {theirs[0]}, which is in the authors' package: give its folder by --authors"
        )
    chosen = [name for name in ALL_PROVIDERS if asked is None or name in asked or name == "ours"]
    if not has_authors:
        chosen = [name for name in chosen if name in PROVIDERS]
    for name in list(chosen):
        module = missing_module(ALL_PROVIDERS[name])
        if module is not None:
            print(f"{name} is skipped: {module} is not installed")
            chosen.remove(name)
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("attention", __doc__, name="attention")
    lengths = [2**i for i in range(10, 16)]
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=lengths, help="tokens per row (1024 to 32768)"
    )
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64, 96, 256], help="head widths")
    parser.add_argument("--heads", nargs="+", default=["16/8", "16/16"], help="query/kv heads (16/8 16/16)")
    parser.add_argument("--providers", nargs="+", choices=list(ALL_PROVIDERS), help="(all)")
    parser.add_argument("--authors", type=Path, metavar="DIR", help="folder of the authors' package")
    parser.add_argument(
        "--flex-lengths",
        type=int,
        nargs="*",
        default=list(FLEX_LENGTHS),
        help="lengths at which FlexAttention is timed",
    )
    parser.add_argument("--tokens", type=int, default=32768, help="batch size times length")
    parser.add_argument("--seconds", type=float, default=0.8, help="duration of the rounds per shape (0.8)")
    parser.add_argument(
        "--alone-seconds", type=float, default=1.0, help="duration of each run alone; 0 for none (1.0)"
    )
    return parser


def main() -> None:
    """Run `python -m benchmarks.attention`."""
    args = parse(_parser())
    names = choose_providers(args.providers, args.authors is not None)
    authors = None if args.authors is None else AuthorsProcess(args.authors)
    bench = Bench(names, authors)
    errors = bench.check_accuracy(args.head_dims)
    found: list[Cell] = []
    for heads, head_dim, num_tokens in itertools.product(args.heads, args.head_dims, args.lengths):
        num_heads, num_kv_heads = parse_heads(heads)
        shape = Shape(num_tokens, head_dim, num_heads, num_kv_heads, max(1, args.tokens // num_tokens))
        if head_dim not in PEERS_WIDTHS and num_heads == num_kv_heads:
            continue
        runners = bench.runners(shape, bench.names_at(shape, args.flex_lengths))
        found += measure(shape, runners, args.seconds, args.alone_seconds)
        print(", ".join(f"{c.provider} {c.sum_ms:.2f}" for c in found if c.shape == shape), shape, flush=True)
        result = {
            "command": shlex.join(["python", "-m", "benchmarks.attention", *sys.argv[1:]]),
            "peers": versions("flash-attn-4", "nvidia-cutlass-dsl", "flash-linear-attention"),
            "authors": authors and authors.describe(),
            "accuracy": errors,
            "cells": [asdict(c) | {"shape": c.shape._asdict()} for c in found],
        }
        write_result(args.name, result, args.out)
    if authors is not None:
        authors.close()
    print(format_tables(found, ALL_PROVIDERS))


if __name__ == "__main__":
    sys.exit(run_command(main))
