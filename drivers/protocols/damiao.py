"""Damiao motors (DM4310 and its kin) on CAN, standard frames: the codec, the gateway's side, the motors' side.

    id        MIT       p[15:8] p[7:0] v[11:4] v[3:0]|kp[11:8] kp[7:0] kd[11:4] kd[3:0]|t[11:8] t[7:0]
    id        system    FF FF FF FF FF FF FF code
    100 + id  POS_VEL   position f32, velocity f32       (little-endian)
    200 + id  VEL       velocity f32
    300 + id  FORCE_POS (not used here)
    7FF       request   idL idH CC 0 0 0 0 0             (refresh)
              register  idL idH 33|55|AA RID value32     (read, write, save)
    MST_ID    feedback  ERR<<4|id p[15:8] p[7:0] v[11:4] v[3:0]|t[11:8] t[7:0] T_MOS T_rotor
              register  idL idH 33|55|AA RID value32

Feedback holds only the low nibble of the motor's id, hence ids 1 to 15: 17 would look like 1. Feedback and register
replies share an arbitration id. A register reply is looked for only in an exchange that waits for it, by command
and RID. Conversely, a frame of that shape is never taken for feedback: a late reply would read as a motor at -PMAX.
Own requests have the id 7FF, on which no motor replies, and are never decoded.

Positions, velocities and torques are scaled by the motor's own PMAX, VMAX and TMAX, read when it is connected:
published presets disagree. Sources: python-damiao-driver docs, communication protocol and registers;
damiao-motor damiao_motor/core/motor.py; LeRobot motors/damiao.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from math import inf, isfinite, nan
from struct import Struct
from typing import Any, Final, NamedTuple

from drivers.clock import MonotonicNs
from drivers.errors import MotorRefused
from drivers.family import CAN_FRAME_BITS, CanFrame, CanId, Exchange, Family, Procedure, Ready, Reply
from drivers.motor import SETPOINTS, Feedback, Kind, Motor, MotorInfo, Order, Status
from drivers.sim.responder import Responder, SimulatedMotor, as_byte

REQUEST_ID: Final = 0x7FF
KP_MAX: Final = 500.0
KD_MAX: Final = 5.0
TIMEOUT_NS: Final = 50_000  # a unit of TIMEOUT (almond-bot/axol almond_axol/motor/damiao.py)
HOLD_VELOCITY_RAD_S: Final = 1.0  # of the small way back to the point where a motor was told to hold

_POS_VEL = Struct("<ff")
_FLOAT = Struct("<f")
_UINT = Struct("<I")


class Base(IntEnum):
    """What a command's identifier is, less the motor's id (python-damiao-driver docs, communication protocol)."""

    MIT = 0x000
    POS_VEL = 0x100
    VEL = 0x200
    FORCE_POS = 0x300


class System(IntEnum):
    """Last byte of a system frame (python-damiao-driver docs, communication protocol)."""

    CLEAR_ERROR = 0xFB
    ENABLE = 0xFC
    DISABLE = 0xFD
    SET_ZERO = 0xFE


class Command(IntEnum):
    """Third byte of a frame on 7FF (python-damiao-driver docs, communication protocol)."""

    READ = 0x33
    WRITE = 0x55
    SAVE = 0xAA
    REFRESH = 0xCC


class Rid(IntEnum):
    """Register ids (python-damiao-driver docs, registers)."""

    UV_VALUE = 0
    KT_VALUE = 1
    OT_VALUE = 2
    OC_VALUE = 3
    ACC = 4
    DEC = 5
    MAX_SPD = 6
    MST_ID = 7
    ESC_ID = 8
    TIMEOUT = 9
    CTRL_MODE = 10
    HW_VER = 13
    SW_VER = 14
    SN = 15
    GR = 20
    PMAX = 21
    VMAX = 22
    TMAX = 23
    OV_VALUE = 29
    CAN_BR = 35
    SUB_VER = 36
    P_M = 80
    XOUT = 81


UNSIGNED: Final = frozenset(
    {Rid.MST_ID, Rid.ESC_ID, Rid.TIMEOUT, Rid.CTRL_MODE, Rid.HW_VER, Rid.SW_VER, Rid.SN, Rid.CAN_BR, Rid.SUB_VER}
)
"""Registers that hold a 32-bit unsigned number; all others hold a float."""


SCALING: Final = (Rid.PMAX, Rid.VMAX, Rid.TMAX)
"""Registers that hold the fields of ``Scale``."""


class Mode(IntEnum):
    """Values of CTRL_MODE (python-damiao-driver docs, motor control modes)."""

    MIT = 1
    POS_VEL = 2
    VEL = 3
    FORCE_POS = 4


class State(IntEnum):
    """ERR nibble of feedback (python-damiao-driver docs, communication protocol)."""

    DISABLED = 0x0
    ENABLED = 0x1
    OVER_VOLTAGE = 0x8
    UNDER_VOLTAGE = 0x9
    OVER_CURRENT = 0xA
    MOS_OVER_TEMPERATURE = 0xB
    ROTOR_OVER_TEMPERATURE = 0xC
    COMMUNICATION_LOST = 0xD
    OVERLOAD = 0xE


NO_FAULT: Final = frozenset({State.DISABLED, State.ENABLED})
_COMMON: Final[dict[int, Status]] = {
    State.DISABLED: Status(0),
    State.ENABLED: Status.ENABLED,
    State.OVER_VOLTAGE: Status.FAULT_VOLTAGE,
    State.UNDER_VOLTAGE: Status.FAULT_VOLTAGE,
    State.OVER_CURRENT: Status.FAULT_CURRENT,
    State.MOS_OVER_TEMPERATURE: Status.FAULT_TEMPERATURE,
    State.ROTOR_OVER_TEMPERATURE: Status.FAULT_TEMPERATURE,
    State.COMMUNICATION_LOST: Status.FAULT_COMMUNICATION,
    State.OVERLOAD: Status.FAULT_OVERLOAD,
}

# --- frames -----------------------------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """What the ends of the number ranges stand for: +-PMAX rad, +-VMAX rad/s, +-TMAX N m."""

    pmax_rad: float
    vmax_rad_s: float
    tmax_nm: float


class Mit(NamedTuple):
    """A MIT command; gains in N m/rad and N m s/rad."""

    position_rad: float
    velocity_rad_s: float
    kp: float
    kd: float
    torque_nm: float


class RawFeedback(NamedTuple):
    """A feedback frame, scaled; temperatures in C."""

    nibble: int  # of the motor's id
    state: int  # State, or a number that no page lists
    position_rad: float
    velocity_rad_s: float
    torque_nm: float
    mos_c: int
    rotor_c: int


def encode_number(value: float, low: float, high: float, bits: int) -> int:
    """``value``, clipped to ``low``..``high``, as a fraction of ``bits`` bits; truncated, as the vendor's code does."""
    return int((min(max(value, low), high) - low) / (high - low) * ((1 << bits) - 1))


