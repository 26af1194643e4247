"""Dynamixel X series on a half-duplex serial bus: the gateway's side.

Packets, registers and options are in ``_dynamixel2``, simulated servos in ``_dynamixel2_servo``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from struct import Struct
from typing import Any, Final, NamedTuple, get_args

from drivers.clock import SECOND
from drivers.errors import MotorRefused
from drivers.family import Exchange, Family, Procedure, Ready, Reply
from drivers.motor import Feedback, Kind, Motor, MotorInfo, Order, Status, bits_of, common_faults
from drivers.protocols._dynamixel2 import (
    ALERT,
    COMMON,
    CONTROL,
    FEEDBACK,
    GOALS,
    HEAD,
    IDENTITY,
    MODELS,
    MODES,
    MOST_STEPS,
    RAD_S,
    STANDSTILL,
    STATE,
    TIME_BASED,
    VOLT,
    WATCHDOG_EXPIRED,
    WATCHDOG_NS,
    Block,
    Decoder,
    Error,
    HardwareError,
    Instruction,
    Mode,
    OperatingMode,
    Options,
    Packet,
    Register,
    State,
    ampere_of,
    decode_position,
    encode_packet,
    encode_position,
    encode_profile_velocity,
    knows_fast_sync_read,
    make_ping,
    make_sync_read,
    make_sync_write,
    name_mode,
    options_of,
)
from drivers.protocols._dynamixel2_servo import SimulatedX
from drivers.sim.responder import Responder

_BASIC = frozenset({Kind.ENABLE, Kind.DISABLE, Kind.STOP, Kind.CLEAR_FAULT})
_GOAL_POSITION: Final = (Register.GOAL_POSITION, Struct("<i"))
_WATCHDOG: Final = (Register.BUS_WATCHDOG, Struct("<B"))
_MOST_WATCHDOG: Final = 127
_PROFILE_AND_GOAL: Final = Struct("<Ii")  # 112..119
TRUSTED: Final = 100  # polls answered in a row
REFRESH_TURNS: Final = 10  # every so many turns of ``refresh`` a healthy servo is read
REBOOT_READS: Final = 20  # a servo that is not back by then is found by being connected anew


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
    mode: int | None = None
    present: int = 0  # where it was last, as register 132 tells it
    expired: bool = False  # its bus watchdog has stopped it

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
            status |= common_faults(vendor_error, COMMON)
        if self.expired:
            status |= Status.FAULT_COMMUNICATION
        self.present = position
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


class _Goal(NamedTuple):
    """Registers among ``GOALS`` and what they are to hold."""

    register: Register
    layout: Struct
    values: tuple[int, ...]

    def encode(self) -> bytes:
        """The registers' bytes."""
        return self.layout.pack(*self.values)

    def read(self, block: bytes) -> tuple[int, ...]:
        """What the registers hold, from ``GOALS`` as they were read."""
        return self.layout.unpack_from(block, self.register - GOALS.address)

    def check(self, block: bytes) -> None:
        """Raise MotorRefused unless ``GOALS``, as they were read, hold it."""
        read = self.read(block)
        if read != self.values:
            sent, got = (" and ".join(map(str, numbers)) for numbers in (self.values, read))
            named = f"{self.register.name.lower()} (register {self.register})"
            raise MotorRefused("refused", f"{named}: sent {sent}, read {got}")


