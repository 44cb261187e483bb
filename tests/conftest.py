"""Fixtures that several packages' tests share."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data.train_tokenizer import train_byte_level_bpe

WORDS = "the a model of attention and its probe reads keys values from past tokens while gradients flow"


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
