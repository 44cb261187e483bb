"""metrics.jsonl: one JSON object per line, appended step by step and cut back at a resume."""

import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from disk import write_text
from eval.report.step_ranges import missing_ranges
from training.log import logger


class JsonlWriter:
    """Appends records to a JSONL file: one JSON object per line, each with a "step".

    Args:
        path: The file; created if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = self._open()

    def _open(self) -> io.FileIO:
        # without a buffer, which would keep what a full disk has refused
        return io.FileIO(self.path, "a")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record.

        Raises:
            OSError: The disk is full, for example; nothing of the record is left in the file.
        """
        line = memoryview((json.dumps(record) + "\n").encode())
        size = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(size)
            raise

    def _lines(self) -> Iterator[tuple[str, int | None, bool]]:
        """Yield (line, step, whether it is a training step's); the step of a damaged line is None."""
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                yield line, int(record["step"]), "loss" in record
            except (ValueError, KeyError, TypeError):
                yield line, None, False

    def truncate_after(self, step: int) -> None:
        """Delete the records of later steps, and damaged lines; the file is replaced atomically."""
        self._file.close()
        kept = []
        for line, line_step, _ in self._lines():
            if line_step is None:
                logger.warning(f"{self.path}: deleted a damaged line: {line[:80]}")
            elif line_step <= step:
                kept.append(line + "\n")
        write_text(self.path, "".join(kept))
        self._file = self._open()

    def missing_steps(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return the ranges (from, to) of training steps, from first to last, that have no record."""
        recorded = {step for _, step, is_training in self._lines() if is_training and step is not None}
        return missing_ranges(recorded, first, last)

    def has_records_after(self, step: int) -> bool:
        """Return whether the file has a record of a later step."""
        return any(line_step is not None and line_step > step for _, line_step, _ in self._lines())

    def rotate(self) -> Path:
        """Start an empty file; return the first free name <file>.1, <file>.2, ... that the old one gets."""
        self._file.close()
        names = (self.path.with_name(f"{self.path.name}.{n}") for n in itertools.count(1))
        rotated = next(path for path in names if not path.exists())
        os.replace(self.path, rotated)
        self._file = self._open()
        return rotated

    def names_at(self, step: int) -> set[str]:
        """Return the names of the metrics recorded for a step."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return {name for record in map(json.loads, lines) if record["step"] == step for name in record}

    def close(self) -> None:
        """Close the file."""
        self._file.close()
