"""Searches that are killed, and programs that are missing, fail, or leave half a file."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from preprocessing.errors import InputError
from preprocessing.filtering.stage import Execution
from tests.conftest import ROOT, skip_unless
from tests.preprocessing.searches import (
    content,
    homologs,
    need,
    random_proteins,
    search,
    write_fasta,
)

OPTIONS = {"tool": "blastp", "min_identity": 0.3}
STAND_IN = """#!/bin/sh
# Calls the program of this name, or does what the test asks for.
here={here}
case "$1" in -version) exec {real} "$@";; esac
echo "$@" >> $here/calls
calls=$(grep -c . $here/calls)
if [ -e $here/{name}.$calls ]; then . $here/{name}.$calls; fi
exec {real} "$@"
"""


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    need("blastp")
    folder = tmp_path_factory.mktemp("sides")
    ancestors = random_proteins([80] * 12, seed=4)
    relatives = [homologs(text, 1, 0.6, seed=i)[0] for i, text in enumerate(ancestors[:8])]
    return (
        write_fasta(folder / "q.fasta", {f"q{i}": text for i, text in enumerate(ancestors)}),
        write_fasta(folder / "t.fasta", {f"t{i}": text for i, text in enumerate(relatives)}),
    )


@pytest.fixture(scope="module")
def undisturbed(sides, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    summary = search(*sides, output, **OPTIONS)
    assert summary["excluded"]["records"] == 8
    return content(output)


@pytest.fixture
def stand_in(tmp_path):
    """Write a program that does something else at its Nth call (with makeblastdb, the first)."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("blastp", "makeblastdb"):
        script = folder / name
        script.write_text(STAND_IN.format(here=folder, name=name, real=shutil.which(name)))
        script.chmod(0o755)

    def at_call(program, number, commands):
        (folder / f"{program}.{number}").write_text(f"{commands}\n")
        return Execution(chunks=3, program=folder / "blastp")

    at_call.calls = lambda: (folder / "calls").read_text().splitlines()
    at_call.folder = folder
    return at_call


def test_a_failing_program_is_heard_and_its_chunk_kept(sides, undisturbed, stand_in, tmp_path):
    execution = stand_in("blastp", 3, "echo; echo 'Error: the moon is full' >&2; exit 1")
    with pytest.raises(InputError) as failed:
        search(*sides, tmp_path / "out", execution=execution, **OPTIONS)
    failed = str(failed.value)
    kept = tmp_path / "out" / ".work" / "chunk-00001.failed"
    assert "chunk 1: blastp failed (exit code 1): Error: the moon is full" in failed
    assert str(kept) in failed
    assert [path.name for path in kept.rglob("*.fasta")] == ["queries.fasta"]
    assert (tmp_path / "out" / ".work" / "chunk-00000.arrow").exists()

    search(*sides, tmp_path / "out", execution=execution, **OPTIONS)
    assert content(tmp_path / "out") == undisturbed
    assert len(stand_in.calls()) == 1 + 3 + 1  # the chunk that was done is not searched again


def test_a_killed_program_is_reported_with_what_to_do(sides, stand_in, tmp_path):
    execution = stand_in("blastp", 2, "kill -9 $$")
    with pytest.raises(InputError, match=r"killed by SIGKILL: out of memory\? use more and small"):
        search(*sides, tmp_path / "out", execution=execution, **OPTIONS)


@pytest.mark.parametrize(
    ("program", "call", "commands"),
    [
        ("makeblastdb", 1, f'{shutil.which("makeblastdb")} "$@"; : > database.pin; exit 0'),
        (
            "makeblastdb",
            1,
            f'{shutil.which("makeblastdb")} "$@"; truncate -s -9 database.psq; exit 0',
        ),
        (
            "blastp",
            2,
            f'{shutil.which("blastp")} "$@"; truncate -s -2 hits.tsv; exit 0',
        ),
    ],
)
def test_half_a_file_is_noticed(sides, undisturbed, stand_in, tmp_path, program, call, commands):
    execution = stand_in(program, call, commands)
    with pytest.raises(InputError, match=f"{program} left an incomplete .*: is the disk full"):
        search(*sides, tmp_path / "out", execution=execution, **OPTIONS)
    search(*sides, tmp_path / "out", execution=execution, **OPTIONS)
    assert content(tmp_path / "out") == undisturbed


def test_a_missing_program_is_named(sides, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"there is no program .*/blastp that can be run"):
        search(*sides, tmp_path / "out", execution=Execution(program=tmp_path / "x"), **OPTIONS)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="blastp is not on PATH: install BLAST"):
        search(*sides, tmp_path / "out", **OPTIONS)
    with pytest.raises(InputError, match="mmseqs is not on PATH: install MMseqs2"):
        search(*sides, tmp_path / "out", tool="mmseqs2", min_identity=0.3)
    assert not (tmp_path / "out").exists()


