"""A record set is a function of its inputs and options: not of ranks, files, units or crashes."""

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from Bio.SeqIO.FastaIO import SimpleFastaParser
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing import sources, spill
from preprocessing.errors import InputError
from preprocessing.generate import default_shards, generate
from preprocessing.options import PreprocessOptions
from preprocessing.records import RecordSet
from preprocessing.sources import Source, UnitReader
from preprocessing.workspace import Workspace

Run = Callable[..., "subprocess.CompletedProcess[str]"]

RECORDS, RESIDUES = 20_000, 9_055_569
"""Of DB.fasta.gz, as its README counts them."""


def content(directory: Path) -> dict[str, bytes]:
    """Everything in a finished record set but run.json."""
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    del files["run.json"]
    return files


def sequences(directory: Path, split: str = "train") -> dict[str, str]:
    """Sequences and their ids."""
    records = RecordSet(directory, split)
    found = (records.record(number) for number in range(len(records)))
    return {record.sequence: record.id for record in found}


def smallest_ids(path: Path) -> dict[str, str]:
    """Sequences of a FASTA file and the smallest of each one's ids, as Biopython reads them."""
    found: dict[str, str] = {}
    with path.open() as file:
        for title, sequence in SimpleFastaParser(file):
            name = title.split()[0]
            found[sequence] = min(name, found.get(sequence, name))
    return found


DRIVER = """
import json, sys
from pathlib import Path
from preprocessing.errors import InputError
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.parallel import connect

ranks = connect(int(sys.argv[1]))
for inputs, output, options, unit_bytes in json.loads(sys.argv[2]):
    try:
        generate([Path(path) for path in inputs], Path(output), PreprocessOptions(**options),
                 ranks, unit_bytes=unit_bytes)
        print(f"rank {ranks.rank}: done\\n", end="", flush=True)
    except InputError as error:
        print(f"rank {ranks.rank}: {error}\\n", end="", flush=True)
"""


@pytest.fixture(scope="module")
def zipped_fasta(shared_data: Path) -> Path:
    return shared_data / "DB.fasta.gz"


OPTIONS: dict[str, Any] = {"shards": 7, "holdout": 0.05, "memory": 2**21}
UNIT_BYTES = 2**20  # eleven units in the plain file


@pytest.fixture(scope="module")
def one_rank(
    tmp_path_factory: pytest.TempPathFactory, real_fasta: Path, zipped_fasta: Path
) -> dict[str, Path]:
    """Record sets of the real proteins, plain and gzip, made by one rank."""
    made = {}
    for name, path in {"plain": real_fasta, "gzip": zipped_fasta}.items():
        made[name] = tmp_path_factory.mktemp(name) / "set"
        generate([path], made[name], PreprocessOptions(**OPTIONS), unit_bytes=UNIT_BYTES)
    return made


def test_real_proteins_are_all_there(one_rank: dict[str, Path], real_fasta: Path) -> None:
    totals = json.loads((one_rank["plain"] / "manifest.json").read_bytes())["totals"]
    assert totals["read"] == {"records": RECORDS, "residues": RESIDUES}
    for what in ("records", "residues"):
        left = totals["kept"][what] + sum(part[what] for part in totals["not_kept"].values())
        assert left == totals["read"][what]
        splits = totals["splits"]
        assert splits["train"][what] + splits["holdout"][what] == totals["kept"][what]

    train, held = (sequences(one_rank["plain"], split) for split in ("train", "holdout"))
    expected = smallest_ids(real_fasta)
    assert train | held == expected
    assert not train.keys() & held.keys()
    assert 0.03 < len(held) / len(expected) < 0.07
    assert totals["kept"]["records"] == len(expected)


def test_gzip_gives_the_same_shards(one_rank: dict[str, Path]) -> None:
    plain, zipped = (content(one_rank[name]) for name in ("plain", "gzip"))
    assert plain.keys() == zipped.keys()
    assert {name for name in plain if plain[name] != zipped[name]} == {"manifest.json"}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_same_bytes_for_any_rank_count(
    size: int,
    tmp_path: Path,
    mpirun: Run,
    one_rank: dict[str, Path],
    real_fasta: Path,
    zipped_fasta: Path,
) -> None:
    jobs = [
        ([str(real_fasta)], str(tmp_path / "plain"), OPTIONS, UNIT_BYTES),
        ([str(zipped_fasta)], str(tmp_path / "gzip"), OPTIONS, UNIT_BYTES),
    ]
    result = mpirun(size, "-c", DRIVER, str(size), json.dumps(jobs))
    expected = sorted(f"rank {rank}: done" for rank in range(size) for _ in jobs)
    assert sorted(result.stdout.splitlines()) == expected, result.stderr
    for name in ("plain", "gzip"):
        assert content(tmp_path / name) == content(one_rank[name])
        assert json.loads((tmp_path / name / "run.json").read_bytes())["ranks"] == size


