"""The settings of MAD: six tasks, each with a baseline from which one size at a time is changed."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from errors import UserError

Task = Literal[
    "in-context-recall",
    "noisy-in-context-recall",
    "fuzzy-in-context-recall",
    "selective-copying",
    "compression",
    "memorization",
]
Level = Literal["baseline", "rows", "full", "hard"]

TASKS: tuple[Task, ...] = get_args(Task)
NUM_TEST_ROWS = 1280

_NUM_NOISE_TOKENS = 16
_FEWER_ROWS = (6400, 3200, 1600, 800)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The sizes of one task.

    Attributes:
        task: The task.
        vocab_size: Vocabulary V, all special and noise tokens included.
        seq_len: Length L by which a row is drawn; rows of in-context recall have L - 1 tokens, others L.
        num_train_rows: Rows of the training set; the test set has NUM_TEST_ROWS.
        frac_noise: Noisy recall: fraction of pairs that are noise.
        num_copied: Selective copying: tokens to copy.
    """

    task: Task
    vocab_size: int
    seq_len: int
    num_train_rows: int = 12800
    frac_noise: float = 0.0
    num_copied: int = 16

    @property
    def num_noise_tokens(self) -> int:
        """Tokens of the vocabulary that are noise alone."""
        return _NUM_NOISE_TOKENS if self.task == "noisy-in-context-recall" else 0

    @property
    def num_tokens(self) -> int:
        """Tokens of a row as the model sees it."""
        is_shifted = self.task in ("in-context-recall", "noisy-in-context-recall")
        return self.seq_len - 1 if is_shifted else self.seq_len

    @property
    def name(self) -> str:
        """What sets it apart from the other settings of its task, as "V16 L128 N12800"."""
        name = f"V{self.vocab_size} L{self.seq_len} N{self.num_train_rows}"
        if self.task == "noisy-in-context-recall":
            name += f" noise {self.frac_noise:g}"
        return f"{name} copy {self.num_copied}" if self.task == "selective-copying" else name


_BASELINES = (
    Setting(task="in-context-recall", vocab_size=16, seq_len=128),
    Setting(task="noisy-in-context-recall", vocab_size=32, seq_len=128, frac_noise=0.2),
    Setting(task="fuzzy-in-context-recall", vocab_size=16, seq_len=128),
    Setting(task="selective-copying", vocab_size=16, seq_len=256),
    Setting(task="compression", vocab_size=16, seq_len=32),
    Setting(task="memorization", vocab_size=256, seq_len=32, num_train_rows=256),
)
_CHANGES: dict[Task, dict[str, tuple[Any, ...]]] = {
    "in-context-recall": {
        "vocab_size": (32, 64, 128),
        "seq_len": (256, 512, 1024),
        "num_train_rows": _FEWER_ROWS,
    },
    "noisy-in-context-recall": {
        "vocab_size": (48, 80, 144),
        "seq_len": (256, 512, 1024),
        "num_train_rows": _FEWER_ROWS,
        "frac_noise": (0.4, 0.6, 0.8),
    },
    "fuzzy-in-context-recall": {
        "vocab_size": (32, 64, 128),
        "seq_len": (256, 512, 1024),
        "num_train_rows": _FEWER_ROWS,
    },
    "selective-copying": {
        "vocab_size": (32, 64, 128),
        "seq_len": (512, 1024),
        "num_train_rows": _FEWER_ROWS,
        "num_copied": (32, 64, 96),
    },
    "compression": {
        "vocab_size": (32, 64, 128),
        "seq_len": (64, 128, 256),
        "num_train_rows": _FEWER_ROWS,
    },
    "memorization": {"vocab_size": (512, 1024, 2048, 4096, 8192)},
}
# our choice: beyond MAD, which ends at a vocabulary of 128 and 1024 tokens
_HARD_CHANGES: dict[Task, dict[str, tuple[Any, ...]]] = {
    "in-context-recall": {"vocab_size": (256, 512), "seq_len": (2048,)},
    "noisy-in-context-recall": {"vocab_size": (272, 528), "seq_len": (2048,)},
    "fuzzy-in-context-recall": {"vocab_size": (256, 512), "seq_len": (2048,)},
    "selective-copying": {"vocab_size": (256, 512), "seq_len": (2048,)},
    "compression": {"vocab_size": (256, 512), "seq_len": (512, 1024, 2048)},
}


def _changes(task: Task, level: Level) -> dict[str, tuple[Any, ...]]:
    """Return the values of each size that a level changes in a task."""
    match level:
        case "baseline":
            return {}
        case "rows":
            return {name: values for name, values in _CHANGES[task].items() if name == "num_train_rows"}
        case "full":
            return _CHANGES[task]
        case "hard":
            return _HARD_CHANGES.get(task, {})


def tasks_of(level: Level) -> list[Task]:
    """Return the tasks that have settings of a level: all, but at "rows" and "hard" not memorization."""
    return [task for task in TASKS if level == "baseline" or _changes(task, level)]


def settings(task: Task, level: Level) -> list[Setting]:
    """Return the settings of a task.

    Args:
        task: The task.
        level: "baseline" for the first alone, "rows" for it and those with fewer training rows, "full" for
            MAD's (66 over all tasks), "hard" for larger vocabularies and longer rows than MAD's.

    Raises:
        UserError: The task has no settings of the level.
    """
    if task not in tasks_of(level):
        tasks = ",".join(tasks_of(level))
        raise UserError(f"--tasks {task} has no settings at --level {level}; want --tasks {tasks}")
    baseline = next(setting for setting in _BASELINES if setting.task == task)
    changes = _changes(task, level)
    changed = [replace(baseline, **{name: value}) for name, values in changes.items() for value in values]
    return changed if level == "hard" else [baseline, *changed]


def settings_of(tasks: Iterable[Task], level: Level) -> list[Setting]:
    """Return the settings of several tasks, as settings does of one."""
    return [setting for task in tasks for setting in settings(task, level)]
