"""MyActuator RMD-X motors on CAN: the codec, the gateway's side, the motors' side.

    140 + id  command     code argument*7               (280: the same to all motors; each answers for itself)
    240 + id  reply       code value*7
              9A          code T brake_T brake V16 error16             (byte 2: MOS temperature from V4.3 on)
              9C A1 A2 A4 code T iq16 speed16 angle16                  (C, 0.01 A, deg/s, deg)
              92          code 0 0 0 angle32                           (0.01 deg)
              70          code 0 0 0 0 0 0 loop
              B3          the command itself
              F1          unasked: its timeout (B3) has stopped it, once a second
              76          none: it restarts;  77 78 80 81: the command itself
    A1        torque      code 0 0 0 iq16 0 0           (0.01 A)
    A2        speed       code 0 0 0 speed32            (0.01 deg/s)
    A4        position    code 0 max_speed16 angle32    (deg/s, 0.01 deg)
    B3        timeout     code 0 0 0 time32             (ms, 0: none)

Little-endian; always eight bytes. All replies of a motor share one identifier: they are told apart by their code, so
that the reply to an order never passes for a poll's. Own requests have identifiers on which no motor replies, and ids
1 to 32 keep all of them apart: nothing can clash between motors of this family.

Sources: MyActuator Motor Motion Protocol V4.2 and V4.4; 2b-t/myactuator_rmd test/protocol and actuator_state. What a
motor does after its timeout: 2b-t/myactuator_rmd_ros pull request 4.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag
from math import inf, isfinite, nan, radians
from struct import Struct
from typing import Any, Final, NamedTuple

from drivers.clock import MS, SECOND, MonotonicNs
from drivers.errors import MotorRefused
from drivers.family import CAN_FRAME_BITS, CanFrame, CanId, Exchange, Family, Overheard, Procedure, Ready, Reply
from drivers.motor import SETPOINTS, Feedback, Kind, Motor, MotorInfo, Order, Status, bits_of, common_faults
from drivers.sim.responder import Responder, SimulatedMotor
from drivers.sim.servo import Drive

COMMAND_ID: Final = 0x140
REPLY_ID: Final = 0x240
ALL_MOTORS_ID: Final = 0x280
MOTION_ID: Final = 0x400  # motion mode: a command that moves the motor, not used here, ...
MOTION_REPLY_ID: Final = 0x500  # ... and its reply

AMPERE: Final = 0.01
VOLT: Final = 0.1
RAD_PER_DEG: Final = radians(1)
RAD_PER_CENTIDEGREE: Final = radians(0.01)
HOLD_DPS: Final = 57  # of the small way back to the point where a motor was told to hold

_STATUS_1 = Struct("<BbxBHH")
_STATUS_2 = Struct("<Bbhhh")
_LONG = Struct("<B3xi")
_TORQUE = Struct("<B3xh2x")
_POSITION = Struct("<BxHi")
_TIMEOUT = Struct("<B3xI")


class Command(IntEnum):
    """First byte of a command and of its reply (Motor Motion Protocol, chapter 2)."""

    OPERATING_MODE = 0x70
    RESET = 0x76
    BRAKE_RELEASE = 0x77
    BRAKE_LOCK = 0x78
    SHUTDOWN = 0x80
    STOP = 0x81
    MULTI_TURN_ANGLE = 0x92
    STATUS_1 = 0x9A
    STATUS_2 = 0x9C
    TORQUE = 0xA1
    SPEED = 0xA2
    POSITION = 0xA4
    VERSION_DATE = 0xB2
    TIMEOUT = 0xB3
    MODEL = 0xB5
    TIMED_OUT = 0xF1


class Loop(IntEnum):
    """Reply to 70: the loop that is closed (Motor Motion Protocol; NONE: myactuator_rmd control_mode.hpp)."""

    NONE = 0
    CURRENT = 1
    SPEED = 2
    POSITION = 3


ECHOED: Final = frozenset({Command.BRAKE_RELEASE, Command.BRAKE_LOCK, Command.SHUTDOWN, Command.STOP, Command.TIMEOUT})
"""Commands that a motor acknowledges by sending them back."""
CLOSED: Final = frozenset({Loop.CURRENT, Loop.SPEED, Loop.POSITION})


class Error(IntFlag):
    """Error bits of 9A (Motor Motion Protocol V4.4, read motor status 1)."""

    MOTOR_STALL = 0x0002
    LOW_VOLTAGE = 0x0004
    OVER_VOLTAGE = 0x0008
    OVER_CURRENT = 0x0010
    POWER_OVERRUN = 0x0040
    CALIBRATION_WRITING = 0x0080
    OVERSPEED = 0x0100
    COMPONENT_OVER_TEMPERATURE = 0x0800
    MOTOR_OVER_TEMPERATURE = 0x1000
    ENCODER_CALIBRATION = 0x2000
    ENCODER_DATA = 0x4000


COMMON: Final[Mapping[int, Status]] = {
    Error.MOTOR_STALL: Status.FAULT_OVERLOAD,
    Error.LOW_VOLTAGE: Status.FAULT_VOLTAGE,
    Error.OVER_VOLTAGE: Status.FAULT_VOLTAGE,
    Error.OVER_CURRENT: Status.FAULT_CURRENT,
    Error.POWER_OVERRUN: Status.FAULT_OVERLOAD,
    Error.COMPONENT_OVER_TEMPERATURE: Status.FAULT_TEMPERATURE,
    Error.MOTOR_OVER_TEMPERATURE: Status.FAULT_TEMPERATURE,
    Error.ENCODER_CALIBRATION: Status.FAULT_ENCODER,
    Error.ENCODER_DATA: Status.FAULT_ENCODER,
}


# --- frames -----------------------------------------------------------------------------------------------------------


class Status1(NamedTuple):
    """A reply to 9A."""

    temperature_c: int
    brake_released: bool
    voltage_v: float
    errors: int  # Error, and bits that no page lists


class Status2(NamedTuple):
    """A reply to 9C, A1, A2 or A4."""

    temperature_c: int
    current_a: float
    velocity_rad_s: float
    position_rad: float  # to a degree


def make_command(bus_id: int, command: Command) -> CanFrame:
    """A command without arguments."""
    return CanFrame(COMMAND_ID + bus_id, bytes((command, 0, 0, 0, 0, 0, 0, 0)))


def make_torque(bus_id: int, current: int) -> CanFrame:
    """Close the current loop on a current, 0.01 A. It opens no brake."""
    return CanFrame(COMMAND_ID + bus_id, _TORQUE.pack(Command.TORQUE, current))


def make_speed(bus_id: int, speed: int) -> CanFrame:
    """Close the speed loop on a speed of the output shaft, 0.01 deg/s. Byte 1, a torque limit from V4.3 on: none."""
    return CanFrame(COMMAND_ID + bus_id, _LONG.pack(Command.SPEED, speed))


def make_position(bus_id: int, max_speed: int, angle: int) -> CanFrame:
    """Close the position loop on an angle of the output shaft, 0.01 deg; ``max_speed`` deg/s, 0 for no limit."""
    return CanFrame(COMMAND_ID + bus_id, _POSITION.pack(Command.POSITION, max_speed, angle))


def make_timeout(bus_id: int, timeout_ms: int) -> CanFrame:
    """Stop when nothing was heard for so long; 0: never. The motor writes it to its ROM."""
    return CanFrame(COMMAND_ID + bus_id, _TIMEOUT.pack(Command.TIMEOUT, timeout_ms))


def encode_status_1(status: Status1) -> bytes:
    """Data of a reply to 9A; C clipped to what a signed byte holds."""
    temperature = _clip(status.temperature_c, 8)
    voltage = min(round(status.voltage_v / VOLT), 0xFFFF)
    return _STATUS_1.pack(Command.STATUS_1, temperature, status.brake_released, voltage, status.errors)


def decode_status_1(data: bytes) -> Status1:
    """From the eight bytes of a reply to 9A."""
    _, temperature, brake, voltage, errors = _STATUS_1.unpack(data)
    return Status1(temperature, bool(brake), voltage * VOLT, errors)


def encode_status_2(command: int, status: Status2) -> bytes:
    """Data of a reply to 9C, A1, A2 or A4, each value clipped to what its field holds."""
    return _STATUS_2.pack(
        command,
        _clip(status.temperature_c, 8),
        _clip(status.current_a / AMPERE, 16),
        _clip(status.velocity_rad_s / RAD_PER_DEG, 16),
        _clip(status.position_rad / RAD_PER_DEG, 16),
    )


def decode_status_2(data: bytes) -> Status2:
    """From the eight bytes of a reply to 9C, A1, A2 or A4."""
    _, temperature, current, speed, angle = _STATUS_2.unpack(data)
    return Status2(temperature, current * AMPERE, speed * RAD_PER_DEG, angle * RAD_PER_DEG)


def encode_long(command: int, value: int) -> bytes:
    """Data of a frame with 32 signed bits from byte 4: 92, A2, B2."""
    return _LONG.pack(command, value)


def decode_long(data: bytes) -> int:
    """The inverse of ``encode_long``."""
    value: int = _LONG.unpack(data)[1]
    return value


def decode_model(data: bytes) -> str:
    """The motor's name for its model, from the eight bytes of a reply to B5."""
    return "".join(chr(letter) for letter in data[1:] if 0x20 < letter < 0x7F)


