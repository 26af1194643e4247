"""On which line of a TOML text each of its tables and keys stands: tomllib does not tell."""

import re
from collections.abc import Mapping

Steps = tuple[str | int, ...]
"""A place in the tables that a text holds, key by key: ("motor", 2, "id")."""

_KEY = r"""(?:"[^"]*"|'[^']*'|[A-Za-z0-9_-]+)"""
_HEADER_OR_KEY = re.compile(rf"\s*(\[\[?)?\s*({_KEY}(?:[ \t]*\.[ \t]*{_KEY})*)\s*[\]=]")


def find_lines(text: str) -> dict[Steps, int]:
    """Line of each header, and of each key that begins a line, for a text that tomllib has read.

    Text over several lines may hold what looks like either, and then lines are told that are not right: no key of
    the configuration is that long.
    """
    lines: dict[Steps, int] = {}
    latest: dict[Steps, int] = {}  # array of tables -> index of its latest table
    table: Steps = ()
    for number, line in enumerate(text.split("\n"), 1):
        if not (found := _HEADER_OR_KEY.match(line)):
            continue
        brackets, dotted = found.groups()
        keys = [key.strip("\"'") for key in re.findall(_KEY, dotted)]
        here = () if brackets else table
        for count, key in enumerate(keys, 1):
            here = (*here, key)
            lines.setdefault(here, number)
            if brackets == "[[" and count == len(keys):
                latest[here] = latest.get(here, -1) + 1
            if here in latest:
                here = (*here, latest[here])
                lines.setdefault(here, number)
        if brackets:
            table = here
    return lines


def line_of(steps: Steps, lines: Mapping[Steps, int]) -> int | None:
    """The line of a place, or of the nearest thing around it that has one."""
    return next((lines[steps[:end]] for end in range(len(steps), 0, -1) if steps[:end] in lines), None)
