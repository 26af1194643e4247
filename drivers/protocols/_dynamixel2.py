"""Dynamixel X series (Protocol 2.0) on the wire: packets, registers, and what a configuration adds to them.

    FF FF FD 00 ID LEN_L LEN_H INST P1 .. PN CRC_L CRC_H             LEN = N + 3, little-endian
    FF FF FD 00 ID LEN_L LEN_H 55 ERR P1 .. PN CRC_L CRC_H           a reply (status packet)
    FF FF FD 00 FE LEN_L LEN_H 55 { ERR ID P1 .. PN CRC_L CRC_H }..  a fast reply: a block a servo, in one packet

The CRC has the polynomial 8005, most significant bit first, from the first FF. From INST through the parameters
``FF FF FD`` is sent as ``FF FF FD FD``, so that a header never appears inside; LEN and CRC count that byte. Fast
replies are not stuffed, and each servo's CRC goes on from what was on the wire before it. A block is therefore proven
right by its own CRC and the one before it, and is taken as soon as it is there: a block that is missing or damaged
costs, besides itself, at most the one behind it. (A byte too few or too many costs all that follow.)

Replies name neither their request nor an address: every block that is read here has a length of its own, so that a
late reply to one cannot pass for a reply to another. Requests are told from replies by INST, so an echo does no harm.

Units: step, 4096 a turn, and 2048 is 0 rad. Sources: ROBOTIS e-Manual, Protocol 2.0 and the control tables of the X
series; ROBOTIS's dynamixel_hardware_interface, param/dxl_model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from math import inf, pi
from struct import Struct, unpack
from typing import Final, Literal, NamedTuple, get_args

from drivers.motor import Kind, Motor, Status

BROADCAST: Final = 0xFE
HEADER: Final = b"\xff\xff\xfd\x00"
LONGEST: Final = 1024  # of a packet, as in ROBOTIS's SDK

STEPS_PER_TURN: Final = 4096
CENTRE_STEP: Final = 2048
RAD_PER_STEP: Final = 2 * pi / STEPS_PER_TURN
RAD_S: Final = 0.0239691227  # of velocity: dynamixel_hardware_interface; the e-Manual rounds it to 0.229 rev/min
VOLT: Final = 0.1
MOST_STEPS: Final = 1_048_575  # either way, in the modes of several turns
MOST_PROFILE: Final = 32_767
TIME_BASED: Final = 0x04  # bit of the drive mode: the profile's velocity is a duration
WATCHDOG_NS: Final = 20_000_000  # a unit of the bus watchdog
WATCHDOG_EXPIRED: Final = 0xFF
ALERT: Final = 0x80  # bit of ERR; register 70 has no use for it


class Instruction(IntEnum):
    """Instruction codes (e-Manual, Protocol 2.0)."""

    PING = 0x01
    READ = 0x02
    WRITE = 0x03
    REG_WRITE = 0x04
    ACTION = 0x05
    FACTORY_RESET = 0x06
    REBOOT = 0x08
    STATUS = 0x55
    SYNC_READ = 0x82
    SYNC_WRITE = 0x83
    FAST_SYNC_READ = 0x8A
    BULK_READ = 0x92
    BULK_WRITE = 0x93
    FAST_BULK_READ = 0x9A


class Error(IntEnum):
    """The low seven bits of ERR (e-Manual, Protocol 2.0, status packet)."""

    RESULT = 1
    INSTRUCTION = 2
    CRC = 3
    RANGE = 4
    LENGTH = 5
    LIMIT = 6
    ACCESS = 7


class Register(IntEnum):
    """Addresses (e-Manual, control table of XM430-W350; the same for all X but XL-320)."""

    MODEL_NUMBER = 0
    FIRMWARE_VERSION = 6
    ID = 7
    BAUD_RATE = 8
    RETURN_DELAY_TIME = 9
    DRIVE_MODE = 10
    OPERATING_MODE = 11
    SECONDARY_ID = 12
    PROTOCOL_TYPE = 13
    HOMING_OFFSET = 20
    MOVING_THRESHOLD = 24
    TEMPERATURE_LIMIT = 31
    MAX_VOLTAGE_LIMIT = 32
    MIN_VOLTAGE_LIMIT = 34
    PWM_LIMIT = 36
    CURRENT_LIMIT = 38
    ACCELERATION_LIMIT = 40
    VELOCITY_LIMIT = 44
    MAX_POSITION_LIMIT = 48
    MIN_POSITION_LIMIT = 52
    SHUTDOWN = 63
    TORQUE_ENABLE = 64
    LED = 65
    STATUS_RETURN_LEVEL = 68
    HARDWARE_ERROR_STATUS = 70
    VELOCITY_I_GAIN = 76
    VELOCITY_P_GAIN = 78
    POSITION_D_GAIN = 80
    POSITION_I_GAIN = 82
    POSITION_P_GAIN = 84
    FEEDFORWARD_2ND_GAIN = 88
    FEEDFORWARD_1ST_GAIN = 90
    BUS_WATCHDOG = 98
    GOAL_PWM = 100
    GOAL_CURRENT = 102
    GOAL_VELOCITY = 104
    PROFILE_ACCELERATION = 108
    PROFILE_VELOCITY = 112
    GOAL_POSITION = 116
    MOVING = 122
    PRESENT_CURRENT = 126
    PRESENT_VELOCITY = 128
    PRESENT_POSITION = 132
    PRESENT_INPUT_VOLTAGE = 144
    PRESENT_TEMPERATURE = 146


class OperatingMode(IntEnum):
    """Values of register 11 (e-Manual, control table of XM430-W350)."""

    CURRENT = 0
    VELOCITY = 1
    POSITION = 3
    EXTENDED_POSITION = 4
    CURRENT_POSITION = 5
    PWM = 16


class HardwareError(IntFlag):
    """Bits of register 70; they stay until the servo is rebooted (e-Manual, hardware error status)."""

    INPUT_VOLTAGE = 1 << 0
    OVERHEATING = 1 << 2
    MOTOR_ENCODER = 1 << 3
    ELECTRICAL_SHOCK = 1 << 4
    OVERLOAD = 1 << 5


COMMON: Final[Mapping[int, Status]] = {
    HardwareError.INPUT_VOLTAGE: Status.FAULT_VOLTAGE,
    HardwareError.OVERHEATING: Status.FAULT_TEMPERATURE,
    HardwareError.MOTOR_ENCODER: Status.FAULT_ENCODER,
    HardwareError.ELECTRICAL_SHOCK: Status.FAULT_CURRENT,
    HardwareError.OVERLOAD: Status.FAULT_OVERLOAD,
}

MODELS: Final = {
    1000: "XH430-W350", 1001: "XD430-T350", 1010: "XH430-W210", 1011: "XD430-T210", 1020: "XM430-W350",
    1030: "XM430-W210", 1040: "XH430-V350", 1050: "XH430-V210", 1060: "XL430-W250", 1070: "XC430-W150",
    1080: "XC430-W240", 1090: "2XL430-W250", 1100: "XH540-W270", 1101: "XD540-T270", 1110: "XH540-W150",
    1111: "XD540-T150", 1120: "XM540-W270", 1130: "XM540-W150", 1140: "XH540-V270", 1150: "XH540-V150",
    1160: "2XC430-W250", 1170: "XW540-T260", 1180: "XW540-T140", 1190: "XL330-M077", 1200: "XL330-M288",
    1210: "XC330-T181", 1220: "XC330-T288", 1230: "XC330-M181", 1240: "XC330-M288", 1270: "XW430-T333",
    1310: "XW540-H260",
}  # fmt: skip
"""Names by model number (dynamixel_hardware_interface, dynamixel.model)."""

AMPERE: Final = {
    "XM": 0.00269, "XH430-W": 0.00269, "XH540": 0.00269, "XH430-V": 0.00134, "XL330": 0.001, "XC330": 0.001,
}  # fmt: skip
"""A a unit of registers 38, 102 and 126, by the beginning of the model's name (e-Manual, current limit).

