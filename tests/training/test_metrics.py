"""metrics.jsonl, TensorBoard, wandb and the progress lines."""

import contextlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims

from data.progress import format_duration, format_progress
from errors import UserError
from eval.report.run_records import read_run
from training import log
from training.log import logger
from training.metrics import RunMetrics
from training.metrics_file import JsonlWriter
from training.run_config import MetricsConfig


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(9.4, "9s"), (247, "4m07s"), (11100, "3h05m"), (93600, "1d02h"), (3599.6, "1h00m")],
)
def test_durations(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected


def test_the_progress_bar_is_empty_at_the_start_and_full_at_the_end() -> None:
    assert format_progress(0, 7) == "[" + "." * 20 + "]   0%"
    assert format_progress(7, 7) == "[" + "#" * 20 + "] 100%"
    assert format_progress(3, 7).count("#") == 8


def test_messages_of_the_hub_client_are_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client, root = logging.getLogger("huggingface_hub"), logging.getLogger()
    for each in (client, root):
        monkeypatch.setattr(each, "handlers", [logging.StreamHandler(sys.stderr)])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(logger, "level", logger.level)
    with warnings.catch_warnings():
        log.setup(0)
    client.warning("the hub is away")
    assert capsys.readouterr().err.count("the hub is away") == 1


def test_resuming_deletes_later_records_and_damaged_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    for step in range(1, 6):
        writer.write({"step": step, "loss": 0.1 * step})
    writer.close()
    with path.open("a") as file:
        file.write('damaged\n{"step": 2, "lo')  # a disk error, and a kill while writing a line
    writer = JsonlWriter(path)
    writer.truncate_after(3)
    writer.write({"step": 4, "loss": 7.0})
    writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines[2:]] == [(3, 0.1 * 3), (4, 7.0)]


Launch = Callable[..., RunMetrics]


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """Return a function that opens the metrics of a launch on one rank, in the folder "run"."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    memory = SimpleNamespace(device_name="cpu", reset_peak_stats=lambda: None)
    monkeypatch.setattr("torchtitan.components.metrics.build_device_memory_monitor", lambda: memory)

    def start(**sinks: bool) -> RunMetrics:
        job = JobConfig()
        job.job.dump_folder, job.training.steps = str(tmp_path / "run"), 1000
        dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
        config = MetricsConfig(**{"tensorboard": False, **sinks})
        return RunMetrics(job, dims, config=config, resolved_config={})

    return start


def add_checkpoint(folder: Path, step: int) -> None:
    (folder / "checkpoint" / f"step-{step}").mkdir(parents=True)
    (folder / "checkpoint" / f"step-{step}" / ".metadata").touch()


def test_tensorboard_showed_the_steps_repeated_by_a_resumed_run_twice(launch: Launch, tmp_path: Path) -> None:
    for last_step, steps, loss in ((None, range(1, 10), 1.0), (5, range(6, 9), 2.0)):
        time.sleep(1.1 if last_step else 0)  # files are ordered by the seconds in their names
        metrics = launch(tensorboard=True)
        metrics.start_recording(last_step)
        for step in steps:
            metrics.record(step, {"loss": loss})
        metrics.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(step, 1.0 if step < 6 else 2.0) for step in range(1, 9)]


class FakeWandb:
    """wandb's history: its own steps only increase, and data of an earlier step is dropped."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.axes: dict[str, str | None] = {}
        self.exit_code: int | None = None
        self.ids: list[str] = []
        self._last_step = -1

    def init(self, **options: Any) -> "FakeWandb":
        self.ids.append(options["id"])
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        step = self._last_step + 1 if step is None else step
        if step >= self._last_step:
            self.history.append(data)
            self._last_step = step

    def finish(self, exit_code: int | None = None) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    names = {"init": fake.init, "Table": lambda columns: SimpleNamespace(add_data=lambda *cells: None)}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**names))
    return fake


def test_wandb_lost_the_steps_repeated_by_a_resumed_run(launch: Launch, wandb: FakeWandb) -> None:
    for last_step, steps in ((None, range(1, 10)), (5, range(6, 8))):
        metrics = launch(wandb=True)
        metrics.start_recording(last_step)
        for step in steps:
            metrics.record(step, {"loss": 0.5})
        metrics.record_samples(steps[-1], [{"prompt": "a", "text": "b"}], {})
        metrics.close()
    assert [line["step"] for line in wandb.history if "loss" in line] == [*range(1, 10), 6, 7]
    assert [line["step"] for line in wandb.history if "samples" in line] == [9, 7]
    assert wandb.axes == {"step": None, "*": "step"}


def test_a_run_that_started_over_continued_the_wandb_run_before(
    launch: Launch, wandb: FakeWandb, tmp_path: Path
) -> None:
    for _ in range(2):
        launch(wandb=True).close()
    add_checkpoint(tmp_path / "run", 5)
    for _ in range(2):
        launch(wandb=True).close()
    first, second, *resumed = wandb.ids
    assert first != second
    assert resumed == [second, second]


