"""Text to token ids and back: a thin wrapper on a `tokenizer.json`, and training one from text."""

import argparse
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.hub_client import download
from data.sources.base import DocumentSource
from data.sources.cli import add_source_arguments, source_from
from data.sources.open import open_text

END_OF_DOCUMENT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"

# The library needs some 130 bytes a character at once, and its regular expressions give up within millions of
# spaces.
_PIECE_CHARACTERS = 1 << 18
_BATCH_CHARACTERS = 1 << 22
# Where byte-level tokenizers end a word whatever follows: after a line, and before a space after a word.
_LINE_END = re.compile(r"\n(?=\S)")
_WORD_END = re.compile(r"(?<=\S)(?= )")
# Fewer than for data: the name may be a mistyped path, and nothing has begun yet.
_HUB_ATTEMPTS = 2
# What a model on the hub is called; a path has other signs, or exists.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


class Tokenizer:
    """A tokenizer that encodes plain text and knows which token ends a document.

    A special token spelled out in a text is encoded as ordinary characters, so that no document can forge the
    end of one. Nothing is added around the text, cut off or padded, whatever the file's own settings are.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        end_of_document: str = END_OF_DOCUMENT,
        name: str = "tokenizer",
    ) -> None:
        """Wrap a backend, switching off whatever it would add to a text or cut from it.

        Args:
            backend: The tokenizer as the `tokenizers` library holds it; its settings are changed.
            end_of_document: The token that closes each document.
            name: What error messages call this tokenizer.

        Raises:
            ValueError: If `end_of_document` is not in the vocabulary.
        """
        # Unless this is stated, release 0.22.0 prints a warning at each later fork; compile workers fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        end_of_document_id = backend.token_to_id(end_of_document)
        if end_of_document_id is None:
            raise ValueError(
                f"end_of_document {end_of_document!r} is not in the vocabulary of {name}: "
                "set data.end_of_document to a token that it has"
            )
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self.name = name
        self.file: Path | None = None
        """The tokenizer.json that it was loaded from, or the folder that holds it; None for one made here."""
        self.end_of_document = end_of_document
        self.end_of_document_id: int = end_of_document_id
        # Ids may have gaps: the number of tokens says nothing about the rows an embedding needs.
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, path: str | Path, *, end_of_document: str = END_OF_DOCUMENT) -> "Tokenizer":
        """Load a tokenizer from disk, or from the Hugging Face hub.

        Args:
            path: A folder that holds a tokenizer.json, or the file itself, or the name of a model on the hub,
                with "@" and a revision if not the newest is meant.
            end_of_document: The token that closes each document.

        Raises:
            ValueError: If the path or its tokenizer.json is missing, the file is damaged or cannot be
                fetched, or `end_of_document` is not in the vocabulary.
        """
        file, folder = Path(path), None
        if not file.exists() and _HUB_NAME.fullmatch(str(path)):
            repository, _, revision = str(path).partition("@")
            try:
                file = download(
                    repository,
                    TOKENIZER_FILE,
                    revision=revision or "main",
                    kind="model",
                    num_attempts=_HUB_ATTEMPTS,
                )
            except ValueError as error:
                raise ValueError(
                    f"data.tokenizer {str(path)!r} is no path here, and of a model of that name: {error}"
                ) from error
        if not file.exists():
            raise ValueError(
                f"data.tokenizer {str(path)!r} does not exist: give a folder that holds a {TOKENIZER_FILE}, "
                "a model's name on the hub, or make one by `python -m data.tokenizer train` (how is said in "
                "the config's base; that of the debug configs by `python -m data.sample --out .cache/sample`)"
            )
        if file.is_dir():
            folder, file = file, file / TOKENIZER_FILE
            if not file.is_file():
                there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
                raise ValueError(
                    f"data.tokenizer {str(path)!r} has no {TOKENIZER_FILE} (it holds {there}): "
                    "save the tokenizer in the format of the `tokenizers` library"
                )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"{file} is no tokenizer that can be read ({error}): fetch it or make it again"
            ) from error
        tokenizer = cls(backend, end_of_document=end_of_document, name=str(path))
        tokenizer.file = folder if folder is not None else file
        return tokenizer

    def __reduce__(self) -> tuple[object, tuple[str, str, str]]:
        """Say how another process makes the same tokenizer."""
        return _restore, (self._backend.to_str(), self.end_of_document, self.name)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of the vocabulary and of the token that ends a document."""
        # The serialized file would change with the library's release.
        vocabulary = sorted(self._backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        return hashlib.sha256(json.dumps([self.end_of_document, vocabulary]).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with nothing added around it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text; uses all the cores the library is given.

        A text of more than 262,144 characters is encoded in pieces, cut where a line ends, else before a
        space, else anywhere. The first two leave the tokens of a byte-level tokenizer as they are.
        """
        pieces = [_pieces(text) for text in texts]
        ids = self._encode_pieces([piece for each in pieces for piece in each])
        return [
            next(ids) if len(each) == 1 else [token for _ in each for token in next(ids)] for each in pieces
        ]

    def _encode_pieces(self, pieces: list[str]) -> Iterator[list[int]]:
        """Encode so much at a time that memory stays bounded."""
        first = characters = 0
        for last, piece in enumerate(pieces, 1):
            characters += len(piece)
            if characters >= _BATCH_CHARACTERS or last == len(pieces):
                for encoding in self._backend.encode_batch_fast(pieces[first:last], add_special_tokens=False):
                    yield encoding.ids
                first, characters = last, 0

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def num_bytes(self, token: int) -> int:
        """Return the bytes of UTF-8 that a token stands for, which need not be whole characters."""
        text = self.decode([token])
        spelled = self._backend.id_to_token(token) if "\ufffd" in text else None
        if spelled is None:
            return len(text.encode())
        # A byte-level vocabulary spells every byte as one character, byte fallback one byte as <0xC3>.
        return 1 if re.fullmatch("<0x[0-9A-F]{2}>", spelled) else len(spelled)

    def save(self, path: Path) -> None:
        """Write the tokenizer as one JSON file."""
        self._backend.save(str(path))


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_OF_DOCUMENT,)
) -> tokenizers.Tokenizer:
    """Train a byte-level BPE tokenizer; the same texts in the same order give the same one.

    Every byte is in the vocabulary, so that any text can be encoded and decodes to itself.

    Args:
        texts: The documents to learn from.
        vocab_size: Size to reach, special tokens included; little text may give fewer.
        special_tokens: Tokens that no text is split into; they get the lowest ids.

    Raises:
        ValueError: If `vocab_size` cannot hold the 256 bytes and the special tokens.
    """
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}, must be at least {smallest}: 256 bytes and {len(special_tokens)} "
            "special tokens"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Refuse a model whose embedding has no row for some token.

    Args:
        tokenizer: The run's tokenizer.
        model_vocab_size: Rows of the model's embedding.

    Raises:
        ValueError: If the tokenizer's ids reach beyond the embedding.
    """
    if tokenizer.vocab_size > model_vocab_size:
        raise ValueError(
            f"the model's vocab_size is {model_vocab_size}, but {tokenizer.name} has ids up to "
            f"{tokenizer.vocab_size - 1}: set model.vocab_size to at least {tokenizer.vocab_size}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m data.tokenizer train --files GLOB ... --vocab-size N --out FOLDER`."""
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer on text.")
    train = parser.add_subparsers(dest="command", required=True).add_parser("train")
    add_source_arguments(train)
    train.add_argument("--vocab-size", type=int, required=True)
    train.add_argument("--max-bytes", type=int, default=100_000_000, help="most bytes of text to learn from")
    train.add_argument("--out", type=Path, required=True, help="folder to write tokenizer.json to")
    options = parser.parse_args(arguments)
    try:
        if options.max_bytes < 1:
            raise ValueError(f"--max-bytes is {options.max_bytes}, must be at least 1")
        documents = open_text(source_from(options), split="train")
        texts = _first_bytes(documents, options.max_bytes)
        tokenizer = Tokenizer(train_byte_level_bpe(texts, options.vocab_size))
    except ValueError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(options.out / TOKENIZER_FILE)
    print(f"{tokenizer.vocab_size} ids in {options.out / TOKENIZER_FILE}")


def _first_bytes(documents: DocumentSource, max_bytes: int) -> Iterator[str]:
    """Yield texts up to so many bytes, the last one cut at a character."""
    left = max_bytes
    for row in documents.read(repeat=False):
        if row.text is None:
            continue
        text = row.text.encode()
        yield text[:left].decode(errors="ignore")
        left -= len(text)
        if left <= 0:
            return


def _restore(backend: str, end_of_document: str, name: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(backend), end_of_document=end_of_document, name=name)


def _pieces(text: str) -> list[str]:
    pieces: list[str] = []
    first = 0
    while len(text) - first > _PIECE_CHARACTERS:
        middle, last = first + _PIECE_CHARACTERS // 2, first + _PIECE_CHARACTERS
        for pattern in (_LINE_END, _WORD_END):
            ends = [match.end() for match in pattern.finditer(text, middle, last)]
            if ends:
                last = ends[-1]
                break
        pieces.append(text[first:last])
        first = last
    return [*pieces, text[first:]]


if __name__ == "__main__":
    main()