class Dynamixel2(Family[bytes, Packet]):
    """X series servos.

    ``ENABLED`` is not in the polled block: registers 64..70 are read once a second, and within a tenth of one after an
    alert. A block that reaches from torque enable to temperature would be four times as long; mapping the registers
    together (indirect addresses) would take from other programs what they may have mapped there.

    A lost block of a fast reply takes those behind it along: they wait for it, and their checksums count on it. So
    servos of which one missed a poll are asked by plain sync read until that one has answered ``TRUSTED`` in a row, or
    is offline. Only one request is on the wire at a time: if any servo that is asked does not know fast sync read, all
    are asked plainly.

    The bus watchdog counts from the last instruction packet on the bus, so the poll feeds it. One that has expired
    stops the servo with its torque on and refuses all goals, until 0 is written to it (e-Manual, bus watchdog): that is
    done by ``enable`` and ``clear_fault``, with the goal of standing still right behind.
    """

    name = "dynamixel2"
    medium = "serial"
    bus_ids = range(253)
    kinds = _BASIC | frozenset(MODES)
    Options = Options
    examples = (Options(), Options(fast_sync=True), Options(mode="velocity"), Options(mode="current", nm_per_a=1.0))
    bit_rates = (57_600, 1_000_000, 2_000_000, 3_000_000, 4_000_000, 115_200, 9_600)
    refresh_ns = SECOND // REFRESH_TURNS
    watchdog = True

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
        replies = HEAD.size + len(motors) * (FEEDBACK.size + 4) if fast else len(motors) * len(plain_reply)
        return 10 * (len(request) + replies)

    @classmethod
    def explain(cls, vendor_error: int) -> Sequence[str]:
        """The bits of register 70, in the e-Manual's words."""
        return [_explain_bit(bit) for bit in bits_of(vendor_error)]

    @classmethod
    def kinds_of(cls, motor: Motor) -> frozenset[Kind]:
        """Of the setpoints, that of the configured mode: position if none is, torque only with ``nm_per_a``."""
        options = options_of(motor)
        mode = OperatingMode.POSITION if options.wanted_mode is None else options.wanted_mode
        setpoints = {kind for kind, modes in MODES.items() if mode in modes}
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
        return MotorInfo(model, str(firmware), details, driven=(yield from self._is_driven(bus_id, state)))

    def _is_driven(self, bus_id: int, state: State) -> Procedure[bytes, Packet, bool]:
        """Whether it has a goal, in a mode that holds no position, and may follow it."""
        if not state.torque_enable or state.mode not in STANDSTILL or state.watchdog == WATCHDOG_EXPIRED:
            return False
        return _Goal(*STANDSTILL[state.mode], (0,)).read((yield from self._read(bus_id, GOALS))) != (0,)

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
        self._check_kind(bus_id, order.kind)
        match order.kind:
            case Kind.ENABLE:
                return (yield from self._enable(bus_id))
            case Kind.DISABLE:
                yield from self._write_torque(bus_id, on=False)
                return "torque is off"
            case Kind.STOP:
                return (yield from self._stop(bus_id))
            case Kind.CLEAR_FAULT:
                return (yield from self._clear_fault(bus_id))
            case _:
                return (yield from self.set_alone(bus_id, order))

    def prepare(self, bus_id: int, order: Order) -> Procedure[bytes, Packet, Ready]:
        """See that the servo can take the setpoint, and arm its watchdog."""
        self._check_kind(bus_id, order.kind)
        match order.kind:
            case Kind.POSITION:
                ready, watchdog = yield from self._move(bus_id, order)
            case Kind.VELOCITY:
                ready, watchdog = yield from self._turn(bus_id, order)
            case _:
                ready, watchdog = yield from self._push(bus_id, order)
        yield from self._arm(bus_id, watchdog)
        return ready

    def fire(self, ready: Mapping[int, Ready]) -> Exchange[bytes, Packet]:
        """One sync write for all of a kind, which takes effect in each servo when it ends."""
        return _write_goals({bus_id: one.trigger for bus_id, one in ready.items()})

    def confirm(self, bus_id: int, ready: Ready, reply: Any) -> Procedure[bytes, Packet, str]:  # noqa: ARG002  none comes
        """Read the goal back."""
        ready.trigger.check((yield from self._read(bus_id, GOALS)))
        return ready.told

    def halt(self, bus_ids: Iterable[int]) -> Exchange[bytes, Packet]:
        """A sync write for each kind of goal: nothing of what moves it, or the place where it was seen last."""
        enabled = {bus_id: known for bus_id in bus_ids if (known := self._known[bus_id]).enabled}
        goals = {bus_id: _standstill(known.mode, known.present) for bus_id, known in enabled.items()}
        return _write_goals({bus_id: goal for bus_id, goal in goals.items() if goal})

    def _check_kind(self, bus_id: int, kind: Kind) -> None:
        if kind not in self.kinds_of(self.motors[bus_id]):
            mode = options_of(self.motors[bus_id]).mode
            raise MotorRefused("unsupported", f"{self.name} has no order {kind} with mode = {mode or 'position'}")

    def _enable(self, bus_id: int) -> Procedure[bytes, Packet, str]:
        state = yield from self._read_state(bus_id)
        if state.hardware_error:
            raise MotorRefused("refused", f"{_name_errors(state.hardware_error)}; clear the fault first")
        wanted = options_of(self.motors[bus_id]).wanted_mode
        if wanted is not None and state.mode != wanted:
            state = yield from self._set_mode(bus_id, state, wanted)
        held = yield from self._hold(bus_id, state)
        yield from self._arm(bus_id, 0 if state.watchdog == WATCHDOG_EXPIRED else state.watchdog)
        yield from self._write_torque(bus_id, on=True)
        return f"enabled, {held}"

    def _arm(self, bus_id: int, watchdog: int) -> Procedure[bytes, Packet, None]:
        """Set the bus watchdog, which holds ``watchdog`` now; RAM, so it is gone with the servo's power."""
        wanted = min(-(-self.motors[bus_id].watchdog_ns // WATCHDOG_NS), _MOST_WATCHDOG)
        if wanted not in {0, watchdog}:
            yield from self._write_goal(bus_id, _Goal(*_WATCHDOG, (wanted,)))

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
        """Write the goal of standing still, whatever the mode; a watchdog that has expired is cleared before.

        What a servo follows when its watchdog is cleared is not told: the goal follows with no gap.
        """
        goal = _standstill(state.mode, state.present)
        if goal is None:
            raise MotorRefused("refused", f"operating mode (register 11) is {_tell_mode(state.mode)}")
        if state.watchdog == WATCHDOG_EXPIRED:
            clear = make_sync_write(Register.BUS_WATCHDOG, {bus_id: b"\0"})
            yield Exchange([clear, *_write_goals({bus_id: goal}).requests], frozenset(), lambda _: None)
            goal.check((yield from self._read(bus_id, GOALS)))
            self._known[bus_id].expired = False
        else:
            yield from self._write_goal(bus_id, goal)
        if state.mode in STANDSTILL:
            return f"{goal.register.name.lower().replace('_', ' ')} is 0"
        return f"holding {decode_position(state.present):.4f} rad"

    def _move(self, bus_id: int, order: Order) -> Procedure[bytes, Packet, tuple[Ready, int]]:
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
        told = f"going to {decode_position(goal):.4f} rad at {speed * RAD_S:.4f} rad/s"
        return Ready(_Goal(Register.PROFILE_VELOCITY, _PROFILE_AND_GOAL, (speed, goal)), told), state.watchdog

    def _turn(self, bus_id: int, order: Order) -> Procedure[bytes, Packet, tuple[Ready, int]]:
        if not isfinite(order.value):
            raise MotorRefused("malformed", f"velocity {order.value} rad/s")
        state = yield from self._read_ready(bus_id, order.kind)
        raw, limit = round(order.value / RAD_S), state.velocity_limit
        if abs(raw) > limit:
            told = f"{order.value} rad/s; the servo's velocity limit (register 44) is {limit * RAD_S:.4f} rad/s"
            raise MotorRefused("out_of_limits", told)
        goal = _Goal(*STANDSTILL[OperatingMode.VELOCITY], (raw,))
        return Ready(goal, f"turning at {raw * RAD_S:.4f} rad/s"), state.watchdog

    def _push(self, bus_id: int, order: Order) -> Procedure[bytes, Packet, tuple[Ready, int]]:
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
        goal = _Goal(*STANDSTILL[OperatingMode.CURRENT], (raw,))
        return Ready(goal, f"pushing with {raw * nm:.4f} N m"), state.watchdog

    def _stop(self, bus_id: int) -> Procedure[bytes, Packet, str]:
        state = yield from self._read_state(bus_id)
        if not state.torque_enable:
            return "torque is off already"
        if state.watchdog == WATCHDOG_EXPIRED:
            return "its bus watchdog has stopped it already"
        return (yield from self._hold(bus_id, state))

    def _clear_fault(self, bus_id: int) -> Procedure[bytes, Packet, str]:
        """Reboot, the only way to clear a hardware error; done when the servo has acknowledged it or is back.

        A servo that only its watchdog has stopped is not rebooted: it would drop what it holds. How long one is away
        is up to the servo: one that needs longer than these reads is connected anew.
        """
        _torque, error = yield from self._read_control(bus_id)
        if not error and self._known[bus_id].expired:
            return f"no fault, {(yield from self._hold(bus_id, (yield from self._read_state(bus_id))))}"
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
        if state.mode not in MODES[kind]:
            modes = " or ".join(mode.name.lower() for mode in MODES[kind])
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
        known.mode, known.present = state.mode, state.present
        known.expired = state.watchdog == WATCHDOG_EXPIRED
        return state

    def _read_control(self, bus_id: int) -> Procedure[bytes, Packet, tuple[int, int]]:
        """Torque enable and hardware error; the watchdog is noted, too."""
        torque, error, watchdog = CONTROL.layout.unpack((yield from self._read(bus_id, CONTROL)))
        known = self._known[bus_id]
        known.enabled, known.hardware_error = bool(torque), error
        known.expired = watchdog == WATCHDOG_EXPIRED
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

    def _write_goal(self, bus_id: int, goal: _Goal) -> Procedure[bytes, Packet, None]:
        """Write registers among ``GOALS`` and read them back."""
        yield _write_goals({bus_id: goal})
        goal.check((yield from self._read(bus_id, GOALS)))


def _write(bus_id: int, register: Register, data: bytes) -> Exchange[bytes, Packet]:
    """Write to one servo by sync write, which none answers: nothing to wait for."""
    return Exchange([make_sync_write(register, {bus_id: data})], frozenset(), lambda _: None)


def _write_goals(goals: Mapping[int, _Goal]) -> Exchange[bytes, Packet]:
    """A sync write for each place that goals are written to; none is answered."""
    registers: dict[Register, dict[int, bytes]] = {}
    for bus_id, goal in goals.items():
        registers.setdefault(goal.register, {})[bus_id] = goal.encode()
    writes = [make_sync_write(register, data) for register, data in registers.items()]
    return Exchange(writes, frozenset(), lambda _: None)


def _standstill(mode: int | None, present: int) -> _Goal | None:
    """The goal of standing still at ``present``; None in a mode that is not known."""
    if mode is not None and mode in STANDSTILL:
        return _Goal(*STANDSTILL[mode], (0,))
    return _Goal(*_GOAL_POSITION, (present,)) if mode in MODES[Kind.POSITION] else None


def _check_watchdog(state: State) -> None:
    if state.watchdog == WATCHDOG_EXPIRED:
        told = "its bus watchdog (register 98) has expired: it takes no goals until it is enabled or its fault cleared"
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


FAMILY: type[Family[Any, Any]] = Dynamixel2
SIMULATED: type[Responder[Any]] = SimulatedX
