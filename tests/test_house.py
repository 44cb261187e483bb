"""The structure of the code: who may import whom, and how long a file may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("training", "eval", "models", "optimizers", "data", "parallax")
MAX_LINES = 400
MAX_KERNEL_LINES = 600


def _tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _sources() -> dict[str, Path]:
    files = _tracked("*.py", *(f"{package}/**/*.py" for package in PACKAGES))
    names = {_module(path): path for path in files}
    return {
        name: path for name, path in names.items() if name.partition(".")[0] not in ("tests", "benchmarks")
    }


def _imports(path: Path, modules: set[str]) -> set[str]:
    """The project's modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules or {node.module}
    return found & modules


def _external_imports(path: Path) -> set[str]:
    """The first parts of the names of all modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module.partition(".")[0])
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    sources = _sources()
    return {name: _imports(path, set(sources)) - {name} for name, path in sources.items()}


def test_modules_do_not_import_each_other_in_a_circle(graph: dict[str, set[str]]) -> None:
    remaining = {name: set(imports) for name, imports in graph.items()}
    while free := {name for name, imports in remaining.items() if not imports & remaining.keys()}:
        remaining = {name: imports for name, imports in remaining.items() if name not in free}
    assert not remaining, f"modules in a circle, or above one: {sorted(remaining)}"


def test_the_ground_floor_imports_nothing_of_the_project(graph: dict[str, set[str]]) -> None:
    assert graph["errors"] == graph["tokens"] == set()
    assert graph["config"] | graph["disk"] | graph["scalars"] <= {"errors"}


def test_parallax_stands_alone(graph: dict[str, set[str]]) -> None:
    above = {n for name, n_set in graph.items() if name.split(".")[0] == "parallax" for n in n_set}
    assert {name for name in above if name.split(".")[0] != "parallax"} == set()


def test_parallax_imports_torch_and_triton_alone() -> None:
    allowed = {*sys.stdlib_module_names, "parallax", "torch", "triton"}
    found: dict[str, set[str]] = {}
    for name, path in _sources().items():
        if name.split(".")[0] == "parallax":
            found[name] = _external_imports(path) - allowed
    assert {name: imports for name, imports in found.items() if imports} == {}


def test_nobody_imports_the_entry_point(graph: dict[str, set[str]]) -> None:
    assert [name for name, imports in graph.items() if "train" in imports] == []


def test_no_file_is_too_long() -> None:
    too_long = {}
    for path in _tracked("*.py"):
        limit = MAX_KERNEL_LINES if "kernels" in path.parts else MAX_LINES
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        if num_lines > limit:
            too_long[str(path.relative_to(ROOT))] = num_lines
    assert not too_long


def test_the_readme_is_one_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 130
    assert len(text.encode()) <= 9 * 1024
    assert [line for line in lines if len(line) >= 110] == []


def test_links_of_the_documents_lead_somewhere() -> None:
    for path in _tracked("*.md", "docs/*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_tree_lists_every_file() -> None:
    text = (ROOT / "docs" / "tree.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\* `([^`]+)`: \S", text, flags=re.MULTILINE)
    files = {str(path.relative_to(ROOT)) for path in _tracked("*.py")}
    wanted = {f for f in files if not f.startswith("tests/") and not f.endswith("__init__.py")}
    assert sorted(listed) == sorted(wanted), "docs/tree.md has a line for each: * `FILE`: docstring"
