"""A table of clusters, however it is sorted and in whatever memory, says who is held out."""

import gzip
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from record_sets import sequences

from preprocessing.clusters import Clusters, write_clusters
from preprocessing.errors import InputError
from preprocessing.generate import generate
from preprocessing.keys import HOLDOUT_SEED
from preprocessing.options import PreprocessOptions
from preprocessing.verify import verify

BELOW = 2**62  # a quarter is held out


def is_held_out(cluster: str) -> bool:
    return xxhash.xxh3_64_intdigest(cluster.encode(), HOLDOUT_SEED) < BELOW


def look_up(path: Path, ids: list[str]) -> tuple[list[bool], list[bool]]:
    column = pa.array([name.encode() for name in ids], pa.binary())
    held_out, listed = Clusters(path, BELOW).look_up(column)
    return held_out.tolist(), listed.tolist()


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 30), st.text("abcé|", min_size=1, max_size=4)),
        min_size=1,
        max_size=200,
        unique_by=lambda row: row[1],
    ),
    memory=st.sampled_from([100, 2**20]),
    line_end=st.sampled_from(["\n", "\r\n", "\tmore\tcolumns\n"]),
    last=st.booleans(),
)
def test_members_share_the_fate_of_their_cluster(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[int, str]],
    memory: int,
    line_end: str,
    last: bool,
) -> None:
    directory = tmp_path_factory.mktemp("clusters")
    text = line_end.join(f"cluster{number}\t{member}" for number, member in rows)
    (directory / "table.tsv").write_text(text + line_end * last, newline="", encoding="utf-8")
    first = write_clusters(directory / "words", directory / "table.tsv", BELOW, memory)
    assert first == rows[0][1]
    words = np.fromfile(directory / "words", np.uint64)
    assert (np.diff(words.astype(object)) > 0).all()
    members = [member for _, member in rows]
    held_out, listed = look_up(directory / "words", members)
    assert all(listed)
    assert held_out == [is_held_out(f"cluster{number}") for number, _ in rows]
    strangers = [f"stranger{number}" for number in range(20)]
    held_out, listed = look_up(directory / "words", strangers)
    assert not any(listed)
    assert held_out == [is_held_out(name) for name in strangers]
    assert sorted(path.name for path in directory.iterdir()) == ["table.tsv", "words"]


def test_tables_of_many_blocks_and_kinds(tmp_path: Path) -> None:
    lines = [f"cluster{n // 7}\tmember{n}\n" for n in range(300_000)]
    random.Random(0).shuffle(lines)
    text = "".join(lines).encode()
    (tmp_path / "plain").write_bytes(text)
    (tmp_path / "gzip").write_bytes(gzip.compress(text[:1000]) + gzip.compress(text[1000:]))
    (tmp_path / "zstd").write_bytes(zstandard.compress(text))
    made = {}
    for kind in ("plain", "gzip", "zstd"):
        write_clusters(tmp_path / "words", tmp_path / kind, BELOW, 2**20)
        made[kind] = (tmp_path / "words").read_bytes()
    assert len(made["plain"]) == 8 * len(lines)
    assert made["gzip"] == made["zstd"] == made["plain"]
    members = [f"member{n}" for n in range(0, 300_000, 1001)]
    expected = [is_held_out(f"cluster{int(name[6:]) // 7}") for name in members]
    assert look_up(tmp_path / "words", members) == (expected, [True] * len(members))


def test_member_of_two_clusters_is_held_out_if_one_is(tmp_path: Path) -> None:
    clusters = [f"cluster{number}" for number in range(40)]
    held, trained = (
        next(name for name in clusters if is_held_out(name) == fate) for fate in (True, False)
    )
    (tmp_path / "table").write_text(f"{trained}\ta\n{held}\ta\n{trained}\tb\n")
    write_clusters(tmp_path / "words", tmp_path / "table", BELOW, 2**20)
    assert look_up(tmp_path / "words", ["a", "b"]) == ([True, False], [True, True])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a\tb\nc d\n", r"table, line 2: 'c d' is not a representative's id, a tab"),
        (b"a\tb\n" * 600_000 + b"a\t\n", r"table, line 600,001: 'a\\t' is not"),
        (b"\tb", r"table, line 1: '\\tb' is not"),
        (b"a\tb\n\nc\td\n", r"table, line 2: '' is not"),
        (b"", r"table: is empty"),
        (gzip.compress(b"a\tb\n" * 1000)[:-9], r"table: is damaged"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "table").write_bytes(text)
    with pytest.raises(InputError, match=message):
        write_clusters(tmp_path / "words", tmp_path / "table", BELOW, 2**20)
    assert [path.name for path in tmp_path.iterdir()] == ["table"]


