"""The results of a comparison: JSON lines that several processes append to."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from memopt.json_lines import read_json_lines
from memopt.training.writing import WriteError, why

#: The file in the directory of a comparison, and that of steps to a target.
RESULTS, TARGETS = "compare.jsonl", "targets.jsonl"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads the finished runs; none if there is no file.

    A last line without an end is being written, or was when its process was killed: it is left out.
    """
    return read_json_lines(path, "its run is repeated")


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
