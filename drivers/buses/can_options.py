"""What python-can's constructor of an interface gets: options that it knows, and CAN FD in the way it wants it.

Most constructors take any keyword and ignore those that they do not know: a misspelt option would do nothing, and
say nothing. What one knows is in its signature and, where it reads its keywords by hand, in its docstring.
"""

import inspect
import re
from collections.abc import Set
from typing import Any, Final

import can
from can.typechecking import BitTimingDict, BitTimingFdDict

from drivers.buses import CanSpec

_DOCUMENTED: Final = re.compile(r":param\s+(?:[^:\n]*\s)?(\w+):")
_NO_OPTIONS: Final = frozenset({"self", "channel", "bitrate", "timing", "fd", "data_bitrate", "protocol", "kwargs"})
_FD_CLOCK_HZ: Final = 80_000_000  # PCAN, Kvaser and Vector take it; slcan looks at the rates only
_SAMPLE_POINT: Final = 80.0  # per cent, both phases


def constructor_options(spec: CanSpec) -> dict[str, Any]:
    """The keywords for ``can.Bus`` besides interface and channel.

    Raises ValueError for an option that the interface does not know, for a CAN FD that it cannot do, and
    NotImplementedError for an interface that there is not.
    """
    known = _known(spec.interface)
    # interfaces of other packages may know what they do not tell
    if known is not None and (unknown := spec.options.keys() - (known - _NO_OPTIONS)):
        raise ValueError(
            f"{spec.interface} has no option {', '.join(sorted(unknown))}; "
            f"known: {', '.join(sorted(known - _NO_OPTIONS))}"
        )
    options = {"bitrate": spec.bitrate, **spec.options}
    return options | _fd(spec, known or {"fd", "data_bitrate"}) if spec.fd else options


def _known(interface: str) -> Set[str] | None:
    """Keywords of an interface that comes with python-can; None: nobody knows."""
    constructor = can.interface._get_class_for_interface(interface).__init__
    if not constructor.__module__.startswith("can."):
        return None
    names = {*inspect.signature(constructor).parameters, *_DOCUMENTED.findall(constructor.__doc__ or ""), "can_filters"}
    if "timing" in names:  # which python-can makes of these
        names |= BitTimingDict.__annotations__.keys() | BitTimingFdDict.__annotations__.keys()
    return names


def _fd(spec: CanSpec, known: Set[str]) -> dict[str, Any]:
    given = spec.options.keys() & BitTimingFdDict.__annotations__.keys()
    if "data_bitrate" in known:
        return {"fd": True} | ({"data_bitrate": spec.data_bitrate} if spec.data_bitrate else {})
    if "timing" in known and not given:
        timing = can.BitTimingFd.from_sample_point(
            f_clock=_FD_CLOCK_HZ,
            nom_bitrate=spec.bitrate,
            nom_sample_point=_SAMPLE_POINT,
            data_bitrate=spec.data_bitrate or spec.bitrate,
            data_sample_point=_SAMPLE_POINT,
        )
        return {"timing": timing}
    if "fd" in known:  # SocketCAN's rates belong to the network link
        return {"fd": True}
    if "timing" in known:
        return {}
    if "protocol" in known:
        return {"protocol": can.CanProtocol.CAN_FD}
    raise ValueError(f"{spec.interface} has no CAN FD")
