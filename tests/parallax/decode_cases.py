"""KV caches for the tests of decoding, with the expected output."""

from dataclasses import dataclass

import torch
from torch import Tensor

from parallax.reference import parallax_reference


@dataclass(frozen=True)
class DecodeCase:
    """Sizes of one test; lengths include the new tokens, page_size is None for a contiguous cache."""

    name: str
    lengths: tuple[int, ...]
    num_new: int = 1
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    window_size: int | None = None
    page_size: int | None = None
    key_offset: float = 0.0


CASES = [
    DecodeCase("one_key", (1,)),
    DecodeCase("lengths", (1, 5, 64, 130)),
    DecodeCase("mha", (33, 70), num_kv_heads=4),
    DecodeCase("group_of_16", (100,), num_heads=16, num_kv_heads=1),
    DecodeCase("three_new_tokens", (3, 70), num_new=3),
    DecodeCase("eight_new_tokens_group_4", (8, 90), num_new=8, num_heads=8),
    DecodeCase("window", (1, 19, 20, 21, 150), window_size=20),
    DecodeCase("window_new_tokens", (4, 22, 150), num_new=4, window_size=5),
    DecodeCase("pages", (1, 16, 17, 130), page_size=16),
    DecodeCase("odd_pages_window", (40, 99), page_size=7, window_size=30, num_new=2),
    DecodeCase("offset_keys", (140,), key_offset=3.0),
]


@dataclass(frozen=True)
class DecodeInputs:
    """A KV cache whose unused part is NaN, its new tokens, and the expected output."""

    q: Tensor
    r: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor
    page_table: Tensor | None
    window_size: int | None
    expected: Tensor
    expected_softmax: Tensor


def make_inputs(case: DecodeCase, dtype: torch.dtype, device: str = "cpu", spare: int = 40) -> DecodeInputs:
    """Draw q, r, k, v of whole sequences, store k and v in a cache, and compute the output in fp64."""
    generator = torch.Generator().manual_seed(len(case.lengths) + 100 * case.num_new)
    batch, capacity = len(case.lengths), max(case.lengths) + spare
    shape = (case.num_kv_heads, case.head_dim)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    q, r = (draw(batch, case.num_new, case.num_heads, case.head_dim) for _ in range(2))
    k_cache, v_cache = (torch.full((batch, capacity, *shape), torch.nan, dtype=dtype) for _ in range(2))
    expected = []
    for row, length in enumerate(case.lengths):
        k, v = draw(1, length, *shape), draw(1, length, *shape)
        k = k + case.key_offset * draw(*shape)
        k_cache[row, :length], v_cache[row, :length] = k[0], v[0]
        k, v = k.double().to(device), v.double().to(device)
        padded = [torch.zeros(1, length, *q.shape[2:], dtype=torch.float64, device=device) for _ in range(2)]
        for x, new in zip(padded, (q, r), strict=True):
            x[0, length - case.num_new :] = new[row].double()
        expected.append(
            [
                parallax_reference(padded[0], probe, k.double(), v.double(), window_size=case.window_size)[
                    0, length - case.num_new :
                ]
                for probe in (padded[1], torch.zeros_like(padded[1]))
            ]
        )
    page_table = None
    if case.page_size is not None:
        k_cache, v_cache, page_table = _paged(k_cache, v_cache, case.page_size, generator)
    full, softmax = (torch.stack(rows) for rows in zip(*expected, strict=True))
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    q, r, k_cache, v_cache, full, softmax = (x.to(device) for x in (q, r, k_cache, v_cache, full, softmax))
    page_table = None if page_table is None else page_table.to(device)
    return DecodeInputs(q, r, k_cache, v_cache, lengths, page_table, case.window_size, full, softmax)


def _paged(
    k_cache: Tensor, v_cache: Tensor, page_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Convert caches to pages in random order, with some unused pages."""
    batch, capacity = k_cache.shape[:2]
    num_pages = -(-capacity // page_size)
    order = torch.randperm(batch * num_pages + 3, generator=generator)[: batch * num_pages]
    page_table = order.view(batch, num_pages).to(torch.int32)
    paged = []
    for cache in (k_cache, v_cache):
        padding = torch.full((batch, num_pages * page_size - capacity, *cache.shape[2:]), torch.nan)
        rows = torch.cat((cache, padding.to(cache.dtype)), 1)
        pages = torch.full((batch * num_pages + 3, page_size, *cache.shape[2:]), torch.nan, dtype=cache.dtype)
        pages[order] = rows.reshape(batch * num_pages, page_size, *cache.shape[2:])
        paged.append(pages)
    return paged[0], paged[1], page_table