def test_all_ranks_raise_the_error_of_the_first_unit(tmp_path: Path, mpirun: Run) -> None:
    text = "".join(f">id{n}\nMK{'-' if n in (450, 455, 900) else 'V'}\n" for n in range(1000))
    (tmp_path / "bad.fasta").write_text(text)
    job = ([str(tmp_path / "bad.fasta")], str(tmp_path / "set"), {}, 100)
    result = mpirun(3, "-c", DRIVER, "3", json.dumps([job]), timeout=60)
    assert result.returncode == 0
    lines = sorted(result.stdout.splitlines())
    for rank, line in enumerate(lines):
        start = f"rank {rank}: {tmp_path / 'bad.fasta'}, line 902, record 'id450': character '-'"
        assert line.startswith(start)
    assert len(lines) == 3
    assert list((tmp_path / "set").iterdir()) == []  # a corrected file can be tried at once


any_records = st.lists(
    st.tuples(
        st.text("abc01|", min_size=1, max_size=3), st.sampled_from(["MK", "mkv", "W*", "ACD"])
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25, deadline=None)
@given(
    files=st.lists(any_records, min_size=1, max_size=3),
    line_end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    unit_bytes=st.integers(1, 80),
    order=st.randoms(use_true_random=False),
)
def test_same_records_for_any_order_of_files_and_any_units(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[list[tuple[str, str]]],
    line_end: str,
    unit_bytes: int,
    order: Any,
) -> None:
    directory = tmp_path_factory.mktemp("any")
    options = PreprocessOptions(shards=2, holdout=0.3)

    def make(name: str, files: Sequence[list[tuple[str, str]]], unit_bytes: int) -> dict[str, Any]:
        paths = []
        for number, records in enumerate(files):
            paths.append(directory / f"{name}{number}.fasta")
            lines = [line for title, text in records for line in (f">{title} x", text)]
            paths[-1].write_text(line_end.join(lines), newline="")
        generate(paths, directory / name, options, unit_bytes=unit_bytes)
        made: dict[str, Any] = content(directory / name)
        manifest = json.loads(made["manifest.json"])
        del manifest["input_hash"]
        for entry in manifest["inputs"]:
            del entry["hash"]  # of blocks as long as a unit; the order follows it
        manifest["inputs"].sort(key=lambda entry: sorted(entry.items()))
        made["manifest.json"] = manifest
        return made

    first = make("first", files, 10**6)
    shuffled = order.sample(files, len(files))
    assert (
        make("second", shuffled, unit_bytes)["manifest.json"]["totals"]
        == (first["manifest.json"]["totals"])
    )
    assert make("third", files, unit_bytes) == first
    again = content(directory / "second")
    assert {name for name in again if again[name] != first[name]} == {"manifest.json"}

    expected: dict[str, str] = {}
    for title, text in (record for records in files for record in records):
        text = text.upper().rstrip("*")
        expected[text] = min(title, expected.get(text, title))
    assert sequences(directory / "first") | sequences(directory / "first", "holdout") == expected


def test_manifest_does_not_depend_on_names_or_order_of_inputs(tmp_path: Path) -> None:
    texts = {"a": ">x\nMKV\n", "b": ">y\nMKW\n", "c": ">y\nM\n"}
    for names in ("abc", "cab"):
        (tmp_path / names).mkdir()
        for file, name in zip("123", names, strict=True):
            (tmp_path / names / f"{file}.fasta").write_text(texts[name])
        inputs = sorted((tmp_path / names).iterdir(), reverse=names == "cab")
        generate(inputs, tmp_path / f"set-{names}", PreprocessOptions())
    assert content(tmp_path / "set-abc") == content(tmp_path / "set-cab")


class TestOptions:
    """What the options say is what happens, and it is counted."""

    def make(self, tmp_path: Path, text: str, **options: Any) -> tuple[dict[str, str], Any]:
        (tmp_path / "in.fasta").write_text(text)
        manifest = generate([tmp_path / "in.fasta"], tmp_path / "set", PreprocessOptions(**options))
        return sequences(tmp_path / "set"), manifest["totals"]

    def test_length_limits(self, tmp_path: Path) -> None:
        text = ">a\nM\n>b\nMK*\n>c\nMKV\n>d\nMKVA\n>e\nMKVA\n"
        found, totals = self.make(tmp_path, text, min_length=2, max_length=3)
        assert found == {"MK": "b", "MKV": "c"}
        assert totals["read"] == {"records": 5, "residues": 14}
        assert totals["not_kept"]["too_short"] == {"records": 1, "residues": 1}
        assert totals["not_kept"]["too_long"] == {"records": 2, "residues": 8}
        assert totals["not_kept"]["duplicate"] == {"records": 0, "residues": 0}

    def test_drop(self, tmp_path: Path) -> None:
        found, totals = self.make(tmp_path, ">a\nM-K\n>b\nMKV\n>c\n", on_invalid="drop")
        assert found == {"MKV": "b"}
        assert totals["not_kept"]["invalid"] == {"records": 2, "residues": 3}

    def test_mask(self, tmp_path: Path) -> None:
        found, totals = self.make(tmp_path, ">a\nm-K**\n", on_invalid="mask")
        assert found == {"MXK": "a"}
        assert totals["changed"] == {
            "lowercase_residues": 1, "masked_residues": 1, "stops_stripped": 2,
        }  # fmt: skip

    def test_no_dedup(self, tmp_path: Path) -> None:
        _, totals = self.make(tmp_path, ">a\nMK\n>b\nMK\n>a\nMK\n", dedup=False)
        assert totals["kept"] == {"records": 3, "residues": 6}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"shards": 0}, r"shards = 0: choose 1 to 65,536"),
            ({"shards": 65_537}, r"shards = 65537"),
            ({"holdout": 1.0}, r"holdout = 1.0: choose a fraction"),
            ({"holdout": -0.1}, r"holdout = -0.1"),
            ({"min_length": 0}, r"min_length = 0"),
            ({"min_length": 9, "max_length": 8}, r"max_length = 8 is below min_length = 9"),
            ({"on_invalid": "skip"}, r"on_invalid = 'skip': choose one of error, mask, drop"),
            ({"memory": 1000}, r"memory = 1,000: choose"),
        ],
    )
    def test_nonsense_is_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            PreprocessOptions(**options)


