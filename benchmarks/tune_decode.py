"""Times of the decode kernels over splits and tiles: what parallax/kernels/decode.py chooses by.

`python -m benchmarks.tune_decode` times every candidate on shapes from one long sequence to many short ones,
as benchmarks/decode.py times its providers, writes all times and prints the fastest of each shape beside what
is chosen there.
"""

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode import Operands, Shape, check_accuracy, graph_of, time_graphs
from benchmarks.machine import RESULTS, write_result
from parallax.kernels.decode import SPLITS, DecodeTile, decode, tile_of

SHAPES = [
    Shape(16, 8, 1, 1024),
    Shape(16, 8, 1, 4096),
    Shape(16, 8, 1, 32768),
    Shape(16, 16, 1, 4096),
    Shape(16, 8, 16, 1024),
    Shape(16, 8, 128, 1024),
    Shape(16, 8, 1024, 128),
    Shape(16, 8, 16, 4096, 64),
]

TILES = [(64, 4, 3), (64, 4, 4), (64, 8, 3), (32, 4, 4), (128, 4, 2), (128, 8, 2), (128, 8, 3)]
"""Keys in a tile, warps, stages."""

_GRAPHS_AT_ONCE = 8


def _attend(tile: DecodeTile, x: Operands) -> Tensor:
    out = torch.empty_like(x.q)
    decode(x.q, x.r, x.k, x.v, x.cache_seqlens, None, None, x.q.shape[-1] ** -0.5, out, tile=tile)
    return out


def candidates(shape: Shape, num_multiprocessors: int) -> list[DecodeTile]:
    """Tiles worth timing: splits from half a program a multiprocessor to three."""
    pairs = shape.batch_size * shape.num_kv_heads
    splits = [
        n
        for n in SPLITS
        if n * 64 <= shape.num_keys and (n == 1 or pairs * n <= 3 * num_multiprocessors)
        if pairs * n >= num_multiprocessors // 2 or n == 1 < pairs
    ]
    return [DecodeTile(n, *tile) for n in splits for tile in TILES]


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Time all candidates of a shape.

    Args:
        shape: The problem.
        rounds: Replays of each.

    Returns:
        The shape, what the table takes, and [splits, keys, warps, stages, microseconds] of each.
    """
    count = torch.cuda.get_device_properties(0).multi_processor_count
    pairs = shape.batch_size * shape.num_kv_heads
    table = tile_of(pairs, shape.num_keys, shape.num_heads // shape.num_kv_heads, shape.head_dim, count)
    tiles = list(dict.fromkeys([table, *candidates(shape, count)]))
    times: list[list[float]] = []
    for first in range(0, len(tiles), _GRAPHS_AT_ONCE):
        batch = tiles[first : first + _GRAPHS_AT_ONCE]
        graphs = {str(tile): graph_of(partial(_attend, tile), shape) for tile in batch}
        found = time_graphs(graphs, rounds)
        times += [[*tile, found[str(tile)]] for tile in batch]
        del graphs
        torch.cuda.empty_cache()
    return {**shape._asdict(), "table": list(table), "times": sorted(times, key=lambda row: row[-1])}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--name", default="tune_decode")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    errors = check_accuracy()
    rows = []
    for shape in SHAPES:
        row = measure(shape, options.rounds)
        rows.append(row)
        of_table = next(time for *tile, time in row["times"] if tile == row["table"])
        print(
            f"{tuple(shape)}: table {row['table']} {of_table:.2f} us; fastest (splits, keys, warps, stages):"
        )
        for *tile, time in row["times"][:6]:
            print(f"    {tile} {time:.2f} us", flush=True)
    command = f"python -m benchmarks.tune_decode {shlex.join(sys.argv[1:])}".strip()
    print(
        "wrote", write_result(options.name, {"command": command, "errors": errors, "rows": rows}, options.out)
    )


if __name__ == "__main__":
    main()
