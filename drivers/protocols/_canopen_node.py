"""A simulated CANopen device (CiA 301): the other side of ``_canopen``, for any profile; no I/O, no clock."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from struct import Struct
from typing import Any, Final

from drivers.clock import MS, MonotonicNs
from drivers.family import CanFrame
from drivers.protocols._canopen import (
    INVALID,
    LONGEST,
    ON_EVENT,
    PDOS,
    SDO_FRAME,
    SYNCHRONOUS,
    Aborted,
    Answer,
    Cob,
    Key,
    Kind,
    Mapped,
    Nmt,
    NodeState,
    Pdo,
    Step,
    decode,
    encode,
    size_of,
)

_EMERGENCY: Final = Struct("<HB5x")


def _nothing() -> None:
    """Nothing else to reset."""


@dataclass(slots=True)
class Variable:
    """One object of a simulated device: kept here, or told by ``get``; ``set`` sees what is written, and may abort."""

    kind: Kind
    value: Any = 0
    writable: bool = False
    mappable: bool = False
    low: float = -inf
    high: float = inf
    get: Callable[[], Any] | None = None
    set: Callable[[Any], None] | None = None

    def read(self) -> bytes:
        """Its bytes."""
        return encode(self.kind, self.get() if self.get else self.value)

    def write(self, raw: bytes) -> None:
        """Take new bytes, or raise Aborted."""
        if not self.writable:
            raise Aborted(0x06010002)
        if self.kind != "string" and len(raw) != size_of(self.kind):
            raise Aborted(0x06070010)
        value = decode(self.kind, raw)
        if self.kind != "string" and not self.low <= value <= self.high:
            raise Aborted(0x06090031 if value > self.high else 0x06090032)
        if self.set:
            self.set(value)
        self.value = value


class SdoServer:
    """A device's side of SDO transfers, one at a time: expedited and in segments, both ways."""

    def __init__(self, objects: Mapping[Key, Variable]) -> None:
        self._objects = objects
        self._key: Key = (0, 0)
        self._left: bytes | None = None  # of an upload in segments
        self._taken: bytes | None = None  # of a download in segments
        self._toggle = 0

    def answer(self, data: bytes) -> bytes | None:
        """The reply to a request, if it deserves one."""
        if len(data) != 8:
            return None
        try:
            match data[0] >> 5:
                case Step.UPLOAD:
                    return self._upload(data)
                case Step.DOWNLOAD:
                    return self._download(data)
                case Step.UPLOAD_SEGMENT if self._left is not None:
                    return self._upload_segment(data[0], self._left)
                case Step.DOWNLOAD_SEGMENT if self._taken is not None:
                    return self._download_segment(data, self._taken)
                case Step.ABORT:
                    self._left = self._taken = None
                    return None
                case _:
                    raise Aborted(0x05040001)
        except Aborted as abort:
            self._left = self._taken = None
            return SDO_FRAME.pack(Answer.ABORT << 5, *self._key, abort.code.to_bytes(4, "little"))

    def _find(self) -> Variable:
        if self._key not in self._objects:
            known = any(index == self._key[0] for index, _ in self._objects)
            raise Aborted(0x06090011 if known else 0x06020000)
        return self._objects[self._key]

    def _begin(self, data: bytes) -> tuple[int, bytes]:
        command, index, sub, rest = SDO_FRAME.unpack(data)
        self._key = index, sub
        self._left = self._taken = None
        self._toggle = 0
        return command, rest

    def _upload(self, data: bytes) -> bytes:
        self._begin(data)
        value = self._find().read()
        if 1 <= len(value) <= 4:
            return SDO_FRAME.pack(Answer.UPLOAD << 5 | (4 - len(value)) << 2 | 0b11, *self._key, value)
        self._left = value
        return SDO_FRAME.pack(Answer.UPLOAD << 5 | 1, *self._key, len(value).to_bytes(4, "little"))

    def _upload_segment(self, command: int, left: bytes) -> bytes:
        self._check_toggle(command)
        part, left = left[:7], left[7:]
        head = Answer.UPLOAD_SEGMENT << 5 | (command & 0x10) | (7 - len(part)) << 1 | (not left)
        self._left = left or None
        return bytes((head,)) + part.ljust(7, b"\0")

    def _download(self, data: bytes) -> bytes:
        command, rest = self._begin(data)
        variable = self._find()
        if command & 0b10:
            variable.write(rest[: 4 - (command >> 2 & 3) if command & 1 else 4])
        elif variable.writable:
            self._taken = b""
        else:
            raise Aborted(0x06010002)
        return SDO_FRAME.pack(Answer.DOWNLOAD << 5, *self._key, bytes(4))

    def _download_segment(self, data: bytes, taken: bytes) -> bytes:
        self._check_toggle(data[0])
        taken += data[1 : 8 - (data[0] >> 1 & 7)]
        if len(taken) > LONGEST:
            raise Aborted(0x05040005)
        self._taken = taken
        if data[0] & 1:
            self._find().write(taken)
            self._taken = None
        return bytes((Answer.DOWNLOAD_SEGMENT << 5 | data[0] & 0x10,)) + bytes(7)

    def _check_toggle(self, command: int) -> None:
        if command >> 4 & 1 != self._toggle:
            raise Aborted(0x05030000)
        self._toggle ^= 1


