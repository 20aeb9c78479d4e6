"""`memopt pretrain` in several processes, real ones: they do what one does, and end together."""

import functools
import json
import random
import re
import resource
import signal
import subprocess
import time

import chex
import jax
import numpy as np
import pytest
from rich.console import Console

from memopt.cli.pretrain import parse
from memopt.training.loop import train
from memopt.training.open import open_run
from tests.cli.runs import finish, free_port, kill, metrics, start, wait_for_step
from tests.training import nano
from tests.training.compiled import kept_in

STEPS = 30
FLAGS = (
    "--model=nano --data words.txt --batch-size=8 --seq-len=32 --eval-tokens=2048 "
    f"--steps={STEPS} --eval-every=10 --checkpoint-every=10 --learning-rate=1e-2"
).split()
#: A gradient sums a term for each token of a batch, 8 rows of 32. In two orders of addition it
#: differs by at most twice half a unit in the last place for each.
RTOL = 8 * 32 * float(np.finfo(np.float32).eps)
FOUR, TWO = "--mesh=data=2,fsdp=2", "--mesh=fsdp=2"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    nano.write_text(home / "words.txt", words=30_000)  # 8 batches are held out
    with kept_in(home / "compiled"):
        yield home


@pytest.fixture(autouse=True, scope="module")
def nano_preset():
    nano.install()
    yield
    nano.remove()


@pytest.fixture(scope="module")
def alone(home):
    """Maps a mesh to the directory of the same run in one process."""

    @functools.cache
    def run(mesh):
        output = f"alone-{mesh[2:]}"
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(home)
            train(open_run(parse([*FLAGS, mesh, f"--output={output}"])), Console(quiet=True))
        return home / output

    return run