def decode_number(raw: int, low: float, high: float, bits: int) -> float:
    """The inverse of ``encode_number``."""
    return raw / ((1 << bits) - 1) * (high - low) + low


def encode_mit(command: Mit, scale: Scale) -> bytes:
    """Data of a MIT frame (identifier: the motor's id)."""
    pmax, vmax, tmax = scale
    return (
        encode_number(command.position_rad, -pmax, pmax, 16) << 48
        | encode_number(command.velocity_rad_s, -vmax, vmax, 12) << 36
        | encode_number(command.kp, 0, KP_MAX, 12) << 24
        | encode_number(command.kd, 0, KD_MAX, 12) << 12
        | encode_number(command.torque_nm, -tmax, tmax, 12)
    ).to_bytes(8, "big")


def decode_mit(data: bytes, scale: Scale) -> Mit:
    """A MIT command from its eight bytes."""
    word = int.from_bytes(data, "big")
    pmax, vmax, tmax = scale
    return Mit(
        decode_number(word >> 48, -pmax, pmax, 16),
        decode_number(word >> 36 & 0xFFF, -vmax, vmax, 12),
        decode_number(word >> 24 & 0xFFF, 0, KP_MAX, 12),
        decode_number(word >> 12 & 0xFFF, 0, KD_MAX, 12),
        decode_number(word & 0xFFF, -tmax, tmax, 12),
    )


def encode_feedback(feedback: RawFeedback, scale: Scale) -> bytes:
    """Data of a feedback frame (identifier: the motor's MST_ID)."""
    pmax, vmax, tmax = scale
    return (
        (feedback.state << 4 | feedback.nibble) << 56
        | encode_number(feedback.position_rad, -pmax, pmax, 16) << 40
        | encode_number(feedback.velocity_rad_s, -vmax, vmax, 12) << 28
        | encode_number(feedback.torque_nm, -tmax, tmax, 12) << 16
        | feedback.mos_c << 8
        | feedback.rotor_c
    ).to_bytes(8, "big")


def decode_feedback(data: bytes, scale: Scale) -> RawFeedback:
    """A feedback frame from its eight bytes."""
    word = int.from_bytes(data, "big")
    pmax, vmax, tmax = scale
    return RawFeedback(
        nibble=data[0] & 0xF,
        state=data[0] >> 4,
        position_rad=decode_number(word >> 40 & 0xFFFF, -pmax, pmax, 16),
        velocity_rad_s=decode_number(word >> 28 & 0xFFF, -vmax, vmax, 12),
        torque_nm=decode_number(word >> 16 & 0xFFF, -tmax, tmax, 12),
        mos_c=data[6],
        rotor_c=data[7],
    )


def make_system(bus_id: int, code: System) -> CanFrame:
    """Enable, disable, set zero or clear error."""
    return CanFrame(bus_id, b"\xff" * 7 + bytes((code,)))


def make_refresh(bus_id: int) -> CanFrame:
    """Ask for feedback without commanding anything."""
    return CanFrame(REQUEST_ID, bytes((bus_id & 0xFF, bus_id >> 8, Command.REFRESH, 0, 0, 0, 0, 0)))


def make_pos_vel(bus_id: int, position_rad: float, velocity_rad_s: float) -> CanFrame:
    """Go to a position at a velocity, in mode POS_VEL."""
    return CanFrame(Base.POS_VEL + bus_id, _POS_VEL.pack(position_rad, velocity_rad_s))


def make_vel(bus_id: int, velocity_rad_s: float) -> CanFrame:
    """Turn at a velocity, in mode VEL."""
    return CanFrame(Base.VEL + bus_id, _FLOAT.pack(velocity_rad_s) + bytes(4))


