"""The configuration: one TOML file in, a frozen ``Config`` or every fault in it out. Opens no bus and no broker.

    text --tomllib--> tables --shape (pydantic), relations (below)--> findings --+ lines of the text--> ConfigError
                                                                  \\-- none --> Config

A finding is a place and a sentence; value, label and line are looked up afterwards, so that a check stays one
``yield``. Relations are checked on the plain tables, not on the models: one bad key must not hide another fault.
"""

import json
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
)  # fmt: skip
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import ErrorDetails

from drivers import motor as driven
from drivers.family import Family
from drivers.protocols import family_names
from drivers.protocols import load as load_family

Topic = Literal["telemetry", "events", "outcomes", "commands"]
Steps = tuple[str | int, ...]
"""A place in the file, key by key: ("motor", 2, "id")."""

# --- errors ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong, and what would be right. ``value`` is None where there is none, or it is secret."""

    place: str
    value: Any
    message: str
    line: int | None = None

    def __str__(self) -> str:
        value = "" if self.value is None else f" = {_show(self.value)}"
        return f"{self.place}{value}: {self.message}" if self.place else self.message


class ConfigError(Exception):
    """The configuration cannot be used; ``faults`` are all its faults, in the order of the file's lines."""

    def __init__(self, where: str, faults: Sequence[Fault]) -> None:
        super().__init__(where, faults)
        self.where = where
        self.faults = tuple(sorted(faults, key=lambda fault: fault.line or 0))

    def __str__(self) -> str:
        return "\n".join(
            f"{self.where}{'' if fault.line is None else f':{fault.line}'}: {fault}" for fault in self.faults
        )


# --- values ---------------------------------------------------------------------------------------------------

NAME = "^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$"  # part of a topic's name (at most 249), of a path, of a command line
VARIABLE = "^[A-Za-z_][A-Za-z0-9_]*$"
_PATTERNS = {
    NAME: 'must be 1 to 100 letters, digits, "_", "-" or ".", and begin with a letter, a digit or "_"',
    VARIABLE: "must be the name of an environment variable: letters, digits and _",
}
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


Name = Annotated[str, Field(pattern=NAME)]
Variable = Annotated[str, Field(pattern=VARIABLE)]
Text = Annotated[str, Field(min_length=1)]
LocalPath = Annotated[Path, BeforeValidator(_local_path)]
HostPort = Annotated[str, AfterValidator(_host_port)]
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


class Arm(Table):
    """The arm, and where its gateway keeps what it must not forget."""

    name: Name
    """Name of the arm; its topics are servo.<name>.telemetry and so on."""
    state_dir: Annotated[Path, BeforeValidator(_state_dir)] = Field(default=None, validate_default=True)
    """Journal and lock; default ${XDG_STATE_HOME:-~/.local/state}/servo-gateway/<name>. Relative: to this file."""
    late_after_ms: float = Field(default=50.0, gt=0, le=60_000)
    """A motor that has not replied for this long is late (event motor.late)."""
    offline_after_ms: Annotated[float, AfterValidator(_after_late)] = Field(default=300.0, gt=0, le=600_000)
    """A motor that has not replied for this long is offline (event motor.offline)."""
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
    flush_ms: float = Field(default=2.0, gt=0, le=1000)
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
    bitrate: int = Field(default=1_000_000, ge=1, le=1_000_000)
    """Bits a second; for socketcan a note only: there "ip link" sets it."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keywords for the python-can interface, as they are."""


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
    baudrate: int = Field(default=1_000_000, ge=1, le=12_000_000)
    """Bits a second."""


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
    position_rad: Annotated[tuple[float, float], AfterValidator(_ascending)] = Field(strict=False)
    """[lowest, highest] position that a command may ask for, in rad."""
    velocity_rad_s: float = Field(gt=0)
    """The highest speed that a command may ask for, in rad/s."""
    temperature_c: float = Field(gt=0, le=200)
    """Alarm above this, in degrees Celsius (event motor.over_temperature)."""
    position_tolerance_rad: float = Field(default=0.02, gt=0)
    """A position is reached when it is this close, in rad."""
    options: SkipJsonSchema[Any] = None
    """An instance of the family's ``Options``; in the file, its keys stand flat in the table."""

    def driven(self) -> driven.Motor:
        """The same motor as ``drivers`` knows it."""
        return driven.Motor(self.partition, self.name, self.protocol, self.id, self.options)


