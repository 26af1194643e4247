"""``python -m hil.bench [NAME ...] [--json FILE] [--seconds S]``: measure, print tables, write one JSON document."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from hil.bench import commands, cycle, event_cost, gateway_cpu, logs, report, restart, round_trip, wire
from hil.kafka import RigError

BENCHMARKS: dict[str, Callable[[Console, float], dict[str, Any]]] = {
    "event-cost": event_cost.run,
    "cycle": cycle.run,
    "wire": wire.run,
    "gateway-cpu": gateway_cpu.run,
    "restart": restart.run,
    "commands": commands.run,
    "logs": logs.run,
    "round-trip": round_trip.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is named, or everything."""
    parser = argparse.ArgumentParser(prog="python -m hil.bench", description="Measure the gateway on this machine.")
    parser.add_argument("name", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; none: all of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, as JSON")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of each measurement (%(default)s)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.name if name not in BENCHMARKS]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    document: dict[str, Any] = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": options.seconds,
        "machine": report.machine(),
        "benchmarks": {},
    }
    console.print(document["machine"])
    try:
        for name in options.name or BENCHMARKS:
            stolen = report.Stolen()
            document["benchmarks"][name] = BENCHMARKS[name](console, options.seconds)
            document["benchmarks"][name]["stolen"] = stolen.share
            console.print(f"{name}: the machine's host gave {stolen.share:.1%} of its processors to others meanwhile")
    except RigError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if options.json:
            options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
