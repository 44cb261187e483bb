"""Throughput of preparing token shards, against the `tokenizers` library alone on the same text and cores.

    python -m benchmarks.data_prepare --files GLOB ... --tokenizer DIR

Each round tokenizes the first --bare-tokens of the text with the library alone (with its own threads, and
with one process per core) before and after `python -m data.shards prepare`, which writes all of the text to a
temporary folder. Ratios are to the mean of the two library runs of a round; the result is the median over
rounds. The shards are then verified, a sample of documents is compared with the library, and a training run's
loader reads them back.
"""

import itertools
import multiprocessing
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from benchmarks.command import make_parser, parse
from benchmarks.machine import write_result
from data.config import ParquetSource, ShardsSource
from data.loading.loader import PackedLoader
from data.shards.verify import verify
from data.sources.files import FileDocuments
from data.sources.open import open_text
from data.sources.shard_format import read_manifest
from data.sources.shards import ShardDocuments
from data.sources.split import is_held_out
from data.tokenizer import Tokenizer
from errors import run_command
from tokens import TOKENIZER_FILE

_BATCH_DOCUMENTS = 256
_backend: list[tokenizers.Tokenizer] = []


def _texts(source: FileDocuments) -> list[list[str]]:
    texts = (row.text for row in source.read(repeat=False) if row.text is not None)
    batches: list[list[str]] = []
    while batch := list(itertools.islice(texts, _BATCH_DOCUMENTS)):
        batches.append(batch)
    return batches


