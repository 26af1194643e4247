"""Dynamixel X series (Protocol 2.0) on a half-duplex serial bus: one codec, and both sides of it.

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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from math import inf, isfinite, nan, pi
from struct import Struct, unpack
from typing import Any, Final, Literal, NamedTuple, get_args

from drivers.clock import MS, SECOND, MonotonicNs
from drivers.errors import MotorRefused
from drivers.family import Exchange, Family, Procedure, Reply
from drivers.motor import Feedback, Kind, Motor, MotorInfo, Order, Status
from drivers.sim.responder import Responder, SimulatedMotor, as_byte

BROADCAST: Final = 0xFE
HEADER: Final = b"\xff\xff\xfd\x00"
LONGEST: Final = 1024  # of a packet, as in ROBOTIS's SDK

STEPS_PER_TURN: Final = 4096
CENTRE_STEP: Final = 2048
TRUSTED: Final = 100  # polls answered in a row
RAD_PER_STEP: Final = 2 * pi / STEPS_PER_TURN
RAD_S: Final = 0.0239691227  # of velocity: dynamixel_hardware_interface; the e-Manual rounds it to 0.229 rev/min
VOLT: Final = 0.1
MOST_STEPS: Final = 1_048_575  # either way, in the modes of several turns
MOST_PROFILE: Final = 32_767
TIME_BASED: Final = 0x04  # bit of the drive mode: the profile's velocity is a duration
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


_COMMON: Final[Mapping[int, Status]] = {
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

_HEAD = Struct("<4sBHB")  # header, id, length, instruction
_TAIL = Struct("<H")
_ADDRESS = Struct("<HH")  # address, size
_BULK = Struct("<BHH")  # id, address, size
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
    head = _HEAD.pack(HEADER, bus_id, len(params) + 3, instruction) + params
    return head + _TAIL.pack(compute_crc(head))


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
            if len(data) - at < _HEAD.size:
                break
            _, bus_id, length, instruction = _HEAD.unpack_from(data, at)
            reply = instruction == Instruction.STATUS
            if not 3 + reply <= length <= self._longest:
                self.garbage += 1
                at += 1
                continue
            if self._block and reply and bus_id == BROADCAST:
                self._blocks = (length - 1) // self._block.size
                self._before = data[at : at + _HEAD.size]
                at += _HEAD.size
                continue
            end = at + 7 + length
            if end > len(data):
                break
            if compute_crc(data[at : end - 2]) != _TAIL.unpack_from(data, end - 2)[0]:
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
    return encode_packet(Packet(BROADCAST, instruction, _ADDRESS.pack(address, size) + bytes(bus_ids)))


def make_sync_write(address: int, data: Mapping[int, bytes]) -> bytes:
    """Write ``data[bus_id]``, of equal lengths, from ``address`` on. No servo replies to it."""
    size = len(next(iter(data.values())))
    params = b"".join(bytes((bus_id,)) + values for bus_id, values in data.items())
    return encode_packet(Packet(BROADCAST, Instruction.SYNC_WRITE, _ADDRESS.pack(address, size) + params))


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
CONTROL: Final = Block(Register.TORQUE_ENABLE, Struct("<B3xBxB"))  # 64..70
GOALS: Final = Block(Register.BUS_WATCHDOG, Struct("<BxhhiIIi"))  # 98..119
STATE: Final = Block(  # 9..135
    Register.RETURN_DELAY_TIME, Struct("<BBB12xI10xH4xIii8xB3xBxB27x" + GOALS.layout.format[1:] + "12xi")
)
_PROFILE_AND_GOAL = Struct("<Ii")  # 112..119


class Goals(NamedTuple):
    """Registers 98..119."""

    watchdog: int
    pwm: int
    current: int
    velocity: int
    profile_acceleration: int
    profile_velocity: int
    position: int


class State(NamedTuple):
    """Settings, orders and position of one servo, read at one time (registers 9..135), as the registers hold them."""

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
    goals: Goals
    present: int

    @classmethod
    def decode(cls, params: bytes) -> "State":
        """From the parameters of a reply to a read of ``STATE``."""
        *settings, watchdog, pwm, current, velocity, acceleration, speed, position, present = STATE.layout.unpack(
            params
        )
        goals = Goals(watchdog, pwm, current, velocity, acceleration, speed, position)
        return cls._make((*settings, goals, present))


def name_mode(mode: int) -> str:
    """A value of register 11 in words."""
    return OperatingMode(mode).name.lower() if mode in set(OperatingMode) else "unknown"


# --- the gateway's side -----------------------------------------------------------------------------------------------

_BASIC = frozenset({Kind.ENABLE, Kind.DISABLE, Kind.STOP, Kind.CLEAR_FAULT})
_MODES: Final[Mapping[Kind, Sequence[OperatingMode]]] = {
    Kind.POSITION: (OperatingMode.POSITION, OperatingMode.EXTENDED_POSITION, OperatingMode.CURRENT_POSITION),
    Kind.VELOCITY: (OperatingMode.VELOCITY,),
    Kind.TORQUE: (OperatingMode.CURRENT,),
}
_STANDSTILL: Final[Mapping[int, tuple[Register, Struct]]] = {  # what 0 stops in modes that hold no position
    OperatingMode.VELOCITY: (Register.GOAL_VELOCITY, Struct("<i")),
    OperatingMode.CURRENT: (Register.GOAL_CURRENT, Struct("<h")),
    OperatingMode.PWM: (Register.GOAL_PWM, Struct("<h")),
}
_GOAL_POSITION: Final = (Register.GOAL_POSITION, Struct("<i"))
REFRESH_TURNS: Final = 10  # every so many turns of ``refresh`` a healthy servo is read
REBOOT_READS: Final = 20  # a servo that is not back by then is found by being connected anew

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


@dataclass(slots=True)
class _Known:
    """What was learned about one servo."""

    nm_per_a: float | None
    ampere: float | None = None  # a unit of current
    fast: bool = False  # is polled by fast sync read, if the others are
    moving_threshold: int = 0
    enabled: bool = False
    alert: bool = False  # of its latest reply
    hardware_error: int = 0  # register 70, as last read; 0 also while an alert has not been looked into
    asked: bool = False  # by a poll, and has not replied yet
    answered: int = TRUSTED  # polls in a row
    turns: int = 0  # of refresh

    def hear(self, packet: Packet) -> None:
        """Take note of the alert bit, which every reply bears."""
        self.alert = bool(packet.error & ALERT)
        if not self.alert:
            self.hardware_error = 0

    def decode_feedback(self, packet: Packet) -> Feedback:
        """From a reply to a read of ``FEEDBACK``: position rad, velocity rad/s, V, C, A, N m.

        MOVING is what register 122 would tell: faster than the moving threshold (e-Manual, moving). An alert shows as
        FAULT_OTHER, and as ``ALERT`` in the vendor's word, until register 70 has been read.
        """
        current, velocity, position, voltage, temperature = FEEDBACK.layout.unpack(packet.params)
        status, vendor_error = Status(0), 0
        if self.enabled:
            status |= Status.ENABLED
        if abs(velocity) > self.moving_threshold:
            status |= Status.MOVING
        if self.alert:
            vendor_error = self.hardware_error or ALERT
            faults = [common for bit, common in _COMMON.items() if vendor_error & bit]
            for fault in faults or [Status.FAULT_OTHER]:
                status |= fault
        current_a = nan if self.ampere is None else current * self.ampere
        return Feedback(
            position_rad=decode_position(position),
            velocity_rad_s=velocity * RAD_S,
            temperature_c=float(temperature),
            voltage_v=voltage * VOLT,
            current_a=current_a,
            torque_nm=nan if self.nm_per_a is None else current_a * self.nm_per_a,
            status=int(status),
            vendor_error=vendor_error,
        )


class Dynamixel2(Family[bytes, Packet]):
    """X series servos.

    ``ENABLED`` is not in the polled block: registers 64..70 are read once a second, and within a tenth of one after an
    alert. A block that reaches from torque enable to temperature would be four times as long; mapping the registers
    together (indirect addresses) would take from other programs what they may have mapped there.

    A lost block of a fast reply takes those behind it along: they wait for it, and their checksums count on it. So
    servos of which one missed a poll are asked by plain sync read until that one has answered ``TRUSTED`` in a row, or
    is offline. Only one request is on the wire at a time: if any servo that is asked does not know fast sync read, all
    are asked plainly.
    """

    name = "dynamixel2"
    medium = "serial"
    bus_ids = range(253)
    kinds = _BASIC | frozenset(_MODES)
    Options = Options
    examples = (Options(), Options(fast_sync=True), Options(mode="velocity"), Options(mode="current", nm_per_a=1.0))
    bit_rates = (57_600, 1_000_000, 2_000_000, 3_000_000, 4_000_000, 115_200, 9_600)
    refresh_ns = SECOND // REFRESH_TURNS

    def __init__(self, motors: Sequence[Motor]) -> None:
        super().__init__(motors)
        self._known = {bus_id: _Known(options_of(motor).nm_per_a) for bus_id, motor in self.motors.items()}
        longest = max(4 + STATE.size * 4 // 3, 1 + len(motors) * (FEEDBACK.size + 4))
        self._decoder = Decoder(longest, FEEDBACK.size)

    @classmethod
    def poll_bits(cls, motors: Sequence[Motor]) -> int:
        """One sync read and its replies, fast if all are configured so; a byte is ten bits (8N1)."""
        fast = all(options_of(motor).fast_sync for motor in motors)
        request = make_sync_read([motor.bus_id for motor in motors], FEEDBACK.address, FEEDBACK.size, fast)
        plain_reply = encode_packet(Packet(0, Instruction.STATUS, bytes(FEEDBACK.size)))
        replies = _HEAD.size + len(motors) * (FEEDBACK.size + 4) if fast else len(motors) * len(plain_reply)
        return 10 * (len(request) + replies)

    @classmethod
    def explain(cls, vendor_error: int) -> Sequence[str]:
        """The bits of register 70, in the e-Manual's words."""
        bits = [1 << place for place in range(vendor_error.bit_length()) if vendor_error >> place & 1]
        return [_explain_bit(bit) for bit in bits]

    @classmethod
    def kinds_of(cls, motor: Motor) -> frozenset[Kind]:
        """Of the setpoints, that of the configured mode: position if none is, torque only with ``nm_per_a``."""
        options = options_of(motor)
        mode = OperatingMode.POSITION if options.wanted_mode is None else options.wanted_mode
        setpoints = {kind for kind, modes in _MODES.items() if mode in modes}
        return _BASIC | (setpoints if options.nm_per_a else setpoints - {Kind.TORQUE})

    @classmethod
    def clashes(cls, motors: Sequence[Motor]) -> Iterator[tuple[Motor, str, str]]:
        """A mode that nothing can be ordered in."""
        for motor in motors:
            if options_of(motor).mode == "current" and not options_of(motor).nm_per_a:
                yield motor, "nm_per_a", 'is missing: mode = "current" takes torques, which it turns into currents'

    def unpack(self, unit: bytes) -> Iterable[Packet]:
        """Replies completed by ``unit``; echoes of requests are none."""
        packets = self._decoder.feed(unit)
        self.garbage = self._decoder.garbage
        return [packet for packet in packets if packet.instruction == Instruction.STATUS]

    def reset(self) -> None:
        """Forget half a packet."""
        self._decoder.reset()

    def poll(self, bus_ids: Sequence[int]) -> Exchange[bytes, Packet]:
        """One sync read of the 21 bytes from 126, which bring all of ``Feedback``; plain or fast, each time anew."""
        asked = frozenset(bus_ids)
        plain = make_sync_read(bus_ids, FEEDBACK.address, FEEDBACK.size)
        fast = all(self._known[bus_id].fast for bus_id in bus_ids)
        quick = make_sync_read(bus_ids, FEEDBACK.address, FEEDBACK.size, fast=True) if fast else plain
        requests = [quick]

        def begin() -> None:
            self.reset()
            known = [self._known[bus_id] for bus_id in bus_ids]
            for one in known:
                if one.asked:
                    one.answered = 0
                one.asked = True
            requests[0] = quick if all(one.answered >= TRUSTED for one in known) else plain

        def match(packet: Packet) -> Reply | None:
            if packet.bus_id not in asked or len(packet.params) != FEEDBACK.size:
                return None
            known = self._known[packet.bus_id]
            known.asked, known.answered = False, known.answered + 1
            known.hear(packet)
            return packet.bus_id, known.decode_feedback(packet)

        return Exchange(requests, asked, match, begin)

    def identify(self, bus_id: int) -> Procedure[bytes, Packet, MotorInfo | None]:
        """As ``connect``, which only reads; ``mode`` is told if it is not the factory's position mode."""
        info = yield from self.connect(bus_id)
        if info is not None:
            mode = int(info.details["mode"])
            if mode != OperatingMode.POSITION and name_mode(mode) in get_args(Mode):
                info.options["mode"] = name_mode(mode)
        return info

    def connect(self, bus_id: int) -> Procedure[bytes, Packet, MotorInfo | None]:
        """Ping the servo and read its settings; None if it is not there.

        Raises MotorRefused if it is, but does not answer to reads.
        """
        found = (yield self._ask(bus_id, make_ping(bus_id), IDENTITY.size)).get(bus_id)
        if found is None or len(found.params) != IDENTITY.size:
            return None
        number, firmware = IDENTITY.unpack(found.params)
        model = MODELS.get(number, f"model {number}")
        options = options_of(self.motors[bus_id])
        known = self._known[bus_id] = _Known(options.nm_per_a, ampere_of(model))
        known.fast = options.fast_sync and knows_fast_sync_read(model, firmware)
        try:
            state = yield from self._read_state(bus_id)
        except MotorRefused as refusal:
            told = f"{refusal.detail}, yet it answers to a ping: its status return level (register 68) must be 1 or 2"
            raise MotorRefused(refusal.reason, told) from refusal
        details: dict[str, float] = {
            "mode": state.mode,
            "status_return_level": state.status_return_level,
            "return_delay_us": state.return_delay * 2,
            "fast_sync": known.fast,
        }
        if state.mode == OperatingMode.POSITION:
            details |= {
                "min_position_rad": decode_position(state.min_position),
                "max_position_rad": decode_position(state.max_position),
            }
        return MotorInfo(model, str(firmware), details)

    def refresh(self, bus_id: int) -> Procedure[bytes, Packet, None] | None:
        """See whether the torque is still on, and what an alert is about; nothing to do in most turns."""
        known = self._known[bus_id]
        due = known.turns % REFRESH_TURNS == 0
        known.turns += 1
        return self._refresh(bus_id) if due or (known.alert and not known.hardware_error) else None

    def _refresh(self, bus_id: int) -> Procedure[bytes, Packet, None]:
        try:
            yield from self._read_control(bus_id)
        except MotorRefused:
            return  # silence is left to ``poll`` to notice

    def order(self, bus_id: int, order: Order) -> Procedure[bytes, Packet, str]:
        """Carry out an order; every write is a sync write, which none acknowledges, and is read back."""
        if order.kind not in self.kinds_of(self.motors[bus_id]):
            mode = options_of(self.motors[bus_id]).mode
            raise MotorRefused("unsupported", f"{self.name} has no order {order.kind} with mode = {mode or 'position'}")
        match order.kind:
            case Kind.ENABLE:
                return (yield from self._enable(bus_id))
            case Kind.DISABLE:
                yield from self._write_torque(bus_id, on=False)
                return "torque is off"
            case Kind.POSITION:
                return (yield from self._move(bus_id, order))
            case Kind.VELOCITY:
                return (yield from self._turn(bus_id, order))
            case Kind.TORQUE:
                return (yield from self._push(bus_id, order))
            case Kind.STOP:
                return (yield from self._stop(bus_id))
            case _:  # of the kinds that are left, only this one is among ``kinds``
                return (yield from self._clear_fault(bus_id))

    def _enable(self, bus_id: int) -> Procedure[bytes, Packet, str]:
        state = yield from self._read_state(bus_id)
        if state.hardware_error:
            raise MotorRefused("refused", f"{_name_errors(state.hardware_error)}; clear the fault first")
        wanted = options_of(self.motors[bus_id]).wanted_mode
        if wanted is not None and state.mode != wanted:
            state = yield from self._set_mode(bus_id, state, wanted)
        _check_watchdog(state)
        held = yield from self._hold(bus_id, state)
        yield from self._write_torque(bus_id, on=True)
        return f"enabled, {held}"

    def _set_mode(self, bus_id: int, state: State, mode: OperatingMode) -> Procedure[bytes, Packet, State]:
        """Change register 11, which the servo keeps; the change resets its profile, gains and goals."""
        if state.torque_enable:
            told = f"operating mode (register 11) is {_tell_mode(state.mode)}, not {_tell_mode(mode)}"
            raise MotorRefused("refused", f"{told}, and cannot be changed while the torque is on: disable first")
        yield _write(bus_id, Register.OPERATING_MODE, bytes((mode,)))
        state = yield from self._read_state(bus_id)
        if state.mode != mode:
            told = f"operating mode (register 11): sent {_tell_mode(mode)}, read {_tell_mode(state.mode)}"
            raise MotorRefused("refused", told)
        return state

    def _hold(self, bus_id: int, state: State) -> Procedure[bytes, Packet, str]:
        """Write the goal of standing still, whatever the mode."""
        if state.mode in _STANDSTILL:
            register, layout = _STANDSTILL[state.mode]
            yield from self._write_goal(bus_id, register, layout, 0)
            return f"{register.name.lower().replace('_', ' ')} is 0"
        if state.mode not in _MODES[Kind.POSITION]:
            raise MotorRefused("refused", f"operating mode (register 11) is {_tell_mode(state.mode)}")
        yield from self._write_goal(bus_id, *_GOAL_POSITION, state.present)
        return f"holding {decode_position(state.present):.4f} rad"

    def _move(self, bus_id: int, order: Order) -> Procedure[bytes, Packet, str]:
        if not (isfinite(order.value) and isfinite(order.velocity_rad_s) and order.velocity_rad_s >= 0):
            raise MotorRefused("malformed", f"position {order.value} rad at {order.velocity_rad_s} rad/s")
        state = yield from self._read_ready(bus_id, order.kind)
        if state.drive_mode & TIME_BASED:
            told = f"drive mode (register 10) is {state.drive_mode:#x}: a time-based profile knows no velocity"
            raise MotorRefused("refused", f"{told}; clear its bit 2")
        goal = encode_position(order.value)
        speed = encode_profile_velocity(order.velocity_rad_s, state.velocity_limit)
        low, high = -MOST_STEPS, MOST_STEPS
        if state.mode == OperatingMode.POSITION:
            low, high = state.min_position, state.max_position
        if not low <= goal <= high:
            raise MotorRefused("out_of_limits", f"{order.value} rad is {goal} step; the servo allows {low}..{high}")
        yield from self._write_goal(bus_id, Register.PROFILE_VELOCITY, _PROFILE_AND_GOAL, speed, goal)
        return f"going to {decode_position(goal):.4f} rad at {speed * RAD_S:.4f} rad/s"

    def _turn(self, bus_id: int, order: Order) -> Procedure[bytes, Packet, str]:
        if not isfinite(order.value):
            raise MotorRefused("malformed", f"velocity {order.value} rad/s")
        state = yield from self._read_ready(bus_id, order.kind)
        raw, limit = round(order.value / RAD_S), state.velocity_limit
        if abs(raw) > limit:
            told = f"{order.value} rad/s; the servo's velocity limit (register 44) is {limit * RAD_S:.4f} rad/s"
            raise MotorRefused("out_of_limits", told)
        yield from self._write_goal(bus_id, *_STANDSTILL[OperatingMode.VELOCITY], raw)
        return f"turning at {raw * RAD_S:.4f} rad/s"

    def _push(self, bus_id: int, order: Order) -> Procedure[bytes, Packet, str]:
        if not isfinite(order.value):
            raise MotorRefused("malformed", f"torque {order.value} N m")
        known = self._known[bus_id]
        if known.ampere is None or known.nm_per_a is None:
            raise MotorRefused("refused", "the unit of this model's current is not known, so no torque can be set")
        nm = known.ampere * known.nm_per_a
        state = yield from self._read_ready(bus_id, order.kind)
        raw, limit = round(order.value / nm), state.current_limit
        if abs(raw) > limit:
            told = f"{order.value} N m; the servo's current limit (register 38) allows {limit * nm:.4f} N m"
            raise MotorRefused("out_of_limits", told)
        yield from self._write_goal(bus_id, *_STANDSTILL[OperatingMode.CURRENT], raw)
        return f"pushing with {raw * nm:.4f} N m"

    def _stop(self, bus_id: int) -> Procedure[bytes, Packet, str]:
        state = yield from self._read_state(bus_id)
        if not state.torque_enable:
            return "torque is off already"
        if state.goals.watchdog == WATCHDOG_EXPIRED:
            return "its bus watchdog has stopped it already"
        return (yield from self._hold(bus_id, state))

    def _clear_fault(self, bus_id: int) -> Procedure[bytes, Packet, str]:
        """Reboot, the only way to clear a hardware error; done when the servo has acknowledged it or is back.

        How long it is away is up to the servo: one that needs longer than these reads is connected anew.
        """
        _torque, error = yield from self._read_control(bus_id)
        if not error:
            return "no fault"
        reboot = encode_packet(Packet(bus_id, Instruction.REBOOT))
        acknowledged = bus_id in (yield self._ask(bus_id, reboot, 0))
        for _ in range(REBOOT_READS):
            try:
                torque, error = yield from self._read_control(bus_id)
            except MotorRefused:
                error = 0
                continue
            if not error:
                return f"rebooted, no fault, torque is {'on' if torque else 'off'}"
        if error:
            raise MotorRefused("refused", f"after the reboot: {_name_errors(error)}")
        if not acknowledged:
            raise MotorRefused(
                "no_reply", f"no reply to reboot from servo {bus_id}, nor to {REBOOT_READS} reads after it"
            )
        self._known[bus_id].enabled = False
        return "rebooting, as it has acknowledged; it comes back with its torque off"

    def _read_ready(self, bus_id: int, kind: Kind) -> Procedure[bytes, Packet, State]:
        """The state of a servo that can take a setpoint of this kind; raises MotorRefused if it cannot."""
        state = yield from self._read_state(bus_id)
        if not state.torque_enable:
            fault = f"; {_name_errors(state.hardware_error)}" if state.hardware_error else ""
            raise MotorRefused("not_enabled", f"torque enable (register 64) is {state.torque_enable}{fault}")
        if state.mode not in _MODES[kind]:
            modes = " or ".join(mode.name.lower() for mode in _MODES[kind])
            told = f"operating mode (register 11) is {_tell_mode(state.mode)}, which takes no {kind}"
            raise MotorRefused("refused", f"{told}: configure mode = {modes}, then disable and enable")
        _check_watchdog(state)
        return state

    def _read_state(self, bus_id: int) -> Procedure[bytes, Packet, State]:
        state = State.decode((yield from self._read(bus_id, STATE)))
        known = self._known[bus_id]
        known.enabled = bool(state.torque_enable)
        known.hardware_error = state.hardware_error
        known.moving_threshold = state.moving_threshold
        return state

    def _read_control(self, bus_id: int) -> Procedure[bytes, Packet, tuple[int, int]]:
        """Torque enable and hardware error."""
        torque, _level, error = CONTROL.layout.unpack((yield from self._read(bus_id, CONTROL)))
        self._known[bus_id].enabled = bool(torque)
        self._known[bus_id].hardware_error = error
        return torque, error

    def _read(self, bus_id: int, block: Block) -> Procedure[bytes, Packet, bytes]:
        request = make_sync_read([bus_id], block.address, block.size)
        packet: Packet | None = (yield self._ask(bus_id, request, block.size)).get(bus_id)
        if packet is None:
            raise MotorRefused("no_reply", f"no reply to a read of {block} from servo {bus_id}")
        if len(packet.params) != block.size:
            raise MotorRefused("refused", f"read of {block}: {_name_error(packet.error)}")
        return packet.params

    def _ask(self, bus_id: int, request: bytes, size: int) -> Exchange[bytes, Packet]:
        """An exchange with one servo: its reply has ``size`` parameters, or none and an error."""

        def match(packet: Packet) -> Reply | None:
            refused = not packet.params and packet.error & ~ALERT
            if packet.bus_id != bus_id or (len(packet.params) != size and not refused):
                return None
            self._known[bus_id].hear(packet)
            return bus_id, packet

        return Exchange([request], frozenset({bus_id}), match, self.reset)

    def _write_torque(self, bus_id: int, on: bool) -> Procedure[bytes, Packet, None]:
        yield _write(bus_id, Register.TORQUE_ENABLE, bytes((on,)))
        torque, error = yield from self._read_control(bus_id)
        if torque != on:
            fault = f"; {_name_errors(error)}" if error else ""
            raise MotorRefused("refused", f"torque enable (register 64): sent {on:d}, read {torque}{fault}")

    def _write_goal(
        self, bus_id: int, register: Register, layout: Struct, *values: int
    ) -> Procedure[bytes, Packet, None]:
        """Write registers among ``GOALS`` and read them back."""
        yield _write(bus_id, register, layout.pack(*values))
        read = layout.unpack_from((yield from self._read(bus_id, GOALS)), register - GOALS.address)
        if read != values:
            sent, got = (" and ".join(map(str, numbers)) for numbers in (values, read))
            raise MotorRefused("refused", f"{register.name.lower()} (register {register}): sent {sent}, read {got}")


