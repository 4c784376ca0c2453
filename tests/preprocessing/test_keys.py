"""Keys and placement can be recomputed by anyone, with plain integers."""

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.keys import HOLDOUT_SEED, Placement, hash_residues

any_keys = st.lists(
    st.integers(0, 2**128 - 1)
    # Around the borders of shards, where rounding would show.
    | st.builds(
        lambda shard, shards, off: min(max(shard * 2**128 // shards + off, 0), 2**128 - 1),
        st.integers(0, 65_536),
        st.integers(1, 65_536),
        st.integers(-2, 2),
    ),
    min_size=1,
    max_size=20,
)


def as_array(keys: list[int]) -> np.ndarray:
    text = b"".join(key.to_bytes(16, "big") for key in keys)
    return np.frombuffer(text, np.uint8).reshape(-1, 16)


def test_key_is_the_canonical_xxh3_of_the_residues() -> None:
    text = b"..MKVMAAAAW"
    offsets = np.array([2, 5, 6, 11])
    keys = hash_residues(offsets, np.frombuffer(text, np.uint8))
    expected = [xxhash.xxh3_128_digest(record) for record in (b"MKV", b"M", b"AAAAW")]
    assert [key.tobytes() for key in keys] == expected


@given(keys=any_keys, shards=st.integers(1, 65_536))
def test_shard_is_exactly_key_times_shards_over_2_to_128(keys: list[int], shards: int) -> None:
    placed = Placement(shards, 0.0).shard_of(as_array(keys))
    assert placed.tolist() == [key * shards >> 128 for key in keys]


@given(keys=any_keys, shards=st.integers(1, 65_536), holdout=st.floats(0.001, 0.999))
def test_holdout_is_decided_by_the_salted_hash(
    keys: list[int], shards: int, holdout: float
) -> None:
    placement = Placement(shards, holdout)
    expected = []
    for key in keys:
        salted = xxhash.xxh3_64_intdigest(key.to_bytes(16, "big"), HOLDOUT_SEED)
        held = salted < int(holdout * 2**64)
        of_split = key * (placement.holdout_shards if held else shards) >> 128
        expected.append(of_split + (shards if held else 0))
    assert placement.shard_of(as_array(keys)).tolist() == expected


@pytest.mark.parametrize(
    ("shards", "holdout", "held"), [(8, 0.0, 0), (8, 0.001, 1), (6000, 0.005, 30), (1, 0.9, 1)]
)
def test_holdout_shards_are_about_as_large_as_the_others(
    shards: int, holdout: float, held: int
) -> None:
    placement = Placement(shards, holdout)
    assert placement.holdout_shards == held
    assert len(placement) == shards + held
    names = [placement.file_name(number) for number in range(len(placement))]
    assert names[0] == "shard-00000.arrow"
    assert len(set(names)) == len(names)
    if held:
        assert names[-1] == f"holdout-{held - 1:05d}.arrow"


def test_buckets_cut_each_shard_in_order_and_exactly() -> None:
    rng = np.random.default_rng(3)
    keys = rng.integers(0, 256, (500, 16), np.uint8)
    border = [(2**128 * n // 9 + more).to_bytes(16, "big") for n in range(1, 9) for more in (-1, 0)]
    keys = np.concatenate([keys, np.frombuffer(b"".join(border), np.uint8).reshape(-1, 16)])
    placement, parts = Placement(3, 0.3), 3
    shards = placement.shard_of(keys)
    buckets = placement.bucket_of(keys, shards, parts)
    for key, shard, bucket in zip(keys, shards, buckets, strict=True):
        held = shard >= placement.shards
        count = placement.holdout_shards if held else placement.shards
        part = int.from_bytes(key.tobytes(), "big") * count * parts // 2**128
        assert bucket == (placement.shards * parts if held else 0) + part
    assert (placement.bucket_of(keys, shards, 1) == shards).all()