XL430, XC430 and the 2X tell a load there, which is a share of the PWM; of others the unit is not known here. That of
the 330 is unverified.
"""

FAST_SINCE: Final = {"430": 45, "540": 45, "330": 46}
"""Firmware that knows fast sync read, by the size in the model's name; the 2X never do (e-Manual, Protocol 2.0)."""


def ampere_of(model: str) -> float | None:
    """A a unit of current; None if the model tells none, or its unit is not known."""
    return next((ampere for start, ampere in AMPERE.items() if model.startswith(start)), None)


def knows_fast_sync_read(model: str, firmware: int) -> bool:
    """Whether a servo answers to fast sync read; one that is not known to is taken not to."""
    return firmware >= FAST_SINCE.get(model[2:5], inf)  # a 2X has its size one place further on


# --- packets ----------------------------------------------------------------------------------------------------------

HEAD = Struct("<4sBHB")  # header, id, length, instruction
TAIL = Struct("<H")
ADDRESS = Struct("<HH")  # address, size
BULK = Struct("<BHH")  # id, address, size
_STUFFED = b"\xff\xff\xfd"


def _make_crc_table() -> list[int]:
    table, remainder = [0], 0x8005
    for _ in range(16):  # the CRC of a sum is the sum of the CRCs: each further bit doubles the table
        table += [entry ^ remainder for entry in table]
        remainder = remainder << 1 ^ (0x18005 if remainder & 0x8000 else 0)
    return table


