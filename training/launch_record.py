"""What is on record of a launch: time, host, code, versions, command line, config and its changes."""

import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from config import to_table
from models.run_folder import RunFolder
from training.config_differences import config_differences
from training.run_config import RunConfig

_CODE = Path(__file__).parents[1]
_PACKAGES = ("torch", "triton", "torchtitan")
_GIT_SECONDS = 30.0


def launch_facts(config: RunConfig, command: Sequence[str]) -> dict[str, Any]:
    """Return what the record of a launch has about its host, code and config, by name.

    Args:
        config: The run; its folder still has the config of the launch before.
        command: The command line.

    Returns:
        time (UTC, ISO 8601), host, git_commit and git_is_clean (no changes of tracked files, no untracked
        .py files; both None outside a git checkout), versions by package, command, and config_changes: what
        differs from the launch before, None for the first launch; and config, all of it as tables.
    """
    saved = RunFolder(Path(config.run.folder)).read_config()
    commit = _git("rev-parse", "HEAD")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "git_commit": commit,
        "git_is_clean": None if commit is None else _is_clean(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "command": list(command),
        "config_changes": None if saved is None else config_differences(config, saved),
        "config": to_table(config),
    }


def command_line() -> list[str]:
    """Return the command line of this process, without the interpreter."""
    return list(sys.orig_argv[1:])


def _is_clean() -> bool | None:
    changed = _git("status", "--porcelain", "--untracked-files=no")
    added = _git("ls-files", "--others", "--exclude-standard", "*.py")
    return None if changed is None or added is None else not changed and not added


def _git(*words: str) -> str | None:
    """Return what a git command prints about the code; None where git or the repository is missing."""
    try:
        done = subprocess.run(
            ["git", *words], cwd=_CODE, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