def encode_fixed(value: float, unit: float, bits: int) -> int:
    """``value`` in multiples of ``unit``. Raises ValueError if that does not fit into ``bits`` signed bits."""
    raw = round(value / unit)
    if not -(1 << bits - 1) <= raw < 1 << bits - 1:
        raise ValueError(f"{raw} does not fit into the {bits} bits of the command")
    return raw


def encode_max_speed(velocity_rad_s: float) -> int:
    """rad/s -> deg/s for A4: never faster than asked, and at least 1, because 0 stands for "no limit"."""
    return min(max(int(velocity_rad_s / RAD_PER_DEG), 1), 0xFFFF)


def _clip(value: float, bits: int) -> int:
    return min(max(round(value), -(1 << bits - 1)), (1 << bits - 1) - 1)


# --- the gateway's side -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Options:
    """``fine_position``: read the position to 0.01 deg, at the price of two more frames; without it, to 1 deg.

    ``nm_per_a``: the output shaft's torque per ampere of iq, from the motor's datasheet. Without it no torque is told
    or taken.
    """

    fine_position: bool = True
    nm_per_a: float | None = None

    def __post_init__(self) -> None:
        if self.nm_per_a is not None and not 0 < self.nm_per_a < inf:
            raise ValueError(f"nm_per_a is {self.nm_per_a}; it must be finite and above 0")


