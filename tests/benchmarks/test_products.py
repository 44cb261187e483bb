"""The products of a model, with a workspace and without."""

import json
import os
import subprocess
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import products
from benchmarks.products import Times, layer_time, matrices, measure, time_in_process, time_products
from config import load
from errors import RunError
from training.run_config import RunConfig

DEBUG = "configs/debug_softmax_muon.toml"


def test_matrices_are_those_of_all_blocks() -> None:
    softmax = matrices(load(RunConfig, "configs/0.6b_softmax_adamw.toml"))
    assert softmax == {
        (2048, 1024): 28,
        (1024, 1024): 56,
        (1024, 2048): 28,
        (3072, 1024): 56,
        (1024, 3072): 28,
    }
    # decay and write rates of three heads
    assert matrices(load(RunConfig, "configs/0.6b_gated-deltanet_muon.toml"))[3, 1024] == 56


def test_a_block_is_the_sum_of_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {path: load(RunConfig, path) for path in (DEBUG, "configs/0.6b_softmax_adamw.toml")}
    asked = []

    def time_in_process(workspace: str | None, paths: Sequence[str]) -> dict[str, Times]:
        asked.append(workspace)
        time = len(asked) if workspace is None else 0.5 * len(asked)
        return {
            path: {
                f"{kind} {m} x {n}": time for kind in ("y", "dx", "dW") for m, n in matrices(configs[path])
            }
            for path in paths
        }

    monkeypatch.setattr(products, "time_in_process", time_in_process)
    times = measure(list(configs))
    assert asked == [None, ":0:0"] * 3
    assert list(times) == list(configs)
    # the medians of 1, 3, 5 and of half of 2, 4, 6, for three products of each of seven matrices
    for path, config in configs.items():
        assert layer_time(config, times[path]["with"]) == 21 * 3
        assert layer_time(config, times[path]["without"]) == 21 * 2


@pytest.mark.parametrize("workspace", [None, ":0:0"])
def test_each_way_has_its_own_environment(workspace: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2")
    given: dict[str, Any] = {}

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        given.update(options, command=command)
        return SimpleNamespace(returncode=0, stdout=json.dumps({DEBUG: {"y 1 x 1": 2.0}}))

    monkeypatch.setattr(subprocess, "run", run)
    assert time_in_process(workspace, [DEBUG]) == {DEBUG: {"y 1 x 1": 2.0}}
    assert given["env"].get("CUBLAS_WORKSPACE_CONFIG") == workspace
    assert given["env"]["PATH"] == os.environ["PATH"]
    assert given["command"][1:] == ["-m", "benchmarks.products", "--child", DEBUG]


def test_a_failed_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout=""))
    with pytest.raises(RunError, match=r"not measured: \S+ -m benchmarks\.products --child \S+ has failed"):
        time_in_process(None, [DEBUG])


@pytest.mark.gpu
def test_products_on_a_gpu() -> None:
    config = load(RunConfig, DEBUG)
    times = time_products(config)
    assert len(times) == 3 * len(matrices(config))
    assert all(time > 0 for time in times.values())
