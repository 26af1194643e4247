"""Simulated CiA 402 drives: object dictionary and state machine over a servo's physics."""

from collections.abc import Iterable, Iterator, Sequence
from math import tau
from typing import Any, Final

from drivers.clock import MonotonicNs
from drivers.family import CanFrame
from drivers.motor import Status
from drivers.protocols._canopen import ON_EVENT, Aborted, Cob, Key, Kind, NodeState, Object, Pdo, is_signed, size_of
from drivers.protocols._canopen_node import Node, Variable
from drivers.protocols._cia402 import (
    ABORT_CONNECTION,
    ACKNOWLEDGED,
    CONTROLWORD,
    DC_LINK_VOLTAGE,
    DEVICE_NAME,
    DEVICE_TYPE,
    ERROR_CODE,
    FOLLOWING_WINDOW,
    HIGHEST_POSITION,
    LOWEST_POSITION,
    MODE,
    MODE_DISPLAY,
    POSITION,
    PRODUCT,
    PROFILE,
    PROFILE_VELOCITY,
    REVISION,
    SOFTWARE_VERSION,
    STATUSWORD,
    SUPPORTED_MODES,
    TARGET_POSITION,
    TARGET_VELOCITY,
    TORQUE,
    VELOCITY,
    VENDOR,
    Control,
    Mode,
    Options,
    State,
    find_error,
)
from drivers.sim.responder import Responder, SimulatedMotor

_DESERTED: Final = 0x8130
_TOO_HOT_C = 100.0
_SUPPLY_V = (8.0, 60.0)
_REGISTER: Final = {  # bits of the error register (1001) beside the generic one
    Status.FAULT_CURRENT: 0x02, Status.FAULT_VOLTAGE: 0x04, Status.FAULT_TEMPERATURE: 0x08,
}  # fmt: skip
_STANDARD: Final = Options(36_000, temperature="0x200D:1")  # of a drive whose options nobody told
_DOWN: Final = {  # what takes a drive down: (controlword's mask, value) -> states that it leaves, and for which
    (0x02, 0x00): ({State.READY, State.SWITCHED_ON, State.ENABLED, State.QUICK_STOP}, State.SWITCH_ON_DISABLED),
    (0x06, 0x02): ({State.READY, State.SWITCHED_ON}, State.SWITCH_ON_DISABLED),
    (0x07, 0x06): ({State.SWITCHED_ON, State.ENABLED}, State.READY),
    (0x0F, 0x07): ({State.ENABLED}, State.SWITCHED_ON),
}


