"""A long course of values in little memory: the lowest and highest of each in bins of time, so that no spike is lost.

Bins are a power of two of nanoseconds wide, and twice as wide whenever there would be too many of them.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Envelope:
    """Of ``quantities`` values that are measured together; ``most`` bins at the most, half of that at the least."""

    def __init__(self, quantities: int, most: int = 4096) -> None:
        self._most = most
        self._shift = 0
        self._bins: NDArray[np.int64] = np.empty(0, np.int64)  # ascending; only those with values
        self.low: Floats = np.empty((0, quantities))
        self.high: Floats = np.empty((0, quantities))

    def add(self, at_ns: NDArray[np.int64], values: Floats) -> None:
        """Take in ``values``, shape (times, quantities). NaN is no value."""
        bins = np.append(self._bins, at_ns >> self._shift)
        low, high = np.append(self.low, values, axis=0), np.append(self.high, values, axis=0)
        self._bins, self.low, self.high = _reduce(bins, low, high)
        while len(self._bins) > self._most:
            self._shift += 1
            self._bins, self.low, self.high = _reduce(self._bins >> 1, self.low, self.high)

    @property
    def width_ns(self) -> int:
        """Of a bin."""
        return 1 << self._shift

    @property
    def at_ns(self) -> NDArray[np.int64]:
        """The middle of each bin that has values."""
        return (self._bins << self._shift) + self.width_ns // 2

    def columns(self, begin_ns: int, end_ns: int, count: int) -> tuple[Floats, Floats]:
        """Lowest and highest in ``count`` columns of equal width, shape (columns, quantities); NaN where is nothing."""
        column, low, high = _reduce(column_of(self.at_ns, begin_ns, end_ns, count), self.low, self.high)
        lows, highs = np.full((2, count, low.shape[1]), np.nan)
        lows[column], highs[column] = low, high
        return lows, highs


def column_of(at_ns: NDArray[np.int64], begin_ns: int, end_ns: int, count: int) -> NDArray[np.int64]:
    """In which of ``count`` columns of equal width each time lies."""
    share = (at_ns - begin_ns) / (end_ns - begin_ns)
    return (share * count).astype(np.int64).clip(0, count - 1)


def _reduce(bins: NDArray[np.int64], low: Floats, high: Floats) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Each bin once."""
    if (np.diff(bins) < 0).any():  # a stream whose clock was behind the one before
        order = np.argsort(bins, kind="stable")
        bins, low, high = bins[order], low[order], high[order]
    first = np.flatnonzero(np.diff(bins, prepend=bins[:1] - 1))
    return bins[first], np.fmin.reduceat(low, first), np.fmax.reduceat(high, first)
