"""A journal that is set aside: never deleted, and what can be read of it goes over to the new stream."""

import asyncio
import json
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from drivers.clock import epoch_ns
from drivers.motor import Kind
from gateway import local_commands
from gateway.app import Gateway, run_gateway
from gateway.aside import Left, set_aside
from gateway.commands import Command, encode_command
from gateway.journal import Changes, Journal, JournalError, JournalReader, Lost
from tests.gateway_parts import DEADLINE_S, KAFKA, MOTORS, Numbering, make_config, until


def write(path: Path) -> int:
    """A journal in which the broker has not acknowledged everything; its stream."""
    numbering = Numbering()
    with closing(Journal(path, "arm1", MOTORS, 1 << 30)) as journal:
        for _ in range(40):
            journal.commit(Changes(batch=numbering.batch([0, 0, 1])))
        journal.commit(Changes(inbox={("local", 0): 7, ("kafka", 1): 9}, published={("telemetry", 0): (50, 25)}))
        return journal.stream


def spoil(path: Path, kept: int) -> bytes:
    """Overwrite all but the first ``kept`` bytes."""
    data = path.read_bytes()
    data = data[:kept] + b"\xa5" * (len(data) - kept)
    path.write_bytes(data)
    return data


def test_what_can_be_read_is_known_of_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    stream = write(path)
    left = set_aside(path, "for a test")
    assert left == Left(
        tmp_path / "journal.aside-1", "for a test", stream, MOTORS, {0: 80, 1: 40}, {0: 50},
        {("local", 0): 7, ("kafka", 1): 9},
    )  # fmt: skip
    assert left.unacknowledged() == [Lost(0, 51, 80), Lost(1, 1, 40)]
    assert [file.name for file in tmp_path.iterdir()] == ["journal.aside-1"]


def test_damaged_one_is_kept_byte_for_byte_and_says_what_it_still_can(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    for number, kept in enumerate((0, 4096, 3 * 4096, 20 * 4096), start=1):
        write(path)
        data = spoil(path, kept)
        left = set_aside(path, "for a test")
        assert left.path == tmp_path / f"journal.aside-{number}"
        assert left.path.read_bytes() == data
        assert (left.stream is None) == (kept < 3 * 4096)


def test_wal_goes_with_its_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with closing(Journal(path, "arm1", MOTORS, 1 << 30)) as journal:
        journal.commit(Changes(batch=Numbering().batch([0])))
        assert set_aside(path, "for a test").seqs == {0: 1}
        assert list(tmp_path.glob("journal.db*")) == []


def test_one_that_cannot_be_moved_is_told_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    path.mkdir()
    (tmp_path / "journal.aside-1-wal").mkdir()
    (tmp_path / "journal.aside-1-wal" / "in the way").touch()
    path.with_name("journal.db-wal").touch()
    with pytest.raises(JournalError, match=r"journal\.db: for a test, and cannot be set aside"):
        set_aside(path, "for a test")


# --- a gateway goes on with a new stream ------------------------------------------------------------------------------


@contextmanager
def signals_kept() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def events(path: Path) -> list[dict[str, Any]]:
    with closing(JournalReader(path)) as reader:
        return [json.loads(entry.value) for entry in reader.entries(0, 1000, "events")]


def command(number: int) -> bytes:
    return encode_command(Command(f"c{number}", "joint1", Kind.STOP, 60_000, epoch_ns()))


async def test_gateway_goes_on_with_a_new_stream_when_its_journal_breaks(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    gateways: list[Gateway] = []

    async def ready(gateway: Gateway) -> None:
        gateways.append(gateway)

    with signals_kept():
        running = asyncio.create_task(run_gateway(config, ready))
        await until(lambda: len(gateways) == 1)
        old, path = gateways[0], config.arm.state_dir / "journal.db"
        for number in (1, 2):
            local_commands.append(config.arm.state_dir / "commands.db", command(number))
        await until(lambda: old._reader.inbox("local") == {0: 3})
        # a change by somebody else: the writer trusts nothing that it has in memory
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("UPDATE sizes SET value = value")
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        spoil(path, 3 * 4096)
        local_commands.append(config.arm.state_dir / "commands.db", command(3))
        await until(lambda: len(gateways) == 2)
        new = gateways[1]
        await until(lambda: any(event["type"] == "journal.set_aside" for event in events(path)))
        assert new.stream != old.stream
        told = next(event for event in events(path) if event["type"] == "journal.set_aside")
        assert (told["path"], told["stream"]) == (str(tmp_path / "state" / "journal.aside-1"), old.stream)
        assert "malformed" in told["reason"]
        new.stop()
        async with asyncio.timeout(DEADLINE_S):
            await running
    with closing(JournalReader(path)) as reader:
        outcomes = [json.loads(entry.value)["command_id"] for entry in reader.entries(0, 100, "outcomes")]
        assert "c1" not in outcomes  # commands that had their outcome are not read again


async def test_gateway_that_cannot_read_its_journal_tells_what_is_gone_and_goes_on(tmp_path: Path) -> None:
    config = make_config(tmp_path, KAFKA)
    config.arm.state_dir.mkdir()
    path = config.arm.state_dir / "journal.db"
    stream = write(path)
    with closing(sqlite3.connect(path)) as db, db:  # the newest rows cannot be found any more
        page = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'entries'").fetchone()[0]
    with path.open("r+b") as file:
        file.seek(4096 * (page - 1))
        file.write(b"\xa5" * 4096)
    gateways: list[Gateway] = []

    async def ready(gateway: Gateway) -> None:
        gateways.append(gateway)

    with signals_kept():
        running = asyncio.create_task(run_gateway(config, ready))
        await until(lambda: len(gateways) == 1 and len(events(path)) > 3)
        gateways[0].stop()
        async with asyncio.timeout(DEADLINE_S):
            await running
    gaps = [event for event in events(path) if event["type"] == "telemetry.gap"]
    told = [(gap["motor"], gap["stream"], gap["from_seq"], gap["to_seq"], gap["count"]) for gap in gaps]
    assert told == [("joint1", stream, 51, 80, 30), ("joint2", stream, 1, 40, 40)]
    with closing(JournalReader(path)) as reader:
        assert reader.inbox("local") == {0: 7}
        assert reader.inbox("kafka") == {1: 9}
