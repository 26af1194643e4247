"""CANopen (CiA 301) without any profile: frames, a client's SDO transfers, PDO mappings. The device: ``_canopen_node``.

    000      NMT        command, node (0: all)
    080      SYNC       (no data)
    080 + n  EMCY       error code u16, error register, five bytes of the vendor's
    180 + n  TPDO1      what its mapping says; TPDO2 to 4 at 280, 380, 480
    200 + n  RPDO1      likewise; RPDO2 to 4 at 300, 400, 500
    580 + n  SDO reply  command, index u16, subindex, four bytes   (little-endian)
    600 + n  SDO        likewise
    700 + n  heartbeat  state; 0: has just booted

An SDO reply names the object that it is about, so it may come late and still be known. A segment of a longer transfer
names nothing and has a toggle bit only; it is behind the reply that began its transfer, since a device sends in order.
Source: CiA 301 4.2, as told in the canopen library's documentation and sources (sdo/, emcy.py, nmt.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import Any, Final, Literal, NamedTuple

from drivers.clock import MS
from drivers.errors import MotorRefused
from drivers.family import CanFrame, Exchange, Procedure, Reply

Kind = Literal["int8", "uint8", "int16", "uint16", "int32", "uint32", "real32", "string"]
Key = tuple[int, int]
"""(index, subindex) of an object."""

NODES: Final = range(1, 128)
SDO_PATIENCE_NS: Final = 50 * MS  # drives answer an SDO when they find the time
LONGEST: Final = 1024  # bytes that an upload may bring; a name or a version is far shorter
PDOS: Final = 4  # of either direction that have predefined identifiers
MOST_MAPPED: Final = 64  # entries: a bit each
SYNCHRONOUS: Final = range(1, 241)  # transmission types: at every n-th SYNC
ON_EVENT: Final = (254, 255)  # transmission types
INVALID: Final = 1 << 31  # of a PDO's COB-ID: not used
NO_REMOTE: Final = 1 << 30  # of a PDO's COB-ID: may not be asked for

SDO_FRAME: Final = Struct("<BHB4s")  # command, index, subindex, data or size or abort code
_FLOAT = Struct("<f")
_BYTES: Final[dict[Kind, int]] = {
    "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4, "real32": 4,
}  # fmt: skip


class Cob(IntEnum):
    """What an identifier is, less the node's id: the predefined connection set."""

    NMT = 0x000
    SYNC = 0x080
    EMCY = 0x080  # with a node's id
    TPDO1 = 0x180
    RPDO1 = 0x200
    SDO_REPLY = 0x580
    SDO = 0x600
    HEARTBEAT = 0x700


class Nmt(IntEnum):
    """Commands of the network's master."""

    START = 0x01
    STOP = 0x02
    PRE_OPERATIONAL = 0x80
    RESET_NODE = 0x81
    RESET_COMMUNICATION = 0x82


class NodeState(IntEnum):
    """What a heartbeat tells."""

    BOOT_UP = 0x00
    STOPPED = 0x04
    OPERATIONAL = 0x05
    PRE_OPERATIONAL = 0x7F


class Step(IntEnum):
    """Upper three bits of an SDO's first byte: what a client asks (a server's reply has numbers of its own)."""

    DOWNLOAD_SEGMENT = 0
    DOWNLOAD = 1
    UPLOAD = 2
    UPLOAD_SEGMENT = 3
    ABORT = 4


class Answer(IntEnum):
    """Likewise, what a server answers."""

    UPLOAD_SEGMENT = 0
    DOWNLOAD_SEGMENT = 1
    UPLOAD = 2
    DOWNLOAD = 3
    ABORT = 4


_ABORTS: Final[dict[int, str]] = {
    0x05030000: "toggle bit not alternated",
    0x05040000: "the transfer timed out",
    0x05040001: "unknown SDO command",
    0x05040005: "out of memory",
    0x06010000: "unsupported access",
    0x06010001: "write only",
    0x06010002: "read only",
    0x06020000: "no such object",
    0x06040041: "cannot be mapped to a PDO",
    0x06040042: "more than a PDO holds",
    0x06040043: "parameters do not go together",
    0x06040047: "internal incompatibility",
    0x06060000: "hardware error",
    0x06070010: "wrong length for its type",
    0x06070012: "too long for its type",
    0x06070013: "too short for its type",
    0x06090011: "no such subindex",
    0x06090030: "value out of range",
    0x06090031: "value too high",
    0x06090032: "value too low",
    0x06090036: "maximum below minimum",
    0x060A0023: "resource not available",
    0x08000000: "general error",
    0x08000020: "cannot be transferred or stored",
    0x08000021: "cannot be transferred or stored: local control",
    0x08000022: "cannot be transferred or stored in the present state",
    0x08000023: "no object dictionary",
    0x08000024: "no data",
}
OUT_OF_RANGE: Final = frozenset({0x06090030, 0x06090031, 0x06090032})


