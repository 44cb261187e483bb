"""Count the validation documents that a run may train on, and how often it reads its training data."""

import itertools
from collections import defaultdict
from pathlib import Path

from data.config import JsonlSource, MixtureSource, ParquetSource, ShardsSource, Source, TextSource
from data.sources.open import open_text
from data.sources.overlap import leaves
from data.sources.shard_format import read_manifest
from data.sources.split import is_held_out

# of a source of text; counting 100,000 documents takes seconds
_MAX_COUNTED = 100_000


def count_not_held_out(source: Source) -> tuple[int, int]:
    """Count the documents of a validation source that are not held out from training by their content.

    Args:
        source: The validation source.

    Returns:
        The documents that are not held out, and all that were counted: those of shards and at most the first
        100,000 of each local source of text, but none of the hub, which would have to be downloaded.

    Raises:
        UserError: A file cannot be read.
    """
    num_trained = num_counted = 0
    for leaf in leaves(source):
        if isinstance(leaf, ShardsSource):
            splits = read_manifest(Path(leaf.folder)).splits
            num_trained += splits["train"].documents
            num_counted += sum(split.documents for split in splits.values())
        elif isinstance(leaf, ParquetSource | JsonlSource | TextSource):
            rows = open_text(leaf, log_skipped=False).read(repeat=False)
            texts = (row.text for row in rows if row.text is not None)
            held_out = [is_held_out(text) for text in itertools.islice(texts, _MAX_COUNTED)]
            num_trained += len(held_out) - sum(held_out)
            num_counted += len(held_out)
    return num_trained, num_counted


def count_epochs(source: Source, num_tokens: int) -> dict[str, tuple[int, float]]:
    """Count how often a run reads the shards of its training source.

    Args:
        source: The training source. Text has no number of tokens, and is left out.
        num_tokens: Tokens of the run.

    Returns:
        By folder its training tokens and the number of times that they are read; in a mixture by the shares
        of its weights.

    Raises:
        UserError: A folder holds no complete set of shards.
    """
    sources = source.sources if isinstance(source, MixtureSource) else {"": source}
    weights = source.weights if isinstance(source, MixtureSource) else {"": 1.0}
    shares = defaultdict[str, float](float)  # two sources of a mixture may read one folder
    for name, leaf in sources.items():
        if isinstance(leaf, ShardsSource):
            shares[leaf.folder] += weights[name] / sum(weights.values())
    sizes = {folder: read_manifest(Path(folder)).splits["train"].tokens for folder in shares}
    return {folder: (size, shares[folder] * num_tokens / size) for folder, size in sizes.items() if size}
