"""The seam between a bus and a motor family: exchanges and procedures, without I/O.

A family (one file in ``drivers/protocols/``) never touches a bus. It makes an ``Exchange``: what to write, whose
replies to wait for, and how to know them. Work of several steps (connect, enable, a register read and verified)
is a ``Procedure``: a generator that yields exchanges and is sent the replies to each, so that ``drivers.cycle``
can put one step at a time into the slack of a cycle, and a test can drive it with bytes from a table.

``W`` is the unit of the wire: ``bytes`` on a serial bus (any chunk of the stream), ``CanFrame`` on a CAN bus.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from drivers.clock import SECOND
from drivers.motor import Kind, Motor, MotorInfo, Order

Medium = Literal["can", "serial"]


@dataclass(frozen=True, slots=True)
class CanFrame:
    """A classic CAN data frame; ``extended`` for a 29-bit identifier."""

    can_id: int
    data: bytes
    extended: bool = False

    def __str__(self) -> str:
        return f"{self.can_id:03X}#{self.data.hex().upper()}"


class CanId(NamedTuple):
    """An identifier that a motor uses on its bus, what for, and the key of its configuration that decides on it."""

    can_id: int
    use: str  # "replies", "commands"
    key: str = "id"


CAN_FRAME_BITS = 111
"""A standard frame of eight bytes with the pause behind it, without stuff bits: on the wire it is never shorter."""


W = TypeVar("W", bytes, CanFrame)
P = TypeVar("P")  # what a family's unpack() makes of the wire: a packet of a serial protocol, or the frame itself

Reply = tuple[int, Any]
"""(bus_id of the motor, decoded value)"""


class Overheard(NamedTuple):
    """A packet that nobody asked for and that says something: from whom, and why the motor must be connected anew.

    Without a reason ("") the family has taken note of it, and that is all.
    """

    bus_id: int
    reconnect: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """A motor that waits for nothing but the trigger of its setpoint; ``told``: what it does then, in words."""

    trigger: Any  # its family's own
    told: str


def _nothing() -> None:
    """Nothing to forget."""


@dataclass(frozen=True, slots=True)
class Exchange(Generic[W, P]):
    """One turn on the bus.

    ``requests`` are written together. ``match`` gets each packet that arrives and returns the reply in it, or None
    if the packet is nobody's business here. The exchange is over when each motor of ``expects`` (bus ids)
    replied or its time is up; a motor that replied twice counts once, with its first reply.

    ``begin`` is called when the requests are about to be written: a ``match`` that puts a reply together from several
    packets forgets there what an earlier turn left half done. ``patience_ns``: how long a reply may take that is
    known for certain to belong to this request (an SDO of CANopen, by its object); the bus goes on with its cycles
    meanwhile. 0: until the end of the time that the exchange was given.
    """

    requests: Sequence[W]
    expects: frozenset[int]
    match: Callable[[P], Reply | None]
    begin: Callable[[], None] = _nothing
    patience_ns: int = 0


T = TypeVar("T")
Procedure = Generator[Exchange[W, P], Mapping[int, Any], T]
"""Yields exchanges; is sent {bus_id: value} for each, where a motor that kept silent is missing."""


class Family(ABC, Generic[W, P]):
    """One motor family on one bus, seen from the gateway. Holds what was learned about its motors; does no I/O."""

    name: ClassVar[str]
    medium: ClassVar[Medium]
    bus_ids: ClassVar[range]  # addresses that a motor of this family may have
    kinds: ClassVar[frozenset[Kind]]  # what its motors can be told, whatever their options
    Options: ClassVar[type | None] = None
    """Frozen dataclass of extra keys in a motor's configuration; raises ValueError for a value that cannot be."""
    asks_all: ClassVar[bool] = False
    """Whether every motor of the bus replies to a poll, also one that the poll leaves out (a SYNC)."""
    watchdog: ClassVar[bool] = False
    """Whether its motors stop by themselves when they hear nothing: armed as ``Motor.watchdog_ns`` says, by the first
    order that can move a motor since it was connected, and by nothing else. What ``poll`` sends must feed it."""
    examples: ClassVar[Sequence[Any]] = (None,)
    """``Options`` of motors that tests, benchmarks and examples use, the plainest first; None without ``Options``."""
    bit_rates: ClassVar[Sequence[int]] = (1_000_000,)  # where a scan looks for its motors, the usual one first
    refresh_ns: ClassVar[int] = SECOND  # how often ``refresh`` is run for each motor

    garbage: int = 0
    """Bytes, or frames, that were addressed to nobody here and no valid packet: counted by ``unpack``."""

    def __init__(self, motors: Sequence[Motor]) -> None:
        self.motors = {motor.bus_id: motor for motor in motors}

    @classmethod
    @abstractmethod
    def poll_bits(cls, motors: Sequence[Motor]) -> int:
        """Bits on the wire, at the least, that polling these motors once takes: requests and replies."""

    @classmethod
    def explain(cls, vendor_error: int) -> Sequence[str]:
        """The vendor's error word in the vendor's words, one for each fault; nothing for 0."""
        return (f"{cls.name} error {vendor_error:#x}",) if vendor_error else ()

    @classmethod
    def kinds_of(cls, motor: Motor) -> frozenset[Kind]:  # noqa: ARG003  as in refresh
        """What this motor can be told, with its options: a part of ``kinds``."""
        return cls.kinds

    @classmethod
    def clashes(cls, motors: Sequence[Motor]) -> Iterable[tuple[Motor, str, str]]:  # noqa: ARG003  as in refresh
        """What must not be configured for these motors of one bus: (motor, key of its configuration, why)."""
        return ()

    @classmethod
    def can_ids(cls, motor: Motor) -> Iterable[CanId]:  # noqa: ARG003  as in refresh
        """On CAN: all standard identifiers that the motor sends or obeys, also those that are not used here.

        Motors of one bus must not use an identifier for different things: one would take the other's frames for its
        own. Those of one family may share one for the same thing, and are told apart by the data.
        """
        return ()

    @abstractmethod
    def unpack(self, unit: W) -> Iterable[P]:
        """Packets completed by ``unit``. Keeps half a packet for the next call; skips garbage, never raises."""

    def reset(self) -> None:
        """Forget half a packet: the input was dropped, or the bus was opened anew."""
        return

    @abstractmethod
    def poll(self, bus_ids: Sequence[int]) -> Exchange[W, P]:
        """The exchange of every cycle; its replies are ``Feedback``."""

    def overhear(self, packet: P) -> Overheard | None:  # noqa: ARG002  for those that override it
        """A packet that no exchange waited for: a heartbeat, an emergency message. None if it means nothing."""
        return None

    @abstractmethod
    def identify(self, bus_id: int) -> Procedure[W, P, MotorInfo | None]:
        """See who answers at an address; None if nobody does. For a scan of an unknown bus: only ever reads.

        ``MotorInfo.options`` holds the keys of ``Options`` that a configuration of this motor needs.
        """

    @abstractmethod
    def connect(self, bus_id: int) -> Procedure[W, P, MotorInfo | None]:
        """Find a motor and learn what decoding needs; None if it is not there."""

    @abstractmethod
    def order(self, bus_id: int, order: Order) -> Procedure[W, P, str]:
        """Carry out an order and see that the motor took it; returns what was seen. Raises MotorRefused."""

    @abstractmethod
    def prepare(self, bus_id: int, order: Order) -> Procedure[W, P, Ready]:
        """Say all of a setpoint that may be said before it takes effect, and that moves nothing yet.

        Raises MotorRefused, as ``order`` does.
        """

    @abstractmethod
    def fire(self, ready: Mapping[int, Ready]) -> Exchange[W, P]:
        """The trigger of all these motors at once, in as few and as close units as the wire has for it."""

    @abstractmethod
    def confirm(self, bus_id: int, ready: Ready, reply: Any) -> Procedure[W, P, str]:
        """See that a motor took what was fired; ``reply``: its reply to that, None if there was none.

        Returns what was seen; raises MotorRefused.
        """

    def set_alone(self, bus_id: int, order: Order) -> Procedure[W, P, str]:
        """A setpoint for one motor: a group of one."""
        ready = yield from self.prepare(bus_id, order)
        replies = yield self.fire({bus_id: ready})
        return (yield from self.confirm(bus_id, ready, replies.get(bus_id)))

    @abstractmethod
    def halt(self, bus_ids: Iterable[int]) -> Exchange[W, P]:
        """Bring these motors to rest, in the quickest way that the wire has, from what is known of them already.

        No more than a first blow: a ``Kind.STOP`` for each of them sees that they took it. Nothing for a motor whose
        torque is known to be off; torque is taken away only where a motor has no stop that holds.
        """

    def refresh(self, bus_id: int) -> Procedure[W, P, None] | None:  # noqa: ARG002  for those that override it
        """Read what changes slowly and ``poll`` does not bring; run every ``refresh_ns`` in the slack.

        A value that could not be read again is told as NaN from then on: what is old is not repeated.
        """
        return None


def run_with_replies(procedure: Procedure[W, P, T], replies: Sequence[Mapping[int, Any]]) -> T:
    """Drive ``procedure`` with given replies, one mapping an exchange: for tests and examples."""
    steps = iter(replies)
    try:
        next(procedure)
        while True:
            procedure.send(next(steps))
    except StopIteration as end:
        result: T = end.value
        return result
