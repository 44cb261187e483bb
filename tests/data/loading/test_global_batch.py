import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.loading.global_batch import (
    balance_rows,
    gradient_accumulation_steps,
    rank_rows,
    rows_per_micro_step,
)
from errors import UserError


@pytest.mark.parametrize(
    ("global_batch", "local", "ranks", "steps"), [(8, 8, 1, 1), (8, 1, 2, 4), (24, 2, 3, 4)]
)
def test_every_row_of_a_step_belongs_to_one_rank_and_micro_step(
    global_batch: int, local: int, ranks: int, steps: int
) -> None:
    found = gradient_accumulation_steps(
        global_batch_size=global_batch, local_batch_size=local, num_ranks=ranks
    )
    assert found == steps
    size = rows_per_micro_step(local, ranks)
    rows = [
        step * size + row
        for step in range(steps)
        for rank in range(ranks)
        for row in rank_rows(local, rank, ranks)
    ]
    assert rows == list(range(global_batch))


def test_a_global_batch_that_is_not_divisible_is_rejected_with_the_next_multiple() -> None:
    with pytest.raises(UserError, match=r"global_batch_size \(6\) .* ranks \(4\) = 4: the next one is 8"):
        gradient_accumulation_steps(global_batch_size=6, local_batch_size=1, num_ranks=4)


@given(local=st.integers(1, 12), ranks=st.integers(1, 12), global_batch=st.integers(1, 200))
def test_the_local_batch_that_the_message_names_fits(local: int, ranks: int, global_batch: int) -> None:
    def steps(size: int) -> int:
        return gradient_accumulation_steps(
            global_batch_size=global_batch, local_batch_size=size, num_ranks=ranks
        )

    if global_batch % (local * ranks) == 0:
        return
    with pytest.raises(UserError) as error:
        steps(local)
    named = re.search(r"; or set training.local_batch_size to (\d+)$", str(error.value))
    fitting = [size for size in range(1, local) if global_batch % (size * ranks) == 0]
    assert [int(found) for found in (named.groups() if named else ())] == fitting[-1:]


def test_a_rank_beyond_the_number_of_ranks_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="rank 2 of 2"):
        rank_rows(1, 2, 2)


@given(data=st.data(), ranks=st.integers(1, 5), local=st.integers(1, 4))
def test_ranks_get_equally_many_rows_and_about_the_same_cost(
    data: st.DataObject, ranks: int, local: int
) -> None:
    size = ranks * local
    costs = data.draw(st.lists(st.integers(0, 1000), min_size=size, max_size=size))
    by_rank = balance_rows(costs, ranks)
    assert sorted(row for rows in by_rank for row in rows) == list(range(size))
    assert all(len(rows) == local and rows == sorted(rows) for rows in by_rank)
    loads = [sum(costs[row] for row in rows) for rows in by_rank]
    assert max(loads) - min(loads) <= max(costs)
