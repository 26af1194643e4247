"""What is wrong in a configuration, and how it is told: place, value, line, and what would be right.

A check yields a ``Finding``, a place and a sentence; the rest is looked up afterwards, so that a check stays a
``yield``.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

from gateway.toml_lines import Steps, line_of

Raw = dict[str, Any]
"""A table as tomllib reads it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong, and what would be right. ``value`` is None where there is none, or it is secret."""

    place: str
    value: Any
    message: str
    line: int | None = None

    def __str__(self) -> str:
        value = "" if self.value is None else f" = {_show(self.value)}"
        return f"{self.place}{value}: {self.message}" if self.place else self.message


class ConfigError(Exception):
    """The configuration cannot be used; ``faults`` are all its faults, in the order of the file's lines."""

    def __init__(self, where: str, faults: Iterable[Fault]) -> None:
        self.where = where
        self.faults = tuple(sorted(faults, key=lambda fault: fault.line or 0))
        super().__init__(where, self.faults)

    def __str__(self) -> str:
        return "\n".join(
            f"{self.where}{'' if fault.line is None else f':{fault.line}'}: {fault}" for fault in self.faults
        )


class Finding(NamedTuple):
    """A place and a sentence; ``secret``: the value there is not for a log."""

    steps: Steps
    message: str
    secret: bool = False


def make_faults(findings: Iterable[Finding], raw: Raw, lines: Mapping[Steps, int]) -> list[Fault]:
    """The findings with the values, names and lines of their places."""
    return [
        Fault(
            place_of(steps, raw),
            # a password may also stand where the name of its variable or its file belongs
            None if secret or re.search("password|secret", str(steps[-1])) else value_at(raw, steps),
            message,
            line_of(steps, lines),
        )
        for steps, message, secret in findings
    ]


def blank(findings: Iterable[Finding], raw: Raw) -> None:
    """Put None, which TOML lacks, in place of every value at fault: the checks that follow pass over it.

    A name that is only spelt badly stays: others refer to it.
    """
    for steps, _, _ in findings:
        value = value_at(raw, steps)
        if value is not None and not (steps[-1] == "name" and isinstance(value, str)):
            value_at(raw, steps[:-1])[steps[-1]] = None


def value_at(raw: Any, steps: Steps) -> Any:
    """The value at a place; None if there is none."""
    for step in steps:
        try:
            raw = raw[step]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def place_of(steps: Steps, raw: Raw) -> str:
    """Steps as a person would say them: motor[2] "joint3" id; kafka.bootstrap_servers[0]."""
    if len(steps) < 2 or not isinstance(steps[1], int):
        return _dotted(steps)
    name = value_at(raw, (*steps[:2], "name"))
    named = f" {_show(name)}" if isinstance(name, str) else ""
    return f"{_dotted(steps[:2])}{named} {_dotted(steps[2:])}".rstrip()


def _dotted(steps: Steps) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def _show(value: Any) -> str:
    """A value as TOML has it, at a readable length; what is in a table is not shown."""
    match value:
        case dict():
            return "{...}"
        case list():
            text = f"[{', '.join(map(_show, value[:8]))}]"
        case str() | bool():
            text = json.dumps(value, ensure_ascii=False)
        case int() if value.bit_length() > 1000:  # Python refuses to write thousands of decimal digits
            text = hex(value)
        case _:
            text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def similar(word: str, known: Collection[str]) -> str:
    """The one of ``known`` that was probably meant; empty if there is none."""
    return next(iter(get_close_matches(word, known, n=1, cutoff=0.7)), "")


def instead_of(word: str, known: Collection[str]) -> str:
    """What may stand in place of ``word``."""
    if close := similar(word, known):
        return f'did you mean "{close}"?'
    return f"known: {', '.join(sorted(known))}" if known else "there is none"
