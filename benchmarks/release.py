"""Compares speed and resident memory of the released step and the ordinary one on this machine.

    nice python -m benchmarks.release [--model 350m] [--optimizer adafactor] [--repeats 5]

Both compute the same update of the same model in float32, and both recompute each block in the
backward pass. Speed is measured in one process, in alternating steps. Memory is measured in a
separate process for each, as the peak of resident memory after compilation (Linux), and compared
with the compiler's prediction.

Prints a table and writes it as JSON.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks import training_step
from benchmarks.report import GIB, Report, spread
from benchmarks.training_step import TrainingStep
from memopt.errors import check_at_least
from memopt.planning.step_memory import step_memory

Kind = Literal["ordinary", "released"]
KINDS: tuple[Kind, ...] = ("ordinary", "released")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark.

    Attributes:
        model: a preset.
        optimizer: a name known to `memopt.optimizer`.
        batch_size: rows per batch.
        seq_len: tokens per row.
        repeats: the number of timed rounds.
        only: print the memory that a few steps of this kind take, as JSON.
        output: the JSON file.
    """

    model: str = "350m"
    optimizer: str = "adafactor"
    batch_size: int = 1
    seq_len: int = 256
    repeats: int = 5
    only: Kind | None = None
    output: Path = Path(__file__).parent / "results" / "release.json"


class Run:
    """A step and its state."""

    def __init__(self, options: Options, kind: Kind) -> None:
        self.options = options
        self.training = TrainingStep(
            training_step.Options(
                model=options.model,
                optimizer=options.optimizer,
                release=kind == "released",
                dtype="float32",
                batch_size=options.batch_size,
                seq_len=options.seq_len,
            ),
            jax.devices(),
        )
        self.compiled, self.init = self.training.compile(), self.training.compile_init()

    def start(self) -> None:
        """Initializes the state."""
        self.state = self.init()
        shape = (self.options.batch_size, self.options.seq_len)
        tokens = np.random.default_rng(1).integers(0, 1000, shape, np.int32)
        self.batch = self.training.place({"inputs": tokens, "targets": tokens})

    def step(self) -> float:
        """Takes one step, and returns its seconds."""
        start = time.perf_counter()
        self.state, _ = self.training(self.state, self.batch)
        jax.block_until_ready(self.state)
        return time.perf_counter() - start


def resident(options: Options, kind: Kind) -> dict[str, int | None]:
    """The bytes that a few steps take: the compiler's prediction, and the resident peak."""
    run = Run(options, kind)
    like = run.training.like
    said = step_memory(run.compiled, like.params, like.opt_state).peak
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    run.start()
    for _ in range(3):
        run.step()
    return {"compiler_bytes": said, "resident_bytes": _status("VmHWM") - before}


def _status(name: str) -> int:
    """Reads a number of bytes from Linux's status of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def in_own_process(arguments: Sequence[str], kind: Kind) -> dict[str, int]:
    """Runs `resident` in a new process."""
    command = [sys.executable, "-m", "benchmarks.release", *arguments, "--only", kind]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(options: Options, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a record for each kind of step."""
    sizes = [in_own_process(arguments, kind) for kind in KINDS]
    runs = [Run(options, kind) for kind in KINDS]
    for run in runs:
        run.start()
        run.step()  # warm-up
    rounds = [[run.step() for run in runs] for _ in range(options.repeats)]
    tokens = options.batch_size * options.seq_len
    return [
        {
            "kind": kind,
            "tokens_per_second": spread([tokens / seconds for seconds in taken]),
            "speed": spread(
                [first / seconds for (first, _), seconds in zip(rounds, taken, strict=True)]
            ),
            **size,
        }
        for kind, size, taken in zip(KINDS, sizes, zip(*rounds, strict=True), strict=True)
    ]


def table(report: dict[str, Any]) -> Table:
    """The records as a table for the terminal."""
    title = f"LLaMA-{report['model']}, {report['optimizer']}, float32, {report['cores']} cores"
    shown = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("step")
    for column in ("tokens/s", "÷ ordinary", "min–max", "resident GiB", "compiler's GiB"):
        shown.add_column(column, justify="right", no_wrap=True)
    for r in report["results"]:
        sizes = (r["resident_bytes"], r["compiler_bytes"])
        speed = r["speed"]
        shown.add_row(
            r["kind"],
            f"{r['tokens_per_second']['median']:.1f}",
            f"{speed['median']:.2f}",
            f"{speed['min']:.2f}–{speed['max']:.2f}",
            *(f"{size / GIB:.2f}" for size in sizes),
        )
    return shown


def main(arguments: Sequence[str]) -> None:
    """Measures, prints the table and writes the file."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    try:
        check_at_least("repeats", options.repeats, 1)
        if options.only:
            print(json.dumps(resident(options, options.only)))
            return
        results = measure(options, arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
    settings = {k: getattr(options, k) for k in ("model", "optimizer", "batch_size", "seq_len")}
    report = Report("release", arguments, options.output, results, **settings)
    Console().print(table(report.content()))
    report.save()


if __name__ == "__main__":
    main(sys.argv[1:])