def last_state(directory):
    """The state saved last, as this one process resumes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory.parent)
        run = open_run(parse(["--resume", f"--output={directory.name}"]))
    run.batches.close()
    return jax.device_get(run.state)


def start_all(home, count, *flags, devices=4, last=()):
    """Starts processes with so many devices in all; the last one has more flags."""
    address = f"localhost:{free_port()}"
    together = (f"--coordinator={address}", f"--processes={count}", "--heartbeat-timeout=9")
    more = [()] * (count - 1) + [last]
    return [
        start(home, *flags, *together, f"--process={index}", *more[index], devices=devices // count)
        for index in range(count)
    ]


def check_same(directory, alone):
    """Every loss and all that was saved last; sums over devices are added in another order."""
    for one, other in zip(metrics(directory), metrics(alone), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_allclose(value, other[name], rtol=1e-5, err_msg=name)
    assert metrics(directory)[-1].get("batches", len(metrics(directory))) == STEPS
    # Several processes add in another order: with jax 0.11 3e-6 after 30 steps at a rate of 1e-2.
    chex.assert_trees_all_close(last_state(directory), last_state(alone), rtol=RTOL, atol=5e-6)


def check_one_writes(outputs, directory, starts=1):
    """Only the first process speaks, and each time writes one file of events."""
    (out, _), *others = outputs
    assert out.count("everything is in") == 1
    assert "sample" in out
    assert not any("loss" in out for out, _ in others)
    assert len(list((directory / "tensorboard").iterdir())) == starts
    assert (directory / "loss.png").stat().st_size > 5_000


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_do_what_one_does(home, alone, count):
    output = f"together-{count}"
    processes = start_all(home, count, *FLAGS, FOUR, f"--output={output}")
    outputs = [finish(process) for process in processes]
    check_same(home / output, alone(FOUR))
    check_one_writes(outputs, home / output)
    assert json.loads((home / output / "config.json").read_text()) == json.loads(
        (alone(FOUR) / "config.json").read_text()
    )


@pytest.mark.slow
def test_several_processes_change_the_mixture_as_one_does(home, monkeypatch):
    (home / "numbers.txt").write_text(" ".join(map(str, range(20_000))))
    flags = [*FLAGS, TWO, "--data", "words=words.txt", "numbers=numbers.txt"]
    flags += ["--controller=dynamic_mixture", "--controller-option=reference=words=9,numbers=1"]
    processes = start_all(home, 2, *flags, "--output=mixed-together", devices=2)
    for process in processes:
        finish(process)
    monkeypatch.chdir(home)
    train(open_run(parse([*flags, "--output=mixed-alone"])), Console(quiet=True))
    check_same(home / "mixed-together", home / "mixed-alone")
    assert metrics(home / "mixed-alone")[-1]["weight numbers"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adadagrad", "eta=0.2 every=4 most=4"),
        ("autolrs", "candidates=2 trial_steps=4 stage_steps=8 most_stage_steps=8 kappa=2"),
    ],
)
def test_several_processes_decide_as_one_does(home, monkeypatch, name, options):
    flags = [*FLAGS, TWO, "--accumulation=2", f"--controller={name}"]
    flags += [f"--controller-option={option}" for option in options.split()]
    processes = start_all(home, 2, *flags, f"--output={name}-together", devices=2)
    (out, _), (other, _) = (finish(process) for process in processes)
    assert ("batches a step" in out) == (name == "adadagrad")
    assert ("tried learning rate" in out) == (name == "autolrs")
    assert "loss" not in other
    monkeypatch.chdir(home)
    train(open_run(parse([*flags, f"--output={name}-alone"])), Console(quiet=True))
    check_same(home / f"{name}-together", home / f"{name}-alone")


@pytest.mark.slow
@pytest.mark.parametrize("by", ["this process", pytest.param("two", marks=pytest.mark.slow)])
def test_one_is_killed_all_end_and_resumed_by_any_number_they_do_what_one_does(
    home, alone, monkeypatch, by
):
    # A device each: of two devices of a process one would wait for the other, which has failed.
    output = f"killed-{by.replace(' ', '-')}"
    processes = start_all(home, 2, *FLAGS, TWO, f"--output={output}", devices=2)
    while not (home / output / "checkpoints" / "10").exists() and processes[0].poll() is None:
        time.sleep(0.002)
    kill(processes[1])
    _, err = processes[0].communicate(timeout=300)
    assert processes[0].returncode not in (0, None)
    # JAX's own words if it waits to save another checkpoint by then.
    assert "process 0: a process has ended or is out of reach" in err or "another task died" in err
    assert metrics(home / output)[-1]["step"] < STEPS
    if by == "two":
        resumed = start_all(home, 2, "--resume", f"--output={output}", devices=2)
        outputs = [finish(process) for process in resumed]
        assert "resumed at step" in outputs[0][0]
        check_one_writes(outputs, home / output, starts=2)
    else:
        monkeypatch.chdir(home)
        run = open_run(parse(["--resume", f"--output={output}"]))
        assert run.state.step >= 10
        train(run, Console(quiet=True))
    check_same(home / output, alone(TWO))


@pytest.mark.slow
def test_processes_that_are_killed_many_times_end_like_one_that_was_not(home, alone):
    draw, directory = random.Random(0), home / "random"
    processes = start_all(home, 2, *FLAGS, TWO, "--output=random", devices=2)
    for _ in range(6):
        wait_for_step(processes[0], directory, draw.randrange(1, STEPS))
        time.sleep(draw.uniform(0, 0.1))
        victim, other = draw.sample(processes, 2)
        kill(victim)
        try:
            _, err = other.communicate(timeout=30)
            assert "Traceback" not in err
        except subprocess.TimeoutExpired:  # it waits five minutes for the other to start
            kill(other)
        processes = start_all(home, 2, "--resume", "--output=random", devices=2)
    for process in processes:
        finish(process)
    check_same(directory, alone(TWO))


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_same_step(home, alone):
    processes = start_all(home, 2, *FLAGS, FOUR, "--output=stopped")
    wait_for_step(processes[0], home / "stopped", 5)
    processes[1].send_signal(signal.SIGTERM)
    last = set()
    for process in processes:
        _, err = finish(process, exit_code=128 + signal.SIGTERM)
        last |= set(re.findall(r"memopt: stopped by SIGTERM after step (\d+)\. All is saved", err))
    assert last == {str(metrics(home / "stopped")[-1]["step"])}
    for process in start_all(home, 2, "--resume", "--output=stopped"):
        finish(process)
    check_same(home / "stopped", alone(FOUR))


@pytest.mark.slow
def test_a_process_that_falls_silent_ends_all(home):
    processes = start_all(home, 2, *FLAGS, FOUR, "--output=silent")
    wait_for_step(processes[0], home / "silent", 5)
    processes[1].send_signal(signal.SIGSTOP)
    _, err = processes[0].communicate(timeout=300)
    kill(processes[1])
    assert processes[0].returncode not in (0, None)
    assert "another task died" in err


@pytest.mark.slow
def test_data_that_one_cannot_read_ends_all_with_the_sentence(home):
    (home / "image.png").write_bytes(b"\x89PNG\0")
    processes = start_all(home, 2, *FLAGS, "--output=blind", last=("--data", "image.png"))
    for process in processes:
        _, err = finish(process, exit_code=2)
        assert "data 'image.png' is not text: it holds zero bytes." in err
    assert "(process 1 of 2)" not in err
    assert not (home / "blind").exists()


@pytest.mark.slow
@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_of_one_ends_all_and_resumed_they_do_what_one_does(home, alone, full):
    output = f"full-{full}"
    processes = start_all(home, 2, *FLAGS, TWO, f"--output={output}", devices=2)
    while not (home / output / "checkpoints" / "10").exists():
        time.sleep(0.01)
    resource.prlimit(processes[full].pid, resource.RLIMIT_FSIZE, (1000, 1000))
    _, err = finish(processes[full], exit_code=1)
    assert re.search(rf"memopt: process {full}: .* cannot be written \(File too large\)", err)
    assert (
        f"All up to step 10 is saved; continue with: memopt pretrain --resume --output {output}"
        in err
    )
    _, err = processes[1 - full].communicate(timeout=300)
    assert processes[1 - full].returncode not in (0, None)
    assert "a process has ended or is out of reach" in err or "another task died" in err
    for process in start_all(home, 2, "--resume", f"--output={output}", devices=2):
        finish(process)
    check_same(home / output, alone(TWO))


@pytest.mark.slow
def test_a_second_start_in_the_same_directory_ends_in_all_its_processes(home):
    first = start_all(home, 2, *FLAGS, TWO, "--output=shared", "--steps=1000000", devices=2)
    wait_for_step(first[0], home / "shared", 1)
    for process in start_all(home, 2, "--resume", "--output=shared", devices=2):
        _, err = finish(process, exit_code=2)
        assert f"the run in 'shared' is in use by process {first[0].pid} on " in err
    first[1].send_signal(signal.SIGTERM)
    for process in first:
        finish(process, exit_code=128 + signal.SIGTERM)
    steps = [line["step"] for line in metrics(home / "shared")]
    assert steps == list(range(1, len(steps) + 1))
