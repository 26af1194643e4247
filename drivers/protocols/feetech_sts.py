"""Feetech STS servos (STS3215 and its kin) on a half-duplex serial bus: one codec, and both sides of it.

    FF FF ID LEN CODE P1 .. PN CK      LEN = N + 2, CK = ~(ID + LEN + CODE + P1 + .. + PN), little-endian parameters

CODE is the instruction in a request and the servo's error byte in a reply, so that one codec serves both roles.
Two oddities shaped what follows. A reply names neither its request nor the address it was read from: every block
that is read here has a length of its own, so that a late reply to one cannot pass for a reply to another. And many
adapters echo what is sent: every request here is addressed to all (sync read, sync write), which no reply ever is.

Units: step, 4096 a turn; the middle of the range, 2048, is 0 rad. In position mode a servo takes its homing offset
(register 31) off the positions that it tells, in other modes it does not (brukg/so_arm_100_hardware pull request 13,
matthieuvigne/STS_servos issue 9). There it is taken off here: a position means the same in every mode.

Other sources: Feetech STS3215 memory table and communication protocol manual; LeRobot motors/feetech/tables.py and
motors/encoding_utils.py.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag
from math import isfinite, pi
from struct import Struct
from typing import Any, Final, NamedTuple

from drivers.errors import MotorRefused
from drivers.family import Exchange, Family, Procedure, Ready, Reply
from drivers.motor import Feedback, Kind, Motor, MotorInfo, Order, Status, bits_of, common_faults
from drivers.sim.responder import Responder, SimulatedMotor, as_byte

BROADCAST: Final = 0xFE
HEADER: Final = b"\xff\xff"

STEPS_PER_TURN: Final = 4096
CENTRE_STEP: Final = 2048
RAD_PER_STEP: Final = 2 * pi / STEPS_PER_TURN
VOLT: Final = 0.1
AMPERE: Final = 0.0065
SIGN_BIT: Final = 15  # of position, speed and current
MOST: Final = (1 << SIGN_BIT) - 1
LOAD_SIGN_BIT: Final = 10
OFFSET_SIGN_BIT: Final = 11
CREEP_STEP_S: Final = 1
"""A goal speed that is harmless in both modes; 0 is no limit at all in position mode and a standstill in the other."""
HOLD_VELOCITY_RAD_S: Final = 1.0  # of the small way back to the point where a servo was told to hold
MODELS: Final = {777: "STS3215"}


class Instruction(IntEnum):
    """Instruction codes (Feetech communication protocol manual)."""

    PING = 0x01
    READ = 0x02
    WRITE = 0x03
    REG_WRITE = 0x04
    ACTION = 0x05
    RESTART = 0x08
    SYNC_READ = 0x82
    SYNC_WRITE = 0x83


class Register(IntEnum):
    """Addresses (Feetech STS3215 memory table; names as in LeRobot motors/feetech/tables.py)."""

    FIRMWARE_MAJOR_VERSION = 0
    FIRMWARE_MINOR_VERSION = 1
    MODEL_NUMBER = 3
    ID = 5
    BAUD_RATE = 6
    RETURN_DELAY_TIME = 7
    RESPONSE_STATUS_LEVEL = 8
    MIN_POSITION_LIMIT = 9
    MAX_POSITION_LIMIT = 11
    MAX_TEMPERATURE_LIMIT = 13
    MAX_VOLTAGE_LIMIT = 14
    MIN_VOLTAGE_LIMIT = 15
    MAX_TORQUE_LIMIT = 16
    PHASE = 18
    UNLOADING_CONDITION = 19
    LED_ALARM_CONDITION = 20
    P_COEFFICIENT = 21
    D_COEFFICIENT = 22
    I_COEFFICIENT = 23
    MINIMUM_STARTUP_FORCE = 24
    CW_DEAD_ZONE = 26
    CCW_DEAD_ZONE = 27
    PROTECTION_CURRENT = 28
    ANGULAR_RESOLUTION = 30
    HOMING_OFFSET = 31
    OPERATING_MODE = 33
    PROTECTIVE_TORQUE = 34
    PROTECTION_TIME = 35
    OVERLOAD_TORQUE = 36
    TORQUE_ENABLE = 40
    ACCELERATION = 41
    GOAL_POSITION = 42
    GOAL_TIME = 44
    GOAL_VELOCITY = 46
    TORQUE_LIMIT = 48
    LOCK = 55
    PRESENT_POSITION = 56
    PRESENT_VELOCITY = 58
    PRESENT_LOAD = 60
    PRESENT_VOLTAGE = 62
    PRESENT_TEMPERATURE = 63
    STATUS = 65
    MOVING = 66
    PRESENT_CURRENT = 69


class Mode(IntEnum):
    """Values of register 33 (Feetech STS3215 memory table)."""

    POSITION = 0
    VELOCITY = 1
    PWM = 2
    STEP = 3


class Fault(IntFlag):
    """Bits of register 65 and of a reply's error byte (Feetech STS3215 memory table, servo status)."""

    VOLTAGE = 1 << 0
    ENCODER = 1 << 1
    TEMPERATURE = 1 << 2
    CURRENT = 1 << 3
    OVERLOAD = 1 << 5


