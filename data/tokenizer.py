"""Text to token ids and back: a thin wrapper around a `tokenizer.json` of the `tokenizers` library."""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers

from data.hub_client import download
from data.tokenizer_content import tokenizer_fingerprint, without_added_tokens
from disk import write_text
from errors import UserError, converting_panics
from tokens import END_OF_DOCUMENT, TOKENIZER_FILE

# the library takes some 130 bytes of memory per character of a batch, and its regular expressions fail on
# millions of consecutive spaces
_PIECE_CHARACTERS = 1 << 18
_BATCH_CHARACTERS = 1 << 22
# where a byte-level tokenizer always splits: after a line, and before a space that follows a word
_LINE_END = re.compile(r"\n(?=\S)")
_WORD_END = re.compile(r"(?<=\S)(?= )")
# in which the first token of a document ends, but for the longest of words
_HEAD_CHARACTERS = 256
# of a text in an error message
_SHOWN_CHARACTERS = 40
# fewer than for data: the name may be a mistyped path, and no work has begun yet
_HUB_ATTEMPTS = 2
# "organization/model", with an optional "@revision"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


class Tokenizer:
    """Encode plain text to token ids and decode them, with the id that ends a document.

    An added token, special or not, that is spelled out in a document is encoded as ordinary characters, so
    that no document can forge a document boundary; in a prompt it is that token, as in transformers. Nothing
    is added to the text, truncated or padded, whatever the file's own settings are.

    Args:
        backend: The tokenizer of the `tokenizers` library; its settings are changed.
        end_of_document: The token that ends each document.
        name: Name of this tokenizer in error messages.

    Attributes:
        name: As given.
        end_of_document: As given.
        end_of_document_id: Its id.
        file: The tokenizer.json that `load` read, or the folder that holds it; None if not loaded from disk.
        vocab_size: Highest id + 1, which may exceed the number of tokens, since ids may have gaps.

    Raises:
        UserError: `end_of_document` is not in the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        end_of_document: str = END_OF_DOCUMENT,
        name: str = "tokenizer",
    ) -> None:
        # unless this is set, release 0.22.0 prints a warning at each later fork; compile workers fork
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        end_of_document_id = backend.token_to_id(end_of_document)
        if end_of_document_id is None:
            raise UserError(
                f"end_of_document {end_of_document!r} is not in the vocabulary of {name}: "
                "set data.end_of_document to a token of its vocabulary"
            )
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        self._backend = backend
        self.name = name
        self.file: Path | None = None
        self.end_of_document = end_of_document
        self.end_of_document_id: int = end_of_document_id
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, path: str | Path, *, end_of_document: str = END_OF_DOCUMENT) -> "Tokenizer":
        """Load a tokenizer from disk or from the Hugging Face hub.

        Args:
            path: A folder that holds a tokenizer.json, that file, or a model's name on the hub, optionally
                with "@" and a revision.
            end_of_document: The token that ends each document.

        Raises:
            UserError: The path or its tokenizer.json is missing, the file is damaged or cannot be downloaded,
                or `end_of_document` is not in the vocabulary.
        """
        file = source = Path(path)
        if not file.exists() and _HUB_NAME.fullmatch(str(path)):
            file = source = _download(str(path))
        if not file.exists():
            raise UserError(
                f"the tokenizer {str(path)!r} does not exist: give a folder that holds a {TOKENIZER_FILE} "
                "or a model's name on the hub, or train a tokenizer with `python -m data.train_tokenizer` "
                "(configs/base has the command; for the debug configs run `python -m data.sample --out "
                ".cache/sample`)"
            )
        if file.is_dir():
            file = source / TOKENIZER_FILE
            if not file.is_file():
                names = ", ".join(sorted(entry.name for entry in source.iterdir())[:8]) or "nothing"
                raise UserError(
                    f"the tokenizer {str(path)!r} has no {TOKENIZER_FILE} (it holds {names}): "
                    "save the tokenizer in the format of the `tokenizers` library"
                )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"cannot load {file} as a tokenizer ({error}): download it or train it again"
            ) from error
        tokenizer = cls(backend, end_of_document=end_of_document, name=str(path))
        tokenizer.file = source
        return tokenizer

    def __reduce__(self) -> tuple[object, tuple[str, str, str]]:
        """Pickle the tokenizer as JSON."""
        return _restore, (self._backend.to_str(), self.end_of_document, self.name)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of all that changes ids, as `data.tokenizer_content.tokenizer_fingerprint` describes it."""
        return tokenizer_fingerprint(self._backend, self.end_of_document)

    @functools.cached_property
    def _document_backend(self) -> tokenizers.Tokenizer:
        """The tokenizer of documents, made on first use: it takes two seconds for Qwen3's vocabulary."""
        return without_added_tokens(self._backend, self.end_of_document, self.name)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a document, without the end-of-document token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each document, without the end-of-document token; multithreaded.

        None of them is the id of an added token, whatever the text.

        Raises:
            UserError: The end-of-document token is that of unknown words, or a character cannot be written
                without an added token.
        """
        return self._encode(self._document_backend, texts)

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of prompts and of task text, as transformers gives them; multithreaded.

        An added token that is spelled out in the text is that token.
        """
        return self._encode(self._backend, texts)

    def _encode(self, backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts.

        A text of more than 262,144 characters is encoded in pieces, split at the end of a line, else before a
        space, else anywhere. The first two do not change the ids of a byte-level tokenizer that adds no space
        before a text (add_prefix_space).

        Raises:
            UserError: A regular expression of the tokenizer backtracks too long on a text.
        """
        pieces = [_split(text) for text in texts]
        ids = _encode_pieces(backend, [piece for each in pieces for piece in each], self.name)
        return [
            next(ids) if len(each) == 1 else [token for _ in each for token in next(ids)] for each in pieces
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def num_bytes(self, token: int) -> int:
        """Return the number of UTF-8 bytes of a token, which need not be whole characters."""
        text = self.decode([token])
        spelled = self._backend.id_to_token(token) if "\ufffd" in text else None
        if spelled is None:
            return len(text.encode())
        # a byte-level vocabulary spells each byte as one character, byte fallback spells one byte as <0xC3>
        return 1 if re.fullmatch("<0x[0-9A-F]{2}>", spelled) else len(spelled)

    def num_first_bytes(self, text: str, first_token: int) -> int:
        """Return how many UTF-8 bytes of a document its first token covers, of the text as written.

        The normalizer may have changed them: "e" and an accent, three bytes, are one letter of two bytes in
        NFC. A token that ends within a character counts its own bytes of it.

        Args:
            text: The document.
            first_token: Its first token, from `encode`.
        """
        for head in (text[:_HEAD_CHARACTERS], text[:_PIECE_CHARACTERS]):
            encoding = self._document_backend.encode(head, add_special_tokens=False)
            if encoding.ids[:1] == [first_token]:
                stop, next_start = encoding.offsets[0][1], [*encoding.offsets, (len(head), 0)][1][0]
                # tokens that share a character have its offsets; what NFC joins with a letter has none
                before, most = (len(text[:end].encode()) for end in (next_start, max(stop, next_start)))
                return min(max(before, self.num_bytes(first_token)), most)
        return self.num_bytes(first_token)

    def save(self, path: Path) -> None:
        """Write the tokenizer to a JSON file, atomically.

        Raises:
            DiskFullError: The disk is full.
        """
        write_text(path, self._backend.to_str(pretty=True))


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Check that a model's embedding has a row for every token id.

    Args:
        tokenizer: The run's tokenizer.
        model_vocab_size: Rows of the model's embedding, V.

    Raises:
        UserError: The tokenizer has an id of V or more.
    """
    if tokenizer.vocab_size > model_vocab_size:
        raise UserError(
            f"the model's vocab_size is {model_vocab_size}, but {tokenizer.name} has ids up to "
            f"{tokenizer.vocab_size - 1}: set model.vocab_size to at least {tokenizer.vocab_size}"
        )


def _download(name: str) -> Path:
    repository, _, revision = name.partition("@")
    try:
        return download(
            repository, TOKENIZER_FILE, revision=revision or "main", kind="model", num_attempts=_HUB_ATTEMPTS
        )
    except UserError as error:
        raise UserError(
            f"the tokenizer {name!r} is not a path, and as a model on the Hugging Face hub: {error}"
        ) from error


def _restore(backend: str, end_of_document: str, name: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(backend), end_of_document=end_of_document, name=name)


def _encode_pieces(backend: tokenizers.Tokenizer, pieces: list[str], name: str) -> Iterator[list[int]]:
    """Encode in batches of bounded size, which bounds memory."""
    first = characters = 0
    for stop, piece in enumerate(pieces, 1):
        characters += len(piece)
        if characters >= _BATCH_CHARACTERS or stop == len(pieces):
            for encoding in _encode_batch(backend, pieces[first:stop], name):
                yield encoding.ids
            first, characters = stop, 0


def _encode_batch(backend: tokenizers.Tokenizer, pieces: list[str], name: str) -> list[tokenizers.Encoding]:
    problem = f"{name} cannot encode a text"
    try:
        with converting_panics(problem):
            return backend.encode_batch_fast(pieces, add_special_tokens=False)
    except UserError:
        # once more, one by one, to name the text
        for piece in pieces:
            with converting_panics(f"{problem} that begins {piece[:_SHOWN_CHARACTERS]!r}"):
                backend.encode(piece, add_special_tokens=False)
        raise


def _split(text: str) -> list[str]:
    pieces: list[str] = []
    first = 0
    while len(text) - first > _PIECE_CHARACTERS:
        middle, stop = first + _PIECE_CHARACTERS // 2, first + _PIECE_CHARACTERS
        for pattern in (_LINE_END, _WORD_END):
            ends = [match.end() for match in pattern.finditer(text, middle, stop)]
            if ends:
                stop = ends[-1]
                break
        pieces.append(text[first:stop])
        first = stop
    return [*pieces, text[first:]]
