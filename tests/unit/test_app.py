"""What the gateway makes of samples and notices beside keeping them: events; for faults and heat, one an episode."""

from pathlib import Path
from typing import Any

import pytest

from drivers.motor import Status
from drivers.notices import BusTrouble, BusUp
from gateway.app import Gateway
from gateway.config import loads
from gateway.events import EventType
from gateway.journal import Batch
from gateway.state_dir import StateDir
from gateway.telemetry import blank
from gateway.writer import Committed
from tests.gateway_parts import ARM, make_config

FAULT, FAULT_CLEARED = EventType.MOTOR_FAULT, EventType.MOTOR_FAULT_CLEARED
HOT = EventType.MOTOR_OVER_TEMPERATURE
OVERLOAD, VOLTAGE = Status.FAULT_OVERLOAD, Status.FAULT_VOLTAGE


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        pytest.param([(Status.ENABLED, 25), (Status(0), 25)], [], id="healthy"),
        pytest.param([(OVERLOAD, 25)] * 3 + [(Status(0), 25)] * 2, [FAULT, FAULT_CLEARED], id="an episode"),
        pytest.param([(OVERLOAD, 25), (OVERLOAD | VOLTAGE, 25)], [FAULT, FAULT], id="another fault"),
        pytest.param([(Status(0), 61), (Status(0), 59), (Status(0), 61)], [HOT], id="a flickering sensor"),
        pytest.param([(Status(0), 61), (Status(0), 57), (Status(0), 61)], [HOT, HOT], id="hot twice"),
    ],
)
async def test_faults_and_heat_are_told_once_an_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: list[tuple[Status, float]], told: list[EventType]
) -> None:
    state = StateDir(tmp_path / "state")
    state.make()
    gateway = Gateway(make_config(tmp_path), state)
    events: list[EventType] = []
    monkeypatch.setattr(gateway, "_event", lambda kind, *_, **__: events.append(kind))
    for row, (status, temperature_c) in enumerate(samples, start=1):
        records = blank(1)
        records["seq"], records["status"], records["temperature_c"] = row, status, temperature_c
        gateway.committed(Committed(Batch(row, records), ()))
    gateway._reader.close()
    gateway._writer._journal.close()
    assert events == told


@pytest.mark.parametrize(
    ("stop_on", "samples", "latched"),
    [
        pytest.param("over_temperature", [(0.0, 59), (0.0, 61), (0.0, 62)], ["61 C, limit 60 C"], id="hot"),
        pytest.param("over_temperature", [(1.6, 59)], [], id="not asked for its position"),
        pytest.param("position_limits", [(1.51, 61), (1.0, 25)], [], id="within the tolerance, not asked for its heat"),
        pytest.param(
            "position_limits", [(1.53, 25), (1.6, 25)], ["at 1.5300 rad, limits -1 to 1.5 rad"], id="too high"
        ),
        pytest.param("position_limits", [(-1.03, 25)], ["at -1.0300 rad, limits -1 to 1.5 rad"], id="too low"),
    ],
)
async def test_motor_stops_itself_on_what_is_configured_once_an_episode(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_on: str,
    samples: list[tuple[float, float]],
    latched: list[str],
) -> None:
    state = StateDir(tmp_path / "state")
    state.make()
    text = ARM.replace("temperature_c", f'stop_on = ["{stop_on}"]\ntemperature_c', 1)
    gateway = Gateway(loads(text, tmp_path / "arm.toml"), state)
    told: list[str] = []
    monkeypatch.setattr(gateway._commander, "latch", lambda _view, why: told.append(why))
    for row, (position_rad, temperature_c) in enumerate(samples, start=1):
        records = blank(1)
        records["seq"], records["position_rad"], records["temperature_c"] = row, position_rad, temperature_c
        gateway.committed(Committed(Batch(row, records), ()))
    gateway._reader.close()
    gateway._writer._journal.close()
    assert told == latched


async def test_trouble_on_a_bus_is_an_event_and_stands_on_the_board_until_the_bus_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = StateDir(tmp_path / "state")
    state.make()
    gateway = Gateway(make_config(tmp_path), state)
    events: list[tuple[EventType, dict[str, Any]]] = []
    monkeypatch.setattr(gateway, "_event", lambda kind, **details: events.append((kind, details)))
    gateway.heard_notice("serial0", BusTrouble("echo", 3, "it comes back"))
    told = {"bus": "serial0", "what": "echo", "count": 3, "detail": "it comes back"}
    assert events == [(EventType.BUS_TROUBLE, told)]
    assert gateway.board.snapshot()["buses"][0]["troubles"] == {"echo": 3}
    gateway.heard_notice("serial0", BusUp())
    assert gateway.board.snapshot()["buses"][0]["troubles"] == {}
    gateway._reader.close()
    gateway._writer._journal.close()
