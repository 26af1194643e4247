"""Who is on this bus? Every address that a family may have is asked to identify itself; no motor is ever written to.

Where replies queue by themselves (CAN) several addresses are asked at once; on a half-duplex serial line one after the
other. An address that keeps silent is asked twice: one lost byte must not hide a motor.

What two motors with one address send collides, so that they cannot be told apart; on a serial line damaged bytes
without a reply are told, on CAN the two may pass for one.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple

from drivers.bus import Bus
from drivers.clock import MS, SECOND, MonotonicNs, after, monotonic_ns
from drivers.errors import MotorRefused
from drivers.family import CAN_FRAME_BITS, Exchange, Family, Medium, Procedure, Reply, W
from drivers.motor import Motor, MotorInfo

WAIT_NS: Final[dict[Medium, int]] = {"can": 10 * MS, "serial": 15 * MS}
"""How long a motor may take to begin its reply, adapter included; wire time comes on top."""
AT_ONCE: Final[dict[Medium, int]] = {"can": 8, "serial": 1}  # 8 fit into the shortest transmit queue, Linux's 10
ATTEMPTS: Final = 2
SEND_NS: Final = 100 * MS
BEGIN_BYTES: Final = 32  # a request, and as much of the reply as an adapter passes on at once
WHOLE_BYTES: Final = 192  # the longest request and its reply


@dataclass(frozen=True, slots=True)
class Answer:
    """What came from one address. Without ``info`` no motor of this family is known to be there; ``trouble``: why."""

    family: str
    bus_id: int
    info: MotorInfo | None = None
    trouble: str = ""


def make_family(family: type[Family[Any, Any]], bus_ids: Iterable[int]) -> Family[Any, Any]:
    """A family object for motors that may be at ``bus_ids``, with the plainest of its options."""
    return family(
        [Motor(n, f"id {bus_id}", family.name, bus_id, family.examples[0]) for n, bus_id in enumerate(bus_ids)]
    )


def scan(bus: Bus[W], family: Family[W, Any], bit_rate: int, wait_ns: int | None = None) -> Iterator[Answer]:
    """Ask all motors of ``family`` who they are; an answer for each, as soon as it is known.

    ``bit_rate``: the bus's, for the time that bits take. ``wait_ns``: in place of ``WAIT_NS``. Raises BusError.
    """
    most = AT_ONCE[family.medium]
    waits = _waits(family.medium, bit_rate, WAIT_NS[family.medium] if wait_ns is None else wait_ns)
    waiting = deque((bus_id, 1) for bus_id in family.motors)
    asked: list[_Asked[W]] = []
    while waiting or asked:
        while waiting and len(asked) < most:
            asked.append(_Asked(family, *waiting.popleft()))
            asked[-1].send(bus, waits)
        received = bus.receive(min(one.deadline for one in asked))
        if received:
            packets = list(family.unpack(received.unit))
            for one in asked:
                one.hear(packets, waits)
        for one in [one for one in asked if one.is_over(quiet=received is None)]:
            answer = one.go_on()
            if answer is None:
                one.send(bus, waits)
                continue
            asked.remove(one)
            if not asked:
                family.reset()  # half a packet must not meet the next reply
            if answer.info is None and one.attempt < ATTEMPTS:
                waiting.appendleft((one.bus_id, one.attempt + 1))
            else:
                yield answer


class _Waits(NamedTuple):
    """How long to wait for a reply to begin, and to end; the same where a reply is one frame."""

    begin_ns: int
    end_ns: int


def _waits(medium: Medium, bit_rate: int, wait_ns: int) -> _Waits:
    """``wait_ns`` and the time on the wire; on CAN that of all that are asked at once, stuff bits included."""
    bits = (
        [2 * AT_ONCE["can"] * CAN_FRAME_BITS * 5 // 4] * 2 if medium == "can" else [10 * BEGIN_BYTES, 10 * WHOLE_BYTES]
    )
    return _Waits(*(wait_ns + count * SECOND // bit_rate for count in bits))


class _Asked(Generic[W]):
    """One address that is being asked: its procedure, and the exchange whose replies are awaited."""

    def __init__(self, family: Family[W, Any], bus_id: int, attempt: int) -> None:
        self.bus_id = bus_id
        self.attempt = attempt
        self.deadline = self._end = MonotonicNs(0)
        self._family: Family[W, Any] = family
        self._garbage = family.garbage
        self._procedure: Procedure[W, Any, MotorInfo | None] = family.identify(bus_id)
        self._exchange: Exchange[W, Any] = next(self._procedure)
        self._replies: dict[int, Any] = {}

    def send(self, bus: Bus[W], waits: _Waits) -> None:
        """Write the requests; replies are waited for from now on."""
        self._exchange.begin()
        bus.send(self._exchange.requests, after(monotonic_ns(), SEND_NS))
        now, patience_ns = monotonic_ns(), self._exchange.patience_ns
        self.deadline = after(now, max(waits.begin_ns, patience_ns))
        self._end = after(now, max(waits.end_ns, patience_ns))

    def hear(self, packets: Iterable[Any], waits: _Waits) -> None:
        """Something arrived: take the replies to this; one that has begun may have its time to end."""
        for packet in packets:
            reply: Reply | None = self._exchange.match(packet)
            if reply is not None and reply[0] in self._exchange.expects:
                self._replies.setdefault(*reply)
        self.deadline = max(self.deadline, min(self._end, after(monotonic_ns(), waits.begin_ns)))

    def is_over(self, *, quiet: bool) -> bool:
        """Whether all has been heard, or nothing more is to come; a bus that is never quiet gets a second more."""
        now = monotonic_ns()
        late = now >= self.deadline and (quiet or now >= self._end + SECOND)
        return late or len(self._replies) == len(self._exchange.expects)

    def go_on(self) -> Answer | None:
        """On to the next exchange, or the answer if there is none."""
        replies, self._replies = self._replies, {}
        try:
            self._exchange = self._procedure.send(replies)
        except StopIteration as end:
            return Answer(self._family.name, self.bus_id, end.value, "" if end.value else self._damage())
        except MotorRefused as refusal:
            return Answer(self._family.name, self.bus_id, trouble=f"answers, but: {refusal.detail}")
        return None

    def _damage(self) -> str:
        """Bytes that came in place of a reply: only where one is asked at a time is it known in whose."""
        damaged = self._family.garbage - self._garbage
        if not damaged or AT_ONCE[self._family.medium] > 1:
            return ""
        return f"{damaged} damaged bytes in place of a reply: two motors with this id, noise, or another bit rate"
