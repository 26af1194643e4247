"""Arms for system tests: each a gateway process of its own, none of which may leave anything behind."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from hil.arm import SAMPLE_CONFIG, Arm


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
def make_arm(tmp_path: Path, arm_name: str) -> Iterator[MakeArm]:
    """Arms of this test, the first with the name ``arm_name``; killed at its end, when no process may be left."""
    made: list[Arm] = []

    def make(
        bootstrap: str | None = None,
        *,
        encoding: str = "protobuf",
        motion: str = "wave",
        sample: Path = SAMPLE_CONFIG,
    ) -> Arm:
        number = len(made)
        name = f"{arm_name}{f'-{number}' if number else ''}"
        made.append(Arm(name, tmp_path / name, bootstrap, encoding=encoding, motion=motion, sample=sample))
        return made[-1]

    yield make
    left = [process for arm in made for process in arm.close()]
    assert not left, f"the gateway left processes behind: {left}"