def make_torque(bus_id: int, torque_nm: float, scale: Scale) -> CanFrame:
    """Push with a torque alone, in mode MIT: neither stiffness nor damping."""
    return CanFrame(Base.MIT + bus_id, encode_mit(Mit(0, 0, 0, 0, torque_nm), scale))


def make_register(bus_id: int, command: Command, rid: int, value: bytes = bytes(4)) -> CanFrame:
    """Read, write or save a register; a write changes the motor's memory until its power goes, a save its flash."""
    return CanFrame(REQUEST_ID, bytes((bus_id & 0xFF, bus_id >> 8, command, rid)) + value)


def encode_value(rid: int, value: float) -> bytes:
    """A register's value as its four bytes."""
    return _UINT.pack(int(value)) if rid in UNSIGNED else _FLOAT.pack(value)


def decode_value(rid: int, data: bytes) -> float:
    """A register's value from its four bytes."""
    value: float = (_UINT if rid in UNSIGNED else _FLOAT).unpack(data)[0]
    return value


def _make_mode(bus_id: int, mode: Mode) -> CanFrame:
    return make_register(bus_id, Command.WRITE, Rid.CTRL_MODE, encode_value(Rid.CTRL_MODE, mode))


def is_register_reply(data: bytes, bus_id: int) -> bool:
    """Whether this is the reply to a register command rather than feedback, of motor ``bus_id``.

    As feedback it would be a disabled motor within 0.6 % of -PMAX that turns at more than a third of VMAX.
    """
    registers = (Command.READ, Command.WRITE, Command.SAVE)
    return data[0] == bus_id and data[1] == 0 and data[2] in registers and data[3] <= max(Rid)


# --- the gateway's side -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Options:
    """``master_id``: the arbitration id of the motor's replies (register MST_ID); by custom its id + 0x10."""

    master_id: int | None = None

    def __post_init__(self) -> None:
        if self.master_id is not None and not 0 <= self.master_id < REQUEST_ID:
            raise ValueError(f"master_id is {self.master_id:#x}; it must be 0 to {REQUEST_ID - 1:#x}")


def master_id_of(motor: Motor) -> int:
    """The arbitration id of a motor's replies."""
    configured = motor.options.master_id if isinstance(motor.options, Options) else None
    return motor.bus_id + 0x10 if configured is None else configured


@dataclass(slots=True)
class _Known:
    """What was learned about one motor."""

    master_id: int
    scale: Scale | None = None  # None until connected: feedback cannot be scaled, and is not guessed
    mode: int | None = None
    state: int | None = None  # of its latest feedback
    position_rad: float = nan  # likewise
    armed: bool = False  # its TIMEOUT is as configured


class _Setpoint(NamedTuple):
    """What triggers a motor that is prepared."""

    mode: Mode
    frame: CanFrame
    change: bool  # of its mode: told right before


