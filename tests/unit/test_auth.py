"""Who may command: signatures over what a command means, not over how it is written, and the table's rules."""

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.clock import epoch_ns
from drivers.motor import Kind
from gateway.auth import LOCAL, Authority, canonical, secret_of, sign
from gateway.commander import Incoming
from gateway.commands import Command, Reason, State, decode_command, encode_command
from gateway.config import Config, ConfigError
from tests.gateway_parts import ARM, make_config
from tests.unit.test_commander import running

DOCS = Path(__file__).parents[2] / "docs" / "commands.md"
SECRET = "correct horse battery staple"
KEYED = '[[commands.key]]\nissuer = "cell1"\nsecret_env = "CELL1_SECRET"\n'

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False)
commands = st.builds(
    Command,
    id=texts,
    motor=texts,
    kind=st.sampled_from(sorted(set(Kind) - {Kind.ESTOP})),
    ttl_ms=st.floats(1, 600_000),
    issued_at_ns=st.integers(0, (1 << 63) - 1),
    value=st.none() | numbers,
    targets=st.none() | st.dictionaries(texts, numbers, max_size=3),
    velocity_rad_s=st.none() | numbers,
    issuer=st.just("cell1"),
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELL1_SECRET", SECRET)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELL1_SECRET", SECRET)
        return Authority(make_config(tmp_path_factory.mktemp("arm"), KEYED))


def a_command(kind: Kind = Kind.POSITION, **fields: Any) -> Command:
    return Command("a1", "joint1", kind, 500.0, epoch_ns(), 0.5 if kind is Kind.POSITION else None, **fields)


# --- the canonical form -----------------------------------------------------------------------------------------------


def test_the_documented_example_is_what_is_signed() -> None:
    """Every block of the page's example, made by this code from the one before it."""
    section = DOCS.read_text().split("### An example to check against")[1]
    record, form, signature = (block.strip() for block in re.findall(r"```\w*\n(.*?)```", section, re.DOTALL)[:3])
    command = decode_command(record.encode())
    assert canonical(command, "arm1").decode() == form
    assert sign(command, "arm1", SECRET).signature == signature
    assert SECRET in section


def test_a_number_has_one_form_however_it_is_written() -> None:
    forms = {
        canonical(decode_command(json.dumps(record).encode()), "arm1")
        for record in (
            {"id": "a", "motor": "*", "kind": "velocity", "targets": {"j": value}, "ttl_ms": ttl, "issued_at_ns": 1}
            for value, ttl in ((0, 500), (0.0, 500.0), (-0.0, 5e2))
        )
    }
    assert len(forms) == 1


@given(commands, st.randoms(use_true_random=False))
def test_order_and_spaces_of_the_record_do_not_matter(
    keyed: Authority, command: Command, shuffle: random.Random
) -> None:
    fields = list(json.loads(encode_command(sign(command, "arm1", SECRET))).items())
    shuffle.shuffle(fields)
    raw = json.dumps(dict(fields), indent=shuffle.choice([None, 1, 4]), ensure_ascii=shuffle.choice([True, False]))
    assert keyed.refusal(msgspec.json.decode(raw, type=Command), "kafka") is None


@given(commands, st.data())
def test_a_change_of_any_field_is_refused(keyed: Authority, command: Command, data: st.DataObject) -> None:
    signed = sign(command, "arm1", SECRET)
    name = data.draw(st.sampled_from([field for field in Command.__struct_fields__ if field != "issuer"]))
    other = getattr(sign(data.draw(commands), "arm2", SECRET), name)
    changed = msgspec.structs.replace(signed, **{name: other})
    same = name != "signature" and canonical(changed, "arm1") == canonical(signed, "arm1")
    assert (keyed.refusal(changed, "kafka") is None) is same


@given(commands, st.data())
def test_a_flipped_bit_anywhere_in_the_record_gains_nothing(
    keyed: Authority, command: Command, data: st.DataObject
) -> None:
    raw = bytearray(encode_command(sign(command, "arm1", SECRET)))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = msgspec.json.decode(raw, type=Command)
    except ValueError:
        return  # no command any more
    if found.kind is not Kind.ESTOP and keyed.refusal(found, "kafka") is None:
        assert canonical(found, "arm1") == canonical(command, "arm1")  # such as 1e5 for 1E5


@given(commands)
def test_a_command_of_one_arm_serves_no_other(keyed: Authority, command: Command) -> None:
    assert keyed.refusal(sign(command, "arm1", SECRET), "kafka") is None
    assert keyed.refusal(sign(command, "arm2", SECRET), "kafka") is not None