def options_of(motor: Motor) -> Options:
    """A motor's options, or the defaults."""
    return motor.options if isinstance(motor.options, Options) else Options()


@dataclass(slots=True)
class _Known:
    """What was learned about one motor."""

    armed: bool = False  # it was enabled from here, and nothing has ended that
    timeout: bool = False  # B3 was sent since it was connected
    timed_out: bool = False  # it has stopped itself, and was not enabled since
    echoed: bool = False  # its latest reply to a poll was the request itself
    loop: int | None = None  # as last read
    voltage_v: float = nan
    errors: int = 0  # as last read: an error stands until the motor takes it back
    faults: int = 0  # the same as bits of Status


class RmdX(Family[CanFrame, CanFrame]):
    """RMD-X motors by request and reply.

    ``ENABLED`` is what 70 last told: that a loop is closed. The manual lists the three loops and says that a motor that
    was shut down is in none, but not what 70 tells then; anything but the three is taken for that, except by ``stop``,
    which believes only 0. A motor that tells its last loop after 80 would read as enabled again at the next refresh
    (unverified on hardware).

    An RMD runs A1, A2 and A4 whenever it is not faulty, also after it was shut down. So none is sent before the motor
    was enabled from here, since it was last connected, shut down or in error. That somebody else enabled it is told,
    and is not enough.

    There is no ``clear_fault``: no command clears an error. Some go with their cause; a stall, an over-current or an
    encoder's need a restart, after which a motor that does not save its turns may count from elsewhere, and 76
    (restart) is not answered.

    Its watchdog is the timeout of B3: a motor that hears nothing for so long cuts its output and locks its brake, says
    F1 once a second, and answers the first command after that by sending it back, without obeying it. The motor
    writes the timeout to its ROM, where it outlasts the gateway, and does not tell it: so it is written once a
    connection, by ``enable``, before which no setpoint is taken. ``enable`` also ends it.
    """

    name = "rmd_x"
    medium = "can"
    bus_ids = range(1, 33)
    kinds = frozenset({Kind.ENABLE, Kind.DISABLE, Kind.POSITION, Kind.VELOCITY, Kind.TORQUE, Kind.STOP})
    Options = Options
    examples = (Options(), Options(nm_per_a=1.5))  # with 1 deg no position is as near as tests expect it
    bit_rates = (1_000_000, 500_000)
    refresh_ns = 200 * MS
    watchdog = True

    def __init__(self, motors: Sequence[Motor]) -> None:
        super().__init__(motors)
        self._known = {bus_id: _Known() for bus_id in self.motors}
        self._options = {bus_id: options_of(motor) for bus_id, motor in self.motors.items()}
        self._half: CanFrame | None = None  # the latest that a poll keeps until the other half comes

    @classmethod
    def poll_bits(cls, motors: Sequence[Motor]) -> int:
        """9C and its reply for each motor, and 92 and its reply for those with ``fine_position``."""
        return sum(4 if options_of(motor).fine_position else 2 for motor in motors) * CAN_FRAME_BITS

    @classmethod
    def explain(cls, vendor_error: int) -> Sequence[str]:
        """The error bits of 9A by name; a bit that no page lists by its value."""
        return [_words(bit) for bit in bits_of(vendor_error)]

    @classmethod
    def can_ids(cls, motor: Motor) -> Iterable[CanId]:
        """Commands, to this motor and to all, and their replies; those of the motion mode, too."""
        yield CanId(ALL_MOTORS_ID, "commands to all")
        yield CanId(COMMAND_ID + motor.bus_id, "commands")
        yield CanId(REPLY_ID + motor.bus_id, "replies")
        yield CanId(MOTION_ID + motor.bus_id, "motion mode commands")
        yield CanId(MOTION_REPLY_ID + motor.bus_id, "motion mode replies")

    @classmethod
    def kinds_of(cls, motor: Motor) -> frozenset[Kind]:
        """Torque only with ``nm_per_a``."""
        return cls.kinds if options_of(motor).nm_per_a is not None else cls.kinds - {Kind.TORQUE}

    def unpack(self, unit: CanFrame) -> Iterable[CanFrame]:
        """The frame itself, if it can be a motor's reply."""
        if unit.extended or unit.can_id - REPLY_ID not in self.bus_ids:
            return ()
        if len(unit.data) != 8 and unit.data != bytes((Command.TIMED_OUT,)):  # which is told to come without data
            self.garbage += unit.can_id - REPLY_ID in self.motors
            return ()
        return (unit,)

    def poll(self, bus_ids: Sequence[int]) -> Exchange[CanFrame, CanFrame]:
        """9C, and 92 with ``fine_position``, for each motor; a sample is put together from both, of one turn only."""
        requests: list[CanFrame] = []
        for bus_id in bus_ids:
            requests.append(make_command(bus_id, Command.STATUS_2))
            if self._options[bus_id].fine_position:
                requests.append(make_command(bus_id, Command.MULTI_TURN_ANGLE))
        asked = frozenset(bus_ids)
        fine = frozenset(bus_id for bus_id in bus_ids if self._options[bus_id].fine_position)
        statuses: dict[int, Status2] = {}
        angles: dict[int, float] = {}

        def begin() -> None:
            statuses.clear()
            angles.clear()

        def match(frame: CanFrame) -> Reply | None:
            bus_id, command = frame.can_id - REPLY_ID, frame.data[0]
            if bus_id in asked and self._is_echo(bus_id, frame.data):
                return None
            if command == Command.STATUS_2 and bus_id in asked:
                status = statuses[bus_id] = decode_status_2(frame.data)
                if bus_id not in fine:
                    angles[bus_id] = status.position_rad
            elif command == Command.MULTI_TURN_ANGLE and bus_id in fine:
                angles[bus_id] = decode_long(frame.data) * RAD_PER_CENTIDEGREE
            else:
                return None
            if bus_id in statuses and bus_id in angles:
                return bus_id, self._feedback(bus_id, statuses[bus_id], angles[bus_id])
            self._half = frame
            return None

        return Exchange(requests, asked, match, begin)

    def _is_echo(self, bus_id: int, data: bytes) -> bool:
        """Whether a reply to 9C is the request sent back: the motor had stopped itself, and answers the next ones.

        (At 0 C and 0 deg, at rest, a true one looks the same: what comes twice in a row is one.)
        """
        known = self._known[bus_id]
        if data[0] != Command.STATUS_2:
            return False
        echoed, known.echoed = known.echoed, not any(data[1:])
        if known.echoed and not echoed:
            known.timed_out, known.armed = True, False
        return known.echoed and not echoed

    def overhear(self, packet: CanFrame) -> Overheard | None:
        """F1; 9A, which a motor in error sends by itself if it was set so (20 03); a poll's first half, no stray."""
        bus_id = packet.can_id - REPLY_ID
        if bus_id in self._known and packet.data[0] == Command.TIMED_OUT:
            self._known[bus_id].timed_out, self._known[bus_id].armed = True, False
            return Overheard(bus_id)
        if packet is self._half:
            return Overheard(bus_id)
        if bus_id in self._known and packet.data[0] == Command.STATUS_1:
            self._note(bus_id, decode_status_1(packet.data))
            return Overheard(bus_id)
        return None

    def identify(self, bus_id: int) -> Procedure[CanFrame, CanFrame, MotorInfo | None]:
        """As ``connect``, which only reads."""
        return self.connect(bus_id)

    def connect(self, bus_id: int) -> Procedure[CanFrame, CanFrame, MotorInfo | None]:
        """Read version, model, status and loop. A motor older than V3.5 does not answer B5: its model stays open."""
        self._known[bus_id] = _Known(timed_out=self._known[bus_id].timed_out)
        request = make_command(bus_id, Command.VERSION_DATE)
        version = yield from self._ask(request)
        if version == request.data:  # the first command after its timeout
            self._known[bus_id].timed_out = True
            version = yield from self._ask(request)
        if version is None:
            return None
        model = yield from self._ask(make_command(bus_id, Command.MODEL))
        try:
            loop = yield from self._read_loop(bus_id)
            status = yield from self._read_status(bus_id)
        except MotorRefused:
            return None
        details = {"operating_mode": float(loop), "brake_released": float(status.brake_released)}
        named = f"RMD-{decode_model(model) if model else 'X'}"
        driven = loop in {Loop.CURRENT, Loop.SPEED}
        return MotorInfo(named, str(decode_long(version)), details, driven=driven)

    def refresh(self, bus_id: int) -> Procedure[CanFrame, CanFrame, None]:
        """Read loop, voltage and errors again; silence is left to ``poll`` to notice."""
        try:
            yield from self._read_loop(bus_id)
            yield from self._read_status(bus_id)
        except MotorRefused:
            self._known[bus_id].voltage_v = nan

    def order(self, bus_id: int, order: Order) -> Procedure[CanFrame, CanFrame, str]:
        """Carry out an order and see the motor's reply to it."""
        if order.kind not in self.kinds_of(self.motors[bus_id]):
            raise MotorRefused("unsupported", f"{self.motors[bus_id].name} ({self.name}) has no order {order.kind}")
        match order.kind:
            case Kind.ENABLE:
                return (yield from self._enable(bus_id))
            case Kind.DISABLE:
                return (yield from self._disable(bus_id))
            case Kind.STOP:
                return (yield from self._stop(bus_id))
            case _:
                return (yield from self.set_alone(bus_id, order))

    def prepare(self, bus_id: int, order: Order) -> Procedure[CanFrame, CanFrame, Ready]:
        """See that the motor was enabled from here, and still is."""
        if order.kind not in SETPOINTS & self.kinds_of(self.motors[bus_id]):
            raise MotorRefused("unsupported", f"{self.motors[bus_id].name} ({self.name}) has no setpoint {order.kind}")
        frame, done = self._make_setpoint(bus_id, order)
        yield from self._check_ready(bus_id)
        return Ready(frame, done)

    def fire(self, ready: Mapping[int, Ready]) -> Exchange[CanFrame, CanFrame]:
        """One burst of commands: that to all motors (280) has one value for all of them."""
        return _burst([one.trigger for one in ready.values()])

    def confirm(self, bus_id: int, ready: Ready, reply: Any) -> Procedure[CanFrame, CanFrame, str]:
        """The reply bears the code of the command: it is all that there is to see."""
        if reply is None:
            raise MotorRefused("no_reply", f"no reply to {ready.trigger} from motor {bus_id}")
        yield from ()
        return ready.told

    def halt(self, bus_ids: Iterable[int]) -> Exchange[CanFrame, CanFrame]:
        """81, in one frame to all if none of the bus is known to be off: what it does to such a motor is not told."""
        on = [bus_id for bus_id in bus_ids if self._known[bus_id].loop in CLOSED]
        if len(on) == len(self.motors):
            to_all = CanFrame(ALL_MOTORS_ID, make_command(0, Command.STOP).data)
            return replace(_burst([make_command(bus_id, Command.STOP) for bus_id in on]), requests=[to_all])
        return _burst([make_command(bus_id, Command.STOP) for bus_id in on])

    def _enable(self, bus_id: int) -> Procedure[CanFrame, CanFrame, str]:
        """Hold where it is, then open the brake: the other way round the load would fall meanwhile."""
        known = self._known[bus_id]
        status = yield from self._read_status(bus_id)
        if status.errors:
            raise MotorRefused("refused", f"the motor reports {', '.join(self.explain(status.errors))}")
        yield from self._arm(bus_id)
        angle = decode_long((yield from self._command(make_command(bus_id, Command.MULTI_TURN_ANGLE))))
        yield from self._command(make_position(bus_id, HOLD_DPS, angle))
        yield from self._command_echoed(make_command(bus_id, Command.BRAKE_RELEASE))
        loop = yield from self._read_loop(bus_id)
        if loop != Loop.POSITION:
            raise MotorRefused("refused", f"operating mode (70) is {loop} after A4, not {Loop.POSITION:d}")
        known.armed, known.timed_out = True, False
        return f"enabled, holding {angle * RAD_PER_CENTIDEGREE:.4f} rad"

    def _arm(self, bus_id: int) -> Procedure[CanFrame, CanFrame, None]:
        """Write the timeout, which a motor that has just obeyed another command acknowledges by sending it back."""
        known, timeout_ms = self._known[bus_id], self.motors[bus_id].watchdog_ns // MS
        if not timeout_ms or known.timeout:
            return
        yield from self._command_echoed(make_timeout(bus_id, timeout_ms))
        known.timeout = True

    def _disable(self, bus_id: int) -> Procedure[CanFrame, CanFrame, str]:
        """Shut down, then lock the brake, as the motor itself does when it misses its master (B3)."""
        self._known[bus_id].armed = False
        yield from self._command_echoed(make_command(bus_id, Command.SHUTDOWN))
        self._known[bus_id].loop = Loop.NONE
        yield from self._command_echoed(make_command(bus_id, Command.BRAKE_LOCK))
        return "output is off, brake is locked"

    def _stop(self, bus_id: int) -> Procedure[CanFrame, CanFrame, str]:
        """81 brings the speed to 0 and holds; what it does to a motor that is off is not told, so none gets it."""
        if (yield from self._read_loop(bus_id)) == Loop.NONE:
            return "output is off already"
        yield from self._command_echoed(make_command(bus_id, Command.STOP))
        return "stopped, holding"

    def _make_setpoint(self, bus_id: int, order: Order) -> tuple[CanFrame, str]:
        """The command for a setpoint, and what to say when the motor took it."""
        value, nm_per_a = order.value, self._options[bus_id].nm_per_a
        try:
            match order.kind:
                case Kind.POSITION if isfinite(value) and isfinite(order.velocity_rad_s) and order.velocity_rad_s >= 0:
                    speed = encode_max_speed(order.velocity_rad_s)
                    frame = make_position(bus_id, speed, encode_fixed(value, RAD_PER_CENTIDEGREE, 32))
                    return frame, f"going to {value:.4f} rad at {speed * RAD_PER_DEG:.4f} rad/s"
                case Kind.VELOCITY if isfinite(value):
                    frame = make_speed(bus_id, encode_fixed(value, RAD_PER_CENTIDEGREE, 32))
                    return frame, f"turning at {value:.4f} rad/s"
                case Kind.TORQUE if isfinite(value) and nm_per_a is not None:
                    frame = make_torque(bus_id, encode_fixed(value / nm_per_a, AMPERE, 16))
                    return frame, f"pushing with {value / nm_per_a:.2f} A"
        except ValueError as error:
            raise MotorRefused("out_of_limits", f"{order.kind} {value}: {error}") from error
        approach = f" at {order.velocity_rad_s} rad/s" if order.kind == Kind.POSITION else ""
        raise MotorRefused("malformed", f"{order.kind} {value}{approach}")

    def _check_ready(self, bus_id: int) -> Procedure[CanFrame, CanFrame, None]:
        known = self._known[bus_id]
        if known.errors:
            raise MotorRefused("refused", f"the motor reports {', '.join(self.explain(known.errors))}")
        if (loop := (yield from self._read_loop(bus_id))) not in CLOSED:
            raise MotorRefused("not_enabled", f"operating mode (70) is {loop}: no loop is closed")
        if not known.armed:
            detail = "it was not enabled from here since it was connected, shut down or in error; enable it first"
            raise MotorRefused("not_enabled", detail)

    def _read_status(self, bus_id: int) -> Procedure[CanFrame, CanFrame, Status1]:
        status = decode_status_1((yield from self._command(make_command(bus_id, Command.STATUS_1))))
        self._note(bus_id, status)
        return status

    def _note(self, bus_id: int, status: Status1) -> None:
        known = self._known[bus_id]
        known.voltage_v, known.errors = status.voltage_v, status.errors
        known.faults = int(common_faults(status.errors, COMMON))
        known.armed = known.armed and not status.errors

    def _read_loop(self, bus_id: int) -> Procedure[CanFrame, CanFrame, int]:
        known = self._known[bus_id]
        known.loop = (yield from self._command(make_command(bus_id, Command.OPERATING_MODE)))[7]
        known.armed = known.armed and known.loop in CLOSED
        return known.loop

    def _command_echoed(self, frame: CanFrame) -> Procedure[CanFrame, CanFrame, None]:
        """A command that a motor acknowledges by sending it back."""
        reply = yield from self._command(frame)
        if reply != frame.data:
            raise MotorRefused("refused", f"sent {frame}, which was answered with {reply.hex().upper()}")

    def _command(self, frame: CanFrame) -> Procedure[CanFrame, CanFrame, bytes]:
        reply = yield from self._ask(frame)
        if reply == frame.data and frame.data[0] not in ECHOED:  # not obeyed: its timeout had expired
            reply = yield from self._ask(frame)
        if reply is None:
            raise MotorRefused("no_reply", f"no reply to {frame} from motor {frame.can_id - COMMAND_ID}")
        return reply

    @staticmethod
    def _ask(frame: CanFrame) -> Procedure[CanFrame, CanFrame, bytes | None]:
        """Send a command; the eight bytes of the reply that bears its code, None if there is none."""
        bus_id = frame.can_id - COMMAND_ID

        def match(reply: CanFrame) -> Reply | None:
            is_answer = reply.can_id == REPLY_ID + bus_id and reply.data[0] == frame.data[0]
            return (bus_id, reply.data) if is_answer else None

        return (yield Exchange([frame], frozenset({bus_id}), match)).get(bus_id)

    def _feedback(self, bus_id: int, status: Status2, position_rad: float) -> Feedback:
        known, nm_per_a = self._known[bus_id], self._options[bus_id].nm_per_a
        return Feedback(
            position_rad=position_rad,
            velocity_rad_s=status.velocity_rad_s,
            temperature_c=float(status.temperature_c),
            voltage_v=known.voltage_v,
            current_a=status.current_a,
            torque_nm=nan if nm_per_a is None else status.current_a * nm_per_a,
            status=known.faults
            | (Status.FAULT_COMMUNICATION if known.timed_out else 0)
            | (Status.ENABLED if known.loop in CLOSED and not known.timed_out else 0),
            vendor_error=known.errors,
        )


