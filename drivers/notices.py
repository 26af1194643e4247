"""What a bus worker has to say besides samples: about its bus, its motors, and the orders it was given.

Frozen msgspec structs, tagged with their class's name, so that one decoder reads them all from the link.
``motor`` is always ``Motor.index``; times are monotonic nanoseconds.
"""

import msgspec


class Notice(msgspec.Struct, frozen=True, tag=True):
    """Base of all notices."""


class BusUp(Notice, frozen=True, tag=True):
    """The bus is open."""


class BusDown(Notice, frozen=True, tag=True):
    """The bus cannot be opened or has vanished; told once, whatever the number of retries."""

    reason: str
    retriable: bool


class MotorOnline(Notice, frozen=True, tag=True):
    """The motor was found (again)."""

    motor: int
    model: str
    firmware: str


class MotorLate(Notice, frozen=True, tag=True):
    """No reply for longer than allowed, but not given up yet; told once an episode."""

    motor: int
    last_heard_ns: int
    misses: int  # polls in a row without a reply


class MotorOffline(Notice, frozen=True, tag=True):
    """Given up: taken out of the cycle, looked for in its slack."""

    motor: int
    last_heard_ns: int
    misses: int
    reason: str


class MotorStopped(Notice, frozen=True, tag=True):
    """The bus worker stopped a motor by itself: no fresh setpoint came, or it left the range it was driven within."""

    motor: int
    reason: str


class BusTrouble(Notice, frozen=True, tag=True):
    """Something went wrong on the bus that did not take it down.

    Told at once when it happens first, and then less and less often while it goes on: at most once a second for each
    ``what``.
    """

    what: str  # a word of ``drivers.bus``
    count: int  # since the bus was opened
    detail: str


class OrderDone(Notice, frozen=True, tag=True):
    """The motor acknowledged the order; for a position: it is on its way."""

    ticket: int
    motor: int
    detail: str


class OrderFailed(Notice, frozen=True, tag=True):
    """The order had no effect that we know of; ``reason`` is a word of the outcomes topic."""

    ticket: int
    motor: int
    reason: str
    detail: str


class SamplesLost(Notice, frozen=True, tag=True):
    """Samples dropped before they were numbered, because the gateway did not take them for too long."""

    motor: int
    count: int


class MotorCounts(msgspec.Struct, frozen=True):
    """One motor's polls since the worker's start."""

    motor: int
    polls: int
    misses: int


class CycleStats(Notice, frozen=True, tag=True):
    """Told about once a second; ``late_us`` are the latest second's starts behind their deadlines."""

    cycles: int
    skipped: int  # cycles that were not run because the one before took too long
    strays: int  # packets that belonged to no request: late replies, other masters, noise
    garbage: int  # bytes, or frames, that were no valid packet
    late_p50_us: float
    late_max_us: float
    motors: tuple[MotorCounts, ...]


AnyNotice = (
    BusUp
    | BusDown
    | BusTrouble
    | MotorOnline
    | MotorLate
    | MotorOffline
    | MotorStopped
    | OrderDone
    | OrderFailed
    | SamplesLost
    | CycleStats
)
