"""Runs one job: `python -m benchmarks.device.job [--small] PIECE NAME ...`.

Each of its records is printed as a line of JSON.
"""

import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str]) -> None:
    """Measures some rows of one job; if it fails, prints an error for each that is missing."""
    records = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # any other output, also of imports, goes to the terminal
    from benchmarks.device.jobs import describe, pieces

    small = "--small" in arguments
    piece, *names = (argument for argument in arguments if argument != "--small")
    (job,) = (job for job in pieces()[piece] if set(names) <= set(job.names))

    def give(record: dict[str, Any]) -> None:
        print(json.dumps(record), file=records, flush=True)

    missing = dict.fromkeys(names)
    try:
        for record in job.measure(names, small):
            missing.pop(record["name"], None)
            give(record)
    except Exception as error:
        traceback.print_exc()
        for name in missing:
            give({"name": name, "error": describe(error)})


if __name__ == "__main__":
    main(sys.argv[1:])
