"""A journal that is set aside: never deleted, and what can be read of it goes over to the new stream."""

import asyncio
import json
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from drivers.clock import SECOND, epoch_ns, monotonic_ns
from drivers.motor import Kind
from gateway import local_commands
from gateway.app import Gateway, run_gateway
from gateway.aside import Left, open_aside, set_aside
from gateway.commands import Command, encode_command
from gateway.config import Config
from gateway.event_time import boot_id
from gateway.evidence import Evidence
from gateway.journal import Changes, CommandState, Journal, JournalError, JournalReader, Lost
from gateway.state_dir import StateDir
from gateway.wal import wal_path
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
        tmp_path / "journal.aside-1", "for a test", stream, MOTORS, {0: 80, 1: 40}, {0: 80, 1: 40}, {0: 50},
        {("local", 0): 7, ("kafka", 1): 9}, 80,
    )  # fmt: skip
    assert left.lost(published=True) == left.lost(published=False) == []  # nothing is known that cannot be read
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


def test_status_file_knows_more_of_its_own_stream_and_of_one_that_nobody_knows() -> None:
    def left(stream: int | None) -> Left:
        return Left(Path(), "", stream, MOTORS, {0: 80}, {0: 80}, {0: 50, 1: 3}, newest_ns=5)

    known = Evidence(9, 7, {0: 90, 1: 20}, {0: 85, 1: 0})
    for stream in (9, None):
        both = left(stream)
        both.learn(known)
        assert (both.stream, both.newest_ns) == (9, 7)
        assert both.lost(published=True) == [Lost(0, 86, 90), Lost(1, 4, 20)]
        assert both.lost(published=False) == [Lost(0, 81, 90), Lost(1, 1, 20)]
    other = left(8)
    other.learn(known)
    other.learn(None)
    assert other == left(8)


