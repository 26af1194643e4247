"""Telemetry as NumPy arrays, for scripts and notebooks: ``read_samples("journal.db")["joint2"]["position_rad"]``.

An array has the fields of the log, one row a sample, and goes as it is into ``pandas.DataFrame(array)`` or
``polars.from_numpy(array)``. Fields in SI units, as their names say; NaN is what the motor does not tell.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gateway.log_reader import Missed, Samples, Start, Time
from gateway.source import open_source
from gateway.span import cut, ns_of
from gateway.telemetry import FIELD_NAMES, RECORD, Records

SAMPLE = np.dtype([(name, RECORD[name]) for name in FIELD_NAMES])
"""One sample: as in the log, without what makes it a protobuf message."""
_log = logging.getLogger(__name__)


def read_samples(
    source: str | Path,
    motors: Collection[str] | None = None,
    start: Start | datetime = "beginning",
    until: int | datetime | None = None,
    *,
    kafka: Sequence[str] | None = None,
) -> dict[str, NDArray[np.void]]:
    """{motor: its samples, dtype SAMPLE} of a span, in memory; 60 bytes a sample.

    ``source`` and ``kafka`` as in ``gateway.source``; ``until``, in ns since 1970 if it is a number, is the first time
    that is left out. What the log has lost is told by a warning. Raises LogError, also for a motor without samples.
    """

    async def read() -> dict[str, list[bytes]]:
        pieces: dict[str, list[bytes]] = {}
        async for motor, samples in stream_samples(source, motors, start, until, kafka=kafka):
            pieces.setdefault(motor, []).append(samples.tobytes())
        return pieces

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        found = asyncio.run(read())
    else:  # a notebook has a loop of its own
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(asyncio.run, read()).result()
    # np.concatenate would compare the fields of every array first
    return {motor: np.frombuffer(bytearray().join(pieces), SAMPLE) for motor, pieces in found.items()}


async def stream_samples(
    source: str | Path,
    motors: Collection[str] | None = None,
    start: Start | datetime = "beginning",
    until: int | datetime | None = None,
    *,
    follow: bool = False,
    kafka: Sequence[str] | None = None,
) -> AsyncIterator[tuple[str, NDArray[np.void]]]:
    """As ``read_samples``, piece by piece: a motor and its next samples. With ``follow`` it waits for more."""
    begin = Time(ns_of(start)) if isinstance(start, datetime) else start
    end = ns_of(until) if isinstance(until, datetime) else until
    async with open_source(source, ["telemetry"], begin, follow=follow, kafka=kafka) as log:
        async for part in cut(log, motors=motors, until_ns=end):
            match part:
                case Samples():
                    yield part.motor, plain(part.records)
                case Missed():
                    _log.warning("%s: %s", source, part)


def plain(records: Records) -> NDArray[np.void]:
    """A copy of ``records``, dtype SAMPLE."""
    samples = np.empty(len(records), SAMPLE)
    for name in FIELD_NAMES:
        samples[name] = records[name]
    return samples
