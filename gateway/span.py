"""A span of the log: what a reader hands out, without what other motors did and what came too late.

Where it begins is the reader's ``start``. Parts are cut as a whole, never record by record.
"""

from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from gateway.log_reader import Entries, Key, LogError, LogReader, Missed, Part, Samples


def ns_of(at: datetime) -> int:
    """Its nanoseconds since 1970; a time without a zone is this machine's."""
    return (at.astimezone() - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1) * 1000


async def cut(
    log: LogReader, *, motors: Collection[str] | None = None, until_ns: int | None = None
) -> AsyncIterator[Part]:
    """Parts of ``log`` (entered) with these motors alone, and only what came before ``until_ns`` (event time).

    What concerns the whole arm has motor ``*``. Ends early where every partition is known, and has passed
    ``until_ns``. Raises LogError at the end for a motor that had no samples, where others had.
    """
    known = log.partitions()
    wanted = None if motors is None else frozenset(motors)
    seen: set[str] = set()
    passed: set[Key] = set()
    async for part in log:
        if isinstance(part, Samples):
            seen.add(part.motor)
        if isinstance(part, Missed):
            if (part.topic, part.partition) not in passed:
                yield part
            continue
        found = part if wanted is None else _of_motors(part, wanted)
        if found is not None and until_ns is not None:
            found = _before(found, until_ns)
        if found is not None:
            yield found
        if until_ns is not None and _last_ns(part) >= until_ns:
            passed.add((part.topic, part.partition))
            if known and passed >= known | log.partitions():
                break
    if wanted and seen and (never := sorted(wanted - seen - {"*"})):
        raise LogError(f"motor {', '.join(never)}: no samples in this span, which has {', '.join(sorted(seen))}")


def _of_motors(part: Samples | Entries, motors: Collection[str]) -> Samples | Entries | None:
    if isinstance(part, Samples):
        return part if part.motor in motors else None
    entries = [entry for entry in part.entries if entry.key in motors]
    return replace(part, entries=entries) if entries else None


def _before(part: Samples | Entries, until_ns: int) -> Samples | Entries | None:
    if isinstance(part, Entries):
        entries = [entry for entry in part.entries if entry.at_ns < until_ns]
        return replace(part, entries=entries) if entries else None
    early = part.records["sampled_at_ns"] < until_ns
    if early.all():
        return part
    return replace(part, offsets=part.offsets[early], records=part.records[early]) if early.any() else None


def _last_ns(part: Samples | Entries) -> int:
    if isinstance(part, Samples):
        return int(part.records["sampled_at_ns"][-1])
    return part.entries[-1].at_ns
