"""Playing a file of raw traffic onto a virtual bus, at its own pace: the times between frames are kept.

Deadlines are absolute (``pace``). A bus that does not take a frame in time loses it, as a wire does to whoever
does not listen; as fast as can be, it is waited for. Blocking: meant for a thread of its own.
"""

import threading
from collections.abc import Callable, Iterator
from itertools import chain, islice

from drivers.clock import MS, SECOND, after, monotonic_ns
from drivers.traffic import Mark, Traffic
from gateway.recordings.bus_file import BusFile, fault
from gateway.recordings.pace import Pace
from gateway.recordings.virtual_bus import VirtualBus

_LOOK_NS = 20 * MS  # how soon a pause, the end, or somebody on the bus is noticed
_PATIENCE_NS = SECOND  # with somebody who reads slowly, as fast as can be

Moment = Callable[[int], int]
"""Epoch nanoseconds, from those of the file's first unit."""


class Player:
    """Plays ``file`` onto ``bus``, from ``start`` to before ``end``.

    ``way``: only what the recorder's side sent (Mark.SENT), or only what it heard (0); None: all.
    """

    def __init__(
        self,
        file: BusFile,
        bus: VirtualBus,
        pace: Pace,
        *,
        start: Moment | None = None,
        end: Moment | None = None,
        way: int | None = None,
    ) -> None:
        self._file = file
        self._bus = bus
        self._pace = pace
        self._start = start
        self._end = end
        self._way = way
        self._stopping = threading.Event()
        self._patience_ns = 0 if pace.paced else _PATIENCE_NS
        self.waits = True
        """Whether nobody has been there yet."""
        self.played = 0
        self.lost = 0
        """Units that the bus had no room for."""
        self.left_out = 0
        """Units that this bus, or any wire, cannot carry."""
        self.first_left_out = ""
        self.at_ns = 0
        """The recorded time that the replay has come to."""

    def stop(self) -> None:
        """Let ``run`` return soon; for another thread."""
        self._stopping.set()

    def run(self) -> None:
        """Wait until somebody is there, then play. Raises OSError or BusFileError."""
        units = self._chosen()
        first = list(islice(units, 1))  # a file without any is told before anybody is there
        while not self._bus.is_ready() and not self._stopping.is_set():
            self._bus.serve(after(monotonic_ns(), _LOOK_NS))
        self.waits = False
        moved_ns = 0
        for unit in chain(first, units):
            if self.at_ns and unit.at_ns < self.at_ns - SECOND:  # files put together: the next begins here
                moved_ns += self.at_ns - unit.at_ns
            self.at_ns = unit.at_ns
            if not self._wait(unit.at_ns + moved_ns):
                return
            self._put(unit)
        self._bus.finish()

    def _chosen(self) -> Iterator[Traffic]:
        first_ns = None
        for unit in self._file:
            if first_ns is None:
                first_ns = unit.at_ns
            if self._end and unit.at_ns >= self._end(first_ns):
                return
            if self._start and unit.at_ns < self._start(first_ns):
                continue
            if self._way is not None and unit.marks & Mark.SENT != self._way:
                continue
            if why := self._objection(unit):
                self.left_out += 1
                self.first_left_out = self.first_left_out or f"{unit.can_id:X}: {why}"
            else:
                yield unit

    def _objection(self, unit: Traffic) -> str:
        """Why the unit cannot be on the bus, if so."""
        if self._file.medium == "serial":
            return ""
        return fault(unit) or ("" if self._bus.carries(unit) else "this bus has classic data frames only")

    def _wait(self, at_ns: int) -> bool:
        """Serve the bus until it is time; False if there is to be an end."""
        while not self._stopping.is_set():
            due, look = self._pace.due(at_ns), after(monotonic_ns(), _LOOK_NS)
            self._bus.serve(look if self._pace.paused else min(due, look))
            if due <= look and not self._pace.paused:
                return True
        return False

    def _put(self, unit: Traffic) -> None:
        until = after(monotonic_ns(), self._patience_ns)
        while not self._bus.put(unit):
            if monotonic_ns() >= until:
                self.lost += 1
                return
            self._bus.serve(after(monotonic_ns(), MS))
        self.played += 1
