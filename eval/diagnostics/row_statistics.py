"""Quantities of single query rows of attention, from their queries and probes and all keys and values.

Equations are those of parallax/reference.py. Rows are computed one key/value head at a time, and in pieces,
so that no T x T matrix exists.

Letters: B rows of text, N queries in each, T keys of each, H query heads, G key/value heads, M = H / G, K
head width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE_ELEMENTS = 1 << 23
"""Most elements of a matrix of weights `[B, N, M, T]`: 32 MiB in fp32."""


def visible_mask(first_BN: Tensor, query_BN: Tensor, num_keys: int) -> Tensor:
    """Return which keys the queries see: those from first to the query itself, bool `[B, N, T]`."""
    key_T = torch.arange(num_keys, device=query_BN.device)
    return (key_T >= first_BN[..., None]) & (key_T <= query_BN[..., None])


def pieces(query_BN: Tensor, num_elements_per_query: int) -> Iterator[slice]:
    """Cut the queries of all rows into pieces of at most PIECE_ELEMENTS elements.

    Args:
        query_BN: Positions of the queries.
        num_elements_per_query: Elements that each query needs.
    """
    num_rows, num_queries = query_BN.shape
    size = max(1, PIECE_ELEMENTS // (num_rows * num_elements_per_query))
    return (slice(start, start + size) for start in range(0, num_queries, size))


def softmax_rows(
    q_BNMK: Tensor, k_BTK: Tensor, visible_BNT: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Compute logits, -inf where a key is hidden, and weights (1), both `[B, N, M, T]`."""
    scale = q_BNMK.shape[-1] ** -0.5 if scale is None else scale
    s_BNMT = scale * torch.einsum("bnmk,btk->bnmt", q_BNMK, k_BTK)
    s_BNMT = s_BNMT.masked_fill(~visible_BNT[:, :, None], float("-inf"))
    return s_BNMT, s_BNMT.softmax(-1)


def row_statistics(
    q_BNHK: Tensor,
    r_BNHK: Tensor | None,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    query_BN: Tensor,
    first_BN: Tensor,
    *,
    scale: float | None = None,
) -> dict[str, Tensor]:
    """Compute the quantities of query rows, in the dtype of the inputs.

    Args:
        q_BNHK: Queries.
        r_BNHK: Probes, or None for softmax attention.
        k_BTGK: Keys; query head h reads key/value head h // M.
        v_BTGK: Values.
        query_BN: Position of each query among the keys, int64.
        first_BN: Position of the first key that it sees, int64; it sees all from there to its own.
        scale: Factor of q.k alone; None for 1 / sqrt(K).

    Returns:
        Name -> `[B, N, H]`. Of the base softmax p: first_mass (p of the first visible key), entropy (nats),
        participation (1 / sum p^2) and largest_logit (of scale q.k, which is not bounded by the sample's
        other rows). With probes: correction_ratio (|Sigma r| / |vbar|), probe_norm (|r|), of the combined
        weights w combined_first_mass, negative_share (of the visible keys), smallest_weight and
        largest_weight, and largest_probe_score (largest |t|).
    """
    num_groups = q_BNHK.shape[2] // k_BTGK.shape[2]
    heads = []
    for head in range(k_BTGK.shape[2]):
        own = slice(head * num_groups, (head + 1) * num_groups)
        found = []
        for piece in pieces(query_BN, num_groups * k_BTGK.shape[1]):
            visible_BNT = visible_mask(first_BN[:, piece], query_BN[:, piece], k_BTGK.shape[1])
            r_BNMK = None if r_BNHK is None else r_BNHK[:, piece, own]
            q_BNMK, k_BTK, v_BTK = q_BNHK[:, piece, own], k_BTGK[:, :, head], v_BTGK[:, :, head]
            found.append(_of_head(q_BNMK, r_BNMK, k_BTK, v_BTK, visible_BNT, first_BN[:, piece], scale))
        heads.append({name: torch.cat([each[name] for each in found], 1) for name in found[0]})
    return {name: torch.cat([each[name] for each in heads], 2) for name in heads[0]}


def _of_head(
    q_BNMK: Tensor,
    r_BNMK: Tensor | None,
    k_BTK: Tensor,
    v_BTK: Tensor,
    visible_BNT: Tensor,
    first_BN: Tensor,
    scale: float | None,
) -> dict[str, Tensor]:
    """Compute the quantities of one key/value head's query heads, `[B, N, M]`."""
    s_BNMT, p_BNMT = softmax_rows(q_BNMK, k_BTK, visible_BNT, scale)
    o_first = first_BN[:, :, None, None].expand(*p_BNMT.shape[:3], 1)
    found = {
        "first_mass": p_BNMT.gather(-1, o_first)[..., 0],
        "entropy": torch.special.entr(p_BNMT).sum(-1),
        "participation": 1 / p_BNMT.square().sum(-1),
        "largest_logit": s_BNMT.amax(-1),
    }
    if r_BNMK is None:
        return found
    visible_BN1T = visible_BNT[:, :, None]
    t_BNMT = torch.einsum("bnmk,btk->bnmt", r_BNMK, k_BTK).masked_fill(~visible_BN1T, 0.0)
    tbar_BNM1 = (p_BNMT * t_BNMT).sum(-1, keepdim=True)
    vbar_BNMK = torch.einsum("bnmt,btk->bnmk", p_BNMT, v_BTK)
    # (4); the second term is what rounding leaves of sum_j p_ij (t_ij - tbar_i) = 0
    d_BNMT = p_BNMT * (t_BNMT - tbar_BNM1)
    correction_BNMK = torch.einsum("bnmt,btk->bnmk", d_BNMT, v_BTK) - d_BNMT.sum(-1, keepdim=True) * vbar_BNMK
    w_BNMT = p_BNMT - d_BNMT
    is_negative = (w_BNMT < 0) & visible_BN1T
    return found | {
        "correction_ratio": correction_BNMK.norm(dim=-1) / vbar_BNMK.norm(dim=-1),
        "probe_norm": r_BNMK.norm(dim=-1),
        "combined_first_mass": w_BNMT.gather(-1, o_first)[..., 0],
        "negative_share": is_negative.sum(-1) / visible_BN1T.sum(-1).to(w_BNMT.dtype),
        "smallest_weight": w_BNMT.masked_fill(~visible_BN1T, float("inf")).amin(-1),
        "largest_weight": w_BNMT.masked_fill(~visible_BN1T, float("-inf")).amax(-1),
        "largest_probe_score": t_BNMT.abs().amax(-1),
    }