def _burst(frames: Sequence[CanFrame]) -> Exchange[CanFrame, CanFrame]:
    """Commands to several motors; each replies with its command's code."""
    codes = {frame.can_id - COMMAND_ID: frame.data[0] for frame in frames}

    def match(reply: CanFrame) -> Reply | None:
        bus_id = reply.can_id - REPLY_ID
        return (bus_id, reply.data) if codes.get(bus_id) == reply.data[0] else None

    return Exchange(frames, frozenset(codes), match)


def _words(bit: int) -> str:
    name = Error(bit).name if bit in set(Error) else None
    return f"{(name or 'unlisted error').lower().replace('_', ' ')} ({bit:04X})"


# --- the motors' side -------------------------------------------------------------------------------------------------

_MODEL: Final = b"X8S2V10"  # the manual's example, as is the date
_VERSION_DATE: Final = 20220206
_LOW_VOLTAGE_V: Final = 9.0  # these resemble what a motor may be set to, for a supply of 12 V
_OVER_VOLTAGE_V: Final = 60.0
_OVER_TEMPERATURE_C: Final = 85.0
_RECOVERED_C: Final = 75.0
_LOOPS: Final = {Drive.POSITION: Loop.POSITION, Drive.VELOCITY: Loop.SPEED, Drive.TORQUE: Loop.CURRENT}


