"""Loss of a model on text: sums over documents, and perplexities and bits per byte from them."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from data.sources.base import DocumentSource
from data.tokenizer import Tokenizer
from errors import UserError
from eval.distributed import rank_and_world_size
from eval.held_out import format_loss, perplexity
from eval.scored_text import Mode, Window, read_texts, windows_of
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
        bits_per_byte: Loss of the predicted tokens that are text, in bits per byte of their UTF-8.
        word_perplexity: exp of the loss per word (words are separated by white space; the last word alone in
            last-word mode); None in documents mode, where the first token is not predicted.
        last_word_accuracy: Share of documents whose last word is the greedy continuation, in last-word mode;
            None in others.
        per_position: Loss by context length. Only long documents have long contexts.
    """

    num_documents: int
    num_tokens: int
    loss: float
    standard_error: float | None
    perplexity: float
    bits_per_byte: float
    word_perplexity: float | None
    last_word_accuracy: float | None
    per_position: list[PositionLoss]


class _LossSums:
    """Sums over predicted tokens.

    Attributes:
        num_bytes: UTF-8 bytes of the predicted text.
        num_words: Words of the predicted text.
        text_nats: Loss of the predicted text in nats, without end-of-document tokens.
        nats: Loss of all predicted tokens in nats, by context length.
        counts: Number of all predicted tokens, by context length.
        document_nats: Loss of all predicted tokens in nats, by document.
        document_tokens: Number of all predicted tokens, by document.
        not_greedy: Documents with a predicted token that is not greedy.
    """

    def __init__(self, max_length: int) -> None:
        self.num_bytes = self.num_words = 0
        self.text_nats = 0.0
        self.nats = np.zeros(max_length + 1)
        self.counts = np.zeros(max_length + 1, dtype=np.int64)
        self.document_nats: list[float] = []
        self.document_tokens: list[int] = []
        self.not_greedy: set[int] = set()

    def add_document(self) -> int:
        """Add a document with at least one predicted token, and return its number."""
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
        self.nats[first : first + len(nats)] += nats
        self.counts[first : first + len(nats)] += 1
        self.document_nats[document] += float(nats.sum())
        self.document_tokens[document] += len(nats)
        self.text_nats += float(nats[: len(nats) - window.num_end_tokens].sum())
        if not all(scores.greedy):
            self.not_greedy.add(document)

    def result(self, mode: Mode) -> TextLoss:
        """Compute the means.

        Raises:
            UserError: No token was predicted.
        """
        num_tokens = int(self.counts.sum())
        if not num_tokens:
            raise UserError("the text has no token to predict; give a longer one")
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
            bits_per_byte=self.text_nats / math.log(2) / max(self.num_bytes, 1),
            word_perplexity=perplexity(self.text_nats / self.num_words) if self.num_words else None,
            last_word_accuracy=accuracy if mode == "last-word" else None,
            per_position=self._per_position(),
        )

    def _per_position(self) -> list[PositionLoss]:
        """Average over bins of context lengths that grow by a constant factor."""
        edges = [round(2 ** (n / _BINS_PER_OCTAVE)) for n in range(_BINS_PER_OCTAVE * 40)]
        edges = [edge for edge in dict.fromkeys(edges) if edge < len(self.counts)] + [len(self.counts)]
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
    token_budget: int = 65536,
) -> TextLoss:
    """Compute the loss of a model on documents; a collective in which each rank scores its share of batches.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        source: The documents, the same on all ranks.
        mode: Which tokens are predicted.
        stride: As for eval.scoring.scorer.windows.
        token_budget: Most tokens per batch.

    Raises:
        UserError: There is no token to predict, the stride does not fit the model, or the source is damaged.
    """
    sums = _LossSums(model.max_length)
    pending: list[tuple[Window, int]] = []
    num_pending = 0
    max_pending = token_budget * _SORTED_BATCHES * rank_and_world_size()[1]

    def score_pending() -> None:
        for found, _ in score_groups(model, [window.group for window, _ in pending], token_budget):
            for index, (scores,) in found:
                window, document = pending[index]
                sums.add(window, scores, document)
        pending.clear()

    for text in read_texts(source, tokenizer, mode):
        if len(text.tokens) <= text.first_predicted:
            continue
        number = sums.add_document()
        sums.num_bytes += text.num_bytes
        sums.num_words += text.num_words
        for window in windows_of(text, model.max_length, stride):
            pending.append((window, number))
            num_pending += len(window.group.context) + len(window.group.continuations[0])
            if num_pending > max_pending:
                score_pending()
                num_pending = 0
    score_pending()
    return sums.result(mode)


def format_result(result: TextLoss) -> str:
    """Format a result in a few lines."""
    loss = format_loss(result.loss, result.standard_error)
    lines = [
        f"{loss}, perplexity {result.perplexity:.3f}, {result.bits_per_byte:.4f} "
        f"bits/byte ({result.num_tokens:,} tokens of {result.num_documents:,} documents)"
    ]
    if result.word_perplexity is not None:
        lines.append(f"word perplexity {result.word_perplexity:.3f}")
    if result.last_word_accuracy is not None:
        lines.append(f"last-word accuracy {result.last_word_accuracy:.4f}")
    lines.append("loss by context length in tokens:")
    lines += [f"  {each.first:6}-{each.last:<6} {each.loss:8.4f}" for each in result.per_position]
    return "\n".join(lines)
