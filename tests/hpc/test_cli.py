"""The command line: quick help, every stage end to end, errors in one sentence."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from hpc.cli import app

Prothpc = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def corpus(prothpc: Prothpc, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.fasta"
    result = prothpc("synthesize", path, "--records", "300", "--families", "6")
    assert result.returncode == 0, result.stderr
    assert "300 proteins of 6 families" in result.stdout
    return path


def test_help_is_quick_and_imports_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "hpc.cli", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "pyarrow", "mpi4py", "matplotlib"}


def test_help_names_every_command_and_each_has_an_example(prothpc: Prothpc) -> None:
    overview = prothpc("--help").stdout
    names = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert {"synthesize", "preprocess", "verify", "inspect", "train", "export"} <= set(names)
    assert {"doctor", "bench"} <= set(names)
    for name in names:
        assert name in overview
        text = prothpc(name, "--help").stdout
        assert "Example" in text
        assert f"prothpc {name}" in text


def test_preprocess_reports_counts_and_verify_confirms_them(
    prothpc: Prothpc, corpus: Path, tmp_path: Path
) -> None:
    made = prothpc("preprocess", corpus, "--output", tmp_path / "r", "--holdout", "0.1", ranks=2)
    assert made.returncode == 0, made.stderr
    counts = re.search(r"([\d,]+) records \(([\d,]+) train, ([\d,]+) holdout\)", made.stdout)
    assert counts is not None, made.stdout
    kept, train, holdout = (int(text.replace(",", "")) for text in counts.groups())
    totals = json.loads((tmp_path / "r" / "manifest.json").read_text())["totals"]
    assert kept == train + holdout == totals["kept"]["records"]
    checked = prothpc("verify", tmp_path / "r")
    assert checked.returncode == 0, checked.stderr
    assert f"{kept:,} records" in checked.stdout


def test_verify_names_a_damaged_shard(prothpc: Prothpc, corpus: Path, tmp_path: Path) -> None:
    prothpc("preprocess", corpus, "--output", tmp_path / "r", "--shards", "2")
    shard = tmp_path / "r" / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    result = prothpc("verify", tmp_path / "r", ranks=2)
    assert result.returncode != 0
    assert "shard-00001.arrow" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["synthesize", "x.fasta"], "--records"),
        (["synthesize", "x.fasta", "--size", "12parsecs"], "12parsecs"),
        (["preprocess", "missing.fasta", "--output", "r"], "missing.fasta"),
        (["preprocess", "empty.fasta", "--output", "r"], "empty.fasta"),
        (["preprocess", "notes.txt", "--output", "r"], "notes.txt"),
        (["preprocess", "x.fasta", "--output", "r", "--holdout", "2"], "--holdout 2.0"),
        (["preprocess", "x.fasta", "--output", "r", "--long", "cut"], "--long cut: choose one of"),
        (["preprocess", "x.fasta", "--output", "r", "--exclude", "y"], "y: cannot be read"),
        (["verify", "."], "not a record set"),
        (["train", "no-such-recipe"], "no recipe 'no-such-recipe'"),
        (["train", "protbert-tiny", "data.records=."], "not a record set"),
        (["export", "nowhere", "model"], "nowhere is no directory"),
        (["export", ".", "model"], "neither a checkpoint nor a run directory"),
        (["export", ".", "model", "--format", "onnx"], "the only format is hf"),
        (
            ["doctor", "--require", "mmseqs,blast"],
            "--require blast is unknown: did you mean blastp",
        ),
        (["doctor", "--timeout", "0"], "--timeout 0"),
        (["doctor", "--size", "much"], "'much'"),
        (["doctor", "--json", "nowhere/doctor.json"], "nowhere/doctor.json"),
    ],
)
def test_wrong_input_ends_in_one_sentence(
    prothpc: Prothpc, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "x.fasta").write_text(">a\nMKV\n")
    (tmp_path / "empty.fasta").write_text("")
    (tmp_path / "notes.txt").write_text("Dear diary,\n")
    if arguments[0] == "synthesize":
        (tmp_path / "x.fasta").unlink()
    result = prothpc(*arguments, cwd=tmp_path)
    assert result.returncode != 0
    assert message in result.stderr
    assert result.stderr.startswith("prothpc: ")
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import hpc.cli

    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(hpc.cli, "app", broken)
    with pytest.raises(SystemExit) as caught:
        hpc.cli.main()
    assert caught.value.code == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
