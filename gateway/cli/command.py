"""``servo-gateway command``: give a command and wait for what comes of it."""

import asyncio
import sqlite3
import sys
from typing import Annotated, NamedTuple

import typer

from drivers.motor import SETPOINTS, Kind
from gateway import client, units
from gateway.cli import progress
from gateway.cli.common import FAILED, ConfigFile, JsonOption, KafkaOption, load_config, to_json
from gateway.commands import Outcome, State
from gateway.events import ARM
from gateway.log_reader import LogError, LogReader


def command(
    config: ConfigFile,
    motor: Annotated[str | None, typer.Argument(metavar="MOTOR", help="Name of the motor, or '*' for all.")] = None,
    kind: Annotated[Kind | None, typer.Argument(metavar="KIND", help=f"One of {', '.join(Kind)}.")] = None,
    value: Annotated[
        str | None,
        typer.Argument(metavar="[VALUE]", help="For example 45deg, 10rpm, 0.3Nm; a plain number: rad, rad/s, N m."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="MOTOR=VALUE", help="Several motors together, in place of MOTOR and VALUE; repeat it."),
    ] = None,
    ttl: Annotated[float, typer.Option("--ttl", metavar="MS", help="Not carried out later than this.")] = 500.0,
    velocity: Annotated[
        str | None, typer.Option(metavar="SPEED", help="Speed of the approach to a position: 20deg/s.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="--no-wait: exit status 0 says only that it was handed over.")
    ] = True,
    timeout: Annotated[float, typer.Option(metavar="S", min=0, help="How long it may take, outcome and all.")] = 30.0,
    issuer: Annotated[str | None, typer.Option(metavar="NAME", help="Who commands, unsigned.")] = None,
    sign: Annotated[
        str | None, typer.Option(metavar="ISSUER", help="Who commands; signed with its [[commands.key]].")
    ] = None,
    kafka: KafkaOption = None,
    local: Annotated[
        bool, typer.Option("--local", help="Through the state directory, even if there is Kafka.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Command a motor and wait for the outcome: exit status 0 only for done.

    Through Kafka where it is configured, else through the state directory; an estop always through the state directory
    where the gateway runs on this machine.
    """
    loaded = load_config(config, kafka)
    if sign is not None and issuer is not None:
        raise typer.BadParameter("--sign and --issuer: one of the two names who commands")
    try:
        asked = _ask(motor, kind, value, target or [], velocity)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    goals = asked.goals if not as_json and wait and sys.stdout.isatty() else {}

    def give(*, local: bool) -> int:
        sender = client.Client(loaded, issuer=sign or issuer, sign=sign is not None, local=local)
        telemetry = client.open_log(loaded, "telemetry", local=local) if goals else None
        return asyncio.run(_command(sender, asked, ttl, timeout, telemetry, wait=wait, as_json=as_json))

    if asked.kind is Kind.ESTOP and not local and loaded.kafka and client.runs_here(loaded):
        try:  # no broker is in the way then
            sys.exit(give(local=True))
        except (OSError, sqlite3.Error, LogError) as error:
            print(f"not through {loaded.arm.state_dir}: {error}; through Kafka", file=sys.stderr)
    sys.exit(give(local=local))


class _Asked(NamedTuple):
    """What a command line asks for, in SI units."""

    motor: str
    kind: Kind
    value: float | None = None
    targets: dict[str, float] | None = None
    velocity_rad_s: float | None = None

    @property
    def goals(self) -> dict[str, float]:
        """{motor: the position in rad that it is to reach}"""
        if self.kind is not Kind.POSITION:
            return {}
        return {self.motor: self.value} if self.value is not None else self.targets or {}


def _ask(motor: str | None, kind: Kind | None, value: str | None, targets: list[str], velocity: str | None) -> _Asked:
    """Raises ValueError for what cannot be meant."""
    speed = None if velocity is None else units.parse(velocity, Kind.VELOCITY)
    if targets:
        if motor not in (None, ARM) or value is not None:
            raise ValueError("--target names motors and values: leave MOTOR and VALUE out, or write '*' KIND")
        kind = kind or Kind.POSITION
        parsed = [units.parse_target(target, kind) for target in targets]
        if len(dict(parsed)) < len(parsed):
            raise ValueError("--target: each motor once")
        return _Asked(ARM, kind, None, dict(parsed), speed)
    if motor is None or kind is None:
        raise ValueError("MOTOR and KIND are missing; for several motors together, --target MOTOR=VALUE")
    if value is None and kind in SETPOINTS:
        raise ValueError(f"{kind} needs a value")
    return _Asked(motor, kind, None if value is None else units.parse(value, kind), None, speed)


async def _command(
    sender: client.Client, asked: _Asked, ttl_ms: float, timeout_s: float, telemetry: LogReader | None, *,
    wait: bool, as_json: bool,
) -> int:  # fmt: skip
    """Give it, print what comes of it, and return the exit status."""
    sent: client.Sent | None = None
    try:
        async with asyncio.timeout(timeout_s), sender, progress.shown(telemetry, asked.goals):
            sent = await sender.send(
                asked.motor, asked.kind, asked.value, targets=asked.targets, velocity_rad_s=asked.velocity_rad_s,
                ttl_ms=ttl_ms,
            )  # fmt: skip
            if not wait:
                print(to_json({"command_id": sent.command.id}) if as_json else f"sent {sent.command.id}")
                return 0
            async for outcome in sent.outcomes(None):
                _print_outcome(outcome, as_json=as_json)
    except TimeoutError:
        told = f"command {sent.command.id}: no final outcome" if sent else "the command could not be sent"
        raise client.CommandError(f"{told} within {timeout_s:g} s") from None
    return 0 if sent.final and sent.final.state is State.DONE else FAILED


def _print_outcome(outcome: Outcome, *, as_json: bool) -> None:
    reason = f" ({outcome.reason})" if outcome.reason else ""
    text = f"{outcome.motor} {outcome.state}{reason} {outcome.detail}".rstrip()
    print(to_json(outcome) if as_json else text, flush=True)
