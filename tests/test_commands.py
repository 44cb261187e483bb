"""Every command line explains itself."""

import ast
import contextlib
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("training", "eval", "models", "optimizers", "data", "parallax", "benchmarks", "tests/mutate")
MODULES = [
    *("data.sample", "data.shards", "data.train_tokenizer"),
    *("eval.diagnostics", "eval.downstream", "eval.mad", "eval.perplexity", "eval.report"),
    *("models.average", "models.checkpoint", "models.convert", "models.generation", "models.size_table"),
    "training.sweep",
]
BENCHMARKS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if "make_parser(" in path.read_text(encoding="utf-8") and path.stem != "command"
)
# what their command lines cannot do without
REQUIRED = {
    **{
        name: ["x"] for name in ("diagnostics", "plain_path", "products", "scaling", "step_trace", "training")
    },
    "data_prepare": ["--files", "x", "--tokenizer", "x"],
    "data_rows": ["--folder", "x", "--tokenizer", "x"],
    "eval_parity": ["--data", "x"],
    "held_out_sample": ["x", "--max-tokens", "1"],
    "stock": ["--config", "x", "--rows", "1", "--steps", "1", "--folder", "x"],
}


@pytest.mark.parametrize("command", [["train.py"], *(["-m", module] for module in MODULES)], ids=" ".join)
def test_help(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert done.stderr == ""
    assert not re.search(r"^ {4}python .*\S {3,}\[", done.stdout, flags=re.MULTILINE), "lines run together"


@pytest.mark.parametrize(
    "words",
    [
        ["data.sample", "--ou", "x"],
        ["data.train_tokenizer", "--vocab", "300", "--files", "x", "--out", "y"],
        ["data.shards", "prepare", "--tok", "x", "--files", "x", "--out", "y"],
        ["data.shards", "info", "x", "--seq", "9"],
        ["models.size_table", "--he"],
    ],
    ids=" ".join,
)
def test_options_are_not_abbreviated(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert "unrecognized arguments" in done.stderr or "arguments are required" in done.stderr


def test_every_parser_takes_whole_names_alone() -> None:
    wrong = []
    for path in (ROOT / "train.py", *(path for each in PACKAGES for path in (ROOT / each).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                is_parser = node.func.attr in ("ArgumentParser", "add_parser")
                words = {each.arg: ast.unparse(each.value) for each in node.keywords}
                if is_parser and words.get("allow_abbrev") != "False":
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []


def test_an_option_with_underscores_is_named_as_it_is_written() -> None:
    words = [sys.executable, "train.py", "--config", "x.toml", "--dry_run"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("error: --dry_run is unknown; write --dry-run\n")


def _main(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run `python -m WORDS` in this process; return its exit code and what it prints as errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(words[0], run_name="__main__", alter_sys=False)
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_options_of_a_benchmark_are_not_abbreviated(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    short = {"step_trace": "--js", "stock": "--rows-per"}.get(name, "--na")
    code, errors = _main([f"benchmarks.{name}", *REQUIRED.get(name, []), short], capsys)
    assert code == 2
    assert errors.startswith(f"usage: python -m benchmarks.{name} ")
    assert errors.endswith(f"error: unrecognized arguments: {short}\n")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("training", "--ranks", ["0"]),
        ("training", "--rows-per-step", ["0"]),
        ("training", "--steps", ["-1"]),
        ("attention", "--lengths", ["1024", "0"]),
        ("checkpoint_reading", "--repeats", ["0"]),
        ("data_prepare", "--rounds", ["0"]),
        ("data_rows", "--global-batch", ["0"]),
        ("decode", "--rounds", ["0"]),
        ("eval_parity", "--batch-sizes", ["16", "-2"]),
        ("generation", "--new-tokens", ["0"]),
        ("held_out_sample", "--max-tokens", ["0"]),
        ("muon", "--steps", ["0"]),
        ("packed_attention", "--tokens", ["0"]),
        ("plain_path", "--steps", ["0"]),
        ("tune_decode", "--workers", ["0"]),
    ],
)
def test_counts_of_a_benchmark_are_at_least_1(
    name: str, option: str, values: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, errors = _main([f"benchmarks.{name}", *REQUIRED.get(name, []), option, *values], capsys)
    assert (code, errors) == (2, f"error: {option} is {values[-1]}, must be at least 1\n")


def test_every_benchmark_checks_its_command_line() -> None:
    texts = {name: (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8") for name in BENCHMARKS}
    assert len(texts) > 20
    # the rank of step_trace starts at 0
    assert [name for name, text in texts.items() if ".parse_args(" in text] == ["step_trace"]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    "words",
    [
        ["data.sample"],
        ["data.shards", "prepare", "--tokenizer", "x", "--files", "x"],
        ["data.train_tokenizer", "--vocab-size", "300", "--files", "x"],
        ["eval.diagnostics", "--checkpoint", "x"],
        ["eval.downstream", "--checkpoint", "x", "--tasks", "x"],
        ["eval.mad"],
        ["eval.perplexity", "--checkpoint", "x"],
        ["eval.report", "x"],
        ["models.average", "x"],
        ["models.convert", "from-hf", "x"],
        ["models.convert", "to-hf", "x"],
        *(
            [f"benchmarks.{name}", *REQUIRED.get(name, [])]
            for name in BENCHMARKS
            if name not in ("step_trace", "stock")  # they have no --out
        ),
    ],
    ids=" ".join,
)
def test_out_below_a_file_is_one_line_before_the_work(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for out in (file, file / "below"):
        code, errors = _main([*words, "--out", str(out)], capsys)
        assert (code, errors) == (2, f"error: --out is {out}, but {file} is a file; want a folder\n")


def _commands() -> list[tuple[str, list[str]]]:
    """Return module and words of every `python -m MODULE ...` in an indented block of the documents."""
    commands = []
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for block in re.findall(r"(?:^ {4}.*\n)+", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                for module, words in re.findall(r"python -m ([\w.]+)([^;#]*)", line):
                    commands.append((module, words.split(" -- ")[0].split()))
    return commands


def _help(words: tuple[str, ...]) -> str:
    """Return what `python -m WORDS --help` prints, in this process."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [*words, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_module(words[0], run_name="__main__", alter_sys=False)
    return printed.getvalue()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_commands_of_the_documents_have_options_that_exist_and_those_that_are_required() -> None:
    commands = _commands()
    assert len(commands) > 40
    texts: dict[tuple[str, ...], str] = {}
    wrong = []
    for module, words in commands:
        is_split = module in ("data.shards", "models.checkpoint", "models.convert")
        command = (module, words[0]) if is_split else (module,)
        text = texts[command] if command in texts else texts.setdefault(command, _help(command))
        known = set(re.findall(r"--[\w-]+", text))
        usage = re.sub(r"\[[^][]*\]|\([^()]*\)", "", re.sub(r"\[[^][]*\]", "", text.split("\n\n")[0]))
        given = {word.strip("[]`,") for word in words if word.lstrip("[`").startswith("--")}
        given = {word for word in given if re.fullmatch(r"--[a-z-]+", word)}  # others are keys of a TOML file
        wrong += [f"{module}: {option} is unknown" for option in sorted(given - known)]
        required = set(re.findall(r"--[\w-]+", usage))
        wrong += [f"{module}: {option} is missing" for option in sorted(required - given)]
    assert wrong == []
