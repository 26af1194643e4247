"""Where others reach simulated motors: pseudo-terminals (serial bytes or slcan) and the interfaces of python-can.

Each host is one thread that alone drives its ``SimulatedBus``: units in, replies out when they are due, the physics
kept up to date in between. Everything is bounded: a client that does not read loses replies, as on a wire.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from threading import Event, Thread
from types import MappingProxyType, TracebackType
from typing import Any, Generic, Self

import can

from drivers.clock import MS, SECOND, MonotonicNs, after, left_s, monotonic_ns
from drivers.family import CanFrame, W
from drivers.sim.bus import CanError, SimulatedBus
from drivers.sim.slcan import SlcanAdapter
from drivers.sim.terminal import Terminal

_TICK_NS = 20 * MS
_MOST_WAITING = 10_000  # replies that are not due yet; more than this only a flood with a long delay makes
_CHUNK = 4096
_OVERSLEEP_NS = 60_000  # what a sleep may take too long: on a wire whose time counts, the rest is spent awake
_MOST_ECHOES = 1000  # own frames that are still to come back
_CRC_SEQUENCE = 0x08  # place of a protocol error in byte 3 of an error frame (linux/can/error.h)


def _nothing() -> None:
    """No housekeeping."""


class Host(ABC, Generic[W]):
    """A thread that serves one simulated bus, from ``start`` to ``stop`` or as a context manager.

    ``housekeeping`` is called in the same thread about every 20 ms, for what else concerns the motors (their faults).
    """

    def __init__(self, bus: SimulatedBus[W], housekeeping: Callable[[], None] = _nothing) -> None:
        self._bus: SimulatedBus[W] = bus
        self._housekeeping = housekeeping
        self._awake_ns = _OVERSLEEP_NS if bus.timed else 0
        self._waiting: list[tuple[MonotonicNs, int, W]] = []
        self._number = count()
        self._stopping = Event()
        self._thread: Thread | None = None

    def start(self) -> None:
        """Be reachable from now on. Raises OSError if that cannot be."""
        if self._thread is not None:
            raise RuntimeError("the host runs already")
        self._open()
        self._stopping.clear()
        self._thread = Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Be gone; may be called twice."""
        if self._thread is None:
            return
        self._stopping.set()
        self._thread.join()
        self._thread = None
        self._waiting.clear()
        self._close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        tick = monotonic_ns()
        while not self._stopping.is_set():
            for unit in self._receive(left_s(self._next_ns(tick))):
                self._queue(self._bus.respond(unit, monotonic_ns()))
            now = self._wait_awake()
            if now >= self._next_ns(tick):
                self._queue(self._bus.advance(now))
            while self._waiting and self._waiting[0][0] <= now:
                self._send(heappop(self._waiting)[2])
            while self._bus.errors:
                self._report(self._bus.errors.popleft())
            if now >= tick:
                self._housekeeping()
                tick = after(now, _TICK_NS)

    def _next_ns(self, tick: MonotonicNs) -> MonotonicNs:
        """When there is something to do, whoever talks until then."""
        times = [tick]
        if self._waiting:
            times.append(after(self._waiting[0][0], -self._awake_ns))
        if (wanted := self._bus.next_ns) is not None:
            times.append(wanted)
        return min(times)

    def _wait_awake(self) -> MonotonicNs:
        """Until the next unit arrives, if that is very soon; the time then."""
        now = monotonic_ns()
        if self._waiting and (due := self._waiting[0][0]) - now <= self._awake_ns:
            while now < due:
                now = monotonic_ns()
        return now

    def _queue(self, arriving: Iterable[tuple[MonotonicNs, W]]) -> None:
        for due, unit in arriving:
            if len(self._waiting) < _MOST_WAITING:
                heappush(self._waiting, (due, next(self._number), unit))

    def _report(self, error: CanError) -> None:
        """Tell the client what its CAN controller found, where the interface can."""

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...

    @abstractmethod
    def _receive(self, timeout_s: float) -> Iterable[W]:
        """What arrives within the time, as soon as anything does."""

    @abstractmethod
    def _send(self, unit: W) -> None:
        """Send, or lose; never wait."""


