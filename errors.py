"""What a user got wrong, and how every command line ends with it: one line, exit code 2."""

import argparse
import errno
import json
import os
import select
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

RUN_ERROR_CODE = 1
USER_ERROR_CODE = 2
INTERRUPT_CODE = 130
# as a shell tells it of a program that SIGPIPE ended
CLOSED_OUTPUT_CODE = 141

# the largest seed that a TOML file and torch's generators hold
MAX_SEED = 2**63 - 1

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)

_LONGEST_SHOWN = 200

# key of a config -> the option of a command line that is in its place
_options: dict[str, str] = {}

_ROOT = Path(__file__).parent
# where `parallax`, which imports nothing of this project, checks the arguments that a config gives it
_ARGUMENT_CHECKS = ("parallax.api", "parallax.validation", "parallax.decode", "parallax.kernels.tiles")


class UserError(ValueError):
    """A config, a file or an argument that this project cannot work with.

    The message names the key, file or option, what was got, what was wanted and the remedy.
    """


class ConfigError(UserError):
    """A config file or an override gives a value that the schema does not allow.

    Attributes:
        keys: The keys that are to blame, as tuples of their parts, most specific first.
    """

    def __init__(self, message: str, keys: Sequence[tuple[str | int, ...]] = ()) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


class UnsupportedError(UserError, NotImplementedError):
    """A combination that makes sense but that nothing here serves; the message names what works instead."""


class RunError(RuntimeError):
    """A run that cannot continue though neither its config nor the code is wrong, such as a loss of NaN."""


def shown(value: object) -> str:
    """Return what was got as JSON, for an error message: its beginning where it is long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def called(key: str) -> str:
    """Return how an error message calls a key of a config: by its option within `calling_options`."""
    return _options.get(key, key)


@contextmanager
def calling_options(options: Mapping[str, str]) -> Iterator[None]:
    """Let error messages name options of a command line in the place of keys of a config, in all threads.

    Args:
        options: Key -> option, such as "text_column" -> "--text-column".
    """
    before = dict(_options)
    _options.update(options)
    try:
        yield
    finally:
        _options.clear()
        _options.update(before)


def check_range(config: object, low: float, high: float, *names: str) -> None:
    """Raise unless fields of a config lie in the range in which a run makes sense.

    Args:
        config: A dataclass.
        low: The smallest value.
        high: The largest value.
        names: The fields. None passes where a field may be None; NaN never does.

    Raises:
        UserError: Names the first field that is outside.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            may_be_none = type(None) in typing.get_args(typing.get_type_hints(type(config))[name])
            # an option is left out instead
            none = ', or "none"' if may_be_none and called(name) == name else ""
            raise UserError(f"{called(name)} must be at least {low} and at most {high}{none}; got {value}")


def check_unread(config: object, reader: str, remedy: str, *names: str) -> None:
    """Raise if a field that the others leave without effect has another value than its default.

    Args:
        config: A dataclass.
        reader: What does not read the fields, for the error message: "a cosine schedule".
        remedy: What to set instead, if they are to be read: 'kind to "wsd"'.
        names: The fields.

    Raises:
        UserError: Names the first such field.
    """
    for name in names:
        value, default = getattr(config, name), getattr(type(config), name)
        if value != default:
            shown = json.dumps("none" if default is None else default)
            raise UserError(
                f"{name} is {value!r}, which {reader} does not read; set it to {shown}, or {remedy}"
            )


def check_not_empty(config: object, *names: str) -> None:
    """Raise unless strings of a config have a character; None passes.

    Raises:
        UserError: Names the first field that is empty.
    """
    for name in names:
        if getattr(config, name) == "":
            raise UserError(f'{called(name)} is empty (""): give it a value, or leave it out')


def check_at_least_1(options: argparse.Namespace, name: str) -> None:
    """Raise unless an option of a command line, or each of its values, is at least 1, or was not given.

    Raises:
        UserError: It is 0 or negative.
    """
    found = getattr(options, name)
    for value in found if isinstance(found, list) else [found]:
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, must be at least 1")


def check_out(out: Path | None) -> None:
    """Raise unless --out can be a folder; None passes.

    Every command calls it before its work, which would be lost.

    Raises:
        UserError: It, or a part of its path, is a file, or a link that leads nowhere.
    """
    for path in () if out is None else (out, *out.parents):
        if (path.exists() or path.is_symlink()) and not path.is_dir():
            raise UserError(f"--out is {out}, but {path} is a file; want a folder")


