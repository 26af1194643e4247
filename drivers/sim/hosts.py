"""Where others reach simulated motors: pseudo-terminals (serial bytes or slcan) and python-can's virtual bus.

Each host is one thread that alone drives its ``SimulatedBus``: units in, replies out when they are due, the physics
kept up to date in between. Everything is bounded: a client that does not read loses replies, as on a wire.
"""

import os
import select
import tty
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Generic, Self

import can

from drivers.clock import MS, MonotonicNs, after, left_s, monotonic_ns
from drivers.family import CanFrame, W
from drivers.sim.bus import SimulatedBus
from drivers.sim.slcan import SlcanAdapter

_TICK_NS = 20 * MS
_MOST_WAITING = 10_000  # replies that are not due yet; more than this only a flood with a long delay makes
_CHUNK = 4096


def _nothing() -> None:
    """No housekeeping."""


class Host(ABC, Generic[W]):
    """A thread that serves one simulated bus, from ``start`` to ``stop`` or as a context manager.

    ``housekeeping`` is called in the same thread about every 20 ms, for what else concerns the motors (their faults).
    """

    def __init__(self, bus: SimulatedBus[W], housekeeping: Callable[[], None] = _nothing) -> None:
        self._bus: SimulatedBus[W] = bus
        self._housekeeping = housekeeping
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
            until = min(tick, self._waiting[0][0]) if self._waiting else tick
            for unit in self._receive(left_s(until)):
                self._queue(self._bus.respond(unit, monotonic_ns()))
            now = monotonic_ns()
            while self._waiting and self._waiting[0][0] <= now:
                self._send(heappop(self._waiting)[2])
            if now >= tick:
                self._queue(self._bus.advance(now))
                self._housekeeping()
                tick = after(now, _TICK_NS)

    def _queue(self, replies: Iterable[tuple[MonotonicNs, W]]) -> None:
        for due, reply in replies:
            if len(self._waiting) < _MOST_WAITING:
                heappush(self._waiting, (due, next(self._number), reply))

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


class _Pty:
    """A raw pseudo-terminal that stays while clients come and go, under a symbolic link if one is wanted."""

    def __init__(self, link: Path | None) -> None:
        # the client's end is held open here too: otherwise the terminal hangs up when a client closes it
        self._fd, self._held = os.openpty()
        tty.setraw(self._held)
        os.set_blocking(self._fd, False)
        self.name = os.ttyname(self._held)
        self._link = link
        self._rest = b""  # of a write that the terminal took in part
        if link is not None:
            try:
                _replace_link(link, self.name)
            except OSError:
                self.close()
                raise

    def close(self) -> None:
        """Remove the link, unless it is another host's by now, and hang up."""
        if self._link is not None:
            with suppress(OSError):
                if self._link.readlink() == Path(self.name):
                    self._link.unlink()
        os.close(self._fd)
        os.close(self._held)

    def read(self, timeout_s: float) -> bytes:
        """What clients wrote, as soon as there is any; nothing after ``timeout_s``."""
        readable, writable, _ = select.select([self._fd], [self._fd] if self._rest else [], [], timeout_s)
        if writable:
            rest, self._rest = self._rest, b""
            self.write(rest)
        with suppress(BlockingIOError):
            return os.read(self._fd, _CHUNK) if readable else b""
        return b""

    def write(self, unit: bytes) -> None:
        """Write all of a unit, or lose all of it: half a line would spoil the next one too."""
        if self._rest:
            return
        with suppress(BlockingIOError):
            self._rest = unit[os.write(self._fd, unit) :]


def _replace_link(link: Path, target: str) -> None:
    """Make ``link`` lead to ``target`` in one step, whatever link was there before."""
    if link.exists() and not link.is_symlink():
        raise FileExistsError(f"{link} exists and is no symbolic link")
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)


class _PtyHost(Host[W]):
    """Motors behind a pseudo-terminal, and under ``link`` if given."""

    _pty: _Pty

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
        self._pty = _Pty(self._link)

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
        for answer, frame in self._adapter.feed(self._pty.read(timeout_s)):
            self._pty.write(answer)
            if frame is not None:
                yield frame

    def _send(self, unit: CanFrame) -> None:
        if data := self._adapter.encode_received(unit, monotonic_ns()):
            self._pty.write(data)


class VirtualCanHost(Host[CanFrame]):
    """CAN motors on python-can's ``virtual`` interface, which reaches as far as this process."""

    def __init__(self, bus: SimulatedBus[CanFrame], channel: str, housekeeping: Callable[[], None] = _nothing) -> None:
        super().__init__(bus, housekeeping)
        self._channel = channel

    def _open(self) -> None:
        self._can = can.Bus(interface="virtual", channel=self._channel)

    def _close(self) -> None:
        self._can.shutdown()

    def _receive(self, timeout_s: float) -> Iterable[CanFrame]:
        message = self._can.recv(timeout_s)
        if message is None or message.is_remote_frame or message.is_error_frame or message.is_fd:
            return ()
        return (CanFrame(message.arbitration_id, bytes(message.data), message.is_extended_id),)

    def _send(self, unit: CanFrame) -> None:
        self._can.send(can.Message(arbitration_id=unit.can_id, data=unit.data, is_extended_id=unit.extended))
