"""Resuming from a saved position, at any step and on any number of ranks."""

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.loading.loader import PackedLoader
from data.loading.packing import MicroBatch
from data.tokenizer import Tokenizer
from tests.data.loading.loaders import (
    FILES,
    TEXTS,
    are_equal,
    epoch_of,
    make_loader,
    make_ranks,
    take,
    take_steps,
    token_stream,
)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that a short test crosses many."""
    monkeypatch.setattr("data.loading.best_fit.BLOCK_ROWS", 3)
    monkeypatch.setattr("data.sources.files.BLOCK_ROWS", 4)


@pytest.mark.parametrize("mask", [True, False], ids=["masked", "plain"])
@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("seed", [None, 3], ids=["in_order", "shuffled"])
def test_resuming_at_every_step_is_bit_identical_to_no_interruption(
    byte_tokenizer: Tokenizer,
    list_source: Any,
    small_blocks: None,
    mask: bool,
    prefetch: int,
    packing: str,
    seed: int | None,
) -> None:
    source = list_source(FILES, shuffle_seed=seed)

    def new() -> PackedLoader:
        changes = {"mask_documents": mask, "prefetch_batches": prefetch, "packing": packing}
        shuffle = {"shuffle_seed": seed, "shuffle_window": 9}
        return make_loader(source, byte_tokenizer, seq_len=7, **changes, **shuffle)

    whole_loader = new()
    states = [json.dumps(whole_loader.state_dict())]
    whole: list[MicroBatch] = []
    for batch in itertools.islice(whole_loader, 60):
        whole.append(batch)
        states.append(json.dumps(whole_loader.state_dict()))
    whole_loader.close()
    assert epoch_of(whole_loader) >= 2, "the test must cross epochs"
    for step, state in enumerate(states[:50]):
        resumed = new()
        resumed.load_state_dict(json.loads(state))
        assert json.dumps(resumed.state_dict()) == state
        assert are_equal(take(resumed, 8), whole[step : step + 8])
        assert json.dumps(resumed.state_dict()) == states[step + 8]
        resumed.close()


def test_a_training_loader_resumes_where_its_last_iterator_stopped(
    byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    source = list_source(FILES)
    whole = take(make_loader(source, byte_tokenizer), 12)
    loader = make_loader(source, byte_tokenizer, prefetch_batches=4)
    assert are_equal([*take(loader, 5), *take(loader, 7)], whole)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("local", [1, 2])
def test_global_batches_do_not_depend_on_the_number_of_ranks(
    byte_tokenizer: Tokenizer, list_source: Any, world: int, local: int
) -> None:
    source = list_source(FILES)
    steps = take_steps(
        make_ranks(
            source, byte_tokenizer, world, local_batch_size=local, global_batch_size=8, mask_documents=False
        ),
        8 // (world * local),
        4,
    )
    stream = token_stream(byte_tokenizer, TEXTS, num_epochs=4)
    expected = [[stream[row * 8 : row * 8 + 8] for row in range(step * 8, step * 8 + 8)] for step in range(4)]
    assert [step.tolist() for step in steps] == expected


@settings(max_examples=12, deadline=None)
@given(
    worlds=st.permutations([1, 2, 4, 8]),
    local=st.integers(1, 2),
    num_steps=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    packing=st.sampled_from(["concatenate", "best_fit"]),
    seed=st.sampled_from([None, 5]),
)
@example(worlds=[4, 2, 8, 1], local=1, num_steps=[2, 2, 2, 2], packing="best_fit", seed=5)
@example(worlds=[4, 2, 8, 1], local=1, num_steps=[2, 2, 2, 2], packing="concatenate", seed=None)
def test_a_state_resumes_on_another_number_of_ranks(
    byte_tokenizer: Tokenizer,
    list_source: Any,
    worlds: list[int],
    local: int,
    num_steps: list[int],
    packing: str,
    seed: int | None,
) -> None:
    source = list_source(FILES, shuffle_seed=seed)
    sizes: dict[str, Any] = {"global_batch_size": 16, "mask_documents": False, "packing": packing}
    sizes |= {"shuffle_seed": seed, "shuffle_window": 37}
    whole = take_steps([make_loader(source, byte_tokenizer, **sizes)], 16, sum(num_steps))
    legs: list[torch.Tensor] = []
    state: str | None = None
    for world, count in zip(worlds, num_steps, strict=True):
        loaders = make_ranks(source, byte_tokenizer, world, local_batch_size=local, **sizes)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(state))
        legs += take_steps(loaders, 16 // (world * local), count)
        states = {json.dumps(loader.state_dict(), sort_keys=True) for loader in loaders}
        assert len(states) == 1, "every rank has the same state"
        (state,) = states
    assert all(torch.equal(leg, step) for leg, step in zip(legs, whole, strict=True))


def test_masked_rows_are_the_same_on_any_number_of_ranks_and_balanced(
    byte_tokenizer: Tokenizer, list_source: Any
) -> None:
    texts = ["ab" * (1 + 7 * (index % 5 == 0)) for index in range(60)]
    source, sizes = list_source([texts]), {"seq_len": 16, "global_batch_size": 8, "shuffle_seed": 3}

    def steps(world: int) -> list[list[list[int]]]:
        """Each step's rows by rank."""
        loaders = make_ranks(source, byte_tokenizer, world, local_batch_size=8 // world, **sizes)
        batches = [take(loader, 6) for loader in loaders]
        for loader in loaders:
            loader.close()
        return [
            [inputs["input"].view(-1, 16).tolist() for inputs, _ in step]
            for step in zip(*batches, strict=True)
        ]

    one, four = steps(1), steps(4)
    for alone, ranks in zip(one, four, strict=True):
        assert sorted(row for rows in ranks for row in rows) == sorted(alone[0])
    # of eight rows on four ranks, the first two are not always the first rank's
    assert any(ranks[0] != alone[0][:2] for alone, ranks in zip(one, four, strict=True))