_CRC: Final = _make_crc_table()  # of every word of two bytes: half the steps of the usual table of one byte


def compute_crc(data: bytes) -> int:
    """CRC-16 as ROBOTIS uses it (e-Manual, CRC calculation)."""
    if len(data) & 1:
        data = b"\x00" + data  # zeros in front change nothing
    crc = 0
    for word in unpack(f">{len(data) // 2}H", data):
        crc = _CRC[crc ^ word]
    return crc


class Packet(NamedTuple):
    """One packet; ``error`` is the ERR byte of a reply, and no part of a request."""

    bus_id: int
    instruction: int
    params: bytes = b""
    error: int = 0


def encode_packet(packet: Packet) -> bytes:
    """The packet as it goes over the wire."""
    bus_id, instruction, params, error = packet
    if instruction == Instruction.STATUS:
        params = bytes((error,)) + params
    if _STUFFED in params:
        params = params.replace(_STUFFED, _STUFFED + b"\xfd")
    head = HEAD.pack(HEADER, bus_id, len(params) + 3, instruction) + params
    return head + TAIL.pack(compute_crc(head))


class Decoder:
    """Finds packets in a stream of bytes of which any may be missing, doubled or wrong. Never raises.

    A fast reply becomes one packet for each block of it, that of a servo; its blocks hold ``block`` bytes of data.
    ``longest`` is the LEN above which it is taken for garbage; it bounds the memory, and how many good packets a
    damaged length can hold up.
    """

    def __init__(self, longest: int = LONGEST, block: int = 0) -> None:
        self.garbage = 0  # bytes that were part of no valid packet
        self._longest = longest
        self._block = Struct(f"<BB{block}sH") if block else None  # error, id, data, CRC
        self.reset()

    def reset(self) -> None:
        """Forget half a packet."""
        self._rest = b""
        self._blocks = 0  # of a fast reply, still to come
        self._before = b""  # what the next block's CRC covers besides the block

    def feed(self, data: bytes) -> list[Packet]:
        """All packets completed by ``data``, in their order."""
        data = self._rest + data
        packets: list[Packet] = []
        at = 0
        while True:
            if self._blocks and self._block:
                end = at + self._block.size
                if end > len(data):
                    break
                self._take_block(data[at:end], self._block, packets)
                at = end
                continue
            found = _find_header(data, at)
            self.garbage += found - at
            at = found
            if len(data) - at < HEAD.size:
                break
            _, bus_id, length, instruction = HEAD.unpack_from(data, at)
            reply = instruction == Instruction.STATUS
            if not 3 + reply <= length <= self._longest:
                self.garbage += 1
                at += 1
                continue
            if self._block and reply and bus_id == BROADCAST:
                self._blocks = (length - 1) // self._block.size
                self._before = data[at : at + HEAD.size]
                at += HEAD.size
                continue
            end = at + 7 + length
            if end > len(data):
                break
            if compute_crc(data[at : end - 2]) != TAIL.unpack_from(data, end - 2)[0]:
                self.garbage += 1
                at += 1
                continue
            params = data[at + 8 : end - 2]
            if _STUFFED in params:
                params = params.replace(_STUFFED + b"\xfd", _STUFFED)
            packets.append(
                Packet(bus_id, instruction, params[1:], params[0]) if reply else Packet(bus_id, instruction, params)
            )
            at = end
        self._rest = data[at:]
        return packets

    def _take_block(self, data: bytes, layout: Struct, packets: list[Packet]) -> None:
        error, bus_id, values, crc = layout.unpack(data)
        if compute_crc(self._before + data[:-2]) == crc:
            packets.append(Packet(bus_id, Instruction.STATUS, values, error))
        else:
            self.garbage += len(data)
        self._blocks -= 1
        self._before = continue_crc(crc)


