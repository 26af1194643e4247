"""Programs and people that command a running gateway: the Python client, the examples in its page, the command line."""

import asyncio
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.client import Client, CommandError, SyncClient
from gateway.commands import Reason, State
from gateway.config import load
from hil.arm import COMMAND, MOTORS, Arm
from hil.kafka import Broker
from tests.conftest import Kafka
from tests.system.conftest import MakeArm
from tests.system.rig import command_record, produce, see, wait_outcome

DOCS = Path(__file__).parents[2] / "docs" / "commands.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", DOCS.read_text().split("## Python")[1], re.DOTALL)
PRINTED = [
    # expired: if the machine stood still for longer than a setpoint is good
    r"done at 0\.\d+ rad\ndone\naccepted\ndone\njoint5 done\njoint6 done\n(None|.+<State.EXPIRED: .+)\n",
    r"done\ndone\ndone done\n",
]
TIMEOUT_S = 30.0


@pytest.mark.parametrize(("example", "printed"), list(zip(EXAMPLES, PRINTED, strict=True)))
def test_the_examples_run_as_they_are_printed(make_arm: MakeArm, example: str, printed: str) -> None:
    arm = make_arm(motion="still")
    arm.start()
    run = subprocess.run(
        [sys.executable, "-c", example, str(arm.config)], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.stderr == ""
    assert re.fullmatch(printed, run.stdout), run.stdout


@pytest.mark.parametrize("through_kafka", [False, True])
async def test_many_commands_at_once_hear_their_own_outcome_each(
    make_arm: MakeArm, kafka: Kafka, *, through_kafka: bool
) -> None:
    arm = make_arm(kafka.bootstrap if through_kafka else None, motion="still")
    await asyncio.to_thread(arm.start)
    beyond = [(motor, 10.0 + number) for number, motor in enumerate(MOTORS * 20)]
    async with Client(load(arm.config)) as client:
        outcomes = await asyncio.gather(
            *(client.command(motor, "position", at, ttl_ms=20_000, timeout_s=TIMEOUT_S) for motor, at in beyond)
        )
    assert {(outcome.state, outcome.reason) for outcome in outcomes} == {(State.REJECTED, Reason.OUT_OF_LIMITS)}
    told = [(outcome.motor, float(outcome.detail.split()[1])) for outcome in outcomes]
    assert told == beyond


async def test_a_stream_is_followed_to_its_newest_setpoints(make_arm: MakeArm) -> None:
    arm = make_arm(motion="still")
    await asyncio.to_thread(arm.start)
    async with Client(load(arm.config)) as client, client.stream("position", ttl_ms=20_000) as stream:
        for step in range(1, 51):
            stream.set(dict.fromkeys(MOTORS, step / 250))
            await asyncio.sleep(0.01)
        settled = await stream.settle(TIMEOUT_S)
    assert {motor: outcome.state for motor, outcome in settled.items()} == dict.fromkeys(MOTORS, State.DONE)
    assert stream.trouble is None, stream.trouble
    assert all(abs(float(outcome.detail.split()[1]) - 0.2) <= 0.02 for outcome in settled.values())


async def test_an_estop_of_a_program_needs_no_kafka_where_the_gateway_is(make_arm: MakeArm, kafka: Kafka) -> None:
    arm = make_arm(kafka.bootstrap, motion="still")
    await asyncio.to_thread(arm.start)
    async with Client(load(arm.config)) as client:
        client._way = None  # type: ignore[assignment]  # nothing of it can go through Kafka
        assert (await client.estop(TIMEOUT_S)).state is State.DONE


def test_without_a_gateway_a_client_says_so(make_arm: MakeArm) -> None:
    arm = make_arm(motion="still")
    with pytest.raises(CommandError, match="no gateway runs on state_dir"), SyncClient(load(arm.config)):
        pass


def test_a_gateway_that_stopped_meanwhile_is_told_to_who_sends(make_arm: MakeArm) -> None:
    arm = make_arm(motion="still")
    arm.start()
    with SyncClient(load(arm.config)) as client:
        arm.stop()
        with pytest.raises(CommandError, match="no gateway runs on state_dir"):
            client.command("joint2", "position", 0.1)


def test_only_signed_commands_move_an_arm_with_keys(make_arm: MakeArm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELL1_SECRET", "correct horse battery staple")
    arm = make_arm(motion="still")
    with arm.config.open("a") as file:
        file.write('[commands]\nlocal = "signed"\n[[commands.key]]\nissuer = "cell1"\nsecret_env = "CELL1_SECRET"\n')
    arm.start()
    unsigned = arm.order("joint2", "position", "0.1", "--issuer", "cell1")
    assert (unsigned.returncode, unsigned.stdout) == (
        1, "joint2 rejected (unauthorized) issuer 'cell1': must be signed\n"
    )  # fmt: skip
    signed = arm.order("joint2", "position", "0.1", "--sign", "cell1")
    assert signed.returncode == 0, signed.stdout + signed.stderr
    monkeypatch.setenv("CELL1_SECRET", "another")
    assert arm.order("joint2", "position", "0.2", "--sign", "cell1").returncode == 1
    assert arm.order("joint2", "position", "0.2", "--sign", "cell2").returncode == 2
    assert arm.order("*", "estop").returncode == 0


def test_write_access_to_the_broker_alone_moves_nothing(
    make_arm: MakeArm, kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELL1_SECRET", "correct horse battery staple")
    arm = make_arm(kafka.bootstrap, motion="still")
    with arm.config.open("a") as file:
        file.write('[[commands.key]]\nissuer = "cell1"\nsecret_env = "CELL1_SECRET"\n')
    arm.start()
    produce(arm, "commands", 1, [command_record("forged", "joint2", 0.5, ttl_ms=20_000, age_ms=0)])
    outcome = wait_outcome(arm, "forged")
    assert (outcome["state"], outcome["reason"]) == ("rejected", "unauthorized")
    assert arm.order("joint1", "position", "0.1", "--sign", "cell1").returncode == 0
    arm.stop()
    assert max(abs(sample.position_rad) for sample in see(arm).of["joint2"]) < 0.01


def test_with_the_broker_away_an_estop_is_done_and_anything_else_ends_in_time(
    make_arm: MakeArm, own_broker: Broker
) -> None:
    arm = make_arm(own_broker.bootstrap, motion="still")
    arm.start()
    own_broker.pause()
    estop = arm.order("*", "estop")
    assert (estop.returncode, estop.stderr) == (0, "")
    late = arm.order("joint2", "position", "0.1", "--timeout", "1")
    assert late.returncode == 1
    assert "the command could not be sent within 1 s" in late.stderr
    own_broker.resume()


def test_an_estop_goes_through_kafka_where_the_state_directory_takes_nothing(make_arm: MakeArm, kafka: Kafka) -> None:
    arm = make_arm(kafka.bootstrap, motion="still")
    arm.start()
    arm.wait_status(lambda status: status["kafka"]["state"] == "up", "kafka is there")
    for name in ("commands.db", "commands.db-wal", "commands.db-shm"):
        (arm.state / name).unlink(missing_ok=True)
    (arm.state / "commands.db").mkdir()
    estop = arm.order("*", "estop")
    assert "* done latched; 6 stopped" in estop.stdout
    assert "through Kafka" in estop.stderr
    assert estop.returncode == 0


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line_takes_units_and_several_targets(make_arm: MakeArm) -> None:
    arm = make_arm(motion="still")
    arm.start()
    done = arm.order("joint2", "position", "-10deg", "--velocity", "90deg/s")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-2]) == pytest.approx(-0.1745, abs=0.02)
    done = command(arm, "--target", "joint1=10deg", "--target", "joint4=-0.1")
    assert done.returncode == 0, done.stderr
    at_rad = {motor: float(at) for motor, at in re.findall(r"(joint\d) at (\S+) rad", done.stdout)}
    assert at_rad == {"joint1": pytest.approx(0.1745, abs=0.02), "joint4": pytest.approx(-0.1, abs=0.02)}


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["joint2", "position", "10rpm"], "10rpm: a position is in rad, mrad, deg or turn, not in rpm"),
        (["joint2", "position"], "position needs a value"),
        (["joint2", "enable", "1"], "1: enable takes no value"),
        (["joint2"], "MOTOR and KIND are missing"),
        (["joint2", "position", "--target", "joint1=1"], "leave MOTOR and VALUE out"),
        (["--target", "joint1=1", "--target", "joint1=2"], "--target: each motor once"),
        (["--target", "joint1"], "joint1: must be MOTOR=VALUE"),
        (["joint2", "enable", "--sign", "a", "--issuer", "b"], "--sign and --issuer: one of the two"),
    ],
)
def test_what_cannot_be_meant_is_wrong_use(make_arm: MakeArm, words: list[str], fault: str) -> None:
    done = command(make_arm(), *words)
    assert done.returncode == 2
    assert fault in " ".join(done.stderr.replace("│", " ").split())


