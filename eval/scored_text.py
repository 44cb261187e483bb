"""Documents to score: which of their tokens are predicted, and the windows that predict them."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from config import from_table
from data.config import LeafSource, MixtureSource, Source, Split
from data.sources.base import DocumentSource, Position, Row, batches
from data.tokenizer import Tokenizer
from errors import UnsupportedError, UserError
from eval.scoring.groups import Group, Tokens
from eval.scoring.requests import continuation_start
from eval.scoring.scorer import windows

Mode: TypeAlias = Literal["documents", "wikitext", "last-word"]
"""Which tokens of a document are predicted; `python -m eval.perplexity --help` explains each mode."""


class ScoredText(NamedTuple):
    """A document, its tokens from one index on predicted.

    Attributes:
        next_position: Position in the source after it.
        tokens: Token ids.
        first_predicted: Index of the first predicted token; earlier ones are context.
        num_end_tokens: End-of-document tokens at the end, 0 or 1: predicted, but not text.
        num_bytes: UTF-8 bytes of the predicted text.
        num_words: Words of the predicted text; 0 where words are not counted.
        is_decoded: Whether only the tokens are known: the bytes are of the text that they decode to.
    """

    next_position: Position
    tokens: list[int]
    first_predicted: int
    num_end_tokens: int
    num_bytes: int
    num_words: int
    is_decoded: bool = False


class Window(NamedTuple):
    """A context and the one continuation to score after it.

    Attributes:
        group: The two.
        num_end_tokens: End-of-document tokens at the end of the continuation, 0 or 1.
    """

    group: Group
    num_end_tokens: int


def read_texts(
    source: DocumentSource, tokenizer: Tokenizer, mode: Mode, skipped: Counter[str]
) -> Iterator[ScoredText]:
    """Read and tokenize the documents of a source.

    Args:
        source: The documents.
        tokenizer: The model's tokenizer.
        mode: Which tokens are predicted.
        skipped: Counts what is left out, by reason: those of the source, "no_token" where nothing is
            predicted, "one_word" where no word precedes the last one.

    Raises:
        UserError: The documents do not fit the mode, or the source is damaged.
    """
    for batch in batches(source.read(repeat=False)):
        texts = _encode([row for row in batch if row.skipped is None], tokenizer, mode)
        for row in batch:
            if row.skipped is not None:
                skipped[row.skipped] += 1
                continue
            text = next(texts)
            if text is None:
                skipped["one_word"] += 1
            elif len(text.tokens) <= text.first_predicted:
                skipped["no_token"] += 1
            else:
                yield text


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


def _encode(rows: Sequence[Row], tokenizer: Tokenizer, mode: Mode) -> Iterator[ScoredText | None]:
    if mode != "documents" and any(row.text is None for row in rows):
        raise UnsupportedError(f"--as {mode} needs text, but shards hold tokens; --as documents works")
    texts = [row.text for row in rows if row.text is not None]
    if mode == "last-word":
        yield from _last_words(tokenizer, rows, [text.rstrip() for text in texts])
        return
    # documents as in training; the other modes score task text as the harness does
    encode = tokenizer.encode_batch if mode == "documents" else tokenizer.encode_prompts
    encoded = iter(encode(texts))
    for row in rows:
        if row.text is None:
            assert row.tokens is not None
            yield _shard_document(tokenizer, row.next_position, [int(token) for token in row.tokens[:]])
        elif mode == "documents":
            yield _document(tokenizer, row.next_position, row.text, next(encoded))
        else:
            yield _wikitext(tokenizer, row.next_position, row.text, next(encoded))


def _document(tokenizer: Tokenizer, position: Position, text: str, ids: list[int]) -> ScoredText:
    """Predict all tokens but the first, and the end-of-document token."""
    if not ids:
        return ScoredText(position, [tokenizer.end_of_document_id], 1, 1, 0, 0)
    num_bytes = len(text.encode()) - tokenizer.num_first_bytes(text, ids[0])
    return ScoredText(position, [*ids, tokenizer.end_of_document_id], 1, 1, num_bytes, 0)


def _shard_document(tokenizer: Tokenizer, position: Position, tokens: list[int]) -> ScoredText:
    """Predict all tokens but the first; the last is the end-of-document token."""
    # not the bytes of tokens[1:-1] decoded: a character may begin in the first token and end in a later one
    num_bytes = len(tokenizer.decode(tokens[:-1]).encode()) - tokenizer.num_bytes(tokens[0])
    return ScoredText(position, tokens, 1, 1, num_bytes, 0, is_decoded=True)


def _wikitext(tokenizer: Tokenizer, position: Position, text: str, ids: list[int]) -> ScoredText:
    """Predict all tokens, after an end-of-document token."""
    # the harness's own count of words
    num_words = len(re.split(r"\s+", text))
    tokens = [tokenizer.end_of_document_id, *ids]
    return ScoredText(position, tokens, 1, 0, len(text.encode()), num_words)


def _last_words(
    tokenizer: Tokenizer, rows: Sequence[Row], texts: Sequence[str]
) -> Iterator[ScoredText | None]:
    """Predict the tokens after the last white space; None where no word precedes it."""
    # without the white space before the last word
    contexts = ["".join(text.rsplit(maxsplit=1)[:-1]) for text in texts]
    encoded = tokenizer.encode_prompts([*texts, *contexts])
    for row, text, context, ids, context_ids in zip(
        rows, texts, contexts, encoded[: len(texts)], encoded[len(texts) :], strict=True
    ):
        if not context:
            yield None
            continue
        # a context within the first token is all predicted, after an end-of-document token
        first = continuation_start(context_ids, ids)
        tokens = ids if first else [tokenizer.end_of_document_id, *ids]
        num_bytes = len(text[len(context) :].encode())
        yield ScoredText(row.next_position, tokens, first or 1, 0, num_bytes, 1)
