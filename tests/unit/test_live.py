"""The live view: what stands in the table."""

import asyncio
import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from drivers.clock import SECOND
from drivers.motor import Status
from gateway.board import Board
from gateway.cli import live
from gateway.event_time import EventTime
from gateway.telemetry import by_partition
from tests.gateway_parts import KAFKA, Numbering, make_config, until


def make_board(tmp_path: Path, extra: str = "") -> Board:
    time = EventTime(monotonic=lambda: 0, wall=lambda: 1000 * SECOND)
    return Board(make_config(tmp_path, extra), time, tmp_path / "journal.db")


def render(board: Board) -> str:
    console = Console(file=io.StringIO(), width=200, no_color=True)
    console.print(live._render(board))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(board: Board, motor: str) -> list[str]:
    (line,) = [line for line in render(board).splitlines() if f" {motor} " in line]
    return [cell.strip() for cell in line.strip("│┃").split("│")]


def test_every_motor_has_a_row_with_its_state_and_units_stand_above(tmp_path: Path) -> None:
    board = make_board(tmp_path)
    board.motors[0].online = True
    assert row(board, "joint1")[:2] == ["joint1", "online"]
    assert row(board, "joint2")[:2] == ["joint2", "offline"]
    board.motors[0].late = True
    assert row(board, "joint1")[1] == "late"
    text = render(board)
    assert "arm arm1" in text
    for header in ("position rad", "speed rad/s", "temp C", "rate Hz", "age ms"):
        assert header in text


def test_what_was_never_heard_is_a_dash(tmp_path: Path) -> None:
    assert row(make_board(tmp_path), "joint1")[2:] == ["-", "-", "-", "0", "-", "0", "-"]


def test_values_are_shown_and_nan_is_a_dash(tmp_path: Path) -> None:
    board = make_board(tmp_path, KAFKA)
    records = Numbering().records([0, 0])
    records["sampled_at_ns"] = 999 * SECOND
    records["position_rad"], records["velocity_rad_s"], records["temperature_c"] = 1.23456, float("nan"), 41.6
    board.update(dict(by_partition(records)))
    board.motors[0].misses = 3
    assert row(board, "joint1")[2:] == ["1.235", "-", "42", "0", "1000", "3", "2"]


def test_fault_is_named(tmp_path: Path) -> None:
    board = make_board(tmp_path)
    board.motors[0].online = True
    board.motors[0].status = Status.ENABLED | Status.FAULT_OVERLOAD | Status.FAULT_VOLTAGE
    assert row(board, "joint1")[1] == "online, fault"
    assert "joint1 fault: voltage, overload\n" in render(board).replace(" " * 2, "")


def test_bus_that_is_down_and_a_sick_disk_say_why(tmp_path: Path) -> None:
    board = make_board(tmp_path, KAFKA)
    board.buses["serial0"].detail = "no such device"
    board.journal_detail = "disk is full"
    text = render(board)
    assert "bus serial0: no such device" in text
    assert "disk is full" in text
    assert "kafka down" in text
    board.buses["serial0"].up = True
    assert "bus serial0" not in render(board)


async def test_table_is_drawn_until_it_is_cancelled(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True, no_color=True)
    board = make_board(tmp_path)
    task = asyncio.create_task(live.table(board, console))
    await asyncio.sleep(0)
    board.motors[0].misses = 4321
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert isinstance(console.file, io.StringIO)
    assert "4321" in console.file.getvalue()


async def test_line_names_every_motor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(live, "LINES_EVERY_S", 0.001)
    board = make_board(tmp_path, KAFKA)
    with caplog.at_level(logging.INFO):
        task = asyncio.create_task(live.lines(board))
        await until(lambda: bool(caplog.messages))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert caplog.messages[0].startswith("samples/s: joint1 0, joint2 0; missed 0; kafka down, lag 0")
