"""The order of samples: complete, shuffled, and the same for any number of ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.streams import StreamOrder, mix, permutation, streams_of_rank
from preprocessing.errors import InputError


def order(**changes: int) -> StreamOrder:
    settings = {"seed": 1, "stream": 3, "streams": 7, "records": 1003}
    return StreamOrder(**{**settings, "block_records": 10, "pool_blocks": 4, **changes})


def splitmix64_chain(words: list[int]) -> int:
    """The published splitmix64 step, in Python integers."""
    mask = 2**64 - 1
    state = 0
    for word in words:
        state = ((state ^ (word & mask)) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state


def test_mix_agrees_with_integer_arithmetic() -> None:
    assert int(mix(0)) == 0xE220A8397B1DCDAF  # first output of splitmix64 seeded with 0
    for words in ([0], [5, 7], [-1, 2**63, 12345678901234567890]):
        assert int(mix(*words)) == splitmix64_chain(words)
    assert mix(3, np.arange(4)).tolist() == [splitmix64_chain([3, n]) for n in range(4)]


def test_order_is_the_same_for_ever() -> None:
    """Golden: another order would break the resumption of every run under way."""
    assert permutation(8, 1, 2).tolist() == [7, 5, 6, 1, 4, 3, 0, 2]
    numbers, epochs = order().samples(140, 6)
    assert numbers.tolist() == [433, 435, 444, 441, 437, 464]
    assert epochs.tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("kept_bits", [64, 9, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 300])
def test_permutation_is_the_order_of_hashes(
    monkeypatch: pytest.MonkeyPatch, kept_bits: int, count: int
) -> None:
    """Also where hashes agree in all but their low bits, or altogether."""

    def few_hashes(*words: int | np.ndarray) -> np.ndarray:
        return mix(*words) % np.uint64(2**kept_bits - 1)

    monkeypatch.setattr("hpc.streams.mix", few_hashes)
    expected = np.argsort(few_hashes(3, np.arange(count)), kind="stable")
    assert permutation(count, 3).tolist() == expected.tolist()


@given(
    records=st.integers(7, 500),
    block_records=st.integers(1, 80),
    pool_blocks=st.integers(1, 9),
    streams=st.integers(1, 7),
)
def test_each_epoch_shows_each_record_once(
    records: int, block_records: int, pool_blocks: int, streams: int
) -> None:
    seen = []
    for stream in range(streams):
        one = order(
            stream=stream,
            streams=streams,
            records=records,
            block_records=block_records,
            pool_blocks=pool_blocks,
        )
        for epoch in range(2):
            numbers, epochs = one.samples(epoch * one.length, one.length)
            assert set(epochs) == {epoch}
            assert sorted(numbers) == list(range(one.first, one.first + one.length))
        seen.extend(numbers)
    assert sorted(seen) == list(range(records))


@given(start=st.integers(0, 400), count=st.integers(1, 400), cut=st.integers(1, 400))
def test_a_sequence_is_the_same_in_any_portions(start: int, count: int, cut: int) -> None:
    whole, _ = order().samples(start, count)
    cut = min(cut, count)
    parts = [order().samples(start, cut)[0]]
    if count > cut:
        parts.append(order().samples(start + cut, count - cut)[0])
    assert np.concatenate(parts).tolist() == whole.tolist()


def test_epochs_and_seeds_differ() -> None:
    one = order()
    first, _ = one.samples(0, one.length)
    second, _ = one.samples(one.length, one.length)
    other, _ = order(seed=2).samples(0, one.length)
    assert first.tolist() != second.tolist()
    assert first.tolist() != other.tolist()


def test_a_pool_is_read_from_few_blocks() -> None:
    """A parallel file system sees sequential reads: 4 blocks of 10 for the first 40 samples."""
    one = order(records=7 * 140)
    numbers, _ = one.samples(0, 40)
    assert len({(n - one.first) // 10 for n in numbers.tolist()}) == 4


def test_ranks_share_streams_evenly_and_contiguously() -> None:
    owned = [streams_of_rank(8, rank, 4) for rank in range(4)]
    assert [list(streams) for streams in owned] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_world_size_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(InputError, match=r"3 ranks cannot share 8 .* use 1, 2, 4 or 8 ranks"):
        streams_of_rank(8, 0, 3)


def test_fewer_records_than_streams_is_refused() -> None:
    with pytest.raises(InputError, match="5 training records cannot feed 7 streams"):
        order(records=5)
