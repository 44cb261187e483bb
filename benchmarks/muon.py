"""Time and memory of an optimizer step, for the parameters of our configs.

`python -m benchmarks.muon` takes the matrices and vectors of 0.6B and 1.7B Parallax models, checks our update
against Newton-Schulz 5 in fp64, and times one step of every provider on one GPU: fused AdamW for everything,
and Muon for the hidden matrices with fused AdamW for the rest, by us, by torch.optim.Muon and by published
packages where they are installed. Times are medians over CUDA events: the device's, with the host ahead of it
as in training, and from an idle device, which waits for the host.

`torchrun --standalone --nproc-per-node 2 -m benchmarks.muon` times ours alone: every rank with all the
parameters, then the ranks together with FSDP2's shards. It says how far the results are apart, and whether
two sharded runs give the same bits.
"""

import argparse
import itertools
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import config
from benchmarks.machine import RESULTS, write_result
from optimizers.muon import Muon
from optimizers.orthogonalize import newton_schulz5
from optimizers.param_groups import assign_parameters
from training.preflight import build_meta_model
from training.run_config import RunConfig

LR, MUON_LR = 1e-3, 0.01
MAX_ERROR = 0.02
"""Of our update relative to fp64, Frobenius norms."""

Params = dict[str, list[torch.nn.Parameter]]
Optimizers = list[torch.optim.Optimizer]


def make_params(path: str, mesh: DeviceMesh | None) -> Params:
    """Draw the parameters of a config and their gradients.

    Args:
        path: The config; its groups say which parameters are Muon's.
        mesh: Over which to shard them by rows, as FSDP2 does, or None.

    Returns:
        "muon" and "adamw": fp32 parameters of normal entries on the GPU, with gradients.
    """
    run = config.load(RunConfig, path, [])
    assigned = assign_parameters(build_meta_model(run).named_parameters(), run.optimizer.groups)
    generator = torch.Generator("cuda").manual_seed(0)
    params: Params = {"muon": [], "adamw": []}
    for name, members in assigned.items():
        for meta in members:
            pair = (torch.randn(meta.shape, generator=generator, device="cuda") for _ in range(2))
            value, gradient = (x if mesh is None else distribute_tensor(x, mesh, [Shard(0)]) for x in pair)
            p = torch.nn.Parameter(value * 0.02)
            p.grad = gradient
            params[run.optimizer.groups[name].kind].append(p)
    return params


def _adamw(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, betas=(0.9, 0.95), fused=True)


def _only_adamw(params: Params) -> Optimizers:
    return [_adamw([*params["muon"], *params["adamw"]])]


def _ours(params: Params) -> Optimizers:
    return [Muon(params["muon"], lr=MUON_LR, scale="spectral"), _adamw(params["adamw"])]


def _ours_polar_express(params: Params) -> Optimizers:
    muon = Muon(params["muon"], lr=MUON_LR, scale="spectral", orthogonalization="polar_express")
    return [muon, _adamw(params["adamw"])]


def _ours_bfloat16(params: Params) -> Optimizers:
    muon = Muon(params["muon"], lr=MUON_LR, scale="spectral", dtype="bfloat16")
    return [muon, _adamw(params["adamw"])]


def _torch(params: Params) -> Optimizers:
    return [torch.optim.Muon(params["muon"], lr=MUON_LR), _adamw(params["adamw"])]


def _keller_jordan(params: Params) -> Optimizers:
    return [import_module("muon").SingleDeviceMuon(params["muon"], lr=MUON_LR), _adamw(params["adamw"])]


PROVIDERS: dict[str, tuple[str, Callable[[Params], Optimizers]]] = {
    "adamw": ("AdamW, fused, for all", _only_adamw),
    "ours": ("ours", _ours),
    "ours_polar_express": ("ours, Polar Express with 8 steps", _ours_polar_express),
    "ours_bfloat16": ("ours, bf16", _ours_bfloat16),
    "torch": ("torch.optim.Muon", _torch),
    "keller_jordan": ("muon-optimizer 0.1.0", _keller_jordan),
}


def time_step(
    optimizers: Optimizers, num_steps: int, *, host_is_ahead: bool
) -> tuple[float, list[list[float]]]:
    """Time steps from their first kernel to their end.

    Args:
        optimizers: One after another.
        num_steps: How many.
        host_is_ahead: Whether the device is busy while the host queues the step, as in training; else it is
            idle, and waits for the host.

    Returns:
        Median of the whole step in milliseconds, and for each step the whole and each optimizer's part.
    """
    rounds: list[list[float]] = []
    for _ in range(num_steps):
        torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()
            torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(optimizers) + 1)]
        if host_is_ahead:
            torch.cuda._sleep(80_000_000)
        events[0].record()
        for optimizer, event in zip(optimizers, events[1:], strict=True):
            optimizer.step()
            event.record()
        torch.cuda.synchronize()
        parts = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
        rounds.append([sum(parts), *parts])
    return statistics.median(each[0] for each in rounds), rounds


