"""Child processes: one worker a bus, one for the simulated motors; started, listened to, replaced when they die.

A child that dies is started again with growing pauses. A worker with an open bus that says nothing for ``SILENT_NS``
is hung in some library: it is killed, its motors are told to be offline, and another is started.
"""

import asyncio
import contextlib
import logging
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from drivers.clock import MS, SECOND, monotonic_ns
from drivers.cycle import ALL, Ticket
from drivers.motor import Kind
from drivers.notices import AnyNotice, BusDown, BusUp
from gateway import link
from gateway.link import GatewayEnd

log = logging.getLogger(__name__)

RESTART_FIRST_S, RESTART_MOST_S = 0.2, 5.0
STABLE_NS = 10 * SECOND
SILENT_NS = 2500 * MS  # a worker tells its counts every second
SILENT_OPENING_NS = 15 * SECOND  # some adapters take seconds to open
STOP_S = 1.0


class Ear(Protocol):
    """Who hears a worker; called on the event loop's thread."""

    def heard_samples(self, bus: str, samples: NDArray[Any]) -> None:
        """Samples of one cycle (dtype SAMPLE)."""

    def heard_notice(self, bus: str, notice: AnyNotice) -> None:
        """Anything else."""

    def worker_started(self, bus: str, starts: int) -> None:
        """A process was started for this bus, for the ``starts``-th time."""

    def worker_gone(self, bus: str, reason: str) -> None:
        """The process of this bus died, or was killed for saying nothing."""


class Child:
    """One process with a link; ``plan`` is pickled to it as the first datagram."""

    def __init__(self, module: str, plan: object) -> None:
        ours, theirs = link.pair()
        try:
            fd = theirs.fileno()
            self._process = subprocess.Popen([sys.executable, "-m", module, str(fd)], pass_fds=[fd])
        finally:
            theirs.close()
        ours.send(pickle.dumps(plan))
        self.socket = ours
        self.end = GatewayEnd(ours)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    async def ended(self, timeout_s: float) -> int:
        """Close the link and wait for the process to end by itself; kill it if it does not."""
        self.end.close()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(None, self._process.wait, timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return await loop.run_in_executor(None, self._process.wait)


class Worker:
    """Keeps a worker process for one bus, from ``run`` until that is cancelled."""

    def __init__(self, bus: str, plan: object, ear: Ear) -> None:
        self.bus = bus
        self._plan = plan
        self._ear = ear
        self._child: Child | None = None
        self._heard_ns = 0
        self._silent_ns = SILENT_OPENING_NS
        self._gone: asyncio.Event = asyncio.Event()
        self._latched: dict[int, Ticket] = {}  # emergency stops that were not reset, by motor

    def send(self, ticket: Ticket) -> bool:
        """Hand on an order; False if there is no worker that takes it.

        An emergency stop is kept until it is reset, and told to every new process first. A process that does not take
        one, or its reset, hangs: it is killed.
        """
        latches = ticket.order.kind in (Kind.ESTOP, Kind.RESET_ESTOP)
        if latches:
            self._latch(ticket)
        if self._child is None:
            return False
        taken = self._child.end.send(ticket)
        if latches and not taken:
            self._child.kill()
        return taken

    def _latch(self, ticket: Ticket) -> None:
        if ticket.order.kind is Kind.ESTOP:
            self._latched[ticket.motor] = ticket
        elif ticket.motor == ALL:
            self._latched.clear()
        else:
            self._latched.pop(ticket.motor, None)

    async def run(self) -> None:
        """Start the process, and start it again whenever it is gone."""
        starts = 0
        pause_s = RESTART_FIRST_S
        while True:
            began = monotonic_ns()
            starts += 1
            self._ear.worker_started(self.bus, starts)
            reason = await self._live()
            self._ear.worker_gone(self.bus, reason)
            if monotonic_ns() - began > STABLE_NS:
                pause_s = RESTART_FIRST_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RESTART_MOST_S)

    async def _live(self) -> str:
        """One life of the process; why it ended."""
        loop = asyncio.get_running_loop()
        self._gone.clear()
        child = Child("gateway.worker", self._plan)
        for ticket in self._latched.values():
            child.end.send(ticket)
        self._child = child
        self._heard_ns = monotonic_ns()
        self._silent_ns = SILENT_OPENING_NS
        hung = False
        loop.add_reader(child.socket, self._read)
        try:
            while not self._gone.is_set():
                try:
                    await asyncio.wait_for(self._gone.wait(), SILENT_NS / SECOND / 4)
                except TimeoutError:
                    if monotonic_ns() - self._heard_ns > self._silent_ns:
                        hung = True
                        child.kill()
                        break
        finally:
            loop.remove_reader(child.socket)
            self._child = None
            status = await asyncio.shield(child.ended(STOP_S))
        if hung:
            return f"worker {child.pid} said nothing for {self._silent_ns / SECOND:g} s and was killed"
        return f"worker {child.pid} ended with status {status}"

    def _read(self) -> None:
        """Take what the link holds, up to a bound, so that one busy bus leaves the loop to others."""
        assert self._child is not None  # noqa: S101  the reader is removed before the child is let go
        self._heard_ns = monotonic_ns()
        try:
            for _ in range(64):
                message = self._child.end.receive()
                if message is None:
                    self._gone.set()
                    asyncio.get_running_loop().remove_reader(self._child.socket)
                    return
                if isinstance(message, np.ndarray):
                    self._ear.heard_samples(self.bus, message)
                else:
                    if isinstance(message, BusUp | BusDown):
                        self._silent_ns = SILENT_NS if isinstance(message, BusUp) else SILENT_OPENING_NS
                    self._ear.heard_notice(self.bus, message)
        except BlockingIOError:
            return


async def keep_running(module: str, plan: object, told: Callable[[str], None]) -> None:
    """Keep a child that only has to be there; ``told`` hears of each end."""
    pause_s = RESTART_FIRST_S
    while True:
        child = Child(module, plan)
        try:
            await _closed(child.socket)
        finally:
            status = await asyncio.shield(child.ended(STOP_S))
        told(f"process {child.pid} ({module}) ended with status {status}")
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, RESTART_MOST_S)


async def _closed(end: socket.socket) -> None:
    """Return when the other end is closed."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionError):  # it died before it had read everything
        while await loop.sock_recv(end, 1):
            pass
