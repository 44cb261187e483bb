"""Time and memory of optimizer steps, for the parameters of our configs.

`python -m benchmarks.muon` takes the parameter shapes of the 0.6B and 1.7B Parallax models, checks our update
against Newton-Schulz 5 in fp64, and times one step of every provider on one GPU: fused AdamW for all
parameters, and Muon for the hidden matrices with fused AdamW for the others, with our Muon, torch.optim.Muon,
and published packages if they are installed. Times are medians over CUDA events, both with the host ahead of
the device, as in training, and from an idle device, which waits for kernel launches.

`torchrun --standalone --nproc-per-node 2 -m benchmarks.muon` times our Muon only: unsharded on every rank,
then sharded over the ranks as by FSDP2. It reports the difference of the results, and whether two sharded
runs are bit-identical.
"""

import itertools
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from benchmarks.command import make_parser, parse
from benchmarks.machine import write_result
from config import load
from errors import run_command
from optimizers.muon import Muon
from optimizers.orthogonalize import newton_schulz5
from optimizers.param_groups import assign_parameters
from training.preflight import build_meta_model
from training.run_config import RunConfig

LR, MUON_LR = 1e-3, 0.01
MAX_ERROR = 0.02
"""Maximum error of our update relative to fp64, in Frobenius norm."""

Params = dict[str, list[torch.nn.Parameter]]
Optimizers = list[torch.optim.Optimizer]


def make_params(path: str, mesh: DeviceMesh | None) -> Params:
    """Make random parameters with the shapes of a config, and random gradients.

    Args:
        path: The config file; its groups decide which parameters Muon updates.
        mesh: Mesh to shard the parameters over by rows, as FSDP2 does, or None.

    Returns:
        "muon" and "adamw": normally distributed fp32 parameters on the GPU, with gradients.
    """
    config = load(RunConfig, path)
    assigned = assign_parameters(build_meta_model(config).named_parameters(), config.optimizer.groups)
    generator = torch.Generator("cuda").manual_seed(0)
    params: Params = {"muon": [], "adamw": []}
    for name, members in assigned.items():
        for meta in members:
            pair = (torch.randn(meta.shape, generator=generator, device="cuda") for _ in range(2))
            value, gradient = (x if mesh is None else distribute_tensor(x, mesh, [Shard(0)]) for x in pair)
            p = torch.nn.Parameter(value * 0.02)
            p.grad = gradient
            params[config.optimizer.groups[name].kind].append(p)
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
    "adamw": ("AdamW, fused, for all parameters", _only_adamw),
    "ours": ("ours", _ours),
    "ours_polar_express": ("ours, Polar Express with 8 steps", _ours_polar_express),
    "ours_bfloat16": ("ours, bf16", _ours_bfloat16),
    "torch": ("torch.optim.Muon", _torch),
    "keller_jordan": ("muon-optimizer 0.1.0", _keller_jordan),
}


def time_step(
    optimizers: Optimizers, num_steps: int, *, host_is_ahead: bool
) -> tuple[float, list[list[float]]]:
    """Time optimizer steps on the device.

    Args:
        optimizers: The optimizers of a step, in order.
        num_steps: Number of steps.
        host_is_ahead: Whether the device is busy while the host launches the step, as in training; otherwise
            it is idle and waits for launches.

    Returns:
        Median time of a step in milliseconds, and for each step its time and those of its optimizers.
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
    """Time steps of one provider; return times and memory, or the error that stops it."""
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
    except Exception as error:  # a package may be missing, or not support these parameters
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"}


def check_update(params: Params) -> float:
    """Return the maximum error of our first update relative to fp64, over one matrix of each shape.

    Raises:
        SystemExit: It exceeds MAX_ERROR, so that no time may be reported.
    """
    by_shape = {tuple(p.shape): p for p in params["muon"]}
    max_error = 0.0
    for start in by_shape.values():
        assert start.grad is not None
        p = torch.nn.Parameter(torch.zeros_like(start))
        p.grad = start.grad
        Muon([p], lr=1.0, scale="unit").step()
        truth = -newton_schulz5(p.grad.double())
        max_error = max(max_error, ((p.detach() - truth).norm() / truth.norm()).item())
    if not max_error <= MAX_ERROR:
        sys.exit(f"error of our update is {max_error:.4f}, more than {MAX_ERROR}; no times are reported")
    return max_error


def benchmark(paths: list[str], names: list[str], num_steps: int) -> Iterator[dict[str, Any]]:
    """Yield the result of each config and provider on one GPU."""
    for path in paths:
        params = make_params(path, None)
        error = check_update(params)
        print(f"\n{path}: error of our update {error:.4f}\n", flush=True)
        columns = (
            "provider | step, ms | Muon + AdamW | from idle, ms | state, GiB | peak above parameters, GiB"
        )
        print(f"| {columns} |\n|" + "---|" * 6)
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
    """Yield the result of each config, unsharded on every rank and sharded over all ranks."""
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    columns = (
        "config | one rank, ms | sharded, ms | ratio | from idle | difference | bit-identical | state, GiB"
    )
    print(f"| {columns} |\n|" + "---|" * 8)
    for path in paths:
        (alone, first), (sharded, second), (_, third) = (
            _measure_ours(path, m, num_steps) for m in (None, mesh, mesh)
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


def _measure_ours(
    path: str, mesh: DeviceMesh | None, num_steps: int
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Measure our Muon; return also the total change of some of the matrices."""
    params = make_params(path, mesh)
    sample = params["muon"][:: len(params["muon"]) // 8]
    start = [p.detach().clone() for p in sample]
    result = measure("ours", params, num_steps)
    changes = [p.detach() - x for p, x in zip(sample, start, strict=True)]
    full_changes = [x.full_tensor() if isinstance(x, DTensor) else x for x in changes]
    del params, sample, start, changes
    torch.cuda.empty_cache()
    return result, full_changes


def main() -> None:
    """Run `python -m benchmarks.muon`."""
    parser = make_parser("muon", __doc__, name="muon")
    configs = ["configs/0.6b_parallax_muon.toml", "configs/1.7b_parallax_muon.toml"]
    parser.add_argument("--configs", nargs="+", default=configs, help="config files (0.6B and 1.7B Parallax)")
    parser.add_argument(
        "--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS), help="(all)"
    )
    parser.add_argument("--steps", type=int, default=10, help="timed steps (10)")
    args = parse(parser)

    is_main_rank = True
    if "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
        is_main_rank = dist.get_rank() == 0
        if not is_main_rank:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 for the rest of the process
        results = list(benchmark_sharded(args.configs, args.steps))
    else:
        results = list(benchmark(args.configs, args.providers, args.steps))
    if is_main_rank:
        command = shlex.join(["python", "-m", "benchmarks.muon", *sys.argv[1:]])
        print(write_result(args.name, {"command": command, "results": results}, args.out))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_command(main))
