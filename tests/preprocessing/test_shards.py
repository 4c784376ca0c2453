"""A shard's bytes depend on its records alone; equal keys are not taken for equal residues."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from preprocessing.columns import key_column, open_arrow
from preprocessing.keys import Placement
from preprocessing.records import ROWS_PER_BATCH, SCHEMA
from preprocessing.shards import Shard, build_shard
from preprocessing.spill import RUN_COLUMNS, sort_into_shards

Row = tuple[bytes, str, str]  # key, id, residues


def segment(rows: list[Row]) -> pa.RecordBatch:
    rows = sorted(rows, key=lambda row: row[0])
    keys = np.frombuffer(b"".join(key for key, _, _ in rows), np.uint8).reshape(-1, 16)
    return pa.record_batch(
        [
            key_column(keys),
            pa.array([name.encode() for _, name, _ in rows], pa.large_binary()),
            pa.array([text.encode() for _, _, text in rows], pa.large_binary()),
        ],
        schema=pa.schema(RUN_COLUMNS),
    )


def build(
    directory: Path, segments: list[list[Row]], *, dedup: bool = True, memory: int = 2**30
) -> tuple[Shard, bytes]:
    path = directory / "shard-00000.arrow"
    batches = [segment(rows) for rows in segments]
    shard = build_shard(
        path, directory / "tmp", batches, dedup=dedup, marks=True, compression="none", memory=memory
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
    shard, whole = build(tmp_path, [rows])
    assert 2 * ROWS_PER_BATCH < shard.records + shard.left_out["duplicate.records"] == len(rows)
    assert shard.xxh3_128 == xxhash.xxh3_128_hexdigest(whole)
    assert shard.bytes == len(whole)
    for segments, memory in [
        ([rows[::3], rows[1::3], [], rows[2::3]], 2**30),
        ([rows[::-1]], 2**16),  # several sorts a shard
        ([rows[:100], rows[100:]], 2**16),
    ]:
        assert build(tmp_path, segments, memory=memory) == (shard, whole)


def test_batches_are_full_and_columns_hold_no_nulls(tmp_path: Path) -> None:
    rows = [(number.to_bytes(16, "big"), "a", "M") for number in range(ROWS_PER_BATCH + 1)]
    build(tmp_path, [rows], memory=2**16)
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
    shard, _ = build(tmp_path, [[], []])
    assert (shard.first_key, shard.records) == (None, 0)
    assert open_arrow(tmp_path / "shard-00000.arrow").num_record_batches == 0


@pytest.mark.parametrize("memory", [2**30, 64])
def test_smallest_id_survives(tmp_path: Path, memory: int) -> None:
    rows = [(key * 16, name, "MK") for key in (b"a", b"\xff") for name in ("b", "a10", "a9", "é")]
    shard, _ = build(tmp_path, [rows[:3], rows[3:]], memory=memory)
    assert read(tmp_path / shard.name) == [(b"a" * 16, "a10", "MK"), (b"\xff" * 16, "a10", "MK")]
    assert (shard.left_out["duplicate.records"], shard.left_out["duplicate.residues"]) == (6, 12)


def test_all_stay_without_dedup(tmp_path: Path) -> None:
    rows = [(b"k" * 16, name, "MK") for name in ("b", "a", "b")]
    shard, _ = build(tmp_path, [rows], dedup=False)
    assert [name for _, name, _ in read(tmp_path / shard.name)] == ["a", "b", "b"]
    assert "duplicate.records" not in shard.left_out


def test_different_residues_under_one_key_all_stay(tmp_path: Path) -> None:
    key = b"k" * 16
    rows = [(key, "c", "MK"), (key, "b", "WW"), (key, "a", "WW"), (key, "d", "AA"), (key, "e", "M")]
    shard, whole = build(tmp_path, [rows])
    assert read(tmp_path / shard.name) == [
        (key, "d", "AA"), (key, "e", "M"), (key, "c", "MK"), (key, "a", "WW"),
    ]  # fmt: skip
    assert shard.left_out["duplicate.records"] == 1
    assert build(tmp_path, [rows[3:], rows[:3]])[1] == whole


def test_keys_that_differ_late_are_in_order(tmp_path: Path) -> None:
    keys = [b"k" * 8 + bytes(7) + bytes([last]) for last in (9, 3, 200, 3)]
    rows = [(key, "x", "M" * (1 + key[-1])) for key in keys]
    shard, _ = build(tmp_path, [rows[:2], rows[2:]])
    assert [key[-1] for key, _, _ in read(tmp_path / shard.name)] == [3, 9, 200]


def test_shard_borders_within_a_half_key_are_kept() -> None:
    border, placement = 2**128 // 3, Placement(3, 0.0)
    numbers = [border + 1, border - 5, border, border + 7, 0]
    text = b"".join(number.to_bytes(16, "big") for number in numbers)
    keys = np.frombuffer(text, np.uint8).reshape(-1, 16)
    for permutation in ([0, 1, 2, 3, 4], [3, 2, 1, 0, 4], [4, 1, 3, 0, 2]):
        rows, bounds = sort_into_shards(
            keys[permutation], placement.shard_of(keys[permutation]), placement
        )
        shards = [
            {numbers[permutation[row]] for row in rows[start:stop]}
            for start, stop in pairwise(bounds)
        ]
        assert shards == [{0, border - 5, border}, {border + 1, border + 7}, set()]
