"""Content keys and what follows from them: a record's split and shard.

A record's key is the xxh3-128 of its residues, as 16 big-endian bytes (the canonical form:
`xxhash.xxh3_128_digest(sequence)`). Everything here is a function of keys alone, so that anyone can
recompute where a record lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import repeat

import numpy as np
import xxhash

KEY_BYTES = 16

HOLDOUT_SEED = 0x686F6C646F757431
"""Seed of the second hash, xxh3-64 of the key, that decides who is held out ("holdout1")."""

_LOW_32 = np.uint64(2**32 - 1)
_32 = np.uint64(32)


def hash_residues(offsets: np.ndarray, residues: np.ndarray) -> np.ndarray:
    """Return the keys, uint8 [N, 16], of records `residues[offsets[i]:offsets[i + 1]]`."""
    text = BytesIO(residues[int(offsets[0]) : int(offsets[-1])].data)
    records = map(text.read, np.diff(offsets).tolist())  # a third faster than slicing bytes
    digests = b"".join(map(xxhash.xxh3_128_digest, records))
    return np.frombuffer(digests, np.uint8).reshape(-1, KEY_BYTES)


def hash64(offsets: np.ndarray, values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the xxh3-64, uint64 [N], of texts `values[offsets[i]:offsets[i + 1]]`."""
    text = BytesIO(values[int(offsets[0]) : int(offsets[-1])].data)
    texts = map(text.read, np.diff(offsets).tolist())
    return np.fromiter(map(xxhash.xxh3_64_intdigest, texts, repeat(seed)), np.uint64)


def halves(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the high and the low 64 bits, uint64 [N] each, of keys uint8 [N, 16]."""
    words = np.ascontiguousarray(keys).view(">u8").astype(np.uint64)
    return np.ascontiguousarray(words[:, 0]), np.ascontiguousarray(words[:, 1])


@dataclass(frozen=True)
class Placement:
    """Which split and shard a key belongs to.

    Shards are numbered through: the train shards first, then those of the held-out split.
    """

    shards: int
    """Shards of the train split, 1 to 65,536."""
    holdout: float
    """Fraction of the keys that is held out, 0 to below 1."""

    @property
    def holdout_shards(self) -> int:
        """As many as keep held-out shards about as large as the others; none without hold-out."""
        return max(1, round(self.shards * self.holdout)) if self.holdout > 0 else 0

    def __len__(self) -> int:
        return self.shards + self.holdout_shards

    def split_of(self, shard: int) -> str:
        """Return "train" or "holdout"."""
        return "train" if shard < self.shards else "holdout"

    def file_name(self, shard: int) -> str:
        """Return a shard's file name."""
        if shard < self.shards:
            return f"shard-{shard:05d}.arrow"
        return f"holdout-{shard - self.shards:05d}.arrow"

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that there are."""
        return ("train", "holdout") if self.holdout > 0 else ("train",)

    def shard_of(self, keys: np.ndarray, held_out: np.ndarray | None = None) -> np.ndarray:
        """Return the shard, int64 [N], of keys uint8 [N, 16].

        Args:
            keys: what decides the place in the split.
            held_out: bool [N], which are in the held-out split; None: as `held_out` says.
        """
        high, low = halves(keys)
        shard = _scale(high, low, self.shards)
        if self.holdout > 0:
            held = self.held_out(keys) if held_out is None else held_out
            shard[held] = self.shards + _scale(high[held], low[held], self.holdout_shards)
        return shard

    def bucket_of(self, keys: np.ndarray, shards: np.ndarray, parts: int) -> np.ndarray:
        """Return the bucket, int64 [N]: shards are cut into `parts` ranges of keys, in order.

        Args:
            keys: uint8 [N, 16].
            shards: int64 [N], of the keys.
            parts: 1 or more.
        """
        if parts == 1:
            return shards
        high, low = halves(keys)
        of_split = np.where(shards < self.shards, self.shards, self.holdout_shards)
        return shards * parts + _scale(high, low, of_split * parts) % parts

    def held_out(self, keys: np.ndarray) -> np.ndarray:
        """Return bool [N]: which of the keys, uint8 [N, 16], their salted hash holds out."""
        if self.holdout == 0:
            return np.zeros(len(keys), bool)
        bounds = np.arange(0, keys.size + 1, KEY_BYTES)
        return hash64(bounds, keys.reshape(-1), HOLDOUT_SEED) < np.uint64(self.held_out_below)

    @property
    def held_out_below(self) -> int:
        """Salted hashes below this are held out."""
        return int(Fraction(self.holdout) * 2**64)


def _scale(high: np.ndarray, low: np.ndarray, count: int | np.ndarray) -> np.ndarray:
    """Return floor(key * count / 2**128), exactly, for count up to 2**32; int64 [N]."""
    factor = np.asarray(count).astype(np.uint64)
    carry = (low & _LOW_32) * factor >> _32
    for digit in (low >> _32, high & _LOW_32, high >> _32):
        carry = digit * factor + carry >> _32
    return carry.astype(np.int64)
