"""Loss of a model on text, document by document, and by how much context it saw.

    python -m eval.perplexity --checkpoint RUN [--stride N] [--as MODE] [--out DIR] [SOURCE]

SOURCE names text as `python -m data.shards prepare --help` does (`--files`, `--folder`, `--parts` ..);
without it the run's own held-out documents are read. Tokens of a document see that document only. MODE says
what of it is predicted:

    documents   all but the first token, the token that ends a document too, as in training (the default)
    wikitext    all tokens of the text, after the token that ends a document, as the harness predicts WikiText
    last-word   what follows the last space, as in LAMBADA: tokens before it are context
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from config import from_table
from data.config import LeafSource, MixtureSource, Source, Split
from data.sources.base import DocumentSource, Row, batches
from data.sources.cli import add_source_arguments, source_from
from data.sources.open import open_source
from data.tokenizer import Tokenizer
from eval.open_model import OpenedModel, add_model_arguments, open_model, ranks
from eval.scoring.groups import Group, Scores, Tokens
from eval.scoring.language_model import LanguageModel
from eval.scoring.scorer import rank_and_world_size, score_groups, windows

Mode: TypeAlias = Literal["documents", "wikitext", "last-word"]

# Batches that are sorted by length together: more of them waste less, and take more memory.
_BATCHES_AT_ONCE = 16
_DOCUMENTS_AT_ONCE = 256
_CHARACTERS_AT_ONCE = 1 << 18
_BINS_PER_OCTAVE = 2


@dataclass(frozen=True, kw_only=True)
class PositionLoss:
    """Loss where a model saw so much.

    Attributes:
        first: Fewest tokens in sight, the one that predicts included.
        last: Most tokens in sight.
        num_tokens: Tokens predicted from so many.
        loss: Their mean loss in nats/token.
    """

    first: int
    last: int
    num_tokens: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class TextLoss:
    """What a model makes of a text.

    Attributes:
        num_documents: Documents that had a token to predict.
        num_tokens: Tokens that were predicted.
        loss: Their mean loss in nats/token: every token weighs the same.
        perplexity: exp(loss).
        bits_per_byte: Loss of the tokens that are text, in bits, over their bytes of UTF-8.
        word_perplexity: exp of the loss of a text over its words (what white space separates; the last word
            alone in last-word mode); None where the first token is not predicted.
        last_word_accuracy: Share of documents whose last word is what greedy decoding gives; last-word mode
            only.
        per_position: Loss by the tokens in sight. Long contexts exist in long documents only.
    """

    num_documents: int
    num_tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float
    word_perplexity: float | None
    last_word_accuracy: float | None
    per_position: list[PositionLoss]


class _Text(NamedTuple):
    """A document's tokens: those from `predicted` on are predicted, the last `closing` of them no text."""

    tokens: list[int]
    predicted: int
    closing: int
    num_bytes: int
    num_words: int


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _document(tokenizer: Tokenizer, tokens: list[int]) -> _Text:
    """Of what training reads: tokens with the one that ends a document."""
    # the bytes of a character may begin in the first token and end in a later one
    num_bytes = len(tokenizer.decode(tokens[:-1]).encode()) - tokenizer.num_bytes(tokens[0])
    return _Text(tokens, 1, 1, num_bytes, 0)


def _wikitext(tokenizer: Tokenizer, text: str, ids: list[int]) -> _Text:
    words = len(re.split(r"\s+", text))
    return _Text([tokenizer.end_of_document_id, *ids], 1, 0, len(text.encode()), words)


def _last_word(tokenizer: Tokenizer, text: str, ids: list[int]) -> _Text:
    context, space, word = text.rpartition(" ")
    if not context:
        raise ValueError(f"a document is {text[:40]!r}: last-word mode needs a space with text before it")
    return _Text(ids, len(tokenizer.encode(context)), 0, len((space + word).encode()), 1)


def _texts(source: DocumentSource, tokenizer: Tokenizer, mode: Mode) -> Iterator[_Text]:
    rows = (row for row in source.read(repeat=False) if row.skipped is None)
    for batch in batches(rows, _DOCUMENTS_AT_ONCE, _CHARACTERS_AT_ONCE):
        yield from _encode(batch, tokenizer, mode)


