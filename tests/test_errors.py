"""How command lines end."""

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


def test_a_fault_keeps_its_traceback() -> None:
    for error in (ValueError("invalid literal"), TypeError("x"), RuntimeError("CUDA error")):
        assert exit_code(error) is None
        with pytest.raises(type(error)):
            run_command(lambda error=error: _raise(error))


def test_ctrl_c_and_success() -> None:
    assert run_command(lambda: _raise(KeyboardInterrupt())) == 130
    assert run_command(lambda: None) == 0