class Aborted(Exception):
    """A transfer that either side gave up, with the code that says why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"{_ABORTS.get(code, 'unknown reason')} (abort {code:08X})")
        self.code = code


# --- values, objects, mappings ----------------------------------------------------------------------------------------


def encode(kind: Kind, value: Any) -> bytes:
    """A value as an object of this type holds it. OverflowError if the type cannot hold it."""
    if kind == "string":
        return str(value).encode("ascii", "replace")
    return (
        _FLOAT.pack(value) if kind == "real32" else int(value).to_bytes(_BYTES[kind], "little", signed=is_signed(kind))
    )


def decode(kind: Kind, raw: bytes) -> Any:
    """A value from an object's bytes; an integer may be shorter than its type. ValueError if that cannot be."""
    if kind == "string":
        return raw.split(b"\0")[0].decode("ascii", "replace").strip()
    if not raw or (kind == "real32" and len(raw) < 4):
        raise ValueError(f"{len(raw)} bytes for {kind}")
    if kind == "real32":
        return _FLOAT.unpack_from(raw)[0]
    return int.from_bytes(raw[: _BYTES[kind]], "little", signed=is_signed(kind))


def size_of(kind: Kind) -> int:
    """Bytes of an object of this type; 0 for a string, which has any number of them."""
    return _BYTES.get(kind, 0)


def is_signed(kind: Kind) -> bool:
    """Whether an integer of this type may be negative."""
    return kind.startswith("int")


@dataclass(frozen=True, slots=True)
class Mapped:
    """One entry of a PDO's mapping."""

    index: int
    sub: int
    bits: int

    def word(self) -> int:
        """The entry as the mapping parameter (1600, 1A00) holds it."""
        return self.index << 16 | self.sub << 8 | self.bits

    @classmethod
    def of_word(cls, word: int) -> "Mapped":
        """The inverse of ``word``."""
        return cls(word >> 16 & 0xFFFF, word >> 8 & 0xFF, word & 0xFF)


@dataclass(frozen=True, slots=True)
class Object:
    """An entry of the object dictionary, with its name in the profile."""

    index: int
    sub: int
    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"{self.name} ({self.index:04X}:{self.sub})"

    @property
    def key(self) -> Key:
        """Where it is."""
        return self.index, self.sub

    @property
    def mapped(self) -> Mapped:
        """The object as an entry of a mapping."""
        return Mapped(self.index, self.sub, 8 * size_of(self.kind))