def _encode(batch: Sequence[Row], tokenizer: Tokenizer, mode: Mode) -> Iterator[_Text]:
    encoded = iter(tokenizer.encode_batch([row.text for row in batch if row.text is not None]))
    for row in batch:
        if row.text is None:
            assert row.tokens is not None
            if mode != "documents":
                raise ValueError(f'shards hold no words: --as {mode} needs text, "documents" works')
            yield _document(tokenizer, [int(token) for token in row.tokens[:]])
        elif mode == "documents":
            yield _document(tokenizer, [*next(encoded), tokenizer.end_of_document_id])
        else:
            make = _wikitext if mode == "wikitext" else _last_word
            yield make(tokenizer, row.text, next(encoded))


class _Sums:
    """Sums over the tokens that were predicted; `wrong` holds documents with a token that is not greedy."""

    def __init__(self, max_length: int) -> None:
        self.num_documents = self.num_bytes = self.num_words = 0
        self.wrong: set[int] = set()
        self.text_nats = 0.0
        self.nats = np.zeros(max_length + 1)
        self.counts = np.zeros(max_length + 1, dtype=np.int64)

    def add(self, num_seen: int, scores: Scores, closing: int, document: int) -> None:
        """Add a window of a document, the first token of which was predicted from num_seen tokens."""
        nats = -np.asarray(scores.log_probs)
        self.nats[num_seen : num_seen + len(nats)] += nats
        self.counts[num_seen : num_seen + len(nats)] += 1
        self.text_nats += float(nats[: len(nats) - closing].sum())
        if not all(scores.greedy):
            self.wrong.add(document)

    def result(self, mode: Mode) -> TextLoss:
        """Means of the sums.

        Raises:
            ValueError: There is nothing to predict.
        """
        num_tokens = int(self.counts.sum())
        if not num_tokens:
            raise ValueError("the text has no token to predict; give a longer one")
        loss = float(self.nats.sum()) / num_tokens
        right = (self.num_documents - len(self.wrong)) / self.num_documents
        return TextLoss(
            num_documents=self.num_documents,
            num_tokens=num_tokens,
            loss=loss,
            perplexity=_exp(loss),
            bits_per_byte=self.text_nats / math.log(2) / max(self.num_bytes, 1),
            word_perplexity=_exp(self.text_nats / self.num_words) if self.num_words else None,
            last_word_accuracy=right if mode == "last-word" else None,
            per_position=self._per_position(),
        )

    def _per_position(self) -> list[PositionLoss]:
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
    """Evaluate a model on documents; under torch.distributed each rank takes its share of the batches.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        source: The documents, the same on every rank.
        mode: What is predicted, as the module's docstring says.
        stride: Tokens that a window predicts beyond the first window, as eval.scoring.scorer.windows.
        token_budget: Most tokens of a batch.

    Raises:
        ValueError: There is nothing to predict, the stride does not fit the model, or the source is damaged.
    """
    sums = _Sums(model.max_length)
    waiting: list[tuple[Group, int, int]] = []
    num_waiting = 0

    def flush() -> None:
        groups = [group for group, _, _ in waiting]
        for found, _ in score_groups(model, groups, token_budget):
            for index, (scores,) in found:
                group, closing, document = waiting[index]
                sums.add(len(group.context), scores, closing, document)
        waiting.clear()

    for text in _texts(source, tokenizer, mode):
        if len(text.tokens) <= text.predicted:
            continue
        sums.num_documents += 1
        sums.num_bytes += text.num_bytes
        sums.num_words += text.num_words
        for group, closing in _windows_of(text, model.max_length, stride):
            waiting.append((group, closing, sums.num_documents))
            num_waiting += len(group.context) + len(group.continuations[0])
            if num_waiting > token_budget * _BATCHES_AT_ONCE * rank_and_world_size()[1]:
                flush()
                num_waiting = 0
    flush()
    return sums.result(mode)


def _windows_of(text: _Text, max_length: int, stride: int | None) -> Iterable[tuple[Group, int]]:
    tokens: Tokens = tuple(text.tokens)
    for first, predicted, last in windows(len(tokens), max_length, stride, predicted=text.predicted):
        is_end = last == len(tokens)
        yield Group(tokens[first:predicted], (tokens[predicted:last],)), text.closing if is_end else 0


