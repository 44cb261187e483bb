"""Which documents are held out: decided by a document's content alone, the same for every run."""

import hashlib

HELD_OUT_PER_256 = 8


def content_hash(text: str) -> bytes:
    """Return 16 bytes that depend on a document's content alone, on any machine and in any process."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def is_held_out(text: str) -> bool:
    """Tell whether a document is held out from training: 8 documents in 256 are."""
    return content_hash(text)[0] < HELD_OUT_PER_256
