"""Hash the local files that shards are made from, and verify the files against these hashes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.fingerprint import describe_changes, parts_of
from data.shards.encode import num_cores
from data.sources.content import content_hash
from data.sources.files import FileDocuments, convert_read_errors, identify
from data.sources.jsonl import JsonlDocumentFile
from data.sources.parquet import ParquetDocumentFile
from data.sources.shard_format import SourceFile, file_sha256, read_manifest
from data.sources.text import TextDocumentFile
from errors import UserError


def hash_sources(source: FileDocuments, num_files: int) -> dict[str, SourceFile]:
    """Hash the local files of a source; a file of the hub is known by its repository and revision.

    Args:
        source: The source.
        num_files: Number of files that were read, in order.

    Returns:
        The hashes by path.

    Raises:
        UserError: A file is gone, or has changed since the source was opened; names it.
    """
    paths = [
        file.path
        for file in source.files[:num_files]
        if isinstance(file, ParquetDocumentFile | JsonlDocumentFile | TextDocumentFile)
    ]
    # hashing releases the GIL, so that threads run in parallel
    with ThreadPoolExecutor(num_cores()) as pool:
        # from any working directory
        hashes = {
            str(path.absolute()): each for path, each in zip(paths, pool.map(_hash, paths), strict=True)
        }
    changes = describe_changes(
        parts_of(source.fingerprint)["files"], identify(source.files)["files"], "files"
    )
    if changes:
        raise UserError(
            f"{'; '.join(changes)} while it was tokenized: delete the whole folder, and prepare it again"
        )
    return hashes


def verify_sources(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Read the local files that a folder of shards was made from, and compare their hashes.

    Args:
        folder: The prepared folder.

    Yields:
        A file, and what is wrong with it; None if nothing is.

    Raises:
        UserError: The manifest is missing, or has no hashes of local files.
    """
    sources = read_manifest(folder).sources
    if not sources:
        raise UserError(
            f"the manifest of {folder} has no hash of a source file: they are on the hub, or an earlier "
            "version prepared it; verify without --sources"
        )

    def problem(path: str) -> str | None:
        try:
            digest = _hash(Path(path)).sha256
        except UserError as error:
            return str(error)
        return None if digest == sources[path].sha256 else f"{path}: its SHA-256 does not match"

    with ThreadPoolExecutor(num_cores()) as pool:
        yield from zip(sources, pool.map(problem, sources), strict=True)


def _hash(path: Path) -> SourceFile:
    with convert_read_errors(path):
        size = path.stat().st_size
        return SourceFile(num_bytes=size, sha256=file_sha256(path), content=content_hash(path))
