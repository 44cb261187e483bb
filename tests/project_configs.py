"""The configs and plans of the project, which its rules are for: not a user's own beside them."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def project_configs(pattern: str = "*.toml", folder: str = "configs", root: Path = ROOT) -> list[Path]:
    """Return the files of a folder that git knows, sorted; all of them where the project is no repository.

    Args:
        pattern: Glob of their names.
        folder: The folder, relative to the root.
        root: The project's folder.
    """
    found = sorted((root / folder).glob(pattern))
    if not (root / ".git").exists():
        return found
    listing = ["git", "ls-files", "-z", "--", folder]
    listed = subprocess.run(listing, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    return [path for path in found if path.relative_to(root).as_posix() in listed]
