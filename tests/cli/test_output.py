"""Lost output does not stop a command, and it says in one sentence how it ended."""

import io
import json
import os
import sys
from types import SimpleNamespace

import pytest

from memopt.cli import pretrain
from memopt.cli.main import main
from memopt.cli.output import lasting_output
from memopt.training.checkpoint import Best
from memopt.training.config import Config
from memopt.training.loop import Stopped
from memopt.training.writing import WriteError


def stream(name, encoding="utf-8"):
    """A text stream to a broken pipe, or to a file."""
    if name == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        return open(writer, "w", encoding=encoding)
    return open(name, "w", encoding=encoding)


@pytest.mark.parametrize("name", ["pipe", "/dev/full"])
def test_what_cannot_be_written_is_dropped_and_the_first_time_told(name, monkeypatch, capfd):
    for both in (False, True):
        with stream(name) as out, stream(name) as err:
            monkeypatch.setattr(sys, "stdout", out)
            if both:
                monkeypatch.setattr(sys, "stderr", err)
            with lasting_output():
                for _ in range(3):
                    print("loss 1.0", flush=True)
                print("sample", file=sys.stderr)
                print("not flushed")
        told, sample = capfd.readouterr().err.splitlines() if not both else ("", "sample")
        assert told.startswith("memopt: nothing more is shown") == (not both)
        assert sample == "sample"


def test_characters_that_a_terminal_lacks_are_replaced(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    with lasting_output():
        print("compiling … \ud800")
    assert shown.buffer.getvalue() == b"compiling ? ?\n"


def fail_with(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("where", "error", "exit_code", "says"),
    [
        ("train", WriteError("It is full."), 1, "It is full. All up to step 2 is saved; continue"),
        ("train", OSError(5, "I/O error", "a.txt"), 1, "[Errno 5] I/O error: 'a.txt' All up to"),
        ("train", KeyboardInterrupt(), 130, "interrupted. All up to step 2 is saved; continue"),
        ("train", Stopped("Stopped.", 143), 143, "Stopped. All is saved; continue with: memopt"),
        ("_conclude", KeyboardInterrupt(), 130, "interrupted. All up to step 2 is saved; continue"),
        ("open_run", OSError(30, "Read-only", "run/lock"), 2, "[Errno 30] Read-only: 'run/lock'"),
    ],
)
def test_an_end_before_the_end_is_one_sentence_about_what_is_saved(
    monkeypatch, capfd, where, error, exit_code, says
):
    checkpoints = SimpleNamespace(newest=lambda: 2)
    run = SimpleNamespace(directory="run", checkpoints=checkpoints)
    monkeypatch.setattr(pretrain, "open_run", lambda config, progress: run)
    monkeypatch.setattr(pretrain, "_introduce", lambda *_: None)
    monkeypatch.setattr(pretrain, "train", lambda *_: (None, None))
    monkeypatch.setattr(pretrain, where, fail_with(error))
    monkeypatch.setattr(sys, "argv", ["memopt", "pretrain", "--output=run"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == exit_code
    said = capfd.readouterr().err
    assert said.startswith(f"memopt: {says}")
    assert said.count("\n") == 1


def test_the_end_names_the_step_with_the_lowest_loss_unless_it_is_the_last(tmp_path):
    losses = ({"step": 2, "loss": 2.0, "val_loss": 5.57}, {"step": 57, "loss": 1.0, "val_loss": 6})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in losses))
    said = {}
    for newest in (2, 57):
        checkpoints = SimpleNamespace(best=lambda: Best(5.57, 2), newest=lambda at=newest: at)
        run = SimpleNamespace(directory=tmp_path, checkpoints=checkpoints)
        said[newest] = list(pretrain._losses(run))
    assert said[57][1] == (
        "lowest validation loss 5.5700 at step 2: sample, evaluate and export take it, unless "
        "--step last"
    )
    assert said[2] == said[57][:1] == ["validation loss 6.0000, perplexity 403.429 a token"]


def test_a_plot_that_cannot_be_written_is_warned_about(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "loss.png" / "in the way").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"loss.png' cannot be written \("):
        pretrain._plot(SimpleNamespace(directory=tmp_path, config=Config()))
    assert not list(tmp_path.glob("*.tmp"))
