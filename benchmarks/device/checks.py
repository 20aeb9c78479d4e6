"""The tests marked `device`."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.device.jobs import Job, Record

ROOT = Path(__file__).parents[2]
NAME = "pytest -m device"


def run_tests(names: Sequence[str], small: bool) -> Iterator[Record]:
    """Runs them in a process of their own, on the accelerator unless it is to be small."""
    (name,) = names
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "device", "tests/device", "-q"]
        command += ["-W", "default", "-p", "no:cacheprovider", f"--junitxml={report}"]
        platforms = "cpu" if small else "cuda,cpu"
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": platforms})
        if not report.exists():
            raise RuntimeError(f"pytest ended with status {done.returncode} before any test.")
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        case.attrib["name"]
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    record: Record = {"name": name, "passed": len(cases) - len(failed), "failed": failed}
    if failed or not cases:
        record["error"] = f"{len(failed)} of {len(cases)} tests failed."
    yield record


TESTS = (Job((NAME,), run_tests),)
