"""Commands put in on this machine: each is handed on once, in order, whoever writes, whatever befalls the file."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from gateway import local_commands
from gateway.commander import Incoming
from gateway.local_commands import append, follow
from tests.gateway_parts import until


class Reader:
    """Takes what ``follow`` hands on."""

    def __init__(self) -> None:
        self.taken: list[Incoming] = []

    async def handle(self, records: Sequence[Incoming]) -> None:
        await asyncio.sleep(0)
        self.taken += records

    def raws(self) -> list[bytes]:
        return [record.raw for record in self.taken]


@contextlib.asynccontextmanager
async def following(path: Path, start: int = 1) -> AsyncIterator[Reader]:
    reader = Reader()
    task = asyncio.create_task(follow(path, start, reader.handle))
    try:
        yield reader
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_commands_from_before_and_while_following_come_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "commands.db"
    before = [append(path, b"%d" % number) for number in range(250)]
    async with following(path) as reader:
        await until(lambda: len(reader.taken) == 250)
        during = [append(path, b"%d" % number) for number in range(250, 260)]
        await until(lambda: len(reader.taken) == 260)
    assert reader.raws() == [b"%d" % number for number in range(260)]
    assert [record.next for record in reader.taken] == [offset + 1 for offset in before + during]
    assert {(record.source, record.partition) for record in reader.taken} == {("local", 0)}
    assert [record.live for record in reader.taken] == [False] * 250 + [True] * 10


async def test_goes_on_where_the_inbox_says(tmp_path: Path) -> None:
    path = tmp_path / "commands.db"
    offsets = [append(path, b"%d" % number) for number in range(5)]
    async with following(path, offsets[2] + 1) as reader:
        await until(lambda: len(reader.taken) == 2)
        append(path, b"last")
        await until(lambda: len(reader.taken) == 3)
    assert reader.raws() == [b"3", b"4", b"last"]


async def test_starts_before_there_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "commands.db"
    async with following(path) as reader:
        await until(path.exists)
        append(path, b"first")
        await until(lambda: bool(reader.taken))
    assert reader.raws() == [b"first"]


async def test_file_that_was_replaced_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "commands.db"
    async with following(path, start=500) as reader:
        await until(path.exists)
        append(path, b"new")
        await until(lambda: bool(reader.taken))
    assert reader.raws() == [b"new"]


async def test_writer_that_stops_in_the_middle_holds_up_no_reader(tmp_path: Path) -> None:
    path = tmp_path / "commands.db"
    append(path, b"one")
    stopped = sqlite3.connect(path, isolation_level=None)
    stopped.execute("BEGIN IMMEDIATE")
    stopped.execute("INSERT INTO commands (value) VALUES (x'00')")
    async with following(path) as reader:
        await until(lambda: bool(reader.taken))
    assert reader.raws() == [b"one"]
    stopped.close()


def test_only_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_commands, "KEPT", 10)
    path = tmp_path / "commands.db"
    for number in range(25):
        append(path, b"%d" % number)
    with contextlib.closing(sqlite3.connect(path)) as db:
        kept = [value for (value,) in db.execute("SELECT value FROM commands ORDER BY id")]
    assert kept == [b"%d" % number for number in range(15, 25)]


async def test_pruned_commands_leave_no_reader_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_commands, "KEPT", 10)
    path = tmp_path / "commands.db"
    for number in range(25):
        append(path, b"%d" % number)
    async with following(path, start=3) as reader:
        await until(lambda: len(reader.taken) == 10)
        append(path, b"25")
        await until(lambda: len(reader.taken) == 11)
    assert reader.raws() == [b"%d" % number for number in range(15, 26)]


def test_offsets_are_never_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "commands.db"
    first = append(path, b"one")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("DELETE FROM commands")
    assert append(path, b"two") > first
