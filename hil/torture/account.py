"""What became of every record: from the topics and the journals alone, set-aside ones included.

offered    every number that was given: the highest that any log or event names, and samples that were told to be lost
           before they got one
lost       not in the topic, and no event names it
told       not in the topic, but named by an event ``telemetry.gap``
stall      the longest hole between a sample of a motor and that with the next number, while the gateway lived and did
           not tell that the motor was away; steps of the clock subtracted
"""

import asyncio
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drivers.clock import MS, SECOND
from hil.judge import JudgeError, Told, judge, judge_entries, judge_journal, read, told_gaps
from hil.torture.rig import Kept, aside

HOLE_NS = 50 * MS  # ten periods of the sample configuration; shorter holes are a busy machine's
NEAR_NS = SECOND // 2  # an event that explains a hole lies in it, or so near
STEP_TOLD_NS = 3 * SECOND  # a step is told when it is noticed, in the new time
AWAY = frozenset({"motor.late", "motor.offline", "motor.online"})


@dataclass(slots=True)
class Account:
    """The sums, and in ``wrong`` all that nothing accounts for."""

    offered: int = 0
    published: int = 0
    lost: int = 0
    told: int = 0
    repeated: int = 0
    disordered: int = 0
    streams: int = 0
    stall_ms: float = 0.0
    stall_at: str = ""
    commands: int = 0
    unanswered: int = 0
    events: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def settle(
    bootstrap: str, arm: str, places: Sequence[Path], before: Kept, issued: Collection[str], *, flipped: bool
) -> Account:
    """The account of an arm whose gateway has stopped. Raises JudgeError if there is nothing to judge.

    ``places``: its state directory, and others where journals that it set aside lie; ``before``: what journals held
    before their bits were ``flipped``; ``issued``: commands that the broker took.
    """
    return _Settling(bootstrap, arm, places, before, issued, flipped=flipped).settle()


