"""The wire that motors and client share: how long a unit occupies it, and whose turn it is.

    request offered      |=request=|              a unit may start when it is ready and the wire is free,
    reply ready at its       delay |-->|=reply=|  and has arrived when its last bit has passed
    motor's return delay

Of several that are ready when the wire falls free, one goes first: on CAN the one that wins the arbitration (the lowest
identifier), on a serial wire a reply before a request; else the one that was offered first. A client's requests
leave in their order: only the foremost takes part. Delays of several motors that answer one request run side by side.

A serial byte is ten bits (8N1). A CAN frame is its fields, the stuff bits that its content makes necessary, and 13 bits
that are never stuffed (ISO 11898-1; Bosch CAN specification 2.0, parts A and B):

    SOF 1 | identifier 11, RTR, IDE, r0     | DLC 4 | data | CRC 15 || CRC delimiter, ACK 2, EOF 7, intermission 3
    SOF 1 | 11, SRR, IDE, 18, RTR, r1, r0   |   (29-bit identifiers)
"""

from collections import deque
from functools import cache
from heapq import heappop, heappush
from itertools import count
from typing import Final, Generic, NamedTuple

from drivers.clock import SECOND, MonotonicNs
from drivers.family import CanFrame, W
from drivers.sim.responder import SimulatedMotor

MOST_WAITING: Final = 10_000  # units; a client that floods the wire loses the rest
CRC_POLYNOMIAL: Final = 0x4599  # x^15 + x^14 + x^10 + x^8 + x^7 + x^4 + x^3 + 1
UNSTUFFED_BITS: Final = 13
STUFF_AFTER: Final = 5  # equal bits in a row

# --- bits -------------------------------------------------------------------------------------------------------------


@cache
def _crc_table() -> tuple[int, ...]:
    """The CRC of each four bits."""
    table = []
    for nibble in range(16):
        crc = nibble << 11
        for _ in range(4):
            crc = (crc << 1) ^ (CRC_POLYNOMIAL if crc & 0x4000 else 0)
        table.append(crc & 0x7FFF)
    return tuple(table)


def crc15(nibbles: bytes) -> int:
    """The CRC of a CAN frame's bits, four in each of ``nibbles``; zeros ahead of them make no difference."""
    table, crc = _crc_table(), 0
    for nibble in nibbles:
        crc = (crc << 4 & 0x7FFF) ^ table[crc >> 11 ^ nibble]
    return crc


@cache
def _stuffing() -> dict[tuple[int, int], list[tuple[int, tuple[int, int]]]]:
    """{(last bit, how often in a row): [(stuff bits, the same afterwards) for each next four bits]}"""
    states = [(bit, run) for bit in (0, 1) for run in range(1, STUFF_AFTER)]
    return {state: [_stuff(state, nibble) for nibble in range(16)] for state in states}


def _stuff(state: tuple[int, int], nibble: int) -> tuple[int, tuple[int, int]]:
    (last, run), stuffed = state, 0
    for place in (3, 2, 1, 0):
        bit = nibble >> place & 1
        run = run + 1 if bit == last else 1
        last = bit
        if run == STUFF_AFTER:  # one of the other kind follows, and counts as the first of its own row
            last, run, stuffed = 1 - bit, 1, stuffed + 1
    return stuffed, (last, run)


