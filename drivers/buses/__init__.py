"""Opening a bus from its description; the kinds of buses, and the border where foreign exceptions are translated.

A backend is imported when the first bus of its kind is opened.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from drivers.bus import Bus


@dataclass(frozen=True, slots=True)
class SerialSpec:
    """A serial bus: a device file and a bit rate (8N1)."""

    name: str
    port: str
    baudrate: int


@dataclass(frozen=True, slots=True)
class CanSpec:
    """A CAN bus through python-can: interface, channel and whatever else that interface takes."""

    name: str
    interface: str
    channel: str
    bitrate: int
    options: Mapping[str, Any] = field(default_factory=dict)


BusSpec = SerialSpec | CanSpec


def open_bus(spec: BusSpec) -> Bus[Any]:
    """Open the bus. Raises BusError (try again later) or BusMisconfigured (never will)."""
    if isinstance(spec, SerialSpec):
        from drivers.buses.serial import SerialBus  # noqa: PLC0415  a CAN worker need not load pyserial

        return SerialBus(spec)
    from drivers.buses.can import CanBus  # noqa: PLC0415  a serial worker need not load python-can

    return CanBus(spec)
