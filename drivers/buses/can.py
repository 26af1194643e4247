"""CAN buses through python-can, any of its interfaces."""

import contextlib
from collections.abc import Sequence

import can

from drivers.bus import Bus, Received
from drivers.buses import CanSpec
from drivers.clock import SECOND, MonotonicNs, epoch_ns, left_s, monotonic_ns
from drivers.errors import BusError, BusMisconfigured
from drivers.family import CanFrame

_FOREIGN = (can.CanError, OSError)


class CanBus(Bus[CanFrame]):
    """One open channel. Error frames and remote frames are not passed on."""

    def __init__(self, spec: CanSpec) -> None:
        self._name = f"CAN bus {spec.name} ({spec.interface} {spec.channel})"
        # SocketCAN's bit rate belongs to the network link; python-can ignores it there
        try:
            self._bus = can.Bus(
                interface=spec.interface, channel=spec.channel, bitrate=spec.bitrate, **dict(spec.options)
            )
        except (can.CanInterfaceNotImplementedError, TypeError, ValueError) as error:
            raise BusMisconfigured(f"{self._name}: {error}") from error
        except _FOREIGN as error:
            raise BusError(f"{self._name}: cannot open: {error}") from error
        self._kernel_times = spec.interface == "socketcan"  # others stamp with time.time(), later than we can

    def send(self, units: Sequence[CanFrame], deadline: MonotonicNs) -> None:
        for frame in units:
            message = can.Message(arbitration_id=frame.can_id, data=frame.data, is_extended_id=frame.extended)
            try:
                self._bus.send(message, timeout=left_s(deadline))
            except _FOREIGN as error:
                raise BusError(f"{self._name}: sending {frame}: {error}") from error

    def receive(self, deadline: MonotonicNs) -> Received[CanFrame] | None:
        while True:
            try:
                message = self._bus.recv(timeout=left_s(deadline))
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

    def close(self) -> None:
        with contextlib.suppress(*_FOREIGN):
            self._bus.shutdown()
