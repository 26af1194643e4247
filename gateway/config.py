"""The configuration: one TOML file in, a frozen ``Config`` or every fault in it out. Opens no bus and no broker.

text --tomllib--> tables --+-- each by itself: the models here, in the words of config_words --+--> config_faults
                           +-- each against the others: config_checks ------------------------+    toml_lines
"""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    model_validator,
)  # fmt: skip
from pydantic.json_schema import SkipJsonSchema

from drivers import motor as driven
from drivers import protocols
from gateway.config_checks import BITS_PER_S, LATE_AFTER_MS, MOST_WATCHDOG_MS, MOTOR_WATCHDOG_MS, check
from gateway.config_faults import ConfigError, Fault, Raw, blank, make_faults
from gateway.config_words import NAME, VARIABLE, explain
from gateway.toml_lines import Steps, find_lines

__all__ = [
    "Arm", "Bus", "CanBus", "CommandKey", "Commands", "Config", "ConfigError", "Fault", "Journal", "Kafka", "Motor",
    "SerialBus", "Simulation", "Table", "Topic", "kafka_at", "load", "loads",
    "options_model", "topic_name", "with_kafka",
]  # fmt: skip

Topic = Literal["telemetry", "events", "outcomes", "commands"]

# --- values -----------------------------------------------------------------------------------------------------------

_HOST_PORT = re.compile(r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")


def _local_path(value: Any, info: ValidationInfo) -> Path:
    """A path, ``~`` expanded; one that is relative lies beside the configuration file."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("must be a path, as text in quotes")
    try:
        path = Path(value).expanduser()
    except RuntimeError:
        raise ValueError("names the home directory of a user who has none; write the path in full") from None
    directory: Path = (info.context or {}).get("directory", Path.cwd())
    return directory / path


def _state_dir(value: Any, info: ValidationInfo) -> Path:
    if value is not None:
        return _local_path(value, info)
    home = os.environ.get("XDG_STATE_HOME", "")  # the XDG specification: ignored unless it is absolute
    state = home if Path(home).is_absolute() else "~/.local/state"
    return _local_path(f"{state}/servo-gateway/{info.data.get('name', '')}", info)


def _host_port(value: str) -> str:
    match = _HOST_PORT.fullmatch(value)
    if not match or not 1 <= int(match[1]) <= 65535:
        raise ValueError('must be "host:port", for example "127.0.0.1:9092"')
    return value


def _replication(factor: int) -> int:
    if factor == 0:
        raise ValueError("must be at least 1, or -1 for the broker's default")
    return factor


def _ascending(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] >= limits[1]:
        raise ValueError("must be [lowest, highest], the lowest first")
    return limits


def _after_late(offline_ms: float, info: ValidationInfo) -> float:
    if offline_ms <= info.data.get("late_after_ms", 0):
        raise ValueError(f"must be more than late_after_ms, which is {info.data['late_after_ms']:g}")
    return offline_ms


def _rs485(value: Any) -> Any:
    if not isinstance(value, bool | dict):
        raise ValueError("must be true, false or a table")
    return ({} if value else None) if isinstance(value, bool) else value


Name = Annotated[str, Field(pattern=NAME)]
Variable = Annotated[str, Field(pattern=VARIABLE)]
Text = Annotated[str, Field(min_length=1)]
LocalPath = Annotated[Path, BeforeValidator(_local_path)]
HostPort = Annotated[str, AfterValidator(_host_port)]
Limits = Annotated[tuple[float, float], AfterValidator(_ascending)]
RateHz = Annotated[float, Field(gt=0, le=2000)]

# --- tables: the docstrings are also what an editor shows (config_schema) ----------------------------------------


class Table(BaseModel):
    """A table of the file: nothing unknown, nothing coerced, nothing infinite, nothing changed afterwards."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # secrets
        use_attribute_docstrings=True,
    )

    @classmethod
    def known(cls) -> dict[str, str]:
        """{key as the file has it: what it is}"""
        described = cls.model_fields.items()
        return {field.alias or name: field.description or "" for name, field in described if not field.exclude}