class Simulation(Table):
    """Present: the motors are simulated, behind the same buses."""

    motion: Literal["wave", "still"] = "wave"
    """What motors do before the first command: swing slowly, or hold still."""
    enabled: bool = True
    """Motors power up with their torque on."""
    faults: LocalPath | None = None
    """TOML file of faults to play."""


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
    simulation: Simulation | None = None
    """Present: the motors are simulated, behind the same buses."""

    def motors_on(self, bus_name: str) -> tuple[Motor, ...]:
        """The motors of one bus, in the order of the file."""
        return tuple(motor for motor in self.motors if motor.bus == bus_name)

    def topic(self, topic: Topic) -> str:
        """The Kafka name of one of the arm's topics."""
        return f"servo.{self.arm.name}.{topic}"


# --- loading --------------------------------------------------------------------------------------------------


def load(path: str | Path) -> Config:
    """Read a configuration file. Raises ConfigError with all its faults."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise _unreadable(path, "no such file") from None
    except IsADirectoryError:
        raise _unreadable(path, "is a directory; name the configuration file in it") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _unreadable(path, f"byte 0x{data[error.start]:02x} is not UTF-8; save it as UTF-8", line) from None
    return loads(text, path)


def loads(text: str, where: str | Path) -> Config:
    """The configuration in ``text``; ``where`` is its file, for messages and relative paths."""
    if not text.strip():
        raise _unreadable(where, "is empty; it needs at least [arm], [[bus]] and [[motor]]")
    try:
        raw = tomllib.loads(text)
    except RecursionError:
        raise _unreadable(where, "is nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(str(error), text, where) from None
    except ValueError:
        raise _unreadable(where, "holds a number of thousands of digits") from None
    config, findings = _validate(raw, Path(where).absolute().parent)
    if config is None or findings:
        raise ConfigError(str(where), _faults(findings, raw, _lines(text)))
    return config


def with_kafka(config: Config, bootstrap_servers: Sequence[str]) -> Config:
    """``config`` with these servers in place of its own; the rest of [kafka] stays as it is, or at its defaults.

    Raises ConfigError for a server that is not host:port.
    """
    table = {"bootstrap_servers": list(bootstrap_servers)}
    try:
        kafka = Kafka.model_validate(table)
    except ValidationError as error:
        raw = {"kafka": table}
        faults = _faults(list(_shape(error, ("kafka",), raw)), raw, {})
        raise ConfigError("--kafka", faults) from None
    if config.kafka is not None:
        kafka = config.kafka.model_copy(update={"bootstrap_servers": kafka.bootstrap_servers})
    return config.model_copy(update={"kafka": kafka})


def _unreadable(where: str | Path, message: str, line: int | None = None) -> ConfigError:
    return ConfigError(str(where), [Fault("", None, message, line)])


def _syntax_error(message: str, text: str, where: str | Path) -> ConfigError:
    what, line = message, text.count("\n") + 1
    if match := re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message):
        what = message[: match.start()]
        if match[1]:
            line = int(match[1])
            what += f" in column {match[2]}"
    if what.startswith("Invalid value"):
        what += " (text must stand in quotes)"
    return _unreadable(where, f"not TOML: {what[:1].lower()}{what[1:]}", line)


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


# --- findings: what is wrong, and where -----------------------------------------------------------------------


class Finding(NamedTuple):
    """A place and a sentence; ``secret``: the value there is not for a log."""

    steps: Steps
    message: str
    secret: bool = False


Raw = dict[str, Any]
_AnyFamily = type[Family[Any, Any]]


def _validate(raw: Raw, directory: Path) -> tuple[Config | None, list[Finding]]:
    data, findings = _take_options(raw)
    config = None
    try:
        config = Config.model_validate(data, context={"directory": directory})
    except ValidationError as error:
        findings += _shape(error, (), raw)
    return config, [*findings, *_relations(raw)]


def _take_options(raw: Raw) -> tuple[Raw, list[Finding]]:
    """Each motor's family's own keys, gathered into ``options``; what stays is what ``Motor`` knows."""
    findings: list[Finding] = []
    motors = raw.get("motor")
    if not isinstance(motors, list):
        return raw, findings
    taken = list(motors)
    for steps, table in _tables(raw, "motor"):
        own = {key: value for key, value in table.items() if key in _keys(Motor)}
        extra = {key: value for key, value in table.items() if key not in own}
        own["options"], more = _options(steps, _family(table), extra)
        findings += more
        taken[int(steps[1])] = own
    return {**raw, "motor": taken}, findings


def _options(steps: Steps, family: _AnyFamily | None, extra: Raw) -> tuple[Any, list[Finding]]:
    known: Collection[str] = ()
    if family and family.Options:
        known = options_model(family.Options).model_fields
    findings = [
        Finding((*steps, key), _unknown_option(key, family, known), secret=True)
        for key in extra
        if key not in known and (family or _similar(key, _keys(Motor)))
    ]
    if family is None or family.Options is None:
        return None, findings
    try:
        given = options_model(family.Options).model_validate({key: extra[key] for key in known if key in extra})
        return family.Options(**{key: getattr(given, key) for key in given.model_fields_set}), findings
    except ValidationError as error:
        return None, findings + list(_shape(error, steps, {}))
    except ValueError as error:  # the dataclass's own check; its message names the key
        key = next((key for key in extra if key in str(error)), None)
        return None, [*findings, Finding((*steps, key) if key else steps, str(error))]


@cache
def options_model(options: type) -> type[Table]:
    """A family's ``Options`` dataclass as strictly checked as every other table."""
    hints = get_type_hints(options, include_extras=True)
    members: dict[str, Any] = {
        field.name: (
            hints[field.name],
            Field(
                default=... if field.default is MISSING and field.default_factory is MISSING else None,
                description=field.metadata.get("description"),
            ),
        )
        for field in fields(options)
    }
    model: type[Table] = create_model(options.__name__, __base__=Table, **members)
    return model


