"""What tests of all packages share: real data where present, and real MPI ranks."""

import gzip
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from hpc.config import Recipe, load_recipe
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.parallel import connect
from preprocessing.synthetic import SynthesisOptions, synthesize

ROOT = Path(__file__).resolve().parent.parent
MPIRUN = ("mpirun", "--oversubscribe", "--bind-to", "none")


RECIPE = """
[model]
hidden_size = 32
layers = 2
heads = 2
intermediate_size = 64
max_positions = 256
[data]
records = "{records}"
length = 96
block_records = 16
bucket_batches = 4
[train]
run_dir = "run"
steps = 20
global_batch = 32
micro_batch = 8
[optimizer]
lr = 1e-3
[schedule]
warmup_steps = 5
[evaluation]
every_steps = 10
records = 24
micro_batch = 8
[checkpoint]
every_steps = 10
[log]
every_steps = 1
tensorboard = false
"""


def skip_unless(present: bool, what: str) -> None:
    """Skip where something is missing; with CI=true, where nothing may be missing, fail."""
    if not present:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{what} is missing")
        pytest.skip(f"{what} is missing")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory of real proteins beside the checkout."""
    path = ROOT.parent / "shared" / "data"
    skip_unless(path.is_dir(), "the real data in ../shared/data")
    return path


@pytest.fixture(scope="session")
def zipped_fasta(shared_data: Path) -> Path:
    """20,000 UniProt proteins as gzip FASTA."""
    return shared_data / "DB.fasta.gz"


@pytest.fixture(scope="session")
def real_fasta(zipped_fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same proteins as plain FASTA."""
    path = tmp_path_factory.mktemp("real") / "DB.fasta"
    with gzip.open(zipped_fasta, "rb") as source, path.open("wb") as copy:
        shutil.copyfileobj(source, copy)
    return path


@pytest.fixture(scope="session")
def rank_environment() -> dict[str, str]:
    """Environment of a process that starts ranks on this machine, also as root."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_osc": "^ucx",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="session")
def mpirun(rank_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python ARGUMENTS…` with `n` ranks: under mpirun if there are several."""

    def run(
        n: int,
        *arguments: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 180,
    ) -> subprocess.CompletedProcess[str]:
        launcher = [*MPIRUN, "-n", str(n)] if n > 1 else []
        return subprocess.run(
            [*launcher, sys.executable, *map(str, arguments)],
            cwd=cwd,
            env={**rank_environment, **(env or {})},
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def prothpc(
    mpirun: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `prothpc ARGUMENTS…`, under mpirun if `ranks` > 1."""

    def run(
        *arguments: str | Path, ranks: int = 1, **keywords: Any
    ) -> subprocess.CompletedProcess[str]:
        return mpirun(ranks, "-m", "hpc.cli", *arguments, **keywords)

    return run


@pytest.fixture(scope="session")
def record_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 330 training and 60 held-out records of 8 families, median length 80."""
    folder = tmp_path_factory.mktemp("records")
    synthesize(folder / "corpus.fasta", SynthesisOptions(records=400, families=8, median_length=80))
    options = PreprocessOptions(shards=4, holdout=0.15)
    generate([folder / "corpus.fasta"], folder / "records", options, connect(1))
    return folder / "records"


@pytest.fixture(scope="session")
def recipe_file(record_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE.format(records=record_set))
    return path


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(recipe_file)
