"""The table of a torture, and everything as JSON."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hil.judge import table
from hil.torture.run import Memory, Result

HEADER = (
    *("run", "faults", "offered", "lost", "told", "repeated", "disorder", "streams"),
    *("stall ms", "recover s", "commands", "PSS MB", "verdict"),
)
COUNTS = ("fault", "times", "recover s, median", "worst")


def text(results: Sequence[Result], missing: dict[str, str]) -> str:
    """Both tables, and below them everything that is wrong."""
    lines = [table(HEADER, [_row(result) for result in results])]
    mixes = [result for result in results if len({one.fault for one in result.caused}) > 1]
    for result in mixes:
        lines += ["", f"{result.name}: {result.seconds:.0f} s, {result.lives} lives of the gateway", _counts(result)]
        if result.memory:
            lines.append(_memory(result.memory))
    lines += [f"left out: {name}: {why}" for name, why in missing.items()]
    for result in results:
        lines += [f"{result.name}: note: {note}" for note in result.account.notes]
        lines += [f"{result.name}: WRONG: {wrong}" for wrong in result.wrong]
    return "\n".join(lines)


def _row(result: Result) -> list[str]:
    account = result.account
    recovered = [one.recover_s for one in result.caused if one.recover_s is not None]
    return [
        result.name,
        str(len(result.caused)),
        str(account.offered),
        str(account.lost),
        str(account.told),
        str(account.repeated),
        str(account.disordered),
        str(account.streams),
        f"{account.stall_ms:.0f}",
        f"{max(recovered):.1f}" if recovered else "-",
        f"{account.commands - account.unanswered}/{account.commands}",
        f"{result.memory.end_mb:.0f}" if result.memory else "-",
        "wrong" if result.wrong else "fine",
    ]


def _counts(result: Result) -> str:
    rows = []
    for name, count in sorted(Counter(one.fault for one in result.caused).items()):
        recovered = sorted(one.recover_s for one in result.caused if one.fault == name and one.recover_s is not None)
        median, worst = (recovered[len(recovered) // 2], recovered[-1]) if recovered else (float("nan"),) * 2
        rows.append([name, str(count), f"{median:.1f}", f"{worst:.1f}"])
    return table(COUNTS, rows or [["-"] * len(COUNTS)])


def _memory(memory: Memory) -> str:
    quarters = ", ".join(f"{mb:.1f}" for mb in memory.quarters_mb)
    return (
        f"PSS of the gateway over its longest life, {memory.seconds:.0f} s: {memory.start_mb:.1f} MB at the start, "
        f"medians of its quarters {quarters}, {memory.end_mb:.1f} at the end"
    )


def write_json(path: Path, seed: int, results: Sequence[Result], missing: dict[str, str]) -> None:
    """Everything, for a program."""
    document = {"seed": seed, "left_out": missing, "runs": [result.as_json() for result in results]}
    path.write_text(json.dumps(document, indent=2))
