"""The order in which a run sees its records: Q streams, the same for any number of ranks.

The key-sorted record set is cut into Q contiguous streams, one for each micro-batch of a global
step. A stream is an endless sequence of samples, epoch after epoch: its blocks of contiguous
records are permuted, a few neighbouring blocks form a pool, and the records of a pool are
shuffled. Windows of that sequence are sorted by length and cut into micro-batches. All of it is
a function of (seed, stream, epoch, position), so a cursor of two numbers restores a stream.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from preprocessing.errors import InputError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix(*words: int | np.ndarray) -> np.ndarray:
    """Hash integers into uint64, element by element.

    A chain of splitmix64 steps (Steele, Lea and Flood 2014); unlike a library's generator it is
    the same in every version, and any element can be had without those before it.

    Args:
        words: integers or arrays of them that broadcast; negative ones count modulo 2^64.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            bits = word & 0xFFFF_FFFF_FFFF_FFFF if isinstance(word, int) else word
            state = (state ^ np.asarray(bits).astype(np.uint64)) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * _MIX_1
            state = (state ^ (state >> np.uint64(27))) * _MIX_2
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def permutation(count: int, *words: int) -> np.ndarray:
    """Return int64 [count]: a permutation of 0 … count - 1 that the `words` determine."""
    hashes = mix(*words, np.arange(count))
    # The order of the hashes; numbers sort several times as fast as indices, so the low bits of
    # each make room for its index. Where hashes agree in the others, these have to decide.
    low = np.uint64((1 << (count - 1).bit_length()) - 1)
    ordered = hashes & ~low | np.arange(count, dtype=np.uint64)
    ordered.sort()
    if (ordered[1:] ^ ordered[:-1] <= low).any():
        return np.argsort(hashes, kind="stable")
    return (ordered & low).astype(np.int64)


@dataclass(kw_only=True)
class StreamOrder:
    """The endless sample sequence of one stream.

    Raises:
        InputError: if there are fewer records than streams.
    """

    seed: int
    stream: int
    streams: int
    records: int
    """Records in the whole set."""
    block_records: int
    pool_blocks: int
    _last_pool: tuple[tuple[int, ...], int, np.ndarray] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.records < self.streams:
            raise InputError(
                f"{self.records} training records cannot feed {self.streams} streams "
                "(train.global_batch / train.micro_batch): use a larger record set, "
                "a smaller global batch or a larger micro-batch"
            )

    @property
    def first(self) -> int:
        """Number of the stream's first record."""
        return self.stream * self.records // self.streams

    @property
    def length(self) -> int:
        """Records in the stream, the samples of one epoch."""
        return (self.stream + 1) * self.records // self.streams - self.first

    def samples(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return samples `start` … `start + count - 1` of the endless sequence.

        Returns:
            int64 [count] record numbers, and int64 [count] epochs, counted from 0.
        """
        numbers, epochs = [], []
        while count:
            epoch, position = divmod(start, self.length)
            part = self._in_epoch(epoch, position, min(count, self.length - position))
            numbers.append(part)
            epochs.append(np.full(len(part), epoch))
            start += len(part)
            count -= len(part)
        return np.concatenate(numbers), np.concatenate(epochs)

    def _in_epoch(self, epoch: int, start: int, count: int) -> np.ndarray:
        """Record numbers of positions `start` … of one epoch."""
        words = (self.seed, self.stream, epoch)
        firsts, ends = _block_order(self.length, self.block_records, words)
        pool_ends = np.append(ends[self.pool_blocks - 1 : -1 : self.pool_blocks], ends[-1])
        first_pool, last_pool = np.searchsorted(pool_ends, [start, start + count - 1], "right")
        parts = []
        for pool in range(int(first_pool), int(last_pool) + 1):
            pool_start = int(pool_ends[pool - 1]) if pool else 0
            inside = self._pool(firsts, words, pool)
            parts.append(inside[max(start - pool_start, 0) : start + count - pool_start])
        return self.first + np.concatenate(parts)

    def _pool(self, firsts: np.ndarray, words: tuple[int, ...], pool: int) -> np.ndarray:
        """Records of a pool, shuffled; the last one is kept, as portions are smaller than pools."""
        if self._last_pool is None or self._last_pool[:2] != (words, pool):
            blocks = firsts[pool * self.pool_blocks : (pool + 1) * self.pool_blocks]
            block = np.arange(min(self.block_records, self.length))
            inside = (blocks[:, None] + block).ravel()
            inside = inside[inside < self.length]
            inside = inside[permutation(len(inside), *words, pool)]
            self._last_pool = words, pool, inside
        return self._last_pool[2]


@lru_cache(maxsize=8192)
def _block_order(
    length: int, block_records: int, words: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """First record of each block of an epoch, in the epoch's order, and their running total."""
    firsts = permutation(-(-length // block_records), *words) * block_records
    return firsts, np.cumsum(np.minimum(block_records, length - firsts))


def streams_of_rank(streams: int, rank: int, world_size: int) -> range:
    """Return the streams that a rank owns: contiguous, so a node reads only its own shards.

    Raises:
        InputError: if the ranks cannot share the streams evenly; names the world sizes that can.
    """
    if streams % world_size:
        divisors = [n for n in range(1, streams + 1) if streams % n == 0]
        raise InputError(
            f"{world_size} ranks cannot share {streams} micro-batches a step (train.global_batch "
            f"/ train.micro_batch) evenly: use {_list(divisors)} ranks, or change the batch"
        )
    share = streams // world_size
    return range(rank * share, (rank + 1) * share)


def _list(numbers: list[int]) -> str:
    shown = numbers if len(numbers) <= 12 else [*numbers[:6], *numbers[-6:]]
    return f"{', '.join(map(str, shown[:-1]))} or {shown[-1]}" if len(shown) > 1 else str(shown[0])
