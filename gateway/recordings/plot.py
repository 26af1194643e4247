"""A span of the log to look at: position, speed, temperature, lateness and events, as a picture or as sparklines.

A span of any length is read with flat memory. Of what falls on one point of the picture, the lowest and the highest
value are drawn, so that a single late sample in a million is seen. A line ends where samples are missing.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from drivers.clock import MS, SECOND
from gateway import extras
from gateway.events import ARM
from gateway.log_reader import Entries, LogError, Samples, records
from gateway.recordings.envelope import Envelope, Floats, column_of

QUANTITIES = (("position", "rad"), ("speed", "rad/s"), ("temperature", "°C"), ("lateness", "ms"))
LATENESS = 3  # among them; until it is drawn, the gap between samples in ns
LATE = 3.0  # nominal gaps between samples: beyond it, they are not joined
MARKS = 1024  # events of a kind and motor that are told apart

WIDTH_IN, DPI = 15, 120
HEIGHTS_IN = (3.4, 2.5, 1.5, 2)  # of each of QUANTITIES
LANE_IN = 0.24  # of a motor's events
LANE = "0.93"
BAD, WORTH_A_LOOK, GOOD, OTHER = "#c0222b", "#e08a00", "#2a8c4a", "#6b7785"
COLOURS = {  # of events
    BAD: {"motor.offline", "motor.fault", "motor.over_temperature", "motor.latched", "estop.latched", "bus.down",
          "telemetry.gap", "journal.failed", "journal.full"},
    WORTH_A_LOOK: {"motor.late", "motor.stopped", "bus.trouble", "kafka.down", "kafka.refused", "kafka.contested",
                   "clock.stepped", "command.unreadable", "journal.set_aside"},
    GOOD: {"motor.online", "motor.fault_cleared", "motor.released", "estop.reset", "bus.up", "kafka.up",
           "journal.recovered"},
}  # fmt: skip
TIMES = ["%Y", "%b %Y", "%d %b", "%H:%M", "%H:%M", "%H:%M:%S.%f"]  # ticks that are years, ..., seconds apart
SYMBOLS = "ovs^DPX*<>pd"
WORDS, NARROWEST = 34, 10  # columns of what stands before a sparkline, and of the shortest one
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class Trace:
    """What is seen of one motor."""

    seen: Envelope = field(default_factory=lambda: Envelope(len(QUANTITIES)))
    samples: int = 0
    last_ns: int | None = None
    gaps_ns: list[float] = field(default_factory=list)  # the median of each part

    def add(self, part: Samples) -> None:
        """Take in the next samples."""
        at_ns = part.records["sampled_at_ns"]
        gaps = np.diff(at_ns, prepend=at_ns[:1] if self.last_ns is None else self.last_ns).astype(float)
        if self.last_ns is None:
            gaps[0] = np.nan
        told = (part.records[name] for name in ("position_rad", "velocity_rad_s", "temperature_c"))
        values = np.column_stack((*told, gaps))
        values[~np.isfinite(values)] = np.nan  # infinity cannot be drawn
        self.seen.add(at_ns, values)
        if len(gaps) > 1:
            self.gaps_ns.append(float(np.median(gaps[1:])))
        self.samples += len(part.records)
        self.last_ns = int(at_ns[-1])

    @property
    def nominal_ns(self) -> float:
        """The usual gap between samples."""
        return float(np.median(self.gaps_ns)) if self.gaps_ns else 0.0

    def as_drawn(self, values: Floats) -> Floats:
        """``values`` (of the envelope) in the units of QUANTITIES."""
        drawn = values.copy()
        drawn[:, LATENESS] = ((drawn[:, LATENESS] - self.nominal_ns) / MS).clip(0)
        return drawn


class Survey:
    """What a span looks like, once every part of it has been added."""

    def __init__(self) -> None:
        self.arm = ""
        self.traces: dict[str, Trace] = {}
        self.events: dict[tuple[str, str], Envelope] = {}
        """When, by type and motor."""

    def add(self, part: Samples | Entries) -> None:
        """Take in samples, or entries of the events topic."""
        if isinstance(part, Samples):
            self.traces.setdefault(part.motor, Trace()).add(part)
            return
        found: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
        for event in records(part):
            found[str(event.value.get("type", "?")), event.motor].append(event.at_ns)
        for kind, at_ns in found.items():
            self.events.setdefault(kind, Envelope(0, MARKS)).add(np.array(at_ns), np.empty((len(at_ns), 0)))

    def motors(self) -> list[str]:
        """All that have samples or events: joint2 before joint10."""
        names = self.traces.keys() | {motor for _, motor in self.events} - {ARM}
        return sorted(names, key=lambda name: [word.zfill(9) for word in re.split(r"(\d+)", name)])

    def span_ns(self) -> tuple[int, int]:
        """The times of the first and last of all. Raises LogError if there is nothing."""
        seen = [trace.seen.at_ns for trace in self.traces.values()] + [times.at_ns for times in self.events.values()]
        if not seen:
            raise LogError(f"arm {self.arm}: nothing to draw in this span")
        begin, end = min(int(at[0]) for at in seen), max(int(at[-1]) for at in seen)
        return begin, max(end, begin + 1)

    def title(self) -> str:
        """Whose, when, and how much."""
        begin, end = (datetime.fromtimestamp(at / SECOND, UTC) for at in self.span_ns())
        to = f"{end:%T}" if end.date() == begin.date() else f"{end:%F %T}"
        samples = sum(trace.samples for trace in self.traces.values())
        motors = ", ".join(self.traces) if len(self.traces) < 3 else f"{len(self.traces)} motors"
        return f"{self.arm}: {begin:%F %T} to {to} UTC, {samples:,} samples of {motors or 'no motor'}"


def check_picture(path: Path) -> None:
    """Raises LogError if ``path`` cannot be a picture, ExtraMissing without matplotlib."""
    if path.suffix not in {".png", ".svg"}:
        raise LogError(f"{path}: must end in .png or .svg")
    extras.load("matplotlib.figure", "plot")


def picture(survey: Survey, path: Path) -> None:
    """Draw it; the suffix of ``path``, .png or .svg, is its format. Raises as ``check_picture`` and ``span_ns``."""
    check_picture(path)
    dates = extras.load("matplotlib.dates", "plot")
    heights_in = [*HEIGHTS_IN, LANE_IN * (1 + len(survey.motors()))]
    size_in = WIDTH_IN, 1 + sum(heights_in)
    figure = extras.load("matplotlib.figure", "plot").Figure(size_in, DPI, layout="constrained")
    figure.suptitle(survey.title(), x=0.01, ha="left", weight="bold")
    *panels, lanes = figure.subplots(
        len(heights_in), sharex=True, gridspec_kw={"height_ratios": heights_in}, subplot_kw={"axisbelow": True}
    )
    for number, motor in enumerate(motor for motor in survey.motors() if motor in survey.traces):
        style = {"color": f"C{number % 10}", "ls": ("-", "--", ":")[number // 10 % 3], "label": motor}
        _draw_course(panels[:LATENESS], survey.traces[motor], **style)
        _draw_lateness(panels[LATENESS], survey.traces[motor], style["color"])
    for panel, (name, unit) in zip(panels, QUANTITIES, strict=True):
        panel.set_ylabel(f"{name}\n{unit}")
        panel.grid(color=LANE)
    panels[LATENESS].set_yscale("symlog", linthresh=1)
    panels[LATENESS].set_ylim(0, max(panels[LATENESS].get_ylim()[1], 10))
    panels[LATENESS].yaxis.set_major_formatter("{x:g}")
    for line in _explain(panels[0]).get_lines():
        line.set_linewidth(3)
    _mark(lanes, panels, survey)
    _explain(lanes)
    lanes.margins(x=0.01)
    lanes.set_xlabel("UTC")
    ticks = dates.AutoDateLocator()
    lanes.xaxis.set_major_locator(ticks)
    lanes.xaxis.set_major_formatter(
        dates.ConciseDateFormatter(ticks, formats=TIMES, zero_formats=TIMES, show_offset=False)
    )
    for axes in (*panels, lanes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _draw_course(panels: list[Any], trace: Trace, **style: Any) -> None:
    """A line through the lowest and highest of each bin; a NaN ends it where samples are missing."""
    seen = trace.seen
    broken = np.flatnonzero(np.diff(seen.at_ns) > LATE * trace.nominal_ns + 2 * seen.width_ns) + 1
    at = np.insert(seen.at_ns, broken, seen.at_ns[broken]).repeat(2).astype("M8[ns]")
    values = np.insert(np.stack([seen.low, seen.high], axis=1), broken, np.nan, axis=0)  # (bins, 2, quantities)
    for quantity, panel in enumerate(panels):
        panel.plot(at, values[:, :, quantity].ravel(), lw=0.9, **style)


def _draw_lateness(panel: Any, trace: Trace, colour: str) -> None:
    """A dot for each bin, with a stem where a sample or more did not come at all."""
    at, late = trace.seen.at_ns.astype("M8[ns]"), trace.as_drawn(trace.seen.high)[:, LATENESS]
    panel.plot(at, late, ".", ms=2, color=colour)
    stem = late > trace.nominal_ns / MS
    panel.vlines(at[stem], 0, late[stem], color=colour, lw=0.9)


def _mark(lanes: Any, panels: list[Any], survey: Survey) -> None:
    """Events: a lane for each motor and a mark for each; what is no good news, as a line through all panels too."""
    names = [*survey.motors(), ARM]
    for number, kind in enumerate(sorted({kind for kind, _ in survey.events})):
        colour = next((colour for colour, kinds in COLOURS.items() if kind in kinds), OTHER)
        at = {motor: times.at_ns.astype("M8[ns]") for (one, motor), times in survey.events.items() if one == kind}
        lane = np.concatenate([np.full(len(times), names.index(motor)) for motor, times in at.items()])
        times = np.concatenate(list(at.values()))
        lanes.scatter(times, lane, label=kind, c=colour, marker=SYMBOLS[number % len(SYMBOLS)], s=36, zorder=3)
        if colour in {BAD, WORTH_A_LOOK}:
            for panel in panels:
                panel.vlines(times, 0, 1, transform=panel.get_xaxis_transform(), color=colour, lw=0.7, alpha=0.4)
    lanes.set_yticks(range(len(names)), ["arm" if name == ARM else name for name in names])
    lanes.set_ylim(len(names) - 0.5, -0.5)
    lanes.set_ylabel("events")
    lanes.grid(axis="y", color=LANE)


def _explain(panel: Any) -> Any:
    """What is drawn there, beside it."""
    handles = panel.get_legend_handles_labels()
    return panel.legend(*handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")


def sparklines(survey: Survey, width: int) -> Iterator[str]:
    """The same as lines of text, ``width`` columns each, but no narrower than they can be."""
    begin, end = survey.span_ns()
    names = max(map(len, (*survey.motors(), "arm"))) + 2
    bins = max((len(trace.seen.at_ns) for trace in survey.traces.values()), default=1)
    columns = max(NARROWEST, min(width - names - WORDS - 1, bins))
    yield survey.title()
    for motor in (*survey.motors(), ARM):
        lines = _courses(survey.traces[motor], begin, end, columns) if motor in survey.traces else []
        for (kind, of), times in sorted(survey.events.items()):
            if of == motor:
                marks = np.full(columns, " ")
                marks[column_of(times.at_ns, begin, end, columns)] = "|"
                lines.append((kind, "".join(marks)))
        for number, (words, line) in enumerate(lines):
            name = "" if number else "arm" if motor == ARM else motor
            yield f"{name:<{names}}{words:<{WORDS}} {line}"


def _courses(trace: Trace, begin_ns: int, end_ns: int, columns: int) -> list[tuple[str, str]]:
    """What is told of each quantity, and its sparkline; nothing of one that the motor does not tell."""
    lows, highs = map(trace.as_drawn, trace.seen.columns(begin_ns, end_ns, columns))
    return [
        (f"{name:<12}{f'{np.nanmin(low):.2f} to {np.nanmax(high):.2f} {unit}':>{WORDS - 12}}", sparkline(low, high))
        for (name, unit), low, high in zip(QUANTITIES, lows.T, highs.T, strict=True)
        if not np.isnan(low).all()
    ]


def sparkline(low: Floats, high: Floats) -> str:
    """A block for each column, as high as that of its values which is farthest from the usual; a space for NaN."""
    middle = np.nanmedian((low + high) / 2)
    value = np.where(high - middle >= middle - low, high, low)
    bottom, top = np.nanmin(value), np.nanmax(value)
    steps = (value - bottom) / ((top - bottom) or 1) * (len(BLOCKS) - 1)
    return "".join(" " if np.isnan(step) else BLOCKS[round(step)] for step in steps)