@cache
def options_model(options: type | None) -> type[Table]:
    """A family's ``Options`` dataclass as strictly checked as every other table; without one, a table of nothing."""
    hints = get_type_hints(options) if options else {}

    def alone(name: str, value: Any) -> Any:
        with suppress(TypeError):  # it needs other keys too
            options(**{name: value})  # type: ignore[misc]  # it has a field, so it is no None
        return value

    members: dict[str, Any] = {
        field.name: (
            Annotated[hints[field.name], AfterValidator(partial(alone, field.name))],
            ... if field.default is field.default_factory is MISSING else None,
        )
        for field in (fields(options) if options else ())
    }
    model: type[Table] = create_model("Options", __base__=Table, **members)
    return model


def _options(given: Raw, info: ValidationInfo) -> Any:
    """The keys of a motor's family's own, as its ``Options``."""
    family = protocols.find(info.data.get("protocol"))
    if family is None:
        return None  # what keys it has, nobody knows
    options = options_model(family.Options).model_validate(given)
    return family.Options and family.Options(**{key: getattr(options, key) for key in options.model_fields_set})


class Arm(Table):
    """The arm, and where its gateway keeps what it must not forget."""

    name: Name
    """Name of the arm; its topics are servo.<name>.telemetry and so on."""
    state_dir: Annotated[Path, BeforeValidator(_state_dir)] = Field(default=None, validate_default=True)
    """Journal and lock; default ${XDG_STATE_HOME:-~/.local/state}/servo-gateway/<name>. Relative: to this file."""
    late_after_ms: float = Field(default=LATE_AFTER_MS, gt=0, le=60_000)
    """A motor that has not replied for this long is late (event motor.late)."""
    offline_after_ms: Annotated[float, AfterValidator(_after_late)] = Field(default=300.0, gt=0, le=600_000)
    """A motor that has not replied for this long is offline (event motor.offline)."""
    setpoint_timeout_ms: float = Field(default=500.0, gt=0, le=60_000)
    """A motor that moves on a velocity or torque is stopped when no fresh one came for this long."""
    motor_watchdog_ms: float = Field(default=MOTOR_WATCHDOG_MS, ge=0, le=MOST_WATCHDOG_MS)
    """Motors that can are told to stop by themselves when they hear nothing for this long; 0: they are not."""
    realtime: bool = True
    """Run the bus workers under SCHED_FIFO where the system allows it."""


class Kafka(Table):
    """The broker. Without this table there is none, and the embedded journal serves alone."""

    bootstrap_servers: tuple[HostPort, ...] = Field(strict=False, min_length=1)
    """Some of the cluster's brokers, each "host:port"."""
    format: Literal["protobuf", "json"] = "protobuf"
    """How telemetry is written: telemetry.proto, or JSON with the same names."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """How the connection is protected."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "GSSAPI"] | None = None
    """How the gateway proves who it is, where SASL is used."""
    sasl_username: Text | None = None
    """Who the gateway is, where SASL is used."""
    sasl_password_env: Variable | None = None
    """Environment variable that holds the password."""
    sasl_password_file: LocalPath | None = None
    """File that holds the password; a line's end behind it does not count."""
    ssl_cafile: LocalPath | None = None
    """Certificates (PEM) of the authorities to trust; default: the system's."""
    ssl_certfile: LocalPath | None = None
    """The gateway's own certificate (PEM)."""
    ssl_keyfile: LocalPath | None = None
    """Private key (PEM) of ssl_certfile."""
    ssl_keyfile_password_env: Variable | None = None
    """Environment variable that holds the password of the private key."""
    replication_factor: Annotated[int, AfterValidator(_replication)] = Field(default=-1, ge=-1, le=32767)
    """Copies of each topic that the gateway creates; -1: the broker's default."""

    def sasl_password(self) -> str | None:
        """The secret, read now; None where none is configured. Raises ConfigError naming what is absent."""
        if self.sasl_password_file is not None:
            return _secret_in_file("kafka.sasl_password_file", self.sasl_password_file)
        return _secret_in_environment("kafka.sasl_password_env", self.sasl_password_env)

    def ssl_keyfile_password(self) -> str | None:
        """As ``sasl_password``, for the private key."""
        return _secret_in_environment("kafka.ssl_keyfile_password_env", self.ssl_keyfile_password_env)


