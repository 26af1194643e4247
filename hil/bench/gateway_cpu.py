"""The whole gateway as a user runs it, six simulated motors at 500 Hz: processor and memory, process by process.

The motors are a process of their own behind pseudo-terminals (serial bytes, and slcan for the CAN bus), which does not
count. On python-can's virtual interface the CAN motors would live in the bus's worker: that is measured too, and
its worker's figure holds the simulation.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from hil.bench import processes
from hil.bench.report import show
from hil.kafka import Broker

SERVO_GATEWAY = Path(sys.executable).with_name("servo-gateway")
RATE_HZ = 500
SECONDS_LEAST = 20.0
SETTLE_S = 4.0
START_S = 30.0
BUDGET_SHARE, BUDGET_MB = 0.15, 150.0

ARM = """
[arm]
name = "bench-{name}"
state_dir = "{directory}"
{kafka}
[simulation]
[[bus]]
name = "can0"
type = "can"
interface = "{interface}"
channel = "can0"
rate_hz = {rate}
[[bus]]
name = "serial0"
type = "serial"
rate_hz = {rate}
"""
MOTOR = """
[[motor]]
name = "joint{number}"
partition = {partition}
bus = "{bus}"
protocol = "{protocol}"
id = {number}
position_rad = [-2.0, 2.0]
velocity_rad_s = 5.0
temperature_c = 80.0
"""


def run(console: Console, seconds: float) -> dict[str, Any]:
    """Measure and tell."""
    seconds = max(seconds, SECONDS_LEAST)
    found = {}
    with Broker() as broker:
        for interface in ("slcan", "virtual"):
            for servers in ("", broker.bootstrap):
                kind = f"{interface}, {'Kafka' if servers else 'journal alone'}"
                console.print(f"[dim]{kind}, {seconds:g} s", highlight=False)
                found[kind] = _run(interface, servers, seconds)
    _tell(console, found, seconds)
    return {"runs": found, "seconds": seconds, "budgets": {"share_of_a_core": BUDGET_SHARE, "pss_mb": BUDGET_MB}}


def _run(interface: str, servers: str, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="servo-gateway-bench-") as directory:
        config = Path(directory, "arm.toml")
        kafka = f'[kafka]\nbootstrap_servers = ["{servers}"]' if servers else ""
        text = ARM.format(
            name=Path(directory).name, directory=f"{directory}/state", kafka=kafka, interface=interface, rate=RATE_HZ
        )
        for number in range(1, 7):
            bus, protocol = ("can0", "damiao") if number <= 3 else ("serial0", "feetech_sts")
            text += MOTOR.format(number=number, partition=number - 1, bus=bus, protocol=protocol)
        config.write_text(text)
        gateway = subprocess.Popen(
            [str(SERVO_GATEWAY), "run", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            return _watch(gateway, Path(directory, "state", "status.json"), bool(servers), seconds)
        finally:
            gateway.send_signal(signal.SIGTERM)
            gateway.communicate(timeout=START_S)


def _watch(gateway: subprocess.Popen[bytes], status: Path, kafka: bool, seconds: float) -> dict[str, Any]:
    _wait_until_all_are_online(gateway, status, kafka)
    time.sleep(SETTLE_S)
    pids = {"gateway": gateway.pid}
    for pid, command in processes.children(gateway.pid).items():
        if "gateway.simulator" in command:
            pids["simulator"] = pid
        elif "gateway.worker" in command:
            pids[f"worker {pid}"] = pid
    before = _status(status)
    shares = processes.shares(pids, seconds)
    after = _status(status)
    counted = [name for name in pids if name != "simulator"]
    samples = sum(m["seq"] for m in after["motors"]) - sum(m["seq"] for m in before["motors"])
    workers = sorted((name for name in pids if name.startswith("worker")), key=lambda name: pids[name])
    buses = dict(zip(workers, (f"worker {bus['bus']}" for bus in after["buses"]), strict=True))
    return {
        "share_of_a_core": {buses.get(name, name): share for name, share in shares.items()},
        "pss_mb": {buses.get(name, name): processes.pss_mb(pid) for name, pid in pids.items()},
        "sum_share": sum(shares[name] for name in counted),
        "sum_pss_mb": sum(processes.pss_mb(pids[name]) for name in counted),
        "samples_per_s": samples / (after["at_ns"] - before["at_ns"]) * 1e9,
        "skipped_cycles": sum(b["skipped_cycles"] for b in after["buses"])
        - sum(b["skipped_cycles"] for b in before["buses"]),
        "lag": max(m["lag"] or 0 for m in after["motors"]),
    }


def _status(path: Path) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(path.read_bytes())
    return status


def _wait_until_all_are_online(gateway: subprocess.Popen[bytes], path: Path, kafka: bool) -> None:
    until = time.monotonic() + START_S
    while True:
        if gateway.poll() is not None:
            assert gateway.stderr
            raise RuntimeError(f"the gateway ended: {gateway.stderr.read().decode()}")
        status = _status(path) if path.exists() else None
        online = status is not None and all(motor["state"] == "online" for motor in status["motors"])
        if status and online and (not kafka or status["kafka"]["state"] == "up"):
            return
        if time.monotonic() > until:
            raise RuntimeError(f"the gateway is not ready after {START_S:g} s: {status}")
        time.sleep(0.1)


def _tell(console: Console, found: dict[str, dict[str, Any]], seconds: float) -> None:
    names = list(dict.fromkeys(name for run in found.values() for name in run["share_of_a_core"]))
    show(
        console,
        f"gateway-cpu: six motors at {RATE_HZ} Hz, percent of one core over {seconds:g} s",
        ("CAN bus, log", "samples/s", *names, "sum without simulator", "budget"),
        [
            (
                kind,
                run["samples_per_s"],
                *(100 * run["share_of_a_core"].get(name, float("nan")) for name in names),
                100 * run["sum_share"],
                100 * BUDGET_SHARE,
            )
            for kind, run in found.items()
        ],
        "virtual: worker can0 simulates its three motors itself, so its figure and the sum hold that too.",
    )
    show(
        console,
        "gateway-cpu: memory (PSS), MB",
        ("CAN bus, log", *names, "sum without simulator", "budget"),
        [
            (
                kind,
                *(run["pss_mb"].get(name, float("nan")) for name in names),
                run["sum_pss_mb"],
                BUDGET_MB,
            )
            for kind, run in found.items()
        ],
    )
