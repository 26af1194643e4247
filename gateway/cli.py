"""The command line ``servo-gateway``. Exit status: 0 done, 1 it failed, 2 wrong use or configuration."""

import asyncio
import contextlib
import logging
import signal
import sqlite3
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import typer
from aiokafka.errors import KafkaError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from drivers.errors import DriverError
from drivers.motor import Kind
from gateway import client, live, plans, readers
from gateway import config as configuration
from gateway.app import Gateway, run_gateway
from gateway.commands import Outcome, State
from gateway.config import Config, ConfigError
from gateway.journal import JournalError
from gateway.kafka import TopicMismatch
from gateway.simulator import build_host
from gateway.state_dir import StateDir, StateDirError

FAILED, WRONG = 1, 2
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

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration of the arm (TOML).")]
KafkaOption = Annotated[
    list[str] | None,
    typer.Option("--kafka", metavar="HOST:PORT", help="Broker to use instead of the one configured; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")]


def main() -> None:
    """Entry point: errors that a user can mend become one message and an exit status."""
    live.quieten_libraries(logging.CRITICAL)  # what goes wrong is told by us, once
    try:
        app()
    except (ConfigError, TopicMismatch, JournalError) as error:
        _fail(str(error), WRONG)
    except (StateDirError, DriverError, client.CommandError, KafkaError, OSError, sqlite3.Error) as error:
        _fail(str(error) or type(error).__name__, FAILED)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _fail(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)


def _load(path: Path, kafka: list[str] | None = None) -> Config:
    config = configuration.load(path)
    return configuration.with_kafka(config, kafka) if kafka else config


def config_file(name: str) -> Path:
    """A file of ``config/``: beside the package in a checkout, inside it when installed."""
    here = Path(__file__).parent
    return next(path for path in (here / "data" / name, here.parent / "config" / name) if path.exists())


@app.command()
def demo(kafka: KafkaOption = None, verbose: VerboseOption = False) -> None:
    """Run a simulated six-motor arm with a live view; nothing to set up."""
    path = config_file(DEMO)
    config = _load(path, kafka)
    _run(config, verbose=verbose)
    journal = StateDir(config.arm.state_dir).journal
    shown = path if not path.is_relative_to(Path.cwd()) else path.relative_to(Path.cwd())
    print(f"Kept in {journal}. Look at it with: servo-gateway tail {shown} --from beginning")


@app.command()
def run(config: ConfigFile, kafka: KafkaOption = None, verbose: VerboseOption = False) -> None:
    """Run the gateway of an arm until Ctrl-C or SIGTERM."""
    _run(_load(config, kafka), verbose=verbose)


def _run(config: Config, *, verbose: bool) -> None:
    console = Console(stderr=not sys.stdout.isatty())

    async def watch(gateway: Gateway) -> None:
        await (live.table(gateway.board, console) if console.is_terminal else live.lines(gateway.board))

    live.configure_logging(console, verbose=verbose)
    asyncio.run(run_gateway(config, watch))


@app.command()
def simulate(
    config: ConfigFile,
    link: Annotated[Path, typer.Option("--link", metavar="DIR", help="Where to put a link to each bus.")],
    faults: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Faults of motors (TOML), reread when it changes.")
    ] = None,
) -> None:
    """Run only the simulated motors; DIR/<bus> leads to each bus's pseudo-terminal (slcan for a CAN bus)."""
    loaded = _load(config)
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
        loaded = _load(config)
    except ConfigError as error:
        if as_json:
            faults = [{"place": f.place, "line": f.line, "message": f.message} for f in error.faults]
            _print_json({"ok": False, "faults": faults})
            sys.exit(WRONG)
        raise
    if as_json:
        _print_json({"ok": True, "arm": loaded.arm.name, "motors": len(loaded.motors), "buses": len(loaded.buses)})
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
def status(config: ConfigFile, as_json: JsonOption = False) -> None:
    """Show what the gateway of an arm says of itself; exit status 1 if none runs."""
    state = StateDir(_load(config).arm.state_dir)
    pid = state.running_pid()
    found = state.read_status()
    if as_json:
        _print_json({"running": pid is not None, "pid": pid, **found})
    else:
        _print_status(found, pid)
    if pid is None:
        sys.exit(FAILED)


