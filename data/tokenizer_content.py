"""What a tokenizer does to text: a hash of all that changes ids, and its copy that knows no added tokens."""

import hashlib
import json
from typing import Any

import tokenizers

from errors import UserError

# of a tokenizer.json; its decoder changes no id, and truncation and padding are turned off
_PARTS = ("normalizer", "pre_tokenizer", "model", "added_tokens", "post_processor")
# changes with the ids that `Tokenizer.encode_batch` gives to the same text and the same tokenizer.json
_ENCODING = "no text gives the id of an added token"
# bytes that a byte-level vocabulary spells as themselves; it spells the others as characters from 256 on
_SPELLED_BYTES = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
# bytes that are in no UTF-8 text
_UNUSED_BYTES = (0xC0, 0xC1, *range(0xF5, 0x100))


def tokenizer_fingerprint(backend: tokenizers.Tokenizer, end_of_document: str) -> str:
    """Return a hash of all that changes ids.

    Args:
        backend: The tokenizer.
        end_of_document: The token that ends each document.

    Returns:
        Two times 16 hexadecimal digits, separated by "-": the first are of the tokens' names and ids and of
        the end-of-document token, the second of normalizer, pre-tokenizer, model, added tokens and
        post-processor. Shards and runs of earlier versions have the first only.
    """
    vocabulary = sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    table = json.loads(backend.to_str())
    # the largest lists as they are; names and ids are in the first hash, Unigram's scores are not
    pieces, merges = table["model"].pop("vocab"), table["model"].pop("merges", None)
    parts = {name: _without_defaults(table[name]) for name in _PARTS}
    parts |= {"merges": merges, "scores": pieces if isinstance(pieces, list) else None}
    return f"{_digest([end_of_document, vocabulary])}-{_digest([_ENCODING, parts])}"


def is_older_fingerprint(fingerprint: str) -> bool:
    """Return whether a fingerprint is of an earlier version, which hashed the vocabulary alone."""
    return "-" not in fingerprint


def same_tokenizer(one: str, other: str) -> bool:
    """Compare fingerprints; one of an earlier version is compared with what it covers of the other."""
    if is_older_fingerprint(one) or is_older_fingerprint(other):
        return one.partition("-")[0] == other.partition("-")[0]
    return one == other


def describe_other_tokenizer(one: str, other: str) -> str:
    """Say what differs between two fingerprints that `same_tokenizer` tells apart."""
    if one.partition("-")[0] == other.partition("-")[0]:
        return "the vocabulary is the same, but normalizer, pre-tokenizer, merges or added tokens are not"
    return "the vocabulary or the end-of-document token is another"


def without_added_tokens(
    backend: tokenizers.Tokenizer, end_of_document: str, name: str
) -> tokenizers.Tokenizer:
    """Copy a tokenizer so that no text gives the id of an added token or of the end-of-document token.

    Added tokens, special or not, are recognized before the text is normalized and split. The copy has none,
    and their entries are taken out of the model's vocabulary too, with the merges that need them. The token
    for unknown words stays. All other text keeps its ids.

    Args:
        backend: The tokenizer; not changed.
        end_of_document: The token that ends each document, which may be in the model's vocabulary alone.
        name: Name of the tokenizer in error messages.

    Raises:
        UserError: Unknown words have the end-of-document token, or a character or a byte cannot be written
            without one of the tokens.
    """
    table = json.loads(backend.to_str())
    byte_tokens = _byte_tokens(table)
    unwanted = {token["content"]: token["id"] for token in table["added_tokens"]}
    unwanted[end_of_document] = backend.token_to_id(end_of_document)
    table["added_tokens"], table["post_processor"] = [], None
    unknown = _remove(table["model"], {*unwanted.values()})
    if unknown == unwanted[end_of_document]:
        raise UserError(
            f"end_of_document {end_of_document!r} is also the unk_token of {name}: every unknown word would "
            "end a document; set data.end_of_document to another token"
        )
    copy = tokenizers.Tokenizer.from_str(json.dumps(table))
    for token in unwanted:
        if len(token) == 1 and not copy.encode(token, add_special_tokens=False).ids:
            raise UserError(
                f"{name} has no other token for the character {token!r} than the added token (or the "
                "end_of_document) of that name: rename it in the tokenizer.json, or set data.end_of_document "
                "to another token"
            )
        # such a token stands for a byte, not for its character, and text would silently lose that byte
        if token in byte_tokens and copy.token_to_id(token) is None:
            raise UserError(
                f"{name} has no other token for the byte 0x{byte_tokens[token]:02X} than {token!r}, an added "
                "token or the end_of_document: rename it in the tokenizer.json, or set data.end_of_document "
                "to another token"
            )
    return copy


def _byte_tokens(table: dict[str, Any]) -> dict[str, int]:
    """Return the bytes that text needs, by the token that spells each; none of other models."""
    spelled: dict[str, int] = {}
    if _has_byte_level(table["normalizer"]) or _has_byte_level(table["pre_tokenizer"]):
        others = [byte for byte in range(0x100) if byte not in _SPELLED_BYTES]
        spelled |= {chr(byte): byte for byte in _SPELLED_BYTES}
        spelled |= {chr(0x100 + index): byte for index, byte in enumerate(others)}
    if table["model"].get("byte_fallback"):
        spelled |= {f"<0x{byte:02X}>": byte for byte in range(0x100)}
    return {token: byte for token, byte in spelled.items() if byte not in _UNUSED_BYTES}


def _has_byte_level(part: Any) -> bool:
    """Return whether a normalizer or a pre-tokenizer, or one of a sequence of them, is ByteLevel."""
    if isinstance(part, dict):
        return part.get("type") == "ByteLevel" or any(map(_has_byte_level, part.values()))
    return isinstance(part, list) and any(map(_has_byte_level, part))


def _remove(model: dict[str, Any], ids: set[int]) -> int | None:
    """Take tokens out of a model of any type, but not the one for unknown words; return the id of that."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        # Unigram: a token's id is its place, and no text matches an empty piece
        unknown = model.get("unk_id")
        model["vocab"] = [
            ["" if place in ids and place != unknown else piece, score]
            for place, (piece, score) in enumerate(vocabulary)
        ]
        return unknown
    unknown = vocabulary.get(model.get("unk_token"))
    removed = {token for token, number in vocabulary.items() if number in ids and number != unknown}
    model["vocab"] = {token: number for token, number in vocabulary.items() if token not in removed}
    if removed and "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if not removed & {left, right, left + right, left + right[prefix:]}
        ]
    return unknown


def _without_defaults(value: Any) -> Any:
    """Drop keys that are null or false: a later release of the library writes more of them."""
    if isinstance(value, dict):
        return {
            key: _without_defaults(each)
            for key, each in value.items()
            if each is not None and each is not False
        }
    return [_without_defaults(each) for each in value] if isinstance(value, list) else value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
