"""What `prothpc inspect` counts is what the records are; every record can be found."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from preprocessing import inspect_view
from preprocessing.errors import InputError
from preprocessing.generate import generate
from preprocessing.inspect import Contents, find_id, find_key, find_number, measure, open_splits
from preprocessing.options import PreprocessOptions
from preprocessing.parallel import Serial
from preprocessing.records import RecordSet


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocessing.inspect._PIECE", 7)


@pytest.fixture(scope="module")
def sequences(record_set: Path) -> dict[str, list[str]]:
    return {
        records.split: [records.record(number).sequence for number in range(len(records))]
        for records in open_splits(record_set)
    }


def lengths_and_letters(contents: Contents) -> tuple[Counter[int], Counter[str]]:
    about = contents.as_dict()
    lengths = {int(length): count for length, count in about["length_records"].items()}
    return Counter(lengths), Counter(about["residues"])


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("split", [None, "train", "holdout"])
def test_everything_is_counted(
    record_set: Path, sequences: dict[str, list[str]], split: str | None
) -> None:
    texts = [text for name, part in sequences.items() if split in (None, name) for text in part]
    contents = measure(open_splits(record_set, split), Serial(), sample=0)
    assert contents.records == contents.of == len(texts)
    lengths, letters = lengths_and_letters(contents)
    assert lengths == Counter(map(len, texts))
    assert letters == Counter("".join(texts))
    assert contents.longest == max(map(len, texts))
    assert contents.quantile(0.5) == sorted(map(len, texts))[(len(texts) - 1) // 2]


@pytest.mark.usefixtures("small_pieces")
def test_a_sample_is_a_part_spread_over_all(record_set: Path) -> None:
    splits = open_splits(record_set)
    sampled = measure(splits, Serial(), sample=50)
    assert 50 <= sampled.records <= 56
    assert sampled.of == sum(map(len, splits))
    everything, part = (measure(splits, Serial(), sample=n) for n in (0, 50))
    assert (part.lengths <= everything.lengths).all()
    assert measure(splits, Serial(), sample=10**9).records == sampled.of


def test_a_very_long_protein_is_counted(tmp_path: Path) -> None:
    fasta = tmp_path / "long.fasta"
    fasta.write_text(f">long\n{'W' * 70_000}\n>short\nMK\n")
    generate([fasta], tmp_path / "set", PreprocessOptions(shards=2))
    contents = measure(open_splits(tmp_path / "set"), Serial())
    assert contents.longest == 70_000
    assert contents.lengths[[2, 65_535]].tolist() == [1, 1]
    assert lengths_and_letters(contents)[1] == {"W": 70_000, "M": 1, "K": 1}


def test_every_record_is_found_by_number_key_and_id(record_set: Path) -> None:
    splits = open_splits(record_set)
    for records in splits:
        for number in range(0, len(records), 41):
            one = find_number(records, number)
            assert one.record == records.record(number)
            assert one.split == records.split
            assert find_key(splits, one.record.key.hex()) == [one]
            assert find_id(splits, one.record.id, Serial()) == [one]
    assert find_key(splits, "00" * 16) == find_id(splits, "nobody", Serial()) == []


def test_all_records_with_an_id_or_key_are_found(tmp_path: Path) -> None:
    fasta = tmp_path / "twins.fasta"
    fasta.write_text(">a\nMKV\n>a\nMKVL\n>b\nMKV\n>c\nMKV\n>d\nWWW\n")
    generate([fasta], tmp_path / "set", PreprocessOptions(shards=3, dedup=False))
    splits = open_splits(tmp_path / "set")
    by_id = find_id(splits, "a", Serial())
    assert {one.record.sequence for one in by_id} == {"MKV", "MKVL"}
    key = next(one.record.key for one in by_id if one.record.sequence == "MKV")
    assert [one.record.id for one in find_key(splits, key.hex())] == ["a", "b", "c"]


def test_text_shows_totals_reasons_and_provenance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fasta = tmp_path / "some.fasta"
    fasta.write_text(">a\nMKV\n>b\nMKV\n>c\nmkvl\n>d\nM\n")
    generate([fasta], tmp_path / "set", PreprocessOptions(shards=2, min_length=2))
    show = {"split": None, "sample": 0, "plot": None, "as_json": False}
    inspect_view.show(tmp_path / "set", Serial(), **show)
    text = capsys.readouterr().out
    lines = {tuple(line.split()) for line in text.splitlines()}
    assert ("read", "4", "11") in lines
    assert ("kept", "2", "7") in lines
    assert ("not:", "duplicate", "1", "3") in lines
    assert ("not:", "too", "short", "1", "1") in lines
    assert ("lowercase", "residues:", "4") in lines
    assert "min_length=2" in text
    assert f"read from {fasta}" in text
    assert "by 1 rank on" in text
    assert all(len(line) <= 80 for line in text.splitlines() if str(tmp_path) not in line)
    (tmp_path / "set" / "run.json").write_text("{")
    inspect_view.show(tmp_path / "set", Serial(), **show)
    assert "unknown: run.json is missing or damaged" in capsys.readouterr().out


def test_bars_are_in_proportion(capsys: pytest.CaptureFixture[str], record_set: Path) -> None:
    contents = measure(open_splits(record_set), Serial())
    rows = [line for line in inspect_view.contents_text(contents).splitlines() if "%" in line]
    shares = [float(line.split()[-1].rstrip("%")) for line in rows if "< " not in line][1:]
    assert len(shares) > 20
    letters = np.array(shares[-15:])
    bars = np.array([line.count("█") + line.count("#") for line in rows[1:] if "< " not in line])
    assert np.abs(bars[-15:] / bars[-15:].max() - letters / letters.max()).max() < 0.2


def test_picture_is_drawn(tmp_path: Path, record_set: Path) -> None:
    contents = measure(open_splits(record_set), Serial())
    inspect_view.plot_contents(contents, "records", tmp_path / "records.png")
    assert (tmp_path / "records.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_set_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fasta = tmp_path / "none.fasta"
    fasta.write_text(">short\nM\n")
    generate([fasta], tmp_path / "set", PreprocessOptions(min_length=2))
    inspect_view.show(tmp_path / "set", Serial(), split=None, sample=0, plot=None, as_json=False)
    assert capsys.readouterr().out.endswith("no records\n")
    with pytest.raises(InputError, match="has no records, so there is nothing to draw"):
        inspect_view.show(
            tmp_path / "set",
            Serial(),
            split=None,
            sample=0,
            plot=tmp_path / "none.png",
            as_json=False,
        )


class TestCommand:
    """`prothpc inspect` as it is typed."""

    def test_ranks_agree_with_one(self, prothpc, record_set: Path) -> None:
        alone, three = (
            prothpc("inspect", record_set, "--json", ranks=ranks).stdout for ranks in (1, 3)
        )
        assert json.loads(alone) == json.loads(three)
        assert json.loads(alone)["contents"]["records"] > 300

    def test_records_are_printed_as_fasta_and_json(self, prothpc, record_set: Path) -> None:
        record = RecordSet(record_set, "holdout").record(3)
        number = ("--number", "3", "--split", "holdout")
        asked = (("--id", record.id), ("--key", record.key.hex()), number)
        for question in asked:
            header, *lines = prothpc("inspect", record_set, *question).stdout.splitlines()
            assert header.startswith(f">{record.id} number=3 split=holdout")
            assert record.key.hex() in header
            assert "".join(lines) == record.sequence
        (found,) = json.loads(prothpc("inspect", record_set, *asked[0], "--json", ranks=2).stdout)
        assert found["sequence"] == record.sequence
        assert found["file"] == "holdout-00000.arrow"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--id", "nobody"], "no record with the id nobody in any split"),
            (["--id", "nobody", "--split", "train"], "nobody in the split train"),
            (["--key", "00" * 16], f"no record with the key {'00' * 16}"),
            (["--key", "xyz"], "--key xyz: a key is written with 32 hexadecimal digits"),
            (["--number", "9999"], "--number 9999: .* has the train records 0 to"),
            (["--number", "-1"], "--number -1: .* has the train records 0 to"),
            (["--number", "1", "--id", "x"], "give one of --id, --key and --number"),
            (["--number", "1", "--plot", "x.png"], "--plot draws the histograms"),
            (["--sample", "-5"], "--sample -5: give a number of records, or 0 for all"),
            (["--split", "test"], "has no split 'test'"),
        ],
    )
    def test_refusals(
        self, record_set: Path, arguments: list[str], message: str, capsys, monkeypatch
    ) -> None:
        from hpc.commands.corpus import app

        monkeypatch.chdir(record_set.parent)
        with pytest.raises(InputError, match=message):
            app(["inspect", str(record_set), *arguments], standalone_mode=False)
