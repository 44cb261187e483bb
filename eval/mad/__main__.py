"""Train attentions on the synthetic tasks of MAD and score them.

    python -m eval.mad --attention softmax,parallax [--tasks all] [--level baseline] --out DIR

Trains six models (three learning rates by two weight decays) for every setting of every task, of which the
best counts, and writes a line for each to DIR/mad.jsonl. Run again after a kill, it trains what is missing.
The table of all scores is printed and written to DIR/mad.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

import torch

from disk import write_text
from errors import UserError, run_command
from eval.mad.model import attention_kinds
from eval.mad.results import open_results, read_results, task_grids
from eval.mad.settings import TASKS, Level, Task, tasks_of
from eval.mad.table import score_table
from eval.mad.train import MAX_EPOCHS, RATES, Outcome, Recipe, Run, Schedule, train
from eval.open_model import check_at_least_1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.mad",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--attention", required=True, metavar="KINDS", help=f"some of {','.join(attention_kinds())}"
    )
    parser.add_argument("--tasks", default="all", help=f"all, or some of {','.join(TASKS)} (default: all)")
    parser.add_argument("--level", choices=get_args(Level), default="baseline", help="default: baseline")
    parser.add_argument("--optimizer", choices=[*RATES], default="adamw", help="default: adamw")
    parser.add_argument(
        "--schedule", choices=get_args(Schedule), default="constant", help="default: constant"
    )
    parser.add_argument("--seed", type=int, default=12345, help="of data, weights and order (default: 12345)")
    parser.add_argument("--max-epochs", type=int, default=MAX_EPOCHS, help=f"default: {MAX_EPOCHS}")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is a GPU")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for mad.jsonl and mad.md")
    parser.add_argument(
        "--with", dest="others", type=Path, nargs="+", default=[], metavar="DIR",
        help="--out of earlier commands whose results join the table",
    )  # fmt: skip
    return parser


def _some_of(option: str, words: str, known: Sequence[str]) -> list[str]:
    """Split a list with commas; raise unless all its words are known."""
    chosen = words.split(",")
    unknown = [word for word in chosen if word not in known]
    if unknown:
        raise UserError(f"{option} has {unknown[0]!r}, want some of {','.join(known)}")
    return list(dict.fromkeys(chosen))


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch sees no GPU; want cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _runs(options: argparse.Namespace, kinds: Sequence[str], tasks: Sequence[Task]) -> list[Run]:
    """Return the runs that the command asks for, task by task."""
    recipes = [
        Recipe(
            attention=kind,
            optimizer=options.optimizer,
            schedule=options.schedule,
            seed=options.seed,
            max_epochs=options.max_epochs,
        )
        for kind in kinds
    ]
    return [
        run
        for task in tasks
        for recipe in recipes
        for runs in task_grids(recipe, task, options.level)
        for run in runs
    ]


def _describe(run: Run, outcome: Outcome) -> str:
    chosen = f"{run.recipe.attention} {run.setting.task} {run.setting.name} {run.recipe.optimizer}"
    rates = f"lr {run.lr:g} weight decay {run.weight_decay:g}"
    return f"{chosen} {rates}: {outcome.accuracy:.3f}, {outcome.num_epochs} epochs, {outcome.seconds:.0f} s"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m eval.mad --attention KINDS --out DIR`.

    Args:
        arguments: Words of the command line; None for this process's.

    Raises:
        UserError: An option or a file of results cannot be used.
    """
    options = _parser().parse_args(arguments)
    check_at_least_1(options, "max_epochs")
    kinds = _some_of("--attention", options.attention, [*attention_kinds()])
    chosen = ",".join(tasks_of(options.level)) if options.tasks == "all" else options.tasks
    tasks = cast(list[Task], _some_of("--tasks", chosen, TASKS))
    device = _device(options.device)
    others = [read_results(folder) for folder in options.others]
    runs = _runs(options, kinds, tasks)
    with open_results(options.out, device) as file:
        for number, run in enumerate(runs, start=1):
            if run not in file.outcomes:
                outcome = train(run, device)
                file.add(run, outcome)
                print(f"{number} of {len(runs)}: {_describe(run, outcome)}", flush=True)
        results: dict[Run, Outcome] = {}
        for each in (*others, file.outcomes):
            results |= each
        text = "\n".join(score_table(results, tasks, options.level).markdown())
        print(text)
        write_text(options.out / "mad.md", text + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
