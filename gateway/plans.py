"""From a configuration to what each child process needs: pure translation, no process is started here."""

from dataclasses import replace
from pathlib import Path

from drivers.buses import BusSpec, CanSpec, Rs485, SerialSpec
from drivers.clock import MS, SECOND
from drivers.cycle import Timing
from drivers.sim.build import SimulationSettings
from gateway.config import CanBus, Config, SerialBus, Simulation
from gateway.simulator import SimulatedBusPlan
from gateway.state_dir import StateDir
from gateway.worker import Plan

VIRTUAL = "virtual"
"""The one python-can interface whose other end has to live in the worker's process."""
SHARED = frozenset({"socketcan", "udp_multicast"})
"""Interfaces of python-can that simulated motors can be on too, from another process; an adapter has no other end."""
UDP_GROUP = "239.74.163.2"
"""python-can's own IPv4 group for udp_multicast."""


def worker_plans(config: Config, links: Path) -> dict[str, Plan]:
    """{bus name: plan} of every worker; simulated buses that have a pseudo-terminal are found below ``links``."""
    return {bus.name: _worker_plan(config, bus, links) for bus in config.buses}


def _worker_plan(config: Config, bus: CanBus | SerialBus, links: Path) -> Plan:
    timing = Timing(
        period_ns=round(SECOND / bus.rate_hz),
        late_after_ns=round(config.arm.late_after_ms * MS),
        offline_after_ns=round(config.arm.offline_after_ms * MS),
        setpoint_ns=round(config.arm.setpoint_timeout_ms * MS),
    )
    watchdog_ns = round(config.arm.motor_watchdog_ms * MS)
    motors = tuple(replace(motor.driven(), watchdog_ns=watchdog_ns) for motor in config.motors_on(bus.name))
    hosted = config.simulation is not None and _is_virtual(bus)
    simulated = _simulated_bus(config, bus, links, pty=False) if hosted else None
    tap = StateDir(config.arm.state_dir).taps / bus.name
    return Plan(_bus_spec(config, bus, links), motors, timing, config.arm.realtime, simulated, tap)


def _bus_spec(config: Config, bus: CanBus | SerialBus, links: Path) -> BusSpec:
    simulated = config.simulation is not None
    if isinstance(bus, SerialBus):
        if simulated:
            return SerialSpec(bus.name, str(links / bus.name), bus.baudrate)
        rs485 = Rs485(**bus.rs485.model_dump()) if bus.rs485 else None
        return SerialSpec(bus.name, bus.port or "", bus.baudrate, rs485)
    if simulated and not _is_virtual(bus) and not _is_shared(bus):
        options = {"sleep_after_open": 0}  # python-can waits two seconds for adapters that reset when opened
        return CanSpec(bus.name, "slcan", str(links / bus.name), bus.bitrate, options)
    return CanSpec(bus.name, bus.interface, _channel(bus), bus.bitrate, bus.options, bus.fd, bus.data_bitrate)


def simulated_buses(
    config: Config, links: Path, *, everything: bool, faults: Path | None = None
) -> tuple[SimulatedBusPlan, ...]:
    """The buses that a simulator process hosts: ``everything``, whatever the configuration says of simulation, or
    what the gateway needs: nothing without ``[simulation]``, and no bus that lives in a worker's process.

    ``faults`` takes the place of the file that is configured.
    """
    buses = [bus for bus in config.buses if everything or (config.simulation and not _is_virtual(bus))]
    built = [_simulated_bus(config, bus, links, pty=everything) for bus in buses]
    return tuple(replace(plan, faults=faults) if faults else plan for plan in built)


def _simulated_bus(config: Config, bus: CanBus | SerialBus, links: Path, *, pty: bool) -> SimulatedBusPlan:
    """The bus with its motors; behind a pseudo-terminal if ``pty``, or if there is no other way to it."""
    simulation = config.simulation or Simulation()
    here = config.motors_on(bus.name)
    motion = StateDir(config.arm.state_dir).motion if simulation.recording else None
    traces = {motor.partition: motion / f"{motor.partition}.trace" for motor in here} if motion else {}
    host, where, options = "slcan", str(links / bus.name), {}
    if isinstance(bus, SerialBus):
        host = "serial"
    elif not pty and _is_virtual(bus):
        host, where = VIRTUAL, _channel(bus)
    elif not pty and _is_shared(bus):
        host, where, options = bus.interface, _channel(bus), bus.options
    return SimulatedBusPlan(
        host=host,
        where=where,
        motors=tuple(motor.driven() for motor in here),
        settings=SimulationSettings(
            motion="still" if motion else simulation.motion,
            enabled=simulation.enabled,
            position_rad={motor.partition: motor.position_rad for motor in here},
            velocity_rad_s={motor.partition: motor.velocity_rad_s for motor in here},
            traces={partition: trace for partition, trace in traces.items() if trace.exists()},
            playhead=motion / "playhead" if motion else None,
            bits_per_s=_bits_per_s(bus) if simulation.wire_time else 0,
            turnaround_ns=round(simulation.turnaround_us * 1000),
            seed=simulation.seed,
        ),
        faults=simulation.faults,
        elsewhere=(
            *(other.name for other in config.buses if other is not bus),
            *(motor.name for motor in config.motors if motor.bus != bus.name),
        ),
        name=bus.name,
        options=options,
    )


def _is_virtual(bus: CanBus | SerialBus) -> bool:
    return isinstance(bus, CanBus) and bus.interface == VIRTUAL


def _is_shared(bus: CanBus | SerialBus) -> bool:
    return isinstance(bus, CanBus) and bus.interface in SHARED


def _channel(bus: CanBus) -> str:
    return bus.channel or (UDP_GROUP if bus.interface == "udp_multicast" else bus.name)


def _bits_per_s(bus: CanBus | SerialBus) -> int:
    return bus.baudrate if isinstance(bus, SerialBus) else bus.bitrate
