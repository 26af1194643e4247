"""Buses that lead to no motor: all that a replay can open. What is not in this file, it cannot.

A pseudo-terminal made here (bytes, or the slcan of a CAN adapter), python-can's ``virtual`` and ``udp_multicast``, and
a SocketCAN link that the kernel says is a ``vcan``. Each by its own class: no name of an interface reaches python-can.
"""

from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import can
from can.interfaces.socketcan import SocketcanBus
from can.interfaces.udp_multicast import UdpMulticastBus
from can.interfaces.virtual import VirtualBus as CanVirtualBus

from drivers.clock import MS, SECOND, after, left_s, monotonic_ns, sleep_until
from drivers.family import CanFrame, Medium
from drivers.sim.slcan import SlcanAdapter
from drivers.sim.terminal import Terminal
from drivers.traffic import Mark, Traffic
from gateway.recordings.bus_file import to_message
from gateway.recordings.vcan import link_kind

CHOICES: Final = "virtual:CHANNEL, udp_multicast:GROUP, or socketcan:LINK where the link is a vcan"

_LOOK_NS: Final = 20 * MS
_FINISH_NS: Final = 2 * SECOND


class NotVirtual(Exception):
    """What was named is no bus of this kind; the message says what would be."""


class VirtualBus(ABC):
    """One open bus; a context manager. ``where``: what others open to be on it."""

    where: str

    def is_ready(self) -> bool:
        """Whether somebody is there, as far as that can be known."""
        return True

    def carries(self, unit: Traffic) -> bool:  # noqa: ARG002  for those that override it
        """Whether such a unit can be on this bus."""
        return True

    @abstractmethod
    def put(self, unit: Traffic) -> bool:
        """Send it now; False if there is no room for it, and it is lost."""

    @abstractmethod
    def serve(self, deadline: int) -> None:
        """Take what others send, and drop it, until ``deadline``; once if that has passed."""

    def finish(self) -> None:
        """Return when everything has been read, or will not be."""
        return

    @abstractmethod
    def close(self) -> None:
        """Be gone."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _TerminalBus(VirtualBus):
    """A pseudo-terminal, under ``link`` if given."""

    def __init__(self, link: Path | None) -> None:
        self._terminal = Terminal(link)
        self.where = str(link or self._terminal.name)

    def finish(self) -> None:
        until = after(monotonic_ns(), _FINISH_NS)
        while self._terminal.holds_unread() and monotonic_ns() < until:
            self.serve(after(monotonic_ns(), _LOOK_NS))

    def close(self) -> None:
        self._terminal.close()


class SerialTerminal(_TerminalBus):
    """Bytes."""

    def __init__(self, link: Path | None) -> None:
        super().__init__(link)
        self._terminal.let_go()

    def is_ready(self) -> bool:
        return self._terminal.is_taken()

    def put(self, unit: Traffic) -> bool:
        return self._terminal.write(unit.data)

    def serve(self, deadline: int) -> None:
        if not self.is_ready():
            sleep_until(deadline)
            return
        self._terminal.read(0)
        while monotonic_ns() < deadline:
            self._terminal.read(left_s(deadline))


class SlcanTerminal(_TerminalBus):
    """CAN frames behind an adapter that speaks slcan, ready when its channel is opened. It has classic data frames."""

    def __init__(self, link: Path | None) -> None:
        super().__init__(link)
        self._adapter = SlcanAdapter()

    def is_ready(self) -> bool:
        return self._adapter.is_open

    def carries(self, unit: Traffic) -> bool:
        return not unit.marks & (Mark.REMOTE | Mark.ERROR | Mark.FD)

    def put(self, unit: Traffic) -> bool:
        frame = CanFrame(unit.can_id, unit.data, bool(unit.marks & Mark.EXTENDED))
        line = self._adapter.encode_received(frame, monotonic_ns())
        return not line or self._terminal.write(line)

    def serve(self, deadline: int) -> None:
        self._answer(0)
        while monotonic_ns() < deadline:
            self._answer(left_s(deadline))

    def _answer(self, timeout_s: float) -> None:
        for answer, _ in self._adapter.feed(self._terminal.read(timeout_s)):
            self._terminal.write(answer)


class CanChannel(VirtualBus):
    """A channel of python-can that others are on too; who they are cannot be known."""

    def __init__(self, bus: can.BusABC, where: str) -> None:
        self._bus = bus
        self.where = where

    def put(self, unit: Traffic) -> bool:
        try:
            self._bus.send(to_message(unit), timeout=0)
        except (can.CanOperationError, OSError):
            return False
        return True

    def serve(self, deadline: int) -> None:
        with suppress(can.CanOperationError):
            while self._bus.recv(0):
                pass
        sleep_until(deadline)

    def close(self) -> None:
        self._bus.shutdown()


def open_virtual(medium: Medium, where: str | None = None, link: Path | None = None) -> VirtualBus:
    """The bus ``where`` names, as INTERFACE:CHANNEL; a pseudo-terminal without.

    Raises NotVirtual for whatever could lead to a motor, OSError if the bus cannot be opened.
    """
    if where is None:
        return SerialTerminal(link) if medium == "serial" else SlcanTerminal(link)
    interface, _, channel = where.partition(":")
    if medium == "serial" or interface not in ("virtual", "udp_multicast", "socketcan") or not channel:
        of = "bytes are played onto a pseudo-terminal" if medium == "serial" else f"frames are played onto {CHOICES}"
        raise NotVirtual(f"{where}: a replay opens no physical bus; {of}")
    if interface == "socketcan" and (kind := link_kind(channel)) != "vcan":
        found = "there is no such link" if kind is None else f"the kernel says that it is a {kind or 'physical'} link"
        raise NotVirtual(f"{where}: {found}; a replay opens a vcan only: `ip link add dev vcan0 type vcan` makes one")
    try:
        return CanChannel(_open_channel(interface, channel), where)
    except (can.CanError, OSError) as error:
        raise OSError(f"{where}: {error}") from error


def _open_channel(interface: str, channel: str) -> can.BusABC:
    if interface == "virtual":
        return CanVirtualBus(channel)
    if interface == "udp_multicast":
        return UdpMulticastBus(channel)
    return SocketcanBus(channel, fd=True)
