"""After any loss, the runs that are used hold whole units, and each once."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from preprocessing.columns import key_column
from preprocessing.errors import InputError
from preprocessing.keys import Placement
from preprocessing.runs import RUN_COLUMNS, RunSet
from preprocessing.spill import Spiller, UnitResult, usable_runs

PLACEMENT = Placement(3, 0.2)
PARTS = 2
MEMORY = 2_500
UNIT_ROWS = {0: 10, 1: 30, 2: 500, 3: 20, 4: 0, 5: 5, 6: 400, 7: 1}
"""Records of each unit; two are longer than the memory budget."""


def write_runs(directory: Path) -> list[str]:
    spiller = Spiller(directory, PLACEMENT, MEMORY, parts=PARTS)
    for unit, rows in UNIT_ROWS.items():
        for start in range(0, rows, 7):
            texts = [f"MKV{unit}{row}".encode() for row in range(start, min(start + 7, rows))]
            digests = b"".join(xxhash.xxh3_128_digest(text) for text in texts)
            keys = np.frombuffer(digests, np.uint8).reshape(-1, 16)
            ids = pa.array([b"unit%d" % unit] * len(texts), pa.binary())
            columns = [key_column(keys), ids, pa.array(texts, pa.binary())]
            spiller.add(unit, columns, PLACEMENT.shard_of(keys))
        spiller.end_unit(UnitResult(unit=unit, counts=Counter(rows=rows), block_hashes=["ab"]))
    names = [run.name for run in spiller.flush()]
    assert sorted(names) == sorted(path.name for path in directory.iterdir())
    return names


def rows_of_units(directory: Path, names: list[str], limit: int = 10**6) -> Counter[int]:
    """Count the records of each unit; see on the way that they lie where they belong."""
    found: Counter[int] = Counter()
    runs = RunSet([directory / name for name in names], parts=PARTS, limit=limit)
    for shard in range(len(PLACEMENT)):
        last = b""
        for bucket in runs.buckets(shard):
            keys = []
            for table in bucket.portions():
                assert (PLACEMENT.shard_of(table.keys) == shard).all()
                keys += [key.tobytes() for key in table.keys]
                texts = table.residues.to_pylist()
                assert [xxhash.xxh3_128_digest(text) for text in texts] == keys[-table.rows :]
                found.update(int(name[4:]) for name in table.ids.to_pylist())
            assert last < min(keys)
            last = max(keys)
    return found


def test_all_records_are_in_the_runs(tmp_path: Path) -> None:
    names = write_runs(tmp_path)
    assert len(names) > 3
    assert rows_of_units(tmp_path, names) == Counter(UNIT_ROWS)
    assert rows_of_units(tmp_path, names, limit=200) == Counter(UNIT_ROWS)
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
            lost.write_bytes(lost.read_bytes()[:-10])
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
        spiller.add(0, [key_column(np.zeros((1, 16), np.uint8)), text, text], np.zeros(1, np.int64))


def test_any_flipped_byte_of_a_run_is_noticed(tmp_path: Path) -> None:
    names = write_runs(tmp_path)
    path = tmp_path / names[0]
    data = path.read_bytes()
    for place in [*range(0, len(data), 97), *range(len(data) - 40, len(data))]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        if len(usable_runs(tmp_path)) == len(names):
            with pytest.raises(InputError, match=rf"{path.name}: went bad.*run the same command"):
                rows_of_units(tmp_path, names)
        assert not path.exists()


def test_more_columns_travel_with_the_records(tmp_path: Path) -> None:
    schema = RUN_COLUMNS.append(pa.field("taxon", pa.binary(4))).append(
        pa.field("note", pa.binary())
    )
    spiller = Spiller(tmp_path, Placement(2, 0.0), MEMORY, schema=schema)
    keys = np.random.default_rng(0).integers(0, 256, (50, 16), np.uint8)
    texts = [b"M" * (1 + number) for number in range(50)]
    columns = [
        key_column(keys),
        pa.array([b"%d" % number for number in range(50)], pa.binary()),
        pa.array(texts, pa.binary()),
        pa.array([b"%04d" % number for number in range(50)], pa.binary(4)),
        pa.array([b"n" * number for number in range(50)], pa.binary()),
    ]
    for first in range(0, 50, 5):
        some = [column.slice(first, 5) for column in columns]
        spiller.add(0, some, Placement(2, 0.0).shard_of(keys[first : first + 5]))
    spiller.end_unit(UnitResult(unit=0))
    paths = [tmp_path / run.name for run in spiller.flush()]
    runs = RunSet(paths, parts=1, limit=10**6, schema=schema)
    rows = [
        row
        for shard in range(2)
        for bucket in runs.buckets(shard)
        for table in bucket.portions()
        for row in zip(*(column.to_pylist() for column in table.columns), strict=True)
    ]
    assert sorted(rows) == sorted(zip(*(c.to_pylist() for c in columns), strict=True))
