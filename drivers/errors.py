"""Everything that drivers raise, in one tree.

    DriverError
    ├── BusError            retriable: the adapter is gone, cannot be opened now, or took no bytes in time
    ├── BusMisconfigured    final: no such interface, an option that the interface does not know
    └── MotorRefused        final: the motor answered, and the answer was no (or it kept silent to an order)

A missing reply to a poll is no exception: it is an ordinary event on a bus, and counted (``drivers.cycle``).
Foreign exceptions (pyserial's, python-can's, OSError) are translated once, in ``drivers.buses``.
"""

from typing import ClassVar


class DriverError(Exception):
    """Base of all errors of ``drivers``."""

    retriable: ClassVar[bool] = False


class BusError(DriverError):
    """The bus cannot be opened or has vanished; trying again later may help."""

    retriable = True


class BusMisconfigured(DriverError):
    """The bus can never work as configured."""


class MotorRefused(DriverError):
    """The motor did not carry out an order.

    ``reason`` is a word of the outcomes topic (``unsupported``, ``no_reply``, ``refused``, ...); ``detail`` says
    what was sent and what came back.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
