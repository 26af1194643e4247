"""What stands beside a journal and tells whether it still holds everything that was given out.

A journal cannot know what it has lost: a damaged WAL ends, for SQLite, where the damage begins, and what a killed
gateway published from memory was never in it. Two witnesses can:

    status.json     the newest sequence number of each motor, at most a second old, and event time, which goes on with
                    the machine's monotonic clock
    journal.whole   is there while the journal holds everything that was given out; a full disk lets go of it, too
"""

from pathlib import Path
from typing import NamedTuple

import msgspec

from drivers.clock import monotonic_ns
from gateway.event_time import boot_id
from gateway.journal import Journal


class Evidence(NamedTuple):
    """What the status file says of a stream."""

    stream: int
    newest_ns: int  # event time: none of its records is newer
    seqs: dict[int, int]  # partition -> newest sequence number
    acknowledged: dict[int, int]  # partition -> newest that the broker had


class _Journal(msgspec.Struct):
    stream: int


class _Motor(msgspec.Struct):
    partition: int
    seq: int
    lag: int | None


class _Status(msgspec.Struct):
    at_ns: int
    journal: _Journal
    motors: list[_Motor]
    monotonic_ns: int = 0
    boot: str = ""  # of which start of the machine that time counts


def read_evidence(status: Path) -> Evidence | None:
    """The status file's; None if there is none, or it makes no sense."""
    try:
        found = msgspec.json.decode(status.read_bytes(), type=_Status)
    except (OSError, ValueError):
        return None
    seqs = {motor.partition: motor.seq for motor in found.motors}
    acknowledged = {motor.partition: motor.seq - motor.lag for motor in found.motors if motor.lag is not None}
    since_ns = max(0, monotonic_ns() - found.monotonic_ns) if found.boot == boot_id() else 0
    return Evidence(found.journal.stream, found.at_ns + since_ns, seqs, acknowledged)


def why_behind(journal: Journal, whole: Path, evidence: Evidence | None) -> str:
    """Why the journal does not hold everything that was given out; empty if it does, as far as can be told.

    ``whole`` is the path of the marker, which is missed only by a journal that has had it.
    """
    if evidence and evidence.stream == journal.stream:
        for partition, head in journal.heads.items():
            if evidence.seqs.get(partition, 0) > head.seq:
                return (
                    f"lost its newest records: {journal.motors[partition]} was at seq {evidence.seqs[partition]}, the "
                    f"journal ends at {head.seq}"
                )
    if journal.marked and not whole.exists():
        return f"lacks records that were given out while the disk did not take them ({whole} is missing)"
    return ""
