"""One deliberate small fault in the code."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A fault, and the tests that are to see it.

    Attributes:
        file: The file, relative to the root of the project.
        old: Text that occurs in it exactly once.
        new: What takes its place.
        tests: What pytest is given: files, or files with ::test, separated by spaces.
    """

    file: str
    old: str
    new: str
    tests: str

    @property
    def name(self) -> str:
        """The file and what changes, in one line."""
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}: {old} -> {new or '(nothing)'}"