class Damiao(Family[CanFrame, CanFrame]):
    """Damiao motors. ``temperature_c`` is the rotor's, the hotter and slower of the two they tell.

    Positions and holding are mode POS_VEL, velocities VEL, torques MIT without stiffness and damping. What an enabled
    motor follows from a change of mode until the first setpoint of the new mode is not documented. So that setpoint
    travels right behind the change, in one exchange (a motor that kept its mode ignores it), and once more when the
    change was read back. Modes are written to the motor's memory only: nothing is saved, its flash wears.

    The position that it tells wraps at +-PMAX. Beyond, no limit would be seen to be passed, and to hold one that
    wrapped would be to turn all the way back. So the motor's range (``Motor.position_rad``) has to lie inside.

    Its watchdog is TIMEOUT: an enabled motor that hears no command for so long disables itself, in state D, until the
    error is cleared. Which frames it counts is not documented beyond "CAN command"; that a refresh, which names the
    motor and is answered by it, is one of them is unverified on hardware. If it were not, a motor at rest would fall
    into D soon after it was enabled. TIMEOUT is written to the motor's memory only.
    """

    name = "damiao"
    medium = "can"
    bus_ids = range(1, 16)
    kinds = frozenset(
        {Kind.ENABLE, Kind.DISABLE, Kind.POSITION, Kind.VELOCITY, Kind.TORQUE, Kind.STOP, Kind.CLEAR_FAULT}
    )
    Options = Options
    examples = (Options(),)
    watchdog = True

    def __init__(self, motors: Sequence[Motor]) -> None:
        super().__init__(motors)
        self._known = {bus_id: _Known(master_id_of(motor)) for bus_id, motor in self.motors.items()}
        self._senders = {(known.master_id, bus_id & 0xF): bus_id for bus_id, known in self._known.items()}
        self._reply_ids = {known.master_id for known in self._known.values()}

    @classmethod
    def poll_bits(cls, motors: Sequence[Motor]) -> int:
        """A refresh and a feedback frame for each motor."""
        return 2 * len(motors) * CAN_FRAME_BITS

    @classmethod
    def explain(cls, vendor_error: int) -> Sequence[str]:
        """The state in the ERR nibble, which is one fault at a time."""
        return (_name(vendor_error),) if vendor_error else ()

    @classmethod
    def can_ids(cls, motor: Motor) -> Iterable[CanId]:
        """Commands of each mode, requests to all, and the replies, of which motors may share the identifier."""
        yield CanId(REQUEST_ID, "requests")
        for base in Base:
            yield CanId(base + motor.bus_id, f"{base.name} commands")
        yield CanId(master_id_of(motor), "replies", "master_id")

    def unpack(self, unit: CanFrame) -> Iterable[CanFrame]:
        """The frame itself, if it can be a motor's reply: standard, eight bytes, not on the id of our own requests."""
        if unit.extended or unit.can_id == REQUEST_ID:
            return ()
        if len(unit.data) != 8:
            self.garbage += unit.can_id in self._reply_ids
            return ()
        return (unit,)

    def poll(self, bus_ids: Sequence[int]) -> Exchange[CanFrame, CanFrame]:
        """A refresh for each motor; nothing is commanded."""
        asked = frozenset(bus_ids)

        def match(frame: CanFrame) -> Reply | None:
            found = self._feedback(frame)
            if found is None or found[0] not in asked:
                return None
            bus_id, raw = found
            return bus_id, _common_feedback(raw)

        return Exchange([make_refresh(bus_id) for bus_id in bus_ids], asked, match)

    def identify(self, bus_id: int) -> Procedure[CanFrame, CanFrame, MotorInfo | None]:
        """As ``connect``, with whatever identifier it replies."""
        found = yield from self._introduce(bus_id)
        if found is None:
            return None
        can_id, info = found
        return info if can_id == bus_id + 0x10 else replace(info, options={"master_id": can_id})

    def connect(self, bus_id: int) -> Procedure[CanFrame, CanFrame, MotorInfo | None]:
        """Find the motor and read its scaling, mode and version.

        Raises MotorRefused if its replies come with another identifier than configured, its scaling is absurd, or it
        may be sent to where its positions wrap.
        """
        known = self._known[bus_id] = _Known(self._known[bus_id].master_id)
        found = yield from self._introduce(bus_id)
        if found is None:
            return None
        can_id, info = found
        if can_id != known.master_id:
            detail = f"motor {bus_id} replies with identifier {can_id:#x}, expected {known.master_id:#x}"
            raise MotorRefused("refused", f"{detail}: set master_id = {can_id:#x}, or MST_ID (register 7) of the motor")
        scale = Scale(*(info.details[rid.name] for rid in SCALING))
        absurd = [f"{rid.name} is {value}" for rid, value in zip(SCALING, scale, strict=True) if not 0 < value < inf]
        if absurd:
            raise MotorRefused("refused", f"motor {bus_id}: {', '.join(absurd)}; each must be finite and above 0")
        low, high = self.motors[bus_id].position_rad
        if isfinite(high - low) and not -scale.pmax_rad < low <= high < scale.pmax_rad:
            wrong = f"motor {bus_id}: position_rad is {low:g} to {high:g}, and its positions wrap at {scale.pmax_rad:g}"
            raise MotorRefused("refused", f"{wrong}: set limits inside, or a larger PMAX (register 21) of the motor")
        known.scale, known.mode = scale, int(info.details[Rid.CTRL_MODE.name])
        try:
            present = yield from self._command(bus_id, make_refresh(bus_id))
        except MotorRefused:
            return None
        return replace(info, driven=present.state == State.ENABLED and known.mode in {Mode.MIT, Mode.VEL})

    def _introduce(self, bus_id: int) -> Procedure[CanFrame, CanFrame, tuple[int, MotorInfo] | None]:
        """The arbitration id of the motor's replies, and what it says of itself; None if it keeps silent."""
        found = (yield _register(bus_id, Command.READ, Rid.MST_ID)).get(bus_id)
        if found is None:
            return None
        can_id, _ = found
        read: dict[Rid, float] = {}
        try:
            for rid in (*SCALING, Rid.CTRL_MODE, Rid.SW_VER):
                read[rid] = yield from self._read(bus_id, rid)
        except MotorRefused:
            return None
        version = read.pop(Rid.SW_VER)
        return can_id, MotorInfo("Damiao", f"{version:.0f}", {rid.name: value for rid, value in read.items()})

    def refresh(self, bus_id: int) -> Procedure[CanFrame, CanFrame, None]:
        """Read the mode again: a motor that lost its power has forgotten it. Silence is left to ``poll`` to notice."""
        try:
            self._known[bus_id].mode = int((yield from self._read(bus_id, Rid.CTRL_MODE)))
        except MotorRefused:
            return

    def order(self, bus_id: int, order: Order) -> Procedure[CanFrame, CanFrame, str]:
        """Carry out an order and see in the motor's feedback that it took it."""
        known = self._known[bus_id]
        if known.scale is None:
            raise MotorRefused("motor_offline", f"motor {bus_id} was not connected: its scaling is unknown")
        match order.kind:
            case Kind.ENABLE:
                return (yield from self._enable(bus_id))
            case Kind.DISABLE:
                yield from self._command(bus_id, make_system(bus_id, System.DISABLE))
                yield from self._settle(bus_id, lambda state: state != State.ENABLED, "disable (FD)")
                return "disabled"
            case Kind.POSITION | Kind.VELOCITY | Kind.TORQUE:
                return (yield from self.set_alone(bus_id, order))
            case Kind.STOP:
                return (yield from self._stop(bus_id, known))
            case Kind.CLEAR_FAULT:
                yield from self._command(bus_id, make_system(bus_id, System.CLEAR_ERROR))
                yield from self._settle(bus_id, lambda state: state in NO_FAULT, "clear error (FB)")
                return "no fault"
            case _:
                raise MotorRefused("unsupported", f"{self.name} has no order {order.kind}")

    def prepare(self, bus_id: int, order: Order) -> Procedure[CanFrame, CanFrame, Ready]:
        """See that the motor is enabled, and its mode; arm its watchdog. A change of mode is part of the trigger."""
        known = self._known[bus_id]
        if order.kind not in SETPOINTS:
            raise MotorRefused("unsupported", f"{self.name} has no setpoint {order.kind}")
        if known.scale is None:
            raise MotorRefused("motor_offline", f"motor {bus_id} was not connected: its scaling is unknown")
        mode, frame, told = _setpoint(bus_id, order, known.scale)
        if known.state != State.ENABLED:
            reported = "no feedback yet" if known.state is None else f"the motor reports {_name(known.state)}"
            raise MotorRefused("not_enabled", reported)
        yield from self._arm(bus_id)
        if known.mode != mode:
            known.mode = int((yield from self._read(bus_id, Rid.CTRL_MODE)))
        return Ready(_Setpoint(mode, frame, known.mode != mode), told)

    def fire(self, ready: Mapping[int, Ready]) -> Exchange[CanFrame, CanFrame]:
        """One burst of frames; each is answered by feedback."""
        frames = []
        for bus_id, one in ready.items():
            setpoint: _Setpoint = one.trigger
            if setpoint.change:
                self._known[bus_id].mode = None  # until it is read back
                frames.append(_make_mode(bus_id, setpoint.mode))
            frames.append(setpoint.frame)
        return Exchange(frames, frozenset(ready), self._feedback)

    def confirm(self, bus_id: int, ready: Ready, reply: Any) -> Procedure[CanFrame, CanFrame, str]:
        """Read a new mode back, and repeat the setpoint when it is certain; see that the motor is still enabled."""
        setpoint: _Setpoint = ready.trigger
        feedback: RawFeedback | None = reply
        if setpoint.change:
            yield from self._see_mode(bus_id, setpoint.mode)
            feedback = yield from self._command(bus_id, setpoint.frame)
        if feedback is None:
            raise MotorRefused("no_reply", f"no feedback to {setpoint.frame} from motor {bus_id}")
        if feedback.state != State.ENABLED:
            raise MotorRefused("refused", f"sent {setpoint.frame}; the motor reports {_name(feedback.state)}")
        return ready.told

    def halt(self, bus_ids: Iterable[int]) -> Exchange[CanFrame, CanFrame]:
        """One burst: velocity 0, or the order to hold where it was seen last, behind a change of mode if need be."""
        frames = []
        asked = [bus_id for bus_id in bus_ids if self._known[bus_id].state in {None, State.ENABLED}]
        for bus_id in asked:
            known = self._known[bus_id]
            if known.mode == Mode.VEL or known.state is None:  # of which nothing is known: in other modes it is ignored
                frames.append(make_vel(bus_id, 0.0))
                continue
            if known.mode != Mode.POS_VEL:
                known.mode = None
                frames.append(_make_mode(bus_id, Mode.POS_VEL))
            frames.append(make_pos_vel(bus_id, known.position_rad, HOLD_VELOCITY_RAD_S))
        return Exchange(frames, frozenset(asked), self._feedback)

    def _arm(self, bus_id: int) -> Procedure[CanFrame, CanFrame, None]:
        """Set TIMEOUT, unless it is known to be set."""
        known, wanted = self._known[bus_id], self.motors[bus_id].watchdog_ns // TIMEOUT_NS
        if not wanted or known.armed:
            return
        found = yield from self._read(bus_id, Rid.TIMEOUT)
        if found != wanted:
            yield _register(bus_id, Command.WRITE, Rid.TIMEOUT, encode_value(Rid.TIMEOUT, wanted))
            found = yield from self._read(bus_id, Rid.TIMEOUT)
        if found != wanted:
            told = f"TIMEOUT (register 9): sent {wanted}, read {found:.0f}"
            raise MotorRefused("refused", f"its watchdog cannot be armed, {told}")
        known.armed = True

    def _enable(self, bus_id: int) -> Procedure[CanFrame, CanFrame, str]:
        present = yield from self._command(bus_id, make_refresh(bus_id))
        if present.state not in NO_FAULT:
            raise MotorRefused("refused", f"the motor reports {_name(present.state)}; clear the fault first")
        self._known[bus_id].armed = False  # it may have been without power meanwhile
        yield from self._arm(bus_id)
        # which setpoint an enabled motor starts from is not documented: the one to hold follows with no gap
        hold = make_pos_vel(bus_id, present.position_rad, HOLD_VELOCITY_RAD_S)
        yield from self._change_mode(bus_id, Mode.POS_VEL, hold)
        yield from self._command(bus_id, make_system(bus_id, System.ENABLE), hold)
        yield from self._settle(bus_id, lambda state: state == State.ENABLED, "enable (FC)")
        return f"enabled, holding {present.position_rad:.4f} rad"

    def _stop(self, bus_id: int, known: _Known) -> Procedure[CanFrame, CanFrame, str]:
        # what turns at a velocity stands still at once, before its mode changes; in other modes the frame is ignored
        rest = [] if known.mode == Mode.POS_VEL else [make_vel(bus_id, 0.0)]
        present = yield from self._command(bus_id, make_refresh(bus_id), *rest)
        if present.state != State.ENABLED:
            return f"the motor is {_name(present.state)} already"
        hold = make_pos_vel(bus_id, present.position_rad, HOLD_VELOCITY_RAD_S)
        if known.mode != Mode.POS_VEL:  # ours, or of whoever else runs it
            yield from self._change_mode(bus_id, Mode.POS_VEL, hold)
        yield from self._command(bus_id, hold)
        return f"holding {present.position_rad:.4f} rad"

    def _change_mode(self, bus_id: int, mode: Mode, setpoint: CanFrame) -> Procedure[CanFrame, CanFrame, None]:
        """Make sure of CTRL_MODE; if it has to be written, ``setpoint`` follows with no gap."""
        known = self._known[bus_id]
        known.mode = int((yield from self._read(bus_id, Rid.CTRL_MODE)))
        if known.mode == mode:
            return
        known.mode = None  # until it is read back
        value = encode_value(Rid.CTRL_MODE, mode)
        if bus_id not in (yield _register(bus_id, Command.WRITE, Rid.CTRL_MODE, value, setpoint)):
            raise MotorRefused("no_reply", f"no reply to CTRL_MODE (register 10) := {mode:d}")
        yield from self._see_mode(bus_id, mode)

    def _see_mode(self, bus_id: int, mode: Mode) -> Procedure[CanFrame, CanFrame, None]:
        found = yield from self._read(bus_id, Rid.CTRL_MODE)
        self._known[bus_id].mode = int(found)
        if found != mode:
            raise MotorRefused("refused", f"CTRL_MODE (register 10): sent {mode:d}, read {found:.0f}")

    def _read(self, bus_id: int, rid: Rid) -> Procedure[CanFrame, CanFrame, float]:
        found = (yield _register(bus_id, Command.READ, rid)).get(bus_id)
        if found is None:
            raise MotorRefused("no_reply", f"no reply to a read of {rid.name} (register {rid}) from motor {bus_id}")
        return decode_value(rid, found[1])

    def _command(self, bus_id: int, *frames: CanFrame) -> Procedure[CanFrame, CanFrame, RawFeedback]:
        """Send frames that are answered by feedback; the feedback to the first of them."""

        def match(frame: CanFrame) -> Reply | None:
            found = self._feedback(frame)
            return found if found is not None and found[0] == bus_id else None

        feedback: RawFeedback | None = (yield Exchange(frames, frozenset({bus_id}), match)).get(bus_id)
        if feedback is None:
            raise MotorRefused("no_reply", f"no feedback to {frames[0]} from motor {bus_id}")
        return feedback

    def _settle(self, bus_id: int, wanted: Callable[[int], bool], sent: str) -> Procedure[CanFrame, CanFrame, None]:
        """See a state in feedback that was asked for after the command: the one that answers it may be from before."""
        feedback = yield from self._command(bus_id, make_refresh(bus_id))
        if not wanted(feedback.state):
            raise MotorRefused("refused", f"sent {sent}; the motor reports {_name(feedback.state)}")

    def _feedback(self, frame: CanFrame) -> tuple[int, RawFeedback] | None:
        """The motor that sent this feedback, and what it says; None if it is anything else."""
        bus_id = self._senders.get((frame.can_id, frame.data[0] & 0xF))
        if bus_id is None or is_register_reply(frame.data, bus_id):
            return None
        known = self._known[bus_id]
        if known.scale is None:
            return None
        raw = decode_feedback(frame.data, known.scale)
        known.state, known.position_rad = raw.state, raw.position_rad
        return bus_id, raw


