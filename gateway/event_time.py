"""Event times: epoch nanoseconds made from monotonic ones, never running backwards.

The offset between the two clocks is taken at the start and checked at every reading. Where the wall clock drifts
(NTP slewing), the offset follows. Where it steps forward, event time steps with it. Where it steps back, event time
goes on at half speed until the wall clock has caught up: order and spacing survive, and in the end so does the date.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from drivers.clock import MS, EpochNs, epoch_ns, monotonic_ns

STEP_NS = 100 * MS
"""A change of the offset by more than this between two readings is a step, less is drift."""
READINGS = 4
"""A process may lose the CPU between the two clocks; then they are read again."""
NARROW_NS = MS


class EventTime:
    """Turns monotonic times of one process run into epoch times.

    ``not_before`` is the last event time of an earlier run. Readings of the two clocks may be given for tests.
    """

    def __init__(
        self,
        not_before: int = 0,
        monotonic: Callable[[], int] = monotonic_ns,
        wall: Callable[[], int] = epoch_ns,
    ) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._read_at, self._wall_offset, _ = self._read()
        self._offset = max(self._wall_offset, not_before - self._read_at)

    def check(self) -> int:
        """Read both clocks and adjust. Returns by how much the wall clock stepped since the last call, ns, or 0."""
        now, wall_offset, window = self._read()
        if window > STEP_NS // 4:  # says nothing of a step
            return 0
        change = wall_offset - self._wall_offset
        self._offset = max(wall_offset, int(self.of(np.array(now))) - now)  # where it stands, or further on
        self._read_at, self._wall_offset = now, wall_offset
        return change if abs(change) > STEP_NS else 0

    def _read(self) -> tuple[int, int, int]:
        """(monotonic time, offset of the wall clock, the time it took to read), of the quickest of some readings."""
        best: tuple[int, int] | None = None  # window, offset
        for _ in range(READINGS):
            before, wall, now = self._monotonic(), self._wall(), self._monotonic()
            window = now - before
            reading = (window, wall - before - window // 2)
            best = min(best or reading, reading)
            if window < NARROW_NS:
                break
        assert best is not None  # noqa: S101  there is one reading at least
        return now, best[1], best[0]

    def of(self, at_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Event times of monotonic times."""
        # ahead of the wall clock: at half speed since the last reading, until it has caught up
        ahead = self._offset - np.maximum(at_ns - self._read_at, 0) // 2
        times: NDArray[np.int64] = at_ns + np.maximum(self._wall_offset, ahead)
        return times

    def now(self) -> EpochNs:
        """The event time of this moment."""
        return EpochNs(int(self.of(np.array(self._monotonic()))))


@functools.cache
def boot_id() -> str:
    """Which start of the machine this is: its monotonic clock counts from there (Linux, random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def wall_age_ms(issued_at_ns: int, now_ns: int | None = None) -> float:
    """How long ago an epoch time of another program was, by the wall clock: ms, negative if it lies in the future."""
    return ((epoch_ns() if now_ns is None else now_ns) - issued_at_ns) / MS