def _relations(raw: Raw) -> Iterator[Finding]:
    """What no table can know of itself."""
    if isinstance(kafka := raw.get("kafka"), dict):
        yield from _kafka(kafka)
    buses, motors = _tables(raw, "bus"), _tables(raw, "motor")
    yield from _repeated(buses, "name", str)
    yield from _repeated(motors, "name", str)
    yield from _repeated(motors, "partition", int)

    by_name = {name: table for _, table in buses if (name := _get(table, "name", str))}
    used = set()
    taken: dict[tuple[str, int], Steps] = {}
    for steps, motor in motors:
        family, bus_name, bus_id = _family(motor), _get(motor, "bus", str), _get(motor, "id", int)
        bus = by_name.get(bus_name or "")
        if bus_name is not None:
            used |= {bus_name, _similar(bus_name, by_name)}
            if bus is None:
                yield Finding((*steps, "bus"), f"no [[bus]] has this name; {_one_of(bus_name, by_name)}")
        protocol = _get(motor, "protocol", str)
        if protocol and not family:
            yield Finding((*steps, "protocol"), f"no such protocol; {_one_of(protocol, family_names())}")
        medium = _get(bus or {}, "type", str)
        if family and medium in ("can", "serial") and medium != family.medium:
            yield Finding((*steps, "protocol"), f"needs a {family.medium} bus, and {_show(bus_name)} is a {medium} bus")
        if bus_id is None:
            continue
        if family and bus_id >= 0 and bus_id not in family.bus_ids:
            ids = family.bus_ids
            yield Finding((*steps, "id"), f"must be {ids[0]}..{ids[-1]} for {family.name}")
        if bus_name and (other := taken.setdefault((bus_name, bus_id), steps)) != steps:
            message = f"is also the id of {_place(other, raw)}; each motor on a bus needs its own"
            yield Finding((*steps, "id"), message)

    yield from _replies_that_command(motors)
    for steps, bus in buses:
        if (name := _get(bus, "name", str)) and name not in used:
            yield Finding((*steps, "name"), "no [[motor]] is on this bus; add one, or remove the bus")
        yield from _connection(steps, bus, simulated="simulation" in raw)


