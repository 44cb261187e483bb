"""The train / held-out split: decided by a document's content alone, the same for every run."""

import hashlib

HELD_OUT_PER_256 = 8


def content_hash(text: str) -> bytes:
    """Return a 16-byte hash of a document's content, the same on any machine and in any process."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def is_held_out(text: str) -> bool:
    """Return whether a document is held out from training: 8 of 256 are, about 3%."""
    return content_hash(text)[0] < HELD_OUT_PER_256
