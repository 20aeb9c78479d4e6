"""`memopt pretrain` in several processes: as in one, also when some of them are killed."""

import os
import re
import signal
import socket
import subprocess
import sys

import chex
import jax
import pytest
from orbax.checkpoint import v1 as ocp

from memopt.training import processes
from memopt.training.config import Processes
from tests.cli.test_pretrain import PROGRAM, ROOT, kill, metrics, wait_for_step
from tests.training import nano

STEPS, DEVICES, HEARTBEAT = 30, 4, 10


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("processes")
    nano.write_text(home / "words.txt")
    return home


def start(home, output, count, *arguments):
    """Starts as many processes, which have four devices together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = (
        f"--model=nano --data words.txt --batch-size=8 --seq-len=32 --eval-tokens=512 "
        f"--mesh=fsdp=2,data=2 --steps={STEPS} --eval-every=10 --checkpoint-every=5"
    ).split()
    flags = ["--resume"] if "--resume" in arguments else flags
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count}",
        "JAX_COMPILATION_CACHE_DIR": str(home / f"compiled-{count}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    together = f"--coordinator=127.0.0.1:{port} --heartbeat-timeout={HEARTBEAT}".split()
    together = [*together, f"--processes={count}"] if count > 1 else []
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "pretrain", f"--output={output}", *flags, *together]
            + [f"--process={index}"] * (count > 1),
            cwd=home,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def finish(running, exit_code=0):
    """What each wrote, once all have ended."""
    written = [process.communicate(timeout=300) for process in running]
    assert {process.returncode for process in running} == {exit_code}, written
    return written


def last_state(directory):
    newest = max((directory / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert newest.name == str(STEPS)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        ocp.checkpointables_metadata(newest).metadata["state"],
        is_leaf=lambda x: hasattr(x, "dtype"),
    )
    return jax.device_get(ocp.load_checkpointables(newest, {"state": like})["state"])


def check_same(directory, expected):
    """To the order of sums; in one step they are those of other shapes, so not to the bit."""
    losses = [
        [(line["loss"], line.get("val_loss")) for line in metrics(d)] for d in (directory, expected)
    ]
    assert len(losses[0]) == STEPS
    chex.assert_trees_all_close(*losses, rtol=1e-5)
    states = [jax.device_get(last_state(d)) for d in (directory, expected)]
    chex.assert_trees_all_close(*states, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def alone(home):
    """The run of one process."""
    finish(start(home, "alone", 1))
    return home / "alone"


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_as_one(home, alone, count):
    first, *others = finish(start(home, f"of-{count}", count))
    check_same(home / f"of-{count}", alone)
    assert f"step {STEPS}/{STEPS}  loss " in first[0]
    assert "perplexity" in first[0]
    assert (home / f"of-{count}" / "loss.png").exists()
    gloo = re.compile(r"^\[Gloo\].*\n", re.MULTILINE)  # which says so by itself
    assert {gloo.sub("", out) for out, _ in others} == {""}


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_when_one_is_killed_all_end_and_can_be_resumed(home, alone, victim):
    directory = home / f"killed-{victim}"
    running = start(home, directory.name, 2)
    wait_for_step(running[victim], directory, 12)
    kill(running.pop(victim))
    (survivor,) = running
    _, err = survivor.communicate(timeout=6 * HEARTBEAT)
    assert survivor.returncode not in (0, None)
    assert "start all of them again with --resume" in err or "another task died" in err
    finish(start(home, directory.name, 2, "--resume"))
    check_same(directory, alone)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_same_step(home, alone):
    running = start(home, "signal", 2)
    wait_for_step(running[1], home / "signal", 7)
    running[1].send_signal(signal.SIGTERM)
    (_, first), (_, second) = finish(running, 128 + signal.SIGTERM)
    assert "another process stopped after step" in first
    assert "stopped by SIGTERM after step" in second
    newest = max(int(path.name) for path in (home / "signal" / "checkpoints").iterdir())
    assert newest == metrics(home / "signal")[-1]["step"]
    finish(start(home, "signal", 1, "--resume"))  # and goes on in one process
    check_same(home / "signal", alone)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"processes": 2, "process": 0}, "--coordinator is missing"),
        ({"coordinator": "host:1"}, "--processes is missing"),
        ({"coordinator": "host", "processes": 2, "process": 0}, "'host' must be HOST:PORT"),
        ({"coordinator": "h:1", "processes": 2, "process": 2}, "process=2 must be from 0 to 1"),
        (
            {"coordinator": "h:1", "processes": 1, "process": 0},
            "joined: .* before any JAX",
        ),
    ],
)
def test_what_cannot_be_joined_is_told(given, message):
    jax.devices()  # JAX is in use
    with pytest.raises(ValueError, match=message):
        processes.join(Processes(**given))


def test_one_process_joins_nobody():
    processes.join(Processes())
    assert processes.is_first()
