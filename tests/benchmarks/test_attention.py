"""`benchmarks.attention`: the order of turns, the tables, missing peers, and the process of the authors."""

import os
from importlib.metadata import version
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime._async_compile import active_mode
from triton.runtime.autotuner import Autotuner

from benchmarks.attention import ALL_PROVIDERS, Bench, choose_providers
from benchmarks.attention_authors import AuthorsProcess, compile_configs_together
from benchmarks.attention_providers import missing_module
from benchmarks.attention_table import accuracy_header, accuracy_row, format_tables
from benchmarks.attention_timing import Cell, Pair, Provider, Shape, measure
from errors import UserError
from parallax.reference import parallax_reference
from parallax.testing import Inputs, make_inputs, output_and_gradients

SHAPE = Shape(num_tokens=64, head_dim=16, num_heads=2, num_kv_heads=1, batch_size=2)

# of the authors' package, in the layout of theirs; __file__ tells that it is not ours
PACKAGE = """
import torch

def parallax_func(q, r, k, v):
    assert q.shape[1] == 2 * k.shape[1] and "site" in __file__
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True) + 0 * r
"""


class _Runner:
    """Takes a given time; writes down what it is asked for."""

    def __init__(self, name: str, times: Pair, asked: list[str], error: Exception | None = None) -> None:
        self.name, self.times, self.asked, self.error = name, times, asked, error

    def warm_up(self) -> float:
        if self.error is not None:
            raise self.error
        return 3.0

    def take_turn(self) -> Pair:
        self.asked.append(self.name)
        return self.times

    def run_alone(self, num_runs: int) -> Pair:
        self.asked.append(f"{self.name} alone {num_runs}")
        return (2 * self.times[0], 2 * self.times[1])


def test_providers_take_turns_and_then_run_alone() -> None:
    asked: list[str] = []
    runners = {
        "ours": _Runner("a", (1.0, 3.0), asked),
        "fla": _Runner("b", (2.0, 4.0), asked),
        "fa4": _Runner("c", (0.0, 0.0), asked, ModuleNotFoundError("No module named 'flash_attn'")),
    }
    ours, fla, fa4 = measure(SHAPE, runners, seconds=0.05, seconds_alone=0.2)
    # a rotation for its duration, then five of 10 ms, each beginning with the next
    assert asked == [*"ab", *"abbaabbaab", "a alone 50", "b alone 33"]
    assert (ours.forward_ms, ours.backward_ms, ours.alone_ms, ours.peak_mib) == (1.0, 3.0, (2.0, 6.0), 3.0)
    assert (fla.sum_ms, fla.alone_ms, len(fla.rounds_ms)) == (6.0, (4.0, 8.0), 5)
    assert fa4.error == "ModuleNotFoundError: No module named 'flash_attn'"
    assert measure(SHAPE, {"ours": runners["ours"]}, seconds=0.05)[0].alone_ms is None
    assert measure(SHAPE, {"fa4": runners["fa4"]}, seconds=0.05)[0].rounds_ms == []


