"""Libraries that only some commands need, and that come with an extra: imported when they are needed."""

from importlib import import_module
from typing import Any


class ExtraMissing(Exception):
    """A library is not installed; the message says how to install it."""


def load(module: str, extra: str) -> Any:
    """The module ``module``, which comes with ``servo-gateway[extra]``. Raises ExtraMissing."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        library = (error.name or module).partition(".")[0]
        raise ExtraMissing(f"{library} is not installed: pip install 'servo-gateway[{extra}]'") from error
