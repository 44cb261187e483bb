"""A GPU out of memory and a lost connection end a run in one line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from config import load as load_config
from errors import RunError, UserError
from tests.training.launch import ROOT, train
from training import device
from training.failures import MemoryUse, describe_out_of_memory, is_lost_connection, one_line_failures
from training.memory import GIB, estimate_memory
from training.preflight import build_meta_model
from training.rank_monitor import RankMonitor
from training.run_config import RunConfig

FULL = MemoryUse(70 * GIB, 71 * GIB, 72.5 * GIB, 0.25 * GIB, 79 * GIB)


def small(*words: str) -> RunConfig:
    return load_config(RunConfig, "configs/debug_parallax_muon.toml", words)


def test_out_of_memory_gives_the_numbers_and_the_keys_that_help() -> None:
    config = small("--training.local_batch_size", "4", "--parallelism.reshard_after_forward", "false")
    line = describe_out_of_memory(config, 2, "rank 1 (node7, process 9) in step 1: micro-batch 1 of 2", FULL)
    peak = estimate_memory(config, build_meta_model(config), 2).peak / GIB
    for part in (
        "rank 1 (node7, process 9) in step 1: micro-batch 1 of 2: the GPU is out of memory: of 79.00 GiB",
        *("70.00 GiB allocated", "71.00 GiB reserved by torch", "72.50 GiB peak", "0.25 GiB free"),
        *("7.75 GiB in use outside torch's allocator", f"--dry-run predicts a peak of {peak:.2f} GiB"),
        "training.local_batch_size (now 4) lower",
        'training.activation_checkpointing to "selective" or "full"',
        "parallelism.reshard_after_forward to true",
    ):
        assert part in line
    assert "\n" not in line
    assert "expandable_segments" not in line


def test_out_of_memory_names_no_key_that_is_at_its_best() -> None:
    words = ("--training.local_batch_size", "1", "--training.activation_checkpointing", "full")
    fragmented = MemoryUse(50 * GIB, 78 * GIB, 60 * GIB, 0, 79 * GIB)
    line = describe_out_of_memory(small(*words), 1, "rank 0", fragmented)
    assert "Train on more ranks, or with a shorter training.seq_len, or PYTORCH_ALLOC_CONF=expandable" in line
    for key in ("local_batch_size", "activation_checkpointing", "reshard_after_forward", "replicate"):
        assert key not in line


def test_one_line_on_a_single_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.failures.memory_use", lambda: FULL)
    config = small()
    with (
        pytest.raises(RunError, match=r"rank 0 \(.*\) in start: the GPU is out of memory"),
        one_line_failures(config, RankMonitor(config), 1),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_other_errors_keep_their_traceback() -> None:
    config = small()
    with (
        pytest.raises(RuntimeError, match="shape") as raised,
        one_line_failures(config, RankMonitor(config), 1),
    ):
        raise RuntimeError("shape mismatch")
    assert not isinstance(raised.value, RunError)


def test_gloo_names_itself_where_a_rank_is_gone(tmp_path: Path) -> None:
    program = (
        "import os, sys, time, signal, torch, torch.distributed as dist\n"
        f"rank = int(sys.argv[1]); dist.init_process_group('gloo', init_method='file://{tmp_path}/store',"
        " rank=rank, world_size=2)\n"
        "dist.all_reduce(torch.ones(1))\n"
        "if rank: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from training.failures import is_lost_connection\n"
        "try:\n    dist.all_reduce(torch.ones(1))\n"
        "except RuntimeError as error:\n    print('lost' if is_lost_connection(error) else repr(error))\n"
        "os._exit(0)"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    printed, _ = ranks[0].communicate(timeout=120)
    assert ranks[1].wait(timeout=60) == -signal.SIGKILL
    assert printed.strip() == "lost"
    assert not is_lost_connection(RuntimeError("size mismatch"))


def test_out_of_memory_ends_a_run_in_one_line(corpus: Path, tmp_path: Path) -> None:
    program = ("-m", "tests.faults.ranks", "memory", "2", "0")
    printed = train("debug_softmax_adamw", corpus, tmp_path / "run", code=1, program=program)
    errors = [line for line in printed.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert f"error: rank 0 ({os.uname().nodename}, process " in errors[0]
    assert "in step 2: micro-batch 1 of 4: the GPU is out of memory: of 79.00 GiB" in errors[0]
    assert "Traceback" not in printed


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device.prepare() == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match="LOCAL_RANK is 4, but this host shows 4 GPUs: start at most 4 proc"):
        device.prepare()
