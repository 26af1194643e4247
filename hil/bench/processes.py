"""Processor time and memory of other processes, from /proc."""

import os
import time
from pathlib import Path
from typing import NamedTuple

_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


class Scheduled(NamedTuple):
    """What the kernel's scheduler says of a process, all its threads that live, since they began."""

    ran_ns: int
    waited_ns: int  # ready to run, and none of the processors free
    times: int  # that it was put on one

    @classmethod
    def of(cls, pid: int) -> "Scheduled":
        """From /proc/PID/task/TID/schedstat."""
        tasks = [(task / "schedstat").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()]
        return cls(*(sum(map(int, column)) for column in zip(*tasks, strict=True)))

    def __sub__(self, before: "Scheduled") -> "Scheduled":
        """What came in between."""
        return Scheduled(*(now - then for now, then in zip(self, before, strict=True)))


def cpu_s(pid: int) -> float:
    """Processor time that a process has used, all its threads, s."""
    # the name in parentheses may hold anything; utime and stime are fields 14 and 15
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_A_SECOND


def pss_mb(pid: int) -> float:
    """Memory, pages that are shared counted in parts, MB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/{pid}/smaps_rollup tells no Pss")


def children(pid: int) -> dict[int, list[str]]:
    """{pid: command line} of the processes that this one has started."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found[int(child)] = Path(f"/proc/{child}/cmdline").read_text().split("\0")[:-1]
    return found


def shares(pids: dict[str, int], seconds: float) -> dict[str, float]:
    """{name: share of one core} over the next ``seconds``."""
    before, since = {name: cpu_s(pid) for name, pid in pids.items()}, time.monotonic()
    time.sleep(seconds)
    took_s = time.monotonic() - since
    return {name: (cpu_s(pid) - before[name]) / took_s for name, pid in pids.items()}
