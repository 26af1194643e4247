"""Pages and lanes, without a broker: exactly the records behind what is acknowledged, in order, wherever they lie."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiokafka import ConsumerRecord
from hypothesis import given
from hypothesis import strategies as st

from gateway import lanes as module
from gateway import recent, telemetry
from gateway.commands import Outcome, State
from gateway.journal import Batch, Changes, Journal, JournalReader, ProducerState, StoredEntry
from gateway.kafka import SEQ_HEADER
from gateway.lanes import EntryLane, ForeignRecord, Item, Pages, TelemetryLane
from gateway.producer import (
    EPOCH_MOST,
    SEQUENCE_BITS,
    ContinuedProducer,
    NoPlace,
    PlacedBatch,
    begins_epoch,
    next_epoch,
)
from gateway.publisher import Publisher
from gateway.recent import Recent
from tests.gateway_parts import KAFKA, MOTORS, Numbering, make_config

Rows = list[tuple[int, dict[int, list[int]]]]


class FakeReader(JournalReader):
    """A journal's rows in a dictionary, some of which may be gone."""

    def __init__(self, rows: dict[int, telemetry.Records]) -> None:
        self.rows = rows
        self.end = max(rows, default=0)
        self.stream = 7

    def ends(self) -> tuple[int, int]:
        return self.end, 0

    def batches(self, after: int, limit: int) -> list[Batch]:
        ids = [row for row in sorted(self.rows) if row > after][:limit]
        return [Batch(row, self.rows[row]) for row in ids]


class Log:
    """What was committed, and a ``Pages`` over it as a running gateway has it."""

    def __init__(self, batches: Sequence[Sequence[int]], old: int = 0) -> None:
        """The first ``old`` batches were there when the gateway started."""
        numbering = Numbering()
        self.batches = [numbering.records(batch) for batch in batches]
        self.reader = FakeReader(dict(enumerate(self.batches[:old], start=1)))
        self.recent = Recent(old, 0)
        self.pages = Pages(self.reader, self.recent)
        for row, records in enumerate(self.batches[old:], start=old + 1):
            self.append(row, records)

    def append(self, row: int, records: telemetry.Records) -> None:
        self.reader.rows[row] = records
        self.recent.append(Batch(row, records), ())
        self.recent.saved(row, 0)

    def lane(self, partition: int, encoding: str = "protobuf") -> TelemetryLane:
        return TelemetryLane("servo.arm1.telemetry", partition, MOTORS[partition], self.pages, encoding)


def all_behind(pages: Pages, row: int) -> Rows:
    """Every row behind ``row``, page by page."""
    found: Rows = []
    while rows := pages.behind(row):
        assert [number for number, _ in rows] == sorted({number for number, _ in rows})
        assert rows[0][0] > row
        found += [(number, {p: r["seq"].tolist() for p, r in split.items()}) for number, split in rows]
        row = rows[-1][0]
    return found


BATCHES = st.lists(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=4), max_size=30)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pages, "ROWS", 4)
    monkeypatch.setattr(Pages, "KEPT", 2)
    monkeypatch.setattr(module, "BATCH_RECORDS", 5)
    monkeypatch.setattr(recent, "ROWS_KEPT", 6)


@given(BATCHES, st.integers(0, 30), st.integers(0, 30))
def test_pages_from_memory_and_from_the_journal_hold_the_same(batches: list[list[int]], old: int, row: int) -> None:
    started_now = Log(batches, old=len(batches)).pages
    running = Log(batches, old=min(old, len(batches))).pages
    assert all_behind(running, row) == all_behind(started_now, row)
    assert [number for number, _ in all_behind(running, row)] == list(range(row + 1, len(batches) + 1))


@given(BATCHES, st.integers(0, 30), st.integers(0, 30))
def test_rows_that_were_trimmed_away_are_passed_over(batches: list[list[int]], trimmed: int, row: int) -> None:
    log = Log(batches, old=len(batches))
    for gone in range(1, min(trimmed + 1, len(batches))):  # the newest stays
        del log.reader.rows[gone]
    first = max(row, min(trimmed, max(0, len(batches) - 1))) + 1
    assert [number for number, _ in all_behind(log.pages, row)] == list(range(first, len(batches) + 1))


def drain(lane: TelemetryLane, accepted: Iterator[int]) -> list[Item]:
    """Send until nothing is pending; the batch takes a few of what the lane offers each time."""
    sent: list[Item] = []
    while lane.pending():
        items = lane.take()
        assert lane.take() == items, "the same until acknowledged"
        if items:
            batch = items[: next(accepted)]
            sent += batch
            lane.acknowledged(batch[-1].seq, batch[-1].row)
    return sent


