"""Windows cover a protein, in order, and say where they are from."""

import itertools

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing import windows
from preprocessing.windows import cut_windows


def test_windows_of_two_proteins() -> None:
    ids = pa.array([b"a", b"tr|b"])
    sequences = pa.array([b"ABCDEFGHIJK", b"ABCDEF"], pa.binary())
    [(names, residues, parents)] = cut_windows(ids, sequences, 5, 2)
    assert names.to_pylist() == [b"a/1-5", b"a/4-8", b"a/7-11", b"tr|b/1-5", b"tr|b/2-6"]
    assert residues.to_pylist() == [b"ABCDE", b"DEFGH", b"GHIJK", b"ABCDE", b"BCDEF"]
    assert parents.tolist() == [0, 0, 0, 1, 1]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    length=st.integers(1, 20),
    share=st.floats(0, 0.5),
    sliced=st.booleans(),
    batch_bytes=st.sampled_from([1, 50, 2**20]),
)
def test_every_residue_is_in_a_window(
    lengths: list[int], length: int, share: float, sliced: bool, batch_bytes: int
) -> None:
    overlap = int(share * length)
    texts = [bytes(65 + i % 26 for i in range(length + more)) for more in lengths]
    ids, sequences = (
        pa.array([b"before", *values], pa.binary()) if sliced else pa.array(values, pa.binary())
        for values in ([b"id%d" % n for n in range(len(texts))], texts)
    )
    first = int(sliced)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_BATCH_BYTES", batch_bytes)
        batches = list(cut_windows(ids[first:], sequences[first:], length, overlap))
    rows = [
        row
        for names, residues, parents in batches
        for row in zip(names.to_pylist(), residues.to_pylist(), parents.tolist(), strict=True)
    ]
    seen: list[list[range]] = [[] for _ in texts]
    for name, window, parent in rows:
        of, _, place = name.partition(b"/")
        assert of == b"id%d" % parent
        start, stop = map(int, place.split(b"-"))
        assert texts[parent][start - 1 : stop] == window
        assert len(window) == length
        seen[parent].append(range(start - 1, stop))
    for text, found in zip(texts, seen, strict=True):
        assert found[0].start == 0
        assert found[-1].stop == len(text)
        for before, after in itertools.pairwise(found):
            assert before.start < after.start <= before.stop - overlap
            if after is not found[-1]:
                assert after.start == before.stop - overlap
