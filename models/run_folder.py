"""The layout of a run folder, known here and nowhere else.

runs/NAME/
config.toml         the resolved config; config.1.toml, config.2.toml, ... are those of earlier launches
tokenizer/          the run's own tokenizer (models/run_tokenizer.py)
metrics.jsonl       every step
log.txt             what a sweep's launches of the run printed
diagnostics.jsonl   diagnostics of the attention (eval/diagnostics/record.py)
held_out/           samples of held-out text (data/sources/held_out.py)
checkpoint/step-N/  the state after optimizer step N; complete once it has .metadata
run.lock            held by the main rank of the launch that uses the folder (data/folder_lock.py)
ranks.lock          shared by its other ranks (training/run_lock.py)
tensorboard/, profile/, wandb_id
"""

import difflib
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Table, read_toml, to_toml
from disk import write_text
from errors import UserError

_METADATA = ".metadata"
# of a config.toml that a run writes, and of one that models.convert writes
_TRAINING_TABLES = ("run", "model", "optimizer", "schedule", "training", "data", "checkpoint")
_WEIGHTS_TABLES = ("model",)
_STEP = re.compile(r"step-(0|[1-9]\d*)", re.ASCII)
_LIKE_A_STEP = re.compile(r"step-\d+")


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    Attributes:
        path: runs/NAME; may not exist yet.
    """

    path: Path

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> "RunFolder":
        """Return the folder of the run that wrote checkpoint/step-N."""
        return cls(checkpoint.parent.parent)

    @property
    def config_file(self) -> Path:
        """The resolved config."""
        return self.path / "config.toml"

    @property
    def metrics_file(self) -> Path:
        """The metrics of every step."""
        return self.path / "metrics.jsonl"

    @property
    def log_file(self) -> Path:
        """What the launches of a sweep printed."""
        return self.path / "log.txt"

    @property
    def diagnostics_file(self) -> Path:
        """The diagnostics of the attention."""
        return self.path / "diagnostics.jsonl"

    @property
    def tokenizer(self) -> Path:
        """The folder of the run's own tokenizer."""
        return self.path / "tokenizer"

    @property
    def held_out(self) -> Path:
        """The folder of samples of held-out text."""
        return self.path / "held_out"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard files."""
        return self.path / "tensorboard"

    @property
    def profile(self) -> Path:
        """The folder of traces."""
        return self.path / "profile"

    @property
    def wandb_id_file(self) -> Path:
        """The id of the run at Weights & Biases."""
        return self.path / "wandb_id"

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints."""
        return self.path / "checkpoint"

    @property
    def lock_file(self) -> Path:
        """The lock of the launch that uses the folder."""
        return self.path / "run.lock"

    @property
    def ranks_lock_file(self) -> Path:
        """The lock that all ranks but the main one share."""
        return self.path / "ranks.lock"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint after a step."""
        return self.checkpoints / f"step-{step}"

    def step_folders(self) -> dict[int, Path]:
        """Return the folders step-N by step; other names, such as step-5.before, are ignored."""
        found = ((step_of(path), path) for path in self.checkpoints.glob("step-*"))
        return {step: path for step, path in found if step is not None and path.is_dir()}

    def odd_names(self) -> list[str]:
        """Describe what is named like a checkpoint and cannot be one; it is neither read nor deleted."""
        paths = [
            path for path in sorted(self.checkpoints.glob("step-*")) if _LIKE_A_STEP.fullmatch(path.name)
        ]
        return [f"{path} {_oddity(path)}" for path in paths if not path.is_dir() or step_of(path) is None]

    def set_aside(self, path: Path, why: str) -> Path:
        """Rename what is in the way of a checkpoint or damaged; return the first free name step-N.<why>.

        Args:
            path: A file, link or folder in `checkpoints`.
            why: The ending of the new name.
        """
        endings = itertools.chain([""], map(str, itertools.count(2)))
        names = (path.with_name(f"{path.name}.{why}{ending}") for ending in endings)
        free = next(name for name in names if not os.path.lexists(name))
        path.rename(free)
        return free

    def whole_checkpoints(self) -> dict[int, Path]:
        """Return the complete checkpoints by step."""
        return {step: path for step, path in self.step_folders().items() if is_whole(path)}

    def newest_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint; None without one."""
        whole = self.whole_checkpoints()
        return whole[max(whole)] if whole else None

    def read_config(self) -> Table | None:
        """Read the resolved config as tables, in which "none" stands for None; None if the file is missing.

        Raises:
            UserError: The file is damaged: empty, cut short, or no TOML.
        """
        if not self.config_file.exists():
            return None
        remedy = "restore it, or delete it to resume without comparing configs (evaluation needs it)"
        try:
            table = read_toml(self.config_file)
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from error
        # a file that was cut between two tables has lost its optimizer too
        is_trained = "optimizer" in table or self.metrics_file.exists()
        wanted = _TRAINING_TABLES if is_trained else _WEIGHTS_TABLES
        missing = [f"[{name}]" for name in wanted if not isinstance(table.get(name), dict)]
        if missing:
            raise UserError(f"{self.config_file} is damaged, it has no {' and no '.join(missing)}; {remedy}")
        return table

    def keep_config(self, config: Any) -> None:
        """Keep the config of the launch before as config.N.toml, N = 1, 2, ..., unless it is the same.

        Args:
            config: The resolved config that is to replace it.
        """
        if not self.config_file.exists():
            return
        text = self.config_file.read_text(encoding="utf-8")
        last = None  # a launch may have been killed after it kept the config
        for number in itertools.count(1):
            kept = self.path / f"config.{number}.toml"
            if not kept.exists():
                break
            last = kept.read_text(encoding="utf-8")
        if text not in (last, to_toml(config)):
            write_text(kept, text)

    def write_config(self, config: Any) -> None:
        """Write the resolved config, a dataclass or a dict of them by table, atomically."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config_file, to_toml(config))


def step_of(checkpoint: Path) -> int | None:
    """Return N of a folder step-N; None for any other name."""
    name = _STEP.fullmatch(checkpoint.name)
    return None if name is None else int(name.group(1))


def _oddity(path: Path) -> str:
    if step_of(path) is None:
        return "is not named as checkpoints are, without leading zeros"
    return "is a link to nowhere" if path.is_symlink() else "is no folder"


def metadata_file(checkpoint: Path) -> Path:
    """Return the file that describes a checkpoint's tensors, written last."""
    return checkpoint / _METADATA


