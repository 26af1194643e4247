"""A span holds exactly what was asked for: these motors, and nothing from the end on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pytest

from gateway.log_reader import (
    Entries,
    LogError,
    LogReader,
    Missed,
    Part,
    Position,
    Positions,
    Samples,
    Time,
    Topic,
)
from gateway.source import open_source
from gateway.span import cut
from tests.gateway_parts import MOTORS, Numbering
from tests.log_parts import BEGIN_NS, PERIOD_NS, make_journal, make_records, of_motor

COUNT = 40_000  # of each motor: several reads of the journal
RECORDS = make_records(COUNT)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    numbering = Numbering()
    entries = [numbering.entry(key=key) for key in ("*", "joint1", "joint2", "*", "joint1")]  # at 1, 2, 3, 4, 5 ns
    return make_journal(tmp_path_factory.mktemp("log") / "journal.db", RECORDS, entries)


async def read(
    journal: Path, topic: Topic, start_ns: int = 0, *, motors: list[str] | None = None, until_ns: int | None = None
) -> list[Samples | Entries | Missed]:
    async with open_source(journal, [topic], Time(start_ns)) as log:
        return [part async for part in cut(log, motors=motors, until_ns=until_ns)]


def records_of(parts: list[Samples | Entries | Missed], motor: str) -> bytes:
    return b"".join(part.records.tobytes() for part in parts if isinstance(part, Samples) and part.motor == motor)


@pytest.mark.parametrize("motors", [None, ["joint1"], ["joint2", "joint1"], ["joint2", "*"]])
async def test_samples_are_those_of_the_motors_from_start_to_end(journal: Path, motors: list[str] | None) -> None:
    start, end = 123, COUNT - 77
    begin_ns, until_ns = BEGIN_NS + start * PERIOD_NS, BEGIN_NS + end * PERIOD_NS
    parts = await read(journal, "telemetry", begin_ns, motors=motors, until_ns=until_ns)
    assert not any(isinstance(part, Missed) for part in parts)
    for partition, motor in MOTORS.items():
        expected = of_motor(RECORDS, partition)[start:end].tobytes() if motor in (motors or MOTORS.values()) else b""
        assert records_of(parts, motor) == expected


async def test_offsets_stay_with_their_records(journal: Path) -> None:
    for part in await read(journal, "telemetry", until_ns=BEGIN_NS + 100 * PERIOD_NS):
        assert isinstance(part, Samples)
        assert np.array_equal(part.offsets, part.records["seq"].astype(np.int64) - 1)


@pytest.mark.parametrize("until_ns", [BEGIN_NS, BEGIN_NS + 1, BEGIN_NS + 2])
async def test_end_is_left_out(journal: Path, until_ns: int) -> None:
    parts = await read(journal, "telemetry", until_ns=until_ns)
    assert [(part.motor, len(part.records)) for part in parts if isinstance(part, Samples)] == [
        (motor, 1) for motor in MOTORS.values()
    ][: until_ns - BEGIN_NS]


async def test_reading_ends_where_every_motor_has_passed_the_end(journal: Path) -> None:
    async with open_source(journal, ["telemetry"], "beginning") as log:
        assert [part async for part in cut(log, until_ns=BEGIN_NS + PERIOD_NS)]
        left = log.left()
        assert left
        assert left > COUNT


class Unknown(LogReader):
    """A reader that learns of its partitions as they come, one part each."""

    def __init__(self, parts: list[Samples]) -> None:
        super().__init__(["telemetry"], "beginning", follow=False, name=None)
        self._given = parts

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def commit(self, positions: Positions | None = None) -> None:
        raise LogError

    async def _read(self) -> Sequence[Part]:
        if not self._given:
            raise StopAsyncIteration
        return [self._given.pop(0)]


async def test_reading_does_not_end_before_partitions_that_nobody_knew_of() -> None:
    parts = [
        Samples(partition, motor, np.arange(COUNT), of_motor(RECORDS, partition), Position(7, COUNT))
        for partition, motor in MOTORS.items()
    ]
    found = [part async for part in cut(Unknown(parts), until_ns=BEGIN_NS + PERIOD_NS)]
    assert [part.motor for part in found if isinstance(part, Samples)] == [*MOTORS.values()]


async def test_entries_are_those_of_the_motors_before_the_end(journal: Path) -> None:
    parts = await read(journal, "events", motors=["joint1", "*"], until_ns=5)
    found = [(entry.at_ns, entry.key) for part in parts if isinstance(part, Entries) for entry in part.entries]
    assert found == [(1, "*"), (2, "joint1"), (4, "*")]


async def test_motor_that_is_not_in_the_log_is_named_beside_those_that_are(journal: Path) -> None:
    with pytest.raises(LogError, match="motor joint9: no samples in this span, which has joint1, joint2"):
        await read(journal, "telemetry", motors=["joint9", "joint1"])


async def test_motor_without_events_is_no_error(journal: Path) -> None:
    assert await read(journal, "events", motors=["joint9"]) == []


async def test_what_is_missing_is_handed_on(tmp_path: Path) -> None:
    holes = np.delete(make_records(20), slice(10, 16))
    parts = await read(make_journal(tmp_path / "journal.db", holes), "telemetry", motors=["joint2"])
    missed = [part for part in parts if isinstance(part, Missed)]
    assert [(part.partition, part.from_offset, part.to_offset) for part in missed] == [(0, 5, 7), (1, 5, 7)]
