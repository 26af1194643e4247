"""What a CAN controller reports: the error frames of Linux, in words.

    identifier   one bit a class: 0x001 transmit timeout, 0x002 lost arbitration, 0x004 controller, ...
    data[0]      at which bit arbitration was lost       data[4]     state of the transceiver
    data[1]      state of the controller                 data[6..7]  error counters, transmit and receive
    data[2..3]   kind and place of a protocol violation

Source: the kernel's ``include/uapi/linux/can/error.h``. socketcand, gs_usb and python-can's own virtual buses bring
the same frames; other interfaces number their errors as they like, so theirs are told as they are.
"""

from collections.abc import Iterator, Mapping
from enum import IntFlag
from typing import Final


class ErrorClass(IntFlag):
    """Bits of an error frame's identifier."""

    TX_TIMEOUT = 0x001
    LOST_ARBITRATION = 0x002
    CONTROLLER = 0x004
    PROTOCOL = 0x008
    TRANSCEIVER = 0x010
    NO_ACK = 0x020
    BUS_OFF = 0x040
    BUS_ERROR = 0x080
    RESTARTED = 0x100
    COUNTERS = 0x200


LINUX: Final = frozenset({"socketcan", "socketcand", "gs_usb", "virtual", "udp_multicast"})
"""Interfaces whose error frames are as Linux has them."""

_ALONE: Final = {
    ErrorClass.TX_TIMEOUT: "transmit timeout",
    ErrorClass.NO_ACK: "no acknowledgement: nobody else is on the bus, or at another bit rate",
    ErrorClass.BUS_OFF: "bus-off",
    ErrorClass.BUS_ERROR: "bus error",
    ErrorClass.RESTARTED: "controller restarted",
}
_CONTROLLER: Final = {
    0x01: "receive overflow",
    0x02: "transmit overflow",
    0x04: "receive warning",
    0x08: "transmit warning",
    0x10: "receive passive",
    0x20: "transmit passive",
    0x40: "active again",
}
_PROTOCOL: Final = {
    0x01: "single bit",
    0x02: "frame format",
    0x04: "bit stuffing",
    0x08: "no dominant bit could be sent",
    0x10: "no recessive bit could be sent",
    0x20: "overload",
    0x40: "active error announced",
    0x80: "while sending",
}


def describe_error(classes: int, data: bytes) -> str:
    """An error frame of Linux in words; bytes that it does not have count as 0."""
    return "; ".join(_parts(ErrorClass(classes), data.ljust(8, b"\0"))) or f"error frame {classes:#x}"


def _parts(classes: ErrorClass, data: bytes) -> Iterator[str]:
    yield from (words for bit, words in _ALONE.items() if bit in classes)
    if ErrorClass.LOST_ARBITRATION in classes:
        yield f"lost arbitration at bit {data[0]}" if data[0] else "lost arbitration"
    if ErrorClass.CONTROLLER in classes:
        yield f"controller: {_bits(data[1], _CONTROLLER)}"
    if ErrorClass.PROTOCOL in classes:
        yield f"protocol violation: {_bits(data[2], _PROTOCOL)}" + (f", at {data[3]:#04x}" if data[3] else "")
    if ErrorClass.TRANSCEIVER in classes:
        yield f"transceiver {data[4]:#04x}"
    if ErrorClass.COUNTERS in classes:
        yield f"error counters: transmit {data[6]}, receive {data[7]}"


def _bits(value: int, words: Mapping[int, str]) -> str:
    return ", ".join(word for bit, word in words.items() if value & bit) or "unspecified"
