"""A configuration to start from: what a scan found, as TOML for a person to review. Pure text, opens nothing.

Every line that a person has to look at before anything may move is marked REVIEW. A key that a family needs and its
motors do not tell stands there as a comment marked SET THIS: until it is set, the configuration is refused.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from math import ceil, floor, isfinite
from typing import Any, Final

from drivers import protocols
from drivers.buses import BusSpec, CanSpec
from drivers.motor import Motor, MotorInfo
from gateway.config_checks import MOST_WATCHDOG_MS, MOTOR_WATCHDOG_MS

MOST_HZ: Final = 100
LEAST_HZ: Final = 25  # slower, and the limits of late and offline must be longer than they are by default
NO_LIMITS_RAD: Final = (-3.14, 3.14)
COMMENT_AT: Final = 40
SET_THIS: Final = "SET THIS: the motor does not tell; an example"

HEAD: Final = """\
# Written by servo-gateway scan. Before anything may move, review every line marked REVIEW, put the joints into
# their order (name, partition) and check the file:
#
#   servo-gateway check FILE
"""


@dataclass(frozen=True, slots=True)
class Found:
    """A motor that a scan found, and at which bit rate."""

    protocol: str
    bus_id: int
    bit_rate: int
    info: MotorInfo


def draft(spec: BusSpec, found: Sequence[Found], arm: str = "arm1") -> str:
    """The configuration of an arm with these motors on the bus of ``spec``; at least one.

    A bus has one bit rate and each motor an id of its own: what does not fit becomes a comment that says why.
    """
    bit_rate = Counter(motor.bit_rate for motor in found).most_common(1)[0][0]
    motors: dict[int, Found] = {}
    others: list[str] = []
    for motor in sorted(found, key=lambda motor: (motor.bus_id, motor.bit_rate != bit_rate, motor.protocol)):
        if motor.bit_rate != bit_rate:
            others.append(f"{_who(motor)} answers at {motor.bit_rate} bit/s: set it to {bit_rate}")
        elif motor.bus_id in motors:
            others.append(f"{_who(motor)} has the id of the {motors[motor.bus_id].protocol}: give it another")
        else:
            motors[motor.bus_id] = motor
    rate_hz = _rate_hz(list(motors.values()), bit_rate)
    tables = [HEAD, _table("arm", _arm(arm, rate_hz)), _table("[bus]", _bus(spec, bit_rate, rate_hz))]
    tables += [_table("[motor]", _motor(n, motor, spec.name)) for n, motor in enumerate(motors.values())]
    if others:
        tables.append("# Left out:\n" + "".join(f"#   {other}\n" for other in others))
    return "\n".join(tables)


Line = tuple[str, Any, str]
"""key, value, comment"""


def _arm(name: str, rate_hz: float) -> Iterator[Line]:
    yield "name", name, "REVIEW: topics will be servo.<name>.telemetry and so on"
    if rate_hz < LEAST_HZ:
        yield "late_after_ms", 3000 / rate_hz, "three cycles of this slow bus"
        yield "offline_after_ms", max(300.0, 6000 / rate_hz), ""
    if (watchdog_ms := 6000 / rate_hz) > MOTOR_WATCHDOG_MS:
        slow = watchdog_ms > MOST_WATCHDOG_MS
        yield "motor_watchdog_ms", 0 if slow else watchdog_ms, "this bus is slow for motors' own watchdogs"


def _bus(spec: BusSpec, bit_rate: int, rate_hz: float) -> Iterator[Line]:
    yield "name", spec.name, ""
    yield "type", "can" if isinstance(spec, CanSpec) else "serial", ""
    if isinstance(spec, CanSpec):
        yield "interface", spec.interface, ""
        yield "channel", spec.channel, ""
        yield "bitrate", bit_rate, ""
        if spec.options:
            yield "options", spec.options, ""
    else:
        yield "port", spec.port, ""
        yield "baudrate", bit_rate, ""
    yield "rate_hz", rate_hz, "cycles a second; half of what the bus could carry, at most"


def _motor(number: int, motor: Found, bus: str) -> Iterator[Line]:
    info = motor.info
    yield "name", f"joint{number + 1}", f"{info.model}, firmware {info.firmware}"
    yield "partition", number, "the order of the joints"
    yield "bus", bus, ""
    yield "protocol", motor.protocol, ""
    yield "id", motor.bus_id, ""
    yield from _options(motor)
    if limits := _limits(info):
        yield "position_rad", limits, "REVIEW: as set in the motor"
    else:
        yield "position_rad", NO_LIMITS_RAD, "REVIEW: the motor tells no limits"
    yield "velocity_rad_s", 0.5, "REVIEW: slow, to begin with"
    yield "temperature_c", 60.0, "REVIEW: alarm above this"


def _options(motor: Found) -> Iterator[Line]:
    """What the motor told of its family's keys, and the keys without which there is no configuration."""
    family = protocols.load(motor.protocol)
    for field in fields(family.Options) if family.Options else ():
        if field.name in motor.info.options:
            yield field.name, motor.info.options[field.name], "as the motor tells"
        elif field.default is field.default_factory is MISSING:
            yield field.name, getattr(family.examples[0], field.name), SET_THIS


def _limits(info: MotorInfo) -> tuple[float, float] | None:
    """The motor's own, to the milliradian inside of them."""
    low, high = (info.details.get(key, float("nan")) for key in ("min_position_rad", "max_position_rad"))
    if not (isfinite(low) and isfinite(high)):
        return None
    inside = ceil(low * 1000) / 1000, floor(high * 1000) / 1000
    return inside if inside[0] < inside[1] else None


def _rate_hz(motors: Sequence[Found], bit_rate: int) -> float:
    """Half of what the bus could carry."""
    bits = 0
    for name in {motor.protocol for motor in motors}:
        family = protocols.load(name)
        here = [motor for motor in motors if motor.protocol == name]
        bits += family.poll_bits([Motor(0, "", name, motor.bus_id, family.examples[0]) for motor in here])
    half = bit_rate / (2 * bits)
    return min(MOST_HZ, floor(half)) if half >= 1 else half


def _who(motor: Found) -> str:
    return f"{motor.protocol} id {motor.bus_id} ({motor.info.model})"


# --- TOML -------------------------------------------------------------------------------------------------------------


def _table(name: str, lines: Iterator[Line]) -> str:
    text = [f"[{name}]"]
    for key, value, comment in lines:
        line = f"{'# ' if comment == SET_THIS else ''}{_key(key)} = {_value(value)}"
        text.append(f"{line:<{COMMENT_AT}} # {_one_line(comment)}" if comment else line)
    return "\n".join(text) + "\n"


def _key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else _text(key)


def _value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"{value}"
        case str():
            return _text(value)
        case Mapping():
            return "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + " }"
        case Sequence():
            return f"[{', '.join(map(_value, value))}]"
        case _:
            raise TypeError(f"{value!r} cannot be written as TOML")


def _text(text: str) -> str:
    """A basic string: as JSON's, but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _one_line(text: str) -> str:
    """What a motor says of itself may be anything."""
    return "".join(character if character.isprintable() else "?" for character in text)
