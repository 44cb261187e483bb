"""Loss of a model on text: sums over documents, and perplexities and bits per byte from them."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch

from data.progress import Progress
from data.sources.base import DocumentSource
from data.tokenizer import Tokenizer
from errors import UserError
from eval.distributed import rank_and_world_size
from eval.held_out import format_loss, perplexity
from eval.scored_text import Mode, ScoredText, Window, read_texts, windows_of
from eval.scoring.groups import Scores
from eval.scoring.language_model import LanguageModel
from eval.scoring.scorer import score_groups
from eval.standard_error import ratio_standard_error

# batches per rank whose windows are sorted by length together: more fill the batches better but take memory
_SORTED_BATCHES = 16
_BINS_PER_OCTAVE = 2


@dataclass(frozen=True, kw_only=True)
class PositionLoss:
    """Loss of the tokens in a range of context lengths.

    Attributes:
        first: Smallest context length, in tokens.
        last: Largest context length, in tokens.
        num_tokens: Tokens predicted with such a context.
        loss: Their mean loss in nats/token.
    """

    first: int
    last: int
    num_tokens: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class TextLoss:
    """Loss of a model on text.

    Attributes:
        num_documents: Documents with at least one predicted token.
        num_tokens: Predicted tokens.
        loss: Their mean loss in nats/token, each token weighted equally.
        standard_error: Standard error of the loss over documents in nats/token; None for a single document.
        perplexity: exp(loss).
        bits_per_byte: Loss of the predicted tokens that are text, in bits per byte of their UTF-8; None where
            only end-of-document tokens are predicted.
        num_bytes: Those bytes.
        bytes_of: "text" for the text as written; "tokens" where shards hold only tokens, for the text that
            they decode to, which a normalizer may have changed.
        word_perplexity: exp of the loss per word (words are separated by white space; the last word alone in
            last-word mode); None in documents mode, where the first token is not predicted.
        last_word_accuracy: Share of documents whose last word is the greedy continuation, in last-word mode;
            None in others.
        num_cut_documents: Documents that do not fit into max_length: predicted in several windows, the later
            ones without what precedes the window, or, for a last word, given the end of its context alone.
        skipped: Rows of the source that are left out, by reason.
        per_position: Loss by context length. Only long documents have long contexts.
    """

    num_documents: int
    num_tokens: int
    loss: float
    standard_error: float | None
    perplexity: float
    bits_per_byte: float | None
    num_bytes: int
    bytes_of: Literal["text", "tokens"]
    word_perplexity: float | None
    last_word_accuracy: float | None
    num_cut_documents: int
    skipped: dict[str, int]
    per_position: list[PositionLoss]


class _LossSums:
    """Sums over predicted tokens.

    Attributes:
        num_bytes: UTF-8 bytes of the predicted text.
        num_words: Words of the predicted text.
        is_decoded: Whether some of the text is known by its tokens alone.
        num_cut: Documents that do not fit into max_length.
        text_nats: Loss of the predicted text in nats, without end-of-document tokens.
        nats: Loss of all predicted tokens in nats, by context length.
        counts: Number of all predicted tokens, by context length.
        document_nats: Loss of all predicted tokens in nats, by document.
        document_tokens: Number of all predicted tokens, by document.
        not_greedy: Documents with a predicted token that is not greedy.
    """

    def __init__(self, max_length: int) -> None:
        self.num_bytes = self.num_words = self.num_cut = 0
        self.is_decoded = False
        self.text_nats = 0.0
        self._max_length = max_length
        # as long as the longest context that was seen: max_length may be far above the text's
        self.nats = np.zeros(0)
        self.counts = np.zeros(0, dtype=np.int64)
        self.document_nats: list[float] = []
        self.document_tokens: list[int] = []
        self.not_greedy: set[int] = set()

    def add_document(self, text: ScoredText) -> int:
        """Add a document without its loss, and return its number."""
        self.num_bytes += text.num_bytes
        self.num_words += text.num_words
        self.is_decoded |= text.is_decoded
        # the last token is no input
        self.num_cut += len(text.tokens) > self._max_length + 1
        self.document_nats.append(0.0)
        self.document_tokens.append(0)
        return len(self.document_nats) - 1

    def add(self, window: Window, scores: Scores, document: int) -> None:
        """Add the scores of a window's continuation.

        Args:
            window: The window.
            scores: Its scores.
            document: Number of the document that the window is a part of, from 0.
        """
        nats = -np.asarray(scores.log_probs)
        first = len(window.group.context)
        end = first + len(nats)
        if end > len(self.nats):
            self.nats = np.pad(self.nats, (0, end - len(self.nats)))
            self.counts = np.pad(self.counts, (0, end - len(self.counts)))
        self.nats[first:end] += nats
        self.counts[first:end] += 1
        self.document_nats[document] += float(nats.sum())
        self.document_tokens[document] += len(nats)
        self.text_nats += float(nats[: len(nats) - window.num_end_tokens].sum())
        if not all(scores.greedy):
            self.not_greedy.add(document)

    def result(self, mode: Mode, skipped: Mapping[str, int]) -> TextLoss:
        """Compute the means.

        Args:
            mode: Which tokens were predicted.
            skipped: Rows that were left out, by reason.

        Raises:
            UserError: No token was predicted.
        """
        num_tokens = int(self.counts.sum())
        if not num_tokens:
            raise UserError(
                f"the text has no token to predict (rows skipped: {_listed(skipped)}); give a longer one"
            )
        loss = float(self.nats.sum()) / num_tokens
        num_documents = len(self.document_nats)
        accuracy = (num_documents - len(self.not_greedy)) / num_documents
        return TextLoss(
            num_documents=num_documents,
            num_tokens=num_tokens,
            loss=loss,
            standard_error=ratio_standard_error(
                torch.tensor(self.document_nats, dtype=torch.float64), torch.tensor(self.document_tokens)
            ),
            perplexity=perplexity(loss),
            bits_per_byte=self.text_nats / math.log(2) / self.num_bytes if self.num_bytes else None,
            num_bytes=self.num_bytes,
            bytes_of="tokens" if self.is_decoded else "text",
            word_perplexity=perplexity(self.text_nats / self.num_words) if self.num_words else None,
            last_word_accuracy=accuracy if mode == "last-word" else None,
            num_cut_documents=self.num_cut,
            skipped=dict(skipped),
            per_position=self._per_position(),
        )

    def _per_position(self) -> list[PositionLoss]:
        """Average over bins of context lengths that grow by a constant factor."""
        edges = [round(2 ** (n / _BINS_PER_OCTAVE)) for n in range(_BINS_PER_OCTAVE * 40)]
        end = self._max_length + 1
        edges = [edge for edge in dict.fromkeys(edges) if edge < end] + [end]
        return [
            PositionLoss(first=a, last=b - 1, num_tokens=count, loss=float(self.nats[a:b].sum()) / count)
            for a, b in pairwise(edges)
            if (count := int(self.counts[a:b].sum()))
        ]


def text_loss(
    model: LanguageModel,
    tokenizer: Tokenizer,
    source: DocumentSource,
    *,
    mode: Mode = "documents",
    stride: int | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    token_budget: int = 65536,
    progress: Progress | None = None,
) -> TextLoss:
    """Compute the loss of a model on documents; a collective in which each rank scores its share of batches.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        source: The documents, the same on all ranks.
        mode: Which tokens are predicted.
        stride: As for eval.scoring.scorer.windows.
        limit: Read only the first documents, this many; None for all.
        max_tokens: Read only the first documents that have this many predicted tokens together, the last one
            whole; None for all.
        token_budget: Most tokens per batch.
        progress: Told how much of the source is done.

    Raises:
        UserError: There is no token to predict, the stride does not fit the model, or the source is damaged.
    """
    sums, skipped = _LossSums(model.max_length), Counter[str]()
    pending: list[tuple[Window, int]] = []
    num_pending = num_tokens = 0
    fraction = done = 0.0
    max_pending = token_budget * _SORTED_BATCHES * rank_and_world_size()[1]

    def score_pending() -> None:
        nonlocal done, num_pending
        groups = [window.group for window, _ in pending]
        num_left = sum(sum(model.row_lengths(group)) for group in groups)
        num_scored = 0
        for found, num_round_tokens in score_groups(model, groups, token_budget):
            for index, (scores,) in found:
                window, document = pending[index]
                sums.add(window, scores, document)
            num_scored += num_round_tokens
            if progress is not None:
                progress.update(done + (fraction - done) * min(num_scored / num_left, 1.0))
        pending.clear()
        done, num_pending = fraction, 0

    for text in read_texts(source, tokenizer, mode, skipped):
        number = sums.add_document(text)
        num_tokens += len(text.tokens) - text.first_predicted
        for window in windows_of(text, model.max_length, stride):
            pending.append((window, number))
            num_pending += len(window.group.context) + len(window.group.continuations[0])
            if num_pending > max_pending:
                score_pending()
        fraction = max(
            source.progress(text.next_position),
            0.0 if limit is None else (number + 1) / limit,
            0.0 if max_tokens is None else min(num_tokens / max_tokens, 1.0),
        )
        if number + 1 == limit or (max_tokens is not None and num_tokens >= max_tokens):
            break
    score_pending()
    return sums.result(mode, skipped)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "none"


def format_result(result: TextLoss) -> str:
    """Format a result in a few lines."""
    loss = format_loss(result.loss, result.standard_error)
    decoded = " of the decoded tokens" if result.bytes_of == "tokens" else ""
    bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits/byte{decoded}"
    lines = [
        f"{loss}, perplexity {result.perplexity:.3f}{bits} "
        f"({result.num_tokens:,} tokens of {result.num_documents:,} documents)"
    ]
    if result.word_perplexity is not None:
        lines.append(f"word perplexity {result.word_perplexity:.3f}")
    if result.last_word_accuracy is not None:
        lines.append(f"last-word accuracy {result.last_word_accuracy:.4f}")
    if result.num_cut_documents:
        lines.append(
            f"{result.num_cut_documents:,} of {result.num_documents:,} documents are longer than max_length: "
            "tokens beyond it are predicted from the end of what precedes them"
        )
    if result.skipped:
        lines.append(f"skipped: {_listed(result.skipped)}")
    lines.append("loss by context length in tokens:")
    lines += [f"  {each.first:6}-{each.last:<6} {each.loss:8.4f}" for each in result.per_position]
    return "\n".join(lines)
