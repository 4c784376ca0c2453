"""Who is excluded, held out or trained on: the same as a plain program says, for any ranks."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from record_sets import DRIVER, content

from preprocessing.errors import InputError
from preprocessing.generate import generate
from preprocessing.keys import HOLDOUT_SEED
from preprocessing.options import PreprocessOptions
from preprocessing.records import RecordSet
from preprocessing.verify import verify

Record = tuple[str, str]
Run = Callable[..., Any]


class Expected(NamedTuple):
    train: list[Record]
    holdout: list[Record]
    counts: Counter[str]


def plain_program(
    records: Sequence[Record],
    *,
    holdout: float,
    max_length: int,
    overlap: int,
    excluded_sequences: Sequence[str] = (),
    excluded_ids: Sequence[str] = (),
    dedup: bool = True,
) -> Expected:
    """What `--long split` with exclusions and hold-out gives, written as it is documented."""

    def is_held(sequence: str) -> bool:
        key = xxhash.xxh3_128_digest(sequence.encode())
        return xxhash.xxh3_64_intdigest(key, HOLDOUT_SEED) < int(holdout * 2**64)

    rows: list[tuple[str, str, bool, bool]] = []  # id, residues, excluded, held out
    counts: Counter[str] = Counter()
    for name, sequence in records:
        excluded = sequence in excluded_sequences or name in excluded_ids
        if len(sequence) <= max_length:
            rows.append((name, sequence, excluded, is_held(sequence)))
            continue
        counts["split"] += 1
        start = 0
        while True:
            start = min(start, len(sequence) - max_length)
            window = sequence[start : start + max_length]
            place = f"{name}/{start + 1}-{start + max_length}"
            by_key = window in excluded_sequences
            rows.append((place, window, excluded or by_key, is_held(sequence)))
            counts["windows"] += 1
            if start + max_length == len(sequence):
                break
            start += max_length - overlap
    out = {sequence for _, sequence, excluded, _ in rows if excluded}
    held = {sequence for _, sequence, _, is_held_out in rows if is_held_out} - out
    splits: dict[bool, list[Record]] = {False: [], True: []}
    for name, sequence, _, is_held_out in sorted(rows):
        if sequence in out:
            counts["excluded"] += 1
        elif sequence in held and not is_held_out:
            counts["in_holdout"] += 1
        elif dedup and sequence in (text for _, text in splits[is_held_out]):
            counts["duplicate"] += 1
        else:
            splits[is_held_out].append((name, sequence))
    return Expected(splits[False], splits[True], counts)


def found(directory: Path, split: str) -> list[Record]:
    records = RecordSet(directory, split)
    every = (records.record(number) for number in range(len(records)))
    return sorted((record.id, record.sequence) for record in every)


def write_fasta(path: Path, records: Sequence[Record]) -> Path:
    path.write_text("".join(f">{name} x\n{sequence}\n" for name, sequence in records))
    return path


# Few different sequences, so that windows equal records and windows of other records.
some_records = st.lists(
    st.tuples(st.text("ab", min_size=1, max_size=2), st.text("MK", min_size=1, max_size=9)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(
    records=some_records,
    max_length=st.integers(2, 5),
    overlap=st.integers(0, 2),
    excluded=st.lists(st.text("MK", min_size=1, max_size=7), max_size=3),
    excluded_ids=st.lists(st.text("ab", min_size=1, max_size=2), max_size=1),
    dedup=st.booleans(),
    unit_bytes=st.integers(5, 200),
)
def test_fates_are_what_a_plain_program_says(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[Record],
    max_length: int,
    overlap: int,
    excluded: list[str],
    excluded_ids: list[str],
    dedup: bool,
    unit_bytes: int,
) -> None:
    directory = tmp_path_factory.mktemp("fates")
    overlap = min(overlap, max_length // 2)
    files = []
    if excluded:
        files.append(write_fasta(directory / "out.fasta", [("x", text) for text in excluded]))
    if excluded_ids:
        files.append(directory / "out.txt")
        files[-1].write_text("\n".join(excluded_ids))
    options = PreprocessOptions(
        shards=3, holdout=0.4, max_length=max_length, long="split", overlap=overlap,
        exclude=tuple(files), dedup=dedup,
    )  # fmt: skip
    manifest = generate(
        [write_fasta(directory / "in.fasta", records)],
        directory / "set",
        options,
        unit_bytes=unit_bytes,
    )
    expected = plain_program(
        records, holdout=0.4, max_length=max_length, overlap=overlap, dedup=dedup,
        excluded_sequences=excluded, excluded_ids=excluded_ids,
    )  # fmt: skip
    assert found(directory / "set", "train") == sorted(expected.train)
    assert found(directory / "set", "holdout") == sorted(expected.holdout)
    totals = manifest["totals"]
    counted = {reason: part["records"] for reason, part in totals["not_kept"].items()}
    assert totals["windows"]["records"] == expected.counts.pop("windows", 0)
    assert {reason: count for reason, count in counted.items() if count} == expected.counts
    verify(directory / "set")


def test_same_bytes_for_any_rank_count(tmp_path: Path, mpirun: Run, real_fasta: Path) -> None:
    """Windows, exclusions and hold-out by cluster of real proteins, on one rank and on three."""
    with real_fasta.open() as file:
        names = [line[1:].split()[0] for line in file if line.startswith(">")]
    ids, table = tmp_path / "ids.txt", tmp_path / "clusters.tsv"
    ids.write_text("\n".join(names[::50]))
    table.write_text("".join(f"{names[n - n % 3]}\t{names[n]}\n" for n in range(len(names))))
    pages: list[dict[str, Any]] = [
        {"shards": 4, "holdout": 0.1, "max_length": 256, "long": "split", "overlap": 64,
         "memory": 2**21, "exclude": (ids,), "compression": "lz4", "spill": tmp_path,
         "keep_metadata": True},
        {"shards": 4, "holdout": 0.05, "holdout_by": table, "max_length": 300, "long": "keep",
         "memory": 2**21, "compression": "zstd"},
    ]  # fmt: skip
    jobs = [
        ([str(real_fasta)], str(tmp_path / f"three{number}"), options, 2**20)
        for number, options in enumerate(pages)
    ]
    result = mpirun(3, "-c", DRIVER, "3", json.dumps(jobs, default=str))
    assert result.stdout.count("done") == 3 * len(jobs), result.stderr
    made = []
    for number, options in enumerate(pages):
        output = tmp_path / f"one{number}"
        made.append(generate([real_fasta], output, PreprocessOptions(**options), unit_bytes=2**20))
        assert content(tmp_path / f"three{number}") == content(output)
        verify(output)
    windows, clusters = (manifest["totals"] for manifest in made)
    assert windows["not_kept"]["excluded"]["records"] >= len(names[::50])
    assert windows["not_kept"]["in_holdout"]["records"] > 0
    assert windows["windows"]["records"] > windows["not_kept"]["split"]["records"] > 1000
    assert clusters["longer_than_max_length"]["records"] > 1000
    assert clusters["not_kept"]["in_holdout"]["records"] > 0
    assert clusters["not_in_clusters"] == 0


RECORDS = [("a", "MKV"), ("b", "MKW"), ("c", "MKV"), ("d", "mkyy*")]


class TestExclusionFiles:
    """A table of `prothpc filter`, a FASTA or a list of ids names what is left out."""

    def make(self, tmp_path: Path, *files: Path) -> list[str]:
        fasta = write_fasta(tmp_path / "in.fasta", RECORDS)
        generate([fasta], tmp_path / "set", PreprocessOptions(exclude=files, dedup=False))
        return [name for name, _ in found(tmp_path / "set", "train")]

    def test_fasta(self, tmp_path: Path) -> None:
        out = write_fasta(tmp_path / "out", [("other", "mkv"), ("more", "MKYY")])
        assert self.make(tmp_path, out) == ["b"]

    def test_ids_reach_equal_sequences_under_other_ids(self, tmp_path: Path) -> None:
        (tmp_path / "out.txt").write_bytes(b"c\r\n\n unknown \n")
        assert self.make(tmp_path, tmp_path / "out.txt") == ["b", "d"]

    @pytest.mark.parametrize("kind", ["binary", "hex", "id"])
    def test_table(self, tmp_path: Path, kind: str) -> None:
        keys: list[Any] = [xxhash.xxh3_128_digest(text) for text in (b"MKV", b"MKYY", b"AAA")]
        columns: dict[str, Any] = {"id": ["a", "d", "x"], "hit": ["q", "q", "q"]}
        if kind == "binary":
            columns["key"] = pa.array(keys, pa.binary(16))
        elif kind == "hex":
            columns["key"] = [key.hex() for key in keys]
        pq.write_table(pa.table(columns), tmp_path / "exclusions.parquet")
        assert self.make(tmp_path, tmp_path / "exclusions.parquet") == ["b"]

    def test_ids_stand_in_for_missing_keys(self, tmp_path: Path) -> None:
        keys = pa.array([None, xxhash.xxh3_128_digest(b"MKYY")], pa.binary(16))
        pq.write_table(pa.table({"id": ["b", "a"], "key": keys}), tmp_path / "out.parquet")
        assert self.make(tmp_path, tmp_path / "out.parquet") == ["a", "c"]

    def test_empty_table_excludes_nothing(self, tmp_path: Path) -> None:
        empty = pa.table({"id": pa.array([], pa.string()), "key": pa.array([], pa.binary(16))})
        pq.write_table(empty, tmp_path / "out.parquet")
        assert self.make(tmp_path, tmp_path / "out.parquet") == ["a", "b", "c", "d"]

    def test_several_files_and_their_hashes(self, tmp_path: Path) -> None:
        (tmp_path / "one").write_text("b\n")
        write_fasta(tmp_path / "two", [("x", "MKV")])
        assert self.make(tmp_path, tmp_path / "one", tmp_path / "two") == ["d"]
        options = json.loads((tmp_path / "set" / "manifest.json").read_bytes())["options"]
        contents = [(tmp_path / name).read_bytes() for name in ("one", "two")]
        assert options["exclude"] == sorted(
            ({"bytes": len(text), "hash": xxhash.xxh3_128_hexdigest(text)} for text in contents),
            key=lambda entry: entry["hash"],
        )
        (tmp_path / "one").write_text("d\n")
        with pytest.raises(InputError, match="--exclude named other files"):
            self.make(tmp_path, tmp_path / "one", tmp_path / "two")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b"a\nsome words\n", r"out, line 2: 'some words' is no id"),
            (b"\x00\x01", r"out, line 1: .* is no id"),
            (b"PAR1xxxx", r"out: the Parquet file is damaged"),
            (b">a\nM-V\n", r"out, line 2, record 'a': character '-'"),
        ],
    )
    def test_nonsense_is_refused_and_can_be_mended(
        self, tmp_path: Path, text: bytes, message: str
    ) -> None:
        (tmp_path / "out").write_bytes(text)
        with pytest.raises(InputError, match=message):
            self.make(tmp_path, tmp_path / "out")
        (tmp_path / "out").write_text("b\n")
        assert self.make(tmp_path, tmp_path / "out") == ["a", "c", "d"]

    def test_missing_file_and_table_without_keys(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"out: cannot be read: No such file"):
            self.make(tmp_path, tmp_path / "out")
        pq.write_table(pa.table({"name": ["a"]}), tmp_path / "out")
        with pytest.raises(InputError, match="neither a column 'key' nor a column 'id'"):
            self.make(tmp_path, tmp_path / "out")
        pq.write_table(pa.table({"key": ["abc"]}), tmp_path / "out")
        with pytest.raises(InputError, match="a key has 16 bytes, or 32 hexadecimal digits"):
            self.make(tmp_path, tmp_path / "out")
