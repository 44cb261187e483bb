"""Fixtures that several packages' tests share, and how pytest-xdist's workers share cores and a GPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data.train_tokenizer import train_byte_level_bpe

WORDS = "the a model of attention and its probe reads keys values from past tokens while gradients flow"


@pytest.fixture(scope="session", autouse=True)
def _one_core_per_worker() -> None:
    """Keep pytest-xdist's workers, and what they launch, from starting a thread or compiler per core each."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    import torch._inductor.config as inductor

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    inductor.compile_threads = 1


@pytest.fixture(autouse=True)
def _free_gpu_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Return what a test has left cached on the GPU, for the other workers."""
    yield
    if request.node.get_closest_marker("gpu") is not None:
        torch.cuda.empty_cache()


def make_text(seed: int, num_words: int) -> str:
    """Words drawn from a short list: text that a small model can learn something of."""
    words = WORDS.split()
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, len(words), (num_words,), generator=generator).tolist()
    return " ".join(words[i] for i in indices)


def write_parquet(path: Path, texts: list[str]) -> None:
    """Documents in Ultra-FineWeb's schema."""
    table = {"content": texts, "score": [1.0] * len(texts), "source": ["test"] * len(texts)}
    pq.write_table(pa.table(table), path)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.json, train.parquet and validation.parquet, 300 ids."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [make_text(seed, 5 + 37 * (seed % 7)) for seed in range(200)]
    train_byte_level_bpe(texts, 300, ["<|endoftext|>"]).save(str(folder / "tokenizer.json"))
    write_parquet(folder / "train.parquet", texts)
    write_parquet(folder / "validation.parquet", [make_text(seed, 60) for seed in range(1000, 1010)])
    return folder
