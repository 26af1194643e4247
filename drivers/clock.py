"""The one place of ``drivers`` that reads a clock.

Monotonic nanoseconds are for durations and deadlines; they never step. Epoch nanoseconds are what people and
other programs call "when"; ``gateway.event_time`` makes them from monotonic ones.
"""

import time
from typing import NewType

MonotonicNs = NewType("MonotonicNs", int)
EpochNs = NewType("EpochNs", int)

MS = 1_000_000
SECOND = 1_000_000_000


def monotonic_ns() -> MonotonicNs:
    """CLOCK_MONOTONIC, nanoseconds: the same clock for every process of this machine since its boot."""
    return MonotonicNs(time.monotonic_ns())


def epoch_ns() -> EpochNs:
    """CLOCK_REALTIME, nanoseconds since 1970 UTC; it may step."""
    return EpochNs(time.time_ns())


def after(start: int, duration_ns: int) -> MonotonicNs:
    """The deadline ``duration_ns`` after ``start``."""
    return MonotonicNs(start + duration_ns)


def left_s(deadline: int) -> float:
    """Seconds until ``deadline``; never negative."""
    return max(0, deadline - time.monotonic_ns()) / SECOND


def sleep_until(deadline: int) -> None:
    """Sleep until ``deadline``; return at once if it has passed."""
    if left := left_s(deadline):  # even sleep(0) costs a turn of the scheduler
        time.sleep(left)
