"""Verify finds every kind of damage, all of it, and nothing in a sound record set."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from preprocessing import shards
from preprocessing.errors import InputError
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.records import SCHEMA, canonical_json, seal
from preprocessing.shards import Compression
from preprocessing.verify import VerifyReport, verify

ROWS = 50  # rows in a batch; a shard has about 90


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 records in 3 train shards and 1 held-out shard."""
    root = tmp_path_factory.mktemp("verify")
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), size=40)) for _ in range(300)]
    (root / "in.fasta").write_text("".join(f">id{n}\n{text}\n" for n, text in enumerate(texts)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "ROWS_PER_BATCH", ROWS)
        patch.setattr("preprocessing.manifest.ROWS_PER_BATCH", ROWS)
        generate([root / "in.fasta"], root / "set", PreprocessOptions(shards=3, holdout=0.1))
    return root / "set"


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "set")


def problems(directory: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        verify(directory)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(str(directory))
    return [line.strip() for line in lines]


def edit_manifest(directory: Path, change: Callable[[Any], None]) -> None:
    path = directory / "manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_bytes(canonical_json(seal(manifest)))


def rewrite_shard(directory: Path, number: int, change: Callable[[Any], None]) -> None:
    """Change a shard's rows, and the manifest to what is in the file then."""
    path = directory / f"shard-{number:05d}.arrow"
    with pa.ipc.open_file(path) as reader:
        columns = reader.read_all().to_pydict()
    change(columns)
    with pa.ipc.new_file(path, SCHEMA) as writer:
        whole = pa.record_batch(columns, schema=SCHEMA)
        for start in range(0, len(whole), ROWS):
            writer.write_batch(whole.slice(start, ROWS))

    def describe(manifest: Any) -> None:
        about = manifest["splits"]["train"]["shards"][number]
        added = len(columns["key"]) - about["records"]
        residues = sum(map(len, columns["tokens"])) - about["residues"]
        totals = manifest["totals"]
        for part in (about, totals["read"], totals["kept"], totals["splits"]["train"]):
            part["records"] += added
            part["residues"] += residues
        manifest["inputs"][0]["records"] += added
        manifest["inputs"][0]["residues"] += residues
        about["first_key"] = columns["key"][0].hex()
        about["bytes"] = path.stat().st_size
        about["xxh3_128"] = xxhash.xxh3_128_hexdigest(path.read_bytes())

    edit_manifest(directory, describe)


def test_sound_set_is_in_order(sound: Path) -> None:
    size = sum(path.stat().st_size for path in sound.glob("*.arrow"))
    assert verify(sound) == VerifyReport(shards=4, records=300, residues=12_000, bytes=size)


def test_sound_set_of_real_proteins_is_in_order(real_fasta: Path, tmp_path: Path) -> None:
    generate([real_fasta], tmp_path / "set", PreprocessOptions(holdout=0.01, dedup=False))
    assert verify(tmp_path / "set").records == 20_000


def test_flipped_bits_anywhere_are_found(copy: Path) -> None:
    path = copy / "shard-00001.arrow"
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        found = problems(copy)
        assert all(line.startswith("shard-00001.arrow: ") for line in found)
        assert "its bytes have the hash" in found[0]


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_flipped_byte_in_any_file_is_found(
    sound: Path, tmp_path: Path, compression: Compression
) -> None:
    """Bits at random places of every file, and at both ends of each."""
    options = PreprocessOptions(shards=2, holdout=0.1, compression=compression)
    generate([sound.parent / "in.fasta"], tmp_path / "set", options)
    rng = np.random.default_rng(0)
    for path in sorted((tmp_path / "set").iterdir()):
        whole = path.read_bytes()
        last = len(whole) - 1
        for place in [0, 9, last - 9, last, *rng.integers(0, len(whole), 60).tolist()]:
            changed = bytearray(whole)
            changed[place] ^= 1 << rng.integers(0, 8)
            path.write_bytes(changed)
            with pytest.raises(InputError) as caught:
                verify(tmp_path / "set")
            assert path.name in str(caught.value)
        path.write_bytes(whole)
    verify(tmp_path / "set")


def test_any_number_of_ranks_finds_the_same(copy: Path, prothpc: Callable[..., Any]) -> None:
    assert prothpc("verify", copy, ranks=3).stdout == prothpc("verify", copy).stdout
    for name in ("shard-00000.arrow", "shard-00002.arrow", "run.json"):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    serial, parallel = (prothpc("verify", copy, ranks=ranks) for ranks in (1, 3))
    said = [line for line in parallel.stderr.splitlines() if "prothpc" in line or "  " in line]
    assert serial.returncode != 0
    assert parallel.returncode != 0
    assert said[: len(serial.stderr.splitlines())] == serial.stderr.splitlines()
    for name in ("shard-00000.arrow", "shard-00002.arrow", "run.json"):
        assert f"  {name}: " in serial.stderr


def test_missing_account_of_the_run_is_noticed(copy: Path) -> None:
    (copy / "run.json").unlink()
    assert problems(copy) == ["run.json: cannot be read: No such file or directory"]


def test_flipped_residue_names_the_record(copy: Path) -> None:
    path = copy / "shard-00002.arrow"
    with pa.ipc.open_file(path) as reader:
        row = reader.get_batch(0).slice(5, 1).to_pylist()[0]
    text = bytes(row["tokens"])
    path.write_bytes(path.read_bytes().replace(text, text[:1].lower() + text[1:]))
    found = problems(copy)
    assert f"shard-00002.arrow: record 5 ({row['id']}) holds a byte that is no residue" in found
    assert f"shard-00002.arrow: record 5 ({row['id']}) has a wrong key" in found


def test_all_problems_are_listed(copy: Path) -> None:
    (copy / "shard-00000.arrow").unlink()
    short = (copy / "shard-00002.arrow").read_bytes()[:-1000]
    (copy / "shard-00002.arrow").write_bytes(short)
    shutil.copy(copy / "holdout-00000.arrow", copy / "shard-00003.arrow")
    found = problems(copy)
    assert found[:2] == [
        "shard-00003.arrow: the file is not in manifest.json",
        "shard-00000.arrow: cannot be read: No such file or directory",
    ]
    assert f"shard-00002.arrow: has {len(short):,} bytes instead of {len(short) + 1000:,}" in found
    assert any(line.startswith("shard-00002.arrow: is no readable Arrow file") for line in found)


@pytest.mark.parametrize("place", ["read", "kept", "not_kept", "train", "input", "shard"])
@pytest.mark.parametrize("what", ["records", "residues"])
def test_changed_count_does_not_add_up(copy: Path, place: str, what: str) -> None:
    def change(manifest: Any) -> None:
        totals = manifest["totals"]
        {
            "read": totals["read"],
            "kept": totals["kept"],
            "not_kept": totals["not_kept"]["too_long"],
            "train": totals["splits"]["train"],
            "input": manifest["inputs"][0],
            "shard": manifest["splits"]["train"]["shards"][1],
        }[place][what] += 1

    edit_manifest(copy, change)
    assert any(f"{what} do not add up" in line for line in problems(copy))


def test_manifest_that_was_formatted_anew_is_noticed(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes())))
    assert problems(copy) == [
        "manifest.json: not written by prothpc (its JSON is not in canonical form)"
    ]


