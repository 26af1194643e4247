"""What goes to each partition: the records of a journal behind those that the broker has acknowledged.

    journal, memory --pages--> lane per (topic, partition) --Item--> flow

A lane knows the sequence number that the broker has acknowledged, and what comes next. The newest records come from
memory (``gateway.recent``), older ones from the journal.
"""

import bisect
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple, TypeAlias

import msgspec
from aiokafka import ConsumerRecord, TopicPartition

from gateway import kafka, telemetry
from gateway.commands import State, decode_outcome
from gateway.config import Config
from gateway.journal import JournalReader, StoredEntry
from gateway.recent import Recent
from gateway.telemetry import Records, Split

Tails: TypeAlias = Mapping[TopicPartition, tuple[int, ConsumerRecord | None]]
"""Where each partition ends, and its last record; None: it holds none."""
BATCH_RECORDS = 2048  # bounds how long the event loop is away while a backlog drains


class ForeignRecord(Exception):
    """Somebody else writes to the arm's partitions."""


class Item(NamedTuple):
    """One record on its way."""

    seq: int
    row: int  # of the journal: everything up to it is done with this record
    at_ns: int
    key: bytes
    value: bytes
    headers: Sequence[tuple[str, bytes]] = ()


class Lane(ABC):
    """What one partition has acknowledged, and what comes next."""

    def __init__(self, name: str, topic: str, partition: int) -> None:
        self.name = name  # within the arm: telemetry, events, outcomes
        self.topic = topic
        self.partition = partition
        self.seq = 0  # acknowledged
        self.row = 0  # of the journal; everything up to it is acknowledged or not ours
        self.busy = False
        self.next_offset = 0  # where the broker puts the next record, if nobody else writes
        self.refused: tuple[int, int] | None = None  # (next_offset, monotonic) at the first refusal as out of order
        self.sick_until = 0  # monotonic
        self.undated_until = 0  # monotonic

    @abstractmethod
    def pending(self) -> bool:
        """Whether ``take`` would find something."""

    @abstractmethod
    def take(self) -> Sequence[Item]:
        """The records behind ``seq``, oldest first; always the same until acknowledged. Raises sqlite3.Error."""

    @abstractmethod
    def seq_of(self, record: ConsumerRecord) -> tuple[int, int]:
        """(stream, seq) of a record that the partition holds. Raises ForeignRecord for what we did not write."""

    def acknowledged(self, seq: int, row: int) -> None:
        """The broker has everything up to ``seq``, which stands in ``row``."""
        self.seq, self.row = seq, row

    @abstractmethod
    def give_up(self) -> None:
        """Leave out what is still to come: it cannot be read."""


class Pages:
    """Telemetry rows split by partition, shared by all lanes: the newest from memory, older ones page by page."""

    ROWS = 256
    KEPT = 8

    def __init__(self, reader: JournalReader, recent: Recent) -> None:
        self._reader = reader
        self._recent = recent
        self._pages: OrderedDict[int, list[tuple[int, Split]]] = OrderedDict()

    @property
    def end(self) -> int:
        """The newest row."""
        return self._recent.row

    def behind(self, row: int) -> list[tuple[int, Split]]:
        """Some rows behind ``row``, oldest first; empty only where the log ends. Raises sqlite3.Error."""
        while (rows := self._recent.rows(row)) is None:
            number = (row + 1) // self.ROWS
            if rows := [entry for entry in self._page(number) if entry[0] > row]:
                return rows
            row = (number + 1) * self.ROWS - 1  # a page that was trimmed away
        return rows

    def _page(self, number: int) -> list[tuple[int, Split]]:
        page = self._pages.get(number)
        if page is None:
            first = number * self.ROWS
            batches = self._reader.batches(first - 1, self.ROWS)
            page = [(batch.id, batch.split) for batch in batches if batch.id < first + self.ROWS]
            if first + self.ROWS <= self._recent.saved_row:  # a page that still grows is not kept
                self._pages[number] = page
                if len(self._pages) > self.KEPT:
                    self._pages.popitem(last=False)
        return page