def _print_status(found: dict[str, Any], pid: int | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    running = f"runs (process {pid})" if pid is not None else "does not run; this is the last that it said"
    console.print(f"arm {found['arm']}: gateway {running}")
    kafka = found["kafka"]
    console.print(f"kafka: {kafka['state']} {kafka['detail']}".rstrip())
    if found["journal"]["detail"]:
        console.print(f"journal: {found['journal']['detail']}")
    for bus in found["buses"]:
        late = "-" if bus["late_p50_us"] is None else f"{bus['late_p50_us']:.0f}/{bus['late_max_us']:.0f} us"
        console.print(
            f"bus {bus['bus']}: {'up' if bus['up'] else 'down: ' + bus['detail']}; {bus['cycles']} cycles, "
            f"{bus['skipped_cycles']} skipped, start late by {late} (median/most), {bus['stray_packets']} stray packets"
        )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("motor", "state"):
        table.add_column(header)
    for _, header, _ in STATUS_COLUMNS:
        table.add_column(header, justify="right")
    table.add_column("status")
    for motor in found["motors"]:
        numbers = ["-" if motor[key] is None else f"{motor[key]:.{digits}f}" for key, _, digits in STATUS_COLUMNS]
        flags = " ".join(motor["status"]) + (f" vendor {motor['vendor_error']:#x}" if motor["vendor_error"] else "")
        table.add_row(motor["motor"], motor["state"], *numbers, flags)
    console.print(table)


@app.command()
def tail(
    config: ConfigFile,
    topic: Annotated[str, typer.Option(help=f"One of {', '.join(readers.TOPICS)}.")] = "telemetry",
    motor: Annotated[str | None, typer.Option(help="Only this motor.")] = None,
    start: Annotated[str, typer.Option("--from", metavar="beginning|latest|SEQ", help="Where to begin.")] = "latest",
    count: Annotated[int | None, typer.Option(min=1, help="Stop after so many records.")] = None,
    follow: Annotated[bool, typer.Option(help="Wait for more at the end of the log.")] = True,
    kafka: KafkaOption = None,
    from_kafka: Annotated[
        bool, typer.Option("--from-kafka", help="Read the topics in Kafka, not the journal.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print records of the log as they come: telemetry, events or outcomes."""
    loaded = _load(config, kafka)
    if topic not in readers.TOPICS:
        raise typer.BadParameter(f"--topic {topic}: must be one of {', '.join(readers.TOPICS)}")
    if motor is not None and motor not in {m.name for m in loaded.motors}:
        raise typer.BadParameter(f"--motor {motor}: there are {', '.join(m.name for m in loaded.motors)}")
    if (from_kafka or kafka) and loaded.kafka is None:
        raise typer.BadParameter(f"--from-kafka: {config} has no [kafka]; name a broker with --kafka HOST:PORT")
    where = _start(start)
    if from_kafka or kafka:
        records = readers.read_kafka(loaded, topic, where, follow=follow)
    else:
        records = readers.read_journal(StateDir(loaded.arm.state_dir), topic, where, follow=follow)
    asyncio.run(_print_records(records, motor, count, as_json=as_json))


def _start(word: str) -> readers.Start:
    if word == "beginning":
        return "beginning"
    if word == "latest":
        return "latest"
    if word.isdecimal() and int(word) > 0:
        return int(word)
    raise typer.BadParameter(f"--from {word}: must be beginning, latest, or a sequence number from 1")


async def _print_records(
    records: AsyncGenerator[readers.Record, None], motor: str | None, count: int | None, *, as_json: bool
) -> None:
    printed = 0
    line: Callable[[readers.Record], str] = _json_line if as_json else _text_line
    async with contextlib.aclosing(records):
        async for record in records:
            if motor is None or record.motor == motor:
                print(line(record), flush=True)
                printed += 1
                if printed == count:
                    return


def _json_line(record: readers.Record) -> str:
    return msgspec.json.encode(record.value).decode()


def _text_line(record: readers.Record) -> str:
    value = record.value
    if record.topic == "telemetry":
        parts = [f"{name}={_short(value[name])}" for name in ("position_rad", "velocity_rad_s", "temperature_c")]
        return f"{value['sampled_at_ns']} {record.motor:<10} {value['seq']:>9} {' '.join(parts)}"
    details = {k: v for k, v in value.items() if k not in {"type", "state", "motor", "at_ns"} and v not in (None, "")}
    words = " ".join(f"{name}={_short(detail)}" for name, detail in details.items())
    return f"{value['at_ns']} {record.motor:<10} {value.get('type') or value.get('state')} {words}"


def _short(value: object) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


@app.command(context_settings={"ignore_unknown_options": True})  # a negative VALUE is no option
def command(
    config: ConfigFile,
    motor: Annotated[str, typer.Argument(metavar="MOTOR", help="Name of the motor, or '*' for all.")],
    kind: Annotated[Kind, typer.Argument(metavar="KIND", help=f"One of {', '.join(Kind)}.")],
    value: Annotated[float | None, typer.Argument(metavar="[VALUE]", help="rad, rad/s or N m, by kind.")] = None,
    ttl: Annotated[float, typer.Option("--ttl", metavar="MS", help="Not carried out later than this.")] = 500.0,
    velocity: Annotated[float | None, typer.Option(help="Speed of the approach, rad/s.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the outcome; exit status 0 only for done.")] = False,
    timeout: Annotated[float, typer.Option(metavar="S", help="How long --wait waits.")] = 30.0,
    kafka: KafkaOption = None,
    local: Annotated[
        bool, typer.Option("--local", help="Through the state directory, even if there is Kafka.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Send a command to a motor: through Kafka where it is configured, else through the state directory."""
    loaded = _load(config, kafka)
    new = client.make_command(motor, kind, value, ttl_ms=ttl, velocity_rad_s=velocity)
    if local and loaded.kafka is not None:
        loaded = loaded.model_copy(update={"kafka": None})
    outcomes = client.send(loaded, new, timeout_s=timeout if wait else None)
    sys.exit(asyncio.run(_print_outcomes(outcomes, new.id, wait=wait, as_json=as_json)))


async def _print_outcomes(outcomes: AsyncIterator[Outcome], command_id: str, *, wait: bool, as_json: bool) -> int:
    last: Outcome | None = None
    async for outcome in outcomes:
        last = outcome
        if as_json:
            print(msgspec.json.encode(outcome).decode(), flush=True)
        else:
            reason = f" ({outcome.reason})" if outcome.reason else ""
            print(f"{outcome.motor} {outcome.state}{reason} {outcome.detail}".rstrip(), flush=True)
    if not wait:
        if not as_json:
            print(f"sent {command_id}")
        return 0
    return 0 if last is not None and last.state is State.DONE else FAILED


def _print_json(value: object) -> None:
    print(msgspec.json.encode(value).decode())


if __name__ == "__main__":
    main()
