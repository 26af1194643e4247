"""Processor time and memory of other processes, from /proc."""

import os
import time
from pathlib import Path

_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


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