_COMMON: Final[Mapping[int, Status]] = {
    Fault.VOLTAGE: Status.FAULT_VOLTAGE,
    Fault.ENCODER: Status.FAULT_ENCODER,
    Fault.TEMPERATURE: Status.FAULT_TEMPERATURE,
    Fault.CURRENT: Status.FAULT_CURRENT,
    Fault.OVERLOAD: Status.FAULT_OVERLOAD,
}

# --- packets ----------------------------------------------------------------------------------------------------------


class Packet(NamedTuple):
    """One packet; ``code`` is the instruction of a request or the error byte of a reply."""

    bus_id: int
    code: int
    params: bytes = b""


def encode_packet(packet: Packet) -> bytes:
    """The packet as it goes over the wire."""
    body = bytes((packet.bus_id, len(packet.params) + 2, packet.code)) + packet.params
    return HEADER + body + bytes((~sum(body) & 0xFF,))


class Decoder:
    """Finds packets in a stream of bytes of which any may be missing, doubled or wrong. Never raises.

    ``longest`` is the number of parameters above which a length is taken for garbage; it bounds the memory, and how
    many good packets a damaged length can hold up. ``skipped`` counts the bytes that were in no packet.
    """

    def __init__(self, longest: int = 0xFF - 2) -> None:
        self._longest = longest
        self._rest = b""
        self.skipped = 0

    def feed(self, data: bytes) -> list[Packet]:
        """All packets completed by ``data``, in their order."""
        data = self._rest + data
        packets: list[Packet] = []
        at = 0
        while True:
            found = data.find(HEADER, at)
            if found < 0:  # the last byte may be half a header
                at = max(at, len(data) - data.endswith(HEADER[:1]))
                break
            at = found
            head = data[at : at + 4]
            if len(head) > 2 and head[2] == 0xFF:  # not an address: the header starts one byte later
                at += 1
                continue
            if len(head) == 4 and not 2 <= head[3] <= self._longest + 2:
                at += 1
                continue
            end = at + 4 + head[3] if len(head) == 4 else len(data) + 1
            if end > len(data):
                break
            if (sum(data[at + 2 : end]) & 0xFF) != 0xFF:  # everything and the checksum add up to ..FF
                at += 1
                continue
            packets.append(Packet(data[at + 2], data[at + 4], data[at + 5 : end - 1]))
            at = end
        self._rest = data[at:]
        self.skipped += at - sum(len(packet.params) + 6 for packet in packets)
        return packets

    def reset(self) -> None:
        """Forget half a packet."""
        self._rest = b""


def make_sync_read(bus_ids: Sequence[int], address: int, size: int) -> bytes:
    """Request ``size`` bytes from ``address`` of each servo; they reply one after the other, in this order."""
    return encode_packet(Packet(BROADCAST, Instruction.SYNC_READ, bytes((address, size, *bus_ids))))


def make_sync_write(address: int, data: Mapping[int, bytes]) -> bytes:
    """Write ``data[bus_id]``, of equal lengths, from ``address`` on. No servo replies to it, at any response level."""
    size = len(next(iter(data.values())))
    params = b"".join(bytes((bus_id,)) + values for bus_id, values in data.items())
    return encode_packet(Packet(BROADCAST, Instruction.SYNC_WRITE, bytes((address, size)) + params))


def encode_sign_magnitude(value: int, sign_bit: int) -> int:
    """``value`` as the register holds it: magnitude below ``sign_bit``, the bit set for a negative one.

    Raises ValueError if the magnitude does not fit (LeRobot motors/encoding_utils.py).
    """
    if abs(value) >> sign_bit:
        raise ValueError(f"{value} does not fit below sign bit {sign_bit}")
    return abs(value) | ((value < 0) << sign_bit)


def decode_sign_magnitude(raw: int, sign_bit: int) -> int:
    """The inverse of ``encode_sign_magnitude``; bits above the sign are ignored."""
    magnitude = raw & ((1 << sign_bit) - 1)
    return -magnitude if raw >> sign_bit & 1 else magnitude


def encode_position(position_rad: float) -> int:
    """rad -> step, 2048 at 0 rad."""
    return CENTRE_STEP + round(position_rad / RAD_PER_STEP)


def decode_position(step: int) -> float:
    """step -> rad."""
    return (step - CENTRE_STEP) * RAD_PER_STEP


def encode_approach_speed(velocity_rad_s: float) -> int:
    """rad/s -> step/s for register 46: never faster than asked, and at least 1, because 0 stands for "no limit"."""
    return min(max(int(velocity_rad_s / RAD_PER_STEP), 1), MOST)


# --- the blocks that are read, each with a length of its own ----------------------------------------------------------


class Block(NamedTuple):
    """A run of registers that is read at once."""

    address: Register
    layout: Struct

    @property
    def size(self) -> int:
        """Bytes."""
        return self.layout.size


IDENTITY: Final = Block(Register.FIRMWARE_MAJOR_VERSION, Struct("<BBxHBBBBHH"))  # 0..12
FEEDBACK: Final = Block(Register.PRESENT_POSITION, Struct("<HHHBBxBBxxH"))  # 56..70
STATE: Final = Block(Register.HOMING_OFFSET, Struct("<HB6xBxHHH7xB" + FEEDBACK.layout.format[1:]))  # 31..70
_GOAL = Struct("<HHH")  # 42..47: position, time, speed
_SPEED = Struct("<H")  # 46..47


