"""Motor families, one file each, found by looking into this folder: no table to edit.

Each module defines ``FAMILY`` (a ``drivers.family.Family``) and ``SIMULATED`` (a ``drivers.sim.responder.Responder``:
the motors' side of the same codec).
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from drivers.family import Family


@cache
def family_names() -> tuple[str, ...]:
    """Names of all families, sorted; a name is also what configuration calls it."""
    return tuple(sorted(module.name for module in iter_modules(__path__)))


def load(name: str) -> type[Family[Any, Any]]:
    """The family called ``name``; KeyError if there is none."""
    if name not in family_names():
        raise KeyError(name)
    family: type[Family[Any, Any]] = import_module(f"{__name__}.{name}").FAMILY
    return family