def continue_crc(crc: int) -> bytes:
    """Two bytes that stand for everything up to and including this CRC, when that of the next block is computed.

    The CRC goes on over its own two bytes, low and high; from scratch, two bytes of low ^ high lead to the same.
    """
    return bytes(((crc ^ crc >> 8) & 0xFF,)) * 2


def _find_header(data: bytes, at: int) -> int:
    """Where a header begins, or may begin with the last bytes; the end of ``data`` if none does."""
    found = data.find(HEADER, at)
    if found >= 0:
        return found
    for size in (3, 2, 1):
        if data.endswith(HEADER[:size]) and len(data) - size >= at:
            return len(data) - size
    return len(data)


def make_ping(bus_id: int) -> bytes:
    """Ask a servo for its model number and firmware."""
    return encode_packet(Packet(bus_id, Instruction.PING))


def make_sync_read(bus_ids: Sequence[int], address: int, size: int, fast: bool = False) -> bytes:
    """Request ``size`` bytes from ``address`` of each servo; they reply one after the other, in this order."""
    instruction = Instruction.FAST_SYNC_READ if fast else Instruction.SYNC_READ
    return encode_packet(Packet(BROADCAST, instruction, ADDRESS.pack(address, size) + bytes(bus_ids)))


def make_sync_write(address: int, data: Mapping[int, bytes]) -> bytes:
    """Write ``data[bus_id]``, of equal lengths, from ``address`` on. No servo replies to it."""
    size = len(next(iter(data.values())))
    params = b"".join(bytes((bus_id,)) + values for bus_id, values in data.items())
    return encode_packet(Packet(BROADCAST, Instruction.SYNC_WRITE, ADDRESS.pack(address, size) + params))


def encode_position(position_rad: float) -> int:
    """rad -> register 116 or 132, 2048 at 0 rad."""
    return CENTRE_STEP + round(position_rad / RAD_PER_STEP)


def decode_position(raw: int) -> float:
    """Register 116 or 132 -> rad."""
    return (raw - CENTRE_STEP) * RAD_PER_STEP


def encode_profile_velocity(velocity_rad_s: float, limit: int = MOST_PROFILE) -> int:
    """rad/s -> register 112: not faster than asked nor than ``limit``, and at least 1: 0 stands for "no limit"."""
    return max(min(int(velocity_rad_s / RAD_S), limit, MOST_PROFILE), 1)


