"""One bus, as the cycle sees it: write units, receive units with the time of their arrival."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Generic, NamedTuple

from drivers.clock import MonotonicNs
from drivers.family import W
from drivers.traffic import Traffic


class Received(NamedTuple, Generic[W]):
    """A unit of the wire and when it arrived (monotonic; the kernel's receive time where it gives one)."""

    unit: W
    at_ns: MonotonicNs


class Trouble(StrEnum):
    """What can go wrong on a bus without taking it down; counted in ``Bus.troubles``."""

    ECHO = "echo"  # the adapter gives back what we send
    TX_FULL = "tx_full"  # the transmit queue was full (ENOBUFS) and was waited for
    ERROR_FRAME = "error_frame"  # the CAN controller reported an error
    LONG_FRAME = "long_frame"  # a CAN FD frame of more than eight bytes, which no family here speaks
    GARBAGE = "garbage"  # bytes or lines that the adapter's own protocol does not have


class Bus(ABC, Generic[W]):
    """An open bus. Every call returns by its deadline; a bus that is gone raises BusError, from any call."""

    tap: Callable[[Traffic], None] | None = None
    """Told of everything on the wire, if there is one; it returns at once, and raises nothing."""

    def __init__(self) -> None:
        self.troubles: dict[Trouble, int] = {}  # how often, since it was opened
        self.trouble_details: dict[Trouble, str] = {}  # the latest of each, in words

    def note(self, what: Trouble, detail: str, times: int = 1) -> None:
        """Count a trouble; for the bus itself."""
        self.troubles[what] = self.troubles.get(what, 0) + times
        self.trouble_details[what] = detail

    @abstractmethod
    def send(self, units: Sequence[W], deadline: MonotonicNs) -> None:
        """Write all ``units``. Raises BusError if the bus does not take them by ``deadline``."""

    @abstractmethod
    def receive(self, deadline: MonotonicNs) -> Received[W] | None:
        """The next unit, or None at ``deadline``. A passed deadline still returns what has already arrived."""

    @abstractmethod
    def close(self) -> None:
        """Release the bus; never raises, may be called twice."""
