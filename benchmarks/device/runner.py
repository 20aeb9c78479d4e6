"""Runs jobs in separate processes and saves their records in a file."""

import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.device import report
from benchmarks.device.jobs import Job, Record, pieces
from benchmarks.machine import Gpu
from benchmarks.report import save
from memopt.machine import cpu_model, versions

PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu13"),
    *("flax", "optax", "orbax-checkpoint", "torch"),
)
#: Maximum seconds per piece on a GPU.
PIECE_SECONDS = 240.0
NOT_STARTED = "not started: the time was used up."
#: Variables that would change how much of the GPU's memory a job may use.
ALLOCATOR = (
    *("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"),
    *("XLA_PYTHON_CLIENT_ALLOCATOR", "XLA_PYTHON_CLIENT_PREALLOCATE"),
)


def run(
    chosen: Sequence[str], gpu: Gpu | None, path: Path, command: str, seconds: float
) -> list[Record]:
    """Measures the rows that are missing in a file.

    Args:
        chosen: the names of pieces.
        gpu: the GPU; None for tiny shapes on the CPU, without a time limit.
        path: the file.
        command: the user's command line.
        seconds: the time after which no job is started.

    Returns:
        All rows of this device.
    """
    rows, console = read(path), Console(stderr=True, markup=False)
    about = {
        "device": gpu.name if gpu else cpu_model(),
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "command": command,
    }
    key = lambda row: (row["device"], row["piece"], row["name"])
    finish = time.monotonic() + seconds
    save({"results": rows}, path)  # fails at once if the file cannot be written
    for piece in chosen:
        end = min(finish, time.monotonic() + PIECE_SECONDS) if gpu else math.inf
        for job in pieces()[piece]:
            done = {key(row) for row in rows if "error" not in row}
            names = [name for name in job.names if (about["device"], piece, name) not in done]
            for record in run_job(piece, job, names, gpu, end) if names else ():
                row = {"piece": piece, **record, **about}
                if row.get("error") == NOT_STARTED and key(row) in map(key, rows):
                    continue  # the earlier error is more informative
                rows = [other for other in rows if key(other) != key(row)] + [row]
                save({"results": rows}, path)
                console.print(report.line(row), highlight=False)
    return [row for row in rows if row["device"] == about["device"]]


def run_job(
    piece: str, job: Job, names: Sequence[str], gpu: Gpu | None, end: float
) -> Iterator[Record]:
    """Yields the records of a job, each with the seconds since the job started.

    Args:
        piece: the job's piece.
        job: the job.
        names: the requested rows.
        gpu: the GPU that it runs on; None for the CPU.
        end: the time at which the job is stopped, by `time.monotonic`.
    """
    start = time.monotonic()
    if end <= start:
        for name in names:
            yield {"name": name, "error": NOT_STARTED, "seconds": 0.0}
        return
    command = [sys.executable, "-m", "benchmarks.device.job", *([] if gpu else ["--small"])]
    environment = environment_of(job, gpu)
    for record in collect([*command, piece, *names], names, environment, end - start):
        yield record | {"seconds": time.monotonic() - start}


def environment_of(job: Job, gpu: Gpu | None) -> dict[str, str]:
    """The environment of a job, in which JAX fails to start if the GPU is not usable."""
    if gpu is None:
        return os.environ | {"JAX_PLATFORMS": "cpu"}
    environment = {k: v for k, v in os.environ.items() if k not in ALLOCATOR}
    environment["JAX_PLATFORMS"] = "cuda,cpu"
    if job.memory:
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{job.memory / gpu.memory:.5f}"
    return environment


def collect(
    command: Sequence[str],
    names: Sequence[str],
    environment: dict[str, str],
    seconds: float,
) -> Iterator[Record]:
    """Yields the records that a process prints, and one with an error for each missing name.

    Args:
        command: the command of the process.
        names: the names of the records that it should print.
        environment: its environment variables.
        seconds: the time after which it and its child processes are killed.
    """
    missing = dict.fromkeys(names)
    late = threading.Event()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, process_group=0
    ) as process:
        assert process.stdout is not None

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def stop() -> None:
            late.set()
            kill()

        timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), stop)
        timer.start()
        try:
            for line in process.stdout:
                with contextlib.suppress(json.JSONDecodeError):  # truncated by a kill
                    record = json.loads(line)
                    missing.pop(record["name"], None)
                    yield record
            status = process.wait()
        finally:
            timer.cancel()
            kill()
    why = f"stopped after {seconds:.0f} s" if late.is_set() else f"its process ended with {status}"
    for name in missing:
        yield {"name": name, "error": f"{why}."}


def read(path: Path) -> list[Record]:
    """Reads the rows of a file; none if it does not exist.

    Raises:
        ValueError: if it is not such a file.
    """
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text())["results"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has no results: move it away, or repair it.") from error