@given(BATCHES, st.integers(0, 30), st.data())
def test_lane_takes_every_record_of_its_motor_once_and_in_order(
    batches: list[list[int]], old: int, data: st.DataObject
) -> None:
    log = Log(batches, min(old, len(batches)))
    accepted = iter(lambda: data.draw(st.integers(1, 8)), None)
    for partition in (0, 1):
        expected = [r for records in log.batches for r in records[records["partition"] == partition]]
        sent = drain(log.lane(partition), accepted)
        assert [item.seq for item in sent] == [int(record["seq"]) for record in expected]
        assert telemetry.decode([item.value for item in sent], partition).tolist() == [r.item() for r in expected]
        assert {item.key for item in sent} <= {MOTORS[partition].encode()}


@given(BATCHES, st.data())
def test_lane_goes_on_exactly_behind_what_the_broker_holds(batches: list[list[int]], data: st.DataObject) -> None:
    """Wherever the broker's tail is, and however far behind it the bookmarked row lies."""
    log = Log(batches, len(batches))
    lane = log.lane(0)
    total = sum(batch.count(0) for batch in batches)
    held = data.draw(st.integers(0, total))
    complete = [
        row for row, records in log.reader.rows.items()
        if all(record["seq"] <= held for record in records[records["partition"] == 0])
    ]  # fmt: skip
    most = next((row - 1 for row in sorted(log.reader.rows) if row not in complete), len(batches))
    lane.acknowledged(held, data.draw(st.integers(0, most)))
    sent = drain(lane, iter(lambda: 3, None))
    assert [item.seq for item in sent] == list(range(held + 1, total + 1))


def test_lane_without_records_of_its_own_comes_to_rest() -> None:
    lane = Log([[0]] * 20, old=10).lane(1)
    while lane.pending():
        assert lane.take() == []
    assert lane.row == 20


def test_lane_comes_to_rest_where_the_newest_row_is_damaged() -> None:
    log = Log([[0]] * 6, old=6)
    del log.reader.rows[6]
    lane = log.lane(0)
    assert [item.seq for item in drain(lane, iter(lambda: 5, None))] == [1, 2, 3, 4, 5]


def test_lane_takes_up_what_is_committed_later() -> None:
    log = Log([[0, 0]], old=1)
    lane = log.lane(0)
    drain(lane, iter(lambda: 5, None))
    assert not lane.pending()
    numbering = Numbering()
    numbering.records([0, 0])
    log.append(2, numbering.records([1, 0]))
    assert [item.seq for item in drain(lane, iter(lambda: 5, None))] == [3]


def make_consumed(value: bytes, headers: Sequence[tuple[str, bytes]] = ()) -> ConsumerRecord:
    return ConsumerRecord("servo.arm1.telemetry", 0, 17, 0, 0, b"joint1", value, None, 0, 0, tuple(headers))


@pytest.mark.parametrize("encoding", ["protobuf", "json"])
def test_lane_knows_its_own_records_again(encoding: str) -> None:
    lane = Log([[0, 0, 0]]).lane(0, encoding)
    assert [lane.seq_of(make_consumed(item.value)) for item in lane.take()] == [(7, 1), (7, 2), (7, 3)]


FOREIGN = [b"", b"hello", b"{}", b"[]", b"\xff" * 76, b'{"stream": "x", "seq": 1}', b'{"stream": 1, "seq": null}']


@pytest.mark.parametrize("encoding", ["protobuf", "json"])
@pytest.mark.parametrize("value", FOREIGN)
def test_record_of_somebody_else_is_told_with_its_place(encoding: str, value: bytes) -> None:
    with pytest.raises(ForeignRecord, match="telemetry, partition 0, offset 17"):
        Log([[0]]).lane(0, encoding).seq_of(make_consumed(value))


def test_format_that_was_changed_is_a_foreign_record() -> None:
    log = Log([[0]])
    (item,) = log.lane(0, "json").take()
    with pytest.raises(ForeignRecord, match="format changed"):
        log.lane(0, "protobuf").seq_of(make_consumed(item.value))


# --- events and outcomes ----------------------------------------------------------------------------------------------


def make_entries(topic: str, partition: int, count: int, first_id: int = 1, first_seq: int = 1) -> list[StoredEntry]:
    return [
        StoredEntry(first_id + n, topic, partition, first_seq + n, n, "joint1", b'{"n":%d}' % n) for n in range(count)
    ]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal(tmp_path / "journal.db", "arm1", MOTORS, 1 << 30)) as opened:
        yield opened


