"""`memopt pretrain` as a user runs it: whole runs, killed runs, interrupted runs."""

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import time

import chex
import pytest

from memopt.cli.pretrain import pretrain
from tests.cli import runs
from tests.cli.runs import finish, kill, last_state, metrics, wait_for_step
from tests.training import nano
from tests.training.compiled import kept_in

STEPS = 24
FLAGS = (
    "--model=nano --data words.txt --batch-size=8 --seq-len=32 --eval-tokens=512 --mesh=data=1 "
    f"--steps={STEPS} --eval-every=6 --checkpoint-every=2"
).split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    nano.write_text(home / "words.txt")
    nano.install()
    with kept_in(home / "compiled"):
        yield home
    nano.remove()


def start(home, output, *arguments):
    flags = [] if "--resume" in arguments else FLAGS
    return runs.start(home, *flags, f"--output={output}", *arguments)


def here(home, *arguments):
    """Runs the command in this process, and returns what it prints."""
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as out,
    ):
        patch.chdir(home)
        pretrain([*arguments])
    return out.getvalue()


@pytest.fixture(scope="module")
def whole(home):
    """The run that was never killed, in this process, and what it shows."""
    return home / "whole", here(home, *FLAGS, "--output=whole")


def test_what_is_shown(whole):
    directory, out = whole
    assert f"step {STEPS}/{STEPS}  loss " in out
    assert "tokens/s" in out
    assert "perplexity" in out
    assert "optax.adamw" in out
    for name in ("parameters", "optimizer state", "peak of a step"):
        assert name in out
    assert (directory / "loss.png").stat().st_size > 5_000
    assert [line["step"] for line in metrics(directory)] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_its_config_starts_the_same_run(home, whole):
    directory, _ = whole
    again = start(home, "again", f"--config={directory / 'config.json'}", "--steps=2")
    finish(again)
    assert metrics(home / "again")[0]["loss"] == metrics(directory)[0]["loss"]


KILLED = {
    "ordinary": (),
    "released": ("--release", "--weights=int8", "--state=int8", "--optimizer=adamw"),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("kind", KILLED)
def test_a_run_that_is_killed_many_times_ends_like_the_one_that_was_not(home, kind, seed):
    """With the kills of several processes, a hundred in all."""
    flags, draw = KILLED[kind], random.Random(seed)
    whole, killed = home / f"whole-{kind}", home / f"killed-{kind}-{seed}"
    if not whole.exists():
        finish(start(home, whole.name, *flags))
    process = start(home, killed.name, *flags)
    for _ in range(12):
        wait_for_step(process, killed, draw.randrange(1, STEPS))
        time.sleep(draw.uniform(0, 0.1))
        kill(process)
        process = start(home, killed.name, *(["--resume"] if killed.exists() else flags))
    finish(process)
    chex.assert_trees_all_equal(last_state(killed), last_state(whole))
    assert metrics(killed) == metrics(whole)


@pytest.mark.parametrize(
    "interrupts",
    [
        ((3, signal.SIGTERM),),
        pytest.param(((3, signal.SIGINT), (9, signal.SIGTERM)), marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_a_run_that_is_interrupted_saves_first_and_resumed_it_ends_the_same(
    home, whole, interrupts
):
    """Also when nobody reads its output, as in `memopt pretrain | head -3`."""
    name = f"interrupted-{len(interrupts)}"
    directory = home / name
    process = start(home, name)
    for step, number in interrupts:
        process.stdout.close()
        wait_for_step(process, directory, step)
        process.send_signal(number)
        _, err = finish(process, exit_code=128 + number)
        assert f"stopped by {number.name}" in err
        assert f"memopt pretrain --resume --output {name}" in err
        assert err.startswith("memopt: nothing more is shown (Broken pipe)\n")
        assert err.count("\n") == 2
        newest = max(int(path.name) for path in (directory / "checkpoints").iterdir())
        assert newest == metrics(directory)[-1]["step"]
        if number != interrupts[-1][1]:
            process = start(home, name, "--resume")
    here(home, "--resume", f"--output={name}")
    chex.assert_trees_all_equal(last_state(directory), last_state(whole[0]))
    assert metrics(directory) == metrics(whole[0])


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped_and_the_run_ends_the_same(home, whole):
    directory = home / "damaged"
    process = start(home, "damaged")
    wait_for_step(process, directory, 11)
    kill(process)
    saved = [path for path in (directory / "checkpoints").iterdir() if path.name.isdecimal()]
    newest = max(saved, key=lambda path: int(path.name))
    for file in newest.rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    _, err = finish(start(home, "damaged", "--resume"))
    assert err.startswith(f"memopt: checkpoint {newest.name} is damaged")
    assert err.count("\n") == 1
    chex.assert_trees_all_equal(last_state(directory), last_state(whole[0]))
    assert metrics(directory) == metrics(whole[0])


@pytest.mark.slow
def test_a_learned_vocabulary_serves_to_train_with(home):
    program = [sys.executable, "-c", "from memopt.cli.main import main; main()"]
    learn = "tokenizer train --data words.txt --vocab-size 300 --output words.json"
    done = subprocess.run([*program, *learn.split()], cwd=home, capture_output=True, text=True)
    assert done.stdout == "300 ids in words.json\n", done.stderr
    options = ("--tokenizer=words.json", "--vocab-size=300", "--steps=1")
    out, _ = finish(start(home, "vocabulary", *options))
    assert "tokenizer words.json" in out