class TestHoldoutByCluster:
    """Whole clusters are held out, and nothing that is held out is trained on."""

    def make(self, tmp_path: Path, **options: Any) -> Any:
        rng = random.Random(1)
        texts = ["".join(rng.choices("ACDEFGHIKL", k=30)) for _ in range(400)]
        texts += texts[:40]  # equal sequences, most of them in another cluster
        self.members = {f"id{n}": (f"id{n - n % 4}", text) for n, text in enumerate(texts)}
        (tmp_path / "in.fasta").write_text(
            "".join(f">{name}\n{text}\n" for name, (_, text) in self.members.items())
        )
        if not (tmp_path / "table").exists():
            (tmp_path / "table").write_text(
                "".join(f"{cluster}\t{name}\n" for name, (cluster, _) in self.members.items())
            )
        given = PreprocessOptions(holdout=0.25, holdout_by=tmp_path / "table", shards=3, **options)
        manifest = generate([tmp_path / "in.fasta"], tmp_path / "set", given)
        verify(tmp_path / "set")
        return manifest

    @pytest.mark.parametrize("dedup", [True, False])
    def test_clusters_stay_together(self, tmp_path: Path, dedup: bool) -> None:
        totals = self.make(tmp_path, dedup=dedup)["totals"]
        train, held = (sequences(tmp_path / "set", split) for split in ("train", "holdout"))
        expected = {text for cluster, text in self.members.values() if is_held_out(cluster)}
        assert held.keys() == expected
        assert train.keys() == {text for _, text in self.members.values()} - expected
        twins = totals["not_kept"]["in_holdout"]["records"]
        assert twins == sum(
            text in expected and not is_held_out(cluster) for cluster, text in self.members.values()
        )
        assert twins > 0
        assert totals["not_in_clusters"] == 0

    def test_single_proteins_need_not_be_listed(self, tmp_path: Path) -> None:
        self.make(tmp_path)
        lines = (tmp_path / "table").read_text().splitlines(keepends=True)
        singles = [f"id{number}" for number in range(0, 40)]
        (tmp_path / "table").write_text("".join(lines[40:]) + "".join(
            f"{name}\t{name}\n" for name in singles
        ))  # fmt: skip
        (tmp_path / "set").rename(tmp_path / "first")
        self.make(tmp_path)
        listed = sequences(tmp_path / "set", "holdout")
        (tmp_path / "set").rename(tmp_path / "second")
        (tmp_path / "table").write_text("".join(lines[40:]))
        totals = self.make(tmp_path)["totals"]
        assert totals["not_in_clusters"] == 40
        assert sequences(tmp_path / "set", "holdout") == listed

    def test_table_of_other_ids_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "table").write_text("UniRef50_A\tUniRef50_B\n")
        with pytest.raises(
            InputError, match=r"none of the first 440 ids.*like 'UniRef50_B', in the.*like 'id0'"
        ):
            self.make(tmp_path)
        assert not list((tmp_path / "set").iterdir())
        (tmp_path / "table").write_text("".join(f"id0\tid{n}\n" for n in range(219)))
        with pytest.raises(InputError, match="does not list 221 of 440 ids"):
            self.make(tmp_path)
        assert not list((tmp_path / "set").iterdir())
        (tmp_path / "table").write_text("".join(f"id0\tid{n}\n" for n in range(220)))
        assert self.make(tmp_path)["totals"]["not_in_clusters"] == 220

    def test_share_to_hold_out_must_be_given(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="--holdout-by table needs --holdout"):
            PreprocessOptions(holdout_by=Path("table"))
