"""Traces of training steps: the host launches the first of two as without a trace, a step ahead."""

import json
import re
from pathlib import Path

from models.run_folder import RunFolder
from tests.training.launch import train

PROGRAM = ("-m", "tests.training.late_traces")
CONFIG = "debug_parallax_muon"
WORDS = [
    *("--metrics.profile_every", "10", "--metrics.spectrum_every", "none"),
    *("--checkpoint.every", "100", "--data.validation", "none"),
]


def traced(folder: Path) -> dict[str, dict[int, int]]:
    """Return by the name of each trace the updates of the optimizer in each of its steps."""
    found = {}
    for path in RunFolder(folder).profile.glob("*/rank0_trace.json"):
        events = json.loads(path.read_text())["traceEvents"]
        marks = [event for event in events if event.get("cat") == "user_annotation"]
        updates = [mark["ts"] for mark in marks if mark["name"].startswith("Optimizer.step#Muon")]
        # the profiler counts from 0
        found[path.parent.name] = {
            int(mark["name"].split("#")[1]) + 1: sum(0 <= x - mark["ts"] <= mark["dur"] for x in updates)
            for mark in marks
            if mark["name"].startswith("ProfilerStep#")
        }
    return found


def test_only_the_last_traced_step_is_read_at_once(corpus: Path, tmp_path: Path) -> None:
    printed = train(CONFIG, corpus, tmp_path, *WORDS, "--training.steps", "13", program=PROGRAM)
    expected, pending = list[str](), list[int]()
    for step in range(1, 14):
        expected.append(f"launch {step}")
        pending.append(step)
        while pending and (len(pending) > 1 or step in (10, 13)):
            expected.append(f"read {pending.pop(0)}")
    assert re.findall(r"order: (.*)", printed) == expected
    assert traced(tmp_path) == {"iteration_10": {9: 1, 10: 1}}


def test_runs_that_end_or_resume_between_traced_steps(corpus: Path, tmp_path: Path) -> None:
    for stop in ("8", "10", "19", "20"):
        words = [*WORDS, "--training.stop_at_step", stop]
        train(CONFIG, corpus, tmp_path / "run", *words, program=PROGRAM)
    assert traced(tmp_path / "run") == {
        # the profiler has begun the next step when a run ends, and traces none of the first after a resume
        "iteration_8": {9: 0},
        "iteration_10": {10: 1},
        "iteration_19": {19: 1, 20: 0},
    }