def test_no_outcome_in_time_is_a_failure_and_without_waiting_only_the_sending_counts(make_arm: MakeArm) -> None:
    arm = make_arm(motion="still")
    arm.start()
    late = arm.order("joint2", "position", "1.5", "--velocity", "0.1", "--timeout", "0.5")
    assert late.returncode == 1
    assert "no final outcome within 0.5 s" in late.stderr
    sent = command(arm, "joint2", "position", "7", "--no-wait", "--json")
    assert sent.returncode == 0
    assert list(json.loads(sent.stdout)) == ["command_id"]


@pytest.mark.parametrize("through_kafka", [False, True])
def test_a_terminal_shows_the_way_of_a_position(make_arm: MakeArm, kafka: Kafka, *, through_kafka: bool) -> None:
    arm = make_arm(kafka.bootstrap if through_kafka else None, motion="still")
    arm.start()
    ours, theirs = pty.openpty()
    words = [*COMMAND, "command", str(arm.config), "joint2", "position", "0.5", "--velocity", "0.5"]
    with subprocess.Popen(words, stdout=theirs, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(theirs)
        shown = b""
        while part := _read(ours):
            shown += part
    os.close(ours)
    assert process.returncode == 0
    ways = [float(way) for way in re.findall(r"joint2 (-?\d\.\d{3}) -> 0\.500 rad", shown.decode())]
    assert len(ways) > 2
    assert 0 < max(ways) - min(ways) <= 0.6
    assert re.search(r"joint2 done at 0\.\d+ rad", shown.decode())


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # nobody has the other end any more
        return b""


def command(arm: Arm, *words: str) -> subprocess.CompletedProcess[str]:
    return arm.cli("command", str(arm.config), *words)