def _write(bus_id: int, register: Register, data: bytes) -> Exchange[bytes, Packet]:
    """Write to one servo by sync write, which none answers: nothing to wait for."""
    return Exchange([make_sync_write(register, {bus_id: data})], frozenset(), lambda _: None)


def _check_watchdog(state: State) -> None:
    if state.goals.watchdog == WATCHDOG_EXPIRED:
        told = "its bus watchdog (register 98) has expired: it takes no goals until 0 is written there"
        raise MotorRefused("refused", told)


def _tell_mode(mode: int) -> str:
    return f"{mode} ({name_mode(mode)})"


def _name_error(error: int) -> str:
    number = error & ~ALERT
    return f"{Error(number).name.lower()} error" if number in set(Error) else f"error {number}"


def _name_errors(hardware_error: int) -> str:
    return f"hardware error status (register 70): {', '.join(Dynamixel2.explain(hardware_error))}"


def _explain_bit(bit: int) -> str:
    if bit == ALERT:
        return "alert; the hardware error has not been read yet"
    name = HardwareError(bit).name if bit in set(HardwareError) else None
    return f"{name.lower().replace('_', ' ')} error" if name else f"hardware error {bit:#x}"


# --- the servos' side -------------------------------------------------------------------------------------------------

_MEMORY_SIZE = 147
_MODEL, _FIRMWARE = 1020, 48  # XM430-W350
_AMPERE = AMPERE["XM"]
_RETURN_READS, _RETURN_ALL = 1, 2  # values of the status return level
_WATCHDOG_NS = 20 * MS
_MOST_PWM = 885

