"""Records are found by number and by key, across batches and shards."""

import gc
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from preprocessing import shards
from preprocessing.errors import InputError
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.records import RecordSet, canonical_json

SEQUENCES = [
    f"M{'KVAD'[n % 4] * (n % 7 + 1)}{'ACDEFGHIKL'[n // 10 % 10]}{'W' * n}" for n in range(60)
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 records in 5 train and 2 held-out shards, 4 rows a batch."""
    root = tmp_path_factory.mktemp("records")
    fasta = root / "small.fasta"
    fasta.write_text("".join(f">id{n}\n{text}\n" for n, text in enumerate(SEQUENCES)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "ROWS_PER_BATCH", 4)
        patch.setattr("preprocessing.manifest.ROWS_PER_BATCH", 4)
        generate([fasta], root / "set", PreprocessOptions(shards=5, holdout=0.4))
    return root / "set"


def recompress(directory: Path, target: Path, compression: str) -> Path:
    """Copy a record set, its shards' bodies compressed."""
    shutil.copytree(directory, target)
    manifest = json.loads((target / "manifest.json").read_bytes())
    for about in (about for split in manifest["splits"].values() for about in split["shards"]):
        path = target / about["name"]
        table = pa.ipc.open_file(path.read_bytes())
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with pa.ipc.new_file(path, table.schema, options=options) as writer:
            for number in range(table.num_record_batches):
                writer.write_batch(table.get_batch(number))
        about["bytes"] = path.stat().st_size
    (target / "manifest.json").write_bytes(canonical_json(manifest))
    return target


@pytest.fixture(scope="module", params=["none", "lz4", "zstd"])
def any_directory(request: pytest.FixtureRequest, directory: Path) -> Path:
    if request.param == "none":
        return directory
    return recompress(directory, directory.parent / request.param, request.param)


def all_records(records: RecordSet) -> list[tuple[bytes, str, str]]:
    return [tuple(records.record(number)) for number in range(len(records))]


def test_splits_hold_every_record_once_in_order_of_keys(directory: Path) -> None:
    train, held = RecordSet(directory), RecordSet(directory, "holdout")
    found = all_records(train) + all_records(held)
    assert sorted(found, key=lambda record: int(record[1][2:])) == [
        (xxhash.xxh3_128_digest(text.encode()), f"id{n}", text) for n, text in enumerate(SEQUENCES)
    ]
    for records in (train, held):
        keys = [key for key, _, _ in all_records(records)]
        assert keys == sorted(keys)
        assert records.num_residues == sum(len(text) for _, _, text in all_records(records))
        assert len(records) > 10


def test_any_range_is_the_same_as_its_records_one_by_one(any_directory: Path) -> None:
    records = RecordSet(any_directory)
    expected = all_records(records)
    for start in range(len(records) + 1):
        for stop in range(start, len(records) + 1):
            part = records.read(start, stop)
            texts = [
                part.residues[part.offsets[i] : part.offsets[i + 1]].tobytes().decode()
                for i in range(len(part))
            ]
            keys = [key.tobytes() for key in part.keys]
            assert list(zip(keys, part.ids(), texts, strict=True)) == expected[start:stop]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 10**6)])
def test_range_outside_is_an_index_error(directory: Path, start: int, stop: int) -> None:
    with pytest.raises(IndexError):
        RecordSet(directory).read(start, stop)


def test_range_in_a_batch_is_a_view_of_the_file(directory: Path) -> None:
    part = RecordSet(directory).read(0, 2)
    for array in (part.keys, part.offsets, part.residues):
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_picked_records_are_those_asked_for_in_that_order(any_directory: Path) -> None:
    expected = all_records(RecordSet(any_directory))
    records = RecordSet(any_directory)
    for seed in range(20):
        numbers = np.random.default_rng(seed).integers(0, len(records), 3 * seed)
        picked = records.pick(numbers)
        assert len(picked) == len(numbers)
        assert [key.tobytes() for key in picked.keys] == [expected[n][0] for n in numbers]
        assert picked.lengths.tolist() == [len(expected[n][2]) for n in numbers]
        residues = picked.residues().tobytes().decode()
        assert residues == "".join(expected[n][2] for n in numbers)


def test_parts_of_picked_records(directory: Path) -> None:
    records = RecordSet(directory)
    picked = records.pick(np.array([3, 0, 3]))
    first, count = np.array([1, 2, 0]), np.array([2, 0, 3])
    texts = [records.record(n).sequence for n in (3, 3)]
    residues = picked.residues(first, count).tobytes().decode()
    assert residues == texts[0][1:3] + texts[1][:3]
    for wrong in (picked.lengths + 1, np.array([-1, 0, 0])):
        with pytest.raises(IndexError, match="beyond the ends"):
            picked.residues(0, wrong)
    with pytest.raises(IndexError, match="beyond the ends"):
        picked.residues(np.array([-1, 0, 0]), count)


@pytest.mark.parametrize("number", [-1, 10**6])
def test_picking_outside_is_an_index_error(directory: Path, number: int) -> None:
    with pytest.raises(IndexError):
        RecordSet(directory).pick(np.array([0, number]))


