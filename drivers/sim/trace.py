"""What a motor has lived through, sample by sample, for a simulated one to live through again.

A trace is a file of rows (dtype TRACE) in the order of their time, mapped into memory, so that it may be of any length.
Each row holds until the next. The playhead says which time it is there: one for all motors, whatever processes host
them, in a small file that these share.
"""

from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from drivers.clock import monotonic_ns

TRACE = np.dtype(
    [
        ("at_ns", "<i8"),
        ("position_rad", "<f8"),
        ("velocity_rad_s", "<f4"),
        ("temperature_c", "<f4"),
        ("voltage_v", "<f4"),
        ("current_a", "<f4"),
        ("torque_nm", "<f4"),
    ]
)
"""One row; NaN where the motor did not tell."""

_PLAYHEAD = np.dtype([("first_ns", "<i8"), ("speed", "<f8"), ("origin_ns", "<i8"), ("stands_ns", "<i8")])
_RUNS = -1


class Playhead:
    """Where in a recording everybody is. It stands at the beginning until ``toggle`` is called.

    Whether it stands is written last and read first, so that who reads meanwhile finds the state before or after.
    """

    def __init__(self, path: Path) -> None:
        """Share that of somebody else. Raises OSError if there is none."""
        self._state: NDArray[Any] = np.asarray(np.memmap(path, _PLAYHEAD, "r+", shape=(1,)))

    @classmethod
    def make(cls, path: Path, first_ns: int, speed: float) -> Self:
        """A new one in a file of its own, at ``first_ns``; ``speed``: recorded seconds in a second."""
        np.array([(first_ns, speed, 0, first_ns)], _PLAYHEAD).tofile(path)
        return cls(path)

    @property
    def stands(self) -> bool:
        """Whether time stands still."""
        return int(self._state["stands_ns"][0]) != _RUNS

    def now_ns(self) -> int:
        """The recorded time that is the present."""
        if (stands_ns := int(self._state["stands_ns"][0])) != _RUNS:
            return stands_ns
        first_ns, speed, origin_ns, _ = self._state[0].item()
        return int(first_ns) + int((monotonic_ns() - origin_ns) * speed)

    def toggle(self) -> None:
        """Stand still, or go on. For one process alone."""
        now_ns, state = self.now_ns(), self._state
        if self.stands:
            state["origin_ns"] = monotonic_ns() - round((now_ns - int(state["first_ns"][0])) / float(state["speed"][0]))
            state["stands_ns"] = _RUNS
        else:
            state["stands_ns"] = now_ns


class Trace:
    """The rows of one motor, of which one is the present."""

    def __init__(self, rows: NDArray[Any], now_ns: Callable[[], int]) -> None:
        """``rows``: dtype TRACE, one at least."""
        self._rows = rows
        self._now_ns = now_ns

    @classmethod
    def load(cls, path: Path, playhead: Playhead) -> Self:
        """The rows in a file. Raises OSError, and ValueError if it holds none."""
        return cls(np.asarray(np.memmap(path, TRACE, "r")), playhead.now_ns)

    def now(self) -> Any:
        """The newest row that is not in the future; the first before it begins."""
        return self._rows[max(0, bisect_right(self._rows["at_ns"], self._now_ns()) - 1)]