def _setpoint(bus_id: int, order: Order, scale: Scale) -> tuple[Mode, CanFrame, str]:
    """The mode that an order needs, its setpoint, and what it does. Raises MotorRefused if it is not within bounds."""
    value, velocity = order.value, order.velocity_rad_s
    match order.kind:
        case Kind.POSITION:
            if not (isfinite(velocity) and velocity >= 0):
                raise MotorRefused("malformed", f"position {value} rad at {velocity} rad/s")
            _check_within(value, "rad", "PMAX", scale.pmax_rad)
            told = f"going to {value:.4f} rad at {velocity:.4f} rad/s"
            return Mode.POS_VEL, make_pos_vel(bus_id, value, velocity), told
        case Kind.VELOCITY:
            _check_within(value, "rad/s", "VMAX", scale.vmax_rad_s)
            return Mode.VEL, make_vel(bus_id, value), f"turning at {value:.4f} rad/s"
        case _:
            _check_within(value, "N m", "TMAX", scale.tmax_nm)
            return Mode.MIT, make_torque(bus_id, value, scale), f"pushing with {value:.4f} N m"


def _check_within(value: float, unit: str, register: str, most: float) -> None:
    if not isfinite(value):
        raise MotorRefused("malformed", f"{value} {unit}")
    if abs(value) > most:
        raise MotorRefused("out_of_limits", f"{value} {unit}; the motor's {register} is {most} {unit}")


