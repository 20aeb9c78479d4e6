"""Runs the tests marked `device`."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.device.jobs import Job, Record

ROOT = Path(__file__).parents[2]
COMMAND = [
    *(sys.executable, "-m", "pytest", "-m", "device", "tests/device", "-v"),
    *("-W", "default", "-p", "no:cacheprovider", "--color=no"),
]
#: For matrix products as small as the tests', autotuning would take most of the time.
UNTUNED = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


def run_tests(names: Sequence[str], small: bool) -> Iterator[Record]:
    """Runs the tests in a separate process, and updates the record after each of them."""
    (name,) = names
    failed: list[str] = []
    record: Record = {"name": name, "passed": 0, "failed": failed}
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if not small:
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {UNTUNED}"
    with subprocess.Popen(
        COMMAND, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if result := re.match(r"(\S+::.+?) (PASSED|FAILED|ERROR)\b", line):
                if result[2] == "PASSED":
                    record["passed"] += 1
                else:
                    failed.append(result[1])
                yield record | {"error": "not all tests have run."}
    if process.returncode:
        why = f"{len(failed)} tests failed" if failed else f"pytest ended with {process.returncode}"
        record["error"] = f"{why}."
    yield record


TESTS = (Job(("pytest -m device",), run_tests),)
