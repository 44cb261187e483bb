"""Results of requests in a JSONL file, from which an interrupted evaluation resumes."""

import hashlib
import json
from pathlib import Path
from typing import Any

from errors import UserError, decode_text
from eval.distributed import is_main_rank, run_on_main_rank


class SavedResults:
    """Results by the hash of their request, appended to a JSONL file as they are computed.

    Only the main rank reads and writes the file, so that all ranks have the same results.

    Args:
        path: The file; created where it is missing.
        fingerprint: Hash of what results depend on besides the requests: weights, tokenizer.

    Raises:
        UserError: On all ranks: the file holds results of another fingerprint, is no such file, or cannot be
            read and written.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        self._is_writer = is_main_rank()
        self._results: dict[str, Any] = run_on_main_rank(lambda: _open(path, fingerprint))

    @staticmethod
    def key(*request: Any) -> str:
        """Hash a request: anything that JSON can hold."""
        return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:32]

    def get(self, key: str) -> Any:
        """Return the result of a request; None without one."""
        return self._results.get(key)

    def add(self, results: dict[str, Any]) -> None:
        """Add results by their requests' keys, to the file too."""
        self._results.update(results)
        if self._is_writer:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps([key, value]) + "\n" for key, value in results.items())


def _open(path: Path, fingerprint: str) -> dict[str, Any]:
    """Read the results of a file and prepare it for appending."""
    lines = decode_text(path.read_bytes(), str(path)).split("\n") if path.exists() else []
    # an interrupted write leaves a last line without a line end
    complete = lines[:-1]
    results: dict[str, Any] = {}
    for number, line in enumerate(complete, 1):
        try:
            key, value = json.loads(line)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number} is not a saved result ({error}): delete it") from None
        if number == 1 and (key, value) != ("fingerprint", fingerprint):
            raise UserError(
                f"{path} holds results of another checkpoint or tokenizer ({value}, this is "
                f"{fingerprint}): give another --out, or delete it"
            )
        results[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+" if complete else "w", encoding="utf-8") as file:
        file.seek(sum(len(line.encode()) + 1 for line in complete))
        file.truncate()
        if not complete:
            file.write(json.dumps(["fingerprint", fingerprint]) + "\n")
    return results