_EEPROM: Final = {  # register: (size, default, lowest, highest); of XM430-W350, but for the return delay
    Register.ID: (1, 1, 0, 252),
    Register.BAUD_RATE: (1, 1, 0, 7),
    Register.RETURN_DELAY_TIME: (1, 0, 0, 254),
    Register.DRIVE_MODE: (1, 0, 0, 13),
    Register.OPERATING_MODE: (1, OperatingMode.POSITION, 0, 16),
    Register.SECONDARY_ID: (1, 255, 0, 255),
    Register.PROTOCOL_TYPE: (1, 2, 2, 2),
    Register.HOMING_OFFSET: (4, 0, -1_044_479, 1_044_479),
    Register.MOVING_THRESHOLD: (4, 10, 0, 1023),
    Register.TEMPERATURE_LIMIT: (1, 80, 0, 100),
    Register.MAX_VOLTAGE_LIMIT: (2, 160, 95, 160),
    Register.MIN_VOLTAGE_LIMIT: (2, 95, 95, 160),
    Register.PWM_LIMIT: (2, _MOST_PWM, 0, _MOST_PWM),
    Register.CURRENT_LIMIT: (2, 1193, 0, 1193),
    Register.ACCELERATION_LIMIT: (4, 32_767, 0, 32_767),
    Register.VELOCITY_LIMIT: (4, 350, 0, 1023),
    Register.MAX_POSITION_LIMIT: (4, 4095, 0, 4095),
    Register.MIN_POSITION_LIMIT: (4, 0, 0, 4095),
    Register.SHUTDOWN: (1, 0x34, 0, 0x3F),
}
_RAM: Final = {
    Register.TORQUE_ENABLE: (1, 0, 0, 1),
    Register.LED: (1, 0, 0, 1),
    Register.STATUS_RETURN_LEVEL: (1, _RETURN_ALL, 0, _RETURN_ALL),
    Register.VELOCITY_I_GAIN: (2, 1920, 0, 16_383),
    Register.VELOCITY_P_GAIN: (2, 100, 0, 16_383),
    Register.POSITION_D_GAIN: (2, 0, 0, 16_383),
    Register.POSITION_I_GAIN: (2, 0, 0, 16_383),
    Register.POSITION_P_GAIN: (2, 800, 0, 16_383),
    Register.FEEDFORWARD_2ND_GAIN: (2, 0, 0, 16_383),
    Register.FEEDFORWARD_1ST_GAIN: (2, 0, 0, 16_383),
    Register.BUS_WATCHDOG: (1, 0, 0, 127),
    Register.GOAL_PWM: (2, _MOST_PWM, -_MOST_PWM, _MOST_PWM),
    Register.GOAL_CURRENT: (2, 1193, -1193, 1193),
    Register.GOAL_VELOCITY: (4, 0, -1023, 1023),
    Register.PROFILE_ACCELERATION: (4, 0, 0, MOST_PROFILE),
    Register.PROFILE_VELOCITY: (4, 0, 0, MOST_PROFILE),
    Register.GOAL_POSITION: (4, CENTRE_STEP, -MOST_STEPS, MOST_STEPS),
}
_WRITABLE: Final = _EEPROM | _RAM
_LIMITS: Final = {  # register: the one that holds the most it may be, either way
    Register.GOAL_PWM: Register.PWM_LIMIT,
    Register.GOAL_CURRENT: Register.CURRENT_LIMIT,
    Register.GOAL_VELOCITY: Register.VELOCITY_LIMIT,
}
_GOAL_OF: Final[Mapping[int, Register]] = {
    **{mode: register for mode, (register, _) in _STANDSTILL.items()},
    **dict.fromkeys(_MODES[Kind.POSITION], Register.GOAL_POSITION),
}


