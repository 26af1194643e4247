"""The traffic of a bus as it is on the wire, for whoever records or plays it: more than a motor family is shown.

``Bus.tap`` gets every unit: frames of other masters, remote and error frames, CAN FD, bytes that are no packet. Not
what an adapter gives back of our own: that was told when it was sent.
"""

from enum import IntFlag
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import can  # a serial worker need not load it


class Mark(IntFlag):
    """What a unit is, beyond its data."""

    SENT = 1  # by whoever recorded it
    EXTENDED = 2  # an identifier of 29 bits
    REMOTE = 4  # a remote frame
    ERROR = 8  # an error frame: its identifier holds the classes of linux/can/error.h
    FD = 16  # a CAN FD frame
    BRS = 32  # its data at the higher bit rate
    ESI = 64  # its sender is error passive


class Traffic(NamedTuple):
    """One frame, or the bytes that were written or read together on a serial bus."""

    at_ns: int  # handed to the adapter, or arrived (the kernel's time where there is one): monotonic; in a file, epoch
    marks: int  # of Mark
    can_id: int  # 0 on a serial bus
    data: bytes
    dlc: int = 0  # what a remote frame asks for: it has no data


def from_message(message: "can.Message", at_ns: int) -> Traffic:
    """A frame as python-can has it; ``to_message`` of ``gateway.recordings.bus_file`` is the way back."""
    marks = (
        (not message.is_rx) * Mark.SENT
        | message.is_extended_id * Mark.EXTENDED
        | message.is_remote_frame * Mark.REMOTE
        | message.is_error_frame * Mark.ERROR
        | message.is_fd * Mark.FD
        | message.bitrate_switch * Mark.BRS
        | message.error_state_indicator * Mark.ESI
    )
    return Traffic(at_ns, marks, message.arbitration_id, bytes(message.data), message.dlc)
