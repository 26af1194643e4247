"""What every benchmark tells: the machine, medians and percentiles, one table a question."""

import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

PACKAGES = ("aiokafka", "mcap", "msgspec", "numpy", "pyarrow", "pyserial", "python-can")


def machine() -> dict[str, Any]:
    """Where the figures come from; they mean little without."""
    models = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    return {
        "processor": ", ".join(sorted(models)) or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "packages": {name: version(name) for name in PACKAGES},
    }


class Stolen:
    """What this machine's host has given to others of its processors since this was made: a cause of late figures."""

    def __init__(self) -> None:
        self._total, self._stolen = _ticks()

    @property
    def share(self) -> float:
        """0 to 1; 0 also where the kernel does not know."""
        total, stolen = _ticks()
        return (stolen - self._stolen) / max(1, total - self._total)


def _ticks() -> tuple[int, int]:
    """Of all processors since the machine's start: all ticks, and stolen ones (proc_stat(5))."""
    counts = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(counts), counts[7]


def spread(values: Iterable[float], percentiles: Sequence[float] = (50, 99, 99.9)) -> dict[str, float]:
    """{"p50": ..., "p99": ..., "max": ...} of ``values``; empty for none."""
    array = np.fromiter(values, float)
    if not len(array):
        return {}
    found = np.percentile(array, percentiles).tolist()
    return {f"p{p:g}": value for p, value in zip(percentiles, found, strict=True)} | {"max": float(array.max())}


def median(values: Iterable[float]) -> float:
    """The median; NaN of nothing."""
    array = np.fromiter(values, float)
    return float(np.median(array)) if len(array) else float("nan")


def over_runs(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median over runs of each figure."""
    return {name: median(run[name] for run in runs if name in run) for name in (runs[0] if runs else ())}


def show(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], note: str = ""
) -> None:
    """Print a table: the first column names, the others are figures."""
    table = Table(title=title, caption=note or None, title_justify="left", caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(table)


def _cell(value: object) -> str:
    if value is None or value != value:  # noqa: PLR0124  NaN is the value that differs from itself
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
