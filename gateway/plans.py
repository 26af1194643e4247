"""From a configuration to what each child process needs: pure translation, no process is started here."""

from dataclasses import replace
from pathlib import Path

from drivers.buses import BusSpec, CanSpec, SerialSpec
from drivers.clock import MS, SECOND
from drivers.cycle import Timing
from drivers.sim.build import SimulationSettings
from gateway.config import CanBus, Config, SerialBus
from gateway.simulator import SimulatedBusPlan
from gateway.worker import Plan

VIRTUAL = "virtual"
"""The one python-can interface whose other end has to live in the worker's process."""


def worker_plans(config: Config, links: Path) -> dict[str, Plan]:
    """{bus name: plan} of every worker; simulated buses that have a pseudo-terminal are found below ``links``."""
    return {bus.name: _worker_plan(config, bus, links) for bus in config.buses}


def _worker_plan(config: Config, bus: CanBus | SerialBus, links: Path) -> Plan:
    timing = Timing(
        period_ns=round(SECOND / bus.rate_hz),
        late_after_ns=round(config.arm.late_after_ms * MS),
        offline_after_ns=round(config.arm.offline_after_ms * MS),
    )
    motors = tuple(motor.driven() for motor in config.motors_on(bus.name))
    hosted = config.simulation is not None and _is_virtual(bus)
    simulated = _simulated_bus(config, bus, links) if hosted else None
    return Plan(_bus_spec(config, bus, links), motors, timing, config.arm.realtime, simulated)


def _bus_spec(config: Config, bus: CanBus | SerialBus, links: Path) -> BusSpec:
    simulated = config.simulation is not None
    if isinstance(bus, SerialBus):
        return SerialSpec(bus.name, str(links / bus.name) if simulated else bus.port or "", bus.baudrate)
    if simulated and not _is_virtual(bus):
        options = {"sleep_after_open": 0}  # python-can waits two seconds for adapters that reset when opened
        return CanSpec(bus.name, "slcan", str(links / bus.name), bus.bitrate, options)
    return CanSpec(bus.name, bus.interface, bus.channel or bus.name, bus.bitrate, bus.options)


def simulated_buses(
    config: Config, links: Path, *, everything: bool, faults: Path | None = None
) -> tuple[SimulatedBusPlan, ...]:
    """The buses that a simulator process hosts: ``everything``, whatever the configuration says of simulation, or
    what the gateway needs: nothing without ``[simulation]``, and no bus that lives in a worker's process.

    ``faults`` takes the place of the file that is configured.
    """
    buses = [bus for bus in config.buses if everything or (config.simulation and not _is_virtual(bus))]
    built = [_simulated_bus(config, bus, links, pty=True) for bus in buses]
    return tuple(replace(plan, faults=faults) if faults else plan for plan in built)


def _simulated_bus(config: Config, bus: CanBus | SerialBus, links: Path, *, pty: bool = False) -> SimulatedBusPlan:
    here = config.motors_on(bus.name)
    settings = SimulationSettings(
        motion=config.simulation.motion if config.simulation else "wave",
        enabled=config.simulation.enabled if config.simulation else True,
        position_rad={motor.partition: motor.position_rad for motor in here},
        velocity_rad_s={motor.partition: motor.velocity_rad_s for motor in here},
    )
    faults = config.simulation.faults if config.simulation else None
    motors = tuple(motor.driven() for motor in here)
    elsewhere = tuple(motor.name for motor in config.motors if motor.bus != bus.name)
    if isinstance(bus, SerialBus):
        return SimulatedBusPlan("serial", str(links / bus.name), motors, settings, faults, elsewhere)
    if pty:
        return SimulatedBusPlan("slcan", str(links / bus.name), motors, settings, faults, elsewhere)
    return SimulatedBusPlan("virtual", bus.channel or bus.name, motors, settings, faults, elsewhere)


def _is_virtual(bus: CanBus | SerialBus) -> bool:
    return isinstance(bus, CanBus) and bus.interface == VIRTUAL
