"""Searches with the real programs: what they exclude, for any chunks, ranks and limits."""

import csv
import gzip
import json
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import xxhash

from preprocessing.errors import InputError
from preprocessing.filtering import tools
from preprocessing.filtering.stage import Execution
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.synthetic import SynthesisOptions, synthesize
from tests.preprocessing.searches import (
    commands,
    content,
    excluded,
    homologs,
    need,
    random_proteins,
    read_fasta,
    search,
    write_fasta,
)
from tests.record_sets import sequences

TOOLS = ("blastp", pytest.param("mmseqs2", marks=pytest.mark.slow))
PEPTIDE = "TDRNFLRL"
"""Shorter than either program finds with a significant e-value."""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Queries of 6 families, and targets of 4 of them and 2 others; ids that programs misread."""
    folder = tmp_path_factory.mktemp("families")
    sides = []
    for number, side in enumerate(("queries", "targets")):
        sources = folder / f"{side}.synthetic", folder / f"{side}.hidden"
        options = SynthesisOptions(
            records=90, families=6, median_length=90, seed=3, min_identity=0.3 + number / 5,
            hidden_families=1,
        )  # fmt: skip
        synthesize(sources[0], options, hidden_output=sources[1])
        own = read_fasta(sources[0]) | (read_fasta(sources[1]) if number else {})
        names = (f"sp|{number}P{i:04d}|X_{i}|gi|{i}" for i in range(len(own)))
        sides.append(dict(zip(names, map(str.upper, own.values()), strict=True)))
    queries, targets = sides
    queries["17"] = targets["lcl|3"] = PEPTIDE
    return tuple(
        write_fasta(folder / f"{name}.fasta", side)
        for name, side in (("queries", queries), ("targets", targets))
    )


def independent_exclusions(tool, queries, targets, folder, *, identity, evalue):
    """The ids that a few lines find, from the program's own table."""
    columns = {
        "blastp": "qseqid sseqid nident length evalue",
        "mmseqs2": "query,target,nident,alnlen,evalue",
    }[tool]
    plain = []
    for path in (queries, targets):  # ids that no program misreads
        records = read_fasta(path)
        plain.append(
            write_fasta(folder / path.name, {f"n{i}": s for i, s in enumerate(records.values())})
        )
    names = list(read_fasta(queries))
    table = folder / "table"
    if tool == "blastp":
        residues = sum(map(len, read_fasta(targets).values()))
        command = ["makeblastdb", "-in", plain[1], "-dbtype", "prot", "-out", folder / "db"]
        subprocess.run(command, check=True, capture_output=True)
        command = ["blastp", "-query", plain[0], "-db", folder / "db", "-dbsize", residues,
                   "-evalue", evalue, "-outfmt", f"6 {columns}", "-out", table]  # fmt: skip
    else:
        command = ["mmseqs", "easy-search", *plain, table, folder / "tmp", "-e", evalue,
                   "--format-output", columns, "-a", 1, "--alignment-mode", 3,
                   "--max-seqs", 10_000, "--dbtype", 1]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    with table.open() as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows
    return {
        names[int(query[1:])]
        for query, _, identical, length, value in rows
        if int(identical) / int(length) >= identity and float(value) <= evalue
    }


