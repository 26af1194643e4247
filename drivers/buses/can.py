"""CAN buses through python-can, any of its interfaces."""

import contextlib
import select
import termios
from collections.abc import Sequence

import can

from drivers.bus import Bus, Received
from drivers.buses import CanSpec
from drivers.clock import SECOND, MonotonicNs, epoch_ns, left_s, monotonic_ns
from drivers.errors import BusError, BusMisconfigured
from drivers.family import CanFrame

_FOREIGN = (can.CanError, OSError, termios.error)
_GARBLED = (ValueError, IndexError)
"""What slcan's parser raises for a line that is none."""


class CanBus(Bus[CanFrame]):
    """One open channel. Error frames and remote frames are not passed on."""

    def __init__(self, spec: CanSpec) -> None:
        super().__init__()
        self._name = f"CAN bus {spec.name} ({spec.interface} {spec.channel})"
        # SocketCAN's bit rate belongs to the network link; python-can ignores it there
        try:
            self._bus = can.Bus(
                interface=spec.interface, channel=spec.channel, bitrate=spec.bitrate, **dict(spec.options)
            )
        except (can.CanInterfaceNotImplementedError, TypeError, ValueError) as error:
            raise BusMisconfigured(f"{self._name}: {error}") from error
        except _FOREIGN as error:
            if isinstance(error.__cause__, TypeError | ValueError):  # python-can has wrapped it
                raise BusMisconfigured(f"{self._name}: {error}") from error
            raise BusError(f"{self._name}: cannot open: {error}") from error
        # slcan's own waiting polls by the millisecond, and ends at an acknowledgement although frames stand behind it
        self._fd = self._bus.fileno() if spec.interface == "slcan" else None
        self._closed = False
        self._kernel_times = spec.interface == "socketcan"  # others stamp with time.time(), later than we can

    def send(self, units: Sequence[CanFrame], deadline: MonotonicNs) -> None:
        self._check()
        for sent, frame in enumerate(units):
            left = left_s(deadline)
            if not left:  # without time, python-can's slcan drops what the adapter does not take, and says nothing
                raise BusError(
                    f"{self._name}: sending: {len(units) - sent} of {len(units)} frames were not taken in time"
                )
            message = can.Message(arbitration_id=frame.can_id, data=frame.data, is_extended_id=frame.extended)
            try:
                self._bus.send(message, timeout=left)
            except _FOREIGN as error:
                raise BusError(f"{self._name}: sending {frame}: {error}") from error

    def receive(self, deadline: MonotonicNs) -> Received[CanFrame] | None:
        self._check()
        while True:
            try:
                message = self._next(deadline)
            except _FOREIGN as error:
                raise BusError(f"{self._name}: receiving: {error}") from error
            if message is None:
                return None
            at_ns = monotonic_ns()
            if message.is_error_frame or message.is_remote_frame:
                continue
            if self._kernel_times:
                age_ns = epoch_ns() - int(message.timestamp * SECOND)
                if 0 <= age_ns < SECOND:  # else the wall clock stepped between kernel and us
                    at_ns = MonotonicNs(at_ns - age_ns)
            frame = CanFrame(message.arbitration_id, bytes(message.data), message.is_extended_id)
            return Received(frame, at_ns)

    def _next(self, deadline: MonotonicNs) -> can.Message | None:
        """As python-can's ``recv``, which counts its timeout by the wall clock: a step back would stretch it."""
        while True:
            waiting_s = left_s(deadline)
            if self._fd is not None:
                if not select.select([self._fd], [], [], waiting_s)[0]:
                    return None
                waiting_s = 0.0
            try:
                message, _ = self._bus._recv_internal(timeout=waiting_s)
            except _GARBLED:
                continue
            except can.CanError as error:
                if not isinstance(error.__cause__, UnicodeDecodeError):
                    raise
                self._bus._buffer.clear()  # type: ignore[attr-defined]  # slcan's; it would stumble over it for ever
                continue
            if message is not None or (self._fd is None and not left_s(deadline)):
                return message

    def _check(self) -> None:
        if self._closed:
            raise BusError(f"{self._name}: closed")

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(*_FOREIGN):
            self._bus.shutdown()
