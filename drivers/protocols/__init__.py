"""Motor families, one file each, found by looking into this folder: no table to edit.

Each module defines ``FAMILY`` (a ``drivers.family.Family``) and ``SIMULATED`` (a ``drivers.sim.responder.Responder``:
the motors' side of the same codec). A module whose name begins with an underscore is a part of a family, not one.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from drivers.family import Family
from drivers.sim.responder import Responder


@cache
def family_names() -> tuple[str, ...]:
    """Names of all families, sorted; a name is also what configuration calls it."""
    return tuple(sorted(module.name for module in iter_modules(__path__) if module.name[0] != "_"))


def find(name: object) -> type[Family[Any, Any]] | None:
    """The family called ``name``, which may be anything; None if there is none."""
    return load(name) if isinstance(name, str) and name in family_names() else None


def load(name: str) -> type[Family[Any, Any]]:
    """The family called ``name``; KeyError if there is none."""
    family: type[Family[Any, Any]] = _module(name).FAMILY
    return family


def load_responder(name: str) -> type[Responder[Any]]:
    """The simulated side of the family called ``name``; KeyError if there is none."""
    responder: type[Responder[Any]] = _module(name).SIMULATED
    return responder


def _module(name: str) -> ModuleType:
    if name not in family_names():
        raise KeyError(name)
    return import_module(f"{__name__}.{name}")
