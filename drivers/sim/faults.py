"""Faults on demand: from a TOML file that may be written, changed and deleted while simulated motors run.

    [joint3]
    delay_ms = 5

    [can0]
    bus_off = true

A table is named after a motor (``drivers.sim.responder.Faults`` says what each key does) or a bus (``BusFaults``).
"""

import logging
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from drivers import protocols
from drivers.motor import Motor
from drivers.sim.bus import BusFaults, SimulatedBus
from drivers.sim.responder import Faults

log = logging.getLogger(__name__)


class _Rule(NamedTuple):
    """What a fault's value must be, in words, and whether one is."""

    right: str
    accepts: Callable[[Any], bool]


def _number(low: float, high: float) -> _Rule:
    return _Rule(
        f"a number from {low:g} to {high:g}",
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high,
    )


_FLAG: Final = _Rule("true or false", lambda value: isinstance(value, bool))
_MOTOR: Final = {
    "silent": _FLAG,
    "delay_ms": _number(0, 10_000),
    "drop": _number(0, 1),
    "corrupt": _number(0, 1),
    "stuck_encoder": _FLAG,
    "temperature_c": _number(-50, 300),
    "voltage_v": _number(0, 100),
    "reboot": _FLAG,
}
_CAN_BUS: Final = {"bus_off": _FLAG}


def apply_faults(bus: SimulatedBus[Any], faults: Mapping[str, Any], elsewhere: Collection[str] = ()) -> None:
    """Give the bus and its motors exactly the faults listed: ``{"joint3": {"silent": True, "delay_ms": 5}}``.

    ``elsewhere`` are names of other buses and their motors, to be passed over. Raises ValueError naming all that is
    wrong, and then changes nothing.
    """
    by_name = {simulated.motor.name: simulated for simulated in bus.motors}
    rules = {bus.name: _bus_rules(bus)} if bus.name else {}
    rules |= {name: _motor_rules(simulated.motor) for name, simulated in by_name.items()}
    known = sorted({*rules, *elsewhere})
    wrong = [
        f"{name}: no such motor or bus, known are {', '.join(known)}"
        for name in faults
        if name not in rules and name not in elsewhere
    ]
    wrong += [fault for name in rules if name in faults for fault in _wrong(name, faults[name], rules[name])]
    if wrong:
        raise ValueError("; ".join(wrong))
    for name, simulated in by_name.items():
        simulated.faults = Faults(**faults.get(name, {}))
    if bus.name not in by_name:
        bus.faults = BusFaults(**faults.get(bus.name, {}))


def _motor_rules(motor: Motor) -> dict[str, _Rule]:
    ids = protocols.load(motor.family).bus_ids
    address = f"an address of {motor.family}, from {ids[0]} to {ids[-1]}"
    return {**_MOTOR, "wrong_id": _Rule(address, lambda value: type(value) is int and value in ids)}


def _bus_rules(bus: SimulatedBus[Any]) -> dict[str, _Rule]:
    return _CAN_BUS if all(protocols.load(one.motor.family).medium == "can" for one in bus.motors) else {}


def _wrong(name: str, entry: object, rules: Mapping[str, _Rule]) -> list[str]:
    known = ", ".join(rules) or "none on a serial bus"
    if not isinstance(entry, Mapping):
        return [f"{name} is {entry!r}; it must be a table of faults, known are {known}"]
    return [
        f"{name}.{key} is {value!r}; it must be {rules[key].right}"
        if key in rules
        else f"{name}.{key}: no such fault, known are {known}"
        for key, value in entry.items()
        if key not in rules or not rules[key].accepts(value)
    ]


class FaultsFile:
    """The faults file of one simulated bus.

    ``poll`` is for a host's ``housekeeping``: it looks at the file and rereads it only when it has changed. Without
    the file there are no faults; a file that cannot be used changes nothing, and is logged once.
    """

    def __init__(self, path: Path, bus: SimulatedBus[Any], elsewhere: Collection[str] = ()) -> None:
        self._path = path
        self._bus = bus
        self._elsewhere = elsewhere
        self._seen: tuple[int, int, int] | None = None

    def poll(self) -> None:
        """Take up the file as it is now."""
        seen = self._look()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            faults = tomllib.loads(self._path.read_text(encoding="utf-8")) if seen else {}
            apply_faults(self._bus, faults, self._elsewhere)
        except (OSError, ValueError) as error:  # tomllib's and UnicodeDecodeError are ValueErrors
            log.warning("%s: %s; the faults stay as they are", self._path, error)

    def _look(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size  # a second write within one tick of mtime shows in these