class _Motor:
    """One simulated motor: its errors and its brake over its physics."""

    def __init__(self, simulated: SimulatedMotor) -> None:
        self.simulated = simulated
        self._brake_released = simulated.servo.enabled
        self._hot = False
        self._timeout_ms = 0  # in ROM
        self._timed_out = False
        self._heard_ns = MonotonicNs(0)
        self._told_ns = 0  # when it said so last
        configured = options_of(simulated.motor).nm_per_a
        self._nm_per_a = simulated.servo.limits.nm_per_a if configured is None else configured

    def power_up(self) -> None:
        """No loop is closed, the brake is locked."""
        self.simulated.servo.disable()
        self._brake_released = False
        self._hot = self._timed_out = False

    def watch(self, now: MonotonicNs) -> bytes | None:
        """Cut the output and lock the brake if nothing was heard for too long; what it says of it, once a second."""
        running = self._brake_released or self.simulated.servo.enabled
        if self._timeout_ms and running and now - self._heard_ns > self._timeout_ms * MS:
            self._timed_out, self._told_ns = True, now - SECOND
            self._switch(Command.SHUTDOWN)
            self._switch(Command.BRAKE_LOCK)
        if not self._timed_out or now - self._told_ns < SECOND:
            return None
        self._told_ns = now
        return bytes((Command.TIMED_OUT, 0, 0, 0, 0, 0, 0, 0))

    def answer(self, data: bytes, now: MonotonicNs) -> bytes | None:
        """Obey a command; its reply, None if it is none that this motor knows or answers."""
        self._heard_ns = now
        if self._timed_out:
            self._timed_out = False
            return data
        servo, errors = self.simulated.servo, self._errors()
        if errors:
            servo.disable()
        match data[0]:
            case Command.STATUS_1:
                return encode_status_1(
                    Status1(round(servo.temperature_c), self._brake_released, servo.voltage_v, errors)
                )
            case Command.STATUS_2:
                return self._status_2(data[0])
            case Command.MULTI_TURN_ANGLE:
                return encode_long(data[0], round(servo.measured_rad / RAD_PER_CENTIDEGREE))
            case Command.OPERATING_MODE:
                return bytes((data[0], 0, 0, 0, 0, 0, 0, _LOOPS[servo.drive] if servo.enabled else Loop.NONE))
            case Command.VERSION_DATE:
                return encode_long(data[0], _VERSION_DATE)
            case Command.MODEL:
                return data[:1] + _MODEL
            case Command.TORQUE | Command.SPEED | Command.POSITION:
                if not errors:
                    self._drive(data)
                return self._status_2(data[0])
            case Command.SHUTDOWN | Command.STOP | Command.BRAKE_RELEASE | Command.BRAKE_LOCK:
                self._switch(data[0])
                return data
            case Command.TIMEOUT:
                self._timeout_ms = _TIMEOUT.unpack(data)[1]
                return data
            case Command.RESET:
                self.power_up()
                return None
            case _:
                return None

    def _errors(self) -> Error:
        """All that can go wrong here goes with its cause."""
        servo = self.simulated.servo
        self._hot = servo.temperature_c >= (_RECOVERED_C if self._hot else _OVER_TEMPERATURE_C)
        errors = Error.MOTOR_OVER_TEMPERATURE if self._hot else Error(0)
        if servo.voltage_v < _LOW_VOLTAGE_V:
            errors |= Error.LOW_VOLTAGE
        if servo.voltage_v > _OVER_VOLTAGE_V:
            errors |= Error.OVER_VOLTAGE
        return errors

    def _status_2(self, command: int) -> bytes:
        servo = self.simulated.servo
        current_a = servo.torque_nm / self._nm_per_a
        return encode_status_2(
            command, Status2(round(servo.temperature_c), current_a, servo.velocity_rad_s, servo.measured_rad)
        )

    def _drive(self, data: bytes) -> None:
        """Close a loop, from wherever it was; only the current loop leaves the brake as it is."""
        servo = self.simulated.servo
        if data[0] == Command.TORQUE:
            if self._brake_released:
                servo.enable()
                servo.push(_TORQUE.unpack(data)[1] * AMPERE * self._nm_per_a)
            return
        self._brake_released = True
        servo.enable()
        if data[0] == Command.SPEED:
            servo.turn_at(decode_long(data) * RAD_PER_CENTIDEGREE)
        else:
            _, max_speed, angle = _POSITION.unpack(data)
            fastest = max_speed * RAD_PER_DEG if max_speed else servo.limits.velocity_rad_s
            servo.move_to(angle * RAD_PER_CENTIDEGREE, fastest)

    def _switch(self, command: int) -> None:
        servo = self.simulated.servo
        match command:
            case Command.STOP:
                servo.take_over()
                servo.hold()
            case Command.BRAKE_RELEASE:
                self._brake_released = True
            case Command.BRAKE_LOCK:
                self._brake_released = False
                servo.disable()
            case Command.SHUTDOWN:
                servo.disable()