class _Settling:
    def __init__(
        self,
        bootstrap: str,
        arm: str,
        places: Sequence[Path],
        before: Kept,
        issued: Collection[str],
        *,
        flipped: bool,
    ) -> None:
        self._bootstrap = bootstrap
        self._arm = arm
        self._paths = [places[0] / "journal.db", *(path for place in places for path in aside(place))]
        self._before = before
        self._issued = issued
        self._flipped = flipped
        self._found = Account()
        self._highest: Counter[tuple[int, str]] = Counter()

    def settle(self) -> Account:
        found, topic = self._found, Kept()
        verdict = asyncio.run(judge(self._bootstrap, self._arm, watch_block=topic.take))
        found.repeated, found.disordered = verdict.total("repeats"), verdict.total("disorders")
        found.streams = verdict.streams
        if verdict.total("other_faults") or found.repeated or found.disordered:
            found.wrong += [f"telemetry: {fault}" for fault in verdict.faults[:5]]
        told = asyncio.run(told_gaps(self._bootstrap, self._arm))
        events = asyncio.run(_values(self._bootstrap, f"servo.{self._arm}.events"))
        found.events = dict(Counter(event["type"] for event in events))
        self._entries()
        self._journals(topic, told)
        self._records(topic, told, events)
        self._stall(topic, events)
        return found

    def _entries(self) -> None:
        for name in ("events", "outcomes"):
            verdict = asyncio.run(judge_entries(self._bootstrap, self._arm, name))
            self._found.wrong += [f"{name}: {fault}" for fault in verdict.faults[:5]]
            if name == "outcomes" and verdict.unfinished:
                self._found.wrong.append(f"accepted, and no final outcome: {', '.join(verdict.unfinished)}")
        outcomes = asyncio.run(_values(self._bootstrap, f"servo.{self._arm}.outcomes"))
        answered = {outcome["command_id"] for outcome in outcomes if outcome["state"] != "accepted"}
        missing = [name for name in self._issued if name not in answered]
        self._found.commands, self._found.unanswered = len(self._issued), len(missing)
        if missing:
            self._found.wrong.append(f"{len(missing)} commands got no final outcome: {', '.join(missing[:5])}")

    def _journals(self, topic: Kept, told: Sequence[Told]) -> None:
        """Each journal by itself, and what it holds that the topic does not."""
        for path in self._paths:
            kept = Kept()
            try:
                verdicts = [judge_journal(path, watch_block=kept.take, told=told)]
                verdicts += [judge_journal(path, name) for name in ("events", "outcomes")]
            except JudgeError as error:
                (self._found.notes if path.suffix != ".db" and self._flipped else self._found.wrong).append(str(error))
                continue
            faults = [f"{path.name}: {fault}" for verdict in verdicts for fault in verdict.faults]
            # what flipped bits have damaged is judged by whether the topic has it, or an event names it
            (self._found.notes if self._flipped else self._found.wrong).extend(faults[:5])
            self._differences(topic, kept, path.name)
            self._note_highest(kept)
        self._differences(topic, self._before, "a journal before its bits were flipped")
        self._note_highest(self._before)

    def _note_highest(self, kept: Kept) -> None:
        for key, (seqs, _) in kept.records().items():
            self._highest[key] = max(self._highest[key], int(seqs[-1]))

    def _differences(self, topic: Kept, other: Kept, name: str) -> None:
        """A number that names two samples."""
        published = topic.records()
        for key, (seqs, times) in other.records().items():
            if key not in published:
                continue
            theirs, their_times = published[key]
            _, mine_at, theirs_at = np.intersect1d(seqs, theirs, assume_unique=True, return_indices=True)
            if count := int((times[mine_at] != their_times[theirs_at]).sum()):
                self._found.wrong.append(f"{key[1]}: {count} numbers name other samples in {name} than in the topic")

    def _records(self, topic: Kept, told: Sequence[Told], events: Sequence[Mapping[str, Any]]) -> None:
        found, published = self._found, topic.records()
        self._note_highest(topic)
        for one in told:
            key = one.stream, one.motor
            self._highest[key] = max(self._highest[key], one.to_seq)
        for key, highest in sorted(self._highest.items()):
            stream, motor = key
            here = np.zeros(highest + 1, bool)
            if key in published:
                here[published[key][0]] = True
            held = int(here.sum())
            named = here.copy()
            for one in told:
                if (one.stream, one.motor) == key:
                    named[one.from_seq : one.to_seq + 1] = True
            lost = np.flatnonzero(~named[1:]) + 1
            found.offered += highest
            found.published += held
            found.told += int(named.sum()) - held
            found.lost += len(lost)
            if len(lost):
                found.wrong.append(f"{motor}: {len(lost)} lost of stream {stream}: seq {_ranges(lost)}")
        for event in events:
            if event["type"] == "telemetry.gap" and "from_seq" not in event:
                found.told += event["count"]
                found.offered += event["count"]
        began = 1 + found.events.get("journal.set_aside", 0)
        if found.streams > began:
            found.wrong.append(f"{found.streams} streams, and {began - 1} events journal.set_aside")

    def _stall(self, topic: Kept, events: Sequence[Mapping[str, Any]]) -> None:
        """Only within a stream: a new one begins with a new run."""
        steps = [(event["at_ns"], event["step_ns"]) for event in events if event["type"] == "clock.stepped"]
        starts = [event["at_ns"] for event in events if event["type"] == "gateway.started"]
        for (stream, motor), (seqs, times) in topic.records().items():
            away = [event["at_ns"] for event in events if event["type"] in AWAY and event["motor"] == motor]
            holes = np.flatnonzero((np.diff(times) > HOLE_NS) & (np.diff(seqs) == 1))  # what is lost was polled
            for at in holes.tolist():
                begin, end = int(times[at]), int(times[at + 1])
                if _any_in([*starts, *away], begin - NEAR_NS, end + NEAR_NS):
                    continue
                # it may be less than the step: event time was ahead of a clock that had stepped back
                stepped = sum(step for when, step in steps if step > 0 and begin <= when <= end + STEP_TOLD_NS)
                stall_ms = (end - begin - stepped) / MS
                if stall_ms > self._found.stall_ms:
                    self._found.stall_ms = stall_ms
                    self._found.stall_at = f"{motor}, behind seq {seqs[at]} of stream {stream}, {begin}"


async def _values(bootstrap: str, topic: str) -> list[dict[str, Any]]:
    return [json.loads(record.value) async for record in read(bootstrap, topic)]


def _any_in(times: Sequence[int], begin: int, end: int) -> bool:
    return any(begin <= at <= end for at in times)


def _ranges(seqs: NDArray[np.int64]) -> str:
    """``1-5, 9`` of 1, 2, 3, 4, 5, 9; the first few."""
    parts = np.split(seqs, np.flatnonzero(np.diff(seqs) > 1) + 1)
    words = [f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts]
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")
