"""Sampled query rows: a fixed batch of held-out text, and queries drawn from it by a fixed seed.

The batch holds consecutive rows of held-out documents (data/loading/held_out.py). Queries are drawn without
replacement, all equally likely, from the tokens that predict one. Everything is the same on any number of
ranks, and for all runs on the same held-out documents, tokenizer and length.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.loading.held_out import HeldOutBatch, HeldOutLoader
from data.sources.base import DocumentSource
from data.tokenizer import Tokenizer
from errors import UserError
from tokens import IGNORE_INDEX

SEED = 0
NUM_QUERIES = 256
MAX_TOKENS = 16384
"""Most tokens of the batch, unless a single row has more."""


class VisibleKeys(NamedTuple):
    """Which keys of its row each query sees: those from first to the query itself.

    Attributes:
        first_BN: Position of the first visible key, int64.
        is_document_start_BN: Whether that key is the first token of its document. Not where the row begins in
            the middle of the document, nor where a sliding window hides its first token.
    """

    first_BN: Tensor
    is_document_start_BN: Tensor


@dataclass(frozen=True, kw_only=True)
class QuerySample:
    """Held-out rows, and queries in them: N per row, where rows with fewer repeat one.

    Attributes:
        tokens_BT: Token ids, int64.
        cu_seqlens: Document bounds of the flattened rows `[n + 1]`, int32; those of the rows where documents
            are not masked.
        query_BN: Position of each query in its row, int64, ascending.
        is_sampled_BN: False for repetitions.
        start_BN: Position of the first token of the query's document in its row, int64.
        is_whole_BN: Whether that token is the first of the document.
        num_candidates: Number of tokens from which the queries were drawn.
    """

    tokens_BT: Tensor
    cu_seqlens: Tensor
    query_BN: Tensor
    is_sampled_BN: Tensor
    start_BN: Tensor
    is_whole_BN: Tensor
    num_candidates: int

    @property
    def num_queries(self) -> int:
        """Number of sampled queries, without repetitions."""
        return int(self.is_sampled_BN.sum())

    @property
    def context_lengths(self) -> Tensor:
        """Number of tokens of its document up to each sampled query, its own included, int64."""
        return (self.query_BN - self.start_BN + 1)[self.is_sampled_BN]

    def visible_keys(self, window_size: int | None) -> VisibleKeys:
        """Return which keys each query sees.

        Args:
            window_size: Number of newest keys that a query sees, its own included; None for all.
        """
        if window_size is None:
            return VisibleKeys(self.start_BN, self.is_whole_BN)
        first_BN = torch.maximum(self.start_BN, self.query_BN - window_size + 1)
        return VisibleKeys(first_BN, self.is_whole_BN & (first_BN == self.start_BN))

    def to(self, device: torch.device) -> "QuerySample":
        """Return the sample with its tensors on a device."""
        return replace(self, **{k: x.to(device) for k, x in vars(self).items() if isinstance(x, Tensor)})

    def facts(self) -> dict[str, Any]:
        """Return what is on record of the sample: its size, the drawn positions, and a hash of the text."""
        row_R, column_R = self.is_sampled_BN.nonzero(as_tuple=True)
        seq_len = self.tokens_BT.shape[1]
        positions = row_R * seq_len + self.query_BN[row_R, column_R]
        return {
            "num_rows": self.tokens_BT.shape[0],
            "row_length": seq_len,
            "tokens_sha256": hashlib.sha256(self.tokens_BT.cpu().numpy().tobytes()).hexdigest()[:16],
            "seed": SEED,
            "num_queries": self.num_queries,
            "num_candidates": self.num_candidates,
            "positions": "all" if self.num_queries == self.num_candidates else positions.tolist(),
        }


def num_rows(seq_len: int, tokens_per_step: int) -> int:
    """Return the number of rows of the batch: MAX_TOKENS in all, and not more than a step trains on."""
    return max(1, min(MAX_TOKENS, tokens_per_step) // seq_len)


def read_batch(
    source: DocumentSource, tokenizer: Tokenizer, *, seq_len: int, num_rows: int, mask_documents: bool
) -> HeldOutBatch:
    """Read the first rows of held-out documents.

    Args:
        source: The documents.
        tokenizer: Tokenizes text.
        seq_len: Tokens per row, T.
        num_rows: Number of rows B; the last ones are padding if there is less text.
        mask_documents: Whether a token attends only to its own document.

    Raises:
        UserError: There is no text, or the source is damaged.
    """
    loader = HeldOutLoader(
        source, tokenizer, seq_len=seq_len, local_batch_size=num_rows, mask_documents=mask_documents
    )
    batch = next(iter(loader), None)
    if batch is None or not (batch.labels != IGNORE_INDEX).any():
        raise UserError("the held-out text has no token to predict; give data.validation a longer text")
    return batch


def draw_queries(batch: HeldOutBatch, seq_len: int, *, num_queries: int | None = NUM_QUERIES) -> QuerySample:
    """Draw query rows from a batch.

    Args:
        batch: From read_batch: consecutive rows from the first document on.
        seq_len: Tokens per row, T.
        num_queries: Number of queries to draw; None for all tokens that predict one.
    """
    labels_BT = batch.labels.reshape(-1, seq_len)
    num_tokens = labels_BT.numel()
    candidates = (labels_BT.flatten() != IGNORE_INDEX).nonzero().flatten()
    drawn = candidates
    if num_queries is not None and num_queries < len(candidates):
        generator = torch.Generator().manual_seed(SEED)
        drawn = candidates[torch.randperm(len(candidates), generator=generator)[:num_queries]].sort().values
    cu_seqlens = batch.inputs.get("cu_seqlens")
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, num_tokens + 1, seq_len, dtype=torch.int32)
    # the label at token n of the stream is token n + 1, and the numbers of documents begin at 0
    document = torch.cat((torch.zeros(1, dtype=torch.int64), batch.documents.flatten()[:-1]))
    start = cu_seqlens.long()[torch.searchsorted(cu_seqlens.long(), drawn, right=True) - 1]
    is_whole = (start == 0) | (document[start] != document[start - 1])

    row = drawn // seq_len
    counts_B = torch.bincount(row, minlength=len(labels_BT))
    column = torch.arange(len(drawn)) - (counts_B.cumsum(0) - counts_B)[row]
    is_sampled_BN = torch.arange(int(counts_B.max())) < counts_B[:, None]

    def by_row(values: Tensor) -> Tensor:
        out = values.new_zeros(is_sampled_BN.shape)
        out[row, column] = values
        # a repetition has the position 0 of its row, whose only visible key is its own
        return out

    return QuerySample(
        tokens_BT=batch.inputs["input"].reshape(-1, seq_len),
        cu_seqlens=cu_seqlens,
        query_BN=by_row(drawn % seq_len),
        is_sampled_BN=is_sampled_BN,
        start_BN=by_row(start % seq_len),
        is_whole_BN=by_row(is_whole),
        num_candidates=len(candidates),
    )
