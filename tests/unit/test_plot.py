"""A plot shows what was there: each motor, each unit, each event, the worst sample, and where there are no samples."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from gateway import telemetry
from gateway.events import EventType
from gateway.extras import ExtraMissing
from gateway.log_reader import Entries, LogEntry, LogError, Position, Samples
from gateway.recordings.plot import BLOCKS, COLOURS, QUANTITIES, WORDS, Survey, picture, sparkline, sparklines
from gateway.telemetry import Records
from tests.log_parts import BEGIN_NS, PERIOD_NS

COUNT = 2000  # of each motor


def make_samples(motor: str = "joint1", count: int = COUNT) -> Samples:
    records = telemetry.blank(count)
    records["sampled_at_ns"] = BEGIN_NS + PERIOD_NS * np.arange(count)
    records["position_rad"] = np.sin(np.arange(count) / 200)
    records["temperature_c"] = 25
    return as_part(motor, records)


def as_part(motor: str, records: Records) -> Samples:
    return Samples(0, motor, np.arange(len(records)), records, Position(7, len(records)))


def make_event(kind: str, motor: str, at_ns: int) -> Entries:
    entry = LogEntry(0, 7, 1, at_ns, motor, b'{"type":"%s","motor":"%s"}' % (kind.encode(), motor.encode()))
    return Entries("events", 0, [entry], Position(7, 1))


def survey_of(*parts: Samples | Entries) -> Survey:
    survey = Survey()
    survey.arm = "arm1"
    for part in parts:
        survey.add(part)
    return survey


@pytest.fixture
def survey() -> Survey:
    return survey_of(
        make_samples("joint1"),
        make_samples("joint2"),
        make_event("motor.offline", "joint2", BEGIN_NS + COUNT // 2 * PERIOD_NS),
        make_event("new.kind", "*", BEGIN_NS),
    )


def test_svg_names_motors_units_and_events(survey: Survey, tmp_path: Path) -> None:
    from matplotlib import rc_context

    out = tmp_path / "plot.svg"
    with rc_context({"svg.fonttype": "none"}):  # text as text
        picture(survey, out)
    texts = {" ".join(node.itertext()) for node in ElementTree.parse(out).iter("{http://www.w3.org/2000/svg}text")}
    words = " ".join(texts)
    for wanted in ("joint1", "joint2", "motor.offline", "new.kind", "UTC", "4,000 samples of joint1, joint2"):
        assert wanted in words
    for name, unit in QUANTITIES:
        assert name in words
        assert unit in words


def test_png_is_a_picture_that_is_not_blank(survey: Survey, tmp_path: Path) -> None:
    from matplotlib.image import imread

    out = tmp_path / "plot.png"
    picture(survey, out)
    pixels = imread(out)
    assert pixels.shape[0] > 1000
    assert pixels.shape[1] > 1000
    assert len(np.unique((255 * pixels).astype(np.uint8).view(np.uint32))) > 10  # colours


@pytest.mark.parametrize("count", [1, 2, COUNT])
def test_what_a_motor_does_not_tell_is_left_out_without_a_warning(tmp_path: Path, count: int) -> None:
    part = make_samples(count=count)
    part.records["temperature_c"] = np.nan
    part.records["velocity_rad_s"][:1] = np.inf
    picture(survey_of(part), tmp_path / "plot.png")
    told = {line[8:].split()[0] for line in [*sparklines(survey_of(part), 100)][1:]}
    assert told == ({"position"} if count == 1 else {"position", "speed", "lateness"})


def test_events_alone_are_drawn(tmp_path: Path) -> None:
    alone = survey_of(make_event("motor.offline", "joint2", BEGIN_NS))
    picture(alone, tmp_path / "plot.png")
    assert [*sparklines(alone, 100)][1].split() == ["joint2", "motor.offline", "|"]


def test_nothing_is_an_error_that_says_whose(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="arm1: nothing to draw in this span"):
        picture(survey_of(), tmp_path / "plot.png")


def test_other_suffix_is_refused_by_name(survey: Survey, tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"plot\.bmp: must end in \.png or \.svg"):
        picture(survey, tmp_path / "plot.bmp")


def test_without_matplotlib_it_says_what_to_install(
    survey: Survey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")] or ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ExtraMissing, match=r"matplotlib is not installed: pip install 'servo-gateway\[plot\]'"):
        picture(survey, tmp_path / "plot.png")
    assert len([*sparklines(survey, 100)]) > len(QUANTITIES)  # these need nothing


@pytest.mark.parametrize("pieces", [1, 7, 700])
def test_lateness_is_what_a_gap_has_over_the_usual_wherever_parts_end(pieces: int) -> None:
    whole = make_samples().records
    late = np.delete(whole, slice(1000, 1003))  # three samples did not come: 15 ms
    survey = survey_of(*(as_part("joint1", some) for some in np.array_split(late, pieces)))
    trace = survey.traces["joint1"]
    lateness = trace.as_drawn(trace.seen.high)[:, 3]
    assert np.nanmax(lateness) == pytest.approx(15)
    assert trace.seen.at_ns[np.nanargmax(lateness)] == pytest.approx(whole["sampled_at_ns"][1003], abs=PERIOD_NS)
    assert (lateness > 0.001).sum() == 1


def test_sparklines_are_as_wide_as_asked_for_and_say_bounds_with_units(survey: Survey) -> None:
    title, *lines = sparklines(survey, 100)
    assert title.startswith("arm1: 2026-09-21 14:13:20 to 14:13:30 UTC, 4,000 samples of joint1, joint2")
    assert {len(line) for line in lines} == {100}
    assert lines[0].startswith("joint1  position         -1.00 to 1.00 rad ")
    (offline,) = [line for line in lines if "motor.offline" in line]
    begin = len("joint1  ") + WORDS + 1
    assert offline.index("|") == pytest.approx((begin + 100) / 2, abs=1)
    assert lines[-1].startswith("arm     new.kind  ")
    assert lines[-1].index("|") == begin


def test_narrow_terminal_still_shows_something(survey: Survey) -> None:
    assert all(len(line) < 60 for line in [*sparklines(survey, 5)][1:])


def test_event_that_is_no_json_is_marked_too() -> None:
    entry = LogEntry(0, 7, 1, BEGIN_NS, "joint1", b"nonsense \xff")
    assert survey_of(Entries("events", 0, [entry], Position(7, 1))).events.keys() == {("?", "joint1")}


def test_colours_are_of_events_that_there_are() -> None:
    assert set().union(*COLOURS.values()) < set(EventType)


def test_motors_come_in_the_order_of_their_numbers() -> None:
    assert survey_of(*(make_samples(f"joint{n}", 2) for n in (10, 2, 1))).motors() == ["joint1", "joint2", "joint10"]


def test_sparkline_shows_a_spike_to_either_side_and_where_nothing_is() -> None:
    low, high = np.array([1.0, -9.0, np.nan, 1.0, 1.0]), np.array([1.0, 1.0, np.nan, 9.0, 1.0])
    middle = BLOCKS[4]
    assert sparkline(low, high) == f"{middle}{BLOCKS[0]} {BLOCKS[-1]}{middle}"
    assert sparkline(np.ones(3), np.ones(3)) == BLOCKS[0] * 3
