"""One job, in a process of its own: prints a record a line, in JSON.

python -m benchmarks.device.job PIECE NUMBER [--small] NAME ...
"""

import json
import os
import sys
import traceback
from collections.abc import Sequence

from benchmarks.device.jobs import describe, pieces


def main(arguments: Sequence[str]) -> None:
    """Measures; whatever fails becomes a record, too."""
    piece, number, *names = arguments
    small = names[:1] == ["--small"]
    names = names[small:]
    records = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no record

    def give(record: object) -> None:
        print(json.dumps(record), file=records, flush=True)

    missing = dict.fromkeys(names)
    try:
        for record in pieces()[piece][int(number)].measure(names, small):
            missing.pop(record["name"])
            give(record)
    except Exception as error:
        traceback.print_exc()
        for name in missing:
            give({"name": name, "error": describe(error)})


if __name__ == "__main__":
    main(sys.argv[1:])
