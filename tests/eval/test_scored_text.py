"""The source of a run's held-out documents is decoded from its saved config."""

import pytest

from config import to_table
from data.config import MixtureSource, ParquetSource, ShardsSource
from errors import UserError
from eval.scored_text import held_out_source


def test_saved_sources_are_decoded_to_equal_ones() -> None:
    leaf = ParquetSource(files=["a.parquet"], min_score=0.5)
    mixture = MixtureSource(weights={"a": 1.0, "b": 2.0}, sources={"a": leaf, "b": ShardsSource(folder="x")})
    for source in (leaf, mixture):
        table = {"validation": to_table(source), "validation_documents": "held_out"}
        assert held_out_source(table) == (source, "held_out")
    with pytest.raises(UserError, match=r"the run has no data.validation: name a text"):
        held_out_source({"validation": "none", "validation_documents": "all"})
