"""Opening a bus from its description; the kinds of buses, and the border where foreign exceptions are translated.

A backend is imported when the first bus of its kind is opened.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from drivers.bus import Bus


@dataclass(frozen=True, slots=True)
class Rs485:
    """How a serial port's driver turns the line around: the level of RTS, and pauses of whole milliseconds."""

    rts_level_for_tx: bool = True
    rts_level_for_rx: bool = False
    delay_before_tx_ms: int = 0
    delay_before_rx_ms: int = 0


@dataclass(frozen=True, slots=True)
class SerialSpec:
    """A serial bus: a device file and a bit rate (8N1); ``rs485`` where the port itself has to turn the line around."""

    name: str
    port: str
    baudrate: int
    rs485: Rs485 | None = None


@dataclass(frozen=True, slots=True)
class CanSpec:
    """A CAN bus through python-can: interface, channel and whatever else that interface takes.

    ``fd``: the channel is opened for CAN FD, with ``data_bitrate`` (None: what the interface has for it).
    """

    name: str
    interface: str
    channel: str
    bitrate: int
    options: Mapping[str, Any] = field(default_factory=dict)
    fd: bool = False
    data_bitrate: int | None = None


BusSpec = SerialSpec | CanSpec


def open_bus(spec: BusSpec) -> Bus[Any]:
    """Open the bus. Raises BusError (try again later) or BusMisconfigured (never will)."""
    if isinstance(spec, SerialSpec):
        from drivers.buses.serial import SerialBus  # noqa: PLC0415  a CAN worker need not load pyserial

        return SerialBus(spec)
    from drivers.buses.can import CanBus  # noqa: PLC0415  a serial worker need not load python-can

    return CanBus(spec)