def can_frame_bits(frame: CanFrame) -> int:
    """Bits from the start of a data frame to the end of the intermission behind it, stuff bits included."""
    size = len(frame.data)
    if frame.extended:
        base, rest = frame.can_id >> 18, frame.can_id & 0x3FFFF
        header, length = base << 27 | 0b11 << 25 | rest << 7 | size, 39
    else:
        header, length = frame.can_id << 7 | size, 19
    content = header << 8 * size | int.from_bytes(frame.data, "big")
    crc = crc15(_nibbles(content))
    length += 8 * size + 15
    # filled up to whole nibbles with bits ahead of the first that are never stuffed, and end with a 1 as an idle bus
    padding = -length % 4
    filled = (0b0101 & (1 << padding) - 1) << length | content << 15 | crc
    stuffed, state = 0, (1, 1)
    table = _stuffing()
    for nibble in _nibbles(filled, (length + padding) // 4):
        more, state = table[state][nibble]
        stuffed += more
    return length + stuffed + UNSTUFFED_BITS


_HEX: Final = bytes.maketrans(b"0123456789abcdef", bytes(range(16)))


def _nibbles(bits: int, length: int = 1) -> bytes:
    """Four bits a byte, at least so many of them."""
    return f"{bits:0{length}x}".encode().translate(_HEX)


def wire_bits(unit: bytes | CanFrame) -> int:
    """Bits that a unit of either medium takes on its wire."""
    return can_frame_bits(unit) if isinstance(unit, CanFrame) else 10 * len(unit)


# --- turns ------------------------------------------------------------------------------------------------------------


class Turn(NamedTuple, Generic[W]):
    """A unit on its way. ``sender`` is None for the client; ``lost``: it takes its time and arrives nowhere."""

    unit: W
    sender: SimulatedMotor | None
    lost: bool


class Wire(Generic[W]):
    """One wire. Without a bit rate (0) nothing takes time there, and all that is ready passes in its order."""

    def __init__(self, bits_per_s: int = 0) -> None:
        self._bits_per_s = bits_per_s
        self._free_ns = 0
        self._number = count()
        self._requests: deque[tuple[int, Turn[W]]] = deque()  # of these only the first is among the following
        self._coming: list[tuple[int, int, Turn[W]]] = []  # by the time at which they are ready
        self._ready: list[tuple[tuple[int, int], int, Turn[W]]] = []  # by rank

    def request(self, unit: W, now: MonotonicNs) -> None:
        """The client has handed this unit to its adapter."""
        if len(self._requests) < MOST_WAITING:
            self._requests.append((now, Turn(unit, None, lost=False)))
        if len(self._requests) == 1:
            self._offer(*self._requests[0])

    def reply(self, unit: W, sender: SimulatedMotor, ready: int, *, lost: bool = False) -> None:
        """A motor sends this unit as soon as it may, from ``ready`` on."""
        if len(self._coming) < MOST_WAITING:
            self._offer(ready, Turn(unit, sender, lost))

    def clear(self) -> None:
        """Everything that waits is lost."""
        self._requests.clear()
        self._coming.clear()
        self._ready.clear()

    @property
    def next_ns(self) -> MonotonicNs | None:
        """When the next unit starts, unless one is offered that is ready earlier; None if none waits."""
        if self._ready:
            return MonotonicNs(self._free_ns)
        return MonotonicNs(max(self._free_ns, self._coming[0][0])) if self._coming else None

    def carry(self, now: MonotonicNs) -> tuple[MonotonicNs, Turn[W]] | None:
        """The next unit that has started by ``now``, and when it arrives; None if none has."""
        start = self.next_ns
        if start is None or start > now:
            return None
        while self._coming and self._coming[0][0] <= start:
            _, number, turn = heappop(self._coming)
            heappush(self._ready, (self._rank(turn), number, turn))
        _, _, turn = heappop(self._ready)
        if turn.sender is None:
            self._requests.popleft()
            if self._requests:
                self._offer(*self._requests[0])
        self._free_ns = start + (wire_bits(turn.unit) * SECOND // self._bits_per_s if self._bits_per_s else 0)
        return MonotonicNs(self._free_ns), turn

    def _offer(self, ready: int, turn: Turn[W]) -> None:
        heappush(self._coming, (ready, next(self._number), turn))

    def _rank(self, turn: Turn[W]) -> tuple[int, int]:
        """Lower goes first."""
        unit = turn.unit
        if not self._bits_per_s:
            return 0, 0
        if not isinstance(unit, CanFrame):
            return turn.sender is None, 0
        # a base identifier wins over an extended one that begins with the same eleven bits
        return (unit.can_id, 1) if unit.extended else (unit.can_id << 18, 0)
