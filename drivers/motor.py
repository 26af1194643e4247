"""The vocabulary of motors: what one can tell (``Feedback``, ``Status``, ``SAMPLE``) and be told (``Order``)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntFlag, StrEnum
from math import inf, nan
from typing import Any

import numpy as np


class Kind(StrEnum):
    """What a motor can be told to do; the ``kind`` of a record on the commands topic."""

    ENABLE = "enable"
    DISABLE = "disable"
    POSITION = "position"
    VELOCITY = "velocity"
    TORQUE = "torque"
    STOP = "stop"
    CLEAR_FAULT = "clear_fault"
    ESTOP = "estop"
    RESET_ESTOP = "reset_estop"


SETPOINTS = frozenset({Kind.POSITION, Kind.VELOCITY, Kind.TORQUE})
"""Kinds of which only the newest counts."""
DRIVES = frozenset({Kind.VELOCITY, Kind.TORQUE})
"""Setpoints that keep a motor moving until the next one: they need a deadman."""
ENDS_MOTION = frozenset({Kind.STOP, Kind.DISABLE})
"""Kinds that end a motion: harmless if repeated."""
OVERTAKES = SETPOINTS | ENDS_MOTION
"""Kinds that take the place of older setpoints of their motor."""


class Status(IntFlag):
    """Status bits that mean the same for every family; the vendor's own word travels beside them.

    The values are part of the telemetry contract (config/telemetry.proto): never renumber one.
    """

    ENABLED = 1 << 0
    MOVING = 1 << 1
    FAULT_VOLTAGE = 1 << 8
    FAULT_TEMPERATURE = 1 << 9
    FAULT_CURRENT = 1 << 10
    FAULT_OVERLOAD = 1 << 11
    FAULT_ENCODER = 1 << 12
    FAULT_COMMUNICATION = 1 << 13
    FAULT_OTHER = 1 << 14

    @classmethod
    def faults(cls) -> "Status":
        """All bits that stand for a fault."""
        return cls(0x7F00)


def bits_of(word: int) -> list[int]:
    """The bits that are set in a vendor's word, lowest first."""
    return [1 << place for place in range(word.bit_length()) if word >> place & 1]


def common_faults(errors: int, known: Mapping[int, Status]) -> Status:
    """The common fault bits for a vendor's error bits; one that is not among ``known`` is some other fault."""
    faults = Status(0)
    for bit in bits_of(errors):
        faults |= known.get(bit, Status.FAULT_OTHER)
    return faults


@dataclass(frozen=True, slots=True)
class Motor:
    """One motor as its bus knows it.

    ``index`` is the place of the motor on the arm (its partition); ``bus_id`` the address on the bus;
    ``options`` whatever its family takes beyond that, an instance of that family's ``Options``; ``position_rad`` the
    range that it is to stay in: beyond it, a motor that a velocity or torque drives is stopped (``drivers.orders``).
    ``watchdog_ns``: how long its own watchdog, where it has one, lets it run without hearing from the gateway (0: it is
    not armed).
    """

    index: int
    name: str
    family: str
    bus_id: int
    options: Any = None
    position_rad: tuple[float, float] = (-inf, inf)
    watchdog_ns: int = 0


@dataclass(frozen=True, slots=True)
class Feedback:
    """What one motor told in one cycle, SI units; NaN where the family does not tell."""

    position_rad: float
    velocity_rad_s: float
    temperature_c: float
    voltage_v: float = nan
    current_a: float = nan
    torque_nm: float = nan
    status: int = 0
    vendor_error: int = 0


SAMPLE = np.dtype(
    [
        ("motor", "<u2"),  # Motor.index
        ("sampled_at_ns", "<i8"),  # monotonic, where the reply's bytes arrived
        ("position_rad", "<f8"),
        ("velocity_rad_s", "<f4"),
        ("temperature_c", "<f4"),
        ("voltage_v", "<f4"),
        ("current_a", "<f4"),
        ("torque_nm", "<f4"),
        ("status", "<u4"),  # Status
        ("vendor_error", "<u4"),
        ("round_trip_us", "<f4"),  # request written -> reply arrived
    ]
)
"""One sample as a bus worker sends it: packed, little-endian."""


@dataclass(frozen=True, slots=True)
class Order:
    """One thing for one motor to do, already validated against its limits.

    ``value``: rad, rad/s or N m, by kind. ``velocity_rad_s``: the speed a position is approached with.
    """

    kind: Kind
    value: float = nan
    velocity_rad_s: float = nan


@dataclass(frozen=True, slots=True)
class MotorInfo:
    """What a motor says of itself when it is connected; ``details`` holds whatever else its family reads.

    ``options``: the keys of its family's ``Options`` that differ from their defaults, as ``identify`` found them.
    ``driven``: it was found following a velocity or torque, which nothing ends.
    """

    model: str
    firmware: str
    details: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    driven: bool = False
