"""Greedy reduction keeps a set without similar pairs, and leaves nothing out without reason."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.filtering.hits import Hits
from preprocessing.filtering.reduction import reduce_greedily
from preprocessing.filtering.sequences import Side, SideWriter


@pytest.fixture(scope="module")
def make_side(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sides")

    def make(sequences):
        path = folder / "side.arrow"
        writer = SideWriter(path, fasta=None, with_residues=True)
        ids = pa.array([f"p{i}".encode() for i in range(len(sequences))], pa.binary())
        writer.add(ids, pa.array([text.encode() for text in sequences], pa.binary()))
        writer.close()
        return Side(path)

    return make


def hits(pairs, evalues=None):
    query, target = np.array(pairs, np.int64).reshape(-1, 2).T
    identity = 1 - np.arange(len(pairs)) / 1000
    known = np.full(len(pairs), 1e-9) if evalues is None else np.array(evalues, float)
    return Hits(query, target, identity, np.ones(len(pairs)), known)


def as_pairs(found):
    return list(zip(found.query.tolist(), found.target.tolist(), strict=True))


def test_the_longest_is_kept_whatever_the_order_of_the_input(make_side):
    side = make_side(["A" * 5, "C" * 9, "D" * 7, "E" * 20])
    # 0 - 1 - 2 is a chain: 1, the longest of it, is kept, so 0 and 2 go.
    assert as_pairs(reduce_greedily(side, hits([(0, 1), (2, 1)]), "longest")) == [(0, 1), (2, 1)]


def test_the_first_is_kept_where_the_input_is_ordered_by_quality(make_side):
    side = make_side(["A" * 5, "C" * 9, "D" * 7, "E" * 20])
    assert as_pairs(reduce_greedily(side, hits([(0, 1), (2, 1)]), "first")) == [(1, 0)]


def test_equal_sequences_are_one_of_which_the_first_id_is_kept(make_side):
    side = make_side(["AC", "DEF", "AC", "DEF"])
    copies = [(0, 2), (2, 0), (1, 3), (3, 1)]
    found = reduce_greedily(side, hits([*copies, (1, 2)], [np.nan] * 4 + [1e-9]), "longest")
    assert as_pairs(found) == [(0, 1), (2, 1), (3, 1)]
    assert np.isnan(found.evalue).tolist() == [False, False, True]


@given(
    sequences=st.lists(st.text("ACDE", min_size=1, max_size=4), min_size=1, max_size=12),
    data=st.data(),
    prefer=st.sampled_from(["longest", "first"]),
)
def test_no_two_kept_are_similar_and_each_other_has_a_kept_one(make_side, sequences, data, prefer):
    side, numbers = make_side(sequences), range(len(sequences))
    similar = data.draw(st.sets(st.tuples(st.sampled_from(numbers), st.sampled_from(numbers))))
    similar = {(a, b) for a, b in similar if sequences[a] != sequences[b]}
    equal = {(a, b) for a in numbers for b in numbers if a != b and sequences[a] == sequences[b]}
    found = reduce_greedily(side, hits(sorted(similar | equal)), prefer)

    kept = set(numbers) - set(found.query.tolist())
    joined = {frozenset((sequences[a], sequences[b])) for a, b in similar | equal}
    assert not any(frozenset((sequences[a], sequences[b])) in joined for a in kept for b in kept
                   if a < b)  # fmt: skip
    for number, keeper in as_pairs(found):
        assert keeper in kept
        assert frozenset((sequences[number], sequences[keeper])) in joined
        if prefer == "longest":
            assert len(sequences[keeper]) >= len(sequences[number])
        else:
            assert sequences.index(sequences[keeper]) <= sequences.index(sequences[number])