class TelemetryLane(Lane):
    """One motor's samples."""

    def __init__(self, topic: str, partition: int, motor: str, pages: Pages, encoding: str) -> None:
        super().__init__("telemetry", topic, partition)
        self._key = motor.encode()
        self._motor = motor
        self._pages = pages
        self._json = encoding == "json"

    def pending(self) -> bool:
        return self.row < self._pages.end

    def take(self) -> Sequence[Item]:
        items: list[Item] = []
        while not items and (rows := self._pages.behind(self.row)):
            for row, split in rows:
                mine = split.get(self.partition)
                if mine is not None:
                    items += self._items(row, mine)
                if len(items) >= BATCH_RECORDS:
                    break
            if not items:
                self.row = rows[-1][0]  # nothing of ours in there
        if not items:  # a damaged row at the very end would be looked for again and again
            self.give_up()
        return items

    def _items(self, row: int, records: Records) -> list[Item]:
        """Those of a row's ``records`` that are behind ``seq``."""
        seqs = records["seq"].tolist()
        known = bisect.bisect(seqs, self.seq)
        if known == len(seqs):
            return []
        seqs, records = seqs[known:], records[known:]
        values = telemetry.json_messages(records, self._motor) if self._json else telemetry.messages(records)
        rows = [row - 1] * (len(seqs) - 1) + [row]
        columns = zip(seqs, rows, records["sampled_at_ns"].tolist(), values, strict=True)
        return [Item(seq, done, at_ns, self._key, value) for seq, done, at_ns, value in columns]

    def give_up(self) -> None:
        self.row = max(self.row, self._pages.end)

    def seq_of(self, record: ConsumerRecord) -> tuple[int, int]:
        try:
            if self._json:
                values = msgspec.json.decode(record.value, type=dict[str, Any])
                return int(values["stream"]), int(values["seq"])
            found = telemetry.decode([record.value], self.partition)[0]
            return int(found["stream"]), int(found["seq"])
        except (ValueError, KeyError, TypeError) as error:
            raise ForeignRecord(
                f"topic {self.topic}, partition {self.partition}, offset {record.offset}: the newest record is not "
                f"ours ({error}); was kafka.format changed? Publish under another arm name, or begin a new topic"
            ) from error


class EntryLane(Lane):
    """One partition of events or outcomes.

    What an accepted command becomes is not published from memory: if the gateway were killed before the journal has
    it, the next run would know nothing of the command, or end it a second time.
    """

    def __init__(self, name: str, topic: str, partition: int, reader: JournalReader, recent: Recent) -> None:
        super().__init__(name, topic, partition)
        self._reader = reader
        self._recent = recent
        self._stream = reader.stream
        self._dirty = True

    def appended(self) -> None:
        """Something was committed for this lane."""
        self._dirty = True

    def pending(self) -> bool:
        return self._dirty

    def take(self) -> Sequence[Item]:
        entries = self._recent.entries(self.name, self.partition, self.seq, BATCH_RECORDS)
        if entries is None:
            entries = self._reader.partition_entries(self.name, self.partition, self.seq, BATCH_RECORDS)
        ready = list(takewhile(self._ready, entries))
        self._dirty = len(entries) == BATCH_RECORDS or len(ready) < len(entries)
        return [self._item(entry) for entry in ready]

    def _ready(self, entry: StoredEntry) -> bool:
        if self.name != "outcomes" or entry.id <= self._recent.saved_entry:
            return True
        return decode_outcome(entry.value).state in {State.REJECTED, State.EXPIRED}  # never accepted

    def _item(self, entry: StoredEntry) -> Item:
        header = (kafka.SEQ_HEADER, f"{self._stream}/{entry.seq}".encode())
        return Item(entry.seq, entry.id, entry.at_ns, entry.key.encode(), entry.value, (header,))

    def give_up(self) -> None:
        self._dirty = False

    def acknowledged(self, seq: int, row: int) -> None:
        super().acknowledged(seq, row)
        self._dirty = True  # what was committed while the batch was away

    def seq_of(self, record: ConsumerRecord) -> tuple[int, int]:
        try:
            stream, _, seq = dict(record.headers)[kafka.SEQ_HEADER].decode().partition("/")
            return int(stream), int(seq)
        except (KeyError, ValueError, UnicodeDecodeError) as error:
            raise ForeignRecord(
                f"topic {self.topic}, partition {self.partition}, offset {record.offset}: the newest record has no "
                f"header {kafka.SEQ_HEADER}, so the gateway did not write it; only the gateway may write to this topic"
            ) from error


def lanes_of(config: Config, reader: JournalReader, recent: Recent, motors: Mapping[int, str]) -> list[Lane]:
    """A lane for all that a journal holds of ``motors`` ({partition: name}) and of the arm."""
    pages = Pages(reader, recent)
    topic = config.topic("telemetry")
    encoding = config.kafka.format if config.kafka else ""
    found: list[Lane] = [TelemetryLane(topic, at, motors[at], pages, encoding) for at in sorted(motors)]
    found += [
        EntryLane(name, config.topic(name), partition, reader, recent)
        for name in ("events", "outcomes")
        for partition in sorted({0, *motors})
    ]
    return found
