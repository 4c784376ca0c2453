"""A few of the faults of `make test-faults`, and some that need a certain order of events."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from record_sets import content

from preprocessing import spill
from preprocessing.errors import InputError
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.workspace import Workspace

PROGRAM = Path(__file__).with_name("faults.py")


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        pytest.param("kill", 5, marks=pytest.mark.slow),
        pytest.param("fill", 3, marks=pytest.mark.slow),
        pytest.param("damage", 40, marks=pytest.mark.slow),
    ],
)
def test_same_command_ends_in_the_same_bytes_or_names_what_is_corrupt(
    kind: str, count: int, tmp_path: Path
) -> None:
    counts = {"kill": 0, "fill": 0, "damage": 0} | {kind: count}
    arguments = [value for name, number in counts.items() for value in (f"--{name}s", str(number))]
    result = subprocess.run(
        [sys.executable, PROGRAM, "--seed", "1", *arguments, "--directory", tmp_path],
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


OPTIONS = PreprocessOptions(shards=2, memory=2**20)


def fasta(path: Path, letter: str, bad: str = "") -> Path:
    """About ten runs of records, and at the end perhaps something that is refused."""
    path.write_text(
        "".join(f">{letter}{n}\n{letter * (n % 997 + 1)}\n" for n in range(20_000)) + bad
    )
    return path


def test_refused_job_leaves_nothing_to_the_next(tmp_path: Path, monkeypatch: Any) -> None:
    publish, published = spill.publish, []

    def slow_disk(temporary: Path, path: Path) -> None:
        published.append(path)
        time.sleep(0.3)
        publish(temporary, path)

    good, bad = fasta(tmp_path / "in.fasta", "M"), fasta(tmp_path / "bad.fasta", "V", "M-V\n")
    with monkeypatch.context() as patch:
        patch.setattr(spill, "publish", slow_disk)
        with pytest.raises(InputError, match=r"bad\.fasta, line 40,001"):
            generate([bad], tmp_path / "set", OPTIONS, unit_bytes=10**6)
        already = len(published)
        time.sleep(0.7)
        assert len(published) == already > 0  # it could come between the next job's files
    assert list((tmp_path / "set").iterdir()) == []
    generate([good], tmp_path / "set", OPTIONS, unit_bytes=10**6)
    generate([good], tmp_path / "other", OPTIONS, unit_bytes=10**6)
    assert content(tmp_path / "set") == content(tmp_path / "other")


def test_runs_without_a_plan_belong_to_nobody(tmp_path: Path, monkeypatch: Any) -> None:
    class Stopped(BaseException):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped

    first, second = fasta(tmp_path / "first.fasta", "M"), fasta(tmp_path / "second.fasta", "V")
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "build_shard", stop)
        with pytest.raises(Stopped):
            generate([first], tmp_path / "set", OPTIONS)
    (tmp_path / "set" / ".work" / "plan.json").unlink()
    generate([second], tmp_path / "set", OPTIONS)
    generate([second], tmp_path / "other", OPTIONS)
    assert content(tmp_path / "set") == content(tmp_path / "other")
