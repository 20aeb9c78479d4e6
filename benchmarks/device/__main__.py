"""Measures memopt on a GPU: memory, speed, and whether its tests pass there.

    python -m benchmarks.device [--piece NAME ...] [--minutes 15] [--small]
    python -m benchmarks.device report

Pieces run in order of importance, at most four minutes each, in separate processes. Every row is
written as soon as it is measured. Rows of the same device that are already in the file are not
measured again, unless they failed: you may stop at any time and continue with the same command.

It needs a checkout of memopt, flax, optax, orbax-checkpoint, tokenizers and rich. Torch's AdamW is
also measured if torch is installed; the tests need pytest, and the report's plot matplotlib.
"""

import argparse
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.device import report, runner
from benchmarks.device.jobs import pieces
from benchmarks.machine import find_gpu

RESULTS = Path(__file__).parents[1] / "results" / "device.json"
TABLE_WIDTH = 140


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "action",
        nargs="?",
        choices=("run", "report"),
        default="run",
        help="measure (the default), or print the tables of a file and draw its plots beside it",
    )
    names = tuple(pieces())
    parser.add_argument(
        "--piece", nargs="+", choices=names, default=names, help="which pieces; by default all"
    )
    parser.add_argument(
        "--minutes", type=float, default=15.0, help="start nothing after that; by default 15"
    )
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes on the CPU, to try it out; no time limit"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="the JSON file; by default benchmarks/results/device.json, or a new file if small",
    )
    options = parser.parse_args(arguments)
    if options.output is None:
        options.output = Path(tempfile.mkdtemp()) / RESULTS.name if options.small else RESULTS
    return options


def main(arguments: Sequence[str]) -> None:
    """Measures or reports."""

    def leave(*_: Any) -> None:
        sys.exit("error: terminated.")

    for number in (signal.SIGTERM, signal.SIGHUP):  # so that the running job is killed too
        signal.signal(number, leave)
    options = parse(arguments)
    path: Path = options.output
    try:
        if options.action == "report":
            if not (rows := runner.read(path)):
                sys.exit(f"error: {path} has no rows: run python -m benchmarks.device first.")
        else:
            gpu = None if options.small else find_gpu()
            if not (gpu or options.small):
                sys.exit("error: nvidia-smi finds no GPU; --small runs the same on a CPU.")
            command = shlex.join(["python", "-m", "benchmarks.device", *arguments])
            chosen = [name for name in pieces() if name in options.piece]
            rows = runner.run(chosen, gpu, path, command, 60 * options.minutes)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    console = Console(width=max(Console().width, TABLE_WIDTH), markup=False)
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device]
        for table in report.tables(mine):
            console.print(table)
        if options.action == "report":
            name = "_".join(device.lower().split())
            report.plot(mine, path.with_name(f"{path.stem}_{name}.png"))
    print(f"{len(rows)} rows are in {path}.")
    failed = sum("error" in row for row in rows)
    if failed and options.action == "run":
        sys.exit(f"error: {failed} rows failed and have their errors; run the command again.")


if __name__ == "__main__":
    main(sys.argv[1:])