class _Servo:
    """One simulated servo: its registers over its physics."""

    def __init__(self, simulated: SimulatedMotor) -> None:
        self.simulated = simulated
        self.registered = b""  # parameters of a reg-write that waits for its action
        self.heard_ns = MonotonicNs(0)
        servo = simulated.servo
        options = options_of(simulated.motor)
        # N m a unit of current: as its configuration has it, so that what is ordered is what the physics does
        self._nm = _AMPERE * (options.nm_per_a or servo.limits.nm_per_a)
        self._memory = bytearray(_MEMORY_SIZE)
        _TAIL.pack_into(self._memory, Register.MODEL_NUMBER, _MODEL)
        self._memory[Register.FIRMWARE_VERSION] = _FIRMWARE
        for register, (_, default, _, _) in _WRITABLE.items():
            self._set(register, default)
        self._set(Register.ID, simulated.motor.bus_id)
        if servo.enabled and options.wanted_mode is not None:  # whoever enabled it has set its mode
            self._set(Register.OPERATING_MODE, options.wanted_mode)
        low, high = (encode_position(rad) for rad in servo.limits.position_rad)
        self._set(Register.MIN_POSITION_LIMIT, min(max(low, 0), STEPS_PER_TURN - 1))
        self._set(Register.MAX_POSITION_LIMIT, min(max(high, 0), STEPS_PER_TURN - 1))
        self._set(Register.GOAL_POSITION, self._position)

    @property
    def bus_id(self) -> int:
        return self._memory[Register.ID]

    @property
    def reply_id(self) -> int:
        wrong = self.simulated.faults.wrong_id
        return self.bus_id if wrong is None else wrong

    @property
    def status_return_level(self) -> int:
        return self._memory[Register.STATUS_RETURN_LEVEL]

    @property
    def return_delay_ns(self) -> int:
        return 2000 * self._memory[Register.RETURN_DELAY_TIME]

    @property
    def alert(self) -> int:
        """The top bit of ERR."""
        return ALERT if self._memory[Register.HARDWARE_ERROR_STATUS] else 0

    def protect(self, now: MonotonicNs) -> None:
        """Notice hardware errors, which stay, and a bus that nobody talks on; switch the torque off, or stop."""
        servo, memory = self.simulated.servo, self._memory
        errors = HardwareError(memory[Register.HARDWARE_ERROR_STATUS])
        low, high = self._get(Register.MIN_VOLTAGE_LIMIT), self._get(Register.MAX_VOLTAGE_LIMIT)
        if not low <= servo.voltage_v / VOLT <= high:
            errors |= HardwareError.INPUT_VOLTAGE
        if servo.temperature_c > memory[Register.TEMPERATURE_LIMIT]:
            errors |= HardwareError.OVERHEATING
        memory[Register.HARDWARE_ERROR_STATUS] = errors
        if errors & memory[Register.SHUTDOWN] and servo.enabled:
            servo.disable()
        watchdog = memory[Register.BUS_WATCHDOG]
        if servo.enabled and 0 < watchdog < WATCHDOG_EXPIRED and now - self.heard_ns > watchdog * _WATCHDOG_NS:
            memory[Register.BUS_WATCHDOG] = WATCHDOG_EXPIRED
            servo.turn_at(0.0)

    def read(self, address: int, size: int) -> bytes | None:
        """Registers as they are now; None beyond the memory."""
        if size == 0 or address + size > _MEMORY_SIZE:
            return None
        servo = self.simulated.servo
        velocity = round(servo.velocity_rad_s / RAD_S)
        self._memory[Register.TORQUE_ENABLE] = servo.enabled
        self._memory[Register.MOVING] = abs(velocity) > self._get(Register.MOVING_THRESHOLD)
        FEEDBACK.layout.pack_into(
            self._memory,
            FEEDBACK.address,
            min(max(round(servo.torque_nm / self._nm), -0x8000), 0x7FFF),
            velocity,
            self._position,
            round(servo.voltage_v / VOLT),
            as_byte(servo.temperature_c),
        )
        return bytes(self._memory[address : address + size])

    def write(self, address: int, data: bytes) -> Error | None:
        """Take all of ``data``, or nothing and tell why."""
        error = self._find_error(address, data)
        if error is not None:
            return error
        self._memory[address : address + len(data)] = data
        touched = range(address, address + len(data))
        if Register.OPERATING_MODE in touched:
            self._change_mode()
        if Register.TORQUE_ENABLE in touched:
            self._set_torque(bool(self._memory[Register.TORQUE_ENABLE]))
        if _GOAL_OF[self._memory[Register.OPERATING_MODE]] in touched:
            self._follow_goal()
        return None

    def reboot(self) -> None:
        """As at power-up: what is in RAM is forgotten, hardware errors too, and the torque is off."""
        self.simulated.servo.disable()
        self.registered = b""
        self._memory[Register.HARDWARE_ERROR_STATUS] = 0
        for register, (_, default, _, _) in _RAM.items():
            self._set(register, default)
        self._set(Register.GOAL_POSITION, self._position)

    @property
    def _offset(self) -> int:
        """The homing offset; more than a quarter turn is ignored in position mode (e-Manual, homing offset)."""
        offset = self._get(Register.HOMING_OFFSET)
        single = self._memory[Register.OPERATING_MODE] == OperatingMode.POSITION
        return 0 if single and abs(offset) > STEPS_PER_TURN // 4 else offset

    @property
    def _position(self) -> int:
        return encode_position(self.simulated.servo.measured_rad) + self._offset

    def _set(self, register: Register, value: int) -> None:
        size, _, low, _ = _WRITABLE[register]
        self._memory[register : register + size] = value.to_bytes(size, "little", signed=low < 0)

    def _get(self, register: Register) -> int:
        return self._value(self._memory, register)

    @staticmethod
    def _value(memory: bytearray, register: Register) -> int:
        size, _, low, _ = _WRITABLE[register]
        return int.from_bytes(memory[register : register + size], "little", signed=low < 0)

    def _find_error(self, address: int, data: bytes) -> Error | None:
        after = bytearray(self._memory)
        after[address : address + len(data)] = data
        left = set(range(address, address + len(data)))
        if not data or len(after) > _MEMORY_SIZE:
            return Error.ACCESS
        for register, (size, _, low, high) in _WRITABLE.items():
            covered = set(range(register, register + size))
            if left.isdisjoint(covered):
                continue
            if not covered <= left:
                return Error.LENGTH
            left -= covered
            value = self._value(after, register)
            if register in _EEPROM and self.simulated.servo.enabled:
                return Error.ACCESS
            if not low <= value <= high or (register in _GOAL_OF.values() and self._watchdog_expired):
                return Error.RANGE
            if register == Register.OPERATING_MODE and value not in _GOAL_OF:
                return Error.RANGE
            if not self._within_limits(register, value):
                return Error.LIMIT
        return Error.ACCESS if left else None

    @property
    def _watchdog_expired(self) -> bool:
        return self._memory[Register.BUS_WATCHDOG] == WATCHDOG_EXPIRED

    def _within_limits(self, register: Register, value: int) -> bool:
        if register == Register.GOAL_POSITION and self._memory[Register.OPERATING_MODE] == OperatingMode.POSITION:
            return self._get(Register.MIN_POSITION_LIMIT) <= value <= self._get(Register.MAX_POSITION_LIMIT)
        return register not in _LIMITS or abs(value) <= self._get(_LIMITS[register])

    def _change_mode(self) -> None:
        """What a change of the operating mode resets (e-Manual, operating mode)."""
        self._set(Register.PROFILE_VELOCITY, 0)
        self._set(Register.PROFILE_ACCELERATION, 0)
        self._set(Register.GOAL_PWM, self._get(Register.PWM_LIMIT))
        self._set(Register.GOAL_CURRENT, self._get(Register.CURRENT_LIMIT))

    def _set_torque(self, on: bool) -> None:
        servo = self.simulated.servo
        if servo.motion is not None:  # whoever kept it going had its goal about here
            self._set(Register.GOAL_POSITION, self._position)
        if not on:
            servo.disable()
        elif not self._memory[Register.HARDWARE_ERROR_STATUS] & self._memory[Register.SHUTDOWN]:
            servo.enable()
            self._follow_goal()  # a goal from before is taken up at once: the reason why a master writes the goal first

    def _follow_goal(self) -> None:
        servo = self.simulated.servo
        if not servo.enabled:
            return
        match self._memory[Register.OPERATING_MODE]:
            case OperatingMode.VELOCITY:
                servo.turn_at(self._get(Register.GOAL_VELOCITY) * RAD_S)
            case OperatingMode.CURRENT:
                servo.push(self._get(Register.GOAL_CURRENT) * self._nm)
            case OperatingMode.PWM:
                servo.turn_at(self._get(Register.GOAL_PWM) / _MOST_PWM * servo.limits.velocity_rad_s)
            case _:
                speed = self._get(Register.PROFILE_VELOCITY) * RAD_S
                goal = self._get(Register.GOAL_POSITION) - self._offset
                servo.move_to(decode_position(goal), speed or servo.limits.velocity_rad_s)


