"""Arms for system tests: each a gateway process of its own, none of which may leave anything behind."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from drivers.clock import SECOND, after, left_s, monotonic_ns, sleep_until
from hil.arm import COMMAND, SAMPLE_CONFIG, Arm

WITHIN_S = 30


class MakeArm(Protocol):
    """Makes an arm that is not started yet."""

    def __call__(
        self,
        bootstrap: str | None = None,
        *,
        encoding: str = "protobuf",
        motion: str = "wave",
        sample: Path = SAMPLE_CONFIG,
    ) -> Arm: ...


@pytest.fixture
def make_arm(request: pytest.FixtureRequest, tmp_path: Path, arm_name: str) -> Iterator[MakeArm]:
    """Arms of this test, the first with the name ``arm_name``; killed at its end, when no process may be left."""
    made: list[Arm] = []
    calm = not request.node.get_closest_marker("at_full_rate")

    def make(
        bootstrap: str | None = None,
        *,
        encoding: str = "protobuf",
        motion: str = "wave",
        sample: Path = SAMPLE_CONFIG,
    ) -> Arm:
        number = len(made)
        name = f"{arm_name}{f'-{number}' if number else ''}"
        directory = tmp_path / name
        made.append(Arm(name, directory, bootstrap, encoding=encoding, motion=motion, sample=sample, calm=calm))
        return made[-1]

    yield make
    left = [process for arm in made for process in arm.close()]
    assert not left, f"the gateway left processes behind: {left}"


@pytest.fixture
def links(tmp_path: Path) -> Iterator[Path]:
    """The directory with the links of a running ``servo-gateway simulate``."""
    links = tmp_path / "links"
    config = tmp_path / "arm.toml"
    config.write_text(SAMPLE_CONFIG.read_text().replace('motion = "wave"', 'motion = "still"'))
    faults = tmp_path / "faults.toml"
    process = subprocess.Popen([*COMMAND, "simulate", str(config), "--link", str(links), "--faults", str(faults)])
    try:
        deadline = after(monotonic_ns(), WITHIN_S * SECOND)
        while not all((links / bus).exists() for bus in ("can0", "serial0")):
            assert process.poll() is None
            assert left_s(deadline)
            sleep_until(after(monotonic_ns(), SECOND // 50))
        yield links
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(WITHIN_S) == 0
    assert not list(links.iterdir())
