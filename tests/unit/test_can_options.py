"""What python-can's constructors are given: this is also a test of what they say of themselves."""

from typing import Any

import can
import pytest

from drivers.buses import CanSpec
from drivers.buses.can_options import constructor_options


def make_spec(interface: str, options: dict[str, Any] | None = None, data_bitrate: int | None = None) -> CanSpec:
    return CanSpec("arm", interface, "can0", 500_000, options or {}, data_bitrate is not None, data_bitrate)


@pytest.mark.parametrize(
    ("interface", "options"),
    [
        ("virtual", {"rx_queue_size": 10}),
        ("slcan", {"sleep_after_open": 0, "tty_baudrate": 115_200}),
        ("socketcan", {"local_loopback": True}),
        ("udp_multicast", {"port": 43_113}),
        ("pcan", {"auto_reset": True}),  # read from its keywords, and documented
        ("kvaser", {"accept_virtual": False}),
    ],
)
def test_options_that_the_interface_has_are_handed_on(interface: str, options: dict[str, Any]) -> None:
    assert constructor_options(make_spec(interface, options)) == {"bitrate": 500_000, **options}


@pytest.mark.parametrize("interface", ["virtual", "slcan", "socketcan", "udp_multicast", "pcan"])
def test_option_that_it_has_not_is_named_beside_those_that_it_has(interface: str) -> None:
    with pytest.raises(ValueError, match=rf"{interface} has no option recieve_own_messages; known: .*can_filters"):
        constructor_options(make_spec(interface, {"recieve_own_messages": True}))


@pytest.mark.parametrize(
    ("interface", "fd"),
    [
        ("socketcan", {"fd": True}),
        ("udp_multicast", {"fd": True}),
        ("virtual", {"protocol": can.CanProtocol.CAN_FD}),
        ("kvaser", {"fd": True, "data_bitrate": 2_000_000}),
        ("vector", {"fd": True, "data_bitrate": 2_000_000}),
    ],
)
def test_can_fd_is_asked_for_in_the_interfaces_own_way(interface: str, fd: dict[str, Any]) -> None:
    assert constructor_options(make_spec(interface, data_bitrate=2_000_000)) == {"bitrate": 500_000, **fd}


@pytest.mark.parametrize("interface", ["slcan", "pcan"])
def test_where_timing_is_wanted_it_has_the_configured_rates(interface: str) -> None:
    timing = constructor_options(make_spec(interface, data_bitrate=2_000_000))["timing"]
    assert (timing.nom_bitrate, timing.data_bitrate) == (500_000, 2_000_000)


def test_timing_that_the_user_gives_is_left_alone() -> None:
    options = {"f_clock": 80_000_000, "nom_brp": 1}
    given = constructor_options(make_spec("pcan", options, 2_000_000))
    assert given == {"bitrate": 500_000, **options, "fd": True}


def test_can_fd_where_there_is_none_can_never_work() -> None:
    with pytest.raises(ValueError, match="serial has no CAN FD"):
        constructor_options(make_spec("serial", data_bitrate=2_000_000))


def test_interface_that_there_is_not_is_told_as_such() -> None:
    with pytest.raises(NotImplementedError, match="no_such"):
        constructor_options(make_spec("no_such"))
