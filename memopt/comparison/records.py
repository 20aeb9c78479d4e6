"""The results of a comparison: JSON lines that several processes append to."""

import fcntl
import functools
import json
import os
import platform
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import jax

from memopt.comparison.cells import Cell, Outcome
from memopt.comparison.rows import Row
from memopt.json_lines import read_json_lines
from memopt.machine import core_count, cpu_model, versions
from memopt.training.writing import WriteError, why

#: The file in the directory of a comparison, and that of steps to a target.
RESULTS, TARGETS = "compare.jsonl", "targets.jsonl"


#: Fields without which a run is not known.
FIELDS = {"key", "method", "optimizer", "options", "size", "batch_size", "seed", "learning_rate"}
FIELDS |= {"tuned", "steps", "tokens", "val_loss", "val_losses", "state_bytes", "parameter_bytes"}


def record(size: str, row: Row, cell: Cell, outcome: Outcome, *, tuned: bool) -> dict[str, Any]:
    """Returns the JSON object of a run.

    Beside the fields of `Row`, `Cell`, `Program` and `Outcome`, it has `method`, the name of the
    row; `size`, that of the model; `tuned`, whether the run counts: if not, it served to find the
    setting; `tuned_as`, the name of the row whose setting it has; `tokens`; `target_loss` if one is
    given; `key`, `versions`, `machine`, `command`. `val_loss` is null if the run diverged.

    Args:
        size: The name of the model's size.
        row: The row.
        cell: The run.
        outcome: What was measured.
        tuned: As above.
    """
    program = cell.program
    finite = outcome._asdict() | {"val_loss": None if outcome.diverged else outcome.val_loss}
    return {
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
        **finite,
        "key": cell.key,
        **_circumstances(),
    }


@functools.cache
def _circumstances() -> dict[str, Any]:
    """The versions, the machine and the command of a run; they do not decide its result."""
    packages = versions(("memopt", "jax", "jaxlib", "optax"))
    device = jax.devices()[0].device_kind
    return {
        "versions": packages | {"python": platform.python_version()},
        "machine": {"device": device, "cpu": cpu_model(), "cores": core_count()},
        "command": shlex.join([_program(), *sys.argv[1:]]),
    }


def _program() -> str:
    name = Path(sys.argv[0]).name
    return "memopt" if name == "__main__.py" else name


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads the finished runs; none if there is no file.

    A last line without an end is being written, or was when its process was killed: it is left out.
    """
    found = []
    for record in read_json_lines(path, "its run is repeated"):
        if isinstance(record, dict) and record.keys() >= FIELDS:
            found.append(record)
        else:
            warnings.warn(f"{str(path)!r}: {str(record)[:40]!r} is no run; left out.", stacklevel=2)
    return found


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Adds a line, after the removal of one that a killed process has left without its end.

    Args:
        path: The file.
        record: A JSON object without infinite numbers.

    Raises:
        WriteError: The file cannot be written; it is as it was.
    """
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    try:
        with path.open("ab+") as file:
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
    except OSError as error:
        raise WriteError(
            f"{str(path)!r} cannot be written ({why(error)}): make room or repair the disk, and "
            "give the command again; all runs in it are kept."
        ) from error


def _end_of_lines(descriptor: int) -> int:
    """The bytes up to the end of the last whole line."""
    end, size = os.fstat(descriptor).st_size, 4096
    while end:
        start = max(0, end - size)
        if (found := os.pread(descriptor, end - start, start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0
