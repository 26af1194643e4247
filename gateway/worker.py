"""A bus worker: the process that owns one bus and runs its cycle on absolute deadlines.

Started by the gateway as ``python -m gateway.worker FD``; its plan is the first datagram on the link. Blocking I/O,
no asyncio, no Kafka, no journal. It ends when the gateway's end of the link is closed, so a killed gateway leaves no
worker behind, nor a motor that runs at a velocity or torque; an order that waited too long in the link is refused by
its deadline (``drivers.cycle``).
"""

import contextlib
import gc
import pickle
import select
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from drivers import protocols
from drivers.bus import Bus, Trouble
from drivers.buses import BusSpec, open_bus
from drivers.clock import MS, SECOND, MonotonicNs, after, left_s, monotonic_ns
from drivers.cycle import Cycle, Timing
from drivers.errors import BusError, BusMisconfigured
from drivers.motor import Motor
from drivers.notices import BusDown, BusTrouble, BusUp, CycleStats
from gateway.link import WorkerEnd
from gateway.realtime import set_realtime
from gateway.simulator import SimulatedBusPlan, build_host
from gateway.tap import Tap

RETRY_FIRST_NS = 100 * MS
RETRY_MOST_NS = 2 * SECOND
LEAVE_NS = 200 * MS
TELL_FIRST_NS = 1 * SECOND
TELL_MOST_NS = 60 * SECOND
REALTIME_PRIORITY = 20


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a worker needs to know. ``simulation``: motors to host on a virtual CAN bus in this process.

    ``tap``: where a recorder of the bus's traffic is found, if there is one.
    """

    bus: BusSpec
    motors: tuple[Motor, ...]
    timing: Timing
    realtime: bool
    simulation: SimulatedBusPlan | None = None
    tap: Path | None = None


class GatewayGone(Exception):
    """The gateway closed the link; there is nothing left to work for."""


class Troubles:
    """What an open bus counts, told at once and then ever less often: an adapter that echoes does so for ever."""

    def __init__(self, bus: Bus[Any]) -> None:
        self._bus = bus
        self._told: dict[Trouble, tuple[int, int, int]] = {}  # what: (count, when, how long until the next time)

    def news(self, now: MonotonicNs) -> list[BusTrouble]:
        """What is to be told now."""
        news = []
        for what, count in self._bus.troubles.items():
            told, when, pause_ns = self._told.get(what, (0, 0, 0))
            if count > told and now - when >= pause_ns:
                self._told[what] = (count, now, min(max(2 * pause_ns, TELL_FIRST_NS), TELL_MOST_NS))
                news.append(BusTrouble(what, count, self._bus.trouble_details[what]))
        return news


class Worker:
    """One bus, its cycle, and the link to the gateway."""

    def __init__(self, plan: Plan, link: WorkerEnd) -> None:
        self._plan = plan
        self._link = link
        self._cycle: Cycle[Any] = Cycle(families(plan.motors), plan.timing)
        self._tap = Tap(plan.tap)
        self._late_ns: list[int] = []
        self._cycles = 0
        self._skipped = 0
        self._down = False

    def run(self) -> None:
        """Keep the bus open and poll it, until the gateway goes."""
        retry_ns = RETRY_FIRST_NS
        with contextlib.suppress(GatewayGone):
            while True:
                opened_at = monotonic_ns()
                try:
                    self._run_bus()
                except BusError as error:
                    self._tell_down(str(error), retriable=True)
                    if monotonic_ns() - opened_at > RETRY_MOST_NS:
                        retry_ns = RETRY_FIRST_NS
                except BusMisconfigured as error:
                    self._tell_down(str(error), retriable=False)
                    retry_ns = RETRY_MOST_NS
                self._refuse_orders(after(monotonic_ns(), retry_ns))
                retry_ns = min(2 * retry_ns, RETRY_MOST_NS)

    def _run_bus(self) -> None:
        bus = open_bus(self._plan.bus)
        try:
            self._cycle.attach(bus)
            self._tap.attach(bus)
            self._down = False
            self._link.send_notice(BusUp())
            troubles = Troubles(bus)
            try:
                self._run_cycles(troubles)
            except GatewayGone:
                self._cycle.leave(after(monotonic_ns(), LEAVE_NS))
                raise
            finally:
                self._tell(troubles)  # what led to the end
                self._tap.flush()
        finally:
            bus.close()

    def _run_cycles(self, troubles: Troubles) -> None:
        period_ns = self._plan.timing.period_ns
        start = monotonic_ns()
        stats_at = after(start, SECOND)
        while True:
            self._late_ns.append(monotonic_ns() - start)
            self._cycles += 1
            self._link.send_samples(self._cycle.poll(start))
            self._send_notices()
            self._tap.flush()
            self._work_until(after(start, period_ns))
            self._tell(troubles)
            if start >= stats_at:
                self._send_stats()
                self._tap.look()
                stats_at = after(stats_at, SECOND)
            start = after(start, period_ns)
            if (behind := monotonic_ns() - start) > period_ns:  # never a burst to catch up
                self._skipped += behind // period_ns
                start = after(start, behind // period_ns * period_ns)

    def _work_until(self, next_start: MonotonicNs) -> None:
        """Use the slack for orders and background; sleep on the link, so that an order is taken up at once."""
        until = after(next_start, -self._plan.timing.period_ns // 20)
        self._take_orders()
        self._cycle.work(until, self._take_orders)
        self._send_notices()
        while select.select([self._link], [], [], left_s(next_start))[0]:
            self._take_orders()
            self._cycle.work(until, self._take_orders)
            self._send_notices()
            if monotonic_ns() >= next_start:
                return

    def _take_orders(self) -> None:
        try:
            while True:
                ticket = self._link.receive()
                if ticket is None:
                    raise GatewayGone
                self._cycle.submit(ticket)
        except BlockingIOError:
            return

    def _refuse_orders(self, until: MonotonicNs) -> None:
        """While there is no bus: every order fails at once."""
        self._send_stats()  # a sign of life: the gateway replaces a worker that says nothing
        while True:
            self._take_orders()
            self._cycle.give_up("the bus is down")
            self._send_notices()
            if not left_s(until):
                return
            select.select([self._link], [], [], left_s(until))

    def _tell_down(self, reason: str, *, retriable: bool) -> None:
        self._cycle.give_up(reason)
        self._send_notices()
        if not self._down:
            self._down = True
            self._link.send_notice(BusDown(reason, retriable))

    def _tell(self, troubles: Troubles) -> None:
        for notice in troubles.news(monotonic_ns()):
            self._link.send_notice(notice)

    def _send_notices(self) -> None:
        for notice in self._cycle.take_notices():
            self._link.send_notice(notice)

    def _send_stats(self) -> None:
        late_us = sorted(late / 1000 for late in self._late_ns) or [0.0]
        self._late_ns.clear()
        stats = CycleStats(
            self._cycles,
            self._skipped,
            self._cycle.strays,
            self._cycle.garbage,
            late_us[len(late_us) // 2],
            late_us[-1],
            self._cycle.counts(),
        )
        self._link.send_notice(stats)


def families(motors: Sequence[Motor]) -> list[Any]:
    """One family object for each protocol among ``motors``."""
    ordered = sorted(motors, key=lambda motor: motor.family)
    return [protocols.load(name)(tuple(group)) for name, group in groupby(ordered, lambda motor: motor.family)]


def main() -> None:
    """Entry of the process: the link's descriptor is the only argument."""
    # Ctrl-C reaches the whole group of processes; the gateway decides when a worker stops
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end = socket.socket(fileno=int(sys.argv[1]))
    end.setblocking(True)
    plan: Plan = pickle.loads(end.recv(1 << 20))  # noqa: S301  written by our parent on a private socket
    end.setblocking(False)
    if plan.realtime:
        set_realtime(REALTIME_PRIORITY)
    with contextlib.ExitStack() as stack:
        if plan.simulation is not None:
            stack.enter_context(build_host(plan.simulation))
        gc.freeze()
        Worker(plan, WorkerEnd(end)).run()


if __name__ == "__main__":
    main()
