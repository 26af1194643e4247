"""The vocabulary of CiA 402: objects, states, modes, error codes, and what a configuration adds to them.

Sources: CiA 402 (IEC 61800-7-201) as told in the canopen library's profiles/p402.py (states, modes) and in Applied
Motion's CANopen User Manual 920-0025 (controlword, statusword); CiA 301's classes of error codes in its emcy.py.
"""

import re
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from math import isfinite
from typing import Final, Literal

from drivers.motor import Status
from drivers.protocols._canopen import Object

DEVICE_TYPE: Final = Object(0x1000, 0, "uint32", "device type")
DEVICE_NAME: Final = Object(0x1008, 0, "string", "device name")
SOFTWARE_VERSION: Final = Object(0x100A, 0, "string", "software version")
HEARTBEAT_TIME: Final = Object(0x1017, 0, "uint16", "heartbeat time")
CONSUMED_HEARTBEAT: Final = Object(0x1016, 1, "uint32", "consumer heartbeat time")
VENDOR: Final = Object(0x1018, 1, "uint32", "vendor id")
PRODUCT: Final = Object(0x1018, 2, "uint32", "product code")
REVISION: Final = Object(0x1018, 3, "uint32", "revision")
ABORT_CONNECTION: Final = Object(0x6007, 0, "int16", "abort connection option code")
ERROR_CODE: Final = Object(0x603F, 0, "uint16", "error code")
CONTROLWORD: Final = Object(0x6040, 0, "uint16", "controlword")
STATUSWORD: Final = Object(0x6041, 0, "uint16", "statusword")
MODE: Final = Object(0x6060, 0, "int8", "mode of operation")
MODE_DISPLAY: Final = Object(0x6061, 0, "int8", "mode of operation display")
POSITION: Final = Object(0x6064, 0, "int32", "position")
FOLLOWING_WINDOW: Final = Object(0x6065, 0, "uint32", "following error window")
VELOCITY: Final = Object(0x606C, 0, "int32", "velocity")
TORQUE: Final = Object(0x6077, 0, "int16", "torque")
DC_LINK_VOLTAGE: Final = Object(0x6079, 0, "uint32", "DC link voltage")
TARGET_POSITION: Final = Object(0x607A, 0, "int32", "target position")
LOWEST_POSITION: Final = Object(0x607D, 1, "int32", "lowest position")
HIGHEST_POSITION: Final = Object(0x607D, 2, "int32", "highest position")
PROFILE_VELOCITY: Final = Object(0x6081, 0, "uint32", "profile velocity")
TARGET_VELOCITY: Final = Object(0x60FF, 0, "int32", "target velocity")
SUPPORTED_MODES: Final = Object(0x6502, 0, "uint32", "supported modes")
PROFILE: Final = 402  # low word of the device type
ABORT_CONNECTION_STOPS: Final = frozenset({1, 2, 3})  # values of 6007: fault, disable voltage, quick stop; 0 is nothing


class Mode(IntEnum):
    """Modes of operation (6060, 6061) that are used here; bit ``mode - 1`` of 6502 says that a drive has one."""

    PP = 1
    PV = 3
    CSP = 8


class State(IntEnum):
    """States of a drive, as their bits of the statusword."""

    NOT_READY = 0x00
    SWITCH_ON_DISABLED = 0x40
    READY = 0x21
    SWITCHED_ON = 0x23
    ENABLED = 0x27
    QUICK_STOP = 0x07
    FAULT_REACTION = 0x0F
    FAULT = 0x08


class Control(IntFlag):
    """Values and bits of the controlword."""

    DISABLE_VOLTAGE = 0x00
    QUICK_STOP = 0x02
    SHUTDOWN = 0x06
    SWITCH_ON = 0x07
    ENABLE = 0x0F
    NEW_SETPOINT = 1 << 4
    AT_ONCE = 1 << 5
    FAULT_RESET = 1 << 7
    HALT = 1 << 8


