"""``servo-gateway scan``: which motors a bus has, at any of its families' bit rates. Opens buses; only ever reads.

``plan`` says where to look, ``search`` looks, ``watch`` shows a person how far it is. A motor that was found is not
asked again at another bit rate: it has one, and simulated motors answer at all.
"""

import errno
from collections.abc import Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from drivers import protocols
from drivers.bus import Bus
from drivers.buses import BusSpec, CanSpec, open_bus
from drivers.errors import BusError, BusMisconfigured
from drivers.scan import Answer, make_family, scan
from gateway.draft import Found

_HINTS = {
    errno.EAGAIN: "another program has it, such as a gateway that runs: stop that first",
    errno.EBUSY: "another program has it, such as a gateway that runs: stop that first",
    errno.EACCES: "this user may not open it: on most systems the group dialout may",
}


@dataclass(frozen=True, slots=True)
class Round:
    """All addresses of one family at one bit rate."""

    bit_rate: int
    protocol: str
    bus_ids: tuple[int, ...]


@dataclass(slots=True)
class Findings:
    """What was found so far."""

    found: list[Found] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def as_json(self, bus: BusSpec) -> dict[str, Any]:
        """For programs."""
        where = f"{bus.interface}:{bus.channel}" if isinstance(bus, CanSpec) else bus.port
        motors = [
            {
                "protocol": motor.protocol,
                "id": motor.bus_id,
                "bit_rate": motor.bit_rate,
                "model": motor.info.model,
                "firmware": motor.info.firmware,
                "details": motor.info.details,
                "options": motor.info.options,
            }
            for motor in self.found
        ]
        return {"bus": where, "motors": motors, "troubles": self.troubles}


def plan(names: Sequence[str], bit_rates: Sequence[int], bus_ids: Collection[int] | None) -> list[Round]:
    """Where to look for motors of these families: at ``bit_rates`` or else at theirs, the usual ones first.

    ``bus_ids``: no other addresses than these. Sorted by bit rate, since the bus is opened anew for each.
    """
    rounds = []
    for name in names:
        family = protocols.load(name)
        ids = tuple(bus_id for bus_id in family.bus_ids if bus_ids is None or bus_id in bus_ids)
        if ids:
            rounds += [(place, Round(rate, name, ids)) for place, rate in enumerate(bit_rates or family.bit_rates)]
    first: dict[int, int] = {}
    for place, one in rounds:
        first[one.bit_rate] = min(place, first.get(one.bit_rate, place))
    return sorted((one for _, one in rounds), key=lambda one: (first[one.bit_rate], -one.bit_rate))


def search(spec: BusSpec, rounds: Sequence[Round], findings: Findings, wait_ns: int | None) -> Generator[Round]:
    """Look in all ``rounds``; its round whenever an address is done with. ``findings`` grows meanwhile.

    ``wait_ns``: as in ``drivers.scan``. Raises BusError, BusMisconfigured.
    """
    rates = list(dict.fromkeys(one.bit_rate for one in rounds))
    known: set[tuple[str, int]] = set()
    for bit_rate in rates:
        here = [one for one in rounds if one.bit_rate == bit_rate]
        try:
            bus = _open(spec, bit_rate)
        except BusMisconfigured as error:
            if len(rates) == 1:
                raise
            findings.troubles.append(f"{bit_rate} bit/s: {error}")  # not every adapter can do every rate
            yield from (one for one in here for _ in one.bus_ids)
            continue
        with closing(bus):
            for one in here:
                left = [bus_id for bus_id in one.bus_ids if (one.protocol, bus_id) not in known]
                yield from [one] * (len(one.bus_ids) - len(left))
                for answer in scan(bus, make_family(protocols.load(one.protocol), left), bit_rate, wait_ns):
                    if answer.info:
                        known.add((answer.family, answer.bus_id))
                    _note(findings, answer, bit_rate)
                    yield one
            for what, count in bus.troubles.items():
                findings.troubles.append(f"{bit_rate} bit/s: {what} {count} times: {bus.trouble_details[what]}")


def _open(spec: BusSpec, bit_rate: int) -> Bus[Any]:
    try:
        return open_bus(
            replace(spec, bitrate=bit_rate) if isinstance(spec, CanSpec) else replace(spec, baudrate=bit_rate)
        )
    except BusError as error:
        hint = _HINTS.get(getattr(error.__cause__, "errno", None) or 0)
        raise BusError(f"{error}\n{hint}" if hint else str(error)) from error


def _note(findings: Findings, answer: Answer, bit_rate: int) -> None:
    if answer.info:
        findings.found.append(Found(answer.family, answer.bus_id, bit_rate, answer.info))
    if answer.trouble:
        findings.troubles.append(f"{answer.family} id {answer.bus_id} at {bit_rate} bit/s: {answer.trouble}")


# --- for people -------------------------------------------------------------------------------------------------------


def watch(console: Console, spec: BusSpec, rounds: Sequence[Round], findings: Findings, wait_ns: int | None) -> None:
    """``search``, with a progress bar where the console is a terminal; what is found is told at once, above it."""
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    told = troubles = 0

    def tell() -> None:
        nonlocal told, troubles
        for motor in findings.found[told:]:
            console.print(f"found {motor.protocol} id {motor.bus_id}: {motor.info.model}")
        for trouble in findings.troubles[troubles:]:
            console.print(trouble, style="yellow")
        told, troubles = len(findings.found), len(findings.troubles)

    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("opening the bus", total=sum(len(one.bus_ids) for one in rounds))
        with closing(search(spec, rounds, findings, wait_ns)) as looking:
            for one in looking:
                progress.update(task, description=f"{one.protocol} at {one.bit_rate} bit/s", advance=1)
                tell()
        tell()


def table(findings: Findings) -> Table:
    """What was found."""
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("protocol", "model", "firmware"):
        shown.add_column(header)
    for header in ("id", "bit/s"):
        shown.add_column(header, justify="right")
    shown.add_column("keys of its own")
    for motor in sorted(findings.found, key=lambda motor: (motor.bus_id, motor.protocol)):
        own = " ".join(f"{key}={value}" for key, value in motor.info.options.items())
        info = motor.info
        cells = (motor.protocol, info.model, info.firmware, str(motor.bus_id), str(motor.bit_rate), own)
        shown.add_row(*cells)
    return shown
