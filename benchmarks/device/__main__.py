"""Measures memopt on a GPU: what memory it takes, how fast it is, whether its tests pass there.

    python -m benchmarks.device [--piece NAME ...] [--small]
    python -m benchmarks.device report

Pieces run in the order of their worth, each in at most four minutes, each part of one in a process
of its own. Every row is written as soon as it is known; what the file has already, of the same
device, is not measured again, unless it failed: stop it at any time, and go on with the same
command. It needs nothing but memopt's repository, flax, optax, orbax-checkpoint, tokenizers and
rich; torch stands beside where it is installed, and pytest runs the tests.
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.device import report
from benchmarks.device.jobs import Job, Record, pieces
from benchmarks.machine import Gpu, cpu_model, find_gpu, versions
from benchmarks.report import save

RESULTS = Path(__file__).parents[1] / "results" / "device.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch")
SECONDS = 240.0  # of a piece
WIDTH = 140  # of the tables


def collect(
    command: Sequence[str], names: Sequence[str], environment: dict[str, str], seconds: float
) -> Iterator[Record]:
    """The records that a process prints; one with an error for each name that it does not.

    Args:
      command: the process.
      names: of the records that it should print.
      environment: its environment variables.
      seconds: after which it is stopped.
    """
    missing = dict.fromkeys(names)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        late = threading.Event()

        def kill() -> None:
            """Also the processes that it started."""
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def stop() -> None:
            late.set()
            kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            for line in process.stdout:
                record = json.loads(line)
                missing.pop(record["name"])
                yield record
            status = process.wait()
        finally:
            timer.cancel()
            kill()
    why = f"stopped after {seconds:.0f} s" if late.is_set() else f"its process ended with {status}"
    for name in missing:
        yield {"name": name, "error": f"{why}."}


def run_job(
    piece: str, number: int, job: Job, names: Sequence[str], gpu: Gpu | None, seconds: float
) -> Iterator[Record]:
    """The records of a job, each with the seconds since the one before."""
    command = [sys.executable, "-m", "benchmarks.device.job", piece, str(number)]
    environment = dict(os.environ)
    if not gpu:
        command += ["--small"]
        environment["JAX_PLATFORMS"] = "cpu"
    elif job.memory:
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{job.memory / gpu.memory:.5f}"
    start = time.monotonic()
    for record in collect([*command, *names], names, environment, seconds):
        taken, start = time.monotonic() - start, time.monotonic()
        yield {"piece": piece, **record, "seconds": taken}


def run(chosen: Sequence[str], gpu: Gpu | None, path: Path, command: str) -> list[Record]:
    """Measures what is missing; returns all rows of this device."""
    device = gpu.name if gpu else cpu_model()
    everything = read(path)
    console = Console(stderr=True)
    key = lambda row: (row["device"], row["piece"], row["name"])
    for piece in chosen:
        end = time.monotonic() + SECONDS
        for number, job in enumerate(pieces()[piece]):
            done = {key(row) for row in everything if "error" not in row}
            names = [name for name in job.names if (device, piece, name) not in done]
            if not names:
                continue
            left = end - time.monotonic()
            for record in run_job(piece, number, job, names, gpu, max(left, 0)):
                about = {
                    "device": device,
                    "python": platform.python_version(),
                    "versions": versions(PACKAGES),
                    "command": command,
                }
                row = {**record, **about}
                everything = [other for other in everything if key(other) != key(row)] + [row]
                save({"results": everything}, path)
                console.print(report.line(row), highlight=False)
    return [row for row in everything if row["device"] == device]


def read(path: Path) -> list[Record]:
    """The rows of a file; none if it is not there."""
    return json.loads(path.read_text())["results"] if path.exists() else []


def main(arguments: Sequence[str]) -> None:
    """Measures or reports."""
    names = tuple(pieces())
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
    parser.add_argument(
        "--piece", nargs="+", choices=names, default=names, help="which; all by default"
    )
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes on this machine's CPU, to try it out"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="the JSON file; by default benchmarks/results/device.json, or a new file if small",
    )
    options = parser.parse_args(arguments)
    path: Path = options.output or RESULTS
    if options.small and not options.output:
        path = Path(tempfile.mkdtemp()) / "device.json"
    if options.action == "report":
        if not (rows := read(path)):
            sys.exit(f"error: {path} has no rows: run python -m benchmarks.device first.")
    else:
        gpu = None if options.small else find_gpu()
        if not (gpu or options.small):
            sys.exit("error: nvidia-smi finds no GPU here; --small runs the same on a CPU.")
        command = shlex.join(["python", "-m", "benchmarks.device", *arguments])
        rows = run([name for name in names if name in options.piece], gpu, path, command)
    console = Console(width=max(Console().width, WIDTH))
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device]
        for table in report.tables(mine):
            console.print(table)
        if options.action == "report":
            name = "_".join(device.lower().split())
            report.plot(mine, path.with_name(f"{path.stem}_{name}.png"))
    print(f"{len(rows)} rows are in {path}.")
    if options.action == "report":
        return
    if failed := sum("error" in row for row in rows):
        sys.exit(f"error: {failed} of them say what failed; the same command tries them again.")


if __name__ == "__main__":
    main(sys.argv[1:])