@given(commands)
def test_another_secret_does_not_serve(keyed: Authority, command: Command) -> None:
    assert keyed.refusal(sign(command, "arm1", SECRET + "!"), "kafka") is not None


# --- the table's rules ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A table, a command and where it comes from; whether it is refused, and in what words."""

    table: str
    fields: Mapping[str, Any]
    source: str
    refused: str = ""


LISTED = '[commands]\nissuers = ["cell1"]\n'
RULES = [
    Rule("", {}, "kafka"),
    Rule("", {"signature": "00"}, "kafka"),  # a sender may sign before its gateway asks for it
    Rule(LISTED, {"issuer": "cell1"}, "kafka"),
    Rule(LISTED, {"issuer": "cell2"}, "kafka", "issuer 'cell2': not among those who may command this arm"),
    Rule(LISTED, {}, LOCAL, "a command without an issuer: not among those who may command this arm"),
    Rule(LISTED, {"kind": Kind.ESTOP}, "kafka"),
    Rule(KEYED, {"issuer": "cell1"}, "kafka", "issuer 'cell1': must be signed"),
    Rule(KEYED, {}, "kafka", "a command without an issuer: must be signed"),
    Rule(KEYED, {"issuer": "cell2", "signature": "00"}, "kafka", "issuer 'cell2': has no key here to sign with"),
    Rule(KEYED, {"signature": "00"}, "kafka", "a command without an issuer: has no key here to sign with"),
    Rule(KEYED, {"issuer": "cell1", "signature": "é"}, "kafka", "the signature is not this command's for arm 'arm1'"),
    Rule(KEYED, {"kind": Kind.ESTOP}, "kafka"),
    Rule(KEYED, {"kind": Kind.RESET_ESTOP}, "kafka", "must be signed"),
    Rule(KEYED, {}, LOCAL),
    Rule(KEYED, {"issuer": "cell1", "signature": "00"}, LOCAL, "the signature is not this command's"),
    Rule('[commands]\nlocal = "signed"\n' + KEYED, {}, LOCAL, "must be signed"),
]


@pytest.mark.parametrize("rule", RULES)
def test_who_may_command_is_what_the_table_says(tmp_path: Path, rule: Rule) -> None:
    refusal = Authority(make_config(tmp_path, rule.table)).refusal(a_command(**rule.fields), rule.source)
    assert (refusal is None) is (rule.refused == "")
    assert rule.refused in (refusal or "")
    assert SECRET not in (refusal or "")


def test_a_secret_that_is_not_there_is_told_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, KEYED)
    monkeypatch.delenv("CELL1_SECRET")
    with pytest.raises(ConfigError, match="CELL1_SECRET"):
        Authority(config)


def test_a_secret_may_be_in_a_file_and_is_found_by_its_issuer(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    config = make_config(tmp_path, '[[commands.key]]\nissuer = "cell1"\nsecret_file = "secret"\n')
    assert secret_of(config.commands, "cell1") == SECRET
    with pytest.raises(ConfigError, match="no key of issuer 'cell2'; there are: cell1"):
        secret_of(config.commands, "cell2")


def test_no_secret_is_in_a_printed_configuration(tmp_path: Path) -> None:
    config: Config = make_config(tmp_path, KEYED)
    assert SECRET not in repr(config) + config.model_dump_json()


# --- in the gateway ---------------------------------------------------------------------------------------------------


async def test_what_is_not_authorized_is_told_moves_nothing_and_leaves_its_id_to_its_owner(tmp_path: Path) -> None:
    async with running(tmp_path, text=ARM + KEYED) as rig:
        unsigned = decode_command(rig.record("a", "joint1", issuer="cell1").raw)
        await rig.handle([Incoming(encode_command(unsigned), "kafka", 0, 2)])
        outcome = (await rig.outcomes("a"))[-1]
        assert (outcome.state, outcome.reason) == (State.REJECTED, Reason.UNAUTHORIZED)
        assert rig.sent == []
        good = Incoming(encode_command(sign(unsigned, "arm1", SECRET)), "kafka", 0, 3)
        await rig.commander.handle([good])
        await rig.writer.durable()
        assert rig.reader.command("a") is not None


async def test_who_may_not_command_learns_nothing_of_the_arm(tmp_path: Path) -> None:
    async with running(tmp_path, text=ARM + KEYED) as rig:
        stranger = rig.record("a", "joint77")
        await rig.handle([stranger._replace(source="kafka")])
        _, reason, detail = await rig.final("a")
    assert reason == Reason.UNAUTHORIZED
    assert "joint" not in detail
