"""The simulator process, and the real-time scheduling that it and the workers ask for."""

import pickle
import subprocess
import sys
from pathlib import Path

from drivers.sim.build import SimulationSettings
from gateway import link
from gateway.simulator import SimulatedBusPlan, SimulatorPlan
from tests.gateway_parts import wait_for
from tests.memory_loop import make_motor

SETTINGS = SimulationSettings()


def test_bus_that_cannot_be_reached_keeps_no_other_bus_away(tmp_path: Path) -> None:
    reached = tmp_path / "links" / "serial0"
    plan = SimulatorPlan(
        (
            SimulatedBusPlan("socketcan", "nocan7", (make_motor("damiao", 1),), SETTINGS, None, (), "can0"),
            SimulatedBusPlan("serial", str(reached), (make_motor("feetech_sts", 2),), SETTINGS, None, (), "serial0"),
        ),
        realtime=False,
    )
    ours, theirs = link.pair()
    with theirs:
        command = [sys.executable, "-m", "gateway.simulator", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True)
    with ours:
        ours.send(pickle.dumps(plan))
        wait_for(reached.exists)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 0
    assert told.count("simulated bus can0: cannot open") == 1
    assert not reached.exists()


def test_process_with_deadlines_has_timers_without_slack() -> None:
    code = "from gateway.realtime import set_realtime; set_realtime(1); print(open('/proc/self/timerslack_ns').read())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(told.stdout) <= 1