def test_ids_of_commands_are_known_as_far_as_damage_lets_them(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    states = [CommandState(f"c{number}", number != 700, number, "joint1") for number in range(3000)]
    with closing(Journal(path, "arm1", MOTORS, 1 << 30)) as journal:
        journal.commit(Changes(commands=states))
    assert list(set_aside(path, "for a test").commands.values()) == states
    path = tmp_path / "journal.aside-1"
    with closing(sqlite3.connect(path)) as db:
        sql = "SELECT pageno FROM dbstat WHERE name = 'commands' AND pagetype = 'leaf' ORDER BY path"
        try:
            page = db.execute(sql).fetchall()[-10][0]
        except sqlite3.OperationalError:
            pytest.skip("this SQLite has no dbstat")
    with path.open("r+b") as file:
        file.seek(4096 * (page - 1))
        file.write(b"\xa5" * 4096)
    known = set_aside(path, "for a test").commands
    assert known["c700"] == states[700]
    assert known["c2999"] == states[2999]
    assert 1500 < len(known) < 3000


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
    StateDir(config.arm.state_dir).write_status(status_of(stream, {0: 85, 1: 44}, 1))
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
    assert told == [("joint1", stream, 81, 85, 5), ("joint2", stream, 41, 44, 4)]  # the rest can still be published
    with closing(JournalReader(path)) as reader:
        assert reader.inbox("local") == {0: 7}
        assert reader.inbox("kafka") == {1: 9}


async def successor(config: Config) -> tuple[int, list[dict[str, Any]]]:
    """Run a gateway until it has told what it found; its stream, and its events."""
    path = config.arm.state_dir / "journal.db"
    gateways: list[Gateway] = []

    async def ready(gateway: Gateway) -> None:
        gateways.append(gateway)

    with signals_kept():
        running = asyncio.create_task(run_gateway(config, ready))
        await until(lambda: len(gateways) == 1 and len(events(path)) > 0)
        gateways[0].stop()
        async with asyncio.timeout(DEADLINE_S):
            await running
    return gateways[0].stream, events(path)


def status_of(stream: int, seqs: dict[int, int], at_ns: int) -> dict[str, Any]:
    motors = [{"partition": at, "seq": seq, "lag": None} for at, seq in seqs.items()]
    return {"at_ns": at_ns, "journal": {"stream": stream}, "motors": motors}


async def test_journal_that_is_behind_the_status_file_is_set_aside_and_what_is_gone_is_told(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.arm.state_dir.mkdir()
    state = StateDir(config.arm.state_dir)
    stream = write(state.journal)
    ahead_ns = epoch_ns() + 3600 * SECOND  # the wall clock was set back meanwhile
    state.write_status(status_of(stream, {0: 85, 1: 40}, ahead_ns))
    new, told = await successor(config)
    assert new != stream
    aside, *gaps = [event for event in told if event["type"] in {"journal.set_aside", "telemetry.gap"}]
    assert aside["reason"] == "lost its newest records: joint1 was at seq 85, the journal ends at 80"
    spans = [(gap["motor"], gap["stream"], gap["from_seq"], gap["to_seq"]) for gap in gaps]
    assert spans == [("joint1", stream, 81, 85)]
    assert all(event["at_ns"] >= ahead_ns for event in told)


async def test_times_go_on_behind_all_that_the_old_stream_can_have_published(tmp_path: Path) -> None:
    """From memory, since its last status: that is as long ago as the machine's monotonic clock says."""
    config = make_config(tmp_path)
    config.arm.state_dir.mkdir()
    state = StateDir(config.arm.state_dir)
    stream = write(state.journal)
    ahead_ns = epoch_ns() + 3600 * SECOND  # the wall clock was set back meanwhile
    for boot, since_s in (boot_id(), 500), ("another", 0):
        clock = {"monotonic_ns": monotonic_ns() - 500 * SECOND, "boot": boot}
        state.write_status(status_of(stream, {0: 1000}, ahead_ns) | clock)
        stream, told = await successor(config)
        first_ns = min(event["at_ns"] for event in told)
        assert since_s <= (first_ns - ahead_ns) / SECOND < since_s + DEADLINE_S


@pytest.mark.parametrize("seqs", [{0: 80, 1: 40}, {0: 0, 1: 0}, {5: 100}])
async def test_journal_that_is_not_behind_goes_on(tmp_path: Path, seqs: dict[int, int]) -> None:
    config = make_config(tmp_path)
    config.arm.state_dir.mkdir()
    state = StateDir(config.arm.state_dir)
    stream = write(state.journal)  # never marked: as one of an earlier version
    state.write_status(status_of(stream, seqs, 1))
    assert (await successor(config))[0] == stream
    state.write_status(status_of(stream + 1, {0: 1000}, 1))  # of another stream
    assert (await successor(config))[0] == stream


async def test_journal_whose_wal_is_damaged_is_set_aside_and_all_that_it_held_can_be_read(tmp_path: Path) -> None:
    config = make_config(tmp_path, KAFKA)
    config.arm.state_dir.mkdir()
    path = config.arm.state_dir / "journal.db"
    numbering = Numbering()
    with closing(Journal(tmp_path / "running.db", "arm1", MOTORS, 1 << 30)) as journal:
        for _ in range(20):
            journal.commit(Changes(batch=numbering.batch([0] * 50)))
        for suffix in ("", "-wal"):  # as a kill leaves them
            shutil.copy(tmp_path / f"running.db{suffix}", f"{path}{suffix}")
        stream = journal.stream
    with wal_path(path).open("r+b") as file:
        file.seek(-20_000, 2)
        file.write(b"\xa5")
    new, told = await successor(config)
    assert new != stream
    assert not [event for event in told if event["type"] == "telemetry.gap"]
    found = open_aside(config.arm.state_dir / "journal.aside-1")
    assert found
    assert (found.stream, found.held) == (stream, {("telemetry", 0): 1000})
    found.reader.close()


async def test_journal_whose_marker_was_taken_away_is_set_aside(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    stream, _ = await successor(config)
    state = StateDir(config.arm.state_dir)
    assert state.whole.exists()
    state.whole.unlink()
    new, told = await successor(config)
    assert new != stream
    reason = next(event["reason"] for event in told if event["type"] == "journal.set_aside")
    assert "lacks records that were given out" in reason
    assert (await successor(config))[0] == new


async def test_what_the_old_stream_left_unfinished_ends_in_the_new_one_and_ids_stay_known(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    await successor(config)
    state = StateDir(config.arm.state_dir)
    with closing(Journal(state.journal, "arm1", MOTORS, 1 << 30)) as journal:
        commands = [CommandState("open", False, 1, "joint1"), CommandState("over", True, 2, "joint2")]
        journal.commit(Changes(commands=commands))
    state.whole.unlink()
    await successor(config)
    with closing(JournalReader(state.journal)) as reader:
        outcomes = [json.loads(entry.value) for entry in reader.entries(0, 100, "outcomes")]
        told = [(outcome["command_id"], outcome["state"], outcome["reason"]) for outcome in outcomes]
        assert told == [("open", "failed", "interrupted")]
        assert reader.unfinished_commands() == []
        assert reader.command("over") == commands[1]


async def test_run_that_ends_between_two_journals_is_made_up_for_by_the_next(tmp_path: Path) -> None:
    config = make_config(tmp_path, KAFKA)
    config.arm.state_dir.mkdir()
    state = StateDir(config.arm.state_dir)
    stream = write(state.journal)
    set_aside(state.journal, "for a test")
    with closing(Journal(state.journal, "arm1", MOTORS, 1 << 30)):
        pass  # and then it was killed
    _, told = await successor(config)
    aside = next(event for event in told if event["type"] == "journal.set_aside")
    assert (aside["stream"], aside["path"]) == (stream, str(config.arm.state_dir / "journal.aside-1"))
    with closing(JournalReader(state.journal)) as reader:
        assert reader.inbox("kafka") == {1: 9}
    _, told = await successor(config)
    assert [event["type"] for event in told].count("journal.set_aside") == 1