_Asked = tuple[_Servo, int, int]  # servo, address, size


class SimulatedX(Responder[bytes]):
    """Simulated XM430-W350: ping, read, write, reg-write and action, reboot; sync, bulk, fast sync and fast bulk.

    A factory reset is refused. A goal written with the torque off moves nothing; it is taken up when the torque comes
    on. Drive mode and profile acceleration can be set and change nothing. In a fast reply each servo counts on what is
    on the wire before it: one that keeps silent is left out, as if those behind it had not waited for it.
    """

    def __init__(self, motors: Sequence[SimulatedMotor]) -> None:
        super().__init__(motors)
        self._servos = [_Servo(simulated) for simulated in motors]
        self._decoder = Decoder()
        self._now = MonotonicNs(0)

    def reboot(self, simulated: SimulatedMotor) -> None:
        """Power-up: as ``_Servo.reboot``."""
        for servo in self._servos:
            if servo.simulated is simulated:
                servo.reboot()

    def return_delay_ns(self, simulated: SimulatedMotor) -> int:
        """Register 9."""
        return next(servo.return_delay_ns for servo in self._servos if servo.simulated is simulated)

    def tick(self, now: MonotonicNs) -> Iterable[tuple[SimulatedMotor, bytes]]:
        """The servos watch over themselves; none speaks unasked."""
        self._now = now
        for servo in self._servos:
            servo.protect(now)
        return ()

    def respond(self, unit: bytes) -> Iterator[tuple[SimulatedMotor, bytes]]:
        """Replies to the requests completed by ``unit``."""
        for packet in self._decoder.feed(unit):
            for servo in self._servos:
                servo.heard_ns = self._now
                servo.protect(self._now)
            for servo, reply in self._execute(packet):
                yield servo.simulated, reply

    def _execute(self, packet: Packet) -> Iterator[tuple[_Servo, bytes]]:
        bus_id, instruction, params, _ = packet
        match instruction:
            case Instruction.STATUS:
                return  # an echo, or a servo of another bus's simulation
            case Instruction.SYNC_READ | Instruction.FAST_SYNC_READ if len(params) > 4:
                address, size = _ADDRESS.unpack_from(params)
                asked = [(servo, address, size) for one in params[4:] for servo in self._find(one)]
                yield from _reply_to_reads(asked, fast=instruction == Instruction.FAST_SYNC_READ)
            case Instruction.BULK_READ | Instruction.FAST_BULK_READ if params and len(params) % _BULK.size == 0:
                reads = _BULK.iter_unpack(params)
                asked = [(servo, address, size) for one, address, size in reads for servo in self._find(one)]
                yield from _reply_to_reads(asked, fast=instruction == Instruction.FAST_BULK_READ)
            case Instruction.SYNC_WRITE if len(params) > 4:
                address, size = _ADDRESS.unpack_from(params)
                for at in range(4, len(params) - size, size + 1):
                    for servo in self._find(params[at]):
                        servo.write(address, params[at + 1 : at + 1 + size])
            case Instruction.BULK_WRITE:
                self._write_in_bulk(params)
            case Instruction.PING:
                for servo in sorted(self._find(bus_id), key=lambda one: one.bus_id):
                    yield servo, _make_status(servo, IDENTITY.pack(_MODEL, _FIRMWARE))
            case Instruction.READ if bus_id != BROADCAST and len(params) == _ADDRESS.size:
                yield from _reply_to_reads([(servo, *_ADDRESS.unpack(params)) for servo in self._find(bus_id)])
            case Instruction.REBOOT:
                for servo in self._find(bus_id):
                    if bus_id != BROADCAST and servo.status_return_level == _RETURN_ALL:
                        yield servo, _make_status(servo)  # the alert is still in it
                    servo.reboot()
            case _:
                for servo in self._find(bus_id):
                    error = _take(servo, instruction, params)
                    if bus_id != BROADCAST and servo.status_return_level == _RETURN_ALL:
                        yield servo, _make_status(servo, error=error or 0)

    def _write_in_bulk(self, params: bytes) -> None:
        while len(params) > _BULK.size:
            bus_id, address, size = _BULK.unpack_from(params)
            for servo in self._find(bus_id):
                servo.write(address, params[_BULK.size : _BULK.size + size])
            params = params[_BULK.size + size :]

    def _find(self, bus_id: int) -> list[_Servo]:
        return [servo for servo in self._servos if bus_id in {servo.bus_id, BROADCAST}]