class Pdo(NamedTuple):
    """How a PDO is set up: communication parameter and mapping."""

    cob_id: int  # as 1400:1 or 1800:1 hold it
    transmission: int
    mapping: tuple[Mapped, ...]

    @property
    def valid(self) -> bool:
        """Whether it is used at all."""
        return not self.cob_id & INVALID

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return -(-sum(entry.bits for entry in self.mapping) // 8)

    def pack(self, values: Iterable[bytes]) -> bytes:
        """Data of the PDO from the values of its objects."""
        word = shift = 0
        for entry, value in zip(self.mapping, values, strict=True):
            word |= int.from_bytes(value, "little") << shift
            shift += entry.bits
        return word.to_bytes(self.size, "little")

    def unpack(self, data: bytes) -> dict[Key, bytes]:
        """Values of its objects from the PDO's data, which is at least ``size`` long."""
        word = int.from_bytes(data, "little")
        values: dict[Key, bytes] = {}
        for entry in self.mapping:
            values[entry.index, entry.sub] = (word & (1 << entry.bits) - 1).to_bytes(-(-entry.bits // 8), "little")
            word >>= entry.bits
        return values


# --- the client's side ------------------------------------------------------------------------------------------------

SYNC_FRAME: Final = CanFrame(Cob.SYNC, b"")


def make_nmt(command: Nmt, node: int) -> CanFrame:
    """An order to a node's network state."""
    return CanFrame(Cob.NMT, bytes((command, node)))


def make_heartbeat(node: int, state: NodeState) -> CanFrame:
    """A sign of life."""
    return CanFrame(Cob.HEARTBEAT + node, bytes((state,)))


def make_upload(node: int, key: Key) -> CanFrame:
    """Ask for an object."""
    return CanFrame(Cob.SDO + node, SDO_FRAME.pack(Step.UPLOAD << 5, *key, bytes(4)))


def make_download(node: int, key: Key, value: bytes) -> CanFrame:
    """Write an object of one to four bytes."""
    command = Step.DOWNLOAD << 5 | (4 - len(value)) << 2 | 0b11  # expedited, with its size
    return CanFrame(Cob.SDO + node, SDO_FRAME.pack(command, *key, value))


def make_upload_segment(node: int, toggle: int) -> CanFrame:
    """Ask for the next segment of the object whose upload has begun."""
    return CanFrame(Cob.SDO + node, bytes((Step.UPLOAD_SEGMENT << 5 | toggle << 4,)) + bytes(7))


def make_abort(node: int, key: Key, code: int) -> CanFrame:
    """Give up a transfer."""
    return CanFrame(Cob.SDO + node, SDO_FRAME.pack(Step.ABORT << 5, *key, code.to_bytes(4, "little")))


def send_nmt(command: Nmt, node: int) -> Exchange[CanFrame, CanFrame]:
    """An NMT command; none is ever answered."""
    return Exchange([make_nmt(command, node)], frozenset(), lambda _: None)


def pause(node: int, patience_ns: int) -> Exchange[CanFrame, CanFrame]:
    """Nothing, for a while: a drive that changes its state takes its time."""
    return Exchange([], frozenset({node}), lambda _: None, patience_ns=patience_ns)


def upload(node: int, key: Key, tries: int = 2) -> Procedure[CanFrame, CanFrame, bytes]:
    """Read an object, whole. Raises Aborted, and MotorRefused (no_reply) if nobody answers."""
    data: bytes = yield from _ask(node, key, make_upload(node, key), Answer.UPLOAD, tries)
    command = data[0]
    if command & 0b10:
        return data[4 : 8 - (command >> 2 & 3) if command & 1 else 8]
    value, toggle = b"", 0
    while True:
        segment: bytes | None = (yield _segment(node, key, toggle)).get(node)
        if segment is None:
            yield Exchange([make_abort(node, key, 0x05040000)], frozenset(), lambda _: None)
            raise _silence(node, key)
        _raise_abort(segment)
        value += segment[1 : 8 - (segment[0] >> 1 & 7)]
        if segment[0] & 1:
            return value
        if len(value) > LONGEST:
            yield Exchange([make_abort(node, key, 0x05040005)], frozenset(), lambda _: None)
            raise Aborted(0x05040005)
        toggle ^= 1


def download(node: int, key: Key, value: bytes) -> Procedure[CanFrame, CanFrame, None]:
    """Write an object of one to four bytes. Raises as ``upload`` does."""
    yield from _ask(node, key, make_download(node, key, value), Answer.DOWNLOAD, 2)


def download_many(values: Mapping[int, tuple[Key, bytes]], behind: Sequence[CanFrame]) -> Exchange[CanFrame, CanFrame]:
    """Write an object of each of several nodes, with other frames right behind; a reply is True, or Aborted."""
    requests = {node: make_download(node, key, value) for node, (key, value) in values.items()}

    def match(frame: CanFrame) -> Reply | None:
        node, data = frame.can_id - Cob.SDO_REPLY, frame.data
        if node not in requests or len(data) < 8 or data[1:4] != requests[node].data[1:4]:
            return None
        if data[0] >> 5 == Answer.ABORT:
            return node, Aborted(int.from_bytes(data[4:8], "little"))
        return (node, True) if data[0] >> 5 == Answer.DOWNLOAD else None

    patience_ns = SDO_PATIENCE_NS if requests else 0
    return Exchange([*requests.values(), *behind], frozenset(requests), match, patience_ns=patience_ns)


def _ask(node: int, key: Key, request: CanFrame, wanted: Answer, tries: int) -> Procedure[CanFrame, CanFrame, bytes]:
    """The reply's data. What is asked is absolute, so it may be asked twice: a server may miss one of two clients."""

    def match(frame: CanFrame) -> Reply | None:
        data = frame.data
        known = frame.can_id == Cob.SDO_REPLY + node and len(data) >= 4 and data[1:4] == request.data[1:4]
        return (node, data) if known and data[0] >> 5 in (wanted, Answer.ABORT) else None

    exchange = Exchange([request], frozenset({node}), match, patience_ns=SDO_PATIENCE_NS)
    for _ in range(tries):
        data: bytes | None = (yield exchange).get(node)
        if data is not None:
            _raise_abort(data)
            return data
    raise _silence(node, key)


def _segment(node: int, key: Key, toggle: int) -> Exchange[CanFrame, CanFrame]:
    def match(frame: CanFrame) -> Reply | None:
        data = frame.data
        if frame.can_id != Cob.SDO_REPLY + node or not data:
            return None
        wanted = data[0] >> 4 == Answer.UPLOAD_SEGMENT << 1 | toggle
        aborted = data[0] >> 5 == Answer.ABORT and data[1:4] == bytes((key[0] & 0xFF, key[0] >> 8, key[1]))
        return (node, data) if wanted or aborted else None

    return Exchange([make_upload_segment(node, toggle)], frozenset({node}), match, patience_ns=SDO_PATIENCE_NS)


def _raise_abort(data: bytes) -> None:
    if data[0] >> 5 == Answer.ABORT:
        raise Aborted(int.from_bytes(data[4:8], "little"))


def _silence(node: int, key: Key) -> MotorRefused:
    return MotorRefused("no_reply", f"no reply to an SDO about {key[0]:04X}:{key[1]} from node {node}")
