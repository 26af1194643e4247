"""Simulated Dynamixel X servos: the other side of ``dynamixel2``, register by register."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from drivers.clock import MonotonicNs
from drivers.motor import Kind
from drivers.protocols._dynamixel2 import (
    ADDRESS,
    ALERT,
    AMPERE,
    BROADCAST,
    BULK,
    CENTRE_STEP,
    FEEDBACK,
    HEAD,
    HEADER,
    IDENTITY,
    MODES,
    MOST_PROFILE,
    MOST_STEPS,
    RAD_S,
    STANDSTILL,
    STEPS_PER_TURN,
    TAIL,
    VOLT,
    WATCHDOG_EXPIRED,
    WATCHDOG_NS,
    Decoder,
    Error,
    HardwareError,
    Instruction,
    OperatingMode,
    Packet,
    Register,
    compute_crc,
    continue_crc,
    decode_position,
    encode_packet,
    encode_position,
    options_of,
)
from drivers.sim.responder import Responder, SimulatedMotor, as_byte

_MEMORY_SIZE = 147
_MODEL, _FIRMWARE = 1020, 48  # XM430-W350
_AMPERE = AMPERE["XM"]
_RETURN_READS, _RETURN_ALL = 1, 2  # values of the status return level
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
    **{mode: register for mode, (register, _) in STANDSTILL.items()},
    **dict.fromkeys(MODES[Kind.POSITION], Register.GOAL_POSITION),
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
        TAIL.pack_into(self._memory, Register.MODEL_NUMBER, _MODEL)
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
        if servo.enabled and 0 < watchdog < WATCHDOG_EXPIRED and now - self.heard_ns > watchdog * WATCHDOG_NS:
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
                address, size = ADDRESS.unpack_from(params)
                asked = [(servo, address, size) for one in params[4:] for servo in self._find(one)]
                yield from _reply_to_reads(asked, fast=instruction == Instruction.FAST_SYNC_READ)
            case Instruction.BULK_READ | Instruction.FAST_BULK_READ if params and len(params) % BULK.size == 0:
                reads = BULK.iter_unpack(params)
                asked = [(servo, address, size) for one, address, size in reads for servo in self._find(one)]
                yield from _reply_to_reads(asked, fast=instruction == Instruction.FAST_BULK_READ)
            case Instruction.SYNC_WRITE if len(params) > 4:
                address, size = ADDRESS.unpack_from(params)
                for at in range(4, len(params) - size, size + 1):
                    for servo in self._find(params[at]):
                        servo.write(address, params[at + 1 : at + 1 + size])
            case Instruction.BULK_WRITE:
                self._write_in_bulk(params)
            case Instruction.PING:
                for servo in sorted(self._find(bus_id), key=lambda one: one.bus_id):
                    yield servo, _make_status(servo, IDENTITY.pack(_MODEL, _FIRMWARE))
            case Instruction.READ if bus_id != BROADCAST and len(params) == ADDRESS.size:
                yield from _reply_to_reads([(servo, *ADDRESS.unpack(params)) for servo in self._find(bus_id)])
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
        while len(params) > BULK.size:
            bus_id, address, size = BULK.unpack_from(params)
            for servo in self._find(bus_id):
                servo.write(address, params[BULK.size : BULK.size + size])
            params = params[BULK.size + size :]

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
    head = before = HEAD.pack(HEADER, BROADCAST, length, Instruction.STATUS)
    for servo, address, size in asked:
        if servo.simulated.faults.silent:
            continue
        data = servo.read(address, size)
        block = bytes((servo.alert | (0 if data else Error.ACCESS), servo.reply_id)) + (data or bytes(size))
        crc = compute_crc(before + block)
        yield servo, head + block + TAIL.pack(crc)
        head, before = b"", continue_crc(crc)
