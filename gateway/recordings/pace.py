"""When what was recorded is due again: absolute deadlines, so that no error adds up.

    due = the moment that stands for the first time + (recorded time - first time) / speed

A pause moves the moment. While a replay is paused or waits, the event loop goes on.
"""

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator

from drivers.clock import MS, SECOND, MonotonicNs, monotonic_ns, sleep_until

_COARSE_NS = 2 * MS  # the event loop's timers are late by a millisecond: what is left is slept in a thread
_LOOK_S = 0.05  # how soon a pause is noticed
_SPACE = b" "


class Pace:
    """Tells when recorded times are due. The first one that is asked for is due at once."""

    def __init__(self, speed: float | None = 1.0) -> None:
        """``speed``: recorded seconds in a second; None: as fast as can be."""
        self._speed = speed
        self._first_ns: int | None = None
        self._began = MonotonicNs(0)
        self._paused: MonotonicNs | None = None

    @property
    def paced(self) -> bool:
        """Whether anything has to wait for its time."""
        return self._speed is not None

    @property
    def paused(self) -> bool:
        """Whether nothing is due until ``toggle`` is called again."""
        return self._paused is not None

    def toggle(self) -> None:
        """Pause, or go on."""
        now = monotonic_ns()
        if self._paused is None:
            self._paused = now
        else:
            self._began = MonotonicNs(self._began + now - self._paused)
            self._paused = None

    def due(self, at_ns: int) -> MonotonicNs:
        """When a recorded time is due, unless there is a pause before."""
        if self._first_ns is None:
            self._first_ns, self._began = at_ns, self._paused or monotonic_ns()
        return MonotonicNs(self._began + round((at_ns - self._first_ns) / self._speed)) if self._speed else self._began

    async def wait(self, at_ns: int) -> int:
        """Return when a recorded time is due; by how many nanoseconds that was late."""
        while True:
            left_ns = self.due(at_ns) - monotonic_ns()
            if self._paused is not None:
                await asyncio.sleep(_LOOK_S)
            elif left_ns <= 0:
                return -left_ns
            elif left_ns > _COARSE_NS:
                await asyncio.sleep(min((left_ns - _COARSE_NS) / SECOND, _LOOK_S))
            else:
                await asyncio.to_thread(sleep_until, self.due(at_ns))


@contextlib.contextmanager
def controlled(toggle: Callable[[], None]) -> Iterator[None]:
    """Meanwhile SIGUSR1, and where there is a terminal its space bar, call ``toggle``. Needs a running event loop."""
    loop = asyncio.get_running_loop()
    former = signal.signal(signal.SIGUSR1, lambda *_: loop.call_soon_threadsafe(toggle))
    try:
        with _space_bar(loop, toggle) if sys.stdin.isatty() else contextlib.nullcontext():
            yield
    finally:
        signal.signal(signal.SIGUSR1, former)


@contextlib.contextmanager
def _space_bar(loop: asyncio.AbstractEventLoop, toggle: Callable[[], None]) -> Iterator[None]:
    def pressed() -> None:
        if os.read(sys.stdin.fileno(), 64).count(_SPACE) % 2:
            toggle()

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)  # Ctrl-C still is a signal
    loop.add_reader(sys.stdin, pressed)
    try:
        yield
    finally:
        loop.remove_reader(sys.stdin)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
