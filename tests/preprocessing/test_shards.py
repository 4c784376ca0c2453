"""A shard's bytes depend on its records alone; equal keys are not taken for equal residues."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from preprocessing.columns import key_column, open_arrow
from preprocessing.records import ROWS_PER_BATCH, SCHEMA
from preprocessing.runs import Table
from preprocessing.shards import Shard, build_shard

Row = tuple[bytes, str, str]  # key, id, residues


class Portions(NamedTuple):
    """Stands for a `runs.Bucket`."""

    tables: list[Table]

    def portions(self) -> Iterator[Table]:
        yield from self.tables

    @property
    def is_large(self) -> bool:
        return len(self.tables) > 1


def table(rows: list[Row]) -> Table:
    keys = np.frombuffer(b"".join(key for key, _, _ in rows), np.uint8).reshape(-1, 16)
    texts = ([name.encode() for _, name, _ in rows], [text.encode() for _, _, text in rows])
    return Table((key_column(keys), *(pa.array(column, pa.binary()) for column in texts)))


def build(
    directory: Path, buckets: list[list[list[Row]]], *, dedup: bool = True
) -> tuple[Shard, bytes]:
    """Make a shard of buckets, each in portions."""
    path = directory / "shard-00000.arrow"
    tables: Any = [Portions([table(rows) for rows in portions]) for portions in buckets]
    shard = build_shard(
        path, path, tables, dedup=dedup, marks=True, metadata=False, compression="none"
    )
    return shard, path.read_bytes()


def read(path: Path) -> list[Row]:
    table = open_arrow(path).read_all()
    return [(row["key"], row["id"], bytes(row["tokens"]).decode()) for row in table.to_pylist()]


def some_rows(count: int) -> list[Row]:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        text = "".join(rng.choice(list("ACDEFGHIKL"), size=rng.integers(1, 9)))
        rows.append((xxhash.xxh3_128_digest(text.encode()), f"id{number}", text))
    return rows


def test_same_bytes_from_any_runs_in_any_memory(tmp_path: Path) -> None:
    rows = some_rows(2 * ROWS_PER_BATCH + 500)
    rows.sort(key=lambda row: row[0])
    shard, whole = build(tmp_path, [[rows]])
    assert 2 * ROWS_PER_BATCH < shard.records + shard.left_out["duplicate.records"] == len(rows)
    assert shard.xxh3_128 == xxhash.xxh3_128_hexdigest(whole)
    assert shard.bytes == len(whole)
    middle = next(n for n in range(5000, 6000) if rows[n][0] != rows[n - 1][0])
    for buckets in [
        [[rows[::-1]]],
        [[rows[:middle]], [rows[middle:]]],
        [[rows[::3], rows[2::3], rows[1::3]]],
        [[rows[:middle:2], rows[1:middle:2]], [rows[middle:]]],
    ]:
        assert build(tmp_path, buckets) == (shard, whole)


def test_batches_are_full_and_columns_hold_no_nulls(tmp_path: Path) -> None:
    rows = [(number.to_bytes(16, "big"), "a", "M") for number in range(ROWS_PER_BATCH + 1)]
    build(tmp_path, [[rows[:99]], [rows[99:]]])
    reader = open_arrow(tmp_path / "shard-00000.arrow")
    assert reader.schema.equals(SCHEMA, check_metadata=True)
    assert [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)] == [
        ROWS_PER_BATCH,
        1,
    ]
    batch = reader.get_batch(0)
    batch.validate(full=True)
    assert all(column.buffers()[0] is None for column in batch.columns)


def test_empty_shard_is_an_arrow_file_without_batches(tmp_path: Path) -> None:
    shard, _ = build(tmp_path, [])
    assert (shard.first_key, shard.records) == (None, 0)
    assert open_arrow(tmp_path / "shard-00000.arrow").num_record_batches == 0


@pytest.mark.parametrize("portion", [8, 3, 1])
def test_smallest_id_survives(tmp_path: Path, portion: int) -> None:
    rows = [(key * 16, name, "MK") for key in (b"a", b"\xff") for name in ("b", "a10", "a9", "é")]
    shard, _ = build(tmp_path, [[rows[start : start + portion] for start in range(0, 8, portion)]])
    assert read(tmp_path / shard.name) == [(b"a" * 16, "a10", "MK"), (b"\xff" * 16, "a10", "MK")]
    assert (shard.left_out["duplicate.records"], shard.left_out["duplicate.residues"]) == (6, 12)


def test_all_stay_without_dedup(tmp_path: Path) -> None:
    rows = [(b"k" * 16, name, "MK") for name in ("b", "a", "b")]
    shard, _ = build(tmp_path, [[rows[:1], rows[1:]]], dedup=False)
    assert [name for _, name, _ in read(tmp_path / shard.name)] == ["a", "b", "b"]
    assert "duplicate.records" not in shard.left_out


def test_different_residues_under_one_key_all_stay(tmp_path: Path) -> None:
    key = b"k" * 16
    rows = [(key, "c", "MK"), (key, "b", "WW"), (key, "a", "WW"), (key, "d", "AA"), (key, "e", "M")]
    shard, whole = build(tmp_path, [[rows]])
    assert read(tmp_path / shard.name) == [
        (key, "d", "AA"), (key, "e", "M"), (key, "c", "MK"), (key, "a", "WW"),
    ]  # fmt: skip
    assert shard.left_out["duplicate.records"] == 1
    assert build(tmp_path, [[rows[3:], rows[:3]]])[1] == whole


def test_keys_that_differ_late_are_in_order(tmp_path: Path) -> None:
    keys = [b"k" * 8 + bytes(7) + bytes([last]) for last in (9, 3, 200, 3)]
    rows = [(key, "x", "M" * (1 + key[-1])) for key in keys]
    shard, _ = build(tmp_path, [[rows[:2], rows[2:]]])
    assert [key[-1] for key, _, _ in read(tmp_path / shard.name)] == [3, 9, 200]


def test_marks_rule_over_records_in_other_portions(tmp_path: Path) -> None:
    gone, held, stays = b"a" * 16, b"b" * 16, b"c" * 16
    rows = [
        (gone, "x", "MK"), (stays, "y", "MW"), (held, "z", "MA"), (gone, "u", "MK"),
        (held, "", "+"), (gone, "", "-"), (stays, "v", "MW"),
    ]  # fmt: skip
    for portion in (7, 2, 1):
        shard, _ = build(
            tmp_path, [[rows[start : start + portion] for start in range(0, 7, portion)]]
        )
        assert read(tmp_path / shard.name) == [(stays, "v", "MW")]
        assert shard.left_out == {
            "excluded.records": 2, "excluded.residues": 4, "in_holdout.records": 1,
            "in_holdout.residues": 2, "duplicate.records": 1, "duplicate.residues": 2,
        }  # fmt: skip
