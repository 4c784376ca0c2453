"""The private Slurm that all tests in this directory share."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from private_slurm import PrivateSlurm, missing_requirement


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSlurm]:
    """A running cluster of two nodes."""
    missing = missing_requirement()
    if missing is not None and os.environ.get("CI") == "true":
        pytest.fail(f"no private Slurm: {missing}")
    if missing is not None:
        pytest.skip(f"no private Slurm: {missing}")
    cluster = PrivateSlurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
