"""Runs of `memopt pretrain` in processes of their own."""

import json
import os
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

from orbax.checkpoint import v1 as ocp

from tests.xla_flags import with_devices

ROOT = Path(__file__).parents[2]
PROGRAM = (
    "from tests.training import nano; nano.install(); from memopt.cli.main import main; main()"
)


def start(home, *arguments, devices=1):
    """Starts `memopt pretrain`; all runs of a home share what XLA compiled."""
    environment = os.environ | {
        "XLA_FLAGS": with_devices(devices),
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "pretrain", *arguments],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def finish(process, exit_code=0):
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == exit_code, err
    assert "Traceback" not in err
    return out, err


def kill(process):
    process.kill()
    process.communicate()


def wait_for_step(process, directory, step):
    """Waits until the log has this step, or the process has ended."""
    log = directory / "metrics.jsonl"
    while process.poll() is None:
        if log.exists() and f'{{"step": {step}, ' in log.read_text():
            return
        time.sleep(0.002)


def last_state(directory):
    newest = max((directory / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert int(newest.name) == metrics(directory)[-1]["step"]
    with warnings.catch_warnings(action="ignore"):  # of being read without shardings
        return ocp.load_checkpointables(newest)["state"]


def metrics(directory):
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]
