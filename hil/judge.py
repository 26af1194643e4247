"""The judge: proves from outside that an arm's log is complete and in order, or says where it is not.

``python -m hil.judge --arm NAME --bootstrap HOST:PORT`` reads servo.<arm>.telemetry from its beginning to where it
ends now; ``--journal PATH`` reads a journal instead, and ``--topic`` names another topic. It stands for anybody's
program: it knows the contract (``hil.contract``, ``hil.logs``) and nothing of the gateway, and imports nothing of it.

Proved for each partition:
- for each stream, seq 1, 2, 3, ... without gap, repeat or disorder;
- one key: the motor's name, which has no other partition (events and outcomes of partition 0: ``*`` too);
- nothing else in between; of a journal, that every row can be read;
- of telemetry, sampled_at_ns that never falls, and finite positions;
- of outcomes, one final outcome for each command id, and nothing after it.

A gap that an event ``telemetry.gap`` names is counted apart: it is a loss, but one that was told.
"""

import argparse
import asyncio
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from aiokafka import ConsumerRecord

from hil.contract import (
    Block,
    Entry,
    JudgeError,
    Sample,
    Unreadable,
    read_block,
    read_sample,
    read_value,
    telemetry_class,
)
from hil.logs import Damage, JournalFile, NoTopic, StoredEntry, read, read_many

__all__ = [
    "Block", "Entry", "Fault", "FaultKind", "JudgeError", "NoTopic", "PartitionVerdict", "Sample", "Topic", "Verdict",
    "judge", "judge_entries", "judge_journal", "main", "read", "table", "telemetry_class", "told_gaps",
]  # fmt: skip

Topic = Literal["telemetry", "events", "outcomes"]
EntryTopic = Literal["events", "outcomes"]

ARM = "*"  # key of what concerns the whole arm, in partition 0
SEQ_HEADER = "servo-seq"  # "stream/seq" of a record of events or outcomes
FINAL = frozenset({"done", "failed", "superseded", "rejected", "expired"})
FAULTS_KEPT = 50  # each counts; so many are shown


