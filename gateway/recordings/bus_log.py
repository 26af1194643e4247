"""Recording the raw traffic of one bus: tap (``gateway.tap``) -> order of the wire -> file (``bus_file``).

A frame is told when it is read from its socket, which may be after a later one was sent; so what comes is held for a
moment and sorted by its times. Those become event times as the samples' do (``gateway.event_time``), so that traffic
and telemetry of an arm lie on one clock.
"""

import threading
from collections.abc import Callable
from operator import itemgetter

import numpy as np

from drivers.clock import MS, SECOND, MonotonicNs, after, monotonic_ns
from drivers.traffic import Traffic
from gateway.event_time import EventTime
from gateway.recordings.bus_file import Writer
from gateway.tap import Listener

_LOOK_NS = 50 * MS
_HOLD_NS = 100 * MS  # longer than any cycle leaves a frame unread
_EVER = MonotonicNs(1 << 62)
_AT = itemgetter(0)


class BusRecorder:
    """Writes what a listener hears. ``written`` counts the units in the file; the listener, those that went past it."""

    def __init__(self, listener: Listener, writer: Writer) -> None:
        self._listener = listener
        self._writer = writer
        self._times = EventTime()
        self._held: list[Traffic] = []
        self._missed = 0
        self.written = 0

    def run(self, stop: threading.Event, every_second: Callable[[], None] = lambda: None) -> None:
        """Record until ``stop`` is set. Raises OSError when the disk takes no more: what was flushed can be read."""
        second = monotonic_ns()
        while not stop.is_set():
            self._take(self._listener.receive(after(monotonic_ns(), _LOOK_NS)))
            self._write(after(monotonic_ns(), -_HOLD_NS))
            if monotonic_ns() >= second:
                second = after(second, SECOND)
                self._times.check()
                self._writer.flush()
                every_second()
        while units := self._listener.receive(MonotonicNs(0)):
            self._take(units)
        self._write(_EVER)

    def _take(self, units: list[Traffic]) -> None:
        self._held += units
        if past := self._listener.missed - self._missed:
            self._missed += past
            self._writer.note(f"{past} units went past the recorder before this", self._of(units[:1])[0])

    def _write(self, until: MonotonicNs) -> None:
        """What was on the wire before ``until``, in its order."""
        self._held.sort(key=_AT)
        ready = next((place for place, unit in enumerate(self._held) if unit.at_ns >= until), len(self._held))
        units, self._held = self._held[:ready], self._held[ready:]
        for unit, at_ns in zip(units, self._of(units), strict=True):
            self._writer.write(unit._replace(at_ns=at_ns))
        self.written += len(units)

    def _of(self, units: list[Traffic]) -> list[int]:
        """Their event times."""
        at_ns: list[int] = self._times.of(np.array([unit.at_ns for unit in units], np.int64)).tolist()
        return at_ns