def test_table_shows_both_timings_relative_to_ours_of_the_same_kind() -> None:
    cells = [
        Cell("ours", SHAPE, 1.0, 3.0, alone_ms=(2.0, 3.0)),
        Cell("ours_softmax", SHAPE, 1.0, 1.0, alone_ms=(1.0, 3.0)),
        Cell("authors", SHAPE, 2.0, 4.0, alone_ms=(3.0, 4.0)),
        Cell("cudnn", SHAPE, 0.5, 0.5, peak_mib=7.4, alone_ms=(1.0, 1.0)),
        Cell("fa4", SHAPE, error="ModuleNotFoundError: no"),
    ]
    lines = format_tables(cells, ALL_PROVIDERS).splitlines()[5:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [(row[1], row[3], row[5]) for row in rows] == [
        ("ours", "1.00", "1.00"),
        ("ours, softmax", "1.00", "1.00"),
        ("authors', Triton", "1.50", "1.40"),
        ("cuDNN, softmax", "0.50", "0.50"),
        ("FlashAttention-4, softmax", "", ""),
    ]
    assert rows[3][2].startswith("0.50 + 0.50 = 1.00 (")
    assert rows[3][6] == "7"
    assert rows[4][2] == "does not run"


def test_ratios_are_left_out_where_ours_was_not_measured() -> None:
    row = format_tables([Cell("cudnn", SHAPE, 0.5, 0.5, alone_ms=(1.0, 1.0))], ALL_PROVIDERS).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")][4:7:2] == ["", ""]


def test_accuracy_rows_have_as_many_cells_as_the_header() -> None:
    row = {"attention": "cuDNN, softmax", "num_tokens": 64, "head_dim": 16, "key_offset": 3.0, "o": 1e-3}
    assert accuracy_row(row).count("|") == accuracy_header().splitlines()[0].count("|") == 10


def test_peers_that_are_not_installed_are_skipped_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = choose_providers(["fa4", "cudnn"], has_authors=False)
    assert chosen[:2] == ["ours", "cudnn"]
    if "fa4" not in chosen:
        assert capsys.readouterr().out == "fa4 is skipped: flash_attn.cute is not installed\n"
    provider = Provider("x", torch.add, is_parallax=False, module="json.nothing")
    assert missing_module(provider) == "json.nothing"
    assert missing_module(provider._replace(module="nothing.at.all")) == "nothing.at.all"
    assert missing_module(provider._replace(module="json.decoder")) is None


def test_authors_kernels_need_their_package(tmp_path: Path) -> None:
    assert "authors" not in choose_providers(None, has_authors=False)
    assert choose_providers(None, has_authors=True)[-2:] == ["authors", "authors_helion"]
    with pytest.raises(UserError, match="authors_helion, which is in the authors' package"):
        choose_providers(["authors_helion"], has_authors=False)
    with pytest.raises(UserError, match="holds no package parallax"):
        AuthorsProcess(tmp_path)


@pytest.fixture
def authors(tmp_path: Path):
    folder = tmp_path / "site"
    (folder / "parallax").mkdir(parents=True)
    (folder / "parallax" / "__init__.py").write_text(PACKAGE)
    process = AuthorsProcess(folder)
    yield process
    process.close()


def _inputs() -> Inputs:
    return make_inputs(1, 20, 4, 2, 16, dtype=torch.float32)


def test_authors_package_runs_in_a_process_of_its_own(authors: AuthorsProcess) -> None:
    results = Bench(["authors"], authors).results("authors", _inputs())
    truth = output_and_gradients(parallax_reference, _inputs().without_probes())
    assert {"dr", *truth} == set(results)
    for name in truth:
        torch.testing.assert_close(results[name], truth[name], rtol=1e-4, atol=1e-5)


def test_versions_of_the_authors_process(
    authors: AuthorsProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = authors.describe()
    assert (found["parallax-kernel"], found["torch"]) == (None, version("torch"))
    assert found["HELION_AUTOTUNE_EFFORT"] == "quick"
    monkeypatch.setenv("HELION_AUTOTUNE_EFFORT", "full")
    process = AuthorsProcess(tmp_path / "site")
    assert process.describe()["HELION_AUTOTUNE_EFFORT"] == "full"
    process.close()


def test_error_of_the_authors_package_is_that_of_the_provider(authors: AuthorsProcess) -> None:
    with pytest.raises(RuntimeError, match=r"ModuleNotFoundError: No module named 'parallax\.helion'"):
        authors.results("authors_helion", _inputs())
    assert authors.results("authors", _inputs())["o"].shape == (1, 20, 4, 16)


@triton.autotune([triton.Config({"TILE": 2**i}, num_warps=2) for i in range(3)], key=["n"])
@triton.jit
def _tuned_kernel(x, n, TILE: tl.constexpr):
    tl.store(x + tl.arange(0, TILE), n)


def test_configs_of_a_tuned_kernel_are_compiled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Autotuner, "prune_configs", Autotuner.prune_configs)
    compile_configs_together()
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    at_once, compiled = Barrier(3, timeout=30), []

    class Kernel:
        def warmup(self, *args: Any, grid: Any, **options: Any) -> None:
            mode = active_mode.get()
            assert mode is not None

            def compile_config() -> int:
                at_once.wait()
                if options["TILE"] == 4:
                    raise RuntimeError("out of registers")
                return options["TILE"]

            mode.submit(options["TILE"], compile_config, lambda tile: compiled.append((args, grid, tile)))

    monkeypatch.setattr(_tuned_kernel, "fn", Kernel())
    monkeypatch.setattr(_tuned_kernel, "nargs", {"x": "data", "n": 5}, raising=False)
    configs = _tuned_kernel.prune_configs({"grid": (7,), "warmup": False})
    assert configs == _tuned_kernel.configs
    assert sorted(compiled) == [(("data", 5), (7,), 1), (("data", 5), (7,), 2)]


@pytest.mark.gpu
def test_tuned_kernels_run_after_their_configs_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Autotuner, "prune_configs", Autotuner.prune_configs)
    compile_configs_together()
    x = torch.zeros(4, device="cuda")
    _tuned_kernel[(1,)](x, 9)
    assert x[0] == 9
    assert len(_tuned_kernel.configs_timings) == 3


def test_end_of_the_authors_process_is_an_error(authors: AuthorsProcess) -> None:
    authors._process.kill()
    with pytest.raises(RuntimeError, match="the authors' process has ended with code -9"):
        authors.results("authors", _inputs())
