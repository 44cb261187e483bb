"""Tuning of the splits and tiles of the decode kernels in parallax/kernels/decode_tiles.py.

`python -m benchmarks.tune_decode` times all candidates at shapes from one long sequence to many short ones,
as benchmarks/decode.py times its providers, writes all times, and prints the fastest candidates of each shape
with the one in the table. Kernels are compiled first, in --workers processes.
"""

import multiprocessing
import os
import shlex
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import make_parser, parse
from benchmarks.decode import Operands, Shape, check_accuracy, graph_of, make_operands, time_graphs
from benchmarks.machine import write_result
from errors import run_command
from parallax.kernels.decode import decode
from parallax.kernels.decode_tiles import SPLITS, DecodeDevice, DecodeTile, tile_of

SHAPES = [
    Shape(16, 8, 1, 128),
    Shape(8, 8, 1, 512),
    Shape(16, 8, 1, 1024),
    Shape(16, 8, 1, 4096),
    Shape(8, 8, 1, 16384),
    Shape(16, 8, 1, 32768),
    Shape(16, 16, 1, 4096),
    Shape(16, 8, 16, 1024),
    Shape(16, 8, 16, 4096),
    Shape(16, 16, 16, 4096),
    Shape(8, 8, 32, 1024),
    Shape(16, 8, 128, 1024),
    Shape(16, 8, 128, 4096),
    Shape(16, 8, 1024, 128),
    Shape(16, 8, 16, 4096, 64),
    Shape(16, 8, 128, 4096, 64),
]

TILES = [(64, 4, 3), (64, 4, 4), (64, 4, 5), (32, 1, 4), (32, 2, 4), (128, 4, 2), (128, 4, 3), (128, 8, 3)]
"""Keys in a tile (twice as many at head width 64), warps, stages."""

_GRAPHS_AT_ONCE = 8


def _attend(tile: DecodeTile, x: Operands) -> Tensor:
    out = torch.empty_like(x.q)
    decode(x.q, x.r, x.k, x.v, x.cache_seqlens, None, None, x.q.shape[-1] ** -0.5, out, tile=tile)
    return out


def candidates(shape: Shape, num_multiprocessors: int) -> list[DecodeTile]:
    """Return the tiles to time, with splits for a third of a program per multiprocessor to three."""
    pairs = shape.batch_size * shape.num_kv_heads
    width = 128 // shape.head_dim
    splits = [
        n
        for n in SPLITS
        if n * 64 <= shape.num_keys and (n == 1 or pairs * n <= 3 * num_multiprocessors)
        if pairs * n >= num_multiprocessors // 3 or (n == 1 and shape.num_keys <= 512)
    ]
    return [DecodeTile(n, keys * width, *rest) for n in splits for keys, *rest in TILES]


def _tiles(shape: Shape) -> list[DecodeTile]:
    """Return the tile of the table, then the candidates."""
    device = DecodeDevice.of(torch.cuda.get_device_properties(0))
    pairs, rows = shape.batch_size * shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
    table = tile_of(pairs, shape.num_keys, rows, shape.head_dim, device)
    return list(dict.fromkeys([table, *candidates(shape, device.num_multiprocessors)]))


def _compile(job: tuple[Shape, DecodeTile]) -> None:
    shape, tile = job
    _attend(tile, make_operands(shape._replace(batch_size=1, num_keys=256)))


def compile_all(num_workers: int) -> None:
    """Compile the kernels of all candidates into Triton's cache.

    Args:
        num_workers: Number of processes.
    """
    jobs = {}
    for shape in SHAPES:
        for tile in _tiles(shape):
            # a kernel is compiled once for each of these keys
            jobs.setdefault((shape[:2], shape.head_dim, tile[1:], tile.num_splits > 1), (shape, tile))
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        pool.map(_compile, jobs.values(), chunksize=1)


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Time all candidates at one shape.

    Args:
        shape: Shape of each call.
        rounds: Number of replays of each.

    Returns:
        The shape, the tile of the table, and [splits, keys, warps, stages, microseconds] of each.
    """
    tiles = _tiles(shape)
    times: list[list[float]] = []
    for first in range(0, len(tiles), _GRAPHS_AT_ONCE):
        batch = tiles[first : first + _GRAPHS_AT_ONCE]
        graphs = {str(tile): graph_of(partial(_attend, tile), shape) for tile in batch}
        found = time_graphs(graphs, rounds)
        times += [[*tile, found[str(tile)]] for tile in batch]
        del graphs
        torch.cuda.empty_cache()
    return {**shape._asdict(), "table": list(tiles[0]), "times": sorted(times, key=lambda row: row[-1])}


def main() -> None:
    """Run `python -m benchmarks.tune_decode`."""
    parser = make_parser("tune_decode", __doc__, name="tune_decode")
    parser.add_argument("--rounds", type=int, default=7, help="graph replays per candidate (7)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that compile (one per core)"
    )
    options = parse(parser)
    compile_all(options.workers)
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
    sys.exit(run_command(main))
