"""The KV cache of softmax, Parallax and local linear attention.

Letters as in base.py; S capacity of the cache in keys. With a sliding window S is the window's length and the
cache a ring buffer: position p overwrites position p - S, which no query sees any more. The order of keys in
the cache does not matter, since RoPE has been applied to them.
"""

from abc import abstractmethod

import torch

from models.attention.base import HeadProjections, Rope, State

_PIECE_TOKENS = 8
"""Maximum number of new tokens per sequence of a call to the decode kernels."""

_MAX_TOKENS_IN_PIECES = 64
"""Above it, one forward over past and new tokens is faster than reading the cache once per piece."""


def decode_impl(impl: str | None) -> str | None:
    """Return the implementation of `parallax_decode` for one of `parallax_attention`.

    The decode kernels serve fewer inputs than those of training: where these are asked for, None uses the
    decode kernels where they serve. Torch has none of its own.
    """
    return "eager" if impl in ("eager", "reference") else None


class KeyValueAttention(HeadProjections):
    """An attention module with a KV cache, for attention over whole documents and over the cache."""

    window_size: int | None = None

    def probe(self, x_BTD: torch.Tensor, rope: Rope) -> torch.Tensor | None:
        """Compute the probe stream r, `[B, T, H, K]`; None for an attention without one."""
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
        """Compute attention over whole documents, `[B, T, H, K]`, from projected heads.

        The other arguments as in forward.
        """

    @abstractmethod
    def attend_cached(
        self, q_BTHK: torch.Tensor, r_BTHK: torch.Tensor | None, state: State, num_keys_B: torch.Tensor
    ) -> torch.Tensor:
        """Compute attention of new tokens, whose keys are the last of num_keys_B in the KV cache.

        Args:
            q_BTHK: Queries of T new tokens of each sequence `[B, T, H, K]`.
            r_BTHK: Probes likewise, or None.
            state: From new_state: keys and values `[B, S, G, K]`.
            num_keys_B: Keys of each sequence, those of the new tokens included, int32.

        Returns:
            The heads' outputs `[B, T, H, K]` in q's dtype.
        """

    def forward(
        self, x_BTD: torch.Tensor, rope: Rope, cu_seqlens: torch.Tensor | None, max_seqlen: int
    ) -> torch.Tensor:
        """See Attention.forward."""
        q, k, v = self.project(x_BTD, rope)
        o_BTHK = self.attend(q, self.probe(x_BTD, rope), k, v, cu_seqlens, max_seqlen)
        return self.output(o_BTHK, x_BTD)

    def new_state(self, batch: int, max_seqlen: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """See Attention.new_state: keys and values `[B, S, G, K]`."""
        num_keys = max_seqlen if self.window_size is None else min(self.window_size, max_seqlen)
        shape = (batch, num_keys, self.size.num_kv_heads, self.size.head_dim)
        return {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("k", "v")}

    def prefill(
        self, x_BTD: torch.Tensor, rope: Rope, cu_seqlens: torch.Tensor, max_seqlen: int, state: State
    ) -> torch.Tensor:
        """See Attention.prefill."""
        q, k, v = self.project(x_BTD, rope)
        o_token = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        document = torch.searchsorted(cu_seqlens, o_token, right=True) - 1
        is_kept = o_token >= cu_seqlens[document + 1] - state["k"].shape[1]
        o_row, o_position = document[is_kept], (o_token - cu_seqlens[document])[is_kept]
        for name, x in (("k", k), ("v", v)):
            state[name][o_row, o_position % state[name].shape[1]] = x[0, is_kept]
        o_BTHK = self.attend(q, self.probe(x_BTD, rope), k, v, cu_seqlens, max_seqlen)
        return self.output(o_BTHK, x_BTD)

    def extend(self, x_BTD: torch.Tensor, rope: Rope, state: State, lengths_B: torch.Tensor) -> torch.Tensor:
        """See Attention.extend; more than 64 tokens at once synchronize with the device."""
        q, k, v = self.project(x_BTD, rope)
        r = self.probe(x_BTD, rope)
        num_tokens, capacity = x_BTD.shape[1], state["k"].shape[1]
        if num_tokens > _MAX_TOKENS_IN_PIECES:
            o_BTHK = self._attend_to_past_and_new(q, r, k, v, state, lengths_B)
            self._write(k[:, -capacity:], v[:, -capacity:], state, lengths_B)
            return self.output(o_BTHK, x_BTD)
        # with a window each token overwrites a key that the token before it still sees
        size = _PIECE_TOKENS if self.window_size is None else 1
        pieces = []
        for start in range(0, num_tokens, size):
            piece = slice(start, min(start + size, num_tokens))
            # the last piece, usually the only one, uses lengths_B itself, which saves a kernel
            piece_lengths_B = lengths_B if piece.stop == num_tokens else lengths_B - (num_tokens - piece.stop)
            self._write(k[:, piece], v[:, piece], state, piece_lengths_B)
            num_keys_B = piece_lengths_B if self.window_size is None else piece_lengths_B.clamp(max=capacity)
            r_piece = None if r is None else r[:, piece]
            pieces.append(self.attend_cached(q[:, piece], r_piece, state, num_keys_B))
        o_BTHK = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        return self.output(o_BTHK, x_BTD)

    def _write(
        self, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, state: State, lengths_B: torch.Tensor
    ) -> None:
        """Write keys and values to the cache, as the last tokens of sequences of lengths_B."""
        o_row = torch.arange(k_BTGK.shape[0], device=k_BTGK.device)[:, None]
        o_token = lengths_B[:, None] + torch.arange(-k_BTGK.shape[1], 0, device=k_BTGK.device)
        for name, x in (("k", k_BTGK), ("v", v_BTGK)):
            state[name].index_put_((o_row, o_token % state[name].shape[1]), x)

    def _attend_to_past_and_new(
        self,
        q_BTHK: torch.Tensor,
        r_BTHK: torch.Tensor | None,
        k_BTGK: torch.Tensor,
        v_BTGK: torch.Tensor,
        state: State,
        lengths_B: torch.Tensor,
    ) -> torch.Tensor:
        """Compute attention of new tokens by `attend` over past and new ones, packed; past queries are 0."""
        num_new, capacity = q_BTHK.shape[1], state["k"].shape[1]
        pasts = [
            torch.arange(max(0, length - capacity), length, device=q_BTHK.device) % capacity
            for length in (lengths_B - num_new).tolist()
        ]
        stops = torch.tensor([len(past) + num_new for past in pasts]).cumsum(0).tolist()

        def with_past(x_BTGK: torch.Tensor, name: str) -> torch.Tensor:
            rows = [part for row, past in enumerate(pasts) for part in (state[name][row, past], x_BTGK[row])]
            return torch.cat(rows).unsqueeze(0)

        def with_zeros_for_past(x_BTHK: torch.Tensor) -> torch.Tensor:
            out = x_BTHK.new_zeros(1, stops[-1], *x_BTHK.shape[2:])
            for row, stop in zip(x_BTHK, stops, strict=True):
                out[0, stop - num_new : stop] = row
            return out

        r = None if r_BTHK is None else with_zeros_for_past(r_BTHK)
        cu_seqlens = torch.tensor([0, *stops], device=q_BTHK.device, dtype=torch.int32)
        k, v = with_past(k_BTGK, "k"), with_past(v_BTGK, "v")
        o_BTHK = self.attend(with_zeros_for_past(q_BTHK), r, k, v, cu_seqlens, max(map(len, pasts)) + num_new)
        return torch.stack([o_BTHK[0, stop - num_new : stop] for stop in stops])

    def num_cache_elements(self, seq_len: int) -> int:
        """See Attention.num_cache_elements: keys and values, at most those of the window."""
        num_keys = seq_len if self.window_size is None else min(seq_len, self.window_size)
        return 2 * self.size.num_kv_heads * self.size.head_dim * num_keys
