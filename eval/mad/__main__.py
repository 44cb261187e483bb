"""Train attentions on the synthetic tasks of MAD and score them.

    python -m eval.mad --attention softmax,parallax [--tasks all] [--level baseline] --out DIR

Trains six models (three learning rates by two weight decays) for every setting of every task, of which the
best counts: the six at once, on every GPU in a process of its own. Writes a line for each to DIR/mad.jsonl;
run again after a kill, it trains what is missing. The tables of scores and of solved runs are printed and
written to DIR/mad.md, with plots beside it.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast, get_args

import torch

from disk import write_text
from errors import MAX_SEED, UserError, check_at_least_1, check_out, run_command
from eval.gpus import visible_gpus
from eval.mad.model import attention_kinds, canonical_changes
from eval.mad.packs import pack
from eval.mad.plots import plot_difficulty, plot_scores
from eval.mad.results import open_results, read_results
from eval.mad.runs import MAX_EPOCHS, RATES, Outcome, Recipe, Run, Schedule
from eval.mad.scores import has_score, task_grids
from eval.mad.settings import TASKS, Level, Task, settings_of, tasks_of
from eval.mad.table import score_lines, solution_table
from eval.mad.train import train
from eval.mad.workers import train_all
from models.device import check_device


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.mad",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--attention",
        metavar="KINDS",
        help=f"some of {','.join(attention_kinds())}; without it nothing is trained",
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="settings of every attention of the command: keys of [model.attention] in a config, head_dim of "
        "attentions over all keys, or rope=false; such runs have columns of their own",
    )  # fmt: skip
    parser.add_argument("--tasks", default="all", help=f"all, or some of {','.join(TASKS)} (default: all)")
    parser.add_argument("--level", choices=get_args(Level), default="baseline", help="default: baseline")
    parser.add_argument(
        "--sizes", metavar="SIZES",
        help="train only those settings of the level that have one of these sizes, such as N3200,V64 (all)",
    )  # fmt: skip
    parser.add_argument("--optimizer", choices=[*RATES], default="adamw", help="default: adamw")
    parser.add_argument(
        "--schedule", choices=get_args(Schedule), default="constant", help="default: constant"
    )
    parser.add_argument(
        "--seeds", default="12345", help="some, of data, weights and order: 12345,1 (default: 12345)"
    )
    parser.add_argument("--max-epochs", type=int, default=MAX_EPOCHS, help=f"default: {MAX_EPOCHS}")
    parser.add_argument(
        "--end-when-solved",
        action="store_true",
        help="end the six runs of a setting when one of them is solved, but those on another GPU: takes less "
        "time, moves no score by more than 0.001",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda, all GPUs, where there is one"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the blocks: steps take less time, a grid's start more",
    )
    parser.add_argument(
        "--grids-per-gpu",
        type=int,
        default=1,
        metavar="N",
        help="train the grids of N shapes on a GPU at a time, each in a process of its own (1); under CUDA's "
        "MPS they compute at the same time, without it they take turns",
    )
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


def _sizes(words: str, tasks: Sequence[Task], level: Level) -> set[str]:
    """Return sizes that settings of a level have in their names."""
    names = [setting.name.split() for setting in settings_of(tasks, level)]
    known = {word for name in names for word in name if word[0] in "VLN"}
    return {*_some_of("--sizes", words, sorted(known, key=lambda word: (word[0], int(word[1:]))))}


def _seeds(words: str) -> list[int]:
    """Split a list of seeds."""
    try:
        seeds = list(dict.fromkeys(int(word) for word in words.split(",")))
    except ValueError:
        raise UserError(f"--seeds is {words!r}, want integers with commas, such as 12345,1") from None
    outside = [seed for seed in seeds if not 0 <= seed <= MAX_SEED]
    if outside:
        raise UserError(f"--seeds has {outside[0]}, want integers from 0 to {MAX_SEED}")
    return seeds


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(name)
    return torch.device(name)


def _grids(options: argparse.Namespace, kinds: Sequence[str], tasks: Sequence[Task]) -> list[list[Run]]:
    """Return the grids that the command asks for, task by task."""
    recipes = [
        Recipe(
            attention=kind,
            changes=canonical_changes(kind, options.set),
            optimizer=options.optimizer,
            schedule=options.schedule,
            seed=seed,
            max_epochs=options.max_epochs,
            ends_when_solved=options.end_when_solved,
        )
        for kind in kinds
        for seed in _seeds(options.seeds)
    ]
    sizes = None if options.sizes is None else _sizes(options.sizes, tasks, options.level)
    return [
        runs
        for task in tasks
        for recipe in recipes
        for runs in task_grids(recipe, task, options.level)
        if sizes is None or not sizes.isdisjoint(runs[0].setting.name.split())
    ]


def _describe(run: Run, outcome: Outcome) -> str:
    rates = f"seed {run.recipe.seed} lr {run.lr:g} weight decay {run.weight_decay:g}"
    result = f"accuracy {outcome.accuracy:.3f}, {outcome.num_epochs} epochs, {outcome.seconds:.0f} s"
    return f"{run.grid_name} {rates}: {result}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m eval.mad --attention KINDS --out DIR`.

    Args:
        arguments: Words of the command line; None for this process's.

    Raises:
        UserError: An option or a file of results cannot be used.
        RunError: Runs have failed; the others are trained.
    """
    options = _parser().parse_args(arguments)
    check_out(options.out)
    check_at_least_1(options, "max_epochs")
    check_at_least_1(options, "grids_per_gpu")
    if options.attention is None and (options.set or options.sizes):
        raise UserError(
            "--set and --sizes have no effect without --attention, which names what is trained: add it"
        )
    kinds = _some_of("--attention", options.attention, [*attention_kinds()]) if options.attention else []
    chosen = ",".join(tasks_of(options.level)) if options.tasks == "all" else options.tasks
    tasks = cast(list[Task], _some_of("--tasks", chosen, TASKS))
    device = _device(options.device)
    if options.grids_per_gpu > 1 and device.type != "cuda":
        raise UserError("--grids-per-gpu has no effect on a CPU: leave it out")
    others = [read_results(folder) for folder in options.others]
    asked = [run for runs in _grids(options, kinds, tasks) for run in runs]
    with open_results(options.out, device) as file:

        def find_missing(runs: Iterable[Run]) -> list[Run]:
            """Return the runs that have no outcome and need one."""
            return [run for run in runs if run not in file.outcomes and not has_score(file.outcomes, run)]

        missing = find_missing(asked)
        num_done = len(asked) - len(missing)
        # asked when a pack is begun: a solved run of an earlier one may have ended its grid
        packs = (left for runs in pack(missing) if (left := find_missing(runs)))

        def report(run: Run, outcome: Outcome) -> None:
            nonlocal num_done
            num_done += 1
            file.add(run, outcome)
            print(f"{num_done} of {len(asked)}: {_describe(run, outcome)}", flush=True)

        try:
            if device.type == "cuda":
                gpus = visible_gpus() * options.grids_per_gpu
                train_all(packs, gpus, report, is_compiled=options.compile)
            else:
                for runs in packs:
                    train(runs, device, report, is_compiled=options.compile)
        finally:
            results: dict[Run, Outcome] = {}
            for each in (*others, file.outcomes):
                results |= each
            _write(results, tasks, options.level, options.out)


def _write(results: Mapping[Run, Outcome], tasks: Sequence[Task], level: Level, folder: Path) -> None:
    """Print the tables and write them and the plots to a folder."""
    scores, solutions = score_lines(results, tasks, level), solution_table(results, tasks, level).markdown()
    text = "\n".join([*scores, "", "Epoch of the first solved run, and solved runs:", "", *solutions])
    print(text)
    write_text(folder / "mad.md", text + "\n")
    if not plot_scores(results, tasks, level, folder / "mad.png"):
        _remove_plot(folder / "mad.png")
    if not plot_difficulty(results, tasks, folder / "mad_difficulty.png"):
        _remove_plot(folder / "mad_difficulty.png")


def _remove_plot(path: Path) -> None:
    """Remove the plot of an earlier command, which is not of the tables beside it."""
    for each in (path, path.with_suffix(".pdf")):
        each.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
