"""The source of a run's held-out documents, and the tokens of documents and of task text."""

import json
from collections import Counter
from pathlib import Path

import pytest

from config import to_table
from data.config import JsonlSource, MixtureSource, ParquetSource, ShardsSource
from data.sources.open import open_text
from data.tokenizer import Tokenizer
from errors import UserError
from eval.scored_text import held_out_source, read_texts


def test_saved_sources_are_decoded_to_equal_ones() -> None:
    leaf = ParquetSource(files=["a.parquet"], min_score=0.5)
    mixture = MixtureSource(weights={"a": 1.0, "b": 2.0}, sources={"a": leaf, "b": ShardsSource(folder="x")})
    for source in (leaf, mixture):
        table = {"validation": to_table(source), "validation_documents": "held_out"}
        assert held_out_source(table) == (source, "held_out")
    with pytest.raises(UserError, match=r"the run has no data.validation: name a text"):
        held_out_source({"validation": "none", "validation_documents": "all"})


def test_a_held_out_document_cannot_write_its_end_and_task_text_has_the_ids_of_transformers(
    corpus: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(corpus)
    end, text = tokenizer.end_of_document_id, "the <|endoftext|> model"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}))
    source = open_text(JsonlSource(files=[str(path)]))
    (document,) = read_texts(source, tokenizer, "documents", Counter())
    assert document.tokens.count(end) == 1
    assert document.tokens[-1] == end
    (ids,) = tokenizer.encode_prompts([text])
    assert ids.count(end) == 1
    (page,) = read_texts(source, tokenizer, "wikitext", Counter())
    assert page.tokens == [end, *ids]
    (line,) = read_texts(source, tokenizer, "last-word", Counter())
    assert line.tokens == ids
    assert tokenizer.decode(ids[line.first_predicted :]) == " model"
