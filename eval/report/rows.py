"""Rows and arms: runs that differ only in seeds are a row, rows that differ only in learning rates an arm."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from errors import UserError
from eval.report.choices import SEED_KEYS, Config, choices, differing_choices, is_rate
from eval.report.names import name_configs
from eval.report.paper_numbers import PaperRow, paper_row
from eval.report.run_records import RunRecord
from eval.report.run_values import held_out_loss, training_loss
from eval.report.seed_statistics import Estimate, estimate

HIDDEN_RATE = "optimizer.groups.hidden.lr"


def seed_of(run: RunRecord) -> Hashable:
    """Return the seeds of a run, of its weights and of its order of data."""
    return tuple(run.config.get(name) for name in SEED_KEYS)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Runs that differ only in their seeds.

    Attributes:
        name: What the runs share and other rows do not.
        runs: The runs, at least one, all with training steps.
    """

    name: str
    runs: list[RunRecord]

    @property
    def config(self) -> Config:
        """The resolved config of the first run."""
        return self.runs[0].config

    @property
    def paper(self) -> PaperRow | None:
        """The paper's row of the same model and optimizer; None without one."""
        return paper_row(self.config)

    def by_seed(self, value: Callable[[RunRecord], float | None]) -> dict[Hashable, float]:
        """Return seed -> value of the runs that have one."""
        found = ((seed_of(run), value(run)) for run in self.runs)
        return {seed: x for seed, x in found if x is not None}

    def over_seeds(self, value: Callable[[RunRecord], float | None]) -> Estimate | None:
        """Estimate the mean of a value over the runs that have one; None where none has."""
        return estimate([*self.by_seed(value).values()])


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Rows that differ only in learning rates.

    Attributes:
        name: What the rows share and other arms do not.
        rows: The rows, at least one.
    """

    name: str
    rows: list[Row]

    @property
    def best(self) -> Row:
        """The row of the lowest loss; the first row where none has a loss."""
        loss = loss_of(self.rows)
        return min(self.rows, key=lambda row: _loss_order(row, loss))


def _group(runs: Sequence[RunRecord], key: Callable[[RunRecord], Hashable]) -> list[list[RunRecord]]:
    groups: dict[Hashable, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())


def tokenizer_of(run: RunRecord) -> str | None:
    """Return the fingerprint of a run's tokenizer, or its path where none was recorded."""
    return run.steps[-1].get("tokenizer_fingerprint") or run.config.get("data.tokenizer")


def _chosen(run: RunRecord, *, with_rates: bool) -> str:
    kept = {key: value for key, value in choices(run.config).items() if with_rates or not is_rate(key)}
    return repr((sorted(kept.items()), run.budget, tokenizer_of(run)))


def make_rows(runs: Sequence[RunRecord]) -> list[Row]:
    """Group runs that made the same choices.

    Args:
        runs: Runs with training steps, in the order of the report.

    Returns:
        Rows in the order of their first runs. A second run of the same seeds is a row of its own, as it is no
        independent sample.
    """
    seen: Counter[Hashable] = Counter()

    def key(run: RunRecord) -> Hashable:
        chosen = _chosen(run, with_rates=True)
        seen[chosen, seed_of(run)] += 1
        return chosen, seen[chosen, seed_of(run)]

    groups = _group(runs, key)
    names = name_configs([group[0].config for group in groups], [group[0].folder for group in groups])
    return [Row(name=name, runs=group) for name, group in zip(names, groups, strict=True)]


def make_arms(rows: Sequence[Row]) -> list[Arm]:
    """Group rows that differ only in learning rates.

    Args:
        rows: Rows in the order of the report, which arms keep.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_chosen(row.runs[0], with_rates=False), []).append(row)
    firsts = [group[0].runs[0] for group in groups.values()]
    names = name_configs([run.config for run in firsts], [run.folder for run in firsts], with_rates=False)
    return [Arm(name=name, rows=group) for name, group in zip(names, groups.values(), strict=True)]


def rate_key(arms: Sequence[Arm]) -> str | None:
    """Return the learning rate in which the rows of an arm differ, the hidden matrices' if it is one of them.

    Args:
        arms: The arms.

    Returns:
        The key; None if no arm has several learning rates.
    """
    keys = {
        key for arm in arms for key in differing_choices([row.config for row in arm.rows]) if is_rate(key)
    }
    return HIDDEN_RATE if HIDDEN_RATE in keys else min(keys, default=None)


def loss_of(rows: Sequence[Row]) -> Callable[[RunRecord], float | None]:
    """Return the loss that rows are compared by: held-out if any run has one, else of training."""
    has_held_out = any(held_out_loss(run) is not None for row in rows for run in row.runs)
    return held_out_loss if has_held_out else training_loss


def _loss_order(row: Row, loss: Callable[[RunRecord], float | None]) -> tuple[bool, float]:
    found = row.over_seeds(loss)
    has_loss = found is not None and not math.isnan(found.mean)
    return not has_loss, found.mean if found is not None and has_loss else 0.0


def sort_rows(rows: Sequence[Row], baseline: Row | None) -> list[Row]:
    """Sort rows: the baseline first, then by loss, then those without a loss."""
    loss = loss_of(rows)
    return sorted(rows, key=lambda row: (row is not baseline, *_loss_order(row, loss)))


def find_row(rows: Sequence[Row], name: str) -> Row:
    """Find the row with a name, or that of the run with a name or folder.

    Raises:
        UserError: There is none, or more than one.
    """
    found = [
        row
        for row in rows
        if name in (row.name, *(n for r in row.runs for n in (r.folder.name, r.config.get("run.name"))))
        or any(name.rstrip("/") == str(run.folder) for run in row.runs)
    ]
    if len(found) != 1:
        known = "; ".join(f"{row.name} ({', '.join(run.folder.name for run in row.runs)})" for row in rows)
        problem = "is not a row" if not found else "names several rows"
        raise UserError(f"--baseline {name!r} {problem}; rows, and their runs: {known}")
    return found[0]
