"""Arrays hold the samples of a span bit for bit, with plain names."""

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from gateway.arrays import SAMPLE, plain, read_samples, stream_samples
from gateway.log_reader import LogError, Seq
from gateway.telemetry import FIELD_NAMES, UNITS
from tests.gateway_parts import MOTORS
from tests.log_parts import make_journal, make_records, of_motor

COUNT = 20_000  # of each motor: several reads of the journal
RECORDS = make_records(COUNT)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_journal(tmp_path_factory.mktemp("log") / "journal.db", RECORDS)


def test_every_motor_has_its_samples_bit_for_bit(journal: Path) -> None:
    found = read_samples(journal)
    assert found.keys() == set(MOTORS.values())
    for partition, motor in MOTORS.items():
        assert found[motor].dtype == SAMPLE
        assert found[motor].tobytes() == plain(of_motor(RECORDS, partition)).tobytes()
        found[motor]["position_rad"] = 0  # it is the caller's own


async def test_arrays_are_read_beside_a_loop_that_runs(journal: Path) -> None:
    assert len(read_samples(journal)["joint1"]) == COUNT  # as in a notebook


def test_plain_keeps_each_field() -> None:
    for name in FIELD_NAMES:
        assert plain(RECORDS)[name].tobytes() == RECORDS[name].tobytes()
    assert UNITS.keys() < set(SAMPLE.names or ())


def test_span_is_given_by_motor_number_and_time(journal: Path) -> None:
    until = int(of_motor(RECORDS, 1)["sampled_at_ns"][100])
    found = read_samples(str(journal), ["joint2"], Seq(51), until)
    assert {motor: samples["seq"].tolist() for motor, samples in found.items()} == {"joint2": [*range(51, 101)]}


def test_datetime_is_as_good_as_nanoseconds(journal: Path) -> None:
    first_ns = int(RECORDS["sampled_at_ns"][0])
    begin = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=first_ns // 1000)
    found = read_samples(journal, ["joint1"], begin + timedelta(seconds=1), begin + timedelta(seconds=2))
    assert found["joint1"]["seq"].tolist() == [*range(201, 401)]


async def test_stream_hands_out_pieces_that_are_the_whole(journal: Path) -> None:
    pieces = [samples async for motor, samples in stream_samples(journal) if motor == "joint1"]
    assert len(pieces) > 1
    assert b"".join(piece.tobytes() for piece in pieces) == plain(of_motor(RECORDS, 0)).tobytes()


def test_samples_that_are_lost_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holes = make_journal(tmp_path / "journal.db", np.delete(make_records(20), slice(10, 16)))
    with caplog.at_level(logging.WARNING, "gateway.arrays"):
        found = read_samples(holes)
    assert found["joint1"]["seq"].tolist() == [1, 2, 3, 4, 5, *range(9, 21)]
    assert "telemetry, partition 0: missed offsets 5..7" in caplog.text


def test_unknown_motor_is_an_error(journal: Path) -> None:
    with pytest.raises(LogError, match="motor elbow: no samples"):
        read_samples(journal, ["elbow"])