def test_manifest_without_a_shard_is_damaged(copy: Path) -> None:
    edit_manifest(copy, lambda manifest: manifest["splits"]["train"]["shards"].pop())
    with pytest.raises(InputError, match="damaged"):
        verify(copy)


def swap_rows(columns: Any, row: int = 3) -> None:
    for values in columns.values():
        values[row], values[row + 1] = values[row + 1], values[row]


def repeat_row(columns: Any, row: int = 3) -> None:
    for name, values in columns.items():
        values.insert(row + 1, values[row] + "x" if name == "id" else values[row])


def cut_residue(columns: Any) -> None:
    columns["tokens"][2] = columns["tokens"][2][:-1]


def empty_record(columns: Any) -> None:
    columns["tokens"][2] = []


def move_record(columns: Any) -> None:
    text = "MKV"  # its key lies in another shard
    columns["key"][0] = xxhash.xxh3_128_digest(text.encode())
    columns["tokens"][0] = list(text.encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_rows, r"record 4 \(id\d+\) is out of order"),
        (repeat_row, r"record 4 \(id\d+x\) has the same residues as the one before"),
        (partial(swap_rows, row=ROWS - 1), r"record 50 \(id\d+\) is out of order"),
        (partial(repeat_row, row=ROWS - 1), r"record 50 \(id\d+x\) has the same residues"),
        (cut_residue, r"record 2 \(id\d+\) has a wrong key"),
        (empty_record, r"record 2 \(id\d+\) has no residues"),
        (move_record, r"record 0 \(id\d+\) belongs into another shard"),
    ],
)
def test_wrong_content_with_right_hashes_is_found(
    copy: Path, change: Callable[[Any], None], message: str
) -> None:
    rewrite_shard(copy, 0, change)
    found = problems(copy)
    assert any(re.search(message, line) for line in found), found


def test_held_out_window_in_training_is_found(sound: Path, tmp_path: Path) -> None:
    """Whose split does not follow from its own key."""
    options = PreprocessOptions(shards=1, holdout=0.3, max_length=25, long="split", overlap=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "ROWS_PER_BATCH", ROWS)
        patch.setattr("preprocessing.manifest.ROWS_PER_BATCH", ROWS)
        generate([sound.parent / "in.fasta"], tmp_path / "set", options)
    verify(tmp_path / "set")
    with pa.ipc.open_file(tmp_path / "set" / "holdout-00000.arrow") as reader:
        held_out = reader.get_batch(0).slice(3, 1).to_pylist()[0]

    def insert(columns: Any) -> None:
        row = sum(key < held_out["key"] for key in columns["key"])
        for name, values in columns.items():
            values.insert(row, held_out[name])

    rewrite_shard(tmp_path / "set", 0, insert)
    [found] = problems(tmp_path / "set")
    assert re.fullmatch(
        rf"shard-00000.arrow: record \d+ \({held_out['id']}\) is in the held-out split, too", found
    )