@dataclass(frozen=True, slots=True)
class State:
    """Orders and feedback of one servo, read at one time (registers 31..70). Positions in step, speed in step/s."""

    offset: int
    mode: int
    torque_enable: int
    goal: int
    goal_speed: int
    locked: bool
    present: int

    @classmethod
    def decode(cls, params: bytes) -> "State":
        """From the parameters of a reply to a read of ``STATE``."""
        offset, mode, torque_enable, goal, _time, speed, lock, present, *_ = STATE.layout.unpack(params)
        return cls(
            offset=decode_sign_magnitude(offset, OFFSET_SIGN_BIT),
            mode=mode,
            torque_enable=torque_enable,
            goal=decode_sign_magnitude(goal, SIGN_BIT),
            goal_speed=decode_sign_magnitude(speed, SIGN_BIT),
            locked=lock != 0,
            present=decode_sign_magnitude(present, SIGN_BIT),
        )


class Goal(NamedTuple):
    """What a servo is to do (registers 42..47); without a step, only how fast (46)."""

    step: int | None
    speed: int  # step/s

    @property
    def address(self) -> Register:
        """Where it is written."""
        return Register.GOAL_VELOCITY if self.step is None else Register.GOAL_POSITION

    def encode(self) -> bytes:
        """The registers' bytes."""
        speed = encode_sign_magnitude(self.speed, SIGN_BIT)
        if self.step is None:
            return _SPEED.pack(speed)
        return _GOAL.pack(encode_sign_magnitude(self.step, SIGN_BIT), 0, speed)

    def check(self, state: State) -> None:
        """Raise MotorRefused unless the servo has it."""
        if state.goal_speed != self.speed or self.step not in {None, state.goal}:
            read = f"{state.goal} step at {state.goal_speed} step/s"
            sent = f"{self.speed} step/s" if self.step is None else f"{self.step} step at {self.speed} step/s"
            raise MotorRefused("refused", f"goal: sent {sent}, read {read}")


@dataclass(slots=True)
class Known:
    """What was learned about one servo."""

    limits_step: tuple[int, int] = (0, 0)  # the servo's own; (0, 0) stands for several turns, without limits
    enabled: bool = False
    mode: int | None = None
    step: int = 0  # where it was last, as told in position mode
    offset_step: int | None = None  # still in the positions that it tells, by its mode; None until that was read

    def place(self, told_step: int) -> int:
        """The position as the servo tells it in position mode, from what it tells now; both in step."""
        if not self.offset_step:
            return told_step
        low, high = self.limits_step
        step = told_step - self.offset_step
        return step % STEPS_PER_TURN if low < high else step


def decode_feedback(params: bytes, error: int, known: Known) -> Feedback:
    """From the 15 parameters of a reply to a read of ``FEEDBACK`` and its error byte.

    Position rad, velocity rad/s, V, C, A. The load register is a share of the PWM, no torque: torque stays NaN.
    """
    position, speed, _load, voltage, temperature, faults, moving, current = FEEDBACK.layout.unpack(params)
    vendor_error = faults | error
    status = Status.ENABLED if known.enabled else Status(0)
    if moving:
        status |= Status.MOVING
    if vendor_error:
        status |= common_faults(vendor_error, _COMMON)
    return Feedback(
        position_rad=decode_position(known.place(decode_sign_magnitude(position, SIGN_BIT))),
        velocity_rad_s=decode_sign_magnitude(speed, SIGN_BIT) * RAD_PER_STEP,
        temperature_c=float(temperature),
        voltage_v=voltage * VOLT,
        current_a=decode_sign_magnitude(current, SIGN_BIT) * AMPERE,
        status=int(status),
        vendor_error=vendor_error,
    )


# --- the gateway's side -----------------------------------------------------------------------------------------------


