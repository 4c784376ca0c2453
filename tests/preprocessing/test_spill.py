"""After any loss, the runs that are used hold whole units, and each once."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from preprocessing.columns import key_array
from preprocessing.errors import InputError
from preprocessing.keys import Placement
from preprocessing.spill import RunReader, Spiller, UnitResult, usable_runs

PLACEMENT = Placement(3, 0.2)
MEMORY = 20_000
UNIT_ROWS = {0: 10, 1: 30, 2: 500, 3: 20, 4: 0, 5: 5, 6: 400, 7: 1}
"""Records of each unit; two are longer than the memory budget."""


def write_runs(directory: Path) -> list[str]:
    spiller = Spiller(directory, PLACEMENT, MEMORY)
    for unit, rows in UNIT_ROWS.items():
        for start in range(0, rows, 7):
            texts = [f"MKV{unit}{row}".encode() for row in range(start, min(start + 7, rows))]
            digests = b"".join(xxhash.xxh3_128_digest(text) for text in texts)
            keys = np.frombuffer(digests, np.uint8).reshape(-1, 16)
            spiller.add(
                unit,
                keys,
                pa.array([b"unit%d" % unit] * len(texts), pa.binary()),
                pa.array(texts, pa.binary()),
                PLACEMENT.shard_of(keys),
            )
        spiller.end_unit(UnitResult(unit=unit, counts=Counter(rows=rows), block_hashes=["ab"]))
    spiller.flush()
    names = [run.name for run in spiller.runs]
    assert sorted(names) == sorted(path.name for path in directory.iterdir())
    return names


def rows_of_units(directory: Path, names: list[str]) -> Counter[int]:
    """Count the records of each unit; see on the way that they lie where they belong."""
    found: Counter[int] = Counter()
    for reader in (RunReader(directory / name) for name in names):
        for shard in range(len(PLACEMENT)):
            batches = reader.of_shard(shard)
            keys = [key.tobytes() for b in batches for key in key_array(b.column(0))]
            assert keys == sorted(keys)
            for batch in batches:
                assert (PLACEMENT.shard_of(key_array(batch.column(0))) == shard).all()
                texts = batch.column(2).to_pylist()
                assert [xxhash.xxh3_128_digest(text) for text in texts] == [
                    key.tobytes() for key in key_array(batch.column(0))
                ]
                found.update(int(name[4:]) for name in batch.column(1).to_pylist())
    return found


def test_all_records_are_in_the_runs(tmp_path: Path) -> None:
    names = write_runs(tmp_path)
    assert len(names) > 8
    assert rows_of_units(tmp_path, names) == Counter(UNIT_ROWS)
    runs = usable_runs(tmp_path)
    assert sorted(run.name for run in runs) == sorted(names)
    results = {result.unit: result for run in runs for result in run.finished}
    assert {unit: result.counts["rows"] for unit, result in results.items()} == UNIT_ROWS


@pytest.mark.parametrize("damage", ["lost", "cut short"])
def test_without_any_one_run_whole_units_remain(tmp_path: Path, damage: str) -> None:
    for number in range(len(write_runs(tmp_path))):
        for path in tmp_path.iterdir():
            path.unlink()
        lost = tmp_path / write_runs(tmp_path)[number]
        if damage == "lost":
            lost.unlink()
        else:
            lost.write_bytes(lost.read_bytes()[:-100])
        runs = usable_runs(tmp_path)
        names = [run.name for run in runs]
        finished = [result.unit for run in runs for result in run.finished]
        assert len(set(finished)) == len(finished) < len(UNIT_ROWS)
        expected = Counter({unit: UNIT_ROWS[unit] for unit in finished})
        assert rows_of_units(tmp_path, names) == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_records_larger_than_the_budget_are_refused(tmp_path: Path) -> None:
    spiller = Spiller(tmp_path, PLACEMENT, MEMORY)
    text = pa.array([b"M" * MEMORY], pa.binary())
    with pytest.raises(InputError, match="raise --memory"):
        spiller.add(0, np.zeros((1, 16), np.uint8), text, text, np.zeros(1, np.int64))
