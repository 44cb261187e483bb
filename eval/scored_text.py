"""Documents to score: which of their tokens are predicted, and the windows that predict them."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from config import from_table
from data.config import LeafSource, MixtureSource, Source, Split
from data.sources.base import DocumentSource, Row, batches
from data.tokenizer import Tokenizer
from errors import UnsupportedError, UserError
from eval.scoring.groups import Group, Tokens
from eval.scoring.scorer import windows

Mode: TypeAlias = Literal["documents", "wikitext", "last-word"]
"""Which tokens of a document are predicted; `python -m eval.perplexity --help` explains each mode."""

# tokenized at once
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 18


class ScoredText(NamedTuple):
    """A document, its tokens from one index on predicted.

    Attributes:
        tokens: Token ids.
        first_predicted: Index of the first predicted token; earlier ones are context.
        num_end_tokens: End-of-document tokens at the end, 0 or 1: predicted, but not text.
        num_bytes: UTF-8 bytes of the predicted text.
        num_words: Words of the predicted text; 0 where words are not counted.
    """

    tokens: list[int]
    first_predicted: int
    num_end_tokens: int
    num_bytes: int
    num_words: int


class Window(NamedTuple):
    """A context and the one continuation to score after it.

    Attributes:
        group: The two.
        num_end_tokens: End-of-document tokens at the end of the continuation, 0 or 1.
    """

    group: Group
    num_end_tokens: int


def read_texts(source: DocumentSource, tokenizer: Tokenizer, mode: Mode) -> Iterator[ScoredText]:
    """Read and tokenize the documents of a source.

    Args:
        source: The documents.
        tokenizer: The model's tokenizer.
        mode: Which tokens are predicted.

    Raises:
        UserError: A document does not fit the mode, or the source is damaged.
    """
    rows = (row for row in source.read(repeat=False) if row.skipped is None)
    for batch in batches(rows, _BATCH_DOCUMENTS, _BATCH_CHARACTERS):
        yield from _encode(batch, tokenizer, mode)


def windows_of(text: ScoredText, max_length: int, stride: int | None) -> Iterator[Window]:
    """Cut a document into windows that fit into the model.

    Args:
        text: The document.
        max_length: As for eval.scoring.scorer.windows.
        stride: As for eval.scoring.scorer.windows.

    Raises:
        UserError: The stride is not from 1 to max_length.
    """
    tokens: Tokens = tuple(text.tokens)
    bounds = windows(len(tokens), max_length, stride, first_predicted=text.first_predicted)
    for start, predicted, end in bounds:
        group = Group(tokens[start:predicted], (tokens[predicted:end],))
        yield Window(group, text.num_end_tokens if end == len(tokens) else 0)


def held_out_source(data: dict[str, Any]) -> tuple[Source, Split]:
    """Decode the source of a run's held-out documents.

    Args:
        data: The run's saved [data] table.

    Raises:
        UserError: The run has none, or one that this version of the code does not have.
    """
    where = "the run's config.toml"
    schema = LeafSource | MixtureSource | None
    source = from_table(schema, data.get("validation", "none"), where, "data.validation")
    if source is None:
        raise UserError("the run has no data.validation: name a text, as --files 'corpus/*.parquet'")
    return source, from_table(Split, data["validation_documents"], where, "data.validation_documents")


def _encode(batch: Sequence[Row], tokenizer: Tokenizer, mode: Mode) -> Iterator[ScoredText]:
    # documents as in training; the other modes score task text as the harness does
    encode = tokenizer.encode_batch if mode == "documents" else tokenizer.encode_prompts
    encoded = iter(encode([row.text for row in batch if row.text is not None]))
    for row in batch:
        if row.text is None:
            assert row.tokens is not None
            if mode != "documents":
                raise UnsupportedError(
                    f"--as {mode} needs text, but shards hold tokens; --as documents works"
                )
            yield _document(tokenizer, [int(token) for token in row.tokens[:]])
        elif mode == "documents":
            yield _document(tokenizer, [*next(encoded), tokenizer.end_of_document_id])
        elif mode == "wikitext":
            yield _wikitext(tokenizer, row.text, next(encoded))
        else:
            yield _last_word(tokenizer, row.text, next(encoded))


def _document(tokenizer: Tokenizer, tokens: list[int]) -> ScoredText:
    """Predict all tokens but the first; the last is the end-of-document token."""
    # not the bytes of tokens[1:-1] decoded: a character may begin in the first token and end in a later one
    num_bytes = len(tokenizer.decode(tokens[:-1]).encode()) - tokenizer.num_bytes(tokens[0])
    return ScoredText(tokens, first_predicted=1, num_end_tokens=1, num_bytes=num_bytes, num_words=0)


def _wikitext(tokenizer: Tokenizer, text: str, ids: list[int]) -> ScoredText:
    """Predict all tokens, after an end-of-document token."""
    tokens, num_bytes = [tokenizer.end_of_document_id, *ids], len(text.encode())
    # the harness's own count of words
    num_words = len(re.split(r"\s+", text))
    return ScoredText(tokens, first_predicted=1, num_end_tokens=0, num_bytes=num_bytes, num_words=num_words)


def _last_word(tokenizer: Tokenizer, text: str, ids: list[int]) -> ScoredText:
    """Predict the tokens after the last space."""
    context, space, word = text.rpartition(" ")
    if not context:
        raise UserError(f"a document is {text[:40]!r}: last-word mode needs a space with text before it")
    first, num_bytes = len(tokenizer.encode_prompts([context])[0]), len((space + word).encode())
    return ScoredText(ids, first_predicted=first, num_end_tokens=0, num_bytes=num_bytes, num_words=1)