def _register(
    bus_id: int, command: Command, rid: Rid, value: bytes = bytes(4), *behind: CanFrame
) -> Exchange[CanFrame, CanFrame]:
    """A register command, with what must follow it at once; the reply is (arbitration id, four bytes of value).

    The reply names motor, command and register: its arbitration id need not be known, and is checked by ``connect``.
    """
    request = make_register(bus_id, command, rid, value)

    def match(frame: CanFrame) -> Reply | None:
        return (bus_id, (frame.can_id, frame.data[4:])) if frame.data[:4] == request.data[:4] else None

    return Exchange([request, *behind], frozenset({bus_id}), match)


def _common_feedback(raw: RawFeedback) -> Feedback:
    return Feedback(
        position_rad=raw.position_rad,
        velocity_rad_s=raw.velocity_rad_s,
        temperature_c=float(raw.rotor_c),
        torque_nm=raw.torque_nm,
        status=int(_COMMON.get(raw.state, Status.FAULT_OTHER)),
        vendor_error=0 if raw.state in NO_FAULT else raw.state,
    )


def _name(state: int) -> str:
    name = State(state).name.lower().replace("_", " ") if state in _COMMON else "an unknown state"
    return f"{name} ({state:X})"


# --- the motors' side -------------------------------------------------------------------------------------------------

