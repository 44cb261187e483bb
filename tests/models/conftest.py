"""Fixtures of the models' tests."""

import pytest

from models.attention.recurrent.fla import skip_tuning


@pytest.fixture(scope="session")
def fast_autotuning() -> None:
    """Compile one variant of each of fla's kernels: speed is not tested."""
    skip_tuning()
