import re

import pytest

from preprocessing.truth import (
    GO_VOCABULARY,
    MAX_HIDDEN_FAMILIES,
    SHARED_GO_TERMS,
    TRUTH_HEADER,
    go_rows,
    truth_rows,
)


def terms(families: list[int], *, first_family: int, hidden: bool) -> list[set[int]]:
    """Numbers of the GO terms of each family."""
    rows = go_rows(
        [f"id{family}" for family in families],
        families,
        seed=3,
        first_family=first_family,
        hidden=hidden,
    )
    found = []
    for family, line in zip(families, rows.decode().splitlines(), strict=True):
        match = re.fullmatch(rf"id{family}\t(GO:\d{{7}}(?:;GO:\d{{7}}){{0,5}})", line)
        assert match
        found.append({int(term[3:]) for term in match[1].split(";")})
    return found


def test_truth_has_the_columns_that_its_header_names():
    assert TRUTH_HEADER == b"id\tfamily\tidentity\thidden\n"
    rows = truth_rows(["a", "b"], [3, 4], [10_000, 512], hidden=True)
    assert rows == b"a\t3\t1.0000\t1\nb\t4\t0.0512\t1\n"
    assert truth_rows(["a"], [3], [9_999], hidden=False) == b"a\t3\t0.9999\t0\n"


@pytest.mark.parametrize("hidden", [False, True])
def test_neighbouring_families_share_only_the_shared_terms(hidden):
    found = terms(list(range(1000)), first_family=0, hidden=hidden)
    seen: set[int] = set()
    for numbers in found:
        assert not {number for number in numbers if number > SHARED_GO_TERMS} & seen
        seen |= {number for number in numbers if number > SHARED_GO_TERMS}
    assert set().union(*found) - seen == set(range(1, SHARED_GO_TERMS + 1))


def test_main_terms_stay_in_the_vocabulary():
    # As many families as it takes to go round in it.
    found = terms(list(range(10**9, 10**9 + 3000)), first_family=0, hidden=False)
    assert set().union(*found) <= set(range(1, GO_VOCABULARY + 1))
    assert max(map(max, found)) > GO_VOCABULARY - 10


def test_hidden_terms_stay_below_a_million():
    last = list(range(MAX_HIDDEN_FAMILIES - 500, MAX_HIDDEN_FAMILIES))
    own = [max(numbers) for numbers in terms(last, first_family=0, hidden=True)]
    assert GO_VOCABULARY < max(own) < 1_000_000


def test_terms_of_hidden_families_do_not_depend_on_how_many_main_ones_there_are():
    first = terms(list(range(40, 140)), first_family=40, hidden=True)
    assert {number for numbers in first for number in numbers if number > GO_VOCABULARY} <= set(
        range(GO_VOCABULARY + 1, GO_VOCABULARY + 301)
    )