_DEFAULTS: Final[dict[int, float]] = {  # of a DM4310
    Rid.UV_VALUE: 15.0,
    Rid.KT_VALUE: 0.0,
    Rid.OT_VALUE: 100.0,
    Rid.OC_VALUE: 0.98,
    Rid.ACC: 30.0,
    Rid.DEC: -30.0,
    Rid.MAX_SPD: 30.0,
    Rid.TIMEOUT: 0,
    Rid.CTRL_MODE: Mode.MIT,
    Rid.HW_VER: 1,
    Rid.SW_VER: 5013,
    Rid.SN: 0,
    Rid.GR: 10.0,
    Rid.PMAX: 12.5,
    Rid.VMAX: 30.0,
    Rid.TMAX: 10.0,
    Rid.OV_VALUE: 32.0,
    Rid.CAN_BR: 4,
    Rid.SUB_VER: 1,
}
_READ_ONLY: Final = frozenset({Rid.HW_VER, Rid.SW_VER, Rid.SN, Rid.GR, Rid.SUB_VER, Rid.P_M, Rid.XOUT})
_ALLOWED: Final[dict[int, tuple[float, float]]] = {  # lowest and highest that a write may set, where it matters here
    Rid.MST_ID: (0, REQUEST_ID),
    Rid.ESC_ID: (0, REQUEST_ID),
    Rid.CTRL_MODE: (Mode.MIT, Mode.FORCE_POS),
    Rid.CAN_BR: (0, 4),
    Rid.PMAX: (0.001, 3.4e38),
    Rid.VMAX: (0.001, 3.4e38),
    Rid.TMAX: (0.001, 3.4e38),
}


class _Motor:
    """One simulated motor: its registers over its physics."""

    def __init__(self, simulated: SimulatedMotor) -> None:
        self.simulated = simulated
        self._saved = dict(_DEFAULTS)  # in flash
        self._saved[Rid.MST_ID] = master_id_of(simulated.motor)
        self._saved[Rid.ESC_ID] = simulated.motor.bus_id
        self._registers = dict(self._saved)
        if simulated.servo.enabled:  # somebody was here before: no longer as it came from the factory
            self._registers[Rid.CTRL_MODE] = Mode.POS_VEL
        self._zero_rad = 0.0  # of the servo, where the motor counts from
        self._fault: State | None = None
        self.heard_ns = MonotonicNs(0)

    @property
    def bus_id(self) -> int:
        return int(self._registers[Rid.ESC_ID])

    @property
    def scale(self) -> Scale:
        return Scale(*(self._registers[rid] for rid in SCALING))

    @property
    def mode(self) -> int:
        return int(self._registers[Rid.CTRL_MODE])

    @property
    def _told_id(self) -> int:
        """Its id in what it sends."""
        return self.bus_id if self.simulated.faults.wrong_id is None else self.simulated.reply_id

    def reboot(self) -> None:
        """What was saved stays, the zero among it; all else is forgotten, and the torque is off."""
        self._registers = dict(self._saved)
        self._fault = None
        self.simulated.servo.disable()

    def watch(self, now: MonotonicNs) -> None:
        """Disable an enabled motor that has heard nothing for TIMEOUT."""
        timeout_ns = self._registers[Rid.TIMEOUT] * TIMEOUT_NS
        if timeout_ns and self.simulated.servo.enabled and now - self.heard_ns > timeout_ns:
            self._fault = State.COMMUNICATION_LOST
            self.simulated.servo.disable()

    def feedback(self) -> CanFrame:
        """What it tells after every command."""
        servo, scale = self.simulated.servo, self.scale
        if servo.temperature_c >= self._registers[Rid.OT_VALUE]:
            self._fault = State.ROTOR_OVER_TEMPERATURE
            servo.disable()
        state = self._fault if self._fault is not None else State.ENABLED if servo.enabled else State.DISABLED
        turns = (servo.measured_rad - self._zero_rad + scale.pmax_rad) % (2 * scale.pmax_rad)  # wraps at +-PMAX
        raw = RawFeedback(
            nibble=self._told_id & 0xF,
            state=state,
            position_rad=turns - scale.pmax_rad,
            velocity_rad_s=servo.velocity_rad_s,
            torque_nm=servo.torque_nm,
            mos_c=as_byte((servo.temperature_c + servo.limits.ambient_c) / 2),  # between the rotor and the air
            rotor_c=as_byte(servo.temperature_c),
        )
        return self._reply(encode_feedback(raw, scale))

    def register(self, command: int, rid: int, value: bytes) -> CanFrame | None:
        """The reply to a register command; None if there is no such register."""
        servo = self.simulated.servo
        self._registers[Rid.P_M] = self._registers[Rid.XOUT] = servo.measured_rad - self._zero_rad
        if command == Command.SAVE:
            self._saved = dict(self._registers)  # all of them, whatever RID is named
        if rid not in self._registers:
            return None
        if command == Command.WRITE and rid not in _READ_ONLY:
            written = decode_value(rid, value)
            low, high = _ALLOWED.get(rid, (-3.4e38, 2**32 - 1 if rid in UNSIGNED else 3.4e38))
            if low <= written <= high:
                self._registers[rid] = written
        held = bytes((self._told_id & 0xFF, self._told_id >> 8, command, rid)) + encode_value(rid, self._registers[rid])
        return self._reply(held)

    def obey(self, code: int) -> None:
        """A system frame."""
        servo = self.simulated.servo
        match code:
            case System.ENABLE if self._fault is None:
                servo.enable()
            case System.DISABLE:
                servo.disable()
            case System.SET_ZERO:
                self._zero_rad = servo.measured_rad
            case System.CLEAR_ERROR:
                self._fault = None

    def go(self, position_rad: float, velocity_rad_s: float) -> None:
        """Go to a position."""
        self.simulated.servo.move_to(self._zero_rad + position_rad, velocity_rad_s)

    def balance(self, command: Mit) -> None:
        """Mode MIT: what kp (position - p) + kd (velocity - v) + torque comes to."""
        position_rad, velocity_rad_s, kp, kd, torque_nm = command
        if kp > 0:
            self.go(position_rad + torque_nm / kp, self.scale.vmax_rad_s)
        elif kd > 0:
            self.simulated.servo.turn_at(velocity_rad_s + torque_nm / kd)
        else:
            self.simulated.servo.push(torque_nm)

    def _reply(self, data: bytes) -> CanFrame:
        return CanFrame(int(self._registers[Rid.MST_ID]), data)


