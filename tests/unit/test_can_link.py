"""What sysfs shows of a SocketCAN channel, and the command that mends it."""

from pathlib import Path

import pytest

from drivers.buses import CanSpec
from drivers.buses.can_link import link_problem

UP, DOWN = "0x40081", "0x40080"  # IFF_UP, as the kernel writes it


def make_spec(channel: str, *, fd: bool = False) -> CanSpec:
    return CanSpec("arm", "socketcan", channel, 500_000, fd=fd, data_bitrate=2_000_000 if fd else None)


def make_link(net: Path, name: str, flags: str, carrier: str | None) -> None:
    (net / name).mkdir(parents=True)
    (net / name / "flags").write_text(f"{flags}\n")
    if carrier is not None:
        (net / name / "carrier").write_text(f"{carrier}\n")


@pytest.mark.parametrize("name", ["can0", "vcan0"])
def test_link_that_is_up_has_no_problem(tmp_path: Path, name: str) -> None:
    make_link(tmp_path, name, UP, "1")
    assert link_problem(make_spec(name), tmp_path) is None


@pytest.mark.parametrize(
    ("name", "fd", "command"),
    [
        ("can0", False, "`ip link set can0 up type can bitrate 500000`"),
        ("can0", True, "`ip link set can0 up type can bitrate 500000 dbitrate 2000000 fd on`"),
        ("vcan0", True, "`ip link set vcan0 up`"),
    ],
)
def test_link_that_is_down_is_told_with_what_brings_it_up(tmp_path: Path, name: str, fd: bool, command: str) -> None:
    make_link(tmp_path, name, DOWN, None)
    assert link_problem(make_spec(name, fd=fd), tmp_path) == f"the link is down; {command} brings it up"


def test_link_without_carrier_is_in_bus_off(tmp_path: Path) -> None:
    make_link(tmp_path, "can0", UP, "0")
    problem = link_problem(make_spec("can0"), tmp_path)
    assert problem is not None
    assert "bus-off; `ip link set can0 type can restart`" in problem
    assert "`ip link set can0 type can restart-ms 100`" in problem


@pytest.mark.parametrize(("name", "hint"), [("can7", "ip link show type can"), ("vcan7", "ip link add dev vcan7")])
def test_link_that_is_not_there_is_told_with_where_to_look(tmp_path: Path, name: str, hint: str) -> None:
    assert hint in (link_problem(make_spec(name), tmp_path) or "")


def test_what_nobody_knows_is_no_problem(tmp_path: Path) -> None:
    assert link_problem(make_spec(""), tmp_path) is None
    assert link_problem(make_spec("can0"), tmp_path / "nowhere") is None
    (tmp_path / "can0").mkdir()  # a link that went away while it was looked at
    assert link_problem(make_spec("can0"), tmp_path) is None