def _replies_that_command(motors: Sequence[tuple[Steps, Raw]]) -> Iterator[Finding]:
    """Damiao: a reply with the identifier of a command would move the motor that the command belongs to."""
    for steps, motor in motors:
        master_id, bus = _get(motor, "master_id", int), motor.get("bus")
        if master_id is None or motor.get("protocol") != "damiao":
            continue
        for _, other in motors:
            bus_id = _get(other, "id", int) if (other.get("bus"), other.get("protocol")) == (bus, "damiao") else None
            if bus_id is not None and master_id - bus_id in (0, 0x100, 0x200, 0x300):
                message = f"is the identifier of commands to id {bus_id} on this bus; by custom it is {bus_id} + 16"
                yield Finding((*steps, "master_id"), message)


def _connection(steps: Steps, bus: Raw, *, simulated: bool) -> Iterator[Finding]:
    """What a bus needs to be opened, and what must not be opened by simulated motors."""
    if bus.get("type") == "serial" and "port" not in bus and not simulated:
        yield Finding((*steps, "port"), "is missing: without [simulation] a serial bus needs its device")
    if bus.get("type") != "can":
        return
    interface, channel = _get(bus, "interface", str), bus.get("channel")
    if interface and interface not in (known := _can_interfaces()):
        yield Finding((*steps, "interface"), f"python-can has no such interface; {_one_of(interface, known)}")
    if channel is None and not simulated:
        yield Finding((*steps, "channel"), "is missing: without [simulation] a CAN bus needs its channel")
    # without a channel, socketcan means all interfaces
    if simulated and interface == "socketcan" and not (isinstance(channel, str) and channel.startswith("vcan")):
        message = 'must be a vcan interface, such as "vcan0": simulated motors must never answer on a real bus'
        yield Finding((*steps, "channel"), message)
    for key in _get(bus, "options", dict) or {}:
        if key in ("interface", "bustype", "channel", "bitrate"):
            yield Finding((*steps, "options", key), "is a key of the bus itself; set it there")


def _can_interfaces() -> Collection[str]:
    from can.interfaces import VALID_INTERFACES  # noqa: PLC0415  an arm without a CAN bus need not load python-can

    return VALID_INTERFACES


