"""An interrupted job goes on where it stopped, to the same bytes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from record_sets import DRIVER, content

from preprocessing import generate as generate_module
from preprocessing import sources
from preprocessing.errors import InputError
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.records import RecordSet
from preprocessing.runs import RunWriter
from preprocessing.sources import UnitReader
from preprocessing.workspace import Workspace

Run = Callable[..., "subprocess.CompletedProcess[str]"]


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


class TestRestart:
    """An interrupted job goes on where it stopped, to the same bytes."""

    unit_bytes = 300_000
    options = PreprocessOptions(shards=5, holdout=0.1, memory=2**20)  # about two units a run

    @pytest.fixture
    def expected(
        self, tmp_path_factory: pytest.TempPathFactory, real_fasta: Path
    ) -> dict[str, bytes]:
        output = tmp_path_factory.mktemp("whole") / "set"
        generate([real_fasta], output, self.options, unit_bytes=self.unit_bytes)
        return content(output)

    def counting(self, patch: pytest.MonkeyPatch) -> tuple[list[int], list[str]]:
        """Record the units and shards that are worked on from now on."""
        units: list[int] = []
        shards: list[str] = []
        chunks, build = generate_module.parsed_chunks, Workspace.build_shard

        def count_chunks(reader: UnitReader, *rest: Any, **more: Any) -> Iterator[Any]:
            units.append(reader._unit.start // self.unit_bytes)
            return chunks(reader, *rest, **more)

        def count_build(workspace: Workspace, name: str, *rest: Any, **more: Any) -> Any:
            shards.append(name)
            return build(workspace, name, *rest, **more)

        patch.setattr(generate_module, "parsed_chunks", count_chunks)
        patch.setattr(Workspace, "build_shard", count_build)
        return units, shards

    def test_after_a_kill_while_mapping(
        self, tmp_path: Path, real_fasta: Path, expected: dict[str, bytes], monkeypatch: Any
    ) -> None:
        script = f"""
import os, signal
from pathlib import Path
import preprocessing.spill as spill
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
publish, written = spill.publish, []
def publish_or_die(temporary, path):
    if len(written) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    publish(temporary, path)
    written.append(path)
spill.publish = publish_or_die
generate([Path({str(real_fasta)!r})], Path({str(tmp_path / "set")!r}), {self.options!r},
         unit_bytes={self.unit_bytes})
"""
        killed = subprocess.run([sys.executable, "-c", script], check=False)
        assert killed.returncode == -signal.SIGKILL
        with pytest.raises(InputError, match="unfinished"):
            RecordSet(tmp_path / "set")

        units, shards = self.counting(monkeypatch)
        generate([real_fasta], tmp_path / "set", self.options, unit_bytes=self.unit_bytes)
        assert content(tmp_path / "set") == expected
        assert 5 <= units[0] < units[-1] == 38  # each run had finished at least one unit
        assert len(set(units)) == len(units)
        assert len(shards) == 6

    def test_on_more_ranks_after_a_stop_in_a_long_unit(
        self, tmp_path: Path, zipped_fasta: Path, mpirun: Run, monkeypatch: Any
    ) -> None:
        """A run with a part of a unit only is of no use."""
        write, written = RunWriter.write, []

        def stop_at_fourth(writer: RunWriter, *arguments: Any) -> None:
            if len(written) == 3:
                raise Stopped
            write(writer, *arguments)
            written.append(writer)

        generate([zipped_fasta], tmp_path / "whole", self.options)
        with monkeypatch.context() as patch:
            patch.setattr(RunWriter, "write", stop_at_fourth)
            with pytest.raises(Stopped):
                generate([zipped_fasta], tmp_path / "set", self.options)
        left = list((tmp_path / "set" / ".work").glob("run-*"))
        assert [path.name for path in left] == ["run-000000.tmp"]
        left[0].rename(left[0].with_suffix(".run"))  # as after a power cut, perhaps
        job = ([str(zipped_fasta)], str(tmp_path / "set"), asdict(self.options), sources.UNIT_BYTES)
        result = mpirun(2, "-c", DRIVER, "2", json.dumps([job]))
        assert result.stdout.count("done") == 2, result.stderr
        assert content(tmp_path / "set") == content(tmp_path / "whole")

    def test_after_a_stop_while_reducing(
        self, tmp_path: Path, real_fasta: Path, expected: dict[str, bytes], monkeypatch: Any
    ) -> None:
        build = Workspace.build_shard

        def stop_at_fourth(workspace: Workspace, name: str, *rest: Any, **more: Any) -> Any:
            if name == "shard-00003.arrow":
                workspace.wait()
                raise Stopped
            return build(workspace, name, *rest, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Workspace, "build_shard", stop_at_fourth)
            with pytest.raises(Stopped):
                generate([real_fasta], tmp_path / "set", self.options, unit_bytes=self.unit_bytes)
        work = tmp_path / "set" / ".work"
        (tmp_path / "set" / "shard-00001.arrow").unlink()
        os.truncate(tmp_path / "set" / "shard-00002.arrow", 1000)
        next(work.glob("run-*.run")).unlink()  # as if a node had lost it

        units, shards = self.counting(monkeypatch)
        generate([real_fasta], tmp_path / "set", self.options, unit_bytes=self.unit_bytes)
        assert content(tmp_path / "set") == expected
        assert 1 <= len(units) <= 3
        assert shards == [f"shard-0000{n}.arrow" for n in (1, 2, 3, 4)] + ["holdout-00000.arrow"]

    def test_damaged_run_is_made_again(
        self, tmp_path: Path, real_fasta: Path, expected: dict[str, bytes], monkeypatch: Any
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Workspace, "build_shard", lambda *_, **__: (_ for _ in ()).throw(Stopped))
            with pytest.raises(Stopped):
                generate([real_fasta], tmp_path / "set", self.options, unit_bytes=self.unit_bytes)
        run = max((tmp_path / "set" / ".work").glob("run-*.run"))
        run.write_bytes(run.read_bytes()[:1000])
        units, _ = self.counting(monkeypatch)
        generate([real_fasta], tmp_path / "set", self.options, unit_bytes=self.unit_bytes)
        assert content(tmp_path / "set") == expected
        assert 1 <= len(units) <= 3