def _start_worker(backend: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _backend[:] = [tokenizers.Tokenizer.from_str(backend)]


def _count_tokens(batch: list[str]) -> int:
    return sum(len(encoding.ids) for encoding in _backend[0].encode_batch(batch, add_special_tokens=False))


def _library_throughput(
    path: Path, batches: Sequence[list[str]], num_tokens: int, processes: int
) -> dict[str, float]:
    """Measure the library alone in tokens/s: with its own threads, and with one process per core."""
    backend = tokenizers.Tokenizer.from_file(str(path))
    _backend[:] = [backend]
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    done, used, since = 0, 0, time.perf_counter()
    while done < num_tokens and used < len(batches):
        done += _count_tokens(batches[used])
        used += 1
    threads = done / (time.perf_counter() - since)
    with multiprocessing.get_context("spawn").Pool(processes, _start_worker, (backend.to_str(),)) as pool:
        pool.map(_count_tokens, batches[: 2 * processes], chunksize=1)
        since = time.perf_counter()
        done = sum(pool.imap(_count_tokens, batches[:used], chunksize=1))
        pooled = done / (time.perf_counter() - since)
    return {"encode_batch_threads": threads, "encode_batch_processes": pooled}


def _round(
    num_tokens: int, prepared: dict[str, float], before: dict[str, float], after: dict[str, float]
) -> dict[str, float]:
    speed = num_tokens / prepared["seconds"]
    library = {name: (before[name] + after[name]) / 2 for name in before}
    ratios = {f"ratio_to_{name}": speed / value for name, value in library.items()}
    return {"tokens_per_second": speed, **library, **ratios, **prepared}


def _prepare(folder: Path, words: Sequence[str], processes: int) -> dict[str, float]:
    """Run the command; return its wall time, the main process's CPU time, and peak memory in MiB."""
    command = [sys.executable, "-m", "data.shards", "prepare", "--out", str(folder), *words]
    since = time.perf_counter()
    process = subprocess.Popen([*command, "--processes", str(processes)])
    peaks: dict[int, float] = {}
    cpu_seconds = 0.0
    while process.poll() is None:
        cpu_seconds = max(cpu_seconds, _cpu_seconds(process.pid))
        for each in (process.pid, *_children(process.pid)):
            peaks[each] = max(peaks.get(each, 0.0), _peak_rss_mib(each))
        time.sleep(0.1)
    seconds = time.perf_counter() - since
    assert process.returncode == 0
    return {
        "seconds": seconds,
        "main_process_cpu_seconds": cpu_seconds,
        "main_process_peak_rss_mib": peaks.pop(process.pid),
        "worker_peak_rss_mib": max(peaks.values(), default=0.0),
    }


def _proc(process: int, name: str) -> str:
    try:
        return Path(f"/proc/{process}/{name}").read_text(encoding="utf-8")
    except OSError:  # the process has ended
        return ""


def _children(process: int) -> list[int]:
    return [int(each) for each in _proc(process, f"task/{process}/children").split()]


def _cpu_seconds(process: int) -> float:
    fields = _proc(process, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _peak_rss_mib(process: int) -> float:
    lines = _proc(process, "status").splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def _check(folder: Path, tokenizer: Tokenizer, batches: Sequence[list[str]]) -> int:
    """Verify the shards and compare documents with the library; return the number of documents compared."""
    problems = [problem for _, each in verify(folder) for problem in each]
    assert not problems, problems
    source = ShardDocuments(
        ShardsSource(folder=str(folder)), tokenizer_fingerprint=tokenizer.fingerprint, split="train"
    )
    written = source.read(repeat=False)
    texts = [text for batch in batches[:20] for text in batch if not is_held_out(text)]
    for text, row in zip(texts, written, strict=False):
        assert row.tokens is not None
        assert row.tokens[:].tolist() == [*tokenizer.encode(text), tokenizer.end_of_document_id]
    return len(texts)


def _read_back(folder: Path, tokenizer: Tokenizer, packing: Any) -> dict[str, float]:
    """Measure a loader's tokens/s over all ranks, on 1 rank and on one of 64."""
    speeds = {}
    for world in (1, 64):
        source = ShardDocuments(
            ShardsSource(folder=str(folder)),
            tokenizer_fingerprint=tokenizer.fingerprint,
            split="train",
            shuffle_seed=0,
        )
        sizes = {"seq_len": 4096, "local_batch_size": 8, "global_batch_size": 8 * world}
        loader = PackedLoader(
            source,
            tokenizer,
            **sizes,
            dp_rank=0,
            dp_world_size=world,
            packing=packing,
            shuffle_seed=0,
            prefetch_batches=0,
        )
        batches = iter(loader)
        next(batches)
        count, since = 640 // world, time.perf_counter()
        for _ in range(count):
            next(batches)
        speeds[f"{world} ranks"] = count * 8 * world * 4096 / (time.perf_counter() - since)
    return speeds


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Command-line arguments; None for sys.argv[1:].
    """
    parser = make_parser("data_prepare", __doc__, name="data_prepare_cpu_202611")
    parser.add_argument("--files", nargs="+", required=True, metavar="GLOB", help="parquet files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder that holds a tokenizer.json")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--processes", type=int, default=cores, help="processes that tokenize")
    parser.add_argument("--bare-tokens", type=int, default=8_000_000, help="tokens for the library alone")
    parser.add_argument("--rounds", type=int, default=3)
    options = parse(parser, arguments)
    tokenizer = Tokenizer.load(options.tokenizer)
    file = options.tokenizer / TOKENIZER_FILE
    source = open_text(ParquetSource(files=options.files))
    batches = _texts(source)
    words = ["--files", *options.files, "--tokenizer", str(options.tokenizer)]
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shards"
        after = _library_throughput(file, batches, options.bare_tokens, options.processes)
        for _ in range(options.rounds):
            shutil.rmtree(folder, ignore_errors=True)
            prepared = _prepare(folder, words, options.processes)
            before, after = after, _library_throughput(file, batches, options.bare_tokens, options.processes)
            splits = read_manifest(folder).splits.values()
            rounds.append(_round(sum(split.tokens for split in splits), prepared, before, after))
        manifest = read_manifest(folder)
        num_checked = _check(folder, tokenizer, batches)
        read_back = {each: _read_back(folder, tokenizer, each) for each in ("concatenate", "best_fit")}
    median = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    result = {
        "command": "python -m benchmarks.data_prepare " + shlex.join(arguments or sys.argv[1:]),
        "cpu": _cpu(),
        "cores": cores,
        "load_average": os.getloadavg(),
        "tokenizers": tokenizers.__version__,
        "platform": platform.platform(),
        "processes": options.processes,
        "documents": sum(split.documents for split in manifest.splits.values()),
        "tokens": sum(split.tokens for split in manifest.splits.values()),
        "median_round": median,
        "rounds": rounds,
        "documents_checked_against_the_library": num_checked,
        "loader_tokens_per_second": read_back,
    }
    print(median)
    print(write_result(options.name, result, options.out))


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