def _kafka(table: Raw) -> Iterator[Finding]:
    """Credentials: everything that the protocol needs, and nothing that it would silently ignore."""
    protocol = table.get("security_protocol", "PLAINTEXT")
    if protocol not in ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"):
        return
    sasl, ssl = protocol.startswith("SASL_"), protocol.endswith("SSL")
    for key in filter(Kafka.model_fields.__contains__, table):
        if key.startswith("sasl_") and not sasl:
            yield Finding(("kafka", key), f"is not used with {protocol}; remove it, or use SASL_SSL")
        if key.startswith("ssl_") and not ssl:
            yield Finding(("kafka", key), f"is not used with {protocol}; remove it, or use SSL or SASL_SSL")
    for key in ("ssl_keyfile", "ssl_keyfile_password_env"):
        if key in table and "ssl_certfile" not in table:
            yield Finding(("kafka", "ssl_certfile"), f"is missing: {key} needs the certificate")
            break
    if not sasl:
        return
    if "sasl_mechanism" not in table:
        yield Finding(("kafka", "sasl_mechanism"), f"is missing: {protocol} needs one, best SCRAM-SHA-512")
    passwords = [key for key in ("sasl_password_env", "sasl_password_file") if key in table]
    if table.get("sasl_mechanism") == "GSSAPI":
        for key in filter(table.__contains__, ("sasl_username", *passwords)):
            yield Finding(("kafka", key), "is not used with GSSAPI, which takes a Kerberos ticket; remove it")
        return
    if "sasl_username" not in table:
        yield Finding(("kafka", "sasl_username"), f"is missing: {protocol} needs it")
    if len(passwords) == 2:
        yield Finding(("kafka", passwords[1]), "stands beside sasl_password_env; one of the two must go")
    if not passwords and "sasl_password" not in table:
        yield Finding(("kafka", "sasl_password_env"), f"is missing: {protocol} needs it, or sasl_password_file")


def _repeated(tables: Sequence[tuple[Steps, Raw]], key: str, kind: type[Any]) -> Iterator[Finding]:
    first: dict[Any, Steps] = {}
    for steps, table in tables:
        value = _get(table, key, kind)
        if value is None:
            continue
        other = first.setdefault(value, steps)
        if other != steps:
            yield Finding((*steps, key), f"is also the {key} of {_dotted(other)}; each needs its own")


# --- pydantic's errors in plain words -------------------------------------------------------------------------

_TABLES: Mapping[str, type[Table]] = {
    "arm": Arm, "kafka": Kafka, "journal": Journal, "motor": Motor, "simulation": Simulation,
}  # fmt: skip
_BUSES: Mapping[Any, type[Table]] = {"can": CanBus, "serial": SerialBus}

_WORDS = {
    "bool_type": "must be true or false",
    "dict_type": "must be a table",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be a whole number",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must not be empty",
    "string_type": "must be text, in quotes",
    "too_long": "must be two numbers: [lowest, highest]",
    "too_short": "must not be empty",
    "union_tag_invalid": 'must be "can" or "serial"',
    "union_tag_not_found": 'is missing: must be "can" or "serial"',
}
_LIMITS = ("gt", "ge", "lt", "le")


def _shape(error: ValidationError, prefix: Steps, raw: Raw) -> Iterator[Finding]:
    """One finding for each place that pydantic complains of."""
    seen = set()
    for detail in error.errors(include_url=False, include_input=False):
        steps = (*prefix, *detail["loc"])
        if steps[0] == "bus":
            steps = steps[:2] + steps[3:]  # loc holds the tag of the union too
        match detail["type"]:
            case "union_tag_not_found" | "union_tag_invalid":
                steps = (*steps, "type")
            case "missing" if isinstance(steps[-1], int):
                steps, detail["type"] = steps[:-1], "too_long"
            case "too_short" if _at(raw, steps):
                continue  # its items are at fault, and it is called short for want of good ones
        if steps not in seen:
            seen.add(steps)
            yield Finding(steps, _sentence(detail, steps, raw), secret=detail["type"] == "extra_forbidden")


def _sentence(detail: ErrorDetails, steps: Steps, raw: Raw) -> str:
    context = detail.get("ctx", {})
    match detail["type"]:
        case "value_error":
            return str(context["error"])
        case "string_pattern_mismatch":
            return _PATTERNS.get(context["pattern"], f"must match {context['pattern']}")
        case "literal_error":
            return f"must be {context['expected']}".replace("'", '"')
        case "missing":
            about = _description(steps, raw)
            return f"is missing: {about[:1].lower()}{about[1:]}" if about else "is missing"
        case "extra_forbidden":
            return _unknown_key(steps, raw)
        case "tuple_type" if len(steps) == 1:
            return f"must be written [[{steps[0]}]], once for each {steps[0]}"
        case "tuple_type":
            return "must be a list: [..., ...]"
        case "model_type" | "model_attributes_type":
            return f"must be a table: [{steps[0]}]" if len(steps) == 1 else f"must be a table: [[{steps[0]}]]"
        case kind:
            limits = {
                key: int(limit) if limit == int(limit) else limit for key, limit in context.items() if key in _LIMITS
            }
            return _WORDS[kind].format_map(limits) if kind in _WORDS else detail["msg"]


