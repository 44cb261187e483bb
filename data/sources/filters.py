"""Row filters: which rows of a source are documents, and the reason why each of the others is skipped."""

from dataclasses import dataclass

from data.config import Split
from data.sources.split import is_held_out

# defects of a row or of its file; the other reasons follow from the config
DEFECTS = (
    "null",
    "empty",
    "not_text",
    "malformed",
    "bad_score",
    "damaged_file",
    "damaged_document",
)
SKIP_REASONS = (*DEFECTS, "low_score", "too_short", "too_long", "held_out", "not_held_out")


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Turn raw rows into documents or reasons to skip them.

    Attributes:
        split: Documents to keep.
        min_score: Minimum score; None to ignore scores.
        min_characters: Minimum length; None for no limit.
        max_characters: Maximum length; None for no limit.
    """

    split: Split = "all"
    min_score: float | None = None
    min_characters: int | None = None
    max_characters: int | None = None

    def apply(self, value: object, score: object) -> tuple[str | None, str | None]:
        """Return the document of a raw row, or the reason to skip it.

        Args:
            value: Text, bytes of UTF-8, or a value of any other type, which is skipped.
            score: A number, or a value that float() converts to one.

        Returns:
            The text and None, or None and one of `SKIP_REASONS`.
        """
        text, reason = _to_text(value)
        if text is None:
            return None, reason
        reason = self._reason(text, score)
        return (text, None) if reason is None else (None, reason)

    def _reason(self, text: str, score: object) -> str | None:
        if self.min_score is not None:
            number = _to_number(score)
            if number is None:
                return "bad_score"
            if number < self.min_score:
                return "low_score"
        if self.min_characters is not None and len(text) < self.min_characters:
            return "too_short"
        if self.max_characters is not None and len(text) > self.max_characters:
            return "too_long"
        if self.split == "train" and is_held_out(text):
            return "held_out"
        if self.split == "held_out" and not is_held_out(text):
            return "not_held_out"
        return None


def _to_text(value: object) -> tuple[str | None, str | None]:
    if value is None:
        return None, "null"
    try:
        if isinstance(value, bytes):
            value = value.decode()
        elif isinstance(value, str):
            # JSON may escape half of a surrogate pair, which has no UTF-8
            value.encode()
    except UnicodeError:
        return None, "not_text"
    if not isinstance(value, str):
        return None, "not_text"
    if not value or value.isspace():
        return None, "empty"
    return value, None


def _to_number(score: object) -> float | None:
    """Return a score as a float; None if it is NaN or not a number."""
    try:
        number = float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return None if number != number else number