class SimulatedDamiao(Responder[CanFrame]):
    """Simulated Damiao motors: system frames, registers, and the modes MIT, POS_VEL and VEL.

    A command of another mode than CTRL_MODE is neither obeyed nor answered (python-damiao-driver docs, motor control
    modes: "the motor will not respond"). A motor whose mode changes goes on with what it did. MIT is played as the
    state that its law settles in: with kp a position, with kd alone a velocity, with neither the torque itself.
    """

    def __init__(self, motors: Sequence[SimulatedMotor]) -> None:
        super().__init__(motors)
        self._motors = [_Motor(simulated) for simulated in motors]
        self._now = MonotonicNs(0)

    def tick(self, now: MonotonicNs) -> Iterable[tuple[SimulatedMotor, CanFrame]]:
        """The motors watch over the bus; none speaks unasked."""
        self._now = now
        for motor in self._motors:
            motor.watch(now)
        return ()

    def reboot(self, simulated: SimulatedMotor) -> None:
        """Power-up: everything that was not saved is forgotten."""
        for motor in self._motors:
            if motor.simulated is simulated:
                motor.reboot()

    def respond(self, unit: CanFrame) -> Iterator[tuple[SimulatedMotor, CanFrame]]:
        """The reply to one frame; none to frames for others."""
        if unit.extended:
            return
        for motor in self._motors:
            reply = self._request(motor, unit.data) if unit.can_id == REQUEST_ID else self._command(motor, unit)
            if reply is not None:
                motor.heard_ns = self._now
                yield motor.simulated, reply

    @staticmethod
    def _request(motor: _Motor, data: bytes) -> CanFrame | None:
        if len(data) < 4 or int.from_bytes(data[:2], "little") != motor.bus_id:
            return None
        match data[2]:
            case Command.REFRESH:
                return motor.feedback()
            case Command.READ | Command.WRITE | Command.SAVE if len(data) == 8:
                return motor.register(data[2], data[3], data[4:])
            case _:
                return None

    @staticmethod
    def _command(motor: _Motor, frame: CanFrame) -> CanFrame | None:
        base, data = frame.can_id - motor.bus_id, frame.data
        if base not in set(Base):
            return None
        if len(data) == 8 and data[:7] == b"\xff" * 7 and data[7] in set(System):
            motor.obey(data[7])  # on the identifier of any mode, as the vendor's examples send it
            return motor.feedback()
        match base, motor.mode:
            case Base.MIT, Mode.MIT if len(data) == 8:
                motor.balance(decode_mit(data, motor.scale))
            case Base.POS_VEL, Mode.POS_VEL if len(data) == 8:
                position_rad, velocity_rad_s = _POS_VEL.unpack(data)
                if isfinite(position_rad) and isfinite(velocity_rad_s):
                    motor.go(position_rad, velocity_rad_s)
            case Base.VEL, Mode.VEL if len(data) >= 4:
                velocity_rad_s = _FLOAT.unpack(data[:4])[0]
                if isfinite(velocity_rad_s):
                    motor.simulated.servo.turn_at(velocity_rad_s)
            case _:
                return None
        return motor.feedback()


FAMILY: type[Family[Any, Any]] = Damiao
SIMULATED: type[Responder[Any]] = SimulatedDamiao