@pytest.mark.parametrize(
    ("plain", "zipped", "shards"),
    [(10**6, 0, 8), (572 * 10**9, 0, 5_959), (0, 96 * 10**8, 200), (10**14, 0, 65_536)],
)
def test_default_shards_follow_the_size_of_the_inputs(plain: int, zipped: int, shards: int) -> None:
    sources = [
        Source(path="a", bytes=plain, mtime_ns=0, compressed=False),
        Source(path="b", bytes=zipped, mtime_ns=0, compressed=True),
    ]
    assert default_shards(sources) == shards


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


class TestRestart:
    """An interrupted job goes on where it stopped, to the same bytes."""

    unit_bytes = 300_000
    options = PreprocessOptions(shards=5, holdout=0.1, memory=2**20)  # about two units a run

    @pytest.fixture
    def expected(
        self, tmp_path_factory: pytest.TempPathFactory, real_fasta: Path
    ) -> dict[str, bytes]:
        output = tmp_path_factory.mktemp("whole") / "set"
        generate([real_fasta], output, self.options, unit_bytes=self.unit_bytes)
        return content(output)

    def counting(self, patch: pytest.MonkeyPatch) -> tuple[list[int], list[str]]:
        """Record the units and shards that are worked on from now on."""
        units: list[int] = []
        shards: list[str] = []
        chunks, build = UnitReader.chunks, Workspace.build_shard

        def count_chunks(reader: UnitReader) -> Iterator[Any]:
            units.append(reader._unit.start // self.unit_bytes)
            return chunks(reader)

        def count_build(workspace: Workspace, name: str, *rest: Any, **more: Any) -> Any:
            shards.append(name)
            return build(workspace, name, *rest, **more)

        patch.setattr(UnitReader, "chunks", count_chunks)
        patch.setattr(Workspace, "build_shard", count_build)
        return units, shards

    def test_after_a_kill_while_mapping(
        self, tmp_path: Path, real_fasta: Path, expected: dict[str, bytes], monkeypatch: Any
    ) -> None:
        script = f"""
import os, signal
from pathlib import Path
import preprocessing.spill as spill
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
publish, written = spill.publish, []
def publish_or_die(temporary, path):
    if len(written) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    publish(temporary, path)
    written.append(path)
spill.publish = publish_or_die
generate([Path({str(real_fasta)!r})], Path({str(tmp_path / "set")!r}), {self.options!r},
         unit_bytes={self.unit_bytes})
"""
        killed = subprocess.run([sys.executable, "-c", script], check=False)
        assert killed.returncode == -signal.SIGKILL
        with pytest.raises(InputError, match="unfinished"):
            RecordSet(tmp_path / "set")

        units, shards = self.counting(monkeypatch)
        generate([real_fasta], tmp_path / "set", self.options, unit_bytes=self.unit_bytes)
        assert content(tmp_path / "set") == expected
        assert 5 <= units[0] < units[-1] == 38  # each run had finished at least one unit
        assert len(set(units)) == len(units)
        assert len(shards) == 6

    def test_on_more_ranks_after_a_stop_in_a_long_unit(
        self, tmp_path: Path, zipped_fasta: Path, mpirun: Run, monkeypatch: Any
    ) -> None:
        """Runs with a part of a unit only are of no use when the rest is missing."""
        publish, written = spill.publish, []

        def stop_at_fourth(temporary: Path, path: Path) -> None:
            if len(written) == 3:
                raise Stopped
            publish(temporary, path)
            written.append(path)

        generate([zipped_fasta], tmp_path / "whole", self.options)
        with monkeypatch.context() as patch:
            patch.setattr(spill, "publish", stop_at_fourth)
            with pytest.raises(Stopped):
                generate([zipped_fasta], tmp_path / "set", self.options)
        assert len(list((tmp_path / "set" / ".work").glob("run-*.arrow"))) == 3
        job = ([str(zipped_fasta)], str(tmp_path / "set"), asdict(self.options), sources.UNIT_BYTES)
        result = mpirun(2, "-c", DRIVER, "2", json.dumps([job]))
        assert result.stdout.count("done") == 2, result.stderr
        assert content(tmp_path / "set") == content(tmp_path / "whole")

    def test_after_a_stop_while_reducing(
        self, tmp_path: Path, real_fasta: Path, expected: dict[str, bytes], monkeypatch: Any
    ) -> None:
        build = Workspace.build_shard

        def stop_at_fourth(workspace: Workspace, name: str, *rest: Any, **more: Any) -> Any:
            if name == "shard-00003.arrow":
                raise Stopped
            return build(workspace, name, *rest, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Workspace, "build_shard", stop_at_fourth)
            with pytest.raises(Stopped):
                generate([real_fasta], tmp_path / "set", self.options, unit_bytes=self.unit_bytes)
        work = tmp_path / "set" / ".work"
        (tmp_path / "set" / "shard-00001.arrow").unlink()
        os.truncate(tmp_path / "set" / "shard-00002.arrow", 1000)
        next(work.glob("run-*.arrow")).unlink()  # as if a node had lost it

        units, shards = self.counting(monkeypatch)
        generate([real_fasta], tmp_path / "set", self.options, unit_bytes=self.unit_bytes)
        assert content(tmp_path / "set") == expected
        assert 1 <= len(units) <= 3
        assert shards == [f"shard-0000{n}.arrow" for n in (1, 2, 3, 4)] + ["holdout-00000.arrow"]

    def test_damaged_run_is_made_again(
        self, tmp_path: Path, real_fasta: Path, expected: dict[str, bytes], monkeypatch: Any
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Workspace, "build_shard", lambda *_, **__: (_ for _ in ()).throw(Stopped))
            with pytest.raises(Stopped):
                generate([real_fasta], tmp_path / "set", self.options, unit_bytes=self.unit_bytes)
        run = max((tmp_path / "set" / ".work").glob("run-*.arrow"))
        run.write_bytes(run.read_bytes()[:1000])
        units, _ = self.counting(monkeypatch)
        generate([real_fasta], tmp_path / "set", self.options, unit_bytes=self.unit_bytes)
        assert content(tmp_path / "set") == expected
        assert 1 <= len(units) <= 3


class TestOutputDirectory:
    """Nothing that is there already is lost or mixed up."""

    @pytest.fixture
    def fasta(self, tmp_path: Path) -> Path:
        path = tmp_path / "in.fasta"
        path.write_text(">a\nMKV\n>b\nMKW\n")
        return path

    def test_finished_set_is_not_made_again(self, tmp_path: Path, fasta: Path) -> None:
        made = generate([fasta], tmp_path / "set", PreprocessOptions())
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
        more_memory = PreprocessOptions(memory=2**25)  # changes no record
        again = generate([fasta], tmp_path / "set", more_memory)
        assert json.dumps(again) == json.dumps(made)  # in the same order, too
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == before

    def test_finished_set_of_other_options_or_inputs(self, tmp_path: Path, fasta: Path) -> None:
        generate([fasta], tmp_path / "set", PreprocessOptions())
        before = content(tmp_path / "set")
        with pytest.raises(InputError, match=r"finished.*option holdout was 0.0, is now 0.1"):
            generate([fasta], tmp_path / "set", PreprocessOptions(holdout=0.1))
        other = tmp_path / "other.fasta"
        other.write_text(">c\nM\n")
        with pytest.raises(InputError, match=r"other\.fasta was no input, is one now"):
            generate([fasta, other], tmp_path / "set", PreprocessOptions())
        fasta.write_text(">a\nMKV\n>b\nMKY\n")
        with pytest.raises(InputError, match=r"in\.fasta has changed since"):
            generate([fasta], tmp_path / "set", PreprocessOptions())
        assert content(tmp_path / "set") == before

    def test_finished_set_that_lost_a_shard(self, tmp_path: Path, fasta: Path) -> None:
        generate([fasta], tmp_path / "set", PreprocessOptions())
        (tmp_path / "set" / "shard-00002.arrow").unlink()
        with pytest.raises(InputError, match=r"shard-00002.*missing"):
            generate([fasta], tmp_path / "set", PreprocessOptions())

    def test_unfinished_work_of_another_command(
        self, tmp_path: Path, fasta: Path, monkeypatch: Any
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Workspace, "build_shard", lambda *_, **__: (_ for _ in ()).throw(Stopped))
            with pytest.raises(Stopped):
                generate([fasta], tmp_path / "set", PreprocessOptions())
        with pytest.raises(InputError, match=r"unfinished work.*option shards was 8, is now 9"):
            generate([fasta], tmp_path / "set", PreprocessOptions(shards=9))
        generate([fasta], tmp_path / "set", PreprocessOptions())

    def test_foreign_files(self, tmp_path: Path, fasta: Path) -> None:
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "thesis.doc").write_text("precious")
        with pytest.raises(InputError, match=r"not empty.*choose another output"):
            generate([fasta], tmp_path / "set", PreprocessOptions())
        assert [path.name for path in (tmp_path / "set").iterdir()] == ["thesis.doc"]
        with pytest.raises(InputError, match="not a directory"):
            generate([fasta], fasta, PreprocessOptions())

    def test_second_process_is_refused_and_a_dead_ones_lock_is_not(
        self, tmp_path: Path, fasta: Path
    ) -> None:
        script = f"""
import sys
from pathlib import Path
from preprocessing.workspace import Workspace
Workspace(Path({str(tmp_path / "set")!r})).enter({{"inputs": [], "options": {{}}}})
print("inside", flush=True)
sys.stdin.read()
"""
        first = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert first.stdout is not None
        assert first.stdout.readline() == b"inside\n"
        with pytest.raises(InputError, match=rf"another process.*process {first.pid} on "):
            generate([fasta], tmp_path / "set", PreprocessOptions())
        first.kill()
        first.wait()
        with pytest.raises(InputError, match="unfinished work"):  # no longer "another process"
            generate([fasta], tmp_path / "set", PreprocessOptions())


def test_gzip_of_several_members_is_one_file(tmp_path: Path) -> None:
    parts = [b">a\nMKV\n>b\nMK", b"W\n", b">c\nMKY"]
    (tmp_path / "in.fasta.gz").write_bytes(b"".join(gzip.compress(part) for part in parts))
    generate([tmp_path / "in.fasta.gz"], tmp_path / "set", PreprocessOptions())
    assert sequences(tmp_path / "set") == {"MKV": "a", "MKW": "b", "MKY": "c"}


def test_too_little_memory_for_a_record_says_so(tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(f">a\n{'M' * 2**20}\n")
    with pytest.raises(InputError, match="raise memory"):
        generate([tmp_path / "in.fasta"], tmp_path / "set", PreprocessOptions(memory=2**20))
    generate([tmp_path / "in.fasta"], tmp_path / "set", PreprocessOptions(memory=2**22))
