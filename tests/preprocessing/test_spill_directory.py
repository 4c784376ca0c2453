"""Spills on another disk: found again by a restart, gone at the end, refused across nodes."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from record_sets import content

from preprocessing.errors import InputError
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.parallel import Serial
from preprocessing.workspace import Workspace


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


def stop(*_: Any, **__: Any) -> Any:
    raise Stopped


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">id{n}\n{'MKV' * (1 + n % 7)}{'W' * n}\n" for n in range(50)))
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def leave_unfinished(tmp_path: Path, fasta: Path, disk: Path, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "build_shard", stop)
        with pytest.raises(Stopped):
            generate([fasta], tmp_path / "set", PreprocessOptions(spill=disk, **options))


def test_spills_lie_there_until_the_end(tmp_path: Path, fasta: Path, disk: Path) -> None:
    generate([fasta], tmp_path / "plain", PreprocessOptions())
    leave_unfinished(tmp_path, fasta, disk)
    assert list(disk.glob("prothpc-*/run-*.run"))
    assert not list((tmp_path / "set").rglob("run-*.run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preprocessing.generate.Spiller", stop)  # nothing is to be spilled again
        generate([fasta], tmp_path / "set", PreprocessOptions(spill=disk))
    assert content(tmp_path / "set") == content(tmp_path / "plain")
    assert not list(disk.iterdir())
    # of the finished set, only what it is counts
    generate([fasta], tmp_path / "set", PreprocessOptions())


def test_restart_elsewhere_is_refused(tmp_path: Path, fasta: Path, disk: Path) -> None:
    leave_unfinished(tmp_path, fasta, disk)
    with pytest.raises(InputError, match=rf"--spill was {disk}, is now None"):
        generate([fasta], tmp_path / "set", PreprocessOptions())


def test_restart_on_another_node_reads_everything_again(
    tmp_path: Path, fasta: Path, disk: Path, caplog: Any
) -> None:
    generate([fasta], tmp_path / "plain", PreprocessOptions())
    leave_unfinished(tmp_path, fasta, disk)
    for directory in disk.iterdir():
        shutil.rmtree(directory)
    with caplog.at_level(logging.WARNING):
        generate([fasta], tmp_path / "set", PreprocessOptions(spill=disk))
    assert "are not on this node" in caplog.text
    assert content(tmp_path / "set") == content(tmp_path / "plain")


def test_spills_of_a_deleted_output_are_not_taken(tmp_path: Path, fasta: Path, disk: Path) -> None:
    leave_unfinished(tmp_path, fasta, disk, min_length=10)
    shutil.rmtree(tmp_path / "set")
    generate([fasta], tmp_path / "plain", PreprocessOptions())
    generate([fasta], tmp_path / "set", PreprocessOptions(spill=disk))
    assert content(tmp_path / "set") == content(tmp_path / "plain")


class TwoNodes(Serial):
    def allgather(self, value: Any) -> list[Any]:
        return ["node1", "node2"]


def test_refused_across_nodes_and_without_a_directory(
    tmp_path: Path, fasta: Path, disk: Path
) -> None:
    with pytest.raises(InputError, match=r"--spill .*disk: ranks run on 2 nodes \(node1, node2"):
        generate([fasta], tmp_path / "set", PreprocessOptions(spill=disk), TwoNodes())
    with pytest.raises(InputError, match=r"--spill .*nowhere: no such directory: make it first"):
        generate([fasta], tmp_path / "set", PreprocessOptions(spill=tmp_path / "nowhere"))
    assert not (tmp_path / "set").exists()
