"""Thresholds, and what is picked of the alignments that meet them."""

from dataclasses import fields

import numpy as np
import pytest

from preprocessing.errors import InputError
from preprocessing.filtering.hits import Hits, Table, read_table, too_similar
from preprocessing.filtering.options import FilterOptions, resolve_options
from preprocessing.filtering.report import best_of_queries, identity_histogram

COLUMNS = [field.name for field in fields(Table)]


def table(*rows):
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    return Table(*columns[:-1], columns[-1].astype(float))


def pairs(hits):
    return list(zip(hits.query.tolist(), hits.target.tolist(), strict=True))


# 40 identical in 80 columns; the query has 100 residues, the target 50; 78 and 45 are aligned.
ROW = (0, 7, 40, 80, 1, 78, 6, 50, 100, 50, 1e-5)


@pytest.mark.parametrize(
    ("of", "expected"), [("alignment", 40 / 80), ("query", 40 / 100), ("shorter", 40 / 50)]
)
def test_identity_is_of_what_is_named(of, expected):
    options = FilterOptions(tool="blastp", min_identity=expected, identity_of=of)
    assert too_similar(table(ROW), options, within=False).identity.tolist() == [expected]
    above = FilterOptions(tool="blastp", identity_above=expected, identity_of=of)
    assert len(too_similar(table(ROW), above, within=False)) == 0


def test_coverage_is_of_the_shorter_sequence_whichever_is_the_query():
    row = dict(zip(COLUMNS, ROW, strict=True))
    turned = row | {
        "query_start": 6, "query_end": 50, "target_start": 1, "target_end": 78,
        "query_length": 50, "target_length": 100,
    }  # fmt: skip
    for one in (row, turned):
        options = FilterOptions(tool="blastp", min_identity=0, min_coverage=45 / 50)
        hits = too_similar(table(tuple(one.values())), options, within=False)
        assert hits.coverage.tolist() == [45 / 50]
        options = FilterOptions(tool="blastp", min_identity=0, min_coverage=0.901)
        assert len(too_similar(table(tuple(one.values())), options, within=False)) == 0


def test_evalue_at_the_threshold_is_a_hit():
    options = FilterOptions(tool="blastp", min_identity=0, max_evalue=1e-5)
    assert len(too_similar(table(ROW), options, within=False)) == 1
    options = FilterOptions(tool="blastp", min_identity=0, max_evalue=9.9e-6)
    assert len(too_similar(table(ROW), options, within=False)) == 0


def test_a_pair_is_listed_once_with_its_most_identical_alignment_that_meets_all():
    rows = [
        ROW,
        (0, 7, 9, 10, 1, 10, 1, 10, 100, 50, 1e-5),  # more identical, but covers too little
        (0, 7, 30, 50, 1, 50, 1, 50, 100, 50, 1e-4),
        (0, 3, 40, 80, 1, 78, 6, 50, 100, 50, 1e-5),
    ]
    options = FilterOptions(tool="blastp", min_identity=0.5, min_coverage=0.5)
    hits = too_similar(table(*rows), options, within=False)
    assert pairs(hits) == [(0, 3), (0, 7)]
    assert hits.identity.tolist() == [0.5, 0.6]


def test_a_sequence_is_no_hit_of_itself():
    options = FilterOptions(tool="blastp", min_identity=0)
    own = (7, *ROW[1:])
    assert len(too_similar(table(own), options, within=True)) == 0
    assert len(too_similar(table(own), options, within=False)) == 1


def test_alignments_come_before_pairs_only_known_to_be_equal():
    hits = Hits(
        np.array([1, 1, 2]),
        np.array([4, 5, 6]),
        np.array([1.0, 0.7, 1.0]),
        np.ones(3),
        np.array([np.nan, 1e-9, np.nan]),
    )
    best = best_of_queries(hits)
    assert pairs(best) == [(1, 5), (2, 6)]
    histogram = identity_histogram(best)
    assert sum(histogram["counts"]) == 2
    assert histogram["counts"][35] == histogram["counts"][49] == 1


def test_comments_in_a_table_are_left_out(tmp_path):
    (tmp_path / "t").write_text(
        "# BLASTP 2.12.0+\n# 1 hits found\n3\t5\t10\t20\t1\t20\t2\t21\t99\t98\t1.5e-07\n# end\n"
    )
    read = read_table(tmp_path / "t")
    assert (read.query.tolist(), read.target_length.tolist()) == ([3], [98])
    assert read.evalue.tolist() == [1.5e-7]


def test_a_table_without_hits_is_read(tmp_path):
    (tmp_path / "t").write_text("# BLASTP 2.12.0+\n# 0 hits found\n")
    assert len(read_table(tmp_path / "t").query) == 0


def test_presets_give_way_to_what_is_typed():
    options = resolve_options("prottrans-new364")
    assert (options.tool, options.sensitivity, options.identity_above) == ("mmseqs2", 7.5, 0.2)
    options = resolve_options("prottrans-new364", tool="blastp", min_identity=0.3)
    assert (options.tool, options.sensitivity) == ("blastp", None)
    assert (options.min_identity, options.identity_above) == (0.3, None)
    assert resolve_options("proteinbert", max_evalue=None).min_identity == 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --tool blastp or mmseqs2, or a --preset"),
        ({"preset": "esm"}, "--preset esm: choose one of proteinbert, prottrans-new364"),
        ({"tool": "diamond", "min_identity": 0.4}, "--tool diamond: choose one of blastp, mmseqs2"),
        ({"tool": "blastp"}, "give either --min-identity or --identity-above"),
        (
            {"tool": "blastp", "min_identity": 0.4, "identity_above": 0.2},
            "give either --min-identity or --identity-above",
        ),
        ({"tool": "blastp", "min_identity": 40}, "--min-identity 40: choose 0 to 1"),
        ({"tool": "blastp", "min_identity": float("nan")}, "--min-identity nan"),
        ({"tool": "blastp", "min_identity": 0.4, "max_evalue": 0}, "--max-evalue 0"),
        (
            {"tool": "blastp", "min_identity": 0.4, "sensitivity": 7},
            "--sensitivity is for --tool mmseqs2",
        ),
        (
            {"tool": "mmseqs2", "min_identity": 0.4, "identity_of": "target"},
            "--identity-of target: choose one of alignment, query, shorter",
        ),
    ],
)
def test_wrong_options_are_refused(options, message):
    preset = options.pop("preset", None)
    with pytest.raises(InputError) as refused:
        resolve_options(preset, **options)
    assert message in str(refused.value)