class FaultKind(StrEnum):
    """What can be wrong."""

    GAP = "gap"  # a sequence number is missing
    REPEAT = "repeat"  # a sequence number comes again
    DISORDER = "disorder"  # one comes after a higher one, or a stream comes back after another
    TIME = "falling time"
    KEY = "key"  # not the motor's name, or two motors in a partition, or one in two
    POSITION = "position"  # not finite
    FOREIGN = "foreign"  # not what the topic holds
    DAMAGE = "damage"  # rows of a journal that cannot be read
    FINAL = "final outcome"  # a command has more than one, or something after it
    EMPTY = "empty"  # no record at all


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong, and its exact place. In a journal, ``offset`` is the id of the row."""

    kind: FaultKind
    partition: int
    offset: int
    expected: str
    found: str

    def __str__(self) -> str:
        place = f"partition {self.partition}, offset {self.offset}"
        return f"{place}: {self.kind}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True, slots=True)
class PartitionVerdict:
    """What one partition holds. ``gaps`` and ``told_gaps`` count missing records, the latter named by an event."""

    partition: int
    motor: str
    records: int
    last_seq: int  # of the newest stream
    span_s: float
    rate_hz: float
    streams: int
    gaps: int
    told_gaps: int
    repeats: int
    disorders: int
    other_faults: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a topic or a journal holds. ``faults`` are the first ones; ``fault_count`` counts all, told gaps left out.

    ``unfinished``: ids of commands that were accepted and have no final outcome yet.
    """

    arm: str
    partitions: tuple[PartitionVerdict, ...]
    streams: int
    faults: tuple[Fault, ...]
    fault_count: int
    unfinished: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.fault_count == 0

    @property
    def records(self) -> int:
        """Of all partitions."""
        return sum(partition.records for partition in self.partitions)

    def total(self, column: str) -> int:
        """The sum of a column of the partitions."""
        return sum(getattr(partition, column) for partition in self.partitions)

    def __str__(self) -> str:
        lines = []
        if self.partitions:
            columns = [name for name in PartitionVerdict.__dataclass_fields__ if name != "other_faults"]
            rows = [[_cell(getattr(one, name)) for name in [*columns, "other_faults"]] for one in self.partitions]
            lines.append(table([*columns, "other"], rows))
        lines += map(str, self.faults)
        if self.fault_count > len(self.faults):
            lines.append(f"... and {self.fault_count - len(self.faults)} more")
        if self.unfinished:
            lines.append(f"{len(self.unfinished)} commands without a final outcome yet: {', '.join(self.unfinished)}")
        wrong = "nothing is wrong" if self.ok else f"{self.fault_count} faults"
        return "\n".join([*lines, f"arm {self.arm}: {self.records} records, {self.streams} streams: {wrong}"])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns as wide as they have to be; words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        words = (c.ljust(w) if c[:1].isalpha() else c.rjust(w) for c, w in zip(cells, widths, strict=True))
        return "  ".join(words).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def _cell(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


# --- the proof -----------------------------------------------------------------------------------------------------


class Told(NamedTuple):
    """A loss that an event ``telemetry.gap`` names exactly."""

    motor: str
    stream: int
    from_seq: int
    to_seq: int


class _Gap(NamedTuple):
    """Sequence numbers that did not come when they were due."""

    stream: int
    from_seq: int
    to_seq: int
    offset: int  # of the record that came instead
    found: int

    @property
    def missing(self) -> int:
        return self.to_seq - self.from_seq + 1


@dataclass(slots=True)
class _Partition:
    """The proof for one partition; give it every record in the order of the log."""

    number: int
    begins_at: int  # the offset of its oldest record; above 0 where older ones have expired
    motor: str = ""
    records: int = 0
    stream: int = 0
    highest: dict[int, int] = field(default_factory=dict)  # stream -> seq
    gaps: list[_Gap] = field(default_factory=list)
    first_ns: int = 0
    last_ns: int = 0
    faults: list[Fault] = field(default_factory=list)
    counts: Counter[FaultKind] = field(default_factory=Counter)

    def fault(self, kind: FaultKind, offset: int, expected: object, found: object) -> None:
        self.counts[kind] += 1
        if len(self.faults) < FAULTS_KEPT:
            self.faults.append(Fault(kind, self.number, offset, str(expected), str(found)))

    def foreign(self, offset: int, value: bytes | None, error: Unreadable) -> None:
        self.records += 1
        self.fault(FaultKind.FOREIGN, offset, "a record of this topic", f"{(value or b'')[:24]!r}: {error}")

    def take_block(self, block: Block) -> bool:
        """Take what is just as it should be, all at once; False, and nothing taken, if not all of it is."""
        values, due = block.values, self.highest.get(self.stream, 0) + 1
        times = values["sampled_at_ns"]
        if not (
            self.stream
            and block.motor == self.motor
            and (values["stream"] == self.stream).all()
            and (values["seq"] == np.arange(due, due + len(values), dtype=np.uint64)).all()
            and times[0] >= self.last_ns
            and (times[1:] >= times[:-1]).all()
            and np.isfinite(values["position_rad"]).all()
        ):
            return False
        self.records += len(values)
        self.highest[self.stream] = due + len(values) - 1
        self.last_ns = int(times[-1])
        return True

    def take_sample(self, sample: Sample) -> bool:
        """One of telemetry. False if it does not belong here."""
        self.records += 1
        if not self.first_ns:
            self.motor, self.first_ns, self.last_ns = sample.motor, sample.sampled_at_ns, sample.sampled_at_ns
            if not sample.motor:
                self.fault(FaultKind.KEY, sample.offset, "the motor's name", "no key")
        if sample.motor != self.motor:
            self.fault(FaultKind.KEY, sample.offset, f"key {self.motor!r}", f"key {sample.motor!r}")
            return False
        self._order(sample.stream, sample.seq, sample.offset)
        if sample.sampled_at_ns < self.last_ns:
            expected = f"sampled_at_ns {self.last_ns} or later"
            self.fault(FaultKind.TIME, sample.offset, expected, sample.sampled_at_ns)
        self.last_ns = max(self.last_ns, sample.sampled_at_ns)
        if not math.isfinite(sample.position_rad):
            self.fault(FaultKind.POSITION, sample.offset, "a finite position_rad", sample.position_rad)
        return True

    def take_entry(self, entry: Entry) -> None:
        """One of events or outcomes."""
        self.records += 1
        at_ns = entry.value["at_ns"]
        self.first_ns, self.last_ns = self.first_ns or at_ns, at_ns
        if entry.key != entry.value["motor"]:
            self.fault(FaultKind.KEY, entry.offset, f"key {entry.value['motor']!r}", f"key {entry.key!r}")
        elif entry.key != ARM or self.number:
            self.motor = self.motor or entry.key
            if entry.key != self.motor:
                self.fault(FaultKind.KEY, entry.offset, f"key {self.motor!r}", f"key {entry.key!r}")
        self._order(entry.stream, entry.seq, entry.offset)

    def _order(self, stream: int, seq: int, offset: int) -> None:
        if stream != self.stream:
            if stream in self.highest:
                self.fault(FaultKind.DISORDER, offset, f"stream {self.stream}", f"stream {stream} again")
            self.stream = stream
        if stream not in self.highest and self.begins_at and not self.highest:
            self.highest[stream] = seq - 1  # what came before has expired
        due = self.highest.setdefault(stream, 0) + 1
        if seq > due:
            self.gaps.append(_Gap(stream, due, seq - 1, offset, seq))
        elif seq < due:
            kind = FaultKind.DISORDER if self._fill(stream, seq) else FaultKind.REPEAT
            self.fault(kind, offset, f"seq {due}", f"seq {seq}")
        self.highest[stream] = max(seq, due - 1)

    def _fill(self, stream: int, seq: int) -> bool:
        """Whether a number that comes late was missing; it is not any more."""
        for at, gap in enumerate(self.gaps):
            if gap.stream == stream and gap.from_seq <= seq <= gap.to_seq:
                parts = [gap._replace(to_seq=seq - 1), gap._replace(from_seq=seq + 1)]
                self.gaps[at : at + 1] = [part for part in parts if part.missing > 0]
                return True
        return False

    def verdict(self, told: Sequence[Told]) -> PartitionVerdict:
        """Call once, at the end: what is missing becomes a fault, unless it was told."""
        missing = told_count = 0
        for gap in self.gaps:
            untold = list(_untold(gap, self.motor, told))
            untold_count = sum(part.missing for part in untold)
            missing += untold_count
            told_count += gap.missing - untold_count
            for part in untold:
                found = part.to_seq + 1 if part.to_seq < gap.to_seq else gap.found
                self.fault(FaultKind.GAP, gap.offset, f"seq {part.from_seq}", f"seq {found}")
        span_s = (self.last_ns - self.first_ns) / 1e9
        ordinary = {FaultKind.GAP, FaultKind.REPEAT, FaultKind.DISORDER}
        return PartitionVerdict(
            partition=self.number,
            motor=self.motor or "-",
            records=self.records,
            last_seq=self.highest.get(self.stream, 0),
            span_s=span_s,
            rate_hz=(self.records - 1) / span_s if span_s > 0 else 0.0,
            streams=len(self.highest),
            gaps=missing,
            told_gaps=told_count,
            repeats=self.counts[FaultKind.REPEAT],
            disorders=self.counts[FaultKind.DISORDER],
            other_faults=sum(count for kind, count in self.counts.items() if kind not in ordinary),
        )


def _untold(gap: _Gap, motor: str, told: Sequence[Told]) -> Iterable[_Gap]:
    """The parts of a gap that no event names."""
    at = gap.from_seq
    for one in sorted(one for one in told if (one.motor, one.stream) == (motor, gap.stream)):
        if at < one.from_seq <= gap.to_seq:
            yield gap._replace(from_seq=at, to_seq=one.from_seq - 1)
        at = max(at, min(one.to_seq, gap.to_seq) + 1)
    if at <= gap.to_seq:
        yield gap._replace(from_seq=at)


class _Finals:
    """What became of the commands; give it every outcome in the order of the log."""

    def __init__(self) -> None:
        self.unfinished: dict[str, None] = {}
        self._final: dict[str, str] = {}

    def take(self, partition: _Partition, entry: Entry) -> None:
        command, state = str(entry.value.get("command_id")), str(entry.value.get("state"))
        if entry.value.get("reason") == "duplicate":  # answers a repeat of the record, not the command
            return
        if command in self._final:
            expected = f"{self._final[command]!r} of command {command!r} to be the last"
            partition.fault(FaultKind.FINAL, entry.offset, expected, state)
        elif state in FINAL:
            self._final[command] = state
            self.unfinished.pop(command, None)
        else:
            self.unfinished[command] = None


class _Proof:
    """All partitions of a log, and the verdict in the end."""

    def __init__(self, arm: str) -> None:
        self.arm = arm
        self._partitions: dict[int, _Partition] = {}
        self._finals = _Finals()

    def partition(self, number: int, first_offset: int) -> _Partition:
        return self._partitions.setdefault(number, _Partition(number, first_offset))

    def block(self, block: Block, begins_at: int) -> None:
        partition = self.partition(block.partition, begins_at)
        if not partition.take_block(block):
            for sample in block.samples():
                partition.take_sample(sample)

    def entry(self, entry: Entry, begins_at: int, topic: EntryTopic) -> None:
        partition = self.partition(entry.partition, begins_at)
        partition.take_entry(entry)
        if topic == "outcomes":
            self._finals.take(partition, entry)

    def verdict(self, told: Sequence[Told] = (), *, may_be_empty: bool = False) -> Verdict:
        in_order = [partition for _, partition in sorted(self._partitions.items())]
        if not in_order:
            faults = () if may_be_empty else (Fault(FaultKind.EMPTY, 0, 0, "telemetry records", "none"),)
            return Verdict(self.arm, (), 0, faults, len(faults))
        _one_partition_each(in_order)
        verdicts = tuple(partition.verdict(told) for partition in in_order)
        found = sorted((f for partition in in_order for f in partition.faults), key=lambda f: (f.partition, f.offset))
        streams = {stream for partition in in_order for stream in partition.highest}
        count = sum(partition.counts.total() for partition in in_order)
        unfinished = tuple(self._finals.unfinished)
        return Verdict(self.arm, verdicts, len(streams), tuple(found[:FAULTS_KEPT]), count, unfinished)


def _one_partition_each(partitions: Sequence[_Partition]) -> None:
    first: dict[str, int] = {}
    for partition in partitions:
        other = first.setdefault(partition.motor, partition.number)
        if other != partition.number and partition.motor:
            place = partition.begins_at
            partition.fault(FaultKind.KEY, place, f"{partition.motor!r} in partition {other} alone", "it here too")


# --- the logs ------------------------------------------------------------------------------------------------------


async def judge(
    bootstrap: str,
    arm: str,
    watch: Callable[[Sample], None] | None = None,
    *,
    watch_block: Callable[[Block], None] | None = None,
    told: Sequence[Told] = (),
) -> Verdict:
    """The proof, over everything that servo.<arm>.telemetry holds now.

    ``watch`` sees each sample that belongs there; ``watch_block`` the same, many at a time. ``told``: gaps that were
    told elsewhere than on the events topic. Raises JudgeError if there is no such topic, or the broker does not answer.
    """
    proof = _Proof(arm)
    async for records in read_many(bootstrap, f"servo.{arm}.telemetry"):
        for same in _same_key(records):
            partition = proof.partition(same[0].partition, same[0].offset)
            block = read_block(same[0].partition, same[0].offset, same[0].key or b"", [r.value or b"" for r in same])
            if block and block.offsets[-1] == same[-1].offset and partition.take_block(block):
                _show(block, watch, watch_block)
            else:
                _take_each(partition, same, watch, watch_block)
    elsewhere = [*told, *await told_gaps(bootstrap, arm)]
    return proof.verdict(elsewhere)


def _same_key(records: Sequence[ConsumerRecord]) -> Iterable[list[ConsumerRecord]]:
    return (list(group) for _, group in groupby(records, lambda record: record.key))


def _take_each(
    partition: _Partition,
    records: Sequence[ConsumerRecord],
    watch: Callable[[Sample], None] | None,
    watch_block: Callable[[Block], None] | None,
) -> None:
    for record in records:
        try:
            sample = read_sample(record.partition, record.offset, record.key, record.value)
        except Unreadable as error:
            partition.foreign(record.offset, record.value, error)
            continue
        if partition.take_sample(sample):
            if watch:
                watch(sample)
            if watch_block and (
                block := read_block(sample.partition, sample.offset, sample.motor.encode(), [record.value])
            ):
                watch_block(block)


def _show(block: Block, watch: Callable[[Sample], None] | None, watch_block: Callable[[Block], None] | None) -> None:
    if watch_block:
        watch_block(block)
    if watch:
        for sample in block.samples():
            watch(sample)


async def told_gaps(bootstrap: str, arm: str) -> list[Told]:
    """What the events topic names as lost; nothing if there is no such topic."""
    try:
        return [told async for record in read(bootstrap, f"servo.{arm}.events") for told in _told(record.value)]
    except NoTopic:  # nobody told anything
        return []


def _told(value: bytes | None) -> Iterable[Told]:
    with suppress(Unreadable):
        event = read_value(value)
        if event.get("type") == "telemetry.gap" and {"stream", "from_seq", "to_seq"} <= event.keys():
            yield Told(event["motor"], int(event["stream"]), int(event["from_seq"]), int(event["to_seq"]))


async def judge_entries(bootstrap: str, arm: str, topic: EntryTopic) -> Verdict:
    """The proof, over everything that servo.<arm>.events or .outcomes holds now; an empty topic is in order.

    Raises JudgeError as ``judge`` does.
    """
    proof = _Proof(arm)
    async for record in read(bootstrap, f"servo.{arm}.{topic}"):
        try:
            proof.entry(_entry(record), record.offset, topic)
        except Unreadable as error:
            proof.partition(record.partition, record.offset).foreign(record.offset, record.value, error)
    return proof.verdict(may_be_empty=True)


def _entry(record: ConsumerRecord) -> Entry:
    value = read_value(record.value)
    numbers = dict(record.headers).get(SEQ_HEADER, b"").decode(errors="replace").split("/")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise Unreadable(f"no header {SEQ_HEADER} with stream/seq")
    stream, seq = map(int, numbers)
    return Entry(record.partition, record.offset, (record.key or b"").decode(), stream, seq, value)


def judge_journal(
    path: Path,
    topic: Topic = "telemetry",
    *,
    watch_block: Callable[[Block], None] | None = None,
    told: Sequence[Told] = (),
) -> Verdict:
    """The proof, over what a journal holds now. ``told``: gaps that other logs name. Raises JudgeError."""
    journal = JournalFile(path)
    proof = _Proof(journal.arm)
    try:
        if topic != "telemetry":
            _take_entries(proof, journal, topic)
            return proof.verdict(may_be_empty=True)
        gaps = [*told, *_journal_gaps(journal)]
        begins_at = journal.first_row() - 1
        for found in journal.blocks():
            if isinstance(found, Damage):
                _damaged(proof, found)
                continue
            proof.block(found, begins_at)
            if (found.values["stream"] != journal.stream).any():
                partition = proof.partition(found.partition, begins_at)
                partition.fault(FaultKind.FOREIGN, int(found.offsets[0]), f"stream {journal.stream}", "another")
            if watch_block:
                watch_block(found)
        return proof.verdict(gaps)
    finally:
        journal.close()


def _journal_gaps(journal: JournalFile) -> Iterable[Told]:
    return (
        told for found in journal.entries("events") if isinstance(found, StoredEntry) for told in _told(found.value)
    )


def _take_entries(proof: _Proof, journal: JournalFile, topic: EntryTopic) -> None:
    for found in journal.entries(topic):
        if isinstance(found, Damage):
            _damaged(proof, found)
            continue
        begins_at = found.seq - 1  # the oldest of a partition may have been trimmed
        try:
            value = read_value(found.value)
        except Unreadable as error:
            proof.partition(found.partition, begins_at).foreign(found.id, found.value, error)
        else:
            entry = Entry(found.partition, found.id, found.key, journal.stream, found.seq, value)
            proof.entry(entry, begins_at, topic)


def _damaged(proof: _Proof, damage: Damage) -> None:
    rows = f"row {damage.from_id}" if damage.from_id == damage.to_id else f"rows {damage.from_id}..{damage.to_id}"
    proof.partition(0, damage.from_id - 1).fault(FaultKind.DAMAGE, damage.from_id, f"{rows} to be readable", damage.why)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the verdict; exit status 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m hil.judge", description="Prove an arm's log.")
    parser.add_argument("--bootstrap", default="127.0.0.1:9092", metavar="HOST:PORT", help="broker (%(default)s)")
    parser.add_argument("--arm", metavar="NAME", help="name of the arm, for its topics in Kafka")
    parser.add_argument("--journal", type=Path, metavar="PATH", help="read this journal instead of Kafka")
    parser.add_argument("--topic", choices=("telemetry", "events", "outcomes"), default="telemetry", help="%(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if not options.journal and not options.arm:
        parser.error("--arm NAME, or --journal PATH")
    try:
        verdict = _judge(options.bootstrap, options.arm, options.journal, options.topic)
    except JudgeError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({"ok": verdict.ok, **asdict(verdict)}, indent=2) if options.json else verdict)
    return 0 if verdict.ok else 1


def _judge(bootstrap: str, arm: str, journal: Path | None, topic: Topic) -> Verdict:
    if journal:
        return judge_journal(journal, topic)
    if topic == "telemetry":
        return asyncio.run(judge(bootstrap, arm))
    return asyncio.run(judge_entries(bootstrap, arm, topic))


if __name__ == "__main__":
    sys.exit(main())
