"""A bus without a kernel in between: straight to a ``SimulatedBus``, for tests and benchmarks of the cycle."""

import heapq
from collections.abc import Iterable, Sequence
from itertools import count

from drivers.bus import Bus, Received
from drivers.clock import MonotonicNs, monotonic_ns, sleep_until
from drivers.errors import BusError
from drivers.family import W
from drivers.sim.bus import SimulatedBus

_OVERSLEEP_NS = 100_000  # what a sleep may take too long: the rest of the wait for a reply is spent awake


class MemoryBus(Bus[W]):
    """Replies arrive when the simulated motors say so; ``unplug`` makes every further call fail."""

    def __init__(self, simulated: SimulatedBus[W]) -> None:
        super().__init__()
        self.simulated: SimulatedBus[W] = simulated
        self._arriving: list[tuple[MonotonicNs, int, W]] = []
        self._order = count()
        self._gone = False

    def send(self, units: Sequence[W], deadline: MonotonicNs) -> None:  # noqa: ARG002  memory takes all at once
        self._check()
        for unit in units:
            self._expect(self.simulated.respond(unit, monotonic_ns()))

    def receive(self, deadline: MonotonicNs) -> Received[W] | None:
        self._check()
        while True:
            now = monotonic_ns()
            wanted = self.simulated.next_ns
            if wanted is not None and wanted <= now:
                self._expect(self.simulated.advance(now))
                wanted = self.simulated.next_ns
            if self._arriving and self._arriving[0][0] <= now:
                return Received(heapq.heappop(self._arriving)[2], now)
            if now >= deadline:
                return None
            due = self._arriving[0][0] if self._arriving else deadline
            sleep_until(min(deadline, due - _OVERSLEEP_NS, deadline if wanted is None else wanted))

    def _expect(self, arriving: Iterable[tuple[MonotonicNs, W]]) -> None:
        for due, unit in arriving:
            heapq.heappush(self._arriving, (due, next(self._order), unit))

    def unplug(self) -> None:
        """From now on the adapter is gone."""
        self._gone = True

    def close(self) -> None:
        self._gone = True

    def _check(self) -> None:
        if self._gone:
            raise BusError("memory bus: unplugged")
