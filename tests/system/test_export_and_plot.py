"""``export`` and ``plot`` as a user runs them, on a gateway's journal, its topics in a real Kafka and a recording."""

import csv
import subprocess
from collections import Counter
from pathlib import Path

from gateway.arrays import read_samples
from hil.arm import COMMAND, Arm
from tests.conftest import Kafka
from tests.log_parts import make_journal, make_records
from tests.system.conftest import MakeArm


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def has_run(arm: Arm) -> Arm:
    """After a while of logging, stopped."""
    arm.start()
    arm.wait_status(lambda status: all(motor["seq"] > 100 for motor in status["motors"]), "some samples")
    if arm.bootstrap:
        arm.wait_caught_up()
    assert arm.stop()[0] == 0
    return arm


def test_journal_topics_and_recording_are_exported_alike(make_arm: MakeArm, kafka: Kafka, tmp_path: Path) -> None:
    arm = has_run(make_arm(kafka.bootstrap))
    recording = tmp_path / "recording"
    assert run("record", arm.config, "--out", recording, "--no-follow").returncode == 0
    exported = {}
    sources: dict[str, tuple[Path, list[str]]] = {
        "journal": (arm.config, []),
        "kafka": (arm.config, ["--from-kafka"]),
        "recording": (recording, []),
    }
    for name, (source, options) in sources.items():
        out = tmp_path / f"{name}.csv"
        done = run("export", source, out, *options)
        assert (done.returncode, f"{out}: " in done.stderr) == (0, True), done
        with out.open(newline="") as file:
            exported[name] = sorted((row["motor"], int(row["seq"]), *row.values()) for row in csv.DictReader(file))
    assert exported["journal"] == exported["kafka"] == exported["recording"]
    counts = Counter(row[0] for row in exported["journal"])
    assert counts == {motor: len(samples) for motor, samples in read_samples(arm.config).items()}


def test_plot_draws_a_picture_and_sparklines(make_arm: MakeArm, tmp_path: Path) -> None:
    arm = has_run(make_arm())
    picture = tmp_path / "plot.png"
    assert run("plot", arm.config, "--out", picture).returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = run("plot", arm.config, "--motor", "joint2").stdout
    assert told.startswith(f"{arm.name}: ")
    assert "joint2  position" in told
    assert "motor.online" in told
    assert "joint1" not in told


def test_wrong_use_is_told_and_leaves_no_file(tmp_path: Path) -> None:
    journal = make_journal(tmp_path / "journal.db", make_records(10))
    for arguments, words in {
        ("export", journal, tmp_path / "x.csv", "--motor", "elbow"): "motor elbow: no samples in this span",
        ("export", journal, tmp_path / "x.csv", "--to", "yesterday"): "--to yesterday: must be a time as 2026-",
        ("export", journal, tmp_path / "x.csv", "--topic", "news"): "--topic news: must be one of telemetry",
        ("export", journal, tmp_path / "x.csv", "--topic", "commands"): "the journal keeps no commands",
        ("export", journal, tmp_path / "x.txt"): "x.txt: must end in .parquet or .csv",
        ("export", journal, journal): "exists; --force overwrites it",
        ("plot", journal, "--out", tmp_path / "x.jpg"): "x.jpg: must end in .png or .svg",
        ("plot", journal, "--to", "2020-01-01T00:00:00Z"): "arm arm1: nothing to draw in this span",
        ("plot", tmp_path / "none.mcap"): "none.mcap: No such file",
    }.items():
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert words in " ".join(done.stderr.replace("│", " ").split()), done
        assert [*tmp_path.glob("*x.*")] == []