ACKNOWLEDGED: Final = 1 << 12  # of the statusword, in pp
FAULTS: Final = frozenset({State.FAULT, State.FAULT_REACTION})
_WITHOUT_QUICK_STOP_BIT: Final = frozenset({State.NOT_READY, State.SWITCH_ON_DISABLED, *FAULTS})
_WITH_QUICK_STOP_BIT: Final = frozenset(State) - _WITHOUT_QUICK_STOP_BIT
STEPS_UP: Final = {
    State.SWITCH_ON_DISABLED: (Control.SHUTDOWN, State.READY),
    State.READY: (Control.SWITCH_ON, State.SWITCHED_ON),
    State.SWITCHED_ON: (Control.ENABLE, State.ENABLED),
}

ERRORS: Final[dict[int, tuple[str, Status]]] = {  # error codes and their classes; of several, the closest counts
    0x1000: ("generic error", Status.FAULT_OTHER),
    0x2000: ("current", Status.FAULT_CURRENT),
    0x2100: ("current at the input", Status.FAULT_CURRENT),
    0x2200: ("current inside the device", Status.FAULT_CURRENT),
    0x2300: ("current at the output", Status.FAULT_CURRENT),
    0x2310: ("continuous over-current at the output", Status.FAULT_CURRENT),
    0x2320: ("short circuit or earth leakage at the output", Status.FAULT_CURRENT),
    0x2350: ("load too high for too long (I2t)", Status.FAULT_OVERLOAD),
    0x3000: ("voltage", Status.FAULT_VOLTAGE),
    0x3100: ("mains voltage", Status.FAULT_VOLTAGE),
    0x3110: ("mains over-voltage", Status.FAULT_VOLTAGE),
    0x3120: ("mains under-voltage", Status.FAULT_VOLTAGE),
    0x3130: ("mains phase missing", Status.FAULT_VOLTAGE),
    0x3210: ("DC link over-voltage", Status.FAULT_VOLTAGE),
    0x3220: ("DC link under-voltage", Status.FAULT_VOLTAGE),
    0x3300: ("voltage at the output", Status.FAULT_VOLTAGE),
    0x4000: ("temperature", Status.FAULT_TEMPERATURE),
    0x4110: ("surroundings too hot", Status.FAULT_TEMPERATURE),
    0x4210: ("device too hot", Status.FAULT_TEMPERATURE),
    0x4310: ("drive too hot", Status.FAULT_TEMPERATURE),
    0x5000: ("device hardware", Status.FAULT_OTHER),
    0x5100: ("supply of the electronics", Status.FAULT_VOLTAGE),
    0x6000: ("device software", Status.FAULT_OTHER),
    0x6300: ("parameters", Status.FAULT_OTHER),
    0x7000: ("additional modules", Status.FAULT_OTHER),
    0x7110: ("brake chopper", Status.FAULT_OTHER),
    0x7120: ("motor", Status.FAULT_OVERLOAD),
    0x7121: ("motor blocked", Status.FAULT_OVERLOAD),
    0x7122: ("commutation", Status.FAULT_ENCODER),
    0x7300: ("sensor", Status.FAULT_ENCODER),
    0x7500: ("communication with a module", Status.FAULT_COMMUNICATION),
    0x8000: ("monitoring", Status.FAULT_OTHER),
    0x8100: ("communication", Status.FAULT_COMMUNICATION),
    0x8110: ("CAN overrun", Status.FAULT_COMMUNICATION),
    0x8120: ("CAN error passive", Status.FAULT_COMMUNICATION),
    0x8130: ("heartbeat or life guarding", Status.FAULT_COMMUNICATION),
    0x8140: ("recovered from bus off", Status.FAULT_COMMUNICATION),
    0x8200: ("protocol", Status.FAULT_COMMUNICATION),
    0x8300: ("torque control", Status.FAULT_OVERLOAD),
    0x8400: ("velocity control", Status.FAULT_OVERLOAD),
    0x8500: ("position control", Status.FAULT_OVERLOAD),
    0x8600: ("positioning", Status.FAULT_OTHER),
    0x8611: ("following error: the joint does not keep up", Status.FAULT_OVERLOAD),
    0x8612: ("reference limit", Status.FAULT_OTHER),
    0x8700: ("synchronisation", Status.FAULT_COMMUNICATION),
    0x9000: ("external error", Status.FAULT_OTHER),
    0xF000: ("additional functions", Status.FAULT_OTHER),
    0xFF00: ("specific to the device", Status.FAULT_OTHER),
}