class Journal(Table):
    """The embedded log that everything passes through."""

    max_mb: int = Field(default=2048, ge=16)
    """Size at which the oldest batches go, acknowledged ones first, in MB."""
    flush_ms: float = Field(default=3.0, gt=0, le=1000)
    """The longest that a sample waits for others before it is written."""


class CanBus(Table):
    """A CAN bus, through any interface of python-can."""

    name: Name
    """Name of the bus, unique; also a file's name (simulate --link)."""
    type: Literal["can"]
    """Kind of bus."""
    rate_hz: RateHz
    """Cycles a second: in each, every motor is asked once."""
    interface: Text
    """python-can's name of the adapter: socketcan, slcan, pcan, virtual, udp_multicast, ..."""
    channel: Text | None = None
    """Channel of that interface, for example can0; may be left out where motors are simulated."""
    bitrate: int = Field(default=BITS_PER_S, ge=1, le=1_000_000)
    """Bits a second; for socketcan a note only: there "ip link" sets it."""
    fd: bool = False
    """Open the channel for CAN FD, where others on the bus use it; the gateway itself sends classic CAN."""
    data_bitrate: int | None = Field(default=None, ge=1, le=8_000_000)
    """Bits a second in the data phase of CAN FD; left out: what the interface has for it. Socketcan: as bitrate."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keywords for the python-can interface, as they are; one that it does not have is an error."""


class Rs485(Table):
    """How a serial port with an RS-485 mode of its own (kernel: TIOCSRS485) turns the line around."""

    rts_level_for_tx: bool = True
    """Level of RTS while sending."""
    rts_level_for_rx: bool = False
    """Level of RTS otherwise."""
    delay_before_tx_ms: int = Field(default=0, ge=0, le=100)
    """Pause between RTS and the first bit, in ms."""
    delay_before_rx_ms: int = Field(default=0, ge=0, le=100)
    """Pause between the last bit and RTS, in ms."""


class SerialBus(Table):
    """A serial bus."""

    name: Name
    """Name of the bus, unique; also a file's name (simulate --link)."""
    type: Literal["serial"]
    """Kind of bus."""
    rate_hz: RateHz
    """Cycles a second: in each, every motor is asked once."""
    port: Text | None = None
    """Device, best one under /dev/serial/by-id/; may be left out where motors are simulated."""
    baudrate: int = Field(default=BITS_PER_S, ge=1, le=12_000_000)
    """Bits a second."""
    rs485: Annotated[Rs485 | None, BeforeValidator(_rs485, json_schema_input_type=bool | Rs485)] = None
    """true, or a table: the port itself switches an RS-485 line. USB adapters do that alone and need nothing."""


Bus = CanBus | SerialBus


class Motor(Table):
    """A motor and its limits. Keys of its family's own, such as damiao's master_id, stand beside these."""

    name: Name
    """Name of the motor, unique; the key of its records."""
    partition: int = Field(ge=0, le=9999)
    """Partition of its records, unique; the order of the joints."""
    bus: Text
    """Name of the bus that it is on."""
    protocol: Text
    """Its family."""
    id: int = Field(ge=0)
    """Its address on the bus."""
    position_rad: Limits = Field(strict=False)
    """[lowest, highest] position that a command may ask for, in rad."""
    velocity_rad_s: float = Field(gt=0)
    """The highest speed that a command may ask for, in rad/s."""
    torque_nm: float | None = Field(default=None, gt=0)
    """The highest torque that a command may ask for, in N m; left out: none may."""
    temperature_c: float = Field(gt=0, le=200)
    """Alarm above this, in degrees Celsius (event motor.over_temperature)."""
    position_tolerance_rad: float = Field(default=0.02, gt=0)
    """A position is reached when it is this close, in rad."""
    stop_on: tuple[Literal["over_temperature", "position_limits"], ...] = Field(default=(), strict=False)
    """What stops it for good, until clear_fault: more than temperature_c, or a position beyond position_rad."""
    options: SkipJsonSchema[Annotated[Any, BeforeValidator(_options)]] = Field(default=None, exclude=True)
    """An instance of the family's ``Options``; in the file, its keys stand flat in the table."""

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        own = {key: value for key, value in table.items() if key in cls.known()}
        return {**own, "options": {key: value for key, value in table.items() if key not in own}}

    def driven(self) -> driven.Motor:
        """The same motor as ``drivers`` knows it."""
        return driven.Motor(self.partition, self.name, self.protocol, self.id, self.options, self.position_rad)