def test_wandb_that_does_not_start_ended_in_a_traceback(
    launch: Launch, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Error(Exception):
        pass

    def init(**_: Any) -> None:
        raise Error("no API key configured.\nUse `wandb login`")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    monkeypatch.setattr(sys.modules["wandb"], "Error", Error, raising=False)
    message = r"metrics\.wandb is true, but wandb does not start \(no API key configured\. Use .*offline"
    with pytest.raises(UserError, match=message):
        launch(wandb=True)


def test_a_folder_that_cannot_be_written_ended_in_a_traceback(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run\.folder is '.*run', which cannot be written \(.*directory"):
        launch()


def test_wandb_showed_a_failed_run_as_finished(launch: Launch, wandb: FakeWandb) -> None:
    metrics = launch(wandb=True)
    with pytest.raises(RuntimeError), contextlib.closing(metrics):
        raise RuntimeError("out of memory")
    assert wandb.exit_code == 1
    launch(wandb=True).close()
    assert wandb.exit_code == 0


def record_steps(metrics: RunMetrics, *steps: int) -> str:
    """Record steps and close; return the content of metrics.jsonl."""
    for step in steps:
        metrics.record(step, {"loss": 0.5, "step_seconds": 1.0, "tokens": 8 * step})
    metrics.close()
    return (metrics.folder / "metrics.jsonl").read_text()


def test_metrics_without_checkpoints_were_deleted_by_the_next_launch(
    launch: Launch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    old = record_steps(launch(), 0, 1, 2)
    for name, step, torn in (("metrics.jsonl.1", None, '{"step": 3, "lo'), ("metrics.jsonl.2", 1, "")):
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(torn)
        metrics = launch()
        metrics.start_recording(step)  # 1 for a branch from step 1
        assert (folder / name).read_text() == old + torn
        assert f"the metrics of the previous launch are kept in {folder / name}" in caplog.text
        old = record_steps(metrics, 2, 3)
    # rotated files are not read
    assert [record["step"] for record in read_run(folder).steps] == [2, 3]


def test_metrics_are_rotated_only_without_a_checkpoint_to_resume_from(launch: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    record_steps(launch(), 0)
    launch().start_recording(None)  # the evaluation at step 0 is repeated
    assert (folder / "metrics.jsonl").read_text() == ""
    record_steps(launch(), 1, 2, 3)
    add_checkpoint(folder, 2)
    metrics = launch()
    metrics.start_recording(2)
    assert [json.loads(line)["step"] for line in record_steps(metrics, 3).splitlines()] == [1, 2, 3]
    assert not list(folder.glob("metrics.jsonl.*"))


def test_the_first_time_left_after_a_resume_was_far_too_long(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    caplog.set_level(logging.INFO, logger.name)
    metrics = launch()
    clock[0] += 600  # building the model and loading the checkpoint
    metrics.start_recording(900)
    for step in range(901, 911):
        clock[0] += 300 if step == 901 else 2  # the first one compiles
        record = metrics.throughput(1, 1e9, 0.0) | metrics.launch_measures(0)[1]
        if step in (901, 910):
            metrics.log_step(step, {"loss": 1.0, "grad_norm": 1.0, **record}, 1000)
    first, second = (message for message in caplog.messages if "/1000" in message)
    assert "left" not in first
    assert "3m00s left" in second


def test_a_full_disk_ends_a_sink_with_one_warning_and_not_the_training(
    launch: Launch, wandb: FakeWandb, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = launch(tensorboard=True, wandb=True)
    metrics.start_recording(None)
    metrics.record(1, {"loss": 1.0})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    assert metrics.jsonl is not None
    assert metrics.tensorboard is not None
    monkeypatch.setattr(metrics.jsonl, "write", fail)
    monkeypatch.setattr(metrics.tensorboard, "add_scalar", fail)
    monkeypatch.setattr(wandb, "log", fail)
    for step in (2, 3):
        metrics.record(step, {"loss": 1.0})
    metrics.close()
    lines = [record.getMessage() for record in caplog.records if "ends here" in record.getMessage()]
    assert [line.split(" ")[0] for line in lines] == ["metrics.jsonl", "tensorboard", "wandb"]
    assert all("training continues: [Errno 28] No space left on device" in line for line in lines)


def test_steps_that_are_missing_at_a_resume_are_named(
    launch: Launch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_checkpoint(tmp_path / "run", 9)
    launch().start_recording(9)
    assert "metrics.jsonl has no record of steps 1 to 9, which were trained" in caplog.text
    caplog.clear()
    # a branch from step 9 has none of its own before it
    launch().start_recording(9, 10)
    assert "no record" not in caplog.text


def test_a_wrong_variable_of_wandb_is_refused_in_one_line(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "bogus")
    with pytest.raises(UserError, match=r"wandb does not start \(.*bogus.*set WANDB_MODE=offline") as error:
        launch(wandb=True)
    assert "\n" not in str(error.value)


def test_an_empty_wandb_id_is_replaced(
    launch: Launch, wandb: FakeWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    id_file = tmp_path / "run" / "wandb_id"
    id_file.write_text("\n")
    launch(wandb=True).close()
    assert "wandb_id is empty: starting a new wandb run" in caplog.text
    assert len(id_file.read_text()) == 8
    add_checkpoint(tmp_path / "run", 9)
    before = id_file.read_text()
    launch(wandb=True).close()
    assert id_file.read_text() == before