def test_another_version_of_the_program_is_refused(sides, stand_in, tmp_path):
    execution = stand_in("blastp", 2, "exit 1")
    with pytest.raises(InputError, match="exit code 1"):
        search(*sides, tmp_path / "out", execution=execution, **OPTIONS)
    script = stand_in.folder / "blastp"
    script.write_text("#!/bin/sh\necho 'blastp: 9.9.9+'\n")
    with pytest.raises(InputError, match=r"unfinished search with blastp 2\S+, this is blastp 9"):
        search(*sides, tmp_path / "out", execution=execution, **OPTIONS)


def test_other_work_in_the_directory_is_refused(sides, tmp_path):
    search(*sides, tmp_path / "out", **OPTIONS)
    before = content(tmp_path / "out")
    search(*sides, tmp_path / "out", **OPTIONS)  # finished: nothing to do
    with pytest.raises(InputError, match=r"a finished search .*--min-identity was 0\.3, is now 0"):
        search(*sides, tmp_path / "out", tool="blastp", min_identity=0.4)
    with pytest.raises(InputError, match="--self was False, is now True"):
        search(sides[0], None, tmp_path / "out", **OPTIONS)
    assert content(tmp_path / "out") == before

    task = Execution(chunks=2, chunk=0)
    search(*sides, tmp_path / "tasks", execution=task, **OPTIONS)
    with pytest.raises(InputError, match=r"--chunks 3: the search in .* was begun with 2"):
        search(*sides, tmp_path / "tasks", execution=Execution(chunks=3), **OPTIONS)

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter").write_text("dear")
    with pytest.raises(InputError, match="not empty, and what is in it is not"):
        search(*sides, tmp_path / "other", **OPTIONS)


def filter_command(sides, output, execution):
    queries, targets = map(str, sides)
    return [
        sys.executable, "-m", "hpc.cli", "filter", "--queries", queries, "--targets", targets,
        "--tool", "blastp", "--min-identity", "0.3", "--chunks", str(execution.chunks),
        "--program", str(execution.program), "-o", str(output),
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_search_goes_on_where_it_was(sides, undisturbed, stand_in, tmp_path, number):
    started = tmp_path / "started"
    # The real program goes on after a while, and writes although its search was killed.
    execution = stand_in("blastp", 3, f"echo $$ > {started}; sleep 2")
    command = filter_command(sides, tmp_path / "out", execution)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    for _ in range(600):
        if started.exists() and started.read_text():
            break
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(timeout=60) == -number
    process.stderr.close()
    child = Path(f"/proc/{started.read_text().strip()}/stat")
    running = child.exists() and child.read_text().split()[2] != "Z"
    assert running == (number == signal.SIGKILL)
    assert not (tmp_path / "out" / "summary.json").exists()

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "1 of 3 chunks are done already" in done.stderr
    assert content(tmp_path / "out") == undisturbed
    assert len(stand_in.calls()) == 1 + 2 + 2


def test_a_full_disk_ends_in_a_sentence_and_a_rerun_completes(sides, undisturbed, tmp_path):
    """On a small disk that is full from the second chunk on."""
    unshare = ["unshare", "--mount"] + ([] if os.geteuid() == 0 else ["--map-root-user"])
    probe = subprocess.run([*unshare, "mount", "-t", "tmpfs", "tmpfs", tmp_path])
    skip_unless(probe.returncode == 0, "the right to mount a small disk")
    program = f"""
import json, sys
from pathlib import Path
from preprocessing.errors import InputError
from preprocessing.filtering.stage import Execution
from tests.preprocessing.searches import content, search

disk, queries, targets = map(Path, sys.argv[1:])
options = {OPTIONS!r}
search(queries, targets, disk / "out", execution=Execution(chunks=3, chunk=0), **options)
ballast = disk / "ballast"
said = []
with ballast.open("wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
for _ in range(2):
    try:
        search(queries, targets, disk / "out", execution=Execution(chunks=3), **options)
    except InputError as error:
        said.append(str(error))
ballast.unlink()
search(queries, targets, disk / "out", execution=Execution(chunks=3), **options)
print(json.dumps([said, {{name: data.hex() for name, data in content(disk / "out").items()}}]))
"""
    mount = 'mount -t tmpfs -o size=600k tmpfs "$1" && exec "$0" -c "$2" "$1" "$3" "$4"'
    done = subprocess.run(
        [*unshare, "sh", "-c", mount, sys.executable, tmp_path, program, *sides],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, files = json.loads(done.stdout)
    assert len(said) == 2
    for sentence in said:
        assert "No space left on device" in sentence or "is the disk full?" in sentence
    assert {name: bytes.fromhex(text) for name, text in files.items()} == undisturbed
