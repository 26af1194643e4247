"""A bus without a kernel in between: straight to a ``SimulatedBus``, for tests and benchmarks of the cycle."""

import heapq
from collections.abc import Sequence
from itertools import count

from drivers.bus import Bus, Received
from drivers.clock import MonotonicNs, monotonic_ns, sleep_until
from drivers.errors import BusError
from drivers.family import W
from drivers.sim.bus import SimulatedBus


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
            for due, reply in self.simulated.respond(unit, monotonic_ns()):
                heapq.heappush(self._arriving, (due, next(self._order), reply))

    def receive(self, deadline: MonotonicNs) -> Received[W] | None:
        self._check()
        due = self._arriving[0][0] if self._arriving else None
        if due is None or due > max(deadline, monotonic_ns()):
            sleep_until(deadline)
            return None
        sleep_until(due)
        return Received(heapq.heappop(self._arriving)[2], monotonic_ns())

    def unplug(self) -> None:
        """From now on the adapter is gone."""
        self._gone = True

    def close(self) -> None:
        self._gone = True

    def _check(self) -> None:
        if self._gone:
            raise BusError("memory bus: unplugged")