class SimulatedRmdX(Responder[CanFrame]):
    """Simulated RMD-X motors, reached one by one or all together (280).

    A locked brake is approximated: no loop drives the shaft against it, and friction brings it to rest. After 81 the
    position loop holds, whichever was closed.
    """

    def __init__(self, motors: Sequence[SimulatedMotor]) -> None:
        super().__init__(motors)
        self._motors = {bus_id: _Motor(simulated) for bus_id, simulated in self.motors.items()}
        self._now = MonotonicNs(0)

    def tick(self, now: MonotonicNs) -> Iterator[tuple[SimulatedMotor, CanFrame]]:
        """What motors say that nobody talks to any more."""
        self._now = now
        for motor in self._motors.values():
            if said := motor.watch(now):
                yield motor.simulated, CanFrame(REPLY_ID + motor.simulated.reply_id, said)

    def reboot(self, simulated: SimulatedMotor) -> None:
        """Power-up."""
        self._motors[simulated.motor.bus_id].power_up()

    def respond(self, unit: CanFrame) -> Iterator[tuple[SimulatedMotor, CanFrame]]:
        """The replies to one frame; none to frames for others, and to any that has not eight bytes."""
        if unit.extended or len(unit.data) != 8:
            return
        for bus_id, motor in self._motors.items():
            if unit.can_id in {COMMAND_ID + bus_id, ALL_MOTORS_ID} and (reply := motor.answer(unit.data, self._now)):
                yield motor.simulated, CanFrame(REPLY_ID + motor.simulated.reply_id, reply)


FAMILY: type[Family[Any, Any]] = RmdX
SIMULATED: type[Responder[Any]] = SimulatedRmdX