def test_entry_lane_takes_every_entry_once_and_in_order_in_bounded_batches(journal: Journal) -> None:
    journal.commit(Changes(entries=make_entries("events", 0, 13) + make_entries("events", 1, 3, first_id=14)))
    with closing(JournalReader(journal.path)) as reader:
        newest = Recent(0, 16)
        lane = EntryLane("events", "servo.arm1.events", 0, reader, newest)
        sent: list[Item] = []
        while lane.pending():
            if items := lane.take():
                assert len(items) <= 5
                sent += items[:4]
                lane.acknowledged(sent[-1].seq, sent[-1].row)
        assert [item.seq for item in sent] == list(range(1, 14))
        assert [msgspec.json.decode(item.value)["n"] for item in sent] == list(range(13))
        seq_of = [lane.seq_of(make_consumed(item.value, item.headers)) for item in sent]
        assert seq_of == [(journal.stream, item.seq) for item in sent]
        newest.append(None, make_entries("events", 0, 1, first_id=17, first_seq=14))  # the disk does not have it
        lane.appended()
        assert [item.seq for item in lane.take()] == [14]


def outcome(number: int, state: State) -> StoredEntry:
    entry = Outcome("c1", "joint1", state, 1, 1).entry(0)
    return StoredEntry(number, "outcomes", 0, number, 1, entry.key, entry.value)


def test_what_an_accepted_command_becomes_waits_for_the_disk_and_is_overtaken_by_nothing(journal: Journal) -> None:
    states = [State.REJECTED, State.EXPIRED, State.ACCEPTED, State.REJECTED, State.DONE]
    recent = Recent(0, 0)
    recent.append(None, [outcome(number, state) for number, state in enumerate(states, start=1)])
    with closing(JournalReader(journal.path)) as reader:
        lane = EntryLane("outcomes", "servo.arm1.outcomes", 0, reader, recent)
        assert [item.seq for item in lane.take()] == [1, 2]
        lane.acknowledged(2, 2)
        for saved, sent in ((2, []), (3, [3, 4]), (5, [3, 4, 5])):
            recent.saved(0, saved)
            assert lane.pending()
            assert [item.seq for item in lane.take()] == sent
        assert not lane.pending()


@pytest.mark.parametrize("header", [None, b"", b"x/1", b"1/x", b"\xff/1", b"5"])
def test_entry_without_our_header_is_a_foreign_record(journal: Journal, header: bytes | None) -> None:
    with closing(JournalReader(journal.path)) as reader:
        lane = EntryLane("events", "servo.arm1.events", 0, reader, Recent(0, 0))
        headers = () if header is None else ((SEQ_HEADER, header),)
        with pytest.raises(ForeignRecord, match=SEQ_HEADER):
            lane.seq_of(make_consumed(b"{}", headers))


def test_publisher_has_a_lane_for_all_that_the_arm_writes(journal: Journal, tmp_path: Path) -> None:
    told: list[Any] = []

    async def remember(state: ProducerState) -> None:
        told.append(state)

    async def lost(*what: object) -> None:
        told.append(what)

    with closing(JournalReader(journal.path)) as reader:
        newest = Recent(0, 0)
        publisher = Publisher(
            make_config(tmp_path, KAFKA),
            reader,
            {},
            newest,
            [],
            "owner",
            bookmark=lambda *at: told.append(at),
            changed=lambda *state: told.append(state),
            event=lambda kind, **details: told.append(kind),
            damage_told=lost,
            lost=lost,
            remember=remember,
        )
        found = {(lane.topic, lane.partition) for lane in publisher._flow.lanes}
        topics = ("telemetry", "events", "outcomes")
        assert found == {(f"servo.arm1.{topic}", partition) for topic in topics for partition in (0, 1)}
        entries = make_entries("outcomes", 1, 1) + make_entries("unknown", 5, 1, first_id=2)
        newest.append(Batch(1, Numbering().records([1])), entries)
        newest.saved(1, 2)
        publisher.committed(entries)
        pending = {(lane.name, lane.partition) for lane in publisher._flow.lanes if lane.pending() and lane.take()}
        assert pending == {("telemetry", 1), ("outcomes", 1)}
        assert publisher.acknowledged(1) == 0
    assert told == []


# --- places in the sequence that the broker checks ------------------------------------------------------------------


@given(st.integers(0, 3 << SEQUENCE_BITS))
def test_a_place_is_an_epoch_and_a_sequence_number_that_go_on(position: int) -> None:
    batch = PlacedBatch((7, 2), position)
    places = batch._epoch - 2, batch._sequence
    assert places == divmod(position, 1 << SEQUENCE_BITS)
    assert begins_epoch(position) == (batch._sequence == 0)


@given(st.integers(-(1 << 40), 1 << 40))
def test_next_epoch_is_the_first_place_of_a_higher_one(position: int) -> None:
    found = next_epoch(position)
    assert begins_epoch(found)
    assert 0 < found - position <= 1 << SEQUENCE_BITS


@pytest.mark.parametrize("position", [-1, (EPOCH_MOST + 1) << SEQUENCE_BITS])
async def test_there_is_no_place_before_the_first_and_behind_the_last(position: int) -> None:
    producer = ContinuedProducer((7, 0))
    try:
        producer.place_batch(0)
        with pytest.raises(NoPlace):
            producer.place_batch(position)
    finally:
        await producer.stop()
