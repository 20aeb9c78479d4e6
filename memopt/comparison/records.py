"""The results of a comparison: JSON lines that several processes append to."""

import fcntl
import functools
import json
import math
import os
import platform
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import jax

from memopt.comparison.cells import Cell, Outcome, Program, count_parameters
from memopt.comparison.protocol import PRESETS
from memopt.comparison.rows import Row
from memopt.functions import digest_of_source
from memopt.json_lines import read_json_lines
from memopt.machine import core_count, cpu_model, versions
from memopt.training.writing import writing

#: Files in the directory of a comparison.
RESULTS, RESULTS_TO_TARGET = "compare.jsonl", "targets.jsonl"


class Run(TypedDict):
    """The record of a run, a line of `compare.jsonl` or `targets.jsonl`.

    Attributes:
        method: Name of the row.
        tuned_as: Name of the row whose setting it has, another one if it has fewer bits.
        optimizer: As `memopt.comparison.rows.Row.optimizer`.
        options: All options of the optimizer that were given.
        state: Precision of the state; null: as the optimizer makes it.
        weights: Precision of matrices; null: as the model has them.
        release: Whether each block is updated while the backward pass runs.
        source: A digest of the file with a user's optimizer; null for those of the registry.
        size: Name of the model's size.
        parameters: How many parameters the model has.
        batch_size: Rows of a batch.
        seq_len: Tokens of a row.
        steps: Steps of the run.
        tokens: Tokens of the run.
        text: A digest of the text.
        eval_tokens: Held-out tokens that are evaluated on.
        seed: Decides the first weights and the order of the data.
        learning_rate: The highest learning rate.
        schedule: Name of the learning rate's schedule.
        warmup: Share of the steps in which the learning rate rises from 0.
        final_learning_rate: Learning rate at the end, as a share of the highest.
        tuned: Whether the run counts: if not, it served to find the setting.
        target_loss: The loss to which the fewest steps are sought; absent if none is.
        val_loss: Loss on the held-out tokens at the end, in nats; null if the run diverged.
        val_losses: Pairs of step and loss; of runs that count, at each twentieth of the run.
        diverged: Whether the losses ceased to be finite.
        state_bytes: Bytes of the optimizer's state.
        parameter_bytes: Bytes of the parameters.
        step_seconds: Median time of a step; null if other programs used the processor.
        step_cpu_seconds: Median processor time of a step, of all cores together; null elsewhere.
        seconds: Time of the run, with its compilation.
        key: A digest of all that decides the result: runs of the same key are not repeated.
        versions: Versions of the packages.
        machine: Device, processor and number of cores.
        command: The command.
    """

    method: str
    tuned_as: str
    optimizer: str
    options: dict[str, Any]
    state: str | None
    weights: str | None
    release: bool
    source: str | None
    size: str
    parameters: int
    batch_size: int
    seq_len: int
    steps: int
    tokens: int
    text: str
    eval_tokens: int
    seed: int
    learning_rate: float
    schedule: str
    warmup: float
    final_learning_rate: float
    tuned: bool
    target_loss: NotRequired[float]
    val_loss: float | None
    val_losses: list[list[float]]
    diverged: bool
    state_bytes: int
    parameter_bytes: int
    step_seconds: float | None
    step_cpu_seconds: float | None
    seconds: float
    key: str
    versions: dict[str, str]
    machine: dict[str, Any]
    command: str


def program_of(run: Run) -> Program:
    """Returns what the step of a run is compiled for.

    Raises:
        ValueError: The model is of no preset, or the file with the optimizer is another one now.
    """
    size, count = run["size"], run["parameters"]
    models = [protocol.models[size] for protocol in PRESETS.values() if size in protocol.models]
    model = next((model for model in models if count_parameters(model) == count), None)
    if model is None:
        raise ValueError(f"no preset has a model {size} of {count} parameters.")
    name = run["optimizer"]
    if run["source"] and run["source"] != digest_of_source(name):
        raise ValueError(f"the file of {name} has changed since its run.")
    # JSON has lists in place of tuples.
    options = {n: tuple(x) if isinstance(x, list) else x for n, x in run["options"].items()}
    return Program(
        optimizer=name,
        options=tuple(sorted(options.items())),
        state=run["state"],
        weights=run["weights"],
        release=run["release"],
        model=model,
        batch_size=run["batch_size"],
        seq_len=run["seq_len"],
    )


