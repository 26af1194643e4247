"""What one event costs from the worker link to the broker's acknowledgement, stage by stage, and how long it takes.

Two loads: the pace of six motors at 500 Hz, and as fast as it goes. aiokafka's batch calls alone are the peer of the
second. Runs of all kinds alternate, so that a noisy minute falls on every kind.
"""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

from rich.console import Console

from hil.bench import pipeline
from hil.bench.report import median, over_runs, show
from hil.kafka import Broker

RUNS = 3
BUDGET_P99_MS = 5.0
BUDGET_EVENTS_PER_S = 300_000.0
MARGIN_S = 60.0


def run(console: Console, seconds: float) -> dict[str, Any]:
    """Measure and tell."""
    found: dict[str, list[dict[str, Any]]] = {}
    with Broker() as broker:
        paced = pipeline.Run(broker.bootstrap, seconds)
        flat_out = replace(paced, rate_hz=0.0, buses=1, motors_per_bus=6)
        kinds = {
            "paced": ["pipeline", pipeline.as_json(paced)],
            "paced, by stage": ["pipeline", pipeline.as_json(pipeline.with_stages(paced))],
            "flat out": ["pipeline", pipeline.as_json(flat_out)],
            "flat out, by stage": ["pipeline", pipeline.as_json(pipeline.with_stages(flat_out))],
            "peer": ["peer", broker.bootstrap, str(seconds)],
        }
        for number in range(RUNS):
            for kind, (module, *arguments) in kinds.items():
                console.print(f"[dim]run {number + 1} of {RUNS}: {kind}", highlight=False)
                found.setdefault(kind, []).append(_run(module, *arguments, timeout_s=seconds + MARGIN_S))
    return _tell(console, found)


def _run(module: str, *arguments: str, timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", f"hil.bench.{module}", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout_s)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _tell(console: Console, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    names = ("events_per_s", "cpu_us_per_event", "cpu_share")
    loads = {
        kind: over_runs([{name: run[name] for name in names if name in run} for run in runs])
        for kind, runs in found.items()
    }
    latency_ms = over_runs([run["latency_ms"] for run in found["paced"]])
    ratio = median(
        ours["events_per_s"] / peers["events_per_s"]
        for ours, peers in zip(found["flat out"], found["peer"], strict=True)
    )
    show(
        console,
        "event-cost: gateway process, link to acknowledged",
        ("load", "events/s", "us of processor an event", "share of a core"),
        [(kind, *(figures.get(name) for name in names)) for kind, figures in loads.items()],
        f"Medians of {RUNS} runs. Flat out against aiokafka's batch calls alone: {ratio:.2f} of its events/s. "
        f"Budget flat out: {BUDGET_EVENTS_PER_S:,.0f}/s.",
    )
    show(
        console,
        "event-cost: sample to acknowledged, paced, ms",
        ("", *latency_ms),
        [("paced", *latency_ms.values())],
        f"Budget: p99 <= {BUDGET_P99_MS:g} ms.",
    )
    stages = {
        load: over_runs([run["stages_us"] for run in found[f"{load}, by stage"]]) for load in ("paced", "flat out")
    }
    rows = []
    for stage in stages["paced"]:
        row: list[object] = [stage]
        for load, figures in stages.items():
            row += [figures[stage], f"{100 * figures[stage] / loads[f'{load}, by stage']['cpu_us_per_event']:.1f} %"]
        rows.append(row)
    totals: list[object] = ["sum of the stages"]
    for load, figures in stages.items():
        totals += [sum(figures.values()), f"{100 * sum(figures.values()) / _cost(loads, load):.1f} %"]
    rows.append(totals)
    show(
        console,
        "event-cost: processor by stage, us an event",
        ("stage", "paced", "share", "flat out", "share"),
        rows,
        "Shares are of the process's own processor time in the same, instrumented runs. The event loop and the writer "
        "thread are what is left of their threads' time, so the sum checks that no thread is missed, not the stages. "
        + "Instrumented runs cost "
        + ", ".join(
            f"{_cost(loads, load) / loads[load]['cpu_us_per_event']:.2f} times a plain one {load}" for load in stages
        )
        + ".",
    )
    return {
        "runs": found,
        "loads": loads,
        "latency_ms": latency_ms,
        "stages_us": stages,
        "ratio_to_peer": ratio,
        "budgets": {"latency_p99_ms": BUDGET_P99_MS, "events_per_s": BUDGET_EVENTS_PER_S},
    }


def _cost(loads: dict[str, dict[str, float]], load: str) -> float:
    return loads[f"{load}, by stage"]["cpu_us_per_event"]
