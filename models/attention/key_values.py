"""Attentions that decode from the keys and values of the past.

Letters as in base.py; S keys that a cache has room for.
"""

from abc import abstractmethod

import torch

from models.attention.base import HeadProjections, Rope, State
from parallax import parallax_decode

_PIECE_TOKENS = 8
"""New tokens of a sequence that the decode kernels take at once."""

_LONGEST_IN_PIECES = 64
"""Above it, a forward over past and new tokens together is faster than reading the cache for every piece."""


class KeyValueAttention(HeadProjections):
    """The projections, attention over whole documents, and a cache of keys and values."""

    window_size: int | None = None

    def probe(self, x_BTD: torch.Tensor, rope: Rope) -> torch.Tensor | None:
        """What the correction is evaluated at, `[B, T, H, K]`; None for attentions that have none."""
        return None

    @abstractmethod
    def attend(
        self,
        q_BTHK: torch.Tensor,
        r_BTHK: torch.Tensor | None,
        k_BTGK: torch.Tensor,
        v_BTGK: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        max_seqlen: int,
    ) -> torch.Tensor:
        """Attention over whole documents, `[B, T, H, K]`; arguments as projected, and as of forward."""

    def attend_cached(
        self, q_BTHK: torch.Tensor, r_BTHK: torch.Tensor | None, state: State, lengths_B: torch.Tensor
    ) -> torch.Tensor:
        """Attention of the T newest of lengths_B tokens, whose keys are in the state, `[B, T, H, K]`."""
        return parallax_decode(
            q_BTHK, r_BTHK, state["k"], state["v"], cache_seqlens=lengths_B, window_size=self.window_size
        )

    def forward(
        self, x_BTD: torch.Tensor, rope: Rope, cu_seqlens: torch.Tensor | None, max_seqlen: int
    ) -> torch.Tensor:
        """See Attention.forward."""
        q, k, v = self.project(x_BTD, rope)
        o_BTHK = self.attend(q, self.probe(x_BTD, rope), k, v, cu_seqlens, max_seqlen)
        return self.wo(o_BTHK.flatten(2))

    def new_state(self, batch: int, max_seqlen: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """See Attention.new_state: k and v, `[B, S, G, K]`."""
        shape = (batch, max_seqlen, self.size.num_kv_heads, self.size.head_dim)
        return {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("k", "v")}

    def prefill(
        self, x_BTD: torch.Tensor, rope: Rope, cu_seqlens: torch.Tensor, max_seqlen: int, state: State
    ) -> torch.Tensor:
        """See Attention.prefill."""
        q, k, v = self.project(x_BTD, rope)
        positions = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        document = torch.searchsorted(cu_seqlens, positions, right=True) - 1
        for name, x in (("k", k), ("v", v)):
            state[name][document, positions - cu_seqlens[document]] = x[0]
        o_BTHK = self.attend(q, self.probe(x_BTD, rope), k, v, cu_seqlens, max_seqlen)
        return self.wo(o_BTHK.flatten(2))

    def extend(self, x_BTD: torch.Tensor, rope: Rope, state: State, lengths_B: torch.Tensor) -> torch.Tensor:
        """See Attention.extend; more than 64 tokens at once wait for the device."""
        q, k, v = self.project(x_BTD, rope)
        r = self.probe(x_BTD, rope)
        batch, num_tokens = x_BTD.shape[:2]
        o_row = torch.arange(batch, device=x_BTD.device)[:, None]
        o_token = lengths_B[:, None] + torch.arange(num_tokens, device=x_BTD.device)
        for name, x in (("k", k), ("v", v)):
            state[name].index_put_((o_row, o_token), x)
        if num_tokens > _LONGEST_IN_PIECES:
            o_BTHK = self._attend_to_all(q, r, state, lengths_B)
        else:
            pieces = []
            for start in range(0, num_tokens, _PIECE_TOKENS):
                stop = min(start + _PIECE_TOKENS, num_tokens)
                r_piece = None if r is None else r[:, start:stop]
                pieces.append(self.attend_cached(q[:, start:stop], r_piece, state, lengths_B + stop))
            o_BTHK = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        return self.wo(o_BTHK.flatten(2))

    def _attend_to_all(
        self, q_BTHK: torch.Tensor, r_BTHK: torch.Tensor | None, state: State, lengths_B: torch.Tensor
    ) -> torch.Tensor:
        """The training forward over past and new tokens, packed; the past's queries are zeros."""
        num_new, lengths = q_BTHK.shape[1], (lengths_B + q_BTHK.shape[1]).tolist()
        bounds = torch.tensor([0, *lengths]).cumsum(0)

        def packed(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)]).unsqueeze(0)

        def placed(x_BTHK: torch.Tensor) -> torch.Tensor:
            out = x_BTHK.new_zeros(1, int(bounds[-1]), *x_BTHK.shape[2:])
            for row, stop in zip(x_BTHK, bounds[1:].tolist(), strict=True):
                out[0, stop - num_new : stop] = row
            return out

        r = None if r_BTHK is None else placed(r_BTHK)
        cu_seqlens = bounds.to(q_BTHK.device, torch.int32)
        o_BTHK = self.attend(
            placed(q_BTHK), r, packed(state["k"]), packed(state["v"]), cu_seqlens, max(lengths)
        )
        return torch.stack([o_BTHK[0, stop - num_new : stop] for stop in bounds[1:].tolist()])

    def num_cache_elements(self, seq_len: int) -> int:
        """See Attention.num_cache_elements: keys and values of all tokens, also with a window."""
        return 2 * self.size.num_kv_heads * self.size.head_dim * seq_len
