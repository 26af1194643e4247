"""The command line ``servo-gateway``. Exit status: 0 done, 1 it failed, 2 wrong use or configuration."""

import asyncio
import contextlib
import logging
import signal
import sqlite3
import sys
import threading
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from aiokafka.errors import KafkaError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from drivers import protocols
from drivers.buses import BusSpec, CanSpec, SerialSpec, adapters
from drivers.clock import MS, SECOND, monotonic_ns
from drivers.errors import DriverError
from drivers.family import Medium
from gateway import client, log_reader, plans
from gateway import config as configuration
from gateway import scan as scanning
from gateway.cli import live
from gateway.cli.command import command
from gateway.cli.common import (
    FAILED,
    WRONG,
    ConfigFile,
    FromKafkaOption,
    FromOption,
    JsonOption,
    KafkaOption,
    brokers,
    load_config,
    parse_start,
    parse_topics,
    plain_console,
    print_json,
    to_json,
)
from gateway.cli.export import export
from gateway.cli.plot import plot
from gateway.cli.record import record_command
from gateway.cli.replay import replay_command
from gateway.cli.run import run_shown
from gateway.config import ConfigError
from gateway.draft import draft
from gateway.extras import ExtraMissing
from gateway.journal import JournalError
from gateway.kafka import TopicMismatch
from gateway.log_reader import LogError, LogReader, Missed, Record
from gateway.recordings.bus_file import BusFileError
from gateway.simulator import build_host
from gateway.source import arm_log
from gateway.state_dir import StateDir, StateDirError
from gateway.tap import TapError

DEMO = "simulated-arm.toml"

STATUS_COLUMNS = (  # key of the status file, header, digits
    ("seq", "seq", 0),
    ("position_rad", "pos\nrad", 3),
    ("velocity_rad_s", "speed\nrad/s", 2),
    ("temperature_c", "temp\nC", 0),
    ("rate_hz", "rate\nHz", 0),
    ("age_ms", "age\nms", 0),
    ("misses", "miss", 0),
    ("lag", "lag", 0),
)

app = typer.Typer(
    help="Servo telemetry gateway for robot arms: CAN and serial motors to an ordered, provable event log.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")]


def main() -> None:
    """Entry point: errors that a user can mend become one message and an exit status."""
    live.quieten_libraries(logging.CRITICAL)  # what goes wrong is told by us, once
    try:
        app()
    except (ConfigError, TopicMismatch, JournalError, LogError, BusFileError) as error:
        _fail(str(error), WRONG)
    except (
        StateDirError, DriverError, TapError, client.CommandError, KafkaError, ExtraMissing, OSError, sqlite3.Error,
    ) as error:  # fmt: skip
        _fail(str(error) or type(error).__name__, FAILED)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _fail(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)


@app.command()
def demo(kafka: KafkaOption = None, verbose: VerboseOption = False) -> None:
    """Run a simulated six-motor arm with a live view; nothing to set up."""
    path = configuration.shipped(DEMO)
    config = load_config(path, kafka)
    run_shown(config, verbose=verbose)
    journal = StateDir(config.arm.state_dir).journal
    shown = path if not path.is_relative_to(Path.cwd()) else path.relative_to(Path.cwd())
    print(f"Kept in {journal}. Look at it with: servo-gateway tail {shown} --from beginning")


@app.command()
def run(config: ConfigFile, kafka: KafkaOption = None, verbose: VerboseOption = False) -> None:
    """Run the gateway of an arm until Ctrl-C or SIGTERM."""
    run_shown(load_config(config, kafka), verbose=verbose)


@app.command()
def simulate(
    config: ConfigFile,
    link: Annotated[Path, typer.Option("--link", metavar="DIR", help="Where to put a link to each bus.")],
    faults: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Faults of motors (TOML), reread when it changes.")
    ] = None,
) -> None:
    """Run only the simulated motors; DIR/<bus> leads to each bus's pseudo-terminal (slcan for a CAN bus)."""
    loaded = load_config(config)
    if loaded.simulation and loaded.simulation.recording:
        raise typer.BadParameter(f"{config}: simulation.recording is for run; here motors move by simulation.motion")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with contextlib.ExitStack() as stack:
        for plan in plans.simulated_buses(loaded, link.absolute(), everything=True, faults=faults):
            stack.enter_context(build_host(plan))
            motors = ", ".join(f"{motor.name} (id {motor.bus_id})" for motor in plan.motors)
            print(f"{plan.where} -> {Path(plan.where).readlink()}: {plan.host}, {motors}", flush=True)
        stop.wait()


