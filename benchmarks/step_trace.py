"""Where the time of a training step goes: kernels by class, idle time, exposed communication.

`python -m benchmarks.step_trace RUN` summarizes the last step of the last trace that a run with
metrics.profile_every wrote, such as `--metrics.profile_every 12 --training.stop_at_step 20`: step 12, which
the host launches as in training, while the GPU computes step 11. The profiler adds to the host's work, so
idle time is an upper bound. Matrix products have roles by the sizes of their operands, which kernels of a
CUDA graph do not show.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import make_parser
from benchmarks.kernel_classes import COMMUNICATION, OTHER, ModelSizes, class_of
from benchmarks.trace_kernels import Kernel, last_step
from config import from_table
from errors import UserError, run_command
from models.config import ModelConfig
from models.run_folder import RunFolder

Interval = tuple[float, float]

_NUM_LARGEST = 25


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """A traced step of one rank, in ms. The classes and the two kinds of idle time add up to the step.

    Attributes:
        step: From the end of the last kernel of the step before to that of its own (trace_kernels.last_step).
        span: From the start of its first kernel to the end of the last.
        idle: Time within the span without any kernel.
        idle_between: Time of the step outside the span: before its first kernel, or of a step that was traced
            alone after its last one.
        communication: Time with a collective running; it includes waiting for the slowest rank.
        exposed_communication: Time with a collective running and nothing else.
        by_class: Time by class, the longest first. Time with several kernels counts once, for the first to
            start; communication counts where it is exposed.
        largest: Sum of durations by the kernels' names, the largest first.
        largest_other: The same of kernels whose class is not known.
    """

    step: float
    span: float
    idle: float
    idle_between: float
    communication: float
    exposed_communication: float
    by_class: dict[str, float]
    largest: dict[str, float]
    largest_other: dict[str, float]

    @property
    def named_percent(self) -> float:
        """Percentage of the step that is idle or of a class that is known."""
        return 100 * (1 - self.by_class.get(OTHER, 0.0) / self.step)


def union_length(intervals: Iterable[Interval]) -> float:
    """Return the length of a union of (start, end) intervals."""
    return sum(_uncovered(sorted(intervals)))


def _uncovered(intervals: Iterable[Interval]) -> list[float]:
    """Return what each interval adds to the union of those before it, which start no later."""
    added, last = list[float](), float("-inf")
    for start, end in intervals:
        added.append(max(0.0, end - max(start, last)))
        last = max(last, end)
    return added


def summarize(trace: Mapping[str, Any], sizes: ModelSizes | None = None) -> StepTrace:
    """Summarize the last step of a trace of torch's profiler.

    Args:
        trace: The content of the JSON file.
        sizes: The model's sizes, by which matrix products have roles; None where they are not known.

    Raises:
        UserError: The trace holds no kernels of a step.
    """
    kernels, step = last_step(trace)
    if not kernels:
        raise UserError("the trace holds no GPU kernels of a step: trace a run on a GPU that ends later")
    classified = [(kernel, class_of(kernel, sizes)) for kernel in kernels]
    collectives = [_interval(kernel) for kernel, which in classified if which == COMMUNICATION]
    others = [(kernel, which) for kernel, which in classified if which != COMMUNICATION]
    by_class: defaultdict[str, float] = defaultdict(float)
    for (_, which), time in zip(others, _uncovered(_interval(kernel) for kernel, _ in others), strict=True):
        by_class[which] += time
    busy = union_length(map(_interval, kernels))
    exposed = busy - sum(by_class.values())
    if collectives:
        by_class[COMMUNICATION] = exposed
    span = max(kernel.end for kernel in kernels) - kernels[0].start
    return StepTrace(
        step=step,
        span=span,
        idle=span - busy,
        idle_between=step - span,
        communication=union_length(collectives),
        exposed_communication=exposed,
        by_class=_longest_first(by_class),
        largest=_durations(kernels),
        largest_other=_durations([kernel for kernel, which in classified if which == OTHER]),
    )


def _interval(kernel: Kernel) -> Interval:
    return kernel.start, kernel.end


def _longest_first(times: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def _durations(kernels: Sequence[Kernel]) -> dict[str, float]:
    by_name: defaultdict[str, float] = defaultdict(float)
    for kernel in kernels:
        by_name[kernel.name] += kernel.end - kernel.start
    return dict(list(_longest_first(by_name).items())[:_NUM_LARGEST])


def last_trace(folder: Path, rank: int = 0) -> Path:
    """Return the last trace that a rank wrote.

    Args:
        folder: The run folder.
        rank: The rank.

    Raises:
        UserError: There is none.
    """
    found = RunFolder(folder).profile.glob(f"iteration_*/rank{rank}_trace.json")
    last = max(found, key=lambda path: int(path.parent.name.split("_")[1]), default=None)
    if last is None:
        raise UserError(f"{folder} holds no trace of rank {rank}: run with metrics.profile_every")
    return last


def read_trace(folder: Path, rank: int = 0) -> StepTrace:
    """Summarize the last trace of a run.

    Args:
        folder: The run folder.
        rank: The rank whose trace is read.

    Raises:
        UserError: There is none, or it is no trace with GPU kernels; names it.
    """
    path, run = last_trace(folder, rank), RunFolder(folder)
    table = run.read_config()
    model = None if table is None else from_table(ModelConfig, table["model"], run.config_file, "model")
    try:
        trace = json.loads(path.read_text(encoding="utf-8"))
        return summarize(trace, model and ModelSizes.of(model))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def format_table(trace: StepTrace) -> str:
    """Format the step as a Markdown table, classes first, and list the largest kernels."""
    lines = ["| ms | % of the step | |", "|---|---|---|"]
    idle = {"idle within the step": trace.idle, "idle between steps": trace.idle_between}
    for name, time in {**trace.by_class, **idle, "step": trace.step}.items():
        lines.append(f"| {time:.2f} | {100 * time / trace.step:.1f} | {name} |")
    lines.append(
        f"\n{trace.named_percent:.1f}% of the step is idle or of a known class; communication "
        f"{trace.communication:.1f} ms, exposed {trace.exposed_communication:.1f}"
    )
    for title, times in (("kernel", trace.largest), (f'kernel, class "{OTHER}"', trace.largest_other)):
        lines += [f"\n| ms | {title} |", "|---|---|"]
        lines += [f"| {time:.2f} | {name[:100]} |" for name, time in times.items()]
    return "\n".join(lines)


def main() -> None:
    """Run `python -m benchmarks.step_trace`."""
    parser = make_parser("step_trace", __doc__)
    parser.add_argument("folder", type=Path, help="the run folder")
    parser.add_argument("--rank", type=int, default=0, help="rank whose trace to read (0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    trace = read_trace(options.folder, options.rank)
    if options.json:
        print(json.dumps({**asdict(trace), "named_percent": trace.named_percent}, indent=1))
    else:
        print(format_table(trace))


if __name__ == "__main__":
    sys.exit(run_command(main))