def measure(name: str, params: Params, num_steps: int) -> dict[str, Any]:
    """Take and time steps of one provider; return times and memory, or why it does not run."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        optimizers = PROVIDERS[name][1](params)
        for _ in range(2):
            for optimizer in optimizers:
                optimizer.step()
        torch.cuda.synchronize()
        state = torch.cuda.memory_allocated() - before
        peak = torch.cuda.max_memory_allocated() - before
        idle_ms, idle_rounds = time_step(optimizers, num_steps, host_is_ahead=False)
        step_ms, rounds = time_step(optimizers, num_steps, host_is_ahead=True)
        return {
            "step_ms": step_ms,
            "parts_ms": [statistics.median(column) for column in list(zip(*rounds, strict=True))[1:]],
            "from_idle_ms": idle_ms,
            "rounds_ms": rounds,
            "idle_rounds_ms": idle_rounds,
            "state_gib": state / 2**30,
            "peak_gib": peak / 2**30,
        }
    except Exception as error:  # a package may not be installed, or not serve this
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"}


def check_update(params: Params) -> float:
    """Return the largest error of our first update relative to fp64, over one matrix of each shape.

    Raises:
        SystemExit: It is above its bar: there is no time to report.
    """
    alike = {tuple(p.shape): p for p in params["muon"]}
    worst = 0.0
    for start in alike.values():
        assert start.grad is not None
        p = torch.nn.Parameter(torch.zeros_like(start))
        p.grad = start.grad
        Muon([p], lr=1.0, scale="unit").step()
        truth = -newton_schulz5(p.grad.double())
        worst = max(worst, ((p.detach() - truth).norm() / truth.norm()).item())
    if not worst <= MAX_ERROR:
        sys.exit(f"no time is reported: our update is off by {worst:.4f}, at most {MAX_ERROR} is admitted")
    return worst


def benchmark(paths: list[str], names: list[str], num_steps: int) -> Iterator[dict[str, Any]]:
    """Yield the results of each config on one GPU."""
    for path in paths:
        params = make_params(path, None)
        error = check_update(params)
        print(f"\n{path}: error of our update {error:.4f}\n", flush=True)
        header = (
            "| provider | step, ms | Muon + AdamW | from idle, ms | state, GiB | peak above parameters, GiB |"
        )
        print(f"{header}\n|" + "---|" * 6)
        for name in names:
            result = measure(name, params, num_steps)
            torch.cuda.empty_cache()
            yield {"config": path, "provider": name, "update_error": error, **result}
            print(f"| {PROVIDERS[name][0]} | {_cells(result)} |", flush=True)


def _cells(result: dict[str, Any]) -> str:
    if "error" in result:
        return result["error"]
    parts = " + ".join(f"{x:.1f}" for x in result["parts_ms"])
    times = f"{result['step_ms']:.1f} | {parts} | {result['from_idle_ms']:.1f}"
    return f"{times} | {result['state_gib']:.2f} | {result['peak_gib']:.2f}"


def benchmark_sharded(paths: list[str], num_steps: int) -> Iterator[dict[str, Any]]:
    """Yield the results of each config, on every rank by itself and on all together."""
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    header = (
        "| config | one rank, ms | together, ms | ratio | from idle | difference | repeatable | state, GiB |"
    )
    print(f"{header}\n|" + "---|" * 8)
    for path in paths:
        (alone, first), (sharded, second), (_, third) = (
            _move(path, m, num_steps) for m in (None, mesh, mesh)
        )
        result = {
            "config": path,
            "alone": alone,
            "sharded": sharded,
            "difference": max(((x - y).norm() / x.norm()).item() for x, y in zip(first, second, strict=True)),
            "is_repeatable": all(torch.equal(x, y) for x, y in zip(second, third, strict=True)),
        }
        if "error" in alone or "error" in sharded:
            sys.exit(f"{path}: {alone.get('error')}, {sharded.get('error')}")
        print(
            f"| {path} | {alone['step_ms']:.1f} | {sharded['step_ms']:.1f} "
            f"| {sharded['step_ms'] / alone['step_ms']:.2f} "
            f"| {sharded['from_idle_ms'] / alone['from_idle_ms']:.2f} | {result['difference']:.1e} "
            f"| {result['is_repeatable']} | {sharded['state_gib']:.2f} |",
            flush=True,
        )
        yield result


def _move(path: str, mesh: DeviceMesh | None, num_steps: int) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Measure ours; return also by how much some of the matrices have moved."""
    params = make_params(path, mesh)
    sample = params["muon"][:: len(params["muon"]) // 8]
    start = [p.detach().clone() for p in sample]
    result = measure("ours", params, num_steps)
    moved = [p.detach() - x for p, x in zip(sample, start, strict=True)]
    whole = [x.full_tensor() if isinstance(x, DTensor) else x for x in moved]
    del params, sample, start, moved
    torch.cuda.empty_cache()
    return result, whole


def main() -> None:
    """Check, time, print, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    configs = ["configs/0.6b_parallax_muon.toml", "configs/1.7b_parallax_muon.toml"]
    parser.add_argument("--configs", nargs="+", default=configs)
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="muon")
    args = parser.parse_args()

    is_leader = True
    if "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
        is_leader = dist.get_rank() == 0
        if not is_leader:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 for the rest of the process
        results = list(benchmark_sharded(args.configs, args.steps))
    else:
        results = list(benchmark(args.configs, args.providers, args.steps))
    if is_leader:
        command = shlex.join(["python", "-m", "benchmarks.muon", *sys.argv[1:]])
        print(write_result(args.name, {"command": command, "results": results}, args.out))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
