"""CiA 402 drives on CANopen: the gateway's side. Their objects are in ``_cia402``, simulated ones in ``_cia402_drive``.

    080      SYNC, one a cycle; every drive that is operational answers with its synchronous TPDOs
    77F      the gateway's heartbeat, one a cycle, if the drives' watchdogs are used
    200 + n  RPDO1  controlword: the trigger of a setpoint in pp
    500 + n  RPDO4  controlword, target velocity: likewise in pv
    180 + n  TPDO1  statusword u16, position i32 [, torque i16]      as ``Options.pdo = "write"`` sets them up
    280 + n  TPDO2  velocity i32 [, temperature]

    controlword 6040:  06 shutdown  07 switch on  0F enable operation  00 disable voltage  80 fault reset (its edge)
                       bit 4 new setpoint, bit 5 at once, bit 8 halt
    statusword 6041:   mask 4F  00 not ready  40 switch-on disabled  0F fault reaction  08 fault
                       mask 6F  21 ready      23 switched on         27 enabled         07 quick stop
                       bit 12 setpoint acknowledged (pp)

A sample is put together from all TPDOs of a drive that carry a part of it, in one exchange. TPDOs are not numbered:
the cycle drains what is late before it polls; what remains is a drive that answers a whole period late, whose TPDO
arrives between the next SYNC and its own answer. Such a sample is made of two neighbouring instants.

Orders go by SDO, which a drive acknowledges or aborts with a reason, whatever it maps; what it then does is seen in
its statusword. Only what triggers a setpoint goes by RPDO, so that several drives take theirs at one SYNC; a drive
without an RPDO for it gets it by SDO, too. With halt cleared a drive may go on to where it was going, so halt is
cleared only by the controlword that carries a new setpoint. What is set up stays in the drive's RAM: nothing is stored
(1010).

Sources: CiA 402 (IEC 61800-7-201) as told in Applied Motion's CANopen User Manual 920-0025 (appendix K: "executed or
continued") and in the canopen library's profiles/p402.py.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from math import isfinite, isnan, nan, tau
from typing import Any, Final, NamedTuple

from drivers.clock import MS
from drivers.errors import MotorRefused
from drivers.family import CAN_FRAME_BITS, CanFrame, CanId, Exchange, Family, Overheard, Procedure, Ready, Reply
from drivers.motor import SETPOINTS, Feedback, Kind, Motor, MotorInfo, Order, Status
from drivers.protocols._canopen import (
    INVALID,
    MOST_MAPPED,
    NO_REMOTE,
    NODES,
    ON_EVENT,
    OUT_OF_RANGE,
    PDOS,
    SYNC_FRAME,
    Aborted,
    Cob,
    Key,
    Mapped,
    Nmt,
    NodeState,
    Object,
    Pdo,
    decode,
    download,
    download_many,
    encode,
    make_heartbeat,
    pause,
    send_nmt,
    upload,
)
from drivers.protocols._cia402 import (
    ABORT_CONNECTION,
    ABORT_CONNECTION_STOPS,
    ACKNOWLEDGED,
    CONSUMED_HEARTBEAT,
    CONTROLWORD,
    DEVICE_NAME,
    DEVICE_TYPE,
    ERROR_CODE,
    FAULTS,
    HEARTBEAT_TIME,
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
    STEPS_UP,
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
    state_of,
)
from drivers.protocols._cia402_drive import SimulatedCia402
from drivers.sim.responder import Responder

GATEWAY: Final = 127  # the node that the gateway is: the last one, as tools and masters often are
QUICK_STOP: Final = 3  # of 6007
SETTLE_READS: Final = 20  # of the statusword, until a state that was ordered is seen
SETTLE_NS: Final = 10 * MS  # between them: some drives need 100 ms, for a brake
FIRST_RPDO: Final = 0x1400  # communication parameters
FIRST_TPDO: Final = 0x1800
MAPPING: Final = 0x200  # parameters, behind those of communication
TPDO_COBS: Final = range(Cob.TPDO1, Cob.TPDO1 + 0x100 * PDOS, 0x100)
U32: Final = range(1 << 32)
I32: Final = range(-(1 << 31), 1 << 31)


class Trigger(NamedTuple):
    """How a setpoint takes effect in a mode: the RPDO that CiA 402 has for it, and the object that does it."""

    number: int
    mapping: tuple[Mapped, ...]
    decisive: Object


TRIGGERS: Final = {
    Mode.PP: Trigger(0, (CONTROLWORD.mapped,), CONTROLWORD),
    Mode.PV: Trigger(3, (CONTROLWORD.mapped, TARGET_VELOCITY.mapped), TARGET_VELOCITY),
}


@dataclass(slots=True)
class _Known:
    """What was learned about one drive."""

    options: Options
    tpdos: dict[int, Pdo] = field(default_factory=dict)  # that carry a part of a sample, by identifier
    limits: tuple[int, int] = (I32.start, I32.stop - 1)  # of a target position, units
    faulty: bool = False  # as its latest statusword says
    error: int = 0  # the latest error code that it told, until it or we took it back
    temperature_c: float = nan  # as last read by SDO
    connected: bool = False
    armed: bool = False  # it consumes our heartbeat
    rpdo: Pdo | None = None  # that triggers a setpoint

    @property
    def mode(self) -> Mode:
        return self.options.operation

    @property
    def slow_temperature(self) -> Object | None:
        """The temperature, if it has to be read by SDO."""
        wanted = self.options.temperature_object
        return wanted if wanted and not any(wanted.mapped in pdo.mapping for pdo in self.tpdos.values()) else None


class Cia402(Family[CanFrame, CanFrame]):
    """CiA 402 drives, polled by SYNC and ordered by SDO, each in the one mode of its ``Options``.

    Their watchdog is the heartbeat of the gateway (node ``GATEWAY``): a drive that is told to consume it (1016) and
    misses it does what its abort connection option (6007) says, and leaves the operational state (CiA 301, CiA 402).
    One whose option is to do nothing is given the quick stop; one that lacks either object cannot be armed.
    """

    name = "cia402"
    asks_all = True
    medium = "can"
    bus_ids = range(NODES.start, GATEWAY)
    kinds = frozenset({Kind.ENABLE, Kind.DISABLE, Kind.POSITION, Kind.VELOCITY, Kind.STOP, Kind.CLEAR_FAULT})
    Options = Options
    examples = (
        Options(36_000, temperature="0x200D:1"),
        Options(65_536, 60, mode="pv", temperature="0x20C2:1", temperature_type="int32", temperature_scale=0.001),
        Options(1_000_000, rated_torque_nm=10, mode="csp", temperature="0x200D:1", temperature_pdo=True),
        Options(36_000, rated_torque_nm=10, temperature="0x200D:1", temperature_pdo=True, pdo="read"),
        Options(36_000, temperature="0x2031:0", temperature_type="int16", temperature_scale=0.1, temperature_pdo=True),
    )
    bit_rates = (1_000_000, 500_000, 250_000, 125_000)
    watchdog = True

    def __init__(self, motors: Sequence[Motor]) -> None:
        super().__init__(motors)
        self._known = {
            bus_id: _Known(motor.options) for bus_id, motor in self.motors.items() if isinstance(motor.options, Options)
        }
        self._senders: dict[int, int] = {}  # identifier of a TPDO: who sends it

    @classmethod
    def poll_bits(cls, motors: Sequence[Motor]) -> int:
        """SYNC, heartbeat, and two TPDOs a motor: statusword, position and velocity do not fit into one."""
        heartbeat = any(motor.watchdog_ns for motor in motors)
        return (1 + heartbeat + 2 * len(motors)) * CAN_FRAME_BITS

    @classmethod
    def explain(cls, vendor_error: int) -> Sequence[str]:
        """The error code with its words, or those of its class (CiA 301, CiA 402)."""
        return (f"{vendor_error:04X}: {find_error(vendor_error)[0]}",) if vendor_error else ()

    @classmethod
    def can_ids(cls, motor: Motor) -> Iterable[CanId]:
        """The predefined connection set (CiA 301): a drive obeys its RPDOs, too, though none are sent here."""
        yield CanId(Cob.NMT, "NMT")
        yield CanId(Cob.SYNC, "SYNC")
        yield CanId(Cob.HEARTBEAT + GATEWAY, "gateway's heartbeat")
        yield CanId(Cob.EMCY + motor.bus_id, "EMCY")
        for number in range(PDOS):
            yield CanId(Cob.TPDO1 + 0x100 * number + motor.bus_id, f"TPDO{number + 1}")
            yield CanId(Cob.RPDO1 + 0x100 * number + motor.bus_id, f"RPDO{number + 1}")
        yield CanId(Cob.SDO_REPLY + motor.bus_id, "SDO replies")
        yield CanId(Cob.SDO + motor.bus_id, "SDO requests")
        yield CanId(Cob.HEARTBEAT + motor.bus_id, "heartbeat")

    @classmethod
    def kinds_of(cls, motor: Motor) -> frozenset[Kind]:
        """By mode. None that moves it in csp: a single setpoint there is a step, not a move."""
        mode = motor.options.operation if isinstance(motor.options, Options) else Mode.CSP
        moves = {Mode.PP: {Kind.POSITION}, Mode.PV: {Kind.VELOCITY}, Mode.CSP: frozenset[Kind]()}
        return cls.kinds - {Kind.POSITION, Kind.VELOCITY} | moves[mode]

    def unpack(self, unit: CanFrame) -> Iterable[CanFrame]:
        """The frame itself, if it has a standard identifier and any data: SYNC has none, and is ours."""
        return (unit,) if unit.data and not unit.extended else ()

    # -- polling -------------------------------------------------------------------------------------------------

    def poll(self, bus_ids: Sequence[int]) -> Exchange[CanFrame, CanFrame]:
        """One SYNC; the reply of a drive is there when the last of its TPDOs is."""
        asked = frozenset(bus_ids)
        parts: dict[int, dict[int, bytes]] = {}

        def match(frame: CanFrame) -> Reply | None:
            bus_id = self._senders.get(frame.can_id)
            if bus_id is None or bus_id not in asked:
                return None
            known = self._known[bus_id]
            if len(frame.data) < known.tpdos[frame.can_id].size:
                return None
            told = parts.setdefault(bus_id, {})
            told[frame.can_id] = frame.data
            return (bus_id, self._feedback(known, told)) if len(told) == len(known.tpdos) else None

        beats = any(self.motors[bus_id].watchdog_ns for bus_id in bus_ids)
        heartbeat = [make_heartbeat(GATEWAY, NodeState.OPERATIONAL)] if beats else []
        return Exchange([*heartbeat, SYNC_FRAME], asked, match, begin=parts.clear)

    @staticmethod
    def _feedback(known: _Known, told: dict[int, bytes]) -> Feedback:
        options = known.options
        raw: dict[Key, bytes] = {}
        for can_id, data in told.items():
            raw |= known.tpdos[can_id].unpack(data)

        def value(wanted: Object | None) -> float:
            return float(decode(wanted.kind, raw[wanted.key])) if wanted and wanted.key in raw else nan

        state = state_of(decode("uint16", raw[STATUSWORD.key]))
        _note_state(known, state)
        status = Status.ENABLED if state == State.ENABLED else Status(0)
        if known.error:
            status |= find_error(known.error)[1]
        elif known.faulty:
            status |= Status.FAULT_OTHER
        temperature_c = value(options.temperature_object) * options.temperature_scale
        return Feedback(
            position_rad=value(POSITION) / options.units_per_turn * tau,
            velocity_rad_s=value(VELOCITY) / options.velocity_units * tau,
            temperature_c=known.temperature_c if isnan(temperature_c) else temperature_c,
            torque_nm=value(TORQUE) / 1000 * (options.rated_torque_nm or nan),
            status=int(status),
            vendor_error=known.error,
        )

    def overhear(self, packet: CanFrame) -> Overheard | None:
        """Emergency messages, heartbeats and boot-up; a TPDO that nobody waited for says nothing new."""
        if (sender := self._senders.get(packet.can_id)) is not None:
            return Overheard(sender)
        bus_id, cob = packet.can_id & 0x7F, packet.can_id & ~0x7F
        if bus_id not in self._known:
            return None
        match cob:
            case Cob.EMCY if len(packet.data) >= 2:
                self._known[bus_id].error = int.from_bytes(packet.data[:2], "little")
            case Cob.HEARTBEAT if (state := packet.data[0] & 0x7F) != NodeState.OPERATIONAL:  # above is node guarding's
                if state == NodeState.BOOT_UP:
                    return Overheard(bus_id, "restarted: it sent its boot-up message")
                return Overheard(bus_id, f"restarted or taken over: its network state is {_name(NodeState, state)}")
            case Cob.HEARTBEAT:
                pass
            case _ if cob not in TPDO_COBS:
                return None
        return Overheard(bus_id)

    # -- connecting ----------------------------------------------------------------------------------------------

    def identify(self, bus_id: int) -> Procedure[CanFrame, CanFrame, MotorInfo | None]:
        """Read what it is; None for what is no drive. Its units it does not tell: ``options`` stays empty."""
        try:
            return (yield from self._identify(bus_id))
        except MotorRefused:
            return None

    def connect(self, bus_id: int) -> Procedure[CanFrame, CanFrame, MotorInfo | None]:
        """Find the drive, see that it fits its options, set up or read its TPDOs, and start its node.

        A drive whose TPDOs are as wanted already is not touched: a gateway that starts again disturbs nothing.
        Raises MotorRefused if it is no CiA 402 drive, lacks the mode, or cannot tell what a sample needs.
        """
        try:
            return (yield from self._connect(bus_id))
        except MotorRefused as refusal:
            if refusal.reason == "no_reply":
                return None
            raise

    def _identify(self, bus_id: int) -> Procedure[CanFrame, CanFrame, MotorInfo]:
        device_type = yield from self._read(bus_id, DEVICE_TYPE, tries=1)
        if device_type & 0xFFFF != PROFILE:
            raise MotorRefused(
                "refused", f"node {bus_id}: {DEVICE_TYPE} is {device_type:#010x}, no CiA {PROFILE} drive"
            )
        details: dict[str, float] = {}
        for wanted in (VENDOR, PRODUCT, REVISION, SUPPORTED_MODES):
            if (value := (yield from self._read_if_there(bus_id, wanted))) is not None:
                details[wanted.name] = value
        name = yield from self._read_if_there(bus_id, DEVICE_NAME)
        version = yield from self._read_if_there(bus_id, SOFTWARE_VERSION)
        named = f"CiA 402 drive {details.get(VENDOR.name, 0):08X}:{details.get(PRODUCT.name, 0):08X}"
        return MotorInfo(name or named, version or f"{details.get(REVISION.name, 0):08X}", details)

    def _connect(self, bus_id: int) -> Procedure[CanFrame, CanFrame, MotorInfo]:
        if bus_id not in self._known:
            raise MotorRefused("refused", f"motor {bus_id}: units_per_turn is not configured")
        known = self._known[bus_id] = _Known(self._known[bus_id].options)
        self._senders = {can_id: sender for can_id, sender in self._senders.items() if sender != bus_id}
        info = yield from self._identify(bus_id)
        supported = info.details.get(SUPPORTED_MODES.name)
        if supported is not None and not int(supported) >> (known.mode - 1) & 1:
            raise MotorRefused("refused", f"motor {bus_id} has no mode {known.options.mode}: 6502 is {supported:#x}")
        lowest = yield from self._read_if_there(bus_id, LOWEST_POSITION)
        highest = yield from self._read_if_there(bus_id, HIGHEST_POSITION)
        if lowest is not None and highest is not None and lowest < highest:  # both 0: not used
            known.limits = lowest, highest
        if known.options.pdo == "write":
            yield from self._write_pdos(bus_id, known)
        else:
            yield from self._read_pdos(bus_id, known)
        heartbeat_ms = yield from self._read_if_there(bus_id, HEARTBEAT_TIME)
        if heartbeat_ms not in (None, known.options.heartbeat_ms):
            yield from self._write(bus_id, HEARTBEAT_TIME, known.options.heartbeat_ms)
        yield send_nmt(Nmt.START, bus_id)
        state = yield from self._read_state(bus_id)
        driven = False
        if state == State.ENABLED and (yield from self._read_if_there(bus_id, MODE_DISPLAY)) == Mode.PV:
            driven = (yield from self._read_if_there(bus_id, TARGET_VELOCITY)) != 0
        yield from self._refresh(bus_id, known)
        self._senders |= dict.fromkeys(known.tpdos, bus_id)
        known.connected = True
        return replace(info, driven=driven)

    def _write_pdos(self, bus_id: int, known: _Known) -> Procedure[CanFrame, CanFrame, None]:
        """Make the drive send what ``Options.tpdos`` says at each SYNC, and no other TPDO; take setpoints at a SYNC."""
        layout = known.options.tpdos()
        changes: list[tuple[int, Pdo, Pdo]] = []
        for number in range(PDOS):
            found = yield from self._read_pdo(bus_id, FIRST_TPDO + number)
            if number < len(layout):
                if found is None:
                    raise MotorRefused("refused", f'motor {bus_id} has no TPDO{number + 1}; pdo = "read" needs none')
                cob_id = Cob.TPDO1 + 0x100 * number + bus_id
                mapping = tuple(one.mapped for one in layout[number])
                wanted = known.tpdos[cob_id] = Pdo(found.cob_id & NO_REMOTE | cob_id, 1, mapping)
                changes.append((FIRST_TPDO + number, found, wanted))
            elif found is not None:
                changes.append((FIRST_TPDO + number, found, found._replace(cob_id=found.cob_id | INVALID)))
        if trigger := TRIGGERS.get(known.mode):
            found = yield from self._read_pdo(bus_id, FIRST_RPDO + trigger.number)
            if found is not None:
                transmission = found.transmission if found.valid and found.transmission not in ON_EVENT else 1
                cob_id = found.cob_id & NO_REMOTE | Cob.RPDO1 + 0x100 * trigger.number + bus_id
                known.rpdo = Pdo(cob_id, transmission, trigger.mapping)
                changes.append((FIRST_RPDO + trigger.number, found, known.rpdo))
        changes = [(index, found, wanted) for index, found, wanted in changes if found != wanted]
        if not changes:
            return
        yield send_nmt(Nmt.PRE_OPERATIONAL, bus_id)
        try:
            for index, found, wanted in changes:
                yield from self._write_pdo(bus_id, index, found, wanted)
        except MotorRefused as refusal:
            raise MotorRefused(refusal.reason, f'{refusal.detail}; pdo = "read" uses its PDOs as they are') from None

    def _read_pdos(self, bus_id: int, known: _Known) -> Procedure[CanFrame, CanFrame, None]:
        """Use the TPDOs that the drive sends at each SYNC, as far as they carry a part of a sample.

        And an RPDO that triggers a setpoint, if there is one: at a SYNC or, if it is set so, at once.
        """
        temperature = known.options.temperature_object
        needed = [STATUSWORD, POSITION, VELOCITY]
        if temperature and known.options.temperature_pdo:
            needed.append(temperature)
        wanted = {one.mapped for one in (*needed, TORQUE, temperature) if one}
        for number in range(PDOS):
            found = yield from self._read_pdo(bus_id, FIRST_TPDO + number)
            if found and found.valid and found.transmission == 1 and wanted & set(found.mapping):
                known.tpdos[found.cob_id & 0x7FF] = found
        mapped = {entry for pdo in known.tpdos.values() for entry in pdo.mapping}
        if missing := [str(one) for one in needed if one.mapped not in mapped]:
            told = f"motor {bus_id} sends no {', '.join(missing)} at each SYNC"
            right = 'map them to TPDOs of transmission type 1, or set pdo = "write"'
            raise MotorRefused("refused", f"{told}: {right}")
        if trigger := TRIGGERS.get(known.mode):
            for number in range(PDOS):
                found = yield from self._read_pdo(bus_id, FIRST_RPDO + number)
                if found and found.valid and trigger.decisive.mapped in found.mapping:
                    known.rpdo = found if set(found.mapping) <= {*trigger.mapping} else known.rpdo

    def _read_pdo(self, bus_id: int, index: int) -> Procedure[CanFrame, CanFrame, Pdo | None]:
        cob_id = yield from self._read_if_there(bus_id, _cob_id_of(index))
        if cob_id is None:
            return None
        if cob_id & INVALID:
            return Pdo(cob_id, 0, ())
        transmission = yield from self._read(bus_id, _transmission_of(index))
        count = yield from self._read(bus_id, _mapping_of(index, 0))
        mapping: tuple[Mapped, ...] = ()
        for sub in range(1, min(count, MOST_MAPPED) + 1):
            mapping += (Mapped.of_word((yield from self._read(bus_id, _mapping_of(index, sub)))),)
        return Pdo(cob_id, transmission, mapping)

    def _write_pdo(self, bus_id: int, index: int, found: Pdo, wanted: Pdo) -> Procedure[CanFrame, CanFrame, None]:
        """In the order that CiA 301 wants: not valid, nothing mapped, the new mapping, valid."""
        if found.valid:
            yield from self._write(bus_id, _cob_id_of(index), found.cob_id | INVALID)
        if not wanted.valid:
            return
        yield from self._write(bus_id, _mapping_of(index, 0), 0)
        for sub, entry in enumerate(wanted.mapping, 1):
            yield from self._write(bus_id, _mapping_of(index, sub), entry.word())
        yield from self._write(bus_id, _mapping_of(index, 0), len(wanted.mapping))
        yield from self._write(bus_id, _transmission_of(index), wanted.transmission)
        yield from self._write(bus_id, _cob_id_of(index), wanted.cob_id)

    def refresh(self, bus_id: int) -> Procedure[CanFrame, CanFrame, None] | None:
        """Read the temperature, if no TPDO brings it, and the error code of a fault that came without one."""
        return self._refresh(bus_id, self._known[bus_id]) if bus_id in self._known else None

    def _refresh(self, bus_id: int, known: _Known) -> Procedure[CanFrame, CanFrame, None]:
        if (wanted := known.slow_temperature) is not None:
            value = yield from self._read_slowly(bus_id, wanted)
            known.temperature_c = nan if value is None else value * known.options.temperature_scale
        if known.faulty and not known.error:
            known.error = (yield from self._read_slowly(bus_id, ERROR_CODE)) or 0

    # -- orders --------------------------------------------------------------------------------------------------

    def order(self, bus_id: int, order: Order) -> Procedure[CanFrame, CanFrame, str]:
        """Carry out an order and see in the drive's statusword that it took it."""
        if order.kind not in self.kinds_of(self.motors[bus_id]):
            raise MotorRefused("unsupported", f"{self.name} has no order {order.kind} in the mode of motor {bus_id}")
        known = self._known.get(bus_id)
        if known is None or not known.connected:
            raise MotorRefused("motor_offline", f"motor {bus_id} was not connected")
        match order.kind:
            case Kind.ENABLE:
                return (yield from self._enable(bus_id, known))
            case Kind.DISABLE:
                yield from self._control(bus_id, Control.DISABLE_VOLTAGE)
                yield from self._settle(bus_id, frozenset(State) - {State.ENABLED}, "disable voltage (00)")
                return "disabled"
            case Kind.STOP:
                state = yield from self._read_state(bus_id)
                if state != State.ENABLED:
                    return f"the drive is {_name(State, state)} already"
                return (yield from self._hold(bus_id, known))
            case Kind.CLEAR_FAULT:
                return (yield from self._clear_fault(bus_id, known))
            case _:
                return (yield from self.set_alone(bus_id, order))

    def prepare(self, bus_id: int, order: Order) -> Procedure[CanFrame, CanFrame, Ready]:
        """See that the drive is enabled in its mode, arm its watchdog, and write all but the trigger."""
        if order.kind not in SETPOINTS & self.kinds_of(self.motors[bus_id]):
            raise MotorRefused("unsupported", f"{self.name} has no setpoint {order.kind} in the mode of motor {bus_id}")
        known = self._known.get(bus_id)
        if known is None or not known.connected:
            raise MotorRefused("motor_offline", f"motor {bus_id} was not connected")
        if order.kind == Kind.POSITION:
            return (yield from self._move(bus_id, order, known))
        return (yield from self._turn(bus_id, order.value, known))

    def fire(self, ready: Mapping[int, Ready]) -> Exchange[CanFrame, CanFrame]:
        """The RPDOs of all, then one SYNC; those without an RPDO by SDO, before."""
        return self._trigger({bus_id: one.trigger for bus_id, one in ready.items()})

    def confirm(self, bus_id: int, ready: Ready, reply: Any) -> Procedure[CanFrame, CanFrame, str]:
        """See the setpoint acknowledged (pp), or in its object (pv)."""
        known = self._known[bus_id]
        if known.rpdo is None:
            decisive = TRIGGERS[known.mode].decisive
            if reply is None:
                raise MotorRefused("no_reply", f"no reply to {decisive} from motor {bus_id}")
            if isinstance(reply, Aborted):
                raise MotorRefused("refused", f"{decisive} of motor {bus_id}: {reply}")
        if known.mode == Mode.PV:
            wanted, units = ready.trigger[TARGET_VELOCITY.key], (yield from self._read(bus_id, TARGET_VELOCITY))
            if units != wanted:
                raise MotorRefused("refused", f"{TARGET_VELOCITY} of motor {bus_id}: sent {wanted}, read {units}")
            return ready.told
        statusword = yield from self._wait(bus_id, STATUSWORD, lambda word: bool(word & ACKNOWLEDGED))
        if not statusword & ACKNOWLEDGED:
            told = f"its statusword is {statusword:04X}"
            raise MotorRefused("refused", f"{ready.told}: the drive does not acknowledge it, {told}")
        yield from self._control(bus_id, Control.ENABLE)
        return ready.told

    def halt(self, bus_ids: Iterable[int]) -> Exchange[CanFrame, CanFrame]:
        """Quick stop: the RPDOs of all, then one SYNC."""
        stop = {CONTROLWORD.key: int(Control.QUICK_STOP), TARGET_VELOCITY.key: 0}
        return self._trigger({bus_id: stop for bus_id in bus_ids if bus_id in self._known}, CONTROLWORD)

    def _trigger(
        self, values: Mapping[int, Mapping[Key, int]], decisive: Object | None = None
    ) -> Exchange[CanFrame, CanFrame]:
        """Objects of drives, at one SYNC; by SDO only what is ``decisive``, if not told by the drive's mode."""
        frames, downloads = [], {}
        for bus_id, objects in values.items():
            known = self._known[bus_id]
            if known.rpdo is not None:
                raw = [
                    objects[entry.index, entry.sub].to_bytes(entry.bits // 8, "little", signed=True)
                    for entry in known.rpdo.mapping
                ]
                frames.append(CanFrame(known.rpdo.cob_id & 0x7FF, known.rpdo.pack(raw)))
            else:
                wanted = decisive or TRIGGERS[known.mode].decisive
                downloads[bus_id] = (wanted.key, encode(wanted.kind, objects[wanted.key]))
        return download_many(downloads, [*frames, SYNC_FRAME] if frames else [])

    def _enable(self, bus_id: int, known: _Known) -> Procedure[CanFrame, CanFrame, str]:
        """Up the states, one by one, with setpoints that hold it where it is."""
        state = yield from self._read_state(bus_id)
        if state == State.ENABLED:
            return (yield from self._hold(bus_id, known))
        if state == State.QUICK_STOP:
            yield from self._control(bus_id, Control.DISABLE_VOLTAGE)
            state = yield from self._settle(bus_id, set(STEPS_UP), "disable voltage (00)")
        if state in FAULTS:
            told = "; ".join(self.explain(known.error)) or "no error code"
            raise MotorRefused("refused", f"the drive reports a fault ({told}); clear the fault first")
        known.armed = False  # it may have been without power meanwhile
        yield from self._arm(bus_id, known)
        held = yield from self._preset(bus_id, known)
        while state != State.ENABLED:
            if state not in STEPS_UP:
                raise MotorRefused("refused", f"the drive is {_name(State, state)}")
            control, wanted = STEPS_UP[state]
            yield from self._control(bus_id, control)
            state = yield from self._settle(bus_id, {wanted}, f"controlword {control:02X}")
        return f"enabled, {held}"

    def _arm(self, bus_id: int, known: _Known) -> Procedure[CanFrame, CanFrame, None]:
        """Have the drive consume the gateway's heartbeat, unless it is known to; it counts from the first."""
        timeout_ms = self.motors[bus_id].watchdog_ns // MS
        if not timeout_ms or known.armed:
            return
        try:
            if (yield from self._read(bus_id, ABORT_CONNECTION)) not in ABORT_CONNECTION_STOPS:
                yield from self._write(bus_id, ABORT_CONNECTION, QUICK_STOP)
            wanted = GATEWAY << 16 | timeout_ms
            if (yield from self._read(bus_id, CONSUMED_HEARTBEAT)) != wanted:
                yield from self._write(bus_id, CONSUMED_HEARTBEAT, wanted)
        except MotorRefused as refusal:
            raise MotorRefused(refusal.reason, f"its watchdog cannot be armed: {refusal.detail}") from None
        yield Exchange([make_heartbeat(GATEWAY, NodeState.OPERATIONAL)], frozenset(), lambda _: None)
        known.armed = True

    def _hold(self, bus_id: int, known: _Known) -> Procedure[CanFrame, CanFrame, str]:
        """Bring an enabled drive to rest in its mode, whoever moves it: first of all by halt."""
        yield from self._control(bus_id, Control.ENABLE | Control.HALT)
        held = "halted"
        if known.mode != Mode.PP or (yield from self._read(bus_id, MODE_DISPLAY)) != Mode.PP:
            held = yield from self._preset(bus_id, known)
        if known.mode != Mode.PP:  # there halt stays: cleared alone, the drive would go on
            yield from self._control(bus_id, Control.ENABLE)
        yield from self._settle(bus_id, {State.ENABLED}, "halt")
        return held

    def _preset(self, bus_id: int, known: _Known) -> Procedure[CanFrame, CanFrame, str]:
        """Setpoints that move nothing, then the mode, seen."""
        if known.mode == Mode.PV:
            yield from self._write(bus_id, TARGET_VELOCITY, 0)
            held = "at rest"
        else:
            position = yield from self._read(bus_id, POSITION)
            yield from self._write(bus_id, TARGET_POSITION, position)
            held = f"holding near {position / known.options.units_per_turn * tau:.4f} rad"
        if (yield from self._read(bus_id, MODE_DISPLAY)) != known.mode:
            yield from self._write(bus_id, MODE, known.mode)
            mode = yield from self._wait(bus_id, MODE_DISPLAY, lambda mode: mode == known.mode)
            if mode != known.mode:
                raise MotorRefused("refused", f"{MODE}: sent {known.mode:d}, but {MODE_DISPLAY} is {mode}")
        return held

    def _move(self, bus_id: int, order: Order, known: _Known) -> Procedure[CanFrame, CanFrame, Ready]:
        target, velocity, options = order.value, order.velocity_rad_s, known.options
        if not (isfinite(target) and isfinite(velocity) and velocity >= 0):
            raise MotorRefused("malformed", f"position {target} rad at {velocity} rad/s")
        units, speed = round(target / tau * options.units_per_turn), round(velocity / tau * options.velocity_units)
        lowest, highest = known.limits
        if not lowest <= units <= highest:
            raise MotorRefused("out_of_limits", f"{target} rad is {units} units; the drive takes {lowest} to {highest}")
        if speed not in U32:
            raise MotorRefused("out_of_limits", f"{target} rad at {velocity} rad/s: {speed} units do not fit into 6081")
        yield from self._see_enabled(bus_id, known)
        if (yield from self._read(bus_id, STATUSWORD)) & ACKNOWLEDGED:  # an order before was cut off half way
            yield from self._control(bus_id, Control.ENABLE)
            if (yield from self._wait(bus_id, STATUSWORD, lambda word: not word & ACKNOWLEDGED)) & ACKNOWLEDGED:
                raise MotorRefused("refused", "the drive still acknowledges the setpoint before")
        yield from self._write(bus_id, PROFILE_VELOCITY, speed)
        yield from self._write(bus_id, TARGET_POSITION, units)
        start = {CONTROLWORD.key: int(Control.ENABLE | Control.AT_ONCE | Control.NEW_SETPOINT)}
        return Ready(start, f"going to {target:.4f} rad at {velocity:.4f} rad/s")

    def _turn(self, bus_id: int, velocity: float, known: _Known) -> Procedure[CanFrame, CanFrame, Ready]:
        if not isfinite(velocity):
            raise MotorRefused("malformed", f"velocity {velocity} rad/s")
        if (units := round(velocity / tau * known.options.velocity_units)) not in I32:
            raise MotorRefused("out_of_limits", f"{velocity} rad/s: {units} units do not fit into 60FF")
        yield from self._see_enabled(bus_id, known)
        turn = {CONTROLWORD.key: int(Control.ENABLE), TARGET_VELOCITY.key: units}
        return Ready(turn, f"turning at {velocity:.4f} rad/s")

    def _see_enabled(self, bus_id: int, known: _Known) -> Procedure[CanFrame, CanFrame, None]:
        """In its mode, too: in another one bit 4 means another thing, such as to go homing."""
        state = yield from self._read_state(bus_id)
        if state != State.ENABLED:
            raise MotorRefused("not_enabled", f"the drive is {_name(State, state)}")
        if (mode := (yield from self._read(bus_id, MODE_DISPLAY))) != known.mode:
            raise MotorRefused("not_enabled", f"{MODE_DISPLAY} is {mode}, not {known.mode:d}: enable sets it")
        yield from self._arm(bus_id, known)

    def _clear_fault(self, bus_id: int, known: _Known) -> Procedure[CanFrame, CanFrame, str]:
        """Only a drive in fault needs it; to any other, controlword 0 would be an order to let go."""
        if (yield from self._read_state(bus_id)) in FAULTS:
            yield from self._control(bus_id, Control.DISABLE_VOLTAGE)
            yield from self._control(bus_id, Control.FAULT_RESET)
            yield from self._settle(bus_id, frozenset(State) - FAULTS, "fault reset (80)")
            yield from self._control(bus_id, Control.DISABLE_VOLTAGE)
        known.error = 0
        return "no fault"

    def _control(self, bus_id: int, word: Control) -> Procedure[CanFrame, CanFrame, None]:
        yield from self._write(bus_id, CONTROLWORD, word)

    def _settle(self, bus_id: int, wanted: Collection[State], sent: str) -> Procedure[CanFrame, CanFrame, State | None]:
        """See one of these states in the statusword."""
        word = yield from self._wait(bus_id, STATUSWORD, lambda word: state_of(word) in wanted)
        state = state_of(word)
        _note_state(self._known[bus_id], state)
        if state not in wanted:
            raise MotorRefused("refused", f"sent {sent}; the drive is {_name(State, state)}")
        return state

    def _wait(self, bus_id: int, watched: Object, wanted: Callable[[int], bool]) -> Procedure[CanFrame, CanFrame, int]:
        """An object's value once it is as wanted, or as it was at last."""
        value: int = yield from self._read(bus_id, watched)
        for _ in range(SETTLE_READS):
            if wanted(value):
                break
            yield pause(bus_id, SETTLE_NS)
            value = yield from self._read(bus_id, watched)
        return value

    def _read_state(self, bus_id: int) -> Procedure[CanFrame, CanFrame, State | None]:
        state = state_of((yield from self._read(bus_id, STATUSWORD)))
        _note_state(self._known[bus_id], state)
        return state

    def _read(self, bus_id: int, wanted: Object, tries: int = 2) -> Procedure[CanFrame, CanFrame, Any]:
        try:
            return decode(wanted.kind, (yield from upload(bus_id, wanted.key, tries)))
        except (Aborted, ValueError) as error:
            raise MotorRefused("refused", f"{wanted} of motor {bus_id}: {error}") from None

    def _read_if_there(self, bus_id: int, wanted: Object) -> Procedure[CanFrame, CanFrame, Any]:
        """None if the drive has no such object, or cannot tell it now."""
        try:
            return (yield from self._read(bus_id, wanted))
        except MotorRefused as refusal:
            if refusal.reason == "no_reply":
                raise
            return None

    def _read_slowly(self, bus_id: int, wanted: Object) -> Procedure[CanFrame, CanFrame, Any]:
        """None if nothing comes: silence is left to ``poll`` to notice."""
        try:
            return (yield from self._read(bus_id, wanted, tries=1))
        except MotorRefused:
            return None

    def _write(self, bus_id: int, wanted: Object, value: int) -> Procedure[CanFrame, CanFrame, None]:
        try:
            yield from download(bus_id, wanted.key, encode(wanted.kind, value))
        except Aborted as abort:
            reason = "out_of_limits" if abort.code in OUT_OF_RANGE else "refused"
            raise MotorRefused(reason, f"{wanted} of motor {bus_id} := {value}: {abort}") from None


def _cob_id_of(index: int) -> Object:
    return Object(index, 1, "uint32", f"COB-ID of {_pdo_name(index)}")


def _transmission_of(index: int) -> Object:
    return Object(index, 2, "uint8", f"transmission type of {_pdo_name(index)}")


def _mapping_of(index: int, sub: int) -> Object:
    return Object(index + MAPPING, sub, "uint32" if sub else "uint8", f"mapping of {_pdo_name(index)}")


def _pdo_name(index: int) -> str:
    return f"TPDO{index - FIRST_TPDO + 1}" if index >= FIRST_TPDO else f"RPDO{index - FIRST_RPDO + 1}"


def _note_state(known: _Known, state: State | None) -> None:
    """A fault that is gone takes its error code with it; a code without a fault is a warning, and stays."""
    if known.faulty and state not in FAULTS:
        known.error = 0
    known.faulty = state in FAULTS


def _name(names: type[IntEnum], value: int | None) -> str:
    return names(value).name.lower().replace("_", " ") if value in set(names) else f"unknown ({value})"


FAMILY: type[Family[Any, Any]] = Cia402
SIMULATED: type[Responder[Any]] = SimulatedCia402