class Node:
    """A simulated device: network state, SDO, PDOs as they are mapped, emergency messages, heartbeat.

    ``objects`` are those of its profile; communication objects (1001, 1003, 1017, the PDOs) are added. A PDO can be set
    up anew while the node is not operational, and its mapping while it is empty and the PDO not valid. ``tpdos`` and
    ``rpdos``: how they are set up at power-up. ``deserted``: what its profile does when the heartbeat that it consumes
    (1016) is missing; the node itself then leaves the operational state (1029, at its default).
    """

    def __init__(
        self,
        node: int,
        objects: Mapping[Key, Variable],
        tpdos: Sequence[Pdo] = (),
        rpdos: Sequence[Pdo] = (),
        reset: Callable[[], None] = _nothing,
        deserted: Callable[[], None] = _nothing,
    ) -> None:
        self.node = node
        self.state = NodeState.PRE_OPERATIONAL
        self.outbox: list[CanFrame] = []  # what it sends by itself
        self._objects = dict(objects)
        self._setup = ((0x1800, Cob.TPDO1, tpdos), (0x1400, Cob.RPDO1, rpdos))
        self._reset = reset
        self._deserted = deserted
        self._now = MonotonicNs(0)
        self._errors: list[int] = []  # the latest first
        self._reset_communication()

    def _reset_communication(self) -> None:
        self._sdo = SdoServer(self._objects)
        self._tpdos: list[Pdo] = []  # while operational
        self._rpdos: dict[int, Pdo] = {}
        self._syncs = 0
        self._told: dict[int, bytes] = {}  # data of each TPDO that is sent on events
        self._held: dict[int, bytes] = {}  # data of RPDOs that wait for a SYNC
        self._heartbeat_ns = 0
        self._heard_ns: int | None = None  # the heartbeat that it consumes; None: it waits for a first one
        self.error_register = 0
        self._objects |= {
            (0x1001, 0): Variable("uint8", get=lambda: self.error_register, mappable=True),
            (0x1003, 0): Variable("uint8", get=lambda: len(self._errors)),
            (0x1003, 1): Variable("uint32", get=lambda: self._errors[0] if self._errors else 0),
            (0x1016, 0): Variable("uint8", 1),
            (0x1016, 1): Variable("uint32", writable=True),
            (0x1017, 0): Variable("uint16", writable=True),
        }
        for base, cob, pdos in self._setup:
            for number in range(PDOS):
                unused = Pdo(INVALID | cob + 0x100 * number + self.node, 255, ())
                self._add_pdo(base + number, pdos[number] if number < len(pdos) else unused)

    def _add_pdo(self, index: int, pdo: Pdo) -> None:
        """Communication and mapping parameter of a PDO, with the rules for changing them."""
        mapping = index + 0x200
        cob_id = self._objects[index, 1] = Variable("uint32", pdo.cob_id, writable=True)
        count = self._objects[mapping, 0] = Variable("uint8", len(pdo.mapping), writable=True)

        def set_cob_id(value: int) -> None:
            self._refuse_if(self.state == NodeState.OPERATIONAL, 0x08000022)
            self._refuse_if(not (value | cob_id.value) & INVALID and value != cob_id.value, 0x06090030)

        def set_transmission(value: int) -> None:
            self._refuse_if(self.state == NodeState.OPERATIONAL, 0x08000022)
            self._refuse_if(value not in SYNCHRONOUS and value not in ON_EVENT, 0x06090030)

        def set_count(value: int) -> None:
            self._refuse_if(not cob_id.value & INVALID, 0x06010000)
            words = [self._objects[mapping, sub].value for sub in range(1, value + 1)]
            self._refuse_if(sum(Mapped.of_word(word).bits for word in words) > 64, 0x06040042)
            self._refuse_if(0 in words, 0x06040041)

        def set_entry(word: int) -> None:
            self._refuse_if(count.value != 0 or not cob_id.value & INVALID, 0x06010000)
            entry = Mapped.of_word(word)
            variable = self._objects.get((entry.index, entry.sub))
            fits = variable is not None and variable.mappable and entry.bits == 8 * size_of(variable.kind)
            taken = index >= 0x1800 or (variable is not None and variable.writable)  # by an RPDO
            self._refuse_if(not (fits and taken), 0x06040041)

        cob_id.set, count.set, count.high = set_cob_id, set_count, 8
        self._objects[index, 0] = Variable("uint8", 2)
        self._objects[index, 2] = Variable("uint8", pdo.transmission, writable=True, set=set_transmission)
        words = [entry.word() for entry in pdo.mapping]
        for sub in range(1, 9):
            word = words[sub - 1] if sub <= len(words) else 0
            self._objects[mapping, sub] = Variable("uint32", word, writable=True, set=set_entry)

    @staticmethod
    def _refuse_if(wrong: bool, code: int) -> None:
        if wrong:
            raise Aborted(code)

    def _pdo(self, index: int) -> Pdo:
        values = [self._objects[index + 0x200, sub].value for sub in range(9)]
        mapping = tuple(Mapped.of_word(word) for word in values[1 : 1 + values[0]])
        return Pdo(self._objects[index, 1].value, self._objects[index, 2].value, mapping)

    def start(self) -> None:
        """Be operational, with the PDOs as they are set up now."""
        self.state = NodeState.OPERATIONAL
        self._tpdos = [pdo for number in range(PDOS) if (pdo := self._pdo(0x1800 + number)).valid and pdo.mapping]
        received = [self._pdo(0x1400 + number) for number in range(PDOS)]
        self._rpdos = {pdo.cob_id & 0x7FF: pdo for pdo in received if pdo.valid}
        self._told.clear()
        self._held.clear()

    def handle(self, frame: CanFrame) -> Iterator[CanFrame]:
        """Replies to one frame."""
        operational = self.state == NodeState.OPERATIONAL
        match frame.can_id:
            case Cob.NMT if len(frame.data) >= 2 and frame.data[1] in (0, self.node):
                self._obey(frame.data[0])
            case Cob.SYNC if operational:
                yield from self._sync()
            case can_id if can_id - Cob.HEARTBEAT == self._consumed[0] != 0:
                self._heard_ns = self._now
            case can_id if can_id == Cob.SDO + self.node and self.state != NodeState.STOPPED:
                if reply := self._sdo.answer(frame.data):
                    yield CanFrame(Cob.SDO_REPLY + self.node, reply)
            case can_id if operational and can_id in self._rpdos:
                pdo = self._rpdos[can_id]
                if pdo.transmission in ON_EVENT:
                    self._receive(pdo, frame.data)
                else:
                    self._held[can_id] = frame.data

    def tick(self, now: MonotonicNs) -> Iterator[CanFrame]:
        """Heartbeat, and TPDOs of which something has changed."""
        self._now = now
        _, patience_ns = self._consumed
        if self._heard_ns is not None and patience_ns and now - self._heard_ns > patience_ns:
            self._heard_ns = None
            if self.state == NodeState.OPERATIONAL:
                self.state = NodeState.PRE_OPERATIONAL
            self._deserted()
        period_ns = self._objects[0x1017, 0].value * MS
        if period_ns and now >= self._heartbeat_ns:
            self._heartbeat_ns = now + period_ns
            yield CanFrame(Cob.HEARTBEAT + self.node, bytes((self.state,)))
        if self.state == NodeState.OPERATIONAL:
            for pdo in self._tpdos:
                if pdo.transmission in ON_EVENT and self._told.get(pdo.cob_id) != (data := self._data(pdo)):
                    self._told[pdo.cob_id] = data
                    yield CanFrame(pdo.cob_id & 0x7FF, data)

    @property
    def _consumed(self) -> tuple[int, int]:
        """The node whose heartbeat it consumes, and how long it does without one; 0 for either: none."""
        word = self._objects[0x1016, 1].value
        return word >> 16 & 0x7F, (word & 0xFFFF) * MS

    def emergency(self, code: int, register: int) -> None:
        """Tell an error, or with code 0 that it is gone."""
        self.error_register = register
        self._errors = [code, *self._errors][:8] if code else self._errors
        if self.state != NodeState.STOPPED:
            self.outbox.append(CanFrame(Cob.EMCY + self.node, _EMERGENCY.pack(code, register)))

    def boot(self) -> None:
        """Communication as at power-up, told to everybody."""
        self.state = NodeState.PRE_OPERATIONAL
        self._reset_communication()
        self.outbox.append(CanFrame(Cob.HEARTBEAT + self.node, bytes((NodeState.BOOT_UP,))))

    def _obey(self, command: int) -> None:
        match command:
            case Nmt.START:
                self.start()
            case Nmt.STOP:
                self.state = NodeState.STOPPED
            case Nmt.PRE_OPERATIONAL:
                self.state = NodeState.PRE_OPERATIONAL
            case Nmt.RESET_COMMUNICATION:
                self.boot()
            case Nmt.RESET_NODE:
                self._reset()
                self.boot()

    def _sync(self) -> Iterator[CanFrame]:
        for can_id, data in self._held.items():
            self._receive(self._rpdos[can_id], data)
        self._held.clear()
        self._syncs += 1
        for pdo in self._tpdos:
            if pdo.transmission in SYNCHRONOUS and self._syncs % pdo.transmission == 0:
                yield CanFrame(pdo.cob_id & 0x7FF, self._data(pdo))

    def _data(self, pdo: Pdo) -> bytes:
        return pdo.pack(self._objects[entry.index, entry.sub].read() for entry in pdo.mapping)

    def _receive(self, pdo: Pdo, data: bytes) -> None:
        if len(data) < pdo.size:
            return
        for key, raw in pdo.unpack(data).items():
            try:
                self._objects[key].write(raw)
            except Aborted:
                continue  # a PDO has nobody to tell
