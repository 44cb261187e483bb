"""The examples of docs/extending.md, applied to a copy of the repository and tried there."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.launch import arguments, command, environment, losses, records

ROOT = Path(__file__).parents[1]
CONFIG = "debug_gated-softmax_lion"
STEPS = [
    *("--training.steps", "20", "--checkpoint.every", "5"),
    *("--metrics.update_every", "1", "--metrics.tensorboard", "true"),
]


def blocks() -> Iterator[tuple[str, str, str, str]]:
    """Yield (file, verb, line, code) of every block of code in docs/extending.md that names a file."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```(?:python|toml)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        head, _, code = block.partition("\n")
        match = re.fullmatch(r"# ([\w/.-]+)(?:, (before|after|instead of): (.*))?", head)
        assert match is not None, head
        yield match[1], match[2] or "", match[3] or "", code


def apply(folder: Path) -> None:
    """Write the new files, and edit the others; a line to edit must occur once."""
    for name, verb, line, code in blocks():
        path = folder / name
        if not verb:
            assert not path.exists(), name
            path.write_text(code, encoding="utf-8")
            continue
        text = path.read_text(encoding="utf-8")
        assert text.count(f"\n{line}\n") == 1, f"{name}: {line}"
        blank = "" if line.startswith(" ") else "\n\n"  # after a class
        parts = {"before": f"{code}{blank}{line}\n", "after": f"{line}\n{code}", "instead of": code}
        path.write_text(text.replace(f"{line}\n", parts[verb]), encoding="utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the attention, the optimizer and the config of the page."""
    folder = tmp_path_factory.mktemp("extended")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("benchmarks/results/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    apply(folder)
    return folder


def environment_of(folder: Path) -> dict[str, str]:
    return {**environment(), "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def run(folder: Path, *words: str, code: int = 0) -> str:
    """Run Python in the copy; return what it prints."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment_of(folder),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == code, printed[-4000:]
    return printed


def training(corpus: Path, run_folder: Path, ranks: int = 1) -> list[str]:
    return [*command(ranks), *arguments(CONFIG, corpus, run_folder, *STEPS)]


def train(folder: Path, corpus: Path, run_folder: Path, ranks: int = 1) -> None:
    run(folder, *training(corpus, run_folder, ranks)[1:])


def test_the_code_passes_the_linter_and_the_import_contracts(extended: Path) -> None:
    files = [name for name, *_ in blocks() if name.endswith(".py")]
    run(extended, "-m", "ruff", "check", *files)
    run(extended, "-m", "ruff", "format", "--check", *files)
    contracts = ["-c", "import sys; from importlinter.cli import lint_imports_command as lint; lint()"]
    run(extended, *contracts, "--no-cache")
    path = extended / "models" / "attention" / "gated_softmax.py"
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text("from models.attention.softmax import SoftmaxAttention\n" + text, encoding="utf-8")
        printed = run(extended, *contracts, "--no-cache", code=1)
    finally:
        path.write_text(text, encoding="utf-8")
    assert "models.attention.gated_softmax -> models.attention.softmax (l.1)" in printed


def test_the_dry_run_counts_it_and_the_help_describes_it(extended: Path) -> None:
    printed = run(extended, "train.py", "--config", f"configs/{CONFIG}.toml", "--dry-run", "--mfu", "40")
    # 4 layers of q, k, v, o and the gate, each 128 x 256 or 128 x 128
    assert re.search(rf"^parameters, attention +{4 * 4 * 128 * 256 / 1e6:.2f}M$", printed, re.MULTILINE)
    assert "time of this run" in printed
    for table, kind in (("model.attention", "gated-softmax"), ("optimizer.groups.NAME", "lion")):
        assert f'kind = "{kind}"' in run(extended, "train.py", "--help-config", table)


def test_it_trains_and_resumes_after_a_kill_and_is_evaluated(
    extended: Path, corpus: Path, tmp_path: Path
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(extended, corpus, straight)
    words = training(corpus, killed)
    process = subprocess.Popen(
        words, cwd=extended, env=environment_of(extended), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    metrics, deadline = killed / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('"loss"') >= 8):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    train(extended, corpus, killed)
    assert len([line for line in records(killed) if "launch" in line]) == 2
    assert losses(killed) == losses(straight)
    steps = [line for line in records(killed) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    for line in steps:
        assert 0.4 < line["gate/mean"] < 0.6
        assert line["update_rms/hidden"] == pytest.approx(1.0, rel=1e-2)  # of a sign
    events = EventAccumulator(str(straight / "tensorboard"))
    events.Reload()
    curve = [event.value for event in events.Scalars("gate/mean")]
    assert curve == pytest.approx([line["gate/mean"] for line in steps])
    out = tmp_path / "out"
    run(extended, "-m", "eval.perplexity", "--checkpoint", str(killed), "--out", str(out))
    (results,) = out.glob("*.json")
    held_out = [line["validation_loss"] for line in records(killed) if "validation_loss" in line]
    assert json.loads(results.read_text())["loss"] == pytest.approx(held_out[-1], abs=1e-3)


@pytest.mark.slow
def test_two_ranks_generation_and_the_refusal_of_an_export(
    extended: Path, corpus: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(extended, corpus, one)
    train(extended, corpus, two, ranks=2)
    for a, b in zip(records(one), records(two), strict=True):
        for key in ("loss", "gate/mean", "update_rms/hidden"):
            assert a.get(key) == pytest.approx(b.get(key), abs=2e-3), key
    run(extended, "-m", "models.generation", "--checkpoint", str(two), "--prompt", "the model of")
    words = ["-m", "models.convert", "to-hf", str(two), "--out", str(tmp_path / "hf")]
    assert '"gated-softmax" cannot be converted' in run(extended, *words, code=2)


@pytest.mark.slow
def test_the_tests_that_every_kind_joins_pass(extended: Path) -> None:
    tests = ["tests/models/test_qwen3.py", "tests/models/attention/test_every_attention.py"]
    tests += ["tests/models/generation/test_cache.py", "tests/optimizers/test_every_optimizer.py"]
    chosen = "(gated-softmax or lion or sharded or every_kind) and not gpu"
    printed = run(extended, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", chosen)
    assert int(re.findall(r"(\d+) passed", printed)[-1]) > 25