def is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to the end: its metadata comes last."""
    return metadata_file(checkpoint).is_file()


def find_checkpoint(path: Path) -> Path:
    """Find the checkpoint that a path stands for.

    Args:
        path: A checkpoint (`<run folder>/checkpoint/step-N`), or a run folder for its newest complete one.

    Raises:
        UserError: The path has no complete checkpoint.
    """
    if is_whole(path):
        return path
    newest = RunFolder(path).newest_checkpoint()
    if newest is None:
        near = ", ".join(map(str, nearby_checkpoints(path)))
        if (path / "config.json").is_file():
            near = f"{path} in Hugging Face's format, for `python -m models.convert from-hf`"
        raise UserError(
            f"{path} is no checkpoint: wanted a run folder with checkpoint/step-N/{_METADATA}, or such a "
            f"step-N{f'; nearby: {near}' if near else ''}"
        )
    return newest


def nearby_checkpoints(path: Path) -> list[Path]:
    """Return complete checkpoints by step, to suggest for a mistyped path.

    Args:
        path: A run folder, its folder of checkpoints, or a checkpoint.

    Returns:
        Those in, below and beside the path; without any, the newest of the runs beside it of similar names.
    """
    folders = (path, RunFolder(path).checkpoints, path.parent)
    by_step = (sorted(folder.glob("step-*"), key=lambda each: step_of(each) or 0) for folder in folders)
    near = [each for found in by_step for each in found if is_whole(each)]
    beside = {folder.name: folder for folder in path.parent.glob("*/")}
    alike = difflib.get_close_matches(path.name, beside)
    newest = (RunFolder(beside[name]).newest_checkpoint() for name in alike)
    return near or [each for each in newest if each is not None]


def read_run_table(checkpoint: Path) -> Table:
    """Read the resolved config of the run that wrote a checkpoint, as tables.

    Args:
        checkpoint: From find_checkpoint.

    Raises:
        UserError: The run folder has no config.toml, or a damaged one.
    """
    run = RunFolder.of_checkpoint(checkpoint)
    table = run.read_config()
    if table is None:
        raise UserError(
            f"{run.config_file} is missing: it describes the model in {checkpoint}; copy the whole run folder"
        )
    return table