def find_error(code: int) -> tuple[str, Status]:
    """Words and common status bit of an error code: its own, or those of the class that is closest to it."""
    for mask in (0xFFFF, 0xFFF0, 0xFF00, 0xF000):
        if found := ERRORS.get(code & mask):
            return found
    return "of no class", Status.FAULT_OTHER


def state_of(statusword: int) -> State | None:
    """The state that a statusword tells; None if it tells none."""
    for mask, states in ((0x4F, _WITHOUT_QUICK_STOP_BIT), (0x6F, _WITH_QUICK_STOP_BIT)):
        if statusword & mask in states:
            return State(statusword & mask)
    return None


_KEY: Final = re.compile(r"0[xX]([0-9A-Fa-f]{1,4}):([0-9]{1,2})")


@dataclass(frozen=True, slots=True)
class Options:
    """What no drive tells of itself: its units, its temperature, and how it is to be used.

    ``units_per_turn``: position units (6064, 607A, 607D) in one turn of the joint. ``velocity_units_per_turn_s``:
    velocity units (606C, 6081, 60FF) in one turn a second; as many as position units unless told otherwise.
    ``rated_torque_nm``: what 1000 per mille of 6077 is, at the joint; without it no torque is told. ``mode``: profile
    position (pp), profile velocity (pv) or cyclic synchronous position (csp).
    ``temperature``: the vendor's object, as "0x200D:1", its type, C for one of its units, and whether it comes in a
    TPDO rather than by an SDO a second. ``pdo``: "write" sets up the drive's TPDOs at each connect, "read" uses them
    as they are. ``heartbeat_ms``: the drive's heartbeat, 0 for none.
    """

    units_per_turn: float
    velocity_units_per_turn_s: float | None = None
    rated_torque_nm: float | None = None
    mode: Literal["pp", "pv", "csp"] = "pp"
    temperature: str | None = None
    temperature_type: Literal["int8", "uint8", "int16", "uint16", "int32", "uint32", "real32"] = "real32"
    temperature_scale: float = 1.0
    temperature_pdo: bool = False
    pdo: Literal["write", "read"] = "write"
    heartbeat_ms: int = 100

    def __post_init__(self) -> None:
        positive = ("units_per_turn", "velocity_units_per_turn_s", "rated_torque_nm")
        wrong = [
            f"{name} is {value}; it must be finite and above 0"
            for name in positive
            if (value := getattr(self, name)) is not None and not (isfinite(value) and value > 0)
        ]
        if not isfinite(self.temperature_scale) or self.temperature_scale == 0:
            wrong.append(f"temperature_scale is {self.temperature_scale}; it must be finite and not 0")
        if self.temperature is not None and not _KEY.fullmatch(self.temperature):
            wrong.append(f'temperature is "{self.temperature}"; it must be index:subindex, for example "0x200D:1"')
        if self.temperature is None and self.temperature_pdo:
            wrong.append("temperature_pdo is true; it needs temperature, the object to map")
        if not 0 <= self.heartbeat_ms <= 0xFFFF:
            wrong.append(f"heartbeat_ms is {self.heartbeat_ms}; it must be 0 to 65535")
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def operation(self) -> Mode:
        """The mode of operation that ``mode`` stands for."""
        return Mode[self.mode.upper()]

    @property
    def velocity_units(self) -> float:
        """Velocity units in one turn a second."""
        return self.velocity_units_per_turn_s or self.units_per_turn

    @property
    def temperature_object(self) -> Object | None:
        """Where the temperature is."""
        if self.temperature is None or (found := _KEY.fullmatch(self.temperature)) is None:
            return None
        return Object(int(found[1], 16), int(found[2]), self.temperature_type, "temperature")

    def tpdos(self) -> tuple[tuple[Object, ...], ...]:
        """What "write" puts into the TPDOs: two, since statusword, position and velocity have ten bytes."""
        first = (STATUSWORD, POSITION) if self.rated_torque_nm is None else (STATUSWORD, POSITION, TORQUE)
        temperature = self.temperature_object if self.temperature_pdo else None
        return first, (VELOCITY,) if temperature is None else (VELOCITY, temperature)