def results_file(directory: Path, target_loss: float | None) -> Path:
    """Returns the file of the results in a directory: those to a target have another one."""
    return directory / (RESULTS if target_loss is None else RESULTS_TO_TARGET)


def make_record(size: str, row: Row, cell: Cell, outcome: Outcome, *, tuned: bool) -> Run:
    """Returns the record of a run.

    Args:
        size: The name of the model's size.
        row: The row.
        cell: The run.
        outcome: What was measured.
        tuned: As `Run.tuned`.
    """
    program = cell.program
    return {
        "method": row.name,
        "tuned_as": row.exact.name,
        "optimizer": row.optimizer,
        "options": dict(program.options),
        "state": row.state,
        "weights": row.weights,
        "release": row.release,
        "size": size,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "tuned": tuned,
        "steps": cell.steps,
        "tokens": cell.steps * program.batch_size * program.seq_len,
        "batch_size": program.batch_size,
        "seq_len": program.seq_len,
        "text": cell.text,
        "eval_tokens": cell.eval_tokens,
        "source": cell.source,
        "schedule": cell.schedule,
        "warmup": cell.warmup,
        "final_learning_rate": cell.final_learning_rate,
        "val_loss": None if outcome.diverged else outcome.val_loss,
        "val_losses": outcome.val_losses,
        "diverged": outcome.diverged,
        "state_bytes": outcome.state_bytes,
        "parameter_bytes": outcome.parameter_bytes,
        "parameters": outcome.parameters,
        "step_seconds": outcome.step_seconds,
        "step_cpu_seconds": outcome.step_cpu_seconds,
        "seconds": outcome.seconds,
        "key": cell.key,
        "versions": _versions(),
        "machine": _machine(),
        "command": shlex.join([_program(), *sys.argv[1:]]),
    }


@functools.cache
def _versions() -> dict[str, str]:
    packages = versions(("memopt", "jax", "jaxlib", "optax"))
    return packages | {"python": platform.python_version()}


@functools.cache
def _machine() -> dict[str, Any]:
    device = jax.devices()[0].device_kind
    return {"device": device, "cpu": cpu_model(), "cores": core_count()}


def _program() -> str:
    name = Path(sys.argv[0]).name
    return "memopt" if name == "__main__.py" else name


def read_records(path: Path) -> list[Run]:
    """Reads the finished runs; none if there is no file.

    A last line without an end is being written, or was when its process was killed: it is left out.
    """
    found: list[Run] = []
    for record in read_json_lines(path, "its run is repeated"):
        if isinstance(record, dict) and record.keys() >= Run.__required_keys__:
            found.append(cast(Run, record))
        else:
            warnings.warn(f"{str(path)!r}: {str(record)[:40]!r} is no run; left out.", stacklevel=2)
    return found


def loss_of(run: Run) -> float:
    """Returns the final validation loss of a run; infinite if it diverged."""
    return finite_loss(run["val_loss"])


def finite_loss(loss: float | None) -> float:
    """Returns a loss, infinite if it is none or not a number.

    Example:
        >>> finite_loss(2.0), finite_loss(None), finite_loss(float("nan"))
        (2.0, inf, inf)
    """
    return loss if loss is not None and math.isfinite(loss) else math.inf


def append_record(path: Path, record: Run) -> None:
    """Adds a line, after the removal of one that a killed process has left without its end.

    Args:
        path: The file.
        record: A JSON object without infinite numbers.

    Raises:
        WriteError: The file cannot be written; it is as it was.
    """
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    advice = "make room or repair the disk, and give the command again; all runs in it are kept"
    with writing(repr(str(path)), advice), path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = _end_of_lines(file.fileno())
        os.ftruncate(file.fileno(), end)
        try:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


def _end_of_lines(descriptor: int) -> int:
    """The bytes up to the end of the last whole line."""
    end, size = os.fstat(descriptor).st_size, 4096
    while end:
        start = max(0, end - size)
        if (found := os.pread(descriptor, end - start, start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0
