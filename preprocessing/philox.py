"""Random numbers that are the same on every machine and with every NumPy (1.26 or later).

They are the raw output of Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"), and what is made of it uses integers and single IEEE-754 operations, never a library's
distributions.
"""

import numpy as np


class RandomStream:
    """Random arrays; streams of different numbers are independent.

    Args:
        seed: 0 to 2^64 - 1.
        stream: 0 to 2^64 - 1.
    """

    def __init__(self, seed: int, stream: int) -> None:
        self._bits = np.random.Philox(key=seed | stream << 64)

    def draw(self, count: int, dtype: str) -> np.ndarray:
        """Return `count` unsigned integers of a little-endian `dtype`, over its whole range."""
        words = self._bits.random_raw(-(-count * np.dtype(dtype).itemsize // 8))
        return words.astype("<u8", copy=False).view(dtype)[:count]

    def fractions(self, count: int) -> np.ndarray:
        """Return float64 [count], even over [0, 1) in steps of 2^-32."""
        return self.draw(count, "<u4") / 2.0**32

    def below(self, bounds: np.ndarray) -> np.ndarray:
        """Return for every bound (at most 2^32) an index from 0 up to, not including, it."""
        scaled = self.draw(len(bounds), "<u4").astype(np.uint64) * bounds.astype(np.uint64)
        return (scaled >> np.uint64(32)).astype(np.intp)