def _model_at(steps: Steps, raw: Raw) -> type[Table] | None:
    if not steps:
        return Config
    return _BUSES.get(_get(_at(raw, steps), "type", str)) if steps[0] == "bus" else _TABLES.get(str(steps[0]))


def _keys(model: type[Table]) -> tuple[str, ...]:
    """The keys of a table as the file has them."""
    return tuple(
        field.alias or name for name, field in model.model_fields.items() if (model, name) != (Motor, "options")
    )


def _description(steps: Steps, raw: Raw) -> str:
    model = _model_at(steps[:-1], raw)
    for name, field in model.model_fields.items() if model else ():
        if (field.alias or name) == steps[-1]:
            return (field.description or "").rstrip(".")
    return ""


def _unknown_key(steps: Steps, raw: Raw) -> str:
    key, model = str(steps[-1]), _model_at(steps[:-1], raw)
    if steps == ("kafka", "sasl_password"):
        return (
            "a password does not belong in a file that is copied and shown around; name an environment variable "
            "in sasl_password_env, or a file in sasl_password_file"
        )
    for kind, other in _BUSES.items():
        if steps[0] == "bus" and other is not model and key in _keys(other):
            return f"is a key of a {kind} bus; this one takes {', '.join(_keys(model or Table))}"
    return f"unknown; {_one_of(key, _keys(model or Table))}"


def _unknown_option(key: str, family: _AnyFamily | None, known: Collection[str]) -> str:
    if similar := _similar(key, (*_keys(Motor), *known)):
        return f'unknown; did you mean "{similar}"?'
    name = family.name if family else "its family"
    return f"no key of [[motor]] and no option of {name}, which takes {', '.join(known) or 'none'}"


# --- looking things up ----------------------------------------------------------------------------------------

V = TypeVar("V")


def _get(table: Any, key: str, kind: type[V]) -> V | None:
    """The value if it is exactly of this kind: true is no int."""
    value = table.get(key) if isinstance(table, dict) else None
    return value if type(value) is kind else None


def _tables(raw: Raw, key: str) -> list[tuple[Steps, Raw]]:
    """The tables of an array of tables, each with its place; whatever else is there is left out."""
    items = _get(raw, key, list) or []
    return [((key, i), item) for i, item in enumerate(items) if isinstance(item, dict)]


def _family(motor: Raw) -> _AnyFamily | None:
    name = _get(motor, "protocol", str)
    return load_family(name) if name in family_names() else None


def _at(raw: Any, steps: Steps) -> Any:
    """The value at a place; None if there is none."""
    for step in steps:
        try:
            raw = raw[step]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _similar(word: str, known: Collection[str]) -> str:
    return next(iter(get_close_matches(word, known, n=1, cutoff=0.7)), "")


def _one_of(word: str, known: Collection[str]) -> str:
    if similar := _similar(word, known):
        return f'did you mean "{similar}"?'
    return f"known: {', '.join(sorted(known))}" if known else "there is none"


def _faults(findings: Sequence[Finding], raw: Raw, lines: Mapping[Steps, int]) -> list[Fault]:
    def value(steps: Steps, secret: bool) -> Any:
        # a password may also stand where the name of its variable or its file belongs
        return None if secret or "password" in str(steps[-1]) else _at(raw, steps)

    return [
        Fault(_place(steps, raw), value(steps, secret), message, _line(steps, lines))
        for steps, message, secret in findings
    ]