class _Drive:
    """One simulated drive: object dictionary and state machine over its physics."""

    _mode: int  # Mode, or 0 for none
    _control: int

    def __init__(self, simulated: SimulatedMotor) -> None:
        self.simulated = simulated
        options = simulated.motor.options
        self.options = options if isinstance(options, Options) else _STANDARD
        bus_id = simulated.motor.bus_id
        self._power_up()
        self._abort_option = Variable("int16", 1, low=0, high=3)
        self._window = Variable("uint32", round(self.options.units_per_turn / 16))  # of the following error
        if self.options.pdo == "read":  # somebody has stored a layout of his own
            temperature = self.options.temperature_object if self.options.temperature_pdo else None
            tpdos, transmission = [(STATUSWORD, MODE_DISPLAY, VELOCITY), (POSITION, temperature or TORQUE)], 1
        else:
            tpdos, transmission = [(STATUSWORD,), (STATUSWORD, MODE_DISPLAY)], ON_EVENT[1]
        rpdos = [(CONTROLWORD,), (CONTROLWORD, MODE), (CONTROLWORD, TARGET_POSITION), (CONTROLWORD, TARGET_VELOCITY)]
        self.node = Node(
            bus_id,
            self._objects(),
            [_pdo(Cob.TPDO1, number, bus_id, transmission, objects) for number, objects in enumerate(tpdos)],
            [_pdo(Cob.RPDO1, number, bus_id, ON_EVENT[1], objects) for number, objects in enumerate(rpdos)],
            self._restart,
            self._abort_connection,
        )
        if simulated.servo.enabled:  # somebody was here before
            self._mode, self._state = self.options.operation, State.ENABLED
            self._control = int(Control.ENABLE)
            self.node.start()

    def _power_up(self) -> None:
        self._mode = 0
        self._state = State.SWITCH_ON_DISABLED
        self._control = 0
        self._error = 0
        self._target = 0  # units
        self._fresh = False  # a target of csp that no SYNC has taken up
        self._moving_to: int | None = None  # the setpoint that pp goes to, units
        self._acknowledged = False
        self._profile_velocity = round(self._units(self.simulated.servo.limits.velocity_rad_s, speed=True))
        self._target_velocity = 0

    def reboot(self) -> None:
        """The power was gone."""
        self._restart()
        self.node.boot()

    def _restart(self) -> None:
        self.simulated.servo.disable()
        self._power_up()

    def _units(self, value: float, speed: bool = False) -> float:
        """rad or rad/s in the drive's units."""
        return value / tau * (self.options.velocity_units if speed else self.options.units_per_turn)

    def _objects(self) -> dict[Key, Variable]:
        servo, options = self.simulated.servo, self.options
        lowest, highest = (round(self._units(limit)) for limit in servo.limits.position_rad)
        nm = options.rated_torque_nm or 10.0
        told = {
            DEVICE_TYPE: Variable("uint32", 0x0002_0000 | PROFILE),  # servo drive
            DEVICE_NAME: Variable("string", "Simulated servo drive"),
            SOFTWARE_VERSION: Variable("string", "1.0"),
            VENDOR: Variable("uint32", 0),
            PRODUCT: Variable("uint32", 402),
            REVISION: Variable("uint32", 0x0001_0000),
            ERROR_CODE: Variable("uint16", get=lambda: self._error, mappable=True),
            STATUSWORD: Variable("uint16", get=self._statusword, mappable=True),
            MODE_DISPLAY: Variable("int8", get=lambda: self._mode, mappable=True),
            POSITION: Variable("int32", get=self._position, mappable=True),
            VELOCITY: Variable(
                "int32", get=lambda: _clip("int32", self._units(servo.velocity_rad_s, speed=True)), mappable=True
            ),
            TORQUE: Variable("int16", get=lambda: _clip("int16", servo.torque_nm / nm * 1000), mappable=True),
            DC_LINK_VOLTAGE: Variable("uint32", get=lambda: _clip("uint32", servo.voltage_v * 1000), mappable=True),
            SUPPORTED_MODES: Variable("uint32", sum(1 << mode - 1 for mode in Mode)),
        }
        taken = {
            CONTROLWORD: Variable("uint16", get=lambda: self._control, set=self._obey),
            MODE: Variable("int8", get=lambda: self._mode, set=self._set_mode),
            TARGET_POSITION: Variable(
                "int32", get=lambda: self._target, set=self._set_target, low=lowest, high=highest
            ),
            PROFILE_VELOCITY: Variable("uint32", get=lambda: self._profile_velocity, set=self._set_profile_velocity),
            TARGET_VELOCITY: Variable("int32", get=lambda: self._target_velocity, set=self._set_target_velocity),
            FOLLOWING_WINDOW: self._window,
            ABORT_CONNECTION: self._abort_option,
        }
        for variable in taken.values():
            variable.writable = variable.mappable = True
        objects = {one.key: variable for one, variable in (told | taken).items()}
        objects[0x1018, 0] = Variable("uint8", 4)
        objects[0x1018, 4] = Variable("uint32", self.simulated.motor.bus_id)  # serial number
        objects[0x2000, 0] = Variable("string", "", writable=True)  # where it is, in its user's words
        objects[0x607D, 0] = Variable("uint8", 2)
        objects[LOWEST_POSITION.key] = Variable("int32", lowest)
        objects[HIGHEST_POSITION.key] = Variable("int32", highest)
        if temperature := options.temperature_object:
            objects[temperature.key] = Variable(temperature.kind, get=self._temperature, mappable=True)
        return objects

    # -- what it tells -------------------------------------------------------------------------------------------

    def _position(self) -> int:
        units: int = _clip("int32", self._units(self.simulated.servo.measured_rad))
        return units

    def _temperature(self) -> float:
        units = self.simulated.servo.temperature_c / self.options.temperature_scale
        told: float = _clip(self.options.temperature_type, units)
        return told

    def _statusword(self) -> int:
        word = self._state | 0x210  # remote, voltage enabled
        servo = self.simulated.servo
        reached = not servo.moving and (
            self._moving_to is None or bool(self._control & Control.HALT) or abs(self._position() - self._moving_to) < 2
        )
        return word | reached << 10 | (self._acknowledged and ACKNOWLEDGED)

    # -- what it is told -----------------------------------------------------------------------------------------

    def _obey(self, word: int) -> None:
        before, self._control = self._control, word
        rises, falls = word & ~before, before & ~word
        if self._state == State.FAULT:
            if rises & Control.FAULT_RESET and not self._cause():
                self._error = 0
                self.node.emergency(0, 0)
                self._enter(State.SWITCH_ON_DISABLED)
            return
        for (mask, value), (states, target) in _DOWN.items():
            if word & mask == value and self._state in states:
                self._enter(target)
        if word & 0x06 == 0x02 and self._state == State.ENABLED:
            self._enter(State.QUICK_STOP)
        if word & 0x07 == Control.SHUTDOWN and self._state == State.SWITCH_ON_DISABLED:
            self._enter(State.READY)
        if word & 0x07 == Control.SWITCH_ON and self._state == State.READY:
            self._enter(State.SWITCHED_ON)
        if word & 0x0F == Control.ENABLE and self._state == State.SWITCHED_ON:
            self._enter(State.ENABLED)
        if not word & Control.NEW_SETPOINT:
            self._acknowledged = False
        elif self._state == State.ENABLED and self._mode == Mode.PP and rises & Control.NEW_SETPOINT:
            self._moving_to, self._acknowledged = self._target, True
            self._move()
            return
        if self._state == State.ENABLED and (rises | falls) & Control.HALT:
            self._move()

    def _enter(self, state: State) -> None:
        self._state = state
        servo = self.simulated.servo
        self._moving_to, self._acknowledged = None, False
        match state:
            case State.ENABLED:
                servo.enable()
                self._fresh = True  # whatever the target is
                self._move()
            case State.QUICK_STOP:
                servo.turn_at(0.0)
            case _:
                servo.disable()

    def _move(self) -> None:
        """Have the servo follow the setpoint of its mode."""
        servo, turn = self.simulated.servo, tau / self.options.velocity_units
        match self._mode:
            case Mode.PP | Mode.PV if self._control & Control.HALT:
                servo.turn_at(0.0)
            case Mode.PP if self._moving_to is not None:
                goal_rad = self._moving_to / self.options.units_per_turn * tau
                servo.move_to(goal_rad, self._profile_velocity * turn)
            case Mode.PV:
                servo.turn_at(self._target_velocity * turn)

    def _set_mode(self, mode: int) -> None:
        if mode not in set(Mode):
            raise Aborted(0x06090030)
        if mode != self._mode:
            self._mode = mode
            self._moving_to = None
            if self._state == State.ENABLED:
                self.simulated.servo.hold()
                self._fresh = mode == Mode.CSP
                self._move()

    def _set_target(self, units: int) -> None:
        self._target, self._fresh = units, True

    def _set_profile_velocity(self, units: int) -> None:
        self._profile_velocity = units

    def _set_target_velocity(self, units: int) -> None:
        self._target_velocity = units
        if self._state == State.ENABLED and self._mode == Mode.PV:
            self._move()

    def follow(self) -> None:
        """A SYNC: in csp, go for the target that was written since the last one."""
        listens = self.node.state == NodeState.OPERATIONAL and self._state == State.ENABLED
        if not (listens and self._mode == Mode.CSP and self._fresh):
            return
        self._fresh = False
        if abs(self._target - self._position()) > self._window.value:
            self._fail(0x8611)
        else:
            servo = self.simulated.servo
            servo.move_to(self._target / self.options.units_per_turn * tau, servo.limits.velocity_rad_s)

    # -- faults --------------------------------------------------------------------------------------------------

    def _cause(self) -> int:
        """Error code of what is wrong now; 0 if nothing is."""
        servo = self.simulated.servo
        if servo.temperature_c >= _TOO_HOT_C:
            return 0x4310
        lowest, highest = _SUPPLY_V
        return 0x3220 if servo.voltage_v < lowest else 0x3210 if servo.voltage_v > highest else 0

    def check(self) -> None:
        """Fall into fault if something is wrong."""
        if self._state != State.FAULT and (cause := self._cause()):
            self._fail(cause)

    def _abort_connection(self) -> None:
        """The heartbeat of its master is missing: what 6007 says."""
        match self._abort_option.value:
            case _ if self._state == State.FAULT:
                return
            case 1:
                self._fail(_DESERTED)
                return
            case 2:
                self._enter(State.SWITCH_ON_DISABLED)
            case 3 if self._state == State.ENABLED:
                self._enter(State.QUICK_STOP)
        self.node.emergency(_DESERTED, 0x11)

    def _fail(self, code: int) -> None:
        self._error = code
        self._enter(State.FAULT)
        self.node.emergency(code, 1 | _REGISTER.get(find_error(code)[1], 0))

    def send(self, frames: Iterable[CanFrame]) -> Iterator[tuple[SimulatedMotor, CanFrame]]:
        """Frames under the address that its replies bear, emergencies among them."""
        shift = self.simulated.reply_id - self.simulated.motor.bus_id
        for frame in (*frames, *self.node.outbox):
            yield self.simulated, CanFrame(frame.can_id + shift, frame.data)
        self.node.outbox.clear()


