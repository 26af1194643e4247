"""The judge of a journal, and of events and outcomes: every fault is written, and found at its exact place."""

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hil.judge import Fault, FaultKind, JudgeError, judge_entries, judge_journal
from tests.conftest import Kafka
from tests.system.journal_file import Row, write_journal
from tests.system.rig import create_topic
from tests.system.test_judge import STREAM, message

Entry = tuple[str, int, int, dict[str, Any]]


def rows(*seqs: int, partition: int = 0) -> list[Row]:
    return [[(partition, message(seq))] for seq in seqs]


def gap_event(seq: int, from_seq: int, to_seq: int) -> Entry:
    event = {"type": "telemetry.gap", "motor": "joint1", "at_ns": 1, "stream": STREAM}
    return "events", 0, seq, {**event, "from_seq": from_seq, "to_seq": to_seq}


def outcome(seq: int, command: str, state: str, **more: str) -> Entry:
    return "outcomes", 0, seq, {"command_id": command, "motor": "joint1", "at_ns": 1, "state": state, **more}


def test_a_complete_journal_is_fine(tmp_path: Path) -> None:
    both = [[(0, message(1)), (0, message(2)), (1, message(1))], [(0, message(3)), (1, message(2))]]
    verdict = judge_journal(write_journal(tmp_path / "journal.db", STREAM, both))
    assert verdict.ok, verdict
    assert [(one.motor, one.records, one.last_seq) for one in verdict.partitions] == [
        ("joint1", 3, 3),
        ("joint2", 2, 2),
    ]


def test_a_journal_of_many_pages_is_fine(tmp_path: Path) -> None:
    verdict = judge_journal(write_journal(tmp_path / "journal.db", STREAM, rows(*range(1, 3001))))
    assert (verdict.ok, verdict.records) == (True, 3000)


@pytest.mark.parametrize(
    ("written", "fault"),
    [
        pytest.param(rows(1, 2, 5), Fault(FaultKind.GAP, 0, 3, "seq 3", "seq 5"), id="a gap"),
        pytest.param(rows(1, 2, 2), Fault(FaultKind.REPEAT, 0, 3, "seq 3", "seq 2"), id="a repeat"),
        pytest.param(
            [*rows(1), [(0, message(2, stream=9))]],
            Fault(FaultKind.FOREIGN, 0, 1, f"stream {STREAM}", "another"),
            id="two streams in a journal",
        ),
        pytest.param(
            [*rows(1), [(0, bytes(76))]],
            Fault(FaultKind.DAMAGE, 0, 1, "rows 1..2 to be readable", "what a row holds is no servo.Telemetry"),
            id="no telemetry",
        ),
    ],
)
def test_a_fault_is_found_at_its_row(tmp_path: Path, written: list[Row], fault: Fault) -> None:
    verdict = judge_journal(write_journal(tmp_path / "journal.db", STREAM, written))
    assert fault in verdict.faults