def saved_source(table: dict[str, Any]) -> tuple[Source, Split]:
    """The held-out documents of a saved run.

    Args:
        table: Its [data] table, in which "none" stands for None.

    Raises:
        ValueError: The run has none, or they are of a kind that this version does not know.
    """
    validation = table.get("validation", "none")
    if validation == "none":
        raise ValueError("the run has no data.validation: name a text, as --files 'corpus/*.parquet'")
    source = from_table(LeafSource | MixtureSource, validation, "the run's config.toml", "data.validation")
    return source, table["validation_documents"]


def plot_per_position(result: TextLoss, path: Path, title: str) -> None:
    """Draw the loss against the tokens in sight, as PNG.

    Args:
        result: From text_loss.
        path: The file.
        title: Written above.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    middles = [math.sqrt(each.first * each.last) for each in result.per_position]
    axes.plot(middles, [each.loss for each in result.per_position], marker="o", markersize=3)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens in sight", ylabel="loss, nats/token", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def format_result(result: TextLoss) -> str:
    """The result in a few lines."""
    lines = [
        f"{result.loss:.4f} nats/token, perplexity {result.perplexity:.3f}, {result.bits_per_byte:.4f} "
        f"bits/byte ({result.num_tokens:,} tokens of {result.num_documents:,} documents)"
    ]
    if result.word_perplexity is not None:
        lines.append(f"word perplexity {result.word_perplexity:.3f}")
    if result.last_word_accuracy is not None:
        lines.append(f"last word right in {result.last_word_accuracy:.4f}")
    lines.append("loss by tokens in sight:")
    lines += [f"  {each.first:6}-{each.last:<6} {each.loss:8.4f}" for each in result.per_position]
    return "\n".join(lines)


def _open_source(opened: OpenedModel, named: Source | None) -> DocumentSource:
    source, split = saved_source(opened.table["data"]) if named is None else (named, "all")
    return open_source(source, tokenizer_fingerprint=opened.tokenizer.fingerprint, split=split)


def _source_parser() -> argparse.ArgumentParser:
    """The options of SOURCE on their own: as a whole they may be missing, though one is required of them."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.perplexity", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False
    )
    add_source_arguments(parser)
    return parser


def _named_source(words: list[str]) -> Source | None:
    """The source that the words name; None without words. Exits where they are no options of a source."""
    if not words:
        return None
    parser = _source_parser()
    known = set(re.findall(r"--[a-z][a-z-]*", parser.format_help()))
    options = [word for word in words if word.startswith("-")]
    unknown = [word for word in options if word.startswith("--") and word.partition("=")[0] not in known]
    if unknown or not options:
        parser.error(f"unrecognized arguments: {' '.join(unknown or words)}")
    return source_from(parser.parse_args(words))


def _check_out(out: Path | None) -> None:
    file = next((path for path in (out, *out.parents) if path.is_file()), None) if out is not None else None
    if file is not None:
        raise ValueError(f"--out is {out}, but {file} is a file; want a folder")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m eval.perplexity --checkpoint RUN`."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.perplexity",
        description=__doc__,
        epilog=f"SOURCE:\n\n{_source_parser().format_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_arguments(parser)
    parser.add_argument("--as", dest="mode", choices=get_args(Mode), default="documents", metavar="MODE")
    parser.add_argument("--stride", type=int, help="tokens a window predicts (default: all it holds)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for perplexity.json and perplexity.png")
    options, words = parser.parse_known_args(arguments)
    try:
        _check_out(options.out)
        named = _named_source(words)
        with ranks() as device:
            opened = open_model(options, device)
            result = text_loss(
                opened.model,
                opened.tokenizer,
                _open_source(opened, named),
                mode=options.mode,
                stride=options.stride,
                token_budget=options.token_budget,
            )
            is_reporter = rank_and_world_size()[0] == 0
    except ValueError as error:
        sys.exit(f"eval.perplexity: {error}")
    if not is_reporter:
        return
    print(format_result(result))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        facts = {"checkpoint": str(opened.checkpoint), "source": words, "mode": options.mode, **opened.facts}
        facts |= {"stride": options.stride or opened.model.max_length}
        text = json.dumps({**facts, **asdict(result)}, indent=1)
        (options.out / "perplexity.json").write_text(text + "\n", encoding="utf-8")
        plot_per_position(result, options.out / "perplexity.png", str(opened.checkpoint))


if __name__ == "__main__":
    main()
