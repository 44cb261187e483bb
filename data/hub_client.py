"""Files from the Hugging Face hub, one by one, by the hub's own client; trouble on the way is waited out."""

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

logger = logging.getLogger(__name__)

# The client itself retries for some seconds; these attempts span about ten minutes of an outage.
NUM_ATTEMPTS = 14
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0

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
    """Fetch a file into the hub client's cache, unless it is there.

    HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and the client's other variables hold. Processes of a node that want
    the same file share one download. A cut-off transfer goes on where it stopped.

    Args:
        repository: Name of the data set or model.
        name: Path of the file in the repository.
        revision: Branch, tag or commit.
        kind: What the repository is.
        num_attempts: Of some 20 s each while the hub is out of reach, and with waits between them.

    Returns:
        Where the file lies.

    Raises:
        ValueError: If there is no such file, it is not in the cache while offline, or the hub stays out of
            reach; names the file.
    """
    what = f"{name} of {kind} {repository} at revision {revision}"
    wait = FIRST_WAIT_SECONDS
    for attempt in range(1, num_attempts + 1):
        try:
            return Path(hf_hub_download(repository, name, revision=revision, repo_type=kind))
        except Exception as error:
            remedy = _remedy(error)
            if remedy is not None:
                raise ValueError(f"cannot fetch {what}: {remedy}") from error
            reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
            if attempt == num_attempts:
                raise ValueError(
                    f"cannot fetch {what} in {attempt} attempts, the last one failing with {reason}: check "
                    f"the network and HF_ENDPOINT ({constants.ENDPOINT}), then run the same command again"
                ) from error
            # Jitter, so that the ranks of a large run do not come back all at once.
            seconds = wait * random.uniform(0.5, 1.0)
            logger.warning("fetching %s failed (%s); again in %.1f s", what, reason, seconds)
            time.sleep(seconds)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
    raise AssertionError("unreachable")


def _remedy(error: Exception) -> str | None:
    """Say what to do about an error that waiting does not mend; None for the others."""
    if isinstance(error, LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return "it is not in the cache and HF_HUB_OFFLINE is set: fetch it once while online"
        return None
    if isinstance(error, EntryNotFoundError):
        return "the repository has no such file: correct its name, or the revision"
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision: correct it"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is not open to you: correct its name, or set HF_TOKEN"
    if isinstance(error, HFValidationError):
        return str(error)
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        return None if status in _TRANSIENT_STATUS else f"the hub answered with status {status}"
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return f"{error}: make room in the cache ({constants.HF_HUB_CACHE}), or set HF_HOME to another place"
    return None