class CommandKey(Table):
    """The key that one issuer signs its commands with (docs/commands.md)."""

    issuer: Text
    """Who signs with it: the issuer that its commands name."""
    secret_env: Variable | None = None
    """Environment variable that holds the secret."""
    secret_file: LocalPath | None = None
    """File that holds the secret; a line's end behind it does not count."""

    def secret(self) -> str:
        """The secret, read now. Raises ConfigError naming what is absent."""
        place = f"commands.key {self.issuer!r}"
        if self.secret_file is not None:
            return _secret_in_file(f"{place} secret_file", self.secret_file)
        return _secret_in_environment(f"{place} secret_env", self.secret_env) or ""


class Commands(Table):
    """Who may command the arm. Without this table: everybody who can write to the commands topic."""

    issuers: tuple[Text, ...] | None = Field(default=None, strict=False, min_length=1)
    """Only commands that name one of these issuers are taken; left out: all are."""
    local: Literal["unsigned", "signed"] = "unsigned"
    """Whether commands that are put in through the state directory must be signed as well."""
    keys: tuple[CommandKey, ...] = Field(default=(), alias="key", strict=False)
    """One [[commands.key]] for each issuer that signs; with any, only signed commands are taken from Kafka."""


class Simulation(Table):
    """Present: the motors are simulated, behind the same buses."""

    motion: Literal["wave", "still"] = "wave"
    """What motors do before the first command: swing slowly, or hold still."""
    recording: LocalPath | None = None
    """In place of that, a log of another arm whose motion they live through: .mcap, a directory, a journal.db."""
    enabled: bool = True
    """Motors power up with their torque on."""
    wire_time: bool = False
    """Every bit takes its time on the bus, at its bitrate or baudrate."""
    turnaround_us: float = Field(default=0.0, ge=0, le=10_000)
    """With wire_time: how long a motor takes to answer, beside the return delay that it is set to."""
    faults: LocalPath | None = None
    """TOML file of faults to play; it may be written, changed and deleted meanwhile."""
    seed: int = Field(default=0, ge=0)
    """Of the faults that strike at random: with the same seed they strike the same way."""


class Config(Table):
    """Configuration of servo-gateway."""

    arm: Arm
    """[arm] with at least the arm's name."""
    kafka: Kafka | None = None
    """The broker; left out: the embedded journal alone."""
    journal: Journal = Field(default_factory=Journal)
    """The embedded log that everything passes through."""
    buses: tuple[Annotated[Bus, Field(discriminator="type")], ...] = Field(alias="bus", strict=False, min_length=1)
    """One [[bus]] for each bus."""
    motors: tuple[Motor, ...] = Field(alias="motor", strict=False, min_length=1)
    """One [[motor]] for each motor."""
    commands: Commands = Field(default_factory=Commands)
    """Who may command the arm; left out: everybody who can write to the commands topic."""
    simulation: Simulation | None = None
    """Present: the motors are simulated, behind the same buses."""

    def motors_on(self, bus_name: str) -> tuple[Motor, ...]:
        """The motors of one bus, in the order of the file."""
        return tuple(motor for motor in self.motors if motor.bus == bus_name)

    def topic(self, topic: Topic) -> str:
        """The Kafka name of one of the arm's topics."""
        return topic_name(self.arm.name, topic)