@app.command()
def check(config: ConfigFile, as_json: JsonOption = False) -> None:
    """Check a configuration; every fault is reported at once, with its place."""
    try:
        loaded = load_config(config)
    except ConfigError as error:
        if as_json:
            faults = [{"place": f.place, "line": f.line, "message": f.message} for f in error.faults]
            print_json({"ok": False, "faults": faults})
            sys.exit(WRONG)
        raise
    if as_json:
        print_json({"ok": True, "arm": loaded.arm.name, "motors": len(loaded.motors), "buses": len(loaded.buses)})
        return
    where = "Kafka " + ", ".join(loaded.kafka.bootstrap_servers) if loaded.kafka else "the embedded journal alone"
    simulated = ", simulated" if loaded.simulation else ""
    print(
        f"{config}: arm {loaded.arm.name}: {len(loaded.motors)} motors on {len(loaded.buses)} buses{simulated}; {where}"
    )
    for bus in loaded.buses:
        motors = ", ".join(f"{motor.name} ({motor.protocol} {motor.id})" for motor in loaded.motors_on(bus.name))
        print(f"  {bus.name}: {bus.rate_hz:g} Hz: {motors}")


@app.command()
def scan(
    serial: Annotated[str | None, typer.Option("--serial", metavar="PORT", help="Serial port to scan.")] = None,
    can: Annotated[
        str | None, typer.Option("--can", metavar="INTERFACE:CHANNEL", help="CAN channel to scan: socketcan:can0.")
    ] = None,
    baudrate: Annotated[
        list[int] | None, typer.Option(min=1, help="Only this bit rate of a serial bus; may be repeated.")
    ] = None,
    bitrate: Annotated[int, typer.Option(min=1, help="Bit rate of the CAN bus.")] = 1_000_000,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Keyword for python-can; may be repeated.")
    ] = None,
    protocol: Annotated[list[str] | None, typer.Option(help="Only this motor family; may be repeated.")] = None,
    ids: Annotated[str | None, typer.Option(metavar="1-10,15", help="Only these addresses.")] = None,
    wait: Annotated[
        float | None, typer.Option(metavar="MS", min=0, help="How long to wait for each reply, in place of 10 to 15.")
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the configuration there.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the motors on a bus and write a configuration to start from; without a bus, list what can be scanned.

    Motors are only read, never written to. Stop a gateway that uses the bus first.
    """
    if serial is None and can is None:
        _print_adapters(as_json=as_json)
        return
    spec = _scanned(serial, can, baudrate, bitrate, option)
    rounds = _rounds(spec, protocol or [], baudrate or [], ids)
    if output and output.exists() and not force:
        raise typer.BadParameter(f"--output {output}: exists; --force overwrites it")
    findings = scanning.Findings()
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    try:
        scanning.watch(console, spec, rounds, findings, None if wait is None else round(wait * MS))
    except KeyboardInterrupt:
        print("stopped before the end; no configuration is written", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:  # also what was found before it failed
        if as_json:
            print_json(findings.as_json(spec))
        elif findings.found:
            plain_console().print(scanning.table(findings))
    if not findings.found:
        _fail("no motor answered: is its power on, and are bit rate, ids and wiring (termination) right?", FAILED)
    text = draft(spec, findings.found)
    if output:
        fresh = output.with_name(f".{output.name}.new")
        fresh.write_text(text)
        fresh.replace(output)
        print(f"written: {output}; review it, then: servo-gateway check {output}", file=sys.stderr)
    elif not as_json:
        print(text, end="")
    try:
        configuration.loads(text, output or "configuration")
    except ConfigError as error:
        print(f"what the motors do not tell is still to be set there:\n{error}", file=sys.stderr)


def _scanned(
    serial: str | None, can: str | None, baudrate: list[int] | None, bitrate: int, option: list[str] | None
) -> BusSpec:
    if serial is not None and can is not None:
        raise typer.BadParameter("--serial and --can: one bus at a time")
    if serial is not None:
        if option:
            raise typer.BadParameter("--option is for --can")
        return SerialSpec("serial0", _absolute(serial), 0)  # each round has its bit rate
    if baudrate:
        raise typer.BadParameter("--baudrate is for --serial; for --can it is --bitrate")
    interface, _, channel = str(can).partition(":")
    if not interface or not channel:
        raise typer.BadParameter(f"--can {can}: must be INTERFACE:CHANNEL, for example socketcan:can0")
    return CanSpec("can0", interface, _absolute(channel), bitrate, dict(map(_keyword, option or ())))


def _absolute(device: str) -> str:
    """A device file by its whole path, as the configuration should have it."""
    return str(Path(device).absolute()) if "/" in device and Path(device).exists() else device


def _keyword(option: str) -> tuple[str, Any]:
    """A value is what it would be in a configuration; quotes around text may be left out."""
    key, equals, value = option.partition("=")
    if not (key.isidentifier() and equals):
        raise typer.BadParameter(f"--option {option}: must be KEY=VALUE")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def _rounds(spec: BusSpec, names: list[str], baudrates: list[int], ids: str | None) -> list[scanning.Round]:
    medium: Medium = "can" if isinstance(spec, CanSpec) else "serial"
    known = [name for name in protocols.family_names() if protocols.load(name).medium == medium]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"--protocol {name}: on a {medium} bus there are {', '.join(known)}")
    rates = [spec.bitrate] if isinstance(spec, CanSpec) else baudrates
    rounds = scanning.plan(names or known, rates, _ids(ids) if ids else None)
    if not rounds:
        ranges = ", ".join(f"{protocols.load(name).bus_ids[0]}-{protocols.load(name).bus_ids[-1]}" for name in known)
        raise typer.BadParameter(f"--ids {ids}: {', '.join(names or known)} have {ranges}")
    return rounds


def _ids(words: str) -> set[int]:
    found: set[int] = set()
    for word in words.split(","):
        first, dash, last = word.partition("-")
        try:
            end = min(int(last if dash else first), 0xFFFF)  # no family has as many
            found |= set(range(int(first), end + 1))
        except ValueError:
            raise typer.BadParameter(f"--ids {words}: must be numbers and ranges, for example 1-10,15") from None
    return found


def _print_adapters(*, as_json: bool) -> None:
    ports, channels = adapters.serial_ports(), adapters.can_channels()
    if as_json:
        print_json({"serial": ports, "can": channels})
        return
    for way, found in (("--serial", ports), ("--can", channels)):
        for adapter in found:
            print(f"servo-gateway scan {way} {adapter.name}  {adapter.detail}".rstrip())
    if not ports and not channels:
        print("neither a serial port with a device behind it nor a CAN channel was found; name one yourself:")
        print("  servo-gateway scan --serial PORT | --can INTERFACE:CHANNEL  (slcan:/dev/ttyACM0)")
    if any(channel.detail == "down" for channel in channels):
        print("a channel that is down: ip link set can0 up type can bitrate 1000000")


@app.command()
def status(
    config: ConfigFile,
    as_json: JsonOption = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more of each motor, not only faults.")] = False,
) -> None:
    """Show what the gateway of an arm says of itself; exit status 1 if none runs."""
    state = StateDir(load_config(config).arm.state_dir)
    pid = state.running_pid()
    found = state.read_status()
    if as_json:
        print_json({"running": pid is not None, "pid": pid, **found})
    else:
        _print_status(found, pid, verbose=verbose)
    if pid is None:
        sys.exit(FAILED)


def _print_status(found: dict[str, Any], pid: int | None, *, verbose: bool) -> None:
    console = plain_console()
    running = f"runs (process {pid})" if pid is not None else "does not run; this is the last that it said"
    console.print(f"arm {found['arm']}: gateway {running}")
    kafka = found["kafka"]
    console.print(f"kafka: {kafka['state']} {kafka['detail']}".rstrip())
    if found["journal"]["detail"]:
        console.print(f"journal: {found['journal']['detail']}")
    for name, published in found["journal"].get("set_aside", {}).items():
        what = "published, may be moved away" if published else "not published yet, leave it there"
        console.print(f"journal: {name} was set aside; {what}")
    if estop := found.get("estop"):
        console.print(f"EMERGENCY STOP {_latch(estop)}; until: command * reset_estop", style="bold red")
    for bus in found["buses"]:
        late = "-" if bus["late_p50_us"] is None else f"{bus['late_p50_us']:.0f}/{bus['late_max_us']:.0f} us"
        state = "up" if bus["up"] else f"down: {bus['detail']}"
        console.print(f"bus {bus['bus']}: {state}; {bus['cycles']} cycles, {bus['skipped_cycles']} skipped")
        console.print(
            f"  start late by {late} (median/most), {bus['stray_packets']} stray packets, {bus['garbage']} garbage"
        )
        if troubles := bus.get("troubles"):
            console.print("  troubles: " + ", ".join(f"{what} {count}" for what, count in troubles.items()))
    table = Table(box=SIMPLE_HEAD, padding=0)  # 80 columns, also with a long seq
    for header in ("motor", "state"):
        table.add_column(header)
    for _, header, _ in STATUS_COLUMNS:
        table.add_column(header, justify="right")
    table.add_column("status")
    for motor in found["motors"]:
        numbers = ["-" if motor[key] is None else f"{motor[key]:.{digits}f}" for key, _, digits in STATUS_COLUMNS]
        table.add_row(motor["motor"], motor["state"], *numbers, " ".join(_status_words(motor)))
    console.print(table)
    for motor in found["motors"]:
        if verbose:
            console.print(
                f"{motor['motor']}: {motor['protocol']} {motor['model']}, firmware {motor['firmware']}, "
                f"{motor['misses']} of {motor['polls']} polls missed"
            )
        if motor["fault"]:
            console.print(f"{motor['motor']} fault: {motor['fault']}", style="bold red")
        if latch := motor.get("latched"):
            told = f"{motor['motor']} stopped {_latch(latch)}; until: command {motor['motor']} clear_fault"
            console.print(told, style="bold red")


def _latch(latch: dict[str, Any]) -> str:
    """Who stopped it, when and why."""
    when = datetime.fromtimestamp(latch["at_ns"] / SECOND, UTC).isoformat(timespec="seconds") if latch["at_ns"] else "?"
    return f"since {when} by {latch['by']}: {latch['why']}"


def _status_words(motor: dict[str, Any]) -> list[str]:
    """The status bits, all faults as one: they are explained below the table."""
    words = [name.lower() for name in motor["status"] if not name.startswith("FAULT_")]
    words += ["fault"] if motor["fault"] else []
    return [*words, "latched"] if motor.get("latched") else words


@app.command()
def tail(
    config: ConfigFile,
    topic: Annotated[str, typer.Option(help=f"One of {', '.join(log_reader.TOPICS)}.")] = "telemetry",
    motor: Annotated[str | None, typer.Option(help="Only this motor.")] = None,
    start: FromOption = "latest",
    reader: Annotated[
        str | None, typer.Option(metavar="NAME", help="Go on where the reader of this name left off.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Stop after so many records.")] = None,
    follow: Annotated[bool, typer.Option(help="Wait for more at the end of the log.")] = True,
    kafka: KafkaOption = None,
    from_kafka: FromKafkaOption = False,
    as_json: JsonOption = False,
) -> None:
    """Print records of the log as they come: telemetry, events, outcomes, or (in Kafka) commands."""
    loaded = load_config(config, kafka)
    topics = parse_topics([topic])
    if motor is not None and motor not in {m.name for m in loaded.motors}:
        raise typer.BadParameter(f"--motor {motor}: there are {', '.join(m.name for m in loaded.motors)}")
    if (from_kafka or kafka) and loaded.kafka is None:
        raise typer.BadParameter(f"--from-kafka: {config} has no [kafka]; name a broker with --kafka HOST:PORT")
    at = brokers(kafka, from_kafka=from_kafka)
    log = arm_log(loaded, topics, parse_start(start), follow=follow, name=reader, kafka=at)
    asyncio.run(_print_records(log, motor, count, named=reader is not None, as_json=as_json))


async def _print_records(log: LogReader, motor: str | None, count: int | None, *, named: bool, as_json: bool) -> None:
    line: Callable[[Record], str] = _json_line if as_json else _text_line
    printed, committed_ns = 0, monotonic_ns()
    async with log:
        done = log.positions()
        try:
            async for part in log:
                if isinstance(part, Missed):
                    print(part, file=sys.stderr)
                    done[part.topic, part.partition] = part.next
                    continue
                for record in log_reader.records(part):
                    if motor is None or record.motor == motor:
                        print(line(record), flush=True)
                        printed += 1
                    done[part.topic, part.partition] = record.next
                    if printed == count:
                        return
                if named and monotonic_ns() - committed_ns > SECOND:
                    committed_ns = monotonic_ns()
                    await log.commit(done)
        finally:
            if named:
                await log.commit(done)


def _json_line(record: Record) -> str:
    return to_json(record.value)


def _text_line(record: Record) -> str:
    value = record.value
    if record.topic == "telemetry":
        parts = [f"{name}={_short(value[name])}" for name in ("position_rad", "velocity_rad_s", "temperature_c")]
        return f"{record.at_ns} {record.motor:<10} {value['seq']:>9} {' '.join(parts)}"
    what = value.get("type") or value.get("state") or value.get("kind") or ""
    told = {"type", "state", "kind", "motor", "at_ns"}
    details = {name: detail for name, detail in value.items() if name not in told and detail not in (None, "")}
    words = " ".join(f"{name}={_short(detail)}" for name, detail in details.items())
    return f"{record.at_ns} {record.motor:<10} {what} {words}"


def _short(value: object) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


app.command(context_settings={"ignore_unknown_options": True})(command)  # a negative VALUE is no option
app.command()(export)
app.command()(plot)
app.command("record")(record_command)
app.command("replay")(replay_command)


if __name__ == "__main__":
    main()