class FeetechSts(Family[bytes, Packet]):
    """STS servos. ``ENABLED`` is not in the polled block: it is what was last read of register 40.

    Whether a goal that is written while the torque is off switches it on is told differently for different firmware,
    and unverified here. So none is written then, except the present position just before the torque is switched on.

    Velocities are mode 1, set with the EEPROM lock on: it lasts until the servo loses its power, and wears nothing.
    The torque stays on meanwhile, lest an arm drops; so does the vendor's own library (SMS_STS::WheelMode). What the
    servo follows right after is not documented, so that its goals are harmless by then: where it is, at a creep.

    There is no order for a torque: the servo can be told a PWM, which is none. Nor is there one to clear a fault: no
    way to is documented.
    """

    name = "feetech_sts"
    medium = "serial"
    bus_ids = range(254)
    kinds = frozenset({Kind.ENABLE, Kind.DISABLE, Kind.POSITION, Kind.VELOCITY, Kind.STOP})

    def __init__(self, motors: Sequence[Motor]) -> None:
        super().__init__(motors)
        self._known = {bus_id: Known() for bus_id in self.motors}
        self._decoder = Decoder(longest=STATE.size)

    @classmethod
    def explain(cls, vendor_error: int) -> Sequence[str]:
        """The bits of register 65 by name; one that the table does not list by its number."""
        return [_name(bit) for bit in bits_of(vendor_error)]

    @classmethod
    def poll_bits(cls, motors: Sequence[Motor]) -> int:
        """One sync read and its replies; a byte is ten bits (8N1)."""
        request = make_sync_read([motor.bus_id for motor in motors], FEEDBACK.address, FEEDBACK.size)
        reply = encode_packet(Packet(0, 0, bytes(FEEDBACK.size)))
        return 10 * (len(request) + len(motors) * len(reply))

    def unpack(self, unit: bytes) -> Iterable[Packet]:
        """Packets completed by ``unit``."""
        packets = self._decoder.feed(unit)
        self.garbage = self._decoder.skipped
        return packets

    def reset(self) -> None:
        """Forget half a packet."""
        self._decoder.reset()

    def poll(self, bus_ids: Sequence[int]) -> Exchange[bytes, Packet]:
        """One sync read of the 15 bytes from 56, which bring all of ``Feedback``."""
        asked = frozenset(bus_ids)

        def match(packet: Packet) -> Reply | None:
            if packet.bus_id not in asked or len(packet.params) != FEEDBACK.size:
                return None
            known = self._known[packet.bus_id]
            if known.offset_step is None:
                return None
            feedback = decode_feedback(packet.params, packet.code, known)
            known.step = encode_position(feedback.position_rad)
            return packet.bus_id, feedback

        return Exchange([make_sync_read(bus_ids, FEEDBACK.address, FEEDBACK.size)], asked, match)

    def identify(self, bus_id: int) -> Procedure[bytes, Packet, MotorInfo | None]:
        """As ``connect``, which only reads."""
        return self.connect(bus_id)

    def connect(self, bus_id: int) -> Procedure[bytes, Packet, MotorInfo | None]:
        """Read identity, the servo's own limits, mode and torque; None if it keeps silent to either read."""
        params = (yield _read(bus_id, IDENTITY)).get(bus_id)
        if params is None:
            return None
        major, minor, model, _id, _baud, delay, level, low, high = IDENTITY.layout.unpack(params)
        self._known[bus_id].limits_step = low, high
        try:
            state = yield from self._read_state(bus_id)
        except MotorRefused:
            return None
        details = {"mode": state.mode, "response_level": level, "return_delay_us": delay * 2}
        if low < high:
            details |= {"min_position_rad": decode_position(low), "max_position_rad": decode_position(high)}
        driven = state.torque_enable == 1 and state.mode == Mode.VELOCITY and state.goal_speed != 0
        return MotorInfo(MODELS.get(model, f"model {model}"), f"{major}.{minor}", details, driven=driven)

    def refresh(self, bus_id: int) -> Procedure[bytes, Packet, None]:
        """See whether the torque is still on; silence is left to ``poll`` to notice."""
        try:
            yield from self._read_state(bus_id)
        except MotorRefused:
            return

    def order(self, bus_id: int, order: Order) -> Procedure[bytes, Packet, str]:
        """Carry out an order; every write is read back, since a servo at response level 0 acknowledges none."""
        match order.kind:
            case Kind.ENABLE:
                return (yield from self._enable(bus_id))
            case Kind.DISABLE:
                yield from self._write_torque(bus_id, on=False)
                return "torque is off"
            case Kind.STOP:
                return (yield from self._stop(bus_id))
            case _:
                return (yield from self.set_alone(bus_id, order))

    def prepare(self, bus_id: int, order: Order) -> Procedure[bytes, Packet, Ready]:
        """Bring a servo whose torque is on into the mode of the setpoint; until then it creeps to where it is."""
        match order.kind:
            case Kind.POSITION:
                goal, told = self._goal_of(bus_id, order)
                yield from self._enabled_in(bus_id, Mode.POSITION)
            case Kind.VELOCITY:
                goal, told = _speed_of(order.value)
                yield from self._enabled_in(bus_id, Mode.VELOCITY)
            case _:
                raise MotorRefused("unsupported", f"{self.name} has no order {order.kind}")
        return Ready(goal, told)

    def fire(self, ready: Mapping[int, Ready]) -> Exchange[bytes, Packet]:
        """One sync write for all of a kind, which takes effect in each servo when it ends."""
        return _write_goals({bus_id: one.trigger for bus_id, one in ready.items()})

    def confirm(self, bus_id: int, ready: Ready, reply: Any) -> Procedure[bytes, Packet, str]:  # noqa: ARG002  none comes
        """Read the goal back."""
        ready.trigger.check((yield from self._read_state(bus_id)))
        return ready.told

    def halt(self, bus_ids: Iterable[int]) -> Exchange[bytes, Packet]:
        """One sync write: no speed in velocity mode, and in position mode the place where each was seen last.

        In a mode that is in doubt, goals that are harmless in both.
        """
        goals = {}
        for bus_id in bus_ids:
            known = self._known[bus_id]
            if known.enabled and known.mode in {Mode.POSITION, Mode.VELOCITY}:
                speed = encode_approach_speed(HOLD_VELOCITY_RAD_S) if known.mode == Mode.POSITION else 0
                goals[bus_id] = Goal(known.step, CREEP_STEP_S if known.offset_step is None else speed)
        return _write_goals(goals)

    def _enable(self, bus_id: int) -> Procedure[bytes, Packet, str]:
        state = yield from self._hold(bus_id, (yield from self._read_state(bus_id)))
        yield from self._write_torque(bus_id, on=True)
        return f"enabled, holding {decode_position(state.goal):.4f} rad"

    def _goal_of(self, bus_id: int, order: Order) -> tuple[Goal, str]:
        if not (isfinite(order.value) and isfinite(order.velocity_rad_s) and order.velocity_rad_s >= 0):
            raise MotorRefused("malformed", f"position {order.value} rad at {order.velocity_rad_s} rad/s")
        goal, speed = encode_position(order.value), encode_approach_speed(order.velocity_rad_s)
        low, high = self._known[bus_id].limits_step
        if low >= high:  # several turns: whatever the register holds
            low, high = -MOST, MOST
        if not low <= goal <= high:
            raise MotorRefused("out_of_limits", f"{order.value} rad is {goal} step; the servo allows {low}..{high}")
        return Goal(goal, speed), f"going to {decode_position(goal):.4f} rad at {speed * RAD_PER_STEP:.4f} rad/s"

    def _stop(self, bus_id: int) -> Procedure[bytes, Packet, str]:
        state = yield from self._read_state(bus_id)
        if state.torque_enable == 0:
            return "torque is off already"
        state = yield from self._hold(bus_id, state)
        return f"holding {decode_position(state.goal):.4f} rad"

    def _hold(self, bus_id: int, state: State) -> Procedure[bytes, Packet, State]:
        """Set the goal to where the servo is, in position mode."""
        state = yield from self._enter(bus_id, state, Mode.POSITION)
        return (yield from self._write_goal(bus_id, Goal(state.present, encode_approach_speed(HOLD_VELOCITY_RAD_S))))

    def _enabled_in(self, bus_id: int, mode: Mode) -> Procedure[bytes, Packet, None]:
        """Bring a servo whose torque is on into ``mode``."""
        state = yield from self._read_state(bus_id)
        if state.torque_enable != 1:
            raise MotorRefused("not_enabled", f"torque enable (register 40) is {state.torque_enable}")
        yield from self._enter(bus_id, state, mode)

    def _enter(self, bus_id: int, state: State, mode: Mode) -> Procedure[bytes, Packet, State]:
        """Change between position and velocity, by way of goals that are harmless in both."""
        if state.mode == mode:
            return state
        if state.mode not in {Mode.POSITION, Mode.VELOCITY}:  # a goal is a step to take there, or a PWM
            raise MotorRefused("refused", f"operating mode (register 33) is {state.mode}; only 0 and 1 are supported")
        if not state.locked:
            yield from self._read_state(bus_id, make_sync_write(Register.LOCK, {bus_id: b"\x01"}))
        state = yield from self._write_goal(bus_id, Goal(state.present, CREEP_STEP_S))
        if not state.locked:
            raise MotorRefused("refused", "EEPROM lock (register 55): sent 1, read 0")
        self._known[bus_id].offset_step = None  # until the mode is read back
        state = yield from self._read_state(bus_id, make_sync_write(Register.OPERATING_MODE, {bus_id: bytes((mode,))}))
        if state.mode != mode:
            raise MotorRefused("refused", f"operating mode (register 33): sent {mode:d}, read {state.mode}")
        return state

    def _read_state(self, bus_id: int, *writes: bytes) -> Procedure[bytes, Packet, State]:
        """Registers 31..70 after ``writes``, in one exchange: no poll meets a servo whose mode is in doubt."""
        params = (yield _read(bus_id, STATE, *writes)).get(bus_id)
        if params is None:
            raise MotorRefused("no_reply", f"no reply to a read of registers 31..70 from servo {bus_id}")
        state = State.decode(params)
        known = self._known[bus_id]
        known.enabled = state.torque_enable == 1
        known.mode = state.mode
        known.offset_step = 0 if state.mode == Mode.POSITION else state.offset
        known.step = known.place(state.present)
        return replace(state, present=known.step)

    def _write_torque(self, bus_id: int, on: bool) -> Procedure[bytes, Packet, None]:
        state = yield from self._read_state(bus_id, make_sync_write(Register.TORQUE_ENABLE, {bus_id: bytes((on,))}))
        if state.torque_enable != on:
            raise MotorRefused("refused", f"torque enable (register 40): sent {on:d}, read {state.torque_enable}")

    def _write_goal(self, bus_id: int, goal: Goal) -> Procedure[bytes, Packet, State]:
        state = yield from self._read_state(bus_id, make_sync_write(goal.address, {bus_id: goal.encode()}))
        goal.check(state)
        return state