def _take(servo: _Servo, instruction: int, params: bytes) -> Error | None:
    match instruction:
        case Instruction.WRITE if len(params) > 2:
            return servo.write(int.from_bytes(params[:2], "little"), params[2:])
        case Instruction.REG_WRITE if len(params) > 2:
            servo.registered = params
            return None
        case Instruction.ACTION if servo.registered:
            params, servo.registered = servo.registered, b""
            return servo.write(int.from_bytes(params[:2], "little"), params[2:])
        case Instruction.FACTORY_RESET:
            return Error.RESULT
        case _:
            return Error.INSTRUCTION


def _make_status(servo: _Servo, params: bytes = b"", error: int = 0) -> bytes:
    return encode_packet(Packet(servo.reply_id, Instruction.STATUS, params, servo.alert | error))


def _reply_to_reads(asked: Sequence[_Asked], fast: bool = False) -> Iterator[tuple[_Servo, bytes]]:
    allowed = [one for one in asked if one[0].status_return_level >= _RETURN_READS]
    if fast:
        yield from _make_fast_reply(allowed)
        return
    for servo, address, size in allowed:
        data = servo.read(address, size)
        yield servo, _make_status(servo, data or b"", 0 if data else Error.ACCESS)


def _make_fast_reply(asked: Sequence[_Asked]) -> Iterator[tuple[_Servo, bytes]]:
    """The part of each servo: the first that speaks begins the packet, with the length that all of them make."""
    length = 1 + sum(size + 4 for _, _, size in asked)
    head = before = _HEAD.pack(HEADER, BROADCAST, length, Instruction.STATUS)
    for servo, address, size in asked:
        if servo.simulated.faults.silent:
            continue
        data = servo.read(address, size)
        block = bytes((servo.alert | (0 if data else Error.ACCESS), servo.reply_id)) + (data or bytes(size))
        crc = compute_crc(before + block)
        yield servo, head + block + _TAIL.pack(crc)
        head, before = b"", continue_crc(crc)


FAMILY: type[Family[Any, Any]] = Dynamixel2
SIMULATED: type[Responder[Any]] = SimulatedX
