"""Nothing that is in the output directory already is lost or mixed up."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from record_sets import content

from preprocessing.errors import InputError
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.workspace import Workspace


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


class TestOutputDirectory:
    """Nothing that is there already is lost or mixed up."""

    @pytest.fixture
    def fasta(self, tmp_path: Path) -> Path:
        path = tmp_path / "in.fasta"
        path.write_text(">a\nMKV\n>b\nMKW\n")
        return path

    def test_finished_set_is_not_made_again(self, tmp_path: Path, fasta: Path) -> None:
        made = generate([fasta], tmp_path / "set", PreprocessOptions())
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
        more_memory = PreprocessOptions(memory=2**25)  # changes no record
        again = generate([fasta], tmp_path / "set", more_memory)
        assert json.dumps(again) == json.dumps(made)  # in the same order, too
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == before

    def test_finished_set_of_other_options_or_inputs(self, tmp_path: Path, fasta: Path) -> None:
        generate([fasta], tmp_path / "set", PreprocessOptions())
        before = content(tmp_path / "set")
        with pytest.raises(InputError, match=r"finished.*--holdout was 0.0, is now 0.1"):
            generate([fasta], tmp_path / "set", PreprocessOptions(holdout=0.1))
        other = tmp_path / "other.fasta"
        other.write_text(">c\nM\n")
        with pytest.raises(InputError, match=r"other\.fasta was no input, is one now"):
            generate([fasta, other], tmp_path / "set", PreprocessOptions())
        fasta.write_text(">a\nMKV\n>b\nMKY\n")
        with pytest.raises(InputError, match=r"in\.fasta has changed since"):
            generate([fasta], tmp_path / "set", PreprocessOptions())
        assert content(tmp_path / "set") == before

    def test_finished_set_that_lost_a_shard(self, tmp_path: Path, fasta: Path) -> None:
        generate([fasta], tmp_path / "set", PreprocessOptions())
        (tmp_path / "set" / "shard-00002.arrow").unlink()
        with pytest.raises(InputError, match=r"shard-00002.*missing"):
            generate([fasta], tmp_path / "set", PreprocessOptions())

    def test_unfinished_work_of_another_command(
        self, tmp_path: Path, fasta: Path, monkeypatch: Any
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Workspace, "build_shard", lambda *_, **__: (_ for _ in ()).throw(Stopped))
            with pytest.raises(Stopped):
                generate([fasta], tmp_path / "set", PreprocessOptions())
        with pytest.raises(InputError, match=r"unfinished work.*--shards was 8, is now 9"):
            generate([fasta], tmp_path / "set", PreprocessOptions(shards=9))
        generate([fasta], tmp_path / "set", PreprocessOptions())

    def test_foreign_files(self, tmp_path: Path, fasta: Path) -> None:
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "thesis.doc").write_text("precious")
        with pytest.raises(InputError, match=r"not empty.*choose another output"):
            generate([fasta], tmp_path / "set", PreprocessOptions())
        assert [path.name for path in (tmp_path / "set").iterdir()] == ["thesis.doc"]
        with pytest.raises(InputError, match="not a directory"):
            generate([fasta], fasta, PreprocessOptions())

    def test_second_process_is_refused_and_a_dead_ones_lock_is_not(
        self, tmp_path: Path, fasta: Path
    ) -> None:
        script = f"""
import sys
from pathlib import Path
from preprocessing.workspace import Workspace
Workspace(
    Path({str(tmp_path / "set")!r}), {{"inputs": [], "options": {{}}, "spill": None}}
).enter()
print("inside", flush=True)
sys.stdin.read()
"""
        first = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert first.stdout is not None
        assert first.stdout.readline() == b"inside\n"
        with pytest.raises(InputError, match=rf"another process.*process {first.pid} on "):
            generate([fasta], tmp_path / "set", PreprocessOptions())
        first.kill()
        first.wait()
        with pytest.raises(InputError, match="unfinished work"):  # no longer "another process"
            generate([fasta], tmp_path / "set", PreprocessOptions())
