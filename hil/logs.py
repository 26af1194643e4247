"""The two logs of an arm, read from outside: topics in Kafka with aiokafka, a journal with SQLite, read-only.

The journal's layout, as docs/log.md has it: table ``stream`` (stream: 8 bytes, little-endian; arm), ``motors``
(partition, name), ``telemetry`` (id, crc, records) and ``entries`` (id, topic, partition, seq, at_ns, key, value). A
blob of records is a row of ``u16 partition, servo.Telemetry`` each, and ``crc`` the blob's CRC-32.
"""

import asyncio
import sqlite3
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from hil.contract import Block, JudgeError, fits, layout

ANSWER_S = 30.0  # a broker that brings nothing for so long does not answer
ROWS = 1024  # of a journal, read at once
BUSY_S = 5.0


class NoTopic(JudgeError):
    """The broker has no such topic."""


# --- Kafka ---------------------------------------------------------------------------------------------------------


async def read(bootstrap: str, topic: str) -> AsyncIterator[ConsumerRecord]:
    """Every record that a topic holds now, in order within each partition. Never creates the topic.

    Raises NoTopic, or JudgeError if the broker does not answer.
    """
    async for records in read_many(bootstrap, topic):
        for record in records:
            yield record


async def read_many(bootstrap: str, topic: str) -> AsyncIterator[list[ConsumerRecord]]:
    """As ``read``, many records of one partition at a time."""
    try:
        partitions = [TopicPartition(topic, number) for number in range(await partition_count(bootstrap, topic))]
        consumer = AIOKafkaConsumer(
            bootstrap_servers=bootstrap,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            request_timeout_ms=10_000,
        )
        await consumer.start()
        try:
            ends = await consumer.end_offsets(partitions)
            left = {tp for tp, first in (await consumer.beginning_offsets(partitions)).items() if first < ends[tp]}
            consumer.assign(sorted(left))
            while left:
                async with asyncio.timeout(ANSWER_S):
                    found: dict[TopicPartition, list[ConsumerRecord]] = {}
                    while not found:
                        found = await consumer.getmany(*left, timeout_ms=500)
                for tp, records in found.items():
                    if records[-1].offset + 1 >= ends[tp]:
                        left.discard(tp)
                        yield [record for record in records if record.offset < ends[tp]]
                    else:
                        yield records
        finally:
            await consumer.stop()
    except (KafkaError, TimeoutError) as error:
        raise JudgeError(f"{bootstrap}, topic {topic}: {type(error).__name__}: {error}") from error


async def partition_count(bootstrap: str, topic: str) -> int:
    """How many partitions a topic has. Raises NoTopic."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        if topic not in await admin.list_topics():
            raise NoTopic(f"{bootstrap} has no topic {topic}")
        return len((await admin.describe_topics([topic]))[0]["partitions"])
    finally:
        await admin.close()


# --- the journal ---------------------------------------------------------------------------------------------------


class Damage(NamedTuple):
    """Rows from..to of a journal's table that cannot be read, and why."""

    from_id: int
    to_id: int
    why: str


class StoredEntry(NamedTuple):
    """A row of ``entries``."""

    id: int
    topic: str
    partition: int
    seq: int
    key: str
    value: bytes


class JournalFile:
    """A journal, whoever writes it meanwhile; each read is a short transaction of its own."""

    def __init__(self, path: Path) -> None:
        """Raises JudgeError if this is no journal, or not even its head can be read."""
        self.path = path
        if not path.exists():
            raise JudgeError(f"there is no journal {path}")
        self._db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=BUSY_S)
        try:
            stream, self.arm = self._db.execute("SELECT stream, arm FROM stream").fetchone()
            self.motors: dict[int, str] = dict(self._db.execute("SELECT partition, name FROM motors"))
            self._crc = "crc" if self._db.execute("PRAGMA user_version").fetchone()[0] >= 3 else "NULL"  # of entries
        except (sqlite3.Error, TypeError) as error:
            self._db.close()
            raise JudgeError(f"journal {path}: {error}") from error
        self.stream = int.from_bytes(stream, "little")

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def first_row(self) -> int:
        """The id of the oldest row of telemetry; 1 unless older ones were trimmed."""
        return int((self._one("SELECT min(id) FROM telemetry") or (1,))[0] or 1)

    def blocks(self) -> Iterator[Block | Damage]:
        """All telemetry; within each partition in the order of the rows."""
        dtype = layout(("partition", "<u2"))
        for rows in self._rows("telemetry", "id, crc, records"):
            if isinstance(rows, Damage):
                yield rows
                continue
            whole, ids = [], []
            for row, crc, blob in rows:
                if not isinstance(blob, bytes) or zlib.crc32(blob) != crc or len(blob) % dtype.itemsize:
                    yield Damage(row, row, "the checksum of its records is wrong")
                    continue
                whole.append(blob)
                ids.append((row, len(blob) // dtype.itemsize))
            records = np.frombuffer(b"".join(whole), dtype)
            if not len(records):
                continue
            if not fits(records):
                yield Damage(rows[0][0], rows[-1][0], "what a row holds is no servo.Telemetry")
                continue
            places = np.repeat(*(np.array(column, np.int64) for column in zip(*ids, strict=True)))
            for partition in np.unique(records["partition"]).tolist():
                mine = records["partition"] == partition
                yield Block(partition, places[mine], self.motors.get(partition, ""), records[mine])

    def entries(self, topic: str) -> Iterator[StoredEntry | Damage]:
        """All events or outcomes, in the order of their ids."""
        columns = f"id, CAST(topic AS BLOB), partition, seq, at_ns, CAST(key AS BLOB), value, {self._crc}"
        for rows in self._rows("entries", columns):
            if isinstance(rows, Damage):
                yield rows
                continue
            for row in rows:
                number, of, partition, seq, _, key, value, crc = row
                if tuple(map(type, row[:-1])) != (int, bytes, int, int, int, bytes, bytes):
                    yield Damage(number, number, "a column is of another type")
                elif crc not in {None, zlib.crc32(b"%d %s %d %d %d %s %s" % tuple(row[:-1]))}:
                    yield Damage(number, number, "its checksum is wrong")
                elif of == topic.encode():
                    yield StoredEntry(number, topic, partition, seq, key.decode(errors="replace"), value)

    def _rows(self, table: str, columns: str) -> Iterator[list[Any] | Damage]:
        """The rows, many at a time; around what SQLite calls malformed, one at a time."""
        at, many, end = 0, ROWS, None
        bad: Damage | None = None
        while True:
            try:
                sql = f"SELECT {columns} FROM {table} WHERE id > ? ORDER BY id LIMIT ?"
                rows = self._db.execute(sql, (at, many)).fetchall()
            except sqlite3.DatabaseError as error:
                end = end or self._end(table, at)
                if many > 1:
                    many = 1
                    continue
                at += 1
                bad = Damage(bad.from_id if bad else at, at, str(error))
                if at >= end:
                    yield bad
                    return
                continue
            if bad:
                yield bad
                bad, many = None, ROWS
            if not rows:
                return
            yield rows
            at = max(at + 1, rows[-1][0])  # a damaged page may bring ids in any order

    def _end(self, table: str, at: int) -> int:
        """The id of the newest row; where not even that can be read, a look ahead."""
        newest = self._one(f"SELECT max(id) FROM {table}")
        return int(newest[0] or 0) if newest else at + 100 * ROWS

    def _one(self, sql: str) -> tuple[int | None, ...] | None:
        try:
            found: tuple[int | None, ...] | None = self._db.execute(sql).fetchone()
        except sqlite3.DatabaseError:
            return None
        return found
