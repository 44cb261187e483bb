"""Train a byte-level BPE tokenizer on text and write its tokenizer.json.

    python -m data.train_tokenizer --files 'corpus/*.parquet' --vocab-size 16384 --out .cache/tokenizer

Held-out documents (data/sources/split.py) are left out.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.sources.base import DocumentSource
from data.sources.cli import add_source_arguments, naming_options, source_from
from data.sources.open import open_text
from data.tokenizer import Tokenizer
from errors import UserError, check_at_least_1, check_out, run_command
from tokens import END_OF_DOCUMENT, TOKENIZER_FILE

# the library reserves memory for all of it at once
_MAX_VOCAB_SIZE = 1 << 24
# the time to train grows with the square of a word's length
_LONG_WORD = re.compile(r"\S{4096}|\s{4096}")


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_OF_DOCUMENT,)
) -> tokenizers.Tokenizer:
    """Train a byte-level BPE tokenizer; deterministic for the same texts in the same order.

    All 256 bytes are in the vocabulary, so that any text can be encoded and decodes to itself.

    Args:
        texts: The training documents.
        vocab_size: Target size, special tokens included; little text may give fewer tokens.
        special_tokens: Tokens that are not split from text; they get the lowest ids.

    Raises:
        UserError: `vocab_size` is out of range.
    """
    check_vocab_size(vocab_size, len(special_tokens))
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((piece for text in texts for piece in _cut_long_words(text)), trainer)
    return backend


def check_vocab_size(vocab_size: int, num_special_tokens: int = 1) -> None:
    """Check that a vocabulary holds all bytes, and fits into memory.

    Args:
        vocab_size: Its target size, special tokens included.
        num_special_tokens: How many there are.

    Raises:
        UserError: `vocab_size` is less than 256 plus the number of special tokens, or more than 2**24.
    """
    smallest = 256 + num_special_tokens
    if not smallest <= vocab_size <= _MAX_VOCAB_SIZE:
        raise UserError(
            f"vocab_size is {vocab_size}, must be at least {smallest} (256 bytes and the special tokens) and "
            f"at most {_MAX_VOCAB_SIZE}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Command-line arguments; None for sys.argv[1:].

    Raises:
        UserError: An option is wrong, or the text cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="python -m data.train_tokenizer",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser)
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="tokens, the end-of-document token included"
    )
    parser.add_argument(
        "--max-bytes", type=int, default=100_000_000, help="bytes of text to train on (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help=f"folder to write {TOKENIZER_FILE} to")
    options = parser.parse_args(arguments)
    check_out(options.out)
    check_at_least_1(options, "max_bytes")
    check_vocab_size(options.vocab_size)  # before the text is opened
    with naming_options(options):
        documents = open_text(source_from(options), split="train")
        options.out.mkdir(parents=True, exist_ok=True)  # a path that cannot be written shows before the work
        texts = _truncated(documents, options.max_bytes)
        tokenizer = Tokenizer(train_byte_level_bpe(texts, options.vocab_size))
    tokenizer.save(options.out / TOKENIZER_FILE)
    print(f"{tokenizer.vocab_size} ids in {options.out / TOKENIZER_FILE}")


def _cut_long_words(text: str) -> Iterator[str]:
    """Yield a text in pieces, cut within words, or runs of spaces, of more than 4,096 characters."""
    first = 0
    for match in _LONG_WORD.finditer(text):
        yield text[first : match.end()]
        first = match.end()
    yield text[first:]


def _truncated(documents: DocumentSource, max_bytes: int) -> Iterator[str]:
    """Yield texts of at most `max_bytes` in all, the last one truncated between characters."""
    remaining = max_bytes
    for row in documents.read(repeat=False):
        if row.text is None:
            continue
        text = row.text.encode()
        yield text[:remaining].decode(errors="ignore")
        remaining -= len(text)
        if remaining <= 0:
            return


if __name__ == "__main__":
    sys.exit(run_command(main))