def _speed_of(velocity_rad_s: float) -> tuple[Goal, str]:
    if not isfinite(velocity_rad_s):
        raise MotorRefused("malformed", f"{velocity_rad_s} rad/s")
    speed = int(velocity_rad_s / RAD_PER_STEP)  # never faster than asked
    if abs(speed) > MOST:
        raise MotorRefused("out_of_limits", f"{velocity_rad_s} rad/s is {speed} step/s; the servo takes {MOST}")
    return Goal(None, speed), f"turning at {speed * RAD_PER_STEP:.4f} rad/s"


def _write_goals(goals: Mapping[int, Goal]) -> Exchange[bytes, Packet]:
    """A sync write for each place that goals are written to; none is answered."""
    addresses: dict[Register, dict[int, bytes]] = {}
    for bus_id, goal in goals.items():
        addresses.setdefault(goal.address, {})[bus_id] = goal.encode()
    writes = [make_sync_write(address, data) for address, data in addresses.items()]
    return Exchange(writes, frozenset(), lambda _: None)


def _name(bit: int) -> str:
    name = Fault(bit).name if bit in _COMMON else None
    return name.lower() if name else f"bit {bit.bit_length() - 1}"


def _read(bus_id: int, block: Block, *writes: bytes) -> Exchange[bytes, Packet]:
    """Read a block of one servo, after sync writes, which none answers; the reply is its parameters."""

    def match(packet: Packet) -> Reply | None:
        return (bus_id, packet.params) if packet.bus_id == bus_id and len(packet.params) == block.size else None

    read = make_sync_read([bus_id], block.address, block.size)
    return Exchange([*writes, read], frozenset({bus_id}), match)


