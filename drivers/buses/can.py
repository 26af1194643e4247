"""CAN buses through python-can, any of its interfaces."""

import contextlib
import errno
import termios
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import can

from drivers.bus import Bus, Received, Trouble
from drivers.buses import CanSpec
from drivers.buses.can_errors import LINUX, ErrorClass, describe_error
from drivers.buses.can_link import how_to_return, link_problem
from drivers.buses.can_options import constructor_options
from drivers.buses.slcan import SlcanReader
from drivers.clock import MS, SECOND, MonotonicNs, after, epoch_ns, left_s, monotonic_ns, sleep_until
from drivers.errors import BusError, BusMisconfigured
from drivers.family import CanFrame
from drivers.traffic import Mark, Traffic, from_message

if TYPE_CHECKING:
    from can.interfaces.slcan import slcanBus

_FOREIGN = (can.CanError, OSError, termios.error)
_TX_FULL_NS = MS // 4  # two frames of 1 Mbit/s
_SENT = (int(Mark.SENT), int(Mark.SENT | Mark.EXTENDED))
_MOST_OWN = 1000  # frames that may still come back
_MOST_PASSED_OVER = 1000  # of what is no frame, once the deadline has passed: a broken bus reports errors without end


class CanBus(Bus[CanFrame]):
    """One open channel. Remote frames are not passed on; error frames and long frames are counted; bus-off ends it."""

    def __init__(self, spec: CanSpec) -> None:
        super().__init__()
        self._spec = spec
        self._name = f"CAN bus {spec.name} ({spec.interface} {spec.channel})"
        self._socketcan = spec.interface == "socketcan"
        if self._socketcan and (problem := link_problem(spec)):
            raise BusError(f"{self._name}: {problem}")
        # SocketCAN's bit rates belong to the network link; python-can ignores them there
        try:
            self._bus = can.Bus(interface=spec.interface, channel=spec.channel, **constructor_options(spec))
            self._slcan = SlcanReader(cast("slcanBus", self._bus)) if spec.interface == "slcan" else None
        except (NotImplementedError, TypeError, ValueError) as error:
            raise BusMisconfigured(f"{self._name}: {error}") from error
        except _FOREIGN as error:
            if isinstance(error.__cause__, TypeError | ValueError):  # python-can has wrapped it
                raise BusMisconfigured(f"{self._name}: {error}") from error
            raise self._failed("cannot open", error) from error
        own = spec.interface == "udp_multicast" or spec.options.get("receive_own_messages")
        self._own: deque[CanFrame] | None = deque(maxlen=_MOST_OWN) if own else None
        self._closed = False

    def send(self, units: Sequence[CanFrame], deadline: MonotonicNs) -> None:
        self._check()
        for sent, frame in enumerate(units):
            if not self._send(frame, deadline):
                many = f"{len(units) - sent} of {len(units)} frames were not taken in time"
                hint = "a transmit queue stays full while nobody acknowledges"
                raise BusError(f"{self._name}: sending: {many}; {hint}")

    def _send(self, frame: CanFrame, deadline: MonotonicNs) -> bool:
        """Send one frame, again if the queue is full; False if it was not taken by ``deadline``."""
        message = can.Message(arbitration_id=frame.can_id, data=frame.data, is_extended_id=frame.extended)
        if self._own is not None:
            self._own.append(frame)
        if self.tap:
            self.tap(Traffic(monotonic_ns(), _SENT[frame.extended], frame.can_id, frame.data))
        waits = False
        while left := left_s(deadline):  # without time, python-can's slcan drops what is not taken, and says nothing
            try:
                self._bus.send(message, timeout=left)
                return True
            except _FOREIGN as error:
                number = _number(error)
                timed_out = number is None and not left_s(deadline)
                if number != errno.ENOBUFS and not timed_out:
                    raise self._failed(f"sending {frame}", error) from error
            if not waits:
                waits = True
                self.note(Trouble.TX_FULL, f"{frame} had to wait for the transmit queue")
            sleep_until(min(deadline, after(monotonic_ns(), _TX_FULL_NS)))
        return False

    def receive(self, deadline: MonotonicNs) -> Received[CanFrame] | None:
        self._check()
        passed_over = 0
        while passed_over < _MOST_PASSED_OVER or left_s(deadline):
            passed_over += 1
            try:
                message = self._next(deadline)
            except _FOREIGN as error:
                raise self._failed("receiving", error) from error
            if message is None:
                return None
            if isinstance(message, str):
                self.note(Trouble.GARBAGE, message)
                continue
            at_ns = self._arrival(message, monotonic_ns())
            frame = CanFrame(message.arbitration_id, bytes(message.data), message.is_extended_id)
            is_data = not message.is_error_frame and not message.is_remote_frame
            if self._own and is_data and frame in self._own:
                self._own.remove(frame)
                self.note(Trouble.ECHO, "the interface gives back what is sent; it is passed over")
                continue
            if self.tap:
                message.is_rx = True  # SocketCAN says no of what other programs of this machine sent
                self.tap(from_message(message, at_ns))
            if message.is_error_frame:
                self._take_error(message)
            elif len(frame.data) > 8:
                self.note(Trouble.LONG_FRAME, f"{message.arbitration_id:03X} with {len(frame.data)} bytes")
            elif is_data:
                return Received(frame, at_ns)
        return None

    def _arrival(self, message: can.Message, at_ns: MonotonicNs) -> MonotonicNs:
        """The kernel's time of SocketCAN; others stamp with time.time(), later than we can."""
        if self._socketcan:
            age_ns = epoch_ns() - int(message.timestamp * SECOND)
            if 0 <= age_ns < SECOND:  # else the wall clock stepped between kernel and us
                # read behind the other clock: what comes in between makes it later, never earlier than the frame came
                return MonotonicNs(monotonic_ns() - age_ns)
        return at_ns

    def _take_error(self, message: can.Message) -> None:
        """Count an error frame. Raises BusError for bus-off: the controller takes no part in the bus any more."""
        classes, data = message.arbitration_id, bytes(message.data)
        if self._spec.interface not in LINUX:
            self.note(Trouble.ERROR_FRAME, f"{self._spec.interface} error {classes:#x} {data.hex()}".rstrip())
            return
        words = describe_error(classes, data)
        self.note(Trouble.ERROR_FRAME, words)
        if classes & ErrorClass.BUS_OFF:
            hint = f"; {how_to_return(self._spec.channel)}" if self._socketcan else ""
            raise BusError(f"{self._name}: {words}{hint}")

    def _next(self, deadline: MonotonicNs) -> can.Message | str | None:
        """As python-can's ``recv``, which counts its timeout by the wall clock: a step back would stretch it.

        Garbage of the adapter's own protocol comes as words about it.
        """
        if self._slcan:
            return self._slcan.next(deadline)
        while True:
            message, _ = self._bus._recv_internal(timeout=left_s(deadline))
            if message is not None or not left_s(deadline):
                return message

    def _failed(self, doing: str, error: BaseException) -> BusError:
        """A foreign error as ours, with what the network link says of it."""
        problem = link_problem(self._spec) if self._socketcan else None
        return BusError(f"{self._name}: {doing}: {error}" + (f"; {problem}" if problem else ""))

    def _check(self) -> None:
        if self._closed:
            raise BusError(f"{self._name}: closed")

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(*_FOREIGN):
            self._bus.shutdown()


def _number(error: BaseException) -> int | None:
    """The system's number of an error, where python-can tells it."""
    return getattr(error, "error_code", None) or getattr(error, "errno", None)