@pytest.mark.parametrize("tool", TOOLS)
def test_excluded_are_those_that_the_programs_own_table_shows(corpus, tmp_path, tool):
    need(tool)
    queries, targets = corpus
    summary = search(queries, targets, tmp_path / "out", tool=tool, min_identity=0.45)
    expected = independent_exclusions(tool, queries, targets, tmp_path, identity=0.45, evalue=1e-3)
    found = excluded(tmp_path / "out")
    aligned = {name for name, row in found.items() if row["evalue"] is not None}
    assert aligned == expected
    assert 10 < len(expected) < len(read_fasta(queries)) - 10
    # What equals a target is excluded even where the program finds nothing.
    assert set(found) - aligned == {"17"}
    assert found["17"]["hit"] == "lcl|3"

    records = read_fasta(queries)
    for name, row in found.items():
        assert row["key"] == xxhash.xxh3_128_digest(records[name].encode())
        assert row["identity"] >= 0.45
    assert summary["excluded"] == {
        "side": "queries", "records": len(found), "of": len(records), "only_equal": 1,
        "sequences": len({records[name] for name in found}),
    }  # fmt: skip
    assert sum(summary["identity_histogram"]["counts"]) == len(found)
    picture = (tmp_path / "out" / "identity.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert not (tmp_path / "out" / ".work").exists()
    schema = pq.read_schema(tmp_path / "out" / "exclusions.parquet")
    assert [f"{field.name}: {field.type}" for field in schema] == [
        "id: string", "key: fixed_size_binary[16]", "hit: string", "identity: float",
        "coverage: float", "evalue: double",
    ]  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_any_number_of_chunks_gives_the_same_bytes(corpus, tmp_path, tool):
    need(tool)
    outputs = []
    for chunks in (1, 3, 7):
        outputs.append(tmp_path / str(chunks))
        # An e-value at which chance alignments are hits: these are the first to change.
        search(*corpus, outputs[-1], tool=tool, min_identity=0, max_evalue=10,
               execution=Execution(chunks=chunks))  # fmt: skip
        assert json.loads((outputs[-1] / "run.json").read_text())["chunks"] == chunks
    assert pq.read_table(outputs[0] / "hits.parquet").num_rows > 200
    assert content(outputs[0]) == content(outputs[1]) == content(outputs[2])


@pytest.mark.slow
def test_ranks_and_threads_give_the_same_bytes(corpus, tmp_path, prothpc):
    need("blastp")
    queries, targets = corpus
    options = ("filter", "--queries", queries, "--targets", targets, "--tool", "blastp",
               "--min-identity", "0", "--max-evalue", "10", "--chunks", "5")  # fmt: skip
    for ranks in (1, 2, 3):
        done = prothpc(
            *options, "-o", tmp_path / str(ranks), "--threads", str(3 - ranks // 2), ranks=ranks
        )
        assert done.returncode == 0, done.stderr
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")


def test_array_tasks_search_and_a_last_command_merges(corpus, tmp_path):
    need("blastp")
    options = {"tool": "blastp", "min_identity": 0.4}
    search(*corpus, tmp_path / "whole", **options)
    for chunk in (2, 0):
        task = Execution(chunks=3, chunk=chunk)
        assert search(*corpus, tmp_path / "tasks", execution=task, **options) is None
    assert not (tmp_path / "tasks" / "exclusions.parquet").exists()
    search(*corpus, tmp_path / "tasks", **options)  # searches chunk 1 and merges
    assert content(tmp_path / "tasks") == content(tmp_path / "whole")
    assert json.loads((tmp_path / "tasks" / "run.json").read_text())["chunks"] == 3


@pytest.fixture(scope="module")
def large_family(tmp_path_factory):
    """A protein, and 600 relatives among 300 other proteins."""
    folder = tmp_path_factory.mktemp("large")
    ancestor, *others = random_proteins([150] + [100] * 300, seed=8)
    planted = [
        relative
        for number, identity in enumerate((0.9, 0.6, 0.5))
        for relative in homologs(ancestor, 200, identity, seed=number)
    ]
    targets = {f"relative{i}": text for i, text in enumerate(planted)}
    targets |= {f"other{i}": text for i, text in enumerate(others)}
    return (
        write_fasta(folder / "one.fasta", {"query": ancestor}),
        write_fasta(folder / "many.fasta", targets),
    )


@pytest.mark.parametrize(
    ("tool", "limit"), [("blastp", 500), pytest.param("mmseqs2", 300, marks=pytest.mark.slow)]
)
def test_none_of_600_relatives_is_missed(large_family, tmp_path, tool, limit, monkeypatch):
    need(tool)
    monkeypatch.setattr(tools.Mmseqs, "first_limit", 300)
    options = {"tool": tool, "min_identity": 0.3, "exclude": "targets", "kept": True}
    summary = search(*large_family, tmp_path / "out", **options)
    found = excluded(tmp_path / "out")
    assert {f"relative{i}" for i in range(600)} <= set(found)
    assert {row["hit"] for row in found.values()} == {"query"}
    assert summary["queries_cut_short"] == 0
    searches = [
        words for words in commands(tmp_path / "out") if " prefilter " in words or "-query" in words
    ]
    option = {"blastp": "-max_target_seqs", "mmseqs2": "--max-seqs"}[tool]
    assert [f"{option} {limit} " in searches[0], f"{option} 900 " in searches[1]] == [True, True]
    kept = read_fasta(tmp_path / "out" / "kept.fasta")
    assert kept == {
        name: text for name, text in read_fasta(large_family[1]).items() if name not in found
    }

    summary = search(*large_family, tmp_path / "cut", max_hits=100, **options)
    assert summary["queries_cut_short"] == 1
    assert len(excluded(tmp_path / "cut")) <= 100


def test_a_copy_under_another_id_is_excluded(corpus, tmp_path):
    need("blastp")
    queries, targets = corpus
    search(queries, targets, tmp_path / "out", tool="blastp", min_identity=0.4)
    found, records = excluded(tmp_path / "out"), read_fasta(queries)
    copies = {f"copy-{i}": records[name].lower() for i, name in enumerate(found)}
    training = write_fasta(tmp_path / "training.fasta", records | copies)
    options = PreprocessOptions(shards=2, exclude=(tmp_path / "out" / "exclusions.parquet",))
    generate([training], tmp_path / "records", options)
    left = sequences(tmp_path / "records")
    assert set(left) == set(records.values()) - {records[name] for name in found}


def test_a_record_set_is_searched_as_its_fasta_is(corpus, tmp_path):
    need("blastp")
    queries, targets = corpus
    options = PreprocessOptions(shards=2, holdout=0.3, dedup=False)
    generate([queries], tmp_path / "records", options)
    rows = []
    for number, source in enumerate((queries, tmp_path / "records")):
        output = tmp_path / str(number)
        search(source, targets, output, tool="blastp", min_identity=0.4)
        table = pq.read_table(output / "exclusions.parquet").to_pylist()
        rows.append(sorted(table, key=lambda row: row["id"]))
    assert rows[0] == rows[1]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_reduced_set_holds_no_similar_pair(corpus, tmp_path, tool):
    need(tool)
    options = {"tool": tool, "min_identity": 0.4}
    queries = corpus[0]
    summary = search(queries, None, tmp_path / "first", reduce=True, kept=True, **options)
    kept = read_fasta(tmp_path / "first" / "kept.fasta")
    found = excluded(tmp_path / "first")
    assert len(kept) + len(found) == len(read_fasta(queries)) == summary["excluded"]["of"]
    assert {row["hit"] for row in found.values()} <= set(kept)

    pairs = pq.read_table(tmp_path / "first" / "hits.parquet").to_pylist()
    similar = {frozenset((row["query"], row["target"])) for row in pairs}
    assert not any(pair <= set(kept) for pair in similar)
    backwards = write_fasta(
        tmp_path / "backwards.fasta", dict(reversed(read_fasta(queries).items()))
    )
    search(backwards, None, tmp_path / "second", reduce=True, kept=True, **options)
    again = read_fasta(tmp_path / "second" / "kept.fasta")
    assert set(again.values()) == set(kept.values())


def test_masked_letters_are_masked_as_preprocess_does(tmp_path):
    need("blastp")
    (protein,) = random_proteins([80], seed=1)
    queries = write_fasta(tmp_path / "q.fasta", {"a": f"{protein[:40]}-{protein[41:]}"})
    targets = write_fasta(tmp_path / "t.fasta", {"b": protein})
    options = {"tool": "blastp", "min_identity": 0.4}
    with pytest.raises(InputError, match=r"q\.fasta, line 2, record 'a': character '-'"):
        search(queries, targets, tmp_path / "error", **options)
    search(queries, targets, tmp_path / "mask", on_invalid="mask", **options)
    key = excluded(tmp_path / "mask")["a"]["key"]
    assert key == xxhash.xxh3_128_digest(f"{protein[:40]}X{protein[41:]}".encode())


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_real_proteins_are_excluded_as_the_programs_own_table_shows(shared_data, tmp_path, tool):
    """QUERY against a part of DB, and that part against QUERY."""
    need(tool)
    sides = []
    for name, most in (("QUERY", 40), ("DB", 1500)):
        with gzip.open(shared_data / f"{name}.fasta.gz", "rt") as source:
            (tmp_path / f"{name}.all").write_text(source.read())
        records = list(read_fasta(tmp_path / f"{name}.all").items())
        step = len(records) // most
        sides.append(write_fasta(tmp_path / f"{name}.fasta", dict(records[::step])))
    for direction, (queries, targets) in enumerate((sides, reversed(sides))):
        output, folder = tmp_path / f"out{direction}", tmp_path / f"plain{direction}"
        folder.mkdir()
        search(queries, targets, output, tool=tool, min_identity=0.4)
        expected = independent_exclusions(tool, queries, targets, folder, identity=0.4, evalue=1e-3)
        aligned = {name for name, row in excluded(output).items() if row["evalue"] is not None}
        assert aligned == expected
        assert len(expected) > 5


def test_directions_and_options_that_contradict_are_refused(corpus, tmp_path, prothpc):
    queries, targets = map(str, corpus)
    for arguments, message in (
        ([], "give either --targets or --self"),
        (["--targets", targets, "--self"], "give either --targets or --self"),
        (["--targets", targets, "--reduce"], "--reduce works on a set against itself: add --self"),
        (["--self", "--exclude", "targets"], "--exclude targets has no meaning with --self"),
        (["--self", "--chunk", "1"], "--chunk 1 needs --chunks"),
        (["--self", "--chunks", "2", "--chunk", "2"], "chunks are numbered from 0 to 1"),
        (["--targets", "nowhere.fasta"], "nowhere.fasta: cannot be read"),
    ):
        done = prothpc("filter", "--queries", queries, "-o", tmp_path / "out", "--tool", "blastp",
                       "--min-identity", "0.4", *arguments)  # fmt: skip
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not Path(tmp_path / "out" / "summary.json").exists()