# --- the servos' side -------------------------------------------------------------------------------------------------

_MEMORY_SIZE = 87
_EEPROM_END = 40
_RESPOND_TO_ALL = 1
# which bit of the error byte a real servo sets is not in the public tables; no fault of register 65 uses this one
_REFUSED_PARAMETER = 0x40

_EEPROM: Final = {  # register: (size, default, lowest, highest); defaults resemble those of an STS3215
    Register.BAUD_RATE: (1, 0, 0, 7),
    Register.RETURN_DELAY_TIME: (1, 0, 0, 254),
    Register.RESPONSE_STATUS_LEVEL: (1, _RESPOND_TO_ALL, 0, 1),
    Register.MIN_POSITION_LIMIT: (2, 0, 0, 4095),
    Register.MAX_POSITION_LIMIT: (2, 4095, 0, 4095),
    Register.MAX_TEMPERATURE_LIMIT: (1, 70, 0, 100),
    Register.MAX_VOLTAGE_LIMIT: (1, 140, 0, 254),
    Register.MIN_VOLTAGE_LIMIT: (1, 40, 0, 254),
    Register.MAX_TORQUE_LIMIT: (2, 1000, 0, 1000),
    Register.PHASE: (1, 12, 0, 254),
    Register.UNLOADING_CONDITION: (1, 44, 0, 254),
    Register.LED_ALARM_CONDITION: (1, 47, 0, 254),
    Register.P_COEFFICIENT: (1, 32, 0, 254),
    Register.D_COEFFICIENT: (1, 32, 0, 254),
    Register.I_COEFFICIENT: (1, 0, 0, 254),
    Register.MINIMUM_STARTUP_FORCE: (2, 16, 0, 1000),
    Register.CW_DEAD_ZONE: (1, 1, 0, 32),
    Register.CCW_DEAD_ZONE: (1, 1, 0, 32),
    Register.PROTECTION_CURRENT: (2, 500, 0, 511),
    Register.ANGULAR_RESOLUTION: (1, 1, 1, 3),
    Register.HOMING_OFFSET: (2, 0, 0, 0x0FFF),
    Register.OPERATING_MODE: (1, Mode.POSITION, 0, 3),
    Register.PROTECTIVE_TORQUE: (1, 20, 0, 100),
    Register.PROTECTION_TIME: (1, 200, 0, 254),
    Register.OVERLOAD_TORQUE: (1, 80, 0, 100),
}
_RAM: Final = {
    Register.TORQUE_ENABLE: (1, 0, 0, 1),
    Register.ACCELERATION: (1, 0, 0, 254),
    Register.GOAL_POSITION: (2, CENTRE_STEP, 0, 0xFFFF),
    Register.GOAL_TIME: (2, 0, 0, 0xFFFF),
    Register.GOAL_VELOCITY: (2, 0, 0, 0xFFFF),
    Register.TORQUE_LIMIT: (2, 1000, 0, 1000),
    Register.LOCK: (1, 1, 0, 1),
}
_GOALS: Final = frozenset(range(Register.GOAL_POSITION, Register.TORQUE_LIMIT))
_WRITABLE: Final = {Register.ID: (1, 1, 0, 253)} | _EEPROM | _RAM


