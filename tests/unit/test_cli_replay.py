"""What the words of ``servo-gateway replay`` mean, and which are wrong before anything is opened."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.cli.main import app
from gateway.cli.replay import parse_speed


@pytest.mark.parametrize(("word", "speed"), [("0.1", 0.1), ("1", 1.0), ("25", 25.0), ("max", None)])
def test_a_speed_is_a_number_from_a_tenth_on_or_max(word: str, speed: float | None) -> None:
    assert parse_speed(word) == speed


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ([], "--into ARM is missing"),
        (["--into", "a/b"], "--into a/b"),
        (["--into", "again", "--speed", "0.05"], "--speed 0.05"),
        (["--into", "again", "--speed", "inf"], "--speed inf"),
        (["--into", "again", "--state-dir", "there", "--kafka", "broker:9092"], "one of the two"),
        (["--into", "again", "--as-motors", "config/simulated-arm.toml", "--speed", "max"], "motors need a number"),
    ],
)
def test_wrong_words_are_refused_with_what_would_be_right(options: list[str], why: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["replay", str(tmp_path / "journal.db"), *options], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert why in done.output
