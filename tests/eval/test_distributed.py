"""A failure on one rank is raised on all ranks, before any waits for another."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from eval.distributed import EvaluationError, RankSafeModel, run_on_all_ranks
from eval.scoring.groups import Group, Scores
from eval.scoring.language_model import LanguageModel

CPU = torch.device("cpu")


class FailingModel(LanguageModel):
    """A model whose generation always fails."""

    max_length, identity, is_padded = 8, "", False

    def row_lengths(self, group: Group) -> list[int]:
        return [1]

    def score(self, groups: Sequence[Group]) -> list[list[Scores]]:
        return [[Scores([0.0], [True])] for _ in groups]

    def generate(self, prompts: list[list[int]], **options: Any) -> list[list[int]]:
        raise RuntimeError("out of memory")


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_failed_generation_is_raised_by_the_next_collective() -> None:
    options = {"max_new_tokens": 2, "stop_ids": (), "stop": lambda index, tokens: False}
    for end in (lambda model: model.score([Group((1,), ((2,),))]), lambda model: model.finish()):
        model = RankSafeModel(FailingModel(), CPU)
        assert model.score([Group((1,), ((2,),))]) == [[Scores([0.0], [True])]]
        model.finish()
        # ranks without prompts do not call generate, so it must not be a collective
        assert model.generate([[1], [1, 2]], **options) == [[], []]
        with pytest.raises(EvaluationError, match=r"^rank 0: RuntimeError: out of memory$"):
            run_on_all_ranks(lambda model=model, end=end: end(model), CPU)