def _place(steps: Steps, raw: Raw) -> str:
    """Steps as a person would say them: motor[2] "joint3" id; kafka.bootstrap_servers[0]."""
    head, rest = (steps[:2], steps[2:]) if len(steps) > 1 and isinstance(steps[1], int) else ((), steps)
    name = _get(_at(raw, head), "name", str) if head else None
    return " ".join(filter(None, (_dotted(head), name and _show(name), _dotted(rest))))


def _dotted(steps: Steps) -> str:
    words = (f"[{step}]" if isinstance(step, int) else f".{_bare(step)}" for step in steps)
    return "".join(words).removeprefix(".")


def _bare(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _show(key)


def _show(value: Any) -> str:
    """A value as TOML has it, at a readable length; what is in a table is not shown."""
    if isinstance(value, dict):
        return "{...}"
    if isinstance(value, list):
        text = f"[{', '.join(_show(item) if not isinstance(item, list) else '[...]' for item in value[:8])}]"
    elif isinstance(value, str | bool):
        text = json.dumps(value[:80] if isinstance(value, str) else value, ensure_ascii=False)
    else:
        long = isinstance(value, int) and value.bit_length() > 1000  # Python refuses to write thousands of digits
        text = hex(value) if long else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- lines ----------------------------------------------------------------------------------------------------

_SKIPPED = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}' r"|'''.*?'{3,5}" r'|"(?:[^"\\\n]|\\.)*"' r"|'[^'\n]*'" r"|#[^\n]*", re.DOTALL
)
_KEY = r"""(?:"[^"]*"|'[^']*'|[A-Za-z0-9_-]+)"""
_DOTTED = rf"{_KEY}(?:[ \t]*\.[ \t]*{_KEY})*"
_HEADER = re.compile(rf"\s*(\[\[?)\s*({_DOTTED})\s*\]")
_ASSIGNMENT = re.compile(rf"\s*({_DOTTED})\s*=")


def _lines(text: str) -> dict[Steps, int]:
    """Line of each table header and key, for text that tomllib has read. What it does not know it leaves out."""
    lines: dict[Steps, int] = {}
    items: dict[Steps, int] = {}  # array of tables -> index of the latest
    table: Steps = ()
    depth = 0  # open brackets of a value that goes on over lines
    for number, line in enumerate(_SKIPPED.sub(_without_brackets, text).split("\n"), 1):
        if depth == 0 and (header := _HEADER.match(line)):
            *parents, last = _split(header[2])
            table = ()
            for key in parents:
                table = _latest((*table, key), items)
                lines.setdefault(table, number)
            table = (*table, last)
            lines.setdefault(table, number)
            if header[1] == "[[":
                items[table] = items.get(table, -1) + 1
            table = _latest(table, items)
            lines.setdefault(table, number)
            continue
        if depth == 0 and (assignment := _ASSIGNMENT.match(line)):
            keys = _split(assignment[1])
            for end in range(len(keys)):
                lines.setdefault((*table, *keys[: end + 1]), number)
        depth = max(0, depth + sum(map(line.count, "[{")) - sum(map(line.count, "]}")))
    return lines


def _without_brackets(match: re.Match[str]) -> str:
    if match[0].startswith("#"):
        return ""
    if match[0].startswith(('"""', "'''")):
        return '""' + "\n" * match[0].count("\n")
    return match[0].translate(str.maketrans("[]{}#", "_____"))


def _split(dotted: str) -> list[str]:
    return [key.strip("\"'") for key in re.findall(_KEY, dotted)]


def _latest(table: Steps, items: Mapping[Steps, int]) -> Steps:
    return (*table, items[table]) if table in items else table


def _line(steps: Steps, lines: Mapping[Steps, int]) -> int | None:
    """The line of a place, or of the nearest thing around it that has one."""
    return next((lines[steps[:end]] for end in range(len(steps), 0, -1) if steps[:end] in lines), None)