def _pdo(cob: Cob, number: int, bus_id: int, transmission: int, objects: Sequence[Object]) -> Pdo:
    return Pdo(cob + 0x100 * number + bus_id, transmission, tuple(one.mapped for one in objects))


def _clip(kind: Kind, value: float) -> Any:
    """The nearest value that an object of this type can hold."""
    if kind == "real32":
        return value
    values = 1 << 8 * size_of(kind)
    low = -values // 2 if is_signed(kind) else 0
    return min(max(round(value), low), low + values - 1)


class SimulatedCia402(Responder[CanFrame]):
    """Simulated CiA 402 drives: pp, pv and csp, PDOs as clients map them, faults with emergency messages.

    Simplified: a setpoint of pp is taken at once even without bit 5, and csp follows its targets as fast as the
    mechanics can. A drive whose halt is cleared goes on to where it was going, and one that is enabled in csp goes
    to 607A, as real ones do.
    """

    def __init__(self, motors: Sequence[SimulatedMotor]) -> None:
        super().__init__(motors)
        self._drives = {simulated.motor.bus_id: _Drive(simulated) for simulated in motors}

    def reboot(self, simulated: SimulatedMotor) -> None:
        """Power-up: pre-operational, told by the boot-up message of the next tick."""
        self._drives[simulated.motor.bus_id].reboot()

    def respond(self, unit: CanFrame) -> Iterator[tuple[SimulatedMotor, CanFrame]]:
        """Replies of those whom the frame concerns: all of them, if it is a SYNC."""
        if unit.extended:
            return
        for drive in self._drives.values():
            drive.check()
            if unit.can_id == Cob.SYNC:
                drive.follow()
            yield from drive.send(())
            yield from drive.send(drive.node.handle(unit))

    def tick(self, now: MonotonicNs) -> Iterator[tuple[SimulatedMotor, CanFrame]]:
        """Heartbeats, emergencies, and TPDOs that are sent on events."""
        for drive in self._drives.values():
            drive.check()
            yield from drive.send(drive.node.tick(now))