def topic_name(arm: str, topic: Topic) -> str:
    """The Kafka name of one of an arm's topics."""
    return f"servo.{arm}.{topic}"


# --- loading ----------------------------------------------------------------------------------------------------------


def shipped(name: str) -> Path:
    """A file of ``config/``: beside the package in a checkout, inside it when installed."""
    here = Path(__file__).parent
    return next(path for path in (here / "data" / name, here.parent / "config" / name) if path.exists())


def load(path: str | Path) -> Config:
    """Read a configuration file. Raises ConfigError with all its faults."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        why = getattr(error, "strerror", None) or error
        raise ConfigError(str(path), [Fault("", None, f"cannot be read: {why}")]) from None
    return loads(text, path)


def loads(text: str, where: str | Path) -> Config:
    """The configuration in ``text``; ``where`` is its file, for messages and relative paths."""
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, brackets without end
        found = re.search(r"at line (\d+)", str(error))
        line = int(found[1]) if found else None
        raise ConfigError(str(where), [Fault("", None, f"not TOML: {error}", line)]) from None
    config, findings = None, []
    try:
        config = Config.model_validate(raw, context={"directory": Path(where).absolute().parent})
    except ValidationError as error:
        findings = list(explain(error, raw, _known))
    lines = find_lines(text)
    faults = make_faults(findings, raw, lines)
    blank(findings, raw)
    faults += make_faults(check(raw), raw, lines)
    if config is None or faults:
        raise ConfigError(str(where), faults)
    return config


def with_kafka(config: Config, bootstrap_servers: Sequence[str]) -> Config:
    """``config`` with these servers in place of its own; the rest of [kafka] stays as it is, or at its defaults.

    Raises ConfigError for a server that is not host:port.
    """
    kafka = kafka_at(bootstrap_servers)
    if config.kafka is not None:
        kafka = config.kafka.model_copy(update={"bootstrap_servers": kafka.bootstrap_servers})
    return config.model_copy(update={"kafka": kafka})


def kafka_at(bootstrap_servers: Sequence[str]) -> Kafka:
    """[kafka] with these servers and its defaults. Raises ConfigError for a server that is not host:port."""
    table = {"bootstrap_servers": list(bootstrap_servers)}
    try:
        return Kafka.model_validate(table)
    except ValidationError as error:
        raw = {"kafka": table}
        raise ConfigError("--kafka", make_faults(explain(error, raw, _known, ("kafka",)), raw, {})) from None


_TABLES: dict[str, type[Table]] = {
    "arm": Arm, "kafka": Kafka, "journal": Journal, "commands": Commands, "simulation": Simulation
}  # fmt: skip


def _known(steps: Steps, raw: Raw) -> Mapping[str, str]:
    """{key: what it is} of all that the table at a place may hold."""
    match steps:
        case ("bus", int(number)):
            return (CanBus if raw["bus"][number].get("type") == "can" else SerialBus).known()
        case ("bus", int(), "rs485"):
            return Rs485.known()
        case ("motor", int(number)):
            family = protocols.find(raw["motor"][number].get("protocol"))
            return Motor.known() | (options_model(family.Options).known() if family else {})
        case ("commands", "key", int()):
            return CommandKey.known()
        case (str(name),) if name in _TABLES:
            return _TABLES[name].known()
        case _:
            return Config.known()


def _secret_in_environment(place: str, variable: str | None) -> str | None:
    if variable is None:
        return None
    if secret := os.environ.get(variable):
        return secret
    raise ConfigError("environment", [Fault(place, variable, "no such variable, or it is empty; set it to the secret")])


def _secret_in_file(place: str, path: Path) -> str:
    try:
        secret = path.read_text("utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        message = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(str(path), [Fault(place, None, f"cannot be read: {message}")]) from None
    if not secret:
        raise ConfigError(str(path), [Fault(place, None, "is empty; it must hold the secret")])
    return secret
