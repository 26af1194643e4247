"""The only place that gives numbers: to samples, to rows of telemetry, to events and outcomes.

Per motor, and per topic and partition, sequence numbers count 1, 2, 3, ... within a stream (the identity of the journal
that keeps them), across restarts; ids of rows and entries count through the whole journal. Event times are made here
too, and held to never fall for a motor.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gateway.event_time import EventTime
from gateway.telemetry import Records, blank, by_partition

_COPIED = (
    "position_rad",
    "velocity_rad_s",
    "temperature_c",
    "voltage_v",
    "current_a",
    "torque_nm",
    "status",
    "vendor_error",
    "round_trip_us",
)


class Head(NamedTuple):
    """The newest record of a motor: its sequence number (0: none yet) and event time."""

    seq: int
    sampled_at_ns: int


class Stamp:
    """Numbers samples and dates them. Goes on behind ``heads``, the newest records that the journal holds.

    ``row`` and ``entry`` are its newest ids, ``entry_heads`` the newest sequence numbers {(topic, partition): seq}.
    """

    def __init__(
        self,
        stream: int,
        heads: Mapping[int, Head],
        time: EventTime,
        row: int = 0,
        entry: int = 0,
        entry_heads: Mapping[tuple[str, int], int] | None = None,
    ) -> None:
        self._stream = stream
        self._time = time
        self._heads = dict(heads)
        self._row = row
        self._entry = entry
        self._entry_heads = dict(entry_heads or {})

    def seq(self, partition: int) -> int:
        """The newest sequence number that a motor was given."""
        return self._heads[partition].seq

    def row(self) -> int:
        """The id of the next row of telemetry."""
        self._row += 1
        return self._row

    def entry(self, topic: str, partition: int) -> tuple[int, int]:
        """Id and sequence number of the next event or outcome."""
        self._entry += 1
        seq = self._entry_heads[topic, partition] = self._entry_heads.get((topic, partition), 0) + 1
        return self._entry, seq

    def skip(self, partition: int, count: int) -> tuple[int, int]:
        """Numbers first..last for ``count`` samples of a motor that were lost before they came here."""
        head = self._heads[partition]
        self._heads[partition] = head._replace(seq=head.seq + count)
        return head.seq + 1, head.seq + count

    def stamp(self, samples: NDArray[np.void]) -> Records:
        """Records (dtype RECORD) of samples (dtype SAMPLE), sorted by partition and by arrival within each.

        ``samples`` are in the order of their arrival; every motor must be in the ``heads`` given at construction.
        """
        samples = samples[np.argsort(samples["motor"], kind="stable")]
        records = blank(len(samples))
        records["partition"] = samples["motor"]
        records["stream"] = self._stream
        for name in _COPIED:
            records[name] = samples[name]
        times = self._time.of(samples["sampled_at_ns"])
        first = 0
        for partition, mine in by_partition(records):
            head = self._heads[partition]
            end = first + len(mine)
            mine["seq"] = np.arange(head.seq + 1, head.seq + 1 + len(mine), dtype=np.uint64)
            ascending = np.maximum.accumulate(np.maximum(times[first:end], head.sampled_at_ns))
            mine["sampled_at_ns"] = ascending
            self._heads[partition] = Head(head.seq + len(mine), int(ascending[-1]))
            first = end
        return records
