"""Journals written by hand, from the documented layout alone (docs/log.md), so that each can have any fault."""

import json
import sqlite3
import struct
import zlib
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

SCHEMA = """
CREATE TABLE stream    (id INTEGER PRIMARY KEY, stream BLOB NOT NULL, arm TEXT NOT NULL);
CREATE TABLE motors    (partition INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE telemetry (id INTEGER PRIMARY KEY, crc INTEGER NOT NULL, records BLOB NOT NULL);
CREATE TABLE entries   (id INTEGER PRIMARY KEY, topic TEXT, partition INTEGER, seq INTEGER, at_ns INTEGER, key TEXT,
                        value BLOB, crc INTEGER);
PRAGMA user_version = 3;
"""
Row = Sequence[tuple[int, bytes]]
"""(partition, message) of each record."""


def write_journal(
    path: Path, stream: int, rows: Iterable[Row], entries: Iterable[tuple[str, int, int, dict[str, Any]]] = ()
) -> Path:
    """A journal of arm "arm" with motors joint1 on partition 0, joint2 on 1; entries: topic, partition, seq, value."""
    with closing(sqlite3.connect(path)) as db, db:
        db.executescript(SCHEMA)
        db.execute("INSERT INTO stream VALUES (0, ?, 'arm')", (stream.to_bytes(8, "little"),))
        db.executemany("INSERT INTO motors VALUES (?, ?)", [(0, "joint1"), (1, "joint2")])
        for row in rows:
            blob = b"".join(struct.pack("<H", partition) + message for partition, message in row)
            db.execute("INSERT INTO telemetry (crc, records) VALUES (?, ?)", (zlib.crc32(blob), blob))
        for number, (topic, partition, seq, value) in enumerate(entries, 1):
            columns = (number, topic, partition, seq, value["at_ns"], value["motor"], json.dumps(value))
            crc = zlib.crc32(" ".join(map(str, columns)).encode())
            db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, CAST(? AS BLOB), ?)", (*columns, crc))
    return path
