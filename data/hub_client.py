"""Download single files from the Hugging Face hub with its own client; transient failures are retried."""

import errno
import logging
import random
import time
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from errors import UserError

logger = logging.getLogger(__name__)

# the client itself retries for some seconds; these attempts bridge an outage of about ten minutes
NUM_ATTEMPTS = 14
INITIAL_BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 60.0

_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def download(
    repository: str,
    name: str,
    *,
    revision: str,
    kind: Literal["dataset", "model"],
    num_attempts: int = NUM_ATTEMPTS,
) -> Path:
    """Download a file into the hub client's cache, unless it is cached already.

    The client's environment variables (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and others) apply. Processes of a
    node share one download of the same file. An interrupted transfer resumes at the byte where it stopped.

    Args:
        repository: Name of the dataset or model.
        name: Path of the file in the repository.
        revision: Branch, tag or commit.
        kind: Type of the repository.
        num_attempts: Attempts, with exponential backoff between them; each takes some 20 s while the hub is
            unreachable.

    Returns:
        The file's path in the cache.

    Raises:
        UserError: The file does not exist, it is not cached while offline, or the hub stays unreachable;
            names the file.
    """
    what = f"{name} of {kind} {repository} at revision {revision}"
    backoff = INITIAL_BACKOFF_SECONDS
    for attempt in range(1, num_attempts + 1):
        try:
            return Path(hf_hub_download(repository, name, revision=revision, repo_type=kind))
        except Exception as error:
            remedy = _permanent_error(error)
            if remedy is not None:
                raise UserError(f"cannot fetch {what}: {remedy}") from error
            reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
            if attempt == num_attempts:
                raise UserError(
                    f"cannot fetch {what} in {attempt} attempts, the last one failed with {reason}: check "
                    f"the network and HF_ENDPOINT ({constants.ENDPOINT}), then run the same command again"
                ) from error
            # jitter, so that the ranks of a large run do not all retry at once
            seconds = backoff * random.uniform(0.5, 1.0)
            logger.warning("fetching %s failed (%s); retrying in %.1f s", what, reason, seconds)
            time.sleep(seconds)
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
    raise AssertionError("unreachable")


def _permanent_error(error: Exception) -> str | None:
    """Return cause and remedy of an error that retrying cannot fix; None for a transient one."""
    if isinstance(error, LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return "it is not in the cache and HF_HUB_OFFLINE is set: fetch it once while online"
        return None
    if isinstance(error, EntryNotFoundError):
        return "the repository has no such file: correct its name, or the revision"
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision: correct it"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private or gated: correct its name, or set HF_TOKEN"
    if isinstance(error, HFValidationError):
        return str(error)
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        return None if status in _TRANSIENT_STATUS else f"the hub returned status {status}"
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return (
            f"{error}: free space in the cache ({constants.HF_HUB_CACHE}), or set HF_HOME to another folder"
        )
    return None
