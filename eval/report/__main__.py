"""Compare runs in a Markdown report with plots: losses, differences, the paper's table, throughput and cost.

    python -m eval.report runs [--baseline a] [--out report] [--allow-different]
    python -m eval.report runs/a runs/b
    python -m eval.report runs/PLAN               # a plan of training.sweep, with its own baseline
    python -m eval.report runs/PLAN --figures seeds --out docs/claims

Runs that differ only in run.seed, data.shuffle_seed and names are seeds of one row. The report is made from
what the runs recorded; no model is built or evaluated. Tables are also written
as CSV, plots as PNG and PDF.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from errors import UserError, check_out, run_command
from eval.report.plan_file import is_plan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of them")
    parser.add_argument("--baseline", help="row to subtract from the others: its name, or one of its runs")
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="folder to write to (default %(default)s)"
    )
    parser.add_argument(
        "--figures",
        nargs="+",
        metavar="STAGE",
        help="of a plan: one page with the figures of these stages, instead of a report of each stage",
    )
    parser.add_argument(
        "--allow-different",
        action="store_true",
        help="compare runs of different data, tokenizer or token budget",
    )
    return parser


def _files(out: Path) -> dict[Path, int]:
    """Return the tables and plots in a folder, with the times of their last changes in nanoseconds."""
    return {p: p.stat().st_mtime_ns for p in sorted(out.glob("*")) if p.suffix in (".csv", ".pdf", ".png")}


def _older_files(out: Path, before: dict[Path, int]) -> list[Path]:
    """Return the tables and plots that a report has left as they were before it."""
    return [path for path, changed in _files(out).items() if before.get(path) == changed]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m eval.report`.

    Args:
        arguments: Words of the command line; None for this process's.

    Raises:
        UserError: A folder is missing, there is nothing to report, or the runs are not comparable.
    """
    options = _parser().parse_args(arguments)
    check_out(options.out)
    before = _files(options.out)
    try:
        # matplotlib is an extra: --help does not need it
        from eval.report.plan_report import write_plan_report
        from eval.report.writer import write_report
    except ModuleNotFoundError as error:
        raise UserError(f"the report includes plots ({error}): pip install -e '.[eval]'") from error
    if any(map(is_plan, options.runs)):
        if len(options.runs) > 1 or options.baseline is not None:
            raise UserError(
                f"{' '.join(map(str, options.runs))}: give the folder of a plan alone, without --baseline "
                "(a key of the plan); or give folders in it"
            )
        path = write_plan_report(
            options.runs[0],
            out=options.out,
            figures=options.figures,
            allow_different=options.allow_different,
        )
    elif options.figures is not None:
        raise UserError("--figures names stages: give the folder of a plan")
    else:
        path = write_report(
            options.runs,
            baseline=options.baseline,
            out=options.out,
            allow_different=options.allow_different,
        )
    print(path.read_text(encoding="utf-8"))
    print(f"wrote {path}")
    older = _older_files(options.out, before)
    if older:
        print(f"{options.out} also has tables or plots of another report, such as {older[0]}")


if __name__ == "__main__":
    sys.exit(run_command(main))
