"""Quantities of single query rows of attention, from their queries and probes and all keys and values.

Equations are those of parallax/reference.py. Rows are computed in pieces, so that no T x T matrix exists, and
no result is read before the end: on a GPU nothing waits.

Letters: B rows of text, N queries in each, T keys of each, H query heads, G key/value heads, M = H / G, K
head width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE_ELEMENTS = 1 << 24
"""Most elements of a matrix of weights of all heads, `[B, G, N, M, T]`: 64 MiB in fp32."""


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
    """Compute logits, -inf where a key is hidden, and weights (1), both `[B, N, M, T]`; B may be two axes."""
    scale = q_BNMK.shape[-1] ** -0.5 if scale is None else scale
    s_BNMT = torch.einsum("...nmk,...tk->...nmt", scale * q_BNMK, k_BTK)
    s_BNMT = s_BNMT.masked_fill_(~visible_BNT[..., None, :], float("-inf"))
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
    num_keys, num_kv_heads = k_BTGK.shape[1:3]

    def by_group(x_BNHK: Tensor) -> Tensor:
        return x_BNHK.unflatten(2, (num_kv_heads, -1)).transpose(1, 2)

    q_BGNMK, r_BGNMK = by_group(q_BNHK), None if r_BNHK is None else by_group(r_BNHK)
    k_BGTK, v_BGTK = (x_BTGK.transpose(1, 2).contiguous() for x_BTGK in (k_BTGK, v_BTGK))
    found = []
    for piece in pieces(query_BN, q_BNHK.shape[2] * num_keys):
        first_BN1 = first_BN[:, piece, None]
        visible_B1NT = visible_mask(first_BN[:, piece], query_BN[:, piece], num_keys)[:, None]
        r = None if r_BGNMK is None else r_BGNMK[:, :, piece]
        found.append(_of_piece(q_BGNMK[:, :, piece], r, k_BGTK, v_BGTK, visible_B1NT, first_BN1, scale))
    return {
        name: torch.cat([each[name] for each in found], 2).transpose(1, 2).flatten(2) for name in found[0]
    }


def _of_piece(
    q_BGNMK: Tensor,
    r_BGNMK: Tensor | None,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    visible_B1NT: Tensor,
    first_BN1: Tensor,
    scale: float | None,
) -> dict[str, Tensor]:
    """Compute the quantities of some queries, `[B, G, N, M]`."""
    s_BGNMT, p_BGNMT = softmax_rows(q_BGNMK, k_BGTK, visible_B1NT, scale)
    o_first = first_BN1[:, None, ..., None].expand(*p_BGNMT.shape[:4], 1)
    found = {
        "first_mass": p_BGNMT.gather(-1, o_first)[..., 0],
        "entropy": torch.special.entr(p_BGNMT).sum(-1),
        "participation": p_BGNMT.norm(dim=-1) ** -2,
        "largest_logit": s_BGNMT.amax(-1),
    }
    if r_BGNMK is None:
        return found
    del s_BGNMT
    is_hidden_B1N1T = ~visible_B1NT[..., None, :]
    t_BGNMT = torch.einsum("...nmk,...tk->...nmt", r_BGNMK, k_BGTK).masked_fill_(is_hidden_B1N1T, 0.0)
    largest_t_BGNM = t_BGNMT.norm(float("inf"), dim=-1)
    tbar_BGNM1 = torch.linalg.vecdot(p_BGNMT, t_BGNMT)[..., None]
    vbar_BGNMK = torch.einsum("...nmt,...tk->...nmk", p_BGNMT, v_BGTK)
    # (4); the second term is what rounding leaves of sum_j p_ij (t_ij - tbar_i) = 0
    d_BGNMT = t_BGNMT.sub_(tbar_BGNM1).mul_(p_BGNMT)
    dv_BGNMK = torch.einsum("...nmt,...tk->...nmk", d_BGNMT, v_BGTK)
    correction_BGNMK = dv_BGNMK - d_BGNMT.sum(-1, keepdim=True) * vbar_BGNMK
    # 0 where a key is hidden; the largest is above 0, since a row's sum is 1
    w_BGNMT = p_BGNMT.sub_(d_BGNMT)
    largest_w_BGNM = w_BGNMT.amax(-1)
    num_keys_B1N1 = visible_B1NT.sum(-1)[..., None].to(w_BGNMT.dtype)
    return found | {
        "correction_ratio": correction_BGNMK.norm(dim=-1) / vbar_BGNMK.norm(dim=-1),
        "probe_norm": r_BGNMK.norm(dim=-1),
        "combined_first_mass": w_BGNMT.gather(-1, o_first)[..., 0],
        "negative_share": (w_BGNMT < 0).sum(-1) / num_keys_B1N1,
        "smallest_weight": w_BGNMT.masked_fill_(is_hidden_B1N1T, float("inf")).amin(-1),
        "largest_weight": largest_w_BGNM,
        "largest_probe_score": largest_t_BGNM,
    }