class _Servo:
    """One simulated servo: its registers over its physics."""

    def __init__(self, simulated: SimulatedMotor) -> None:
        self.simulated = simulated
        self.registered = b""  # address and data of a reg-write that waits for its action
        self._memory = bytearray(_MEMORY_SIZE)
        self._memory[:5] = bytes((3, 10, 0, *(777).to_bytes(2, "little")))
        for register, (size, default, _low, _high) in _WRITABLE.items():
            self._set(register, size, default)
        self._memory[Register.ID] = simulated.motor.bus_id
        low, high = (encode_position(rad) for rad in simulated.servo.limits.position_rad)
        self._turns = low < 0 or high > STEPS_PER_TURN  # beyond one turn: no limits, as on the real one
        self._set(Register.MIN_POSITION_LIMIT, 2, 0 if self._turns else low)
        self._set(Register.MAX_POSITION_LIMIT, 2, 0 if self._turns else min(high, STEPS_PER_TURN - 1))
        self._set(Register.GOAL_POSITION, 2, self._told_position)
        self._saved = self._memory[:_EEPROM_END]

    @property
    def bus_id(self) -> int:
        return self._memory[Register.ID]

    @property
    def told_id(self) -> int:
        """Its address in what it sends."""
        return self.bus_id if self.simulated.faults.wrong_id is None else self.simulated.reply_id

    @property
    def return_delay_ns(self) -> int:
        return 2000 * self._memory[Register.RETURN_DELAY_TIME]

    @property
    def responds_to_all(self) -> bool:
        return self._memory[Register.RESPONSE_STATUS_LEVEL] == _RESPOND_TO_ALL

    @property
    def faults(self) -> Fault:
        """Register 65, also the error byte of every reply."""
        servo, memory = self.simulated.servo, self._memory
        faults = Fault(0)
        if not memory[Register.MIN_VOLTAGE_LIMIT] <= servo.voltage_v / VOLT <= memory[Register.MAX_VOLTAGE_LIMIT]:
            faults |= Fault.VOLTAGE
        if servo.temperature_c >= memory[Register.MAX_TEMPERATURE_LIMIT]:
            faults |= Fault.TEMPERATURE
        return faults

    def protect(self) -> None:
        """Switch the torque off if there is a fault that the unloading condition names."""
        if self.faults & self._memory[Register.UNLOADING_CONDITION]:
            self.simulated.servo.disable()

    def read(self, address: int, size: int) -> bytes | None:
        """Registers as they are now; None beyond the memory."""
        if size == 0 or address + size > _MEMORY_SIZE:
            return None
        servo = self.simulated.servo
        peak_nm = servo.limits.inertia_kg_m2 * servo.limits.acceleration_rad_s2
        self._memory[Register.TORQUE_ENABLE] = servo.enabled
        FEEDBACK.layout.pack_into(
            self._memory,
            FEEDBACK.address,
            self._told_position,
            _saturate(servo.velocity_rad_s / RAD_PER_STEP, SIGN_BIT),
            _saturate(1000 * servo.torque_nm / peak_nm, LOAD_SIGN_BIT),
            as_byte(servo.voltage_v / VOLT),
            as_byte(servo.temperature_c),
            self.faults,
            servo.moving,
            _saturate(servo.current_a / AMPERE, SIGN_BIT),
        )
        return bytes(self._memory[address : address + size])

    def write(self, address: int, data: bytes) -> bool:
        """Take all of ``data`` or, if any of it is out of range or not writable, nothing: False."""
        if not self._allowed(address, data):
            return False
        self._memory[address : address + len(data)] = data
        touched = range(address, address + len(data))
        if not self._memory[Register.LOCK]:
            for saved in range(address, min(touched.stop, _EEPROM_END)):
                self._saved[saved] = self._memory[saved]
        if Register.TORQUE_ENABLE in touched:
            self._set_torque(bool(self._memory[Register.TORQUE_ENABLE]))
        if Register.OPERATING_MODE in touched or not _GOALS.isdisjoint(touched):
            self._follow()
        return True

    def restart(self) -> None:
        """What was written with the lock on is forgotten, and the torque is off."""
        self.simulated.servo.disable()
        self.registered = b""
        self._memory[:_EEPROM_END] = self._saved
        for register, (size, default, _low, _high) in _RAM.items():
            self._set(register, size, default)
        self._set(Register.TORQUE_LIMIT, 2, self._get(Register.MAX_TORQUE_LIMIT))
        self._set(Register.GOAL_POSITION, 2, self._told_position)

    @property
    def _told_position(self) -> int:
        """Register 56."""
        step = encode_position(self.simulated.servo.measured_rad)
        if self._turns:
            return _saturate(step - self._offset, SIGN_BIT)
        return (min(max(step, 0), STEPS_PER_TURN - 1) - self._offset) % STEPS_PER_TURN

    @property
    def _offset(self) -> int:
        """What its mode takes off the positions that it tells."""
        if self._memory[Register.OPERATING_MODE] != Mode.POSITION:
            return 0
        return decode_sign_magnitude(self._get(Register.HOMING_OFFSET), OFFSET_SIGN_BIT)

    def _set(self, register: Register, size: int, value: int) -> None:
        self._memory[register : register + size] = value.to_bytes(size, "little")

    def _get(self, register: Register) -> int:
        return int.from_bytes(self._memory[register : register + _WRITABLE[register][0]], "little")

    def _allowed(self, address: int, data: bytes) -> bool:
        end = address + len(data)
        if not data or end > _MEMORY_SIZE:
            return False
        after = bytearray(self._memory)
        after[address:end] = data
        left = set(range(address, end))
        for register, (size, _default, low, high) in _WRITABLE.items():
            covered = range(register, register + size)
            if not left.isdisjoint(covered):
                left.difference_update(covered)
                if not low <= int.from_bytes(after[register : register + size], "little") <= high:
                    return False
        return not left

    def _set_torque(self, on: bool) -> None:
        servo = self.simulated.servo
        if servo.motion is not None:  # whoever kept it going had its goal about here
            self._set(Register.GOAL_POSITION, 2, self._told_position)
        if on:
            servo.enable()
            self._follow()  # a goal from before is taken up at once: the reason why a master writes the goal first
        else:
            servo.disable()

    def _follow(self) -> None:
        """Do what the goals ask for in the mode that it is in."""
        servo = self.simulated.servo
        if not servo.enabled:
            return
        speed = decode_sign_magnitude(self._get(Register.GOAL_VELOCITY), SIGN_BIT)
        match self._memory[Register.OPERATING_MODE]:
            case Mode.POSITION:
                goal = decode_sign_magnitude(self._get(Register.GOAL_POSITION), SIGN_BIT)
                low, high = self._get(Register.MIN_POSITION_LIMIT), self._get(Register.MAX_POSITION_LIMIT)
                if low < high:
                    goal = (min(max(goal, low), high) + self._offset) % STEPS_PER_TURN
                else:
                    goal += self._offset
                velocity_rad_s = abs(speed) * RAD_PER_STEP if speed else servo.limits.velocity_rad_s
                servo.move_to(decode_position(goal), velocity_rad_s)
            case Mode.VELOCITY:
                servo.turn_at(speed * RAD_PER_STEP)
            case _:
                servo.hold()


