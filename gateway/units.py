"""Values as people write them: ``45deg``, ``10rpm``, ``0.3Nm``. SI inside; a number without a unit is SI."""

import math
import re

from drivers.motor import Kind

_TURN = 2 * math.pi
_UNITS = {  # kind -> {unit: how much SI one of it is}, the SI unit first
    Kind.POSITION: {"rad": 1.0, "mrad": 1e-3, "deg": _TURN / 360, "turn": _TURN},
    Kind.VELOCITY: {"rad/s": 1.0, "deg/s": _TURN / 360, "rpm": _TURN / 60, "turn/s": _TURN},
    Kind.TORQUE: {"Nm": 1.0, "mNm": 1e-3},
}
_VALUE = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z/]*)", re.ASCII)


def parse(text: str, kind: Kind) -> float:
    """A position, velocity or torque, in rad, rad/s or N m. Raises ValueError saying what is wrong with it."""
    units = _UNITS.get(kind)
    if units is None:
        raise ValueError(f"{text}: {kind} takes no value")
    known = f"{', '.join(list(units)[:-1])} or {list(units)[-1]}"
    found = _VALUE.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text}: must be a number, in {known}")
    number, unit = found.groups()
    if unit and unit not in units:
        raise ValueError(f"{text}: a {kind} is in {known}, not in {unit}")
    value = float(number) * units[unit or next(iter(units))]
    if not math.isfinite(value):
        raise ValueError(f"{text}: must be a finite number")
    return value


def parse_target(text: str, kind: Kind) -> tuple[str, float]:
    """``joint1=45deg`` as (motor, value). Raises ValueError."""
    motor, equals, value = text.partition("=")
    if not (motor and equals):
        raise ValueError(f"{text}: must be MOTOR=VALUE, for example joint1=45deg")
    return motor, parse(value, kind)
