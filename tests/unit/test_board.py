"""The board: the newest that is known of each motor, and a status file's worth of it."""

from pathlib import Path

import msgspec
import pytest

from drivers import protocols
from drivers.clock import MS, SECOND
from drivers.motor import Status
from drivers.notices import CycleStats, MotorCounts
from gateway.board import Board
from gateway.event_time import EventTime
from gateway.telemetry import by_partition
from tests.gateway_parts import KAFKA, Numbering, make_config


def make_board(tmp_path: Path, extra: str = "") -> Board:
    time = EventTime(monotonic=lambda: 0, wall=lambda: 1000 * SECOND)
    return Board(make_config(tmp_path, extra), time, tmp_path / "journal.db")


def test_newest_record_of_each_motor_counts(tmp_path: Path) -> None:
    board = make_board(tmp_path)
    records = Numbering().records([0, 1, 0])
    records["position_rad"] = [1, 2, 3]
    records["status"] = [0, 0, Status.ENABLED | Status.MOVING]
    concerned = board.update(dict(by_partition(records)))
    assert sorted(view.config.name for view in concerned) == ["joint1", "joint2"]
    assert (board.motors[0].seq, board.motors[0].position_rad) == (2, 3.0)
    assert board.motors[0].status == Status.ENABLED | Status.MOVING
    assert (board.motors[1].seq, board.motors[1].position_rad) == (1, 2.0)


def test_rate_is_that_of_the_last_two_seconds(tmp_path: Path) -> None:
    view = make_board(tmp_path).motors[0]
    assert view.rate_hz == 0
    for tenth in range(100):
        view.seq = 50 * tenth if tenth < 50 else 50 * 50 + 10 * (tenth - 50)
        view.note_rate(tenth * 100 * MS)
    assert view.rate_hz == pytest.approx(100)


def test_rate_of_a_motor_that_stopped_falls_to_zero(tmp_path: Path) -> None:
    view = make_board(tmp_path).motors[0]
    for tenth in range(60):
        view.seq = min(500, 50 * tenth)
        view.note_rate(tenth * 100 * MS)
    assert view.rate_hz == 0


def test_lag_is_what_the_broker_does_not_have(tmp_path: Path) -> None:
    board = make_board(tmp_path, KAFKA)
    board.update(dict(by_partition(Numbering().records([0] * 10))))
    board.motors[0].acknowledged_seq = 4
    assert board.lag(board.motors[0]) == 6
    assert board.snapshot()["motors"][0]["lag"] == 6


def test_age_is_since_the_newest_sample(tmp_path: Path) -> None:
    board = make_board(tmp_path)
    records = Numbering().records([0])
    records["sampled_at_ns"] = 998 * SECOND
    board.update(dict(by_partition(records)))
    assert board.age_ms(board.motors[0]) == 2000
    assert board.age_ms(board.motors[1]) != board.age_ms(board.motors[1])


def test_stats_of_a_worker_reach_its_motors(tmp_path: Path) -> None:
    board = make_board(tmp_path)
    board.take_stats("serial0", CycleStats(100, 2, 3, 17, 4.5, 6.5, (MotorCounts(1, 90, 7),)))
    assert (board.motors[1].polls, board.motors[1].misses) == (90, 7)
    bus = board.snapshot()["buses"][0]
    names = ("cycles", "skipped_cycles", "stray_packets", "garbage", "late_p50_us", "late_max_us")
    assert {name: bus[name] for name in names} == {
        "cycles": 100, "skipped_cycles": 2, "stray_packets": 3, "garbage": 17, "late_p50_us": 4.5, "late_max_us": 6.5
    }  # fmt: skip


@pytest.mark.parametrize(
    ("online", "late", "state"), [(True, False, "online"), (True, True, "late"), (False, False, "offline")]
)
def test_state_is_one_word(tmp_path: Path, online: bool, late: bool, state: str) -> None:
    board = make_board(tmp_path)
    board.motors[0].online, board.motors[0].late = online, late
    assert board.snapshot()["motors"][0]["state"] == state


def test_snapshot_of_a_motor_that_was_never_heard_has_no_invented_values(tmp_path: Path) -> None:
    motor = msgspec.json.decode(msgspec.json.encode(make_board(tmp_path).snapshot()))["motors"][0]
    never = ("position_rad", "velocity_rad_s", "temperature_c", "age_ms", "lag")
    assert {name: motor[name] for name in never} == dict.fromkeys(never)
    assert motor["status"] == []


def test_snapshot_is_json_whatever_a_motor_tells(tmp_path: Path) -> None:
    board = make_board(tmp_path)
    records = Numbering().records([0])
    records["position_rad"], records["temperature_c"], records["status"] = float("nan"), float("inf"), 2**32 - 1
    board.update(dict(by_partition(records)))
    motor = msgspec.json.decode(msgspec.json.encode(board.snapshot()))["motors"][0]
    assert motor["position_rad"] is None
    assert motor["temperature_c"] is None
    assert set(motor["status"]) == {flag.name for flag in Status}


def test_fault_is_told_in_common_words_and_in_the_vendors(tmp_path: Path) -> None:
    board = make_board(tmp_path)
    records = Numbering().records([0, 1])
    records["status"], records["vendor_error"] = [Status.ENABLED | Status.FAULT_TEMPERATURE, Status.ENABLED], [4, 0]
    board.update(dict(by_partition(records)))
    sick, well = board.snapshot()["motors"]
    words = protocols.load("feetech_sts").explain(4)
    assert (sick["faults"], sick["fault"]) == ([*words], f"temperature (feetech_sts: {', '.join(words)} 0x04)")
    assert (well["faults"], well["fault"]) == ([], "")
