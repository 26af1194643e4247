"""A log to read back: any values that a record can hold, in a journal that the real writer's journal made."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from gateway import telemetry
from gateway.journal import Batch, Changes, Journal, StoredEntry
from gateway.telemetry import FIELD_NAMES, Records
from tests.gateway_parts import MOTORS

ROW = 500  # samples in a row of the journal
BEGIN_NS = 1_790_000_000_123_456_789
PERIOD_NS = 5_000_000


def make_records(count: int, seed: int = 1) -> Records:
    """``count`` samples of each of MOTORS, by turns, PERIOD_NS apart; every bit of a value at random."""
    random = np.random.default_rng(seed)
    records = telemetry.blank(count * len(MOTORS))
    for name in FIELD_NAMES:
        records[name] = np.frombuffer(random.bytes(len(records) * records[name].itemsize), records[name].dtype)
    records["temperature_c"][::3] = np.nan
    records["stream"] = 7
    records["seq"] = 1 + np.arange(len(records)) // len(MOTORS)
    records["partition"] = np.arange(len(records)) % len(MOTORS)
    records["sampled_at_ns"] = BEGIN_NS + PERIOD_NS * (records["seq"].astype(np.int64) - 1) + records["partition"]
    return records


def make_journal(path: Path, records: Records, entries: Sequence[StoredEntry] = ()) -> Path:
    """A journal with these; each row sorted by partition, as the gateway's are."""
    with closing(Journal(path, "arm1", MOTORS, 1 << 30)) as journal:
        for row, first in enumerate(range(0, len(records), ROW), 1):
            some = records[first : first + ROW]
            journal.commit(Changes(batch=Batch(row, some[np.argsort(some["partition"], kind="stable")])))
        journal.commit(Changes(entries=list(entries)))
    return path


def of_motor(records: Records, partition: int) -> Records:
    """The samples of one motor."""
    mine: Records = records[records["partition"] == partition]
    return mine