def test_picked_records_outlive_the_set_and_its_cache(
    any_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preprocessing.records.CACHED_BYTES", 1)
    monkeypatch.setattr("preprocessing.records._CACHED_BATCHES", 1)
    records = RecordSet(any_directory)
    numbers = np.arange(len(records))[::-1]
    expected = "".join(records.record(n).sequence for n in numbers.tolist())
    picked = records.pick(numbers)
    assert len(records._recent) == 1
    for number in range(len(records)):  # what was picked is forgotten meanwhile
        records.pick(np.array([number]))
    del records
    gc.collect()
    assert picked.residues().tobytes().decode() == expected


def test_offsets_that_leave_the_shard_are_refused(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "set")
    records = RecordSet(tmp_path / "set")
    offsets = records.read(0, 2).offsets
    path = tmp_path / "set" / "shard-00000.arrow"
    content = path.read_bytes()
    wrong = np.array([*offsets[:-1], 2**30], np.int32)
    assert content.count(offsets.tobytes()) == 1
    path.write_bytes(content.replace(offsets.tobytes(), wrong.tobytes()))
    with pytest.raises(InputError, match=r"shard-00000\.arrow: some records lie outside of it"):
        RecordSet(tmp_path / "set").pick(np.arange(3))


def test_opening_6000_shards_reads_the_manifest_only(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "set")
    manifest = json.loads((directory / "manifest.json").read_bytes())
    shards = manifest["splits"]["train"]["shards"]
    last = shards[-1] | {"name": "shard-05999.arrow"}
    (tmp_path / "set" / shards[-1]["name"]).rename(tmp_path / "set" / last["name"])
    empty = shards[0] | {"records": 0, "residues": 0, "first_key": None}
    names = (f"shard-{n:05d}.arrow" for n in range(len(shards) - 1, 5999))
    manifest["splits"]["train"]["shards"] = [
        *shards[:-1], *(empty | {"name": name} for name in names), last
    ]  # fmt: skip
    (tmp_path / "set" / "manifest.json").write_bytes(canonical_json(manifest))
    counting = f"""
import sys
from pathlib import Path
import pyarrow
from preprocessing.records import RecordSet, canonical_json

opened = []
sys.addaudithook(lambda event, arguments: event == "open" and opened.append(str(arguments[0])))
records = RecordSet(Path({str(tmp_path / "set")!r}))
print([Path(name).name for name in opened], len(records._shards))
mapped = lambda: [line.split()[-1] for line in open("/proc/self/maps") if ".arrow" in line]
print(mapped())
records.record(len(records) - 1)
print([Path(name).name for name in mapped()])
"""
    done = subprocess.run(
        [sys.executable, "-c", counting], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "['manifest.json'] 6000",
        "[]",
        "['shard-05999.arrow']",
    ]


def test_every_key_is_found_and_no_other(any_directory: Path) -> None:
    train, held = RecordSet(any_directory), RecordSet(any_directory, "holdout")
    for records, other in ((train, held), (held, train)):
        for number, (key, _, _) in enumerate(all_records(records)):
            assert records.find(key) == number
            assert other.find(key) is None
    for key in (bytes(16), b"\xff" * 16, xxhash.xxh3_128_digest(b"not there")):
        assert train.find(key) is None
    with pytest.raises(ValueError, match="16 bytes"):
        train.find(b"short")


def test_open_set_can_be_sent_to_another_process(directory: Path) -> None:
    records = RecordSet(directory)
    records.record(0)
    copy = pickle.loads(pickle.dumps(records))
    assert all_records(copy) == all_records(records)
    assert copy.fingerprint == records.fingerprint


def test_fingerprint_is_the_hash_of_the_manifest(directory: Path) -> None:
    content = (directory / "manifest.json").read_bytes()
    assert RecordSet(directory).fingerprint == xxhash.xxh3_128_hexdigest(content)


def test_empty_shards_are_read_over(tmp_path: Path) -> None:
    fasta = tmp_path / "one.fasta"
    fasta.write_text(">only\nMKV\n")
    generate([fasta], tmp_path / "set", PreprocessOptions(shards=40))
    records = RecordSet(tmp_path / "set")
    assert tuple(records.record(0)) == (xxhash.xxh3_128_digest(b"MKV"), "only", "MKV")
    assert records.find(xxhash.xxh3_128_digest(b"MKV")) == 0
    assert records.find(xxhash.xxh3_128_digest(b"MKW")) is None
    assert len(records.read(0, 0)) == len(records.read(1, 1)) == 0


class TestRefusals:
    """What is no readable record set is refused with what to do."""

    def test_directory_without_a_manifest(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"not a record set.*prothpc preprocess"):
            RecordSet(tmp_path)
        with pytest.raises(InputError, match="not a record set"):
            RecordSet(tmp_path / "missing")

    def test_unfinished_set(self, tmp_path: Path) -> None:
        (tmp_path / ".work").mkdir()
        with pytest.raises(
            InputError, match=r"unfinished.*run the same 'prothpc preprocess' again"
        ):
            RecordSet(tmp_path)

    def test_other_version(self, directory: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(directory, tmp_path / "set")
        manifest = json.loads((copy / "manifest.json").read_bytes())
        (copy / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
        with pytest.raises(InputError, match="version 2"):
            RecordSet(copy)

    @pytest.mark.parametrize(
        "content", ["", "[]", "{", '{"format": "prothpc-records", "version": 1}']
    )
    def test_damaged_manifest(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(InputError, match="damaged"):
            RecordSet(tmp_path)

    def test_missing_split(self, directory: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no split 'test'"):
            RecordSet(directory, "test")
        fasta = tmp_path / "one.fasta"
        fasta.write_text(">only\nMKV\n")
        generate([fasta], tmp_path / "set", PreprocessOptions())
        with pytest.raises(InputError, match="no split 'holdout'"):
            RecordSet(tmp_path / "set", "holdout")

    def test_missing_and_short_shard(self, directory: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(directory, tmp_path / "set")
        records = RecordSet(copy)
        records.check_files()
        shard = copy / "shard-00002.arrow"
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(InputError, match=r"shard-00002\.arrow.*bytes instead.*prothpc verify"):
            records.check_files()
        shard.unlink()
        with pytest.raises(InputError, match=r"shard-00002\.arrow.*missing.*prothpc verify"):
            all_records(records)
