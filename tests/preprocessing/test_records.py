"""Records are found by number and by key, across batches and shards."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import xxhash

from preprocessing import shards
from preprocessing.errors import InputError
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.records import RecordSet

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


def test_any_range_is_the_same_as_its_records_one_by_one(directory: Path) -> None:
    records = RecordSet(directory)
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


def test_every_key_is_found_and_no_other(directory: Path) -> None:
    train, held = RecordSet(directory), RecordSet(directory, "holdout")
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
