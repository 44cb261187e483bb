"""A SLURM job array that runs the ready members of a plan."""

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from training.sweep.overview import Overview
from training.sweep.plan import Plan

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name} --array={numbers}
#SBATCH --nodes=1 --ntasks=1{gpus} --time=24:00:00
#SBATCH --signal=B:TERM@300 --requeue --open-mode=append --output={folder}/slurm-%A_%a.txt
# {count} members are ready. Each stops with a checkpoint 300 s before the time limit; print and submit the
# array again for those that are left, and for later stages once their members are ready.
cd {directory}
exec {python} -m training.sweep {plan} --folder {folder}{overrides} --member "$SLURM_ARRAY_TASK_ID"
"""


def array_script(
    plan: Plan,
    source: Path,
    overview: Overview,
    selected: Collection[int],
    *,
    overrides: Sequence[str] = (),
    python: str,
    directory: Path,
) -> str | None:
    """Write the script of a job array, one task for each member that can be started.

    Args:
        plan: The plan.
        source: Its file.
        overview: Its members.
        selected: Numbers of the runs to start.
        overrides: Words that override keys of the plan.
        python: The interpreter.
        directory: Where the command runs.

    Returns:
        The script; None where no member can be started.
    """
    ready = [
        status.member.number
        for status in overview.own
        if status.member.number in selected
        and status.is_ready
        and status.state in ("waiting", "stopped", "failed")
    ]
    if not ready:
        return None
    return _SCRIPT.format(
        name=shlex.quote(Path(plan.folder).name),
        numbers=_ranges(ready),
        gpus=f" --gpus={plan.gpus_per_member}",
        folder=shlex.quote(plan.folder),
        overrides="".join(f" {shlex.quote(word)}" for word in overrides),
        count=len(ready),
        directory=shlex.quote(str(directory)),
        python=shlex.quote(python),
        plan=shlex.quote(str(source)),
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Write increasing numbers as SLURM's --array does: 0-3,7."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)
