"""What the tables of a configuration must be to each other; what each must be by itself, its model says.

Works on the plain tables, where None stands for a value that its model found at fault: one bad key must not hide
another fault.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, replace
from itertools import chain
from typing import Any

from drivers import protocols
from drivers.family import CanId, Family
from drivers.motor import Motor
from gateway.config_faults import Finding, Raw, instead_of, place_of, similar
from gateway.toml_lines import Steps

LATE_AFTER_MS = 50.0  # defaults of keys that are compared here
MOTOR_WATCHDOG_MS = 500.0
MOST_WATCHDOG_MS = 2500.0  # the longest that motors of all families can count
WATCHDOG_PERIODS = 3  # of a bus, that a motor's watchdog must outlast: a lost frame or two stop nothing
BITS_PER_S = 1_000_000

Placed = tuple[Steps, Raw]


def check(raw: Raw) -> Iterator[Finding]:
    """All that does not fit together."""
    yield from _kafka(raw.get("kafka") or {})
    yield from _commands(raw.get("commands") or {}, raw)
    buses = [(steps, _looked_at(bus)) for steps, bus in _tables(raw, "bus")]
    motors = _tables(raw, "motor")
    yield from _repeated(buses, "name", raw)
    yield from _repeated(motors, "name", raw)
    yield from _repeated(motors, "partition", raw)

    by_name = {bus["name"]: bus for _, bus in buses if bus.get("name")}
    members: defaultdict[str, list[Placed]] = defaultdict(list)
    for steps, motor in motors:
        yield from _motor(steps, motor, by_name)
        if motor.get("bus"):
            members[motor["bus"]].append((steps, motor))
    for group in members.values():
        yield from _repeated(group, "id", raw)
        yield from _clashes(group)
        yield from _can_ids(group, raw)

    meant = {*members, *(similar(name, by_name) for name in members)}  # a bus misspelt is not also unused
    arm = raw.get("arm") or {}
    late_after_ms = arm.get("late_after_ms", LATE_AFTER_MS)
    watchdog_ms = arm.get("motor_watchdog_ms", MOTOR_WATCHDOG_MS)
    for steps, bus in buses:
        name = bus.get("name")
        if name and name not in meant:
            yield Finding((*steps, "name"), "no [[motor]] is on this bus; add one, or remove the bus")
        yield from _connection(steps, bus, simulated="simulation" in raw)
        if bus.get("rate_hz"):
            yield from _period(steps, bus["rate_hz"], late_after_ms)
            yield from _watchdog(steps, bus["rate_hz"], watchdog_ms, members[name or ""])
            has_wire = bus.get("interface") != "virtual" or (raw.get("simulation") or {}).get("wire_time")
            if has_wire:
                yield from _wire_time(steps, bus, members[name or ""], watchdog=bool(watchdog_ms))


def _tables(raw: Raw, key: str) -> list[Placed]:
    return [((key, i), table) for i, table in enumerate(raw.get(key) or ()) if table is not None]


def _looked_at(bus: Raw) -> Raw:
    """The bus as far as a model has looked at it: without a type, none has."""
    name = bus.get("name")
    return bus if bus.get("type") else {"name": name if isinstance(name, str) else None}


def _repeated(tables: Sequence[Placed], key: str, raw: Raw) -> Iterator[Finding]:
    first: dict[str | int, Steps] = {}
    for steps, table in tables:
        value = table.get(key)
        if value is not None and (other := first.setdefault(value, steps)) != steps:
            on_bus = " on this bus" if key == "id" else ""
            yield Finding((*steps, key), f"is also the {key} of {place_of(other, raw)}; each{on_bus} needs its own")


# --- motors and buses -------------------------------------------------------------------------------------------------


def _motor(steps: Steps, motor: Raw, buses: dict[str, Raw]) -> Iterator[Finding]:
    bus, protocol, bus_id = motor.get("bus"), motor.get("protocol"), motor.get("id")
    family = protocols.find(protocol)
    if bus and bus not in buses:
        yield Finding((*steps, "bus"), f"no [[bus]] has this name; {instead_of(bus, buses)}")
    if family is None:
        if protocol:
            known = protocols.family_names()
            yield Finding((*steps, "protocol"), f"no such protocol; {instead_of(protocol, known)}")
        return
    medium = buses.get(bus or "", {}).get("type")
    if medium and medium != family.medium:
        yield Finding((*steps, "protocol"), f'needs a {family.medium} bus, and "{bus}" is a {medium} bus')
    if bus_id is not None and bus_id not in family.bus_ids:
        yield Finding((*steps, "id"), f"must be {family.bus_ids[0]}..{family.bus_ids[-1]} for {family.name}")


def _clashes(members: Sequence[Placed]) -> Iterator[Finding]:
    """What each family finds between its motors on one bus."""
    for name, motors in _by_family(members).items():
        for motor, key, why in protocols.load(name).clashes(motors):
            yield Finding(("motor", motor.index, key), why)


def _can_ids(members: Sequence[Placed], raw: Raw) -> Iterator[Finding]:
    """CAN identifiers that stand for different things on one bus, each two users of one once."""
    uses: defaultdict[int, list[tuple[Motor, CanId]]] = defaultdict(list)
    told: set[tuple[Steps, int]] = set()
    for motor in sorted(chain(*_by_family(members).values()), key=lambda motor: motor.index):
        for use in protocols.load(motor.family).can_ids(motor):
            for other in uses[use.can_id]:
                # a key that decides on nothing but this identifier is easier to change than an id
                (at, own), (user, its) = sorted([(motor, use), other], key=lambda one: one[1].key == "id")
                steps = ("motor", at.index, own.key)
                same_id = at is not user and at.bus_id == user.bus_id  # is told already
                if (at.family, own.use) == (user.family, its.use) or same_id or (steps, user.index) in told:
                    continue
                told.add((steps, user.index))
                where = f"CAN identifier {own.can_id:#x}, where {place_of(('motor', user.index), raw)}"
                yield Finding(steps, f"puts its {own.use} on {where} has its {its.use}; choose another {own.key}")
            uses[use.can_id].append((motor, use))


def _by_family(members: Sequence[Placed]) -> dict[str, list[Motor]]:
    """The motors of one bus as their families know them, but for those of which what a family needs is at fault."""
    motors: defaultdict[str, list[Motor]] = defaultdict(list)
    for steps, table in members:
        family = protocols.find(table.get("protocol"))
        if family and (motor := _driven(steps, table, family)):
            motors[family.name].append(motor)
    return motors


def _driven(steps: Steps, table: Raw, family: type[Family[Any, Any]]) -> Motor | None:
    """The motor as its family knows it; None where what the family needs of it is at fault."""
    names = [field.name for field in fields(family.Options)] if family.Options else []
    own = {name: table[name] for name in names if name in table}
    if table.get("id") not in family.bus_ids or None in own.values():
        return None
    try:
        options = family.Options(**own) if family.Options else None
    except (TypeError, ValueError):  # its model has found why
        return None
    return Motor(int(steps[1]), str(table.get("name")), family.name, table["id"], options)


def _connection(steps: Steps, bus: Raw, *, simulated: bool) -> Iterator[Finding]:
    """What a bus needs to be opened, and what must not be opened by simulated motors."""
    if bus.get("type") == "serial" and "port" not in bus and not simulated:
        yield Finding((*steps, "port"), "is missing: without [simulation] a serial bus needs its device")
    if bus.get("type") != "can":
        return
    interface = bus.get("interface")
    if interface and interface not in (known := _can_interfaces()):
        yield Finding((*steps, "interface"), f"python-can has no such interface; {instead_of(interface, known)}")
    if "channel" not in bus and not simulated:
        yield Finding((*steps, "channel"), "is missing: without [simulation] a CAN bus needs its channel")
    channel = bus.get("channel", "")  # without one, socketcan means all interfaces
    if simulated and interface == "socketcan" and channel is not None and not channel.startswith("vcan"):
        message = 'must be a vcan interface, such as "vcan0": simulated motors must never answer on a real bus'
        yield Finding((*steps, "channel"), message)
    if bus.get("data_bitrate") and bus.get("fd", False) is False:
        yield Finding((*steps, "data_bitrate"), "is used with CAN FD only; remove it, or set fd = true")
    for key in bus.get("options") or {}:
        if key in ("interface", "bustype", "channel", "bitrate", "fd", "data_bitrate"):
            yield Finding((*steps, "options", key), "is a key of the bus itself; set it there")


def _can_interfaces() -> Collection[str]:
    from can.interfaces import VALID_INTERFACES  # noqa: PLC0415  an arm without a CAN bus need not load python-can

    return VALID_INTERFACES


def _period(steps: Steps, rate_hz: float, late_after_ms: float | None) -> Iterator[Finding]:
    if late_after_ms and 1000 / rate_hz >= late_after_ms:
        wrong = f"a motor replies every {1000 / rate_hz:g} ms, and arm.late_after_ms is {late_after_ms:g}"
        right = f"set that above {1000 / rate_hz:g}, or rate_hz above {1000 / late_after_ms:g}"
        yield Finding((*steps, "rate_hz"), f"{wrong}; {right}")


def _watchdog(steps: Steps, rate_hz: float, watchdog_ms: float | None, members: Sequence[Placed]) -> Iterator[Finding]:
    families = {
        family.name for _, motor in members if (family := protocols.find(motor.get("protocol"))) and family.watchdog
    }
    least_ms = WATCHDOG_PERIODS * 1000 / rate_hz
    if watchdog_ms and watchdog_ms <= least_ms and families:
        wrong = f"{WATCHDOG_PERIODS} periods are {least_ms:g} ms, and arm.motor_watchdog_ms is {watchdog_ms:g}"
        right = f"set that above {least_ms:g} (0: none), or rate_hz above {WATCHDOG_PERIODS * 1000 / watchdog_ms:g}"
        yield Finding(
            (*steps, "rate_hz"), f"{wrong}; {right}: {' and '.join(sorted(families))} would stop by themselves"
        )


def _wire_time(steps: Steps, bus: Raw, members: Sequence[Placed], *, watchdog: bool) -> Iterator[Finding]:
    """A rate that the bus cannot carry, even if every motor replied at once."""
    key, unit = ("bitrate", "bit/s") if bus["type"] == "can" else ("baudrate", "baud")
    bits_per_s = bus.get(key, BITS_PER_S)
    by_family = {
        name: [replace(motor, watchdog_ns=int(watchdog)) for motor in motors]  # what feeds one takes its time, too
        for name, motors in _by_family(members).items()
    }
    bits = sum(protocols.load(name).poll_bits(motors) for name, motors in by_family.items())
    if bits_per_s is None or bits * bus["rate_hz"] <= bits_per_s:
        return
    polled = " and ".join(f"{len(motors)} {name}" for name, motors in by_family.items())
    yield Finding(
        (*steps, "rate_hz"),
        f"to poll {polled} takes {1e6 * bits / bits_per_s:.0f} us on the wire at {bits_per_s} {unit}: "
        f"at most {bits_per_s // bits} Hz",
    )


# --- credentials ------------------------------------------------------------------------------------------------------


def _kafka(table: Raw) -> Iterator[Finding]:
    """Everything that the protocol needs, and nothing that it would silently ignore."""
    protocol = table.get("security_protocol", "PLAINTEXT")
    if protocol is None:
        return
    gssapi = table.get("sasl_mechanism") == "GSSAPI"
    for key in (key for key, value in table.items() if value is not None):
        part, _, rest = key.partition("_")
        if part in ("sasl", "ssl") and part.upper() not in protocol.split("_"):
            yield Finding(("kafka", key), f"is not used with {protocol}; remove it, or use SASL_SSL")
        elif gssapi and part == "sasl" and rest != "mechanism":
            yield Finding(("kafka", key), "is not used with GSSAPI, which takes a Kerberos ticket; remove it")
    wanted = []
    if "ssl_keyfile" in table or "ssl_keyfile_password_env" in table:
        wanted.append(("ssl_certfile", "the key needs its certificate"))
    if protocol.startswith("SASL"):
        wanted.append(("sasl_mechanism", f"{protocol} needs one, best SCRAM-SHA-512"))
        if not gssapi:
            wanted.append(("sasl_username", f"{protocol} needs it"))
        if not gssapi and "sasl_password_file" not in table and "sasl_password" not in table:
            wanted.append(("sasl_password_env", f"{protocol} needs it, or sasl_password_file"))
    for key, why in wanted:
        if key not in table:
            yield Finding(("kafka", key), f"is missing: {why}")
    if {"sasl_password_env", "sasl_password_file"} <= table.keys():
        yield Finding(("kafka", "sasl_password_file"), "stands beside sasl_password_env; one of the two must go")


def _commands(table: Raw, raw: Raw) -> Iterator[Finding]:
    """Each key has one secret and its own issuer; once there are keys, nobody is let in without one."""
    keys = [(("commands", "key", i), key) for i, key in enumerate(table.get("key") or ()) if key is not None]
    yield from _repeated(keys, "issuer", raw)
    issuers = table.get("issuers")
    for steps, key in keys:
        if not {"secret_env", "secret_file", "secret"} & key.keys():
            yield Finding((*steps, "secret_env"), "is missing: the key needs its secret, or secret_file")
        if {"secret_env", "secret_file"} <= key.keys():
            yield Finding((*steps, "secret_file"), "stands beside secret_env; one of the two must go")
        if issuers and key.get("issuer") and key["issuer"] not in issuers:
            yield Finding((*steps, "issuer"), "is not among commands.issuers, so that nothing of it is taken; add it")
    signers = {key.get("issuer") for _, key in keys}
    for i, issuer in enumerate(issuers or ()):
        if keys and None not in signers and issuer is not None and issuer not in signers:
            message = "has no [[commands.key]]; where one issuer signs, all must, or its name would let anybody in"
            yield Finding(("commands", "issuers", i), message)
    if table.get("local") == "signed" and not keys:
        yield Finding(("commands", "local"), "there is no [[commands.key]] to sign with; add one")
