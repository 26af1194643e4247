"""The only place that gives sequence numbers.

Per motor they count 1, 2, 3, ... within a stream (the identity of the journal that keeps them), across restarts.
Event times are made here too, and held to never fall for a motor.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gateway.event_time import EventTime
from gateway.telemetry import Records, blank

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
    """Numbers samples and dates them. Goes on behind ``heads``, the newest records that the journal holds."""

    def __init__(self, stream: int, heads: Mapping[int, Head], time: EventTime) -> None:
        self._stream = stream
        self._time = time
        size = max(heads, default=0) + 1
        self._seq = np.zeros(size, np.uint64)
        self._last_ns = np.zeros(size, np.int64)
        for partition, head in heads.items():
            self._seq[partition] = head.seq
            self._last_ns[partition] = head.sampled_at_ns

    def stamp(self, samples: NDArray[np.void]) -> Records:
        """Records (dtype RECORD) of samples (dtype SAMPLE) that are in the order of their arrival.

        Every motor in ``samples`` must be in the ``heads`` given at construction.
        """
        records = blank(len(samples))
        motors = samples["motor"]
        records["partition"] = motors
        records["stream"] = self._stream
        for name in _COPIED:
            records[name] = samples[name]
        times = self._time.of(samples["sampled_at_ns"])
        for motor in np.unique(motors):
            mine = np.flatnonzero(motors == motor)
            records["seq"][mine] = self._seq[motor] + np.arange(1, len(mine) + 1, dtype=np.uint64)
            self._seq[motor] += np.uint64(len(mine))
            ascending = np.maximum.accumulate(np.maximum(times[mine], self._last_ns[motor]))
            records["sampled_at_ns"][mine] = ascending
            self._last_ns[motor] = ascending[-1]
        return records
