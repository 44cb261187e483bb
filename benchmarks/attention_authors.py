"""The authors' kernels (package `parallax-kernel`) for `benchmarks.attention --authors DIR`.

Their package imports as `parallax` too, so it runs in a process of its own, which takes its turns among the
other providers: this process asks for each of them through a pipe. At the first call of a shape both
of theirs are tuned: the Triton kernels over 36 configs each, compiled at once here, since one after another
takes minutes; Helion's for as long as HELION_AUTOTUNE_EFFORT says ("quick" where it is not set).
"""

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton import AsyncCompileMode, Config
from triton.runtime.autotuner import Autotuner

from benchmarks.attention_timing import LocalRunner, Pair, Provider, Shape, draw
from benchmarks.machine import versions
from errors import UserError


def _triton(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return import_module("parallax").parallax_func(q, r, k, v)


def _helion(q: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return import_module("parallax.helion").parallax_func(q, r, k, v)


_EFFORT = "HELION_AUTOTUNE_EFFORT"
PROVIDERS = {
    "authors": Provider("authors', Triton", _triton, is_parallax=True, heads_first=True),
    "authors_helion": Provider("authors', Helion", _helion, is_parallax=True, heads_first=True),
}


class AuthorsProcess:
    """A process in which `parallax` is the authors' package.

    Args:
        folder: The folder that holds the package, for example made by `pip install --no-deps --target`.

    Raises:
        UserError: The folder holds no package `parallax`.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "parallax" / "__init__.py").exists():
            raise UserError(
                f"--authors is {folder}, which holds no package parallax; make it by "
                "`pip install --no-deps --target DIR parallax-kernel`"
            )
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.attention_authors",
                str(theirs.fileno()),
                str(folder.resolve()),
            ],
            pass_fds=[theirs.fileno()],
            env={_EFFORT: "quick", **os.environ},
        )
        theirs.close()  # so that its end is seen here if the process dies

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of `_Server` there.

        Raises:
            RuntimeError: What the call raised there, or that the process has ended.
        """
        try:
            self._connection.send((method, arguments))
            answer, error = self._connection.recv()
        except (EOFError, OSError) as lost:
            raise RuntimeError(f"the authors' process has ended with code {self._process.wait()}") from lost
        if error is not None:
            raise RuntimeError(error)
        return answer

    def results(self, name: str, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return output and gradients of a provider; see LocalRunner.results.

        Args:
            name: The provider.
            inputs: q, r, k, v and the gradient of the output, `[B, T, H or G, K]`.
        """
        return _unpack(self.ask("results", name, _pack(list(inputs)), str(inputs[0].device)))

    def describe(self) -> dict[str, str | None]:
        """Return the versions of their packages, None for one that is not installed, and Helion's effort."""
        return self.ask("describe")

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.wait()


class AuthorsRunner:
    """One of the authors' providers at one shape, with the inputs that `draw` gives there too.

    Args:
        process: The process.
        name: The provider.
        shape: Shape of the problem.
    """

    def __init__(self, process: AuthorsProcess, name: str, shape: Shape) -> None:
        self._process, self._arguments = process, (name, tuple(shape))

    def warm_up(self) -> float:
        """See `Runner`."""
        return self._process.ask("warm_up", *self._arguments)

    def take_turn(self) -> Pair:
        """See `Runner`; the GPU is idle when the turn passes from one process to the other."""
        return self._process.ask("take_turn", *self._arguments)

    def run_alone(self, num_runs: int) -> Pair:
        """See `Runner`."""
        return self._process.ask("run_alone", *self._arguments, num_runs)


class _Server:
    """What the process answers; it keeps the runners of one shape."""

    def __init__(self) -> None:
        self._shape: Shape | None = None
        self._runners: dict[str, LocalRunner] = {}

    def _runner(self, name: str, shape: tuple[int, ...]) -> LocalRunner:
        if self._shape != shape:
            self._runners.clear()
            torch.cuda.empty_cache()
            self._shape = Shape(*shape)
        if name not in self._runners:
            self._runners[name] = LocalRunner(PROVIDERS[name], draw(Shape(*shape)))
        return self._runners[name]

    def warm_up(self, name: str, shape: tuple[int, ...]) -> float:
        return self._runner(name, shape).warm_up()

    def take_turn(self, name: str, shape: tuple[int, ...]) -> Pair:
        return self._runner(name, shape).take_turn()

    def run_alone(self, name: str, shape: tuple[int, ...], num_runs: int) -> Pair:
        return self._runner(name, shape).run_alone(num_runs)

    def describe(self) -> dict[str, str | None]:
        return {**versions("parallax-kernel", "helion", "torch", "triton"), _EFFORT: os.environ[_EFFORT]}

    def results(self, name: str, inputs: bytes, device: str) -> bytes:
        tensors = [x.to(device) for x in _unpack(inputs)]
        return _pack({key: x.cpu() for key, x in LocalRunner(PROVIDERS[name], tensors).results().items()})


def _pack(tensors: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu")


def compile_configs_together() -> None:
    """Let Triton compile all configs of a kernel that it tunes at once, before it times the first one."""
    prune = Autotuner.prune_configs

    def prune_and_compile(self: Autotuner, kwargs: dict[str, Any]) -> list[Config]:
        configs = prune(self, kwargs)
        assert self.nargs is not None
        given = {name: value for name, value in kwargs.items() if name != "warmup"}
        # a config that does not compile fails again, by itself, when it is timed
        with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for config in configs:
                self.fn.warmup(*self.nargs.values(), **given, **config.all_kwargs())
        return configs

    Autotuner.prune_configs = prune_and_compile


def serve(connection: Connection) -> None:
    """Answer calls until the other end closes."""
    server = _Server()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((getattr(server, method)(*arguments), None))
        except Exception as error:  # reported as the provider's
            connection.send((None, f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    # before anything imports ours
    sys.path.insert(0, sys.argv[2])
    compile_configs_together()
    serve(Connection(int(sys.argv[1])))
