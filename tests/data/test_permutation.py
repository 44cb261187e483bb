from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.permutation import Permutation


@settings(deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**62))
def test_every_item_is_at_one_position(size: int, seed: int) -> None:
    items = Permutation(size, seed)(np.arange(size))
    assert sorted(items.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025])
def test_sizes_around_powers_of_four_are_bijections(size: int) -> None:
    assert sorted(Permutation(size, "key")(np.arange(size)).tolist()) == list(range(size))


def test_any_positions_can_be_mapped_alone() -> None:
    order = Permutation(10_007, 5)
    whole = order(np.arange(10_007))
    assert order(np.array([9_000, 3, 3])).tolist() == whole[[9_000, 3, 3]].tolist()


def test_a_trillion_items_take_no_memory() -> None:
    places = np.arange(10**12 - 1000, 10**12)
    items = Permutation(10**12, 1)(places)
    assert items.max() < 10**12
    assert len(set(items.tolist())) == 1000
    # uniform over the whole range: the mean of 1000 items is within 5 standard errors of the middle
    assert abs(items.mean() / 10**12 - 0.5) < 5 * 0.2887 / 1000**0.5


def test_all_orders_of_4_items_are_equally_likely() -> None:
    counts = dict.fromkeys(permutations(range(4)), 0)
    for key in range(6000):
        counts[tuple(Permutation(4, key)(np.arange(4)).tolist())] += 1
    # chi-squared with 23 degrees of freedom: below 49.7 with probability 0.999
    assert sum((count - 250) ** 2 / 250 for count in counts.values()) < 49.7


def test_neighbors_are_separated_and_keys_differ() -> None:
    places = np.arange(100_000)
    first, second = (Permutation(100_000, seed, epoch)(places) for seed, epoch in ((7, 0), (7, 1)))
    for order in (first, second):
        gaps = np.abs(np.diff(order.astype(np.int64)))
        # independent uniform positions are a third of the range apart on average
        assert abs(gaps.mean() / 100_000 - 1 / 3) < 0.01
    assert np.mean(first == second) < 0.001
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    assert abs(np.corrcoef(first, places)[0, 1]) < 0.02
    assert Permutation(100_000, 7, 0)(places[:50]).tolist() == first[:50].tolist()