def test_what_was_trimmed_is_no_gap(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal.db", STREAM, rows(1, 2, 3, 4))
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DELETE FROM telemetry WHERE id <= 2")
    assert judge_journal(path).ok


def test_a_wrong_checksum_is_found_and_the_rest_is_read(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal.db", STREAM, rows(1, 2, 3, 4))
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE telemetry SET crc = crc + 1 WHERE id = 2")
    verdict = judge_journal(path)
    assert {(fault.kind, fault.offset) for fault in verdict.faults} == {(FaultKind.DAMAGE, 2), (FaultKind.GAP, 3)}
    assert verdict.partitions[0].gaps == 1


@pytest.mark.parametrize(("column", "value"), [("key", b"other"), ("key", b"\xff"), ("value", b"{}"), ("at_ns", 77)])
def test_a_damaged_outcome_is_found_and_the_rest_is_read(tmp_path: Path, column: str, value: object) -> None:
    entries = [outcome(1, "a", "done"), outcome(2, "b", "done"), outcome(3, "c", "done")]
    path = write_journal(tmp_path / "journal.db", STREAM, [], entries)
    with closing(sqlite3.connect(path)) as db, db:
        kind = "TEXT" if column == "key" else "BLOB" if column == "value" else "INTEGER"
        db.execute(f"UPDATE entries SET {column} = CAST(? AS {kind}) WHERE id = 2", (value,))
    verdict = judge_journal(path, "outcomes")
    assert {(fault.kind, fault.offset) for fault in verdict.faults} == {(FaultKind.DAMAGE, 2), (FaultKind.GAP, 3)}


def test_a_page_that_sqlite_cannot_read_is_found_and_the_rest_is_read(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal.db", STREAM, rows(*range(1, 3001)))
    with closing(sqlite3.connect(path)) as db:
        page_size = db.execute("PRAGMA page_size").fetchone()[0]
    whole = bytearray(path.read_bytes())
    middle = whole.index(message(1500)) // page_size * page_size
    whole[middle : middle + page_size] = b"\xff" * page_size
    path.write_bytes(whole)
    verdict = judge_journal(path)
    lost = verdict.total("gaps")
    assert 0 < lost < 100
    assert verdict.records == 3000 - lost
    assert {fault.kind for fault in verdict.faults} == {FaultKind.DAMAGE, FaultKind.GAP}


def test_a_gap_that_an_event_of_the_journal_tells_is_counted_apart(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal.db", STREAM, rows(1, 2, 5), [gap_event(1, 3, 4)])
    verdict = judge_journal(path)
    assert (verdict.ok, verdict.total("gaps"), verdict.total("told_gaps")) == (True, 0, 2)


def test_a_file_that_is_no_journal_is_no_proof(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="no journal"):
        judge_journal(tmp_path / "missing.db")
    other = tmp_path / "other.db"
    other.write_bytes(b"something else" * 100)
    with pytest.raises(JudgeError, match="not a database"):
        judge_journal(other)


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        pytest.param(
            [outcome(1, "a", "done"), outcome(3, "b", "done")],
            Fault(FaultKind.GAP, 0, 2, "seq 2", "seq 3"),
            id="a gap",
        ),
        pytest.param(
            [outcome(1, "a", "accepted"), outcome(2, "a", "done"), outcome(3, "a", "failed")],
            Fault(FaultKind.FINAL, 0, 3, "'done' of command 'a' to be the last", "failed"),
            id="two final outcomes",
        ),
        pytest.param(
            [outcome(1, "a", "done"), outcome(2, "a", "accepted")],
            Fault(FaultKind.FINAL, 0, 2, "'done' of command 'a' to be the last", "accepted"),
            id="accepted when it was over",
        ),
    ],
)
def test_a_fault_of_the_outcomes_is_found(tmp_path: Path, entries: list[Entry], fault: Fault) -> None:
    verdict = judge_journal(write_journal(tmp_path / "journal.db", STREAM, [], entries), "outcomes")
    assert verdict.faults == (fault,)


def test_a_repeated_command_is_answered_without_a_second_final_outcome(tmp_path: Path) -> None:
    entries = [outcome(1, "a", "done"), outcome(2, "a", "rejected", reason="duplicate"), outcome(3, "b", "accepted")]
    verdict = judge_journal(write_journal(tmp_path / "journal.db", STREAM, [], entries), "outcomes")
    assert verdict.ok, verdict
    assert verdict.unfinished == ("b",)


async def test_events_in_kafka_are_judged_by_their_header(kafka: Kafka, arm_name: str) -> None:
    from aiokafka import AIOKafkaProducer

    topic, value = f"servo.{arm_name}.events", b'{"type": "bus.up", "motor": "*", "at_ns": 1}'
    await create_topic(kafka.bootstrap, topic, 1)
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap)
    await producer.start()
    try:
        for seq in (1, 2, 4):
            headers = [("servo-seq", f"{STREAM}/{seq}".encode())]
            await producer.send_and_wait(topic, value, b"*", 0, headers=headers)
        await producer.send_and_wait(topic, value, b"*", 0)
    finally:
        await producer.stop()
    verdict = await judge_entries(kafka.bootstrap, arm_name, "events")
    assert [(fault.kind, fault.offset) for fault in verdict.faults] == [(FaultKind.GAP, 2), (FaultKind.FOREIGN, 3)]


def test_the_command_judges_a_journal(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "journal.db", STREAM, rows(1, 3))
    command = [sys.executable, "-m", "hil.judge", "--journal", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["partitions"][0]["gaps"] == 1
