"""What `prothpc bench records` measures is right, and its tables say what the samples say."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from hpc.bench import records_peers, records_read
from hpc.bench.records import PARTS, BenchOptions
from hpc.bench.records_report import BEGIN, END, write_report
from preprocessing.errors import InputError
from preprocessing.records import RecordSet
from preprocessing.synthetic import SynthesisOptions, synthesize

Reader = Callable[[int], object]


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fasta") / "corpus.fasta"
    synthesize(path, SynthesisOptions(records=1500, families=8, median_length=80))
    return path


@pytest.mark.parametrize("name", ["packed", "scattered"])
def test_an_epoch_shows_every_residue_once(record_set: Path, name: str) -> None:
    records = RecordSet(record_set)
    for number in range(2):
        batches = list(records_read.READERS[name](records)(number))
        assert sum(batch[0] for batch in batches) == len(records)
        assert sum(batch[1] for batch in batches) == records.num_residues


def test_the_loader_makes_micro_batches_without_end(record_set: Path) -> None:
    records = RecordSet(record_set)
    for name, sequences in (("padded-8", 8), ("masked-8", 8)):
        epoch = records_read.READERS[name](records)
        batches = [batch for n in range(3) for batch in epoch(n)]
        assert len(batches) == 3 * 16
        assert {batch[0] for batch in batches} == {sequences}


def test_reading_is_timed_without_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_read, "SECONDS", 0.05)

    def epoch(_: int):
        yield from [(1, 10)] * 5

    result = records_read.timed(epoch)
    assert result["seconds"] >= 0.05
    assert result["residues"] == 10 * result["records"]


def test_peers_parse_what_ours_does(fasta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from Bio.SeqIO.FastaIO import SimpleFastaParser

    with fasta.open() as file:
        expected = [(title.split()[0], sequence) for title, sequence in SimpleFastaParser(file)]
    for portion in (1000, 70_001, 2**23):
        monkeypatch.setattr(records_peers, "_READ_BYTES", portion)
        parts = list(records_peers.parse(fasta))
        found = [
            (n.decode(), s.decode()) for ids, seqs in parts for n, s in zip(ids, seqs, strict=True)
        ]
        assert found == expected


def test_megatron_files_are_read_back(fasta: Path, tmp_path: Path) -> None:
    records_peers.write_megatron(fasta, tmp_path / "m")
    sequences = [text for _, part in records_peers.parse(fasta) for text in part]
    values = np.fromfile(tmp_path / "m" / "data.bin", np.uint8).tobytes()
    assert values == b"".join(sequences)
    batches = list(records_peers.read_megatron(tmp_path / "m")(0))
    assert sum(batch[0] for batch in batches) == len(sequences)
    assert sum(batch[1] for batch in batches) == len(values)


@pytest.mark.parametrize("writer", ["arrow", "h5py", "lmdb", "mds", "datasets"])
def test_other_formats_hold_the_same_residues(fasta: Path, tmp_path: Path, writer: str) -> None:
    pytest.importorskip(records_peers.LIBRARIES.get(writer, "pyarrow"))
    records_peers.WRITERS[writer](fasta, tmp_path / "out")
    sequences = [text for _, part in records_peers.parse(fasta) for text in part]
    if writer in records_peers.READERS:
        epoch = records_peers.READERS[writer](tmp_path / "out")
        batches = list(islice(epoch(0), 5))
        assert sum(batch[0] for batch in batches) == 5 * records_read.BATCH
    if writer == "arrow":
        import pyarrow as pa

        table = pa.ipc.open_file(tmp_path / "out").read_all()
        assert [bytes(row) for row in table["tokens"].to_pylist()] == sequences


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"only": ("write", "reed")}, "--only reed: choose among write,read,compression"),
        ({"rounds": 0}, "--rounds 0: choose 1 or more"),
        ({"tmpfs": Path("/no/such")}, "--tmpfs /no/such: no such directory"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    right = {
        "output": tmp_path / "r.json", "report": None, "only": ("write",), "size": 10**6,
        "rounds": 1, "work": None, "tmpfs": tmp_path, "peers": False,
    }  # fmt: skip
    BenchOptions(**right)
    with pytest.raises(InputError, match=message):
        BenchOptions(**{**right, **change})


def sample(part: str, case: str, seconds: float, **more: object) -> dict:
    about = {"part": part, "case": case, "bytes": 10**9, "commit": "abc"}
    return about | {"seconds": seconds, **more}


def test_tables_give_medians_and_ratios(tmp_path: Path) -> None:
    samples = [
        *(sample("write", "tmpfs, 1", s, cpu_seconds=s) for s in (4.0, 9.0, 5.0)),
        *(sample("write", "tmpfs, 2", s, cpu_seconds=s) for s in (2.5, 2.0, 3.0)),
        sample("gzip", "plain", 4.0),
        sample("gzip", "gz, decompression alone", 2.0),
        sample("gzip", "gz", 6.3),
        sample("peers", "prothpc, whole job", 4.0),
        sample("peers", "mds", 8.0),
        sample("read", "packed", 2.0, records=12_000_000, residues=10**9),
        sample("read", "other: lmdb", 1.0, records=1_000_000, residues=10**8),
        sample("read", "masked-8", 1.0, records=2_000_000, residues=2 * 10**8),
        sample("memory", "1GB", 4.0, peak_anonymous=100 * 2**20),
        sample("linearity", "1GB", 4.0, cpu_seconds=4.0),
        sample("linearity", "2GB", 8.0, cpu_seconds=8.0) | {"bytes": 2 * 10**9},
    ]
    about = {
        "machine": {
            "processor": "x", "cores": 2, "memory_gib": 24.0, "system": "Linux", "python": "3.11"
        },
        "size": 10**9, "commands": ["prothpc bench records"],
    }  # fmt: skip
    results, report = tmp_path / "r.json", tmp_path / "r.md"
    results.write_text(json.dumps({**about, "samples": samples}))
    report.write_text(f"# Title\n\nbefore\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    for _ in range(2):  # the second time tables replace tables
        write_report(results, report)
    text = report.read_text()
    assert text.startswith("# Title\n\nbefore\n")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "old" not in text
    lines = text.splitlines()
    assert "| tmpfs, 1 | 200 | 5.00 (4.00 to 9.00) | 5.00 |  |" in lines
    assert "| tmpfs, 2 | 400 | 2.50 (2.00 to 3.00) | 2.50 | 2.00 |" in lines
    assert "| gz | 6.30 | 159 | 1.05 |" in lines
    assert "| mds | 125 | 8.00 | 1,000 |" in lines
    assert "| other: lmdb | 1,000,000 | 100 | 6.0 |" in lines
    assert "| masked-8 | 2,000,000 | 200 |" in lines
    assert "| 1GB | 100 | 100 |" in lines
    assert (tmp_path / "r.linearity.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_measures_every_part_by_default() -> None:
    from typer.main import get_command

    from hpc.commands.bench import group

    (parameter,) = (p for p in get_command(group).commands["records"].params if p.name == "only")
    assert parameter.default.split(",") == list(PARTS)


def test_nothing_stays_in_memory_when_it_is_ended(
    tmp_path: Path, rank_environment: dict[str, str]
) -> None:
    (tmp_path / "memory").mkdir()
    command = [
        sys.executable, "-m", "hpc.cli", "bench", "records", "--size", "20MB", "--only", "write",
        "--tmpfs", tmp_path / "memory", "--work", tmp_path / "work", "--output", tmp_path / "r",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=rank_environment)
    end = time.monotonic() + 60
    while not list((tmp_path / "memory").glob("*/corpus*")) and time.monotonic() < end:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not list((tmp_path / "memory").iterdir())


@pytest.mark.slow
def test_every_part_runs(prothpc, tmp_path: Path) -> None:
    done = prothpc(
        "bench", "records", "--size", "2MB", "--rounds", "1", "--tmpfs", tmp_path,
        "--only", "write,read,compression,gzip,peers", "--work", tmp_path / "work",
        "--output", tmp_path / "r.json", "--report", tmp_path / "r.md", timeout=560,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = {
        sample["part"] for sample in json.loads((tmp_path / "r.json").read_text())["samples"]
    }
    assert measured == {"write", "read", "compression", "gzip", "peers"} <= set(PARTS)
    assert "bits each" in (tmp_path / "r.md").read_text()
