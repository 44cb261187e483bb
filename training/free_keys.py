"""Keys of a run that do not change what is trained: each step is the same to the last bit."""

_TABLES = ("eval", "diagnostics", "metrics")
_KEYS = (
    *("run.name", "run.folder", "data.prefetch_batches", "training.cuda_graphs"),
    *("parallelism.timeout_seconds",),
    *("checkpoint.every", "checkpoint.keep", "checkpoint.fall_back", "checkpoint.async_save"),
)


def is_free(key: str) -> bool:
    """Return whether a dotted key does not change what is trained.

    Those that change rounding are not free, such as training.compile and training.local_batch_size, nor those
    that change how long a run trains.
    """
    return key in _KEYS or key.partition(".")[0] in _TABLES
