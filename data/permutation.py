"""A random permutation of any number of items in constant memory: a Feistel network with cycle walking.

A Feistel network of two k-bit halves is a bijection of [0, 4^k) for any round function. 4^k is the smallest
such power that is at least n. An index outside [0, n) is put through the network again until it is inside
(cycle walking), which makes the map a bijection of [0, n), in fewer than four passes on average. The round
function is the finalizer of SplitMix64 (Steele, Lea and Flood, 2014), applied to the half plus a round key;
eight rounds mix small domains too.
"""

import hashlib
import json

import numpy as np

_ROUNDS = 8
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


class Permutation:
    """A pseudorandom bijection of [0, size), determined by a key.

    Args:
        size: Number of items, at least 0.
        key: Seeds the permutation, such as a seed and an epoch.
    """

    def __init__(self, size: int, *key: int | str) -> None:
        assert size >= 0
        self.size = size
        bits = max((max(size, 2) - 1).bit_length() + 1, 2) // 2
        self._bits, self._mask = np.uint64(bits), np.uint64((1 << bits) - 1)
        digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Map positions in the permuted order to items.

        Args:
            indices: Integers in [0, size), `[n]`.

        Returns:
            The items at these positions, uint64 `[n]`.
        """
        items = self._network(indices.astype(np.uint64))
        outside = np.flatnonzero(items >= self.size)
        while len(outside):
            items[outside] = self._network(items[outside])
            outside = outside[items[outside] >= self.size]
        return items

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._bits, values & self._mask
        for key in self._keys:
            mixed = right + key
            mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _MULTIPLIERS[0]
            mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _MULTIPLIERS[1]
            left, right = right, left ^ ((mixed ^ (mixed >> _SHIFTS[2])) & self._mask)
        return (left << self._bits) | right