# --- the blocks that are read, each with a length of its own ----------------------------------------------------------


class Block(NamedTuple):
    """A run of registers that is read at once."""

    address: Register
    layout: Struct

    @property
    def size(self) -> int:
        """Bytes."""
        return self.layout.size

    def __str__(self) -> str:
        return f"registers {self.address}..{self.address + self.size - 1}"


IDENTITY: Final = Struct("<HB")  # of a reply to a ping: model number, firmware
FEEDBACK: Final = Block(Register.PRESENT_CURRENT, Struct("<hii8xHB"))  # 126..146
CONTROL: Final = Block(Register.TORQUE_ENABLE, Struct("<B5xB27xB"))  # 64..98
GOALS: Final = Block(Register.BUS_WATCHDOG, Struct("<BxhhiIIi"))  # 98..119
STATE: Final = Block(Register.RETURN_DELAY_TIME, Struct("<BBB12xI10xH4xIii8xB3xBxB27xB33xi"))  # 9..135


class State(NamedTuple):
    """Settings, watchdog and position of one servo, read at one time (registers 9..135), as the registers hold them."""

    return_delay: int
    drive_mode: int
    mode: int
    moving_threshold: int
    current_limit: int
    velocity_limit: int
    max_position: int
    min_position: int
    torque_enable: int
    status_return_level: int
    hardware_error: int
    watchdog: int
    present: int

    @classmethod
    def decode(cls, params: bytes) -> "State":
        """From the parameters of a reply to a read of ``STATE``."""
        return cls._make(STATE.layout.unpack(params))


def name_mode(mode: int) -> str:
    """A value of register 11 in words."""
    return OperatingMode(mode).name.lower() if mode in set(OperatingMode) else "unknown"


# --- modes, and what a configuration asks for -------------------------------------------------------------------------

MODES: Final[Mapping[Kind, Sequence[OperatingMode]]] = {
    Kind.POSITION: (OperatingMode.POSITION, OperatingMode.EXTENDED_POSITION, OperatingMode.CURRENT_POSITION),
    Kind.VELOCITY: (OperatingMode.VELOCITY,),
    Kind.TORQUE: (OperatingMode.CURRENT,),
}
STANDSTILL: Final[Mapping[int, tuple[Register, Struct]]] = {  # what 0 stops in modes that hold no position
    OperatingMode.VELOCITY: (Register.GOAL_VELOCITY, Struct("<i")),
    OperatingMode.CURRENT: (Register.GOAL_CURRENT, Struct("<h")),
    OperatingMode.PWM: (Register.GOAL_PWM, Struct("<h")),
}

Mode = Literal["position", "extended_position", "current_position", "velocity", "current"]
"""Names of ``OperatingMode`` that a configuration may ask for."""


@dataclass(frozen=True, slots=True)
class Options:
    """``fast_sync``: poll by fast sync read (one reply packet), if all servos of the bus know it.

    ``mode``: the operating mode that ``enable`` sets; left out, the servo stays in the one it has.
    ``nm_per_a``: N m of the output for each A; without it no torque is told, and none can be ordered.
    """

    fast_sync: bool = False
    mode: Mode | None = None
    nm_per_a: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in {None, *get_args(Mode)}:
            raise ValueError(f"mode is {self.mode!r}; it must be one of {', '.join(get_args(Mode))}")
        if self.nm_per_a is not None and not 0 < self.nm_per_a < inf:
            raise ValueError(f"nm_per_a is {self.nm_per_a}; it must be above 0")

    @property
    def wanted_mode(self) -> OperatingMode | None:
        """The value of register 11; None: any."""
        return None if self.mode is None else OperatingMode[self.mode.upper()]


def options_of(motor: Motor) -> Options:
    """A motor's options, or the defaults."""
    return motor.options if isinstance(motor.options, Options) else Options()