def decode_text(data: bytes, name: str, first_line: int = 1) -> str:
    """Decode text from outside as UTF-8.

    Args:
        data: The bytes.
        name: Name of the file or the option in the error message.
        first_line: Number of the first line.

    Raises:
        UserError: It is not UTF-8; names the line and the byte.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        at = error.start
        line, byte = first_line + data.count(b"\n", 0, at), at - data.rfind(b"\n", 0, at)
        raise UserError(
            f"{name} is not UTF-8: byte {byte} of line {line} is 0x{data[at]:02x}; convert it, as "
            "iconv -t UTF-8 does"
        ) from None


def check_text(text: str, name: str) -> None:
    """Raise if a text has half of a surrogate pair, as JSON may escape one; UTF-8 has none.

    Raises:
        UserError: Names the text and the character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} has {text[error.start]!a} as character {error.start + 1}, half of a surrogate pair, "
            "which is no character: write both halves, or remove it"
        ) from None


@contextmanager
def converting_panics(problem: str) -> Iterator[None]:
    """Convert a panic of the `tokenizers` library to a UserError.

    A regular expression that backtracks too long on a text ends in one, after 10 million steps (0.1 s). It is
    no Exception, and no pickle carries it from one process to another.

    Args:
        problem: What failed, for the error message: "X cannot encode a text".

    Raises:
        UserError: The library panicked.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{problem} ({error}): a regular expression of the normalizer or the pre-tokenizer fails on it; "
            "simplify the expression, or leave such text out"
        ) from None


def is_user_error(error: BaseException) -> bool:
    """Return whether an error says what the user got wrong; any other is a fault and keeps its traceback.

    An error of the operating system that names a path does: the path is missing, not allowed or full. So does
    a package that is not installed.
    """
    if isinstance(error, UserError) or (isinstance(error, OSError) and _has_path(error)):
        return True
    if _missing_package(error) is not None:
        return True
    if not isinstance(error, ValueError | TypeError | NotImplementedError):
        return False
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_globals.get("__name__") in _ARGUMENT_CHECKS


def exit_code(error: Exception) -> int | None:
    """Return the exit code of a command that an error ends in one line; None for a fault of the code.

    Returns:
        2 for what the user got wrong, 1 for a RunError, 141 if the reader of the output has ended, as `head`
        does, of which nothing is to be said.
    """
    if isinstance(error, BrokenPipeError) and any(map(_has_no_reader, (sys.stdout, sys.stderr))):
        return CLOSED_OUTPUT_CODE
    if isinstance(error, RunError):
        return RUN_ERROR_CODE
    return USER_ERROR_CODE if is_user_error(error) else None


def describe_error(error: BaseException) -> str:
    """Return the line that a command ends with, for an error that has an exit code."""
    if isinstance(error, OSError) and _has_path(error):
        remedy = "make room for it" if error.errno in FULL_DISK else "correct the path, or its permissions"
        return f"cannot use {error.filename} ({error.strerror}): {remedy}{_place(error)}"
    package = _missing_package(error)
    if package is not None:
        remedy = "pip install -e '.[train,eval]' installs what this project's commands need"
        return f"the package {package} is not installed; {remedy}{_place(error)}"
    return str(error)


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command line to its exit code.

    Args:
        main: Parses the arguments and does the work; returns an exit code, or None for 0.

    Returns:
        main's exit code; that of `exit_code`, after one line on standard error; 130 for Ctrl-C.
    """
    try:
        code = main() or 0
        sys.stdout.flush()  # else the interpreter finds out at its end that nobody reads it
        return code
    except KeyboardInterrupt:
        return INTERRUPT_CODE
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        if code == CLOSED_OUTPUT_CODE:
            _drop_output()
        else:
            print(f"error: {describe_error(error)}", file=sys.stderr, flush=True)
        return code


def _place(error: BaseException) -> str:
    """Return the innermost line of this project that an error passed, since no traceback tells it."""
    lines = [(Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(error.__traceback__)]
    ours = [(file, line) for file, line in lines if file.is_relative_to(_ROOT) and ".venv" not in file.parts]
    return f" (used at {ours[-1][0].relative_to(_ROOT)}:{ours[-1][1]})" if ours else ""


def _missing_package(error: BaseException) -> str | None:
    """Return the package that an import did not find; None for another error or a module of this project."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    is_ours = name is not None and any((_ROOT / each).exists() for each in (name, f"{name}.py"))
    return None if name is None or "." in name or is_ours else name


def _has_path(error: OSError) -> bool:
    return error.errno is not None and isinstance(error.filename, str | bytes | os.PathLike)


def _has_no_reader(stream: TextIO) -> bool:
    try:
        descriptor = stream.fileno()
    except OSError:  # not a file of the system
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _drop_output() -> None:
    """Let the interpreter end without another attempt to write what nobody reads."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if _has_no_reader(stream):
            os.dup2(nowhere, stream.fileno())
