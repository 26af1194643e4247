"""Real-time scheduling for the processes that have deadlines, where the system allows it."""

import os


def set_realtime(priority: int) -> bool:
    """Ask for SCHED_FIFO for this thread and those that it starts; False where the system does not allow it."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except OSError:
        return False
    return True