class SimulatedSts(Responder[bytes]):
    """Simulated STS servos: ping, read, write, reg-write and action, sync read and write, restart.

    A goal written with the torque off moves nothing; it is taken up when the torque comes on, or the mode changes.
    The modes PWM and step can be set and stand still. A fault that the unloading condition (register 19) names takes
    the torque, which can be switched on again when its cause is gone. A broadcast ping is answered by all, one after
    the other.
    """

    def __init__(self, motors: Sequence[SimulatedMotor]) -> None:
        super().__init__(motors)
        self._servos = [_Servo(simulated) for simulated in motors]
        self._decoder = Decoder()

    def reboot(self, simulated: SimulatedMotor) -> None:
        """Power-up: as ``_Servo.restart``."""
        for servo in self._servos:
            if servo.simulated is simulated:
                servo.restart()

    def return_delay_ns(self, simulated: SimulatedMotor) -> int:
        """As register 7 says."""
        return next(servo.return_delay_ns for servo in self._servos if servo.simulated is simulated)

    def respond(self, unit: bytes) -> Iterator[tuple[SimulatedMotor, bytes]]:
        """Replies to the requests completed by ``unit``."""
        for packet in self._decoder.feed(unit):
            for servo in self._servos:
                servo.protect()
            for servo, params, error in self._execute(packet):
                reply = Packet(servo.told_id, servo.faults | error, params)
                yield servo.simulated, encode_packet(reply)

    def _execute(self, packet: Packet) -> Iterator[tuple[_Servo, bytes, int]]:
        """(servo, parameters, error) of each reply to one request."""
        bus_id, instruction, params = packet
        match instruction:
            case Instruction.SYNC_READ if bus_id == BROADCAST and len(params) > 2:
                for asked in params[2:]:
                    for servo in self._find(asked):
                        yield _reply_to_read(servo, params[0], params[1])
            case Instruction.SYNC_WRITE if bus_id == BROADCAST and len(params) > 2:
                address, size, blocks = params[0], params[1], params[2:]
                for at in range(0, len(blocks) - size, size + 1):
                    for servo in self._find(blocks[at]):
                        servo.write(address, blocks[at + 1 : at + 1 + size])
            case Instruction.PING:
                yield from ((servo, b"", 0) for servo in self._find(bus_id))
            case Instruction.READ if len(params) == 2:
                yield from (_reply_to_read(servo, *params) for servo in self._find(bus_id) if bus_id != BROADCAST)
            case Instruction.RESTART:
                for servo in self._find(bus_id):
                    servo.restart()
            case Instruction.WRITE | Instruction.REG_WRITE | Instruction.ACTION:
                for servo in self._find(bus_id):
                    answers = servo.responds_to_all and bus_id != BROADCAST
                    taken = _take(servo, instruction, params)
                    if answers:
                        yield servo, b"", 0 if taken else _REFUSED_PARAMETER
            case _:
                return  # a reply, an echo, an instruction that this servo does not have

    def _find(self, bus_id: int) -> list[_Servo]:
        return [servo for servo in self._servos if bus_id in {servo.bus_id, BROADCAST}]


def _take(servo: _Servo, instruction: int, params: bytes) -> bool:
    match instruction:
        case Instruction.REG_WRITE:
            servo.registered = params
            return len(params) > 1
        case Instruction.ACTION:
            params, servo.registered = servo.registered, b""
            return not params or servo.write(params[0], params[1:])
        case _:
            return bool(params) and servo.write(params[0], params[1:])


def _reply_to_read(servo: _Servo, address: int, size: int) -> tuple[_Servo, bytes, int]:
    data = servo.read(address, size)
    return (servo, data, 0) if data is not None else (servo, b"", _REFUSED_PARAMETER)


def _saturate(value: float, sign_bit: int) -> int:
    most = (1 << sign_bit) - 1
    return encode_sign_magnitude(min(max(round(value), -most), most), sign_bit)


FAMILY: type[Family[Any, Any]] = FeetechSts
SIMULATED: type[Responder[Any]] = SimulatedSts
