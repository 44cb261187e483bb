"""How command lines end."""

import errno
import functools
import importlib
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from errors import RunError, UnsupportedError, UserError, check_out, exit_code, run_command
from parallax import parallax_attention


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("training.steps must be at least 1, got 0"), 2),
        (UnsupportedError("lla has no counterpart; softmax has"), 2),
        (RunError("step 3: the loss is nan"), 1),
    ],
)
def test_an_error_is_one_line(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: _raise(error)) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_arguments_that_parallax_refuses_are_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.zeros(1, 4, 2, 64)
    assert run_command(lambda: print(parallax_attention(x, x, x, x, impl="triton"))) == 2
    assert capsys.readouterr().err.startswith("error: impl='triton' needs CUDA")
    assert run_command(lambda: print(parallax_attention(x, x, x, x, window_size=0))) == 2


def test_a_folder_to_write_to_can_be_made(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    link.symlink_to("nowhere")
    for out in (None, tmp_path, tmp_path / "new" / "newer", Path("new")):
        check_out(out)
    for path in (file, link, Path("/dev/null")):
        for out in (path, path / "below", path / "below" / "it"):
            with pytest.raises(UserError, match=f"--out is {out}, but {path} is a file; want a folder"):
                check_out(out)


def test_a_package_that_is_not_installed_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        importlib.import_module("no_such_package.inner")

    assert run_command(main) == 2
    said = "error: the package no_such_package is not installed; pip install -e '.[train,eval]' installs "
    assert capsys.readouterr().err.startswith(said)
    # modules of this project, or of a package that is there, are faults
    for name in ("models.no_such_module", "torch.no_such_module"):
        with pytest.raises(ModuleNotFoundError):
            run_command(lambda name=name: _raise(ModuleNotFoundError(name=name)))


def test_a_fault_keeps_its_traceback() -> None:
    for error in (ValueError("invalid literal"), TypeError("x"), RuntimeError("CUDA error")):
        assert exit_code(error) is None
        with pytest.raises(type(error)):
            run_command(lambda error=error: _raise(error))


def _use(use: Callable[[Path], object], path: Path) -> None:
    use(path)


def test_a_path_that_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    uses: list[Callable[[Path], object]] = [Path.mkdir, Path.read_text, Path.iterdir, Path.touch]
    paths = ["file", "file/x", "x" * 300, "none/x"]
    failed = 0
    for use, name in itertools.product(uses, paths):
        path = tmp_path / name
        code = run_command(functools.partial(_use, use, path))
        failed += code == 2
        printed = capsys.readouterr().err
        assert code == 0 or (printed.startswith(f"error: cannot use {path} (") and printed.count("\n") == 1)
    assert failed > len(uses)
    assert run_command(lambda: _raise(OSError(errno.ENOSPC, "No space left on device", "/a/b"))) == 2
    printed = capsys.readouterr().err
    assert (
        "cannot use /a/b (No space left on device): make room for it (used at tests/test_errors.py:"
        in printed
    )


def test_an_error_of_the_system_without_a_path_is_a_fault() -> None:
    with pytest.raises(OSError, match="Input/output error"):
        run_command(lambda: _raise(OSError(errno.EIO, "Input/output error")))


PRINT_MUCH = """
import sys
from errors import run_command
sys.exit(run_command(lambda: [print("x" * 100) for _ in range({lines})] and None))
"""


@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_reader_that_has_ended_is_not_an_error(lines: int) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", PRINT_MUCH.format(lines=lines)]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
    process.stderr.close()


def test_a_broken_pipe_to_another_process_is_a_fault() -> None:
    with pytest.raises(BrokenPipeError):
        run_command(lambda: _raise(BrokenPipeError(errno.EPIPE, "Broken pipe")))


def test_ctrl_c_and_success() -> None:
    assert run_command(lambda: _raise(KeyboardInterrupt())) == 130
    assert run_command(lambda: None) == 0