class _PtyHost(Host[W]):
    """Motors behind a pseudo-terminal, and under ``link`` if given."""

    _pty: Terminal

    def __init__(
        self, bus: SimulatedBus[W], link: Path | None = None, housekeeping: Callable[[], None] = _nothing
    ) -> None:
        super().__init__(bus, housekeeping)  # type: ignore[arg-type]  # mypy forgets which W it looks at in super()
        self._link = link

    @property
    def port(self) -> str:
        """The path that a client opens, while the host runs."""
        return self._pty.name

    def _open(self) -> None:
        self._pty = Terminal(self._link)

    def _close(self) -> None:
        self._pty.close()


class PtySerialHost(_PtyHost[bytes]):
    """Serial motors; the baud rate makes no difference."""

    def _receive(self, timeout_s: float) -> Iterable[bytes]:
        data = self._pty.read(timeout_s)
        return (data,) if data else ()

    def _send(self, unit: bytes) -> None:
        self._pty.write(unit)


class SlcanHost(_PtyHost[CanFrame]):
    """CAN motors behind an adapter that speaks slcan."""

    _adapter: SlcanAdapter

    def _open(self) -> None:
        self._adapter = SlcanAdapter()
        super()._open()

    def _receive(self, timeout_s: float) -> Iterable[CanFrame]:
        data = self._pty.read(timeout_s)
        self._adapter.bus_off = self._bus.faults.bus_off
        for answer, frame in self._adapter.feed(data):
            self._pty.write(answer)
            if frame is not None:
                yield frame

    def _send(self, unit: CanFrame) -> None:
        if data := self._adapter.encode_received(unit, monotonic_ns()):
            self._pty.write(data)


class CanHost(Host[CanFrame]):
    """CAN motors on any interface of python-can: ``virtual`` reaches as far as this process, others further."""

    def __init__(
        self,
        bus: SimulatedBus[CanFrame],
        channel: str,
        housekeeping: Callable[[], None] = _nothing,
        *,
        interface: str = "virtual",
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__(bus, housekeeping)
        self._settings = {**options, "interface": interface, "channel": channel, "receive_own_messages": False}
        self._own: deque[CanFrame] | None = None
        if interface == "udp_multicast":  # which gives back what one sends all the same
            self._own = deque(maxlen=_MOST_ECHOES)

    def _open(self) -> None:
        try:
            self._can = can.Bus(**self._settings)
        except (can.CanError, OSError, TypeError, ValueError) as error:
            raise OSError(f"cannot open {self._settings}: {error}") from error

    def _close(self) -> None:
        self._can.shutdown()

    def _receive(self, timeout_s: float) -> Iterable[CanFrame]:
        try:
            message = self._can.recv(timeout_s)
        except can.CanOperationError:  # the network is down, or somebody sends what is no frame
            self._stopping.wait(min(timeout_s, _TICK_NS / SECOND))
            return ()
        if message is None or message.is_remote_frame or message.is_error_frame or message.is_fd:
            return ()
        frame = CanFrame(message.arbitration_id, bytes(message.data), message.is_extended_id)
        if self._own and frame in self._own:
            while self._own.popleft() != frame:  # those before it were lost
                pass
            return ()
        return (frame,)

    def _send(self, unit: CanFrame) -> None:
        self._put(can.Message(arbitration_id=unit.can_id, data=unit.data, is_extended_id=unit.extended))
        if self._own is not None:
            self._own.append(unit)

    def _report(self, error: CanError) -> None:
        where = bytes((0, 0, 0, _CRC_SEQUENCE)) if error & CanError.PROTOCOL else b""
        data = where.ljust(8, b"\0")
        self._put(can.Message(arbitration_id=error, data=data, is_error_frame=True, is_extended_id=False))

    def _put(self, message: can.Message) -> None:
        with suppress(can.CanOperationError):  # nobody takes it, or too slowly: lost, as on a wire
            self._can.send(message)
