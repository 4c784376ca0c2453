"""A few of the faults of `make test-faults`: kills, full disks and damaged files."""

import subprocess
import sys
from pathlib import Path

import pytest

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
