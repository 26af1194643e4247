"""Real-time scheduling for the processes that have deadlines, where the system allows it."""

import contextlib
import os
from pathlib import Path

# by default the kernel lets a thread oversleep by 50 us, to wake up seldom; SCHED_FIFO knows no slack (proc(5))
_TIMER_SLACK = Path("/proc/self/timerslack_ns")


def set_realtime(priority: int) -> bool:
    """Ask for SCHED_FIFO and timers without slack; False where the system does not allow SCHED_FIFO.

    For the main thread, and threads that are started later.
    """
    with contextlib.suppress(OSError):
        _TIMER_SLACK.write_text("1")
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except OSError:
        return False
    return True
