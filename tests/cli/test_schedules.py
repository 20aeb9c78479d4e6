"""`memopt schedules`."""

import contextlib
import json
import re
import sys

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from memopt import schedules
from memopt.cli import schedules as command
from memopt.cli.main import main
from memopt.cli.pretrain import parse
from memopt.cli.schedules import Options, bars, curve
from memopt.training.phases import follow

DRAWN = re.compile("memopt: the curves are drawn in .*\n")

NAMES = [*schedules.names(), *schedules.batch_names()]


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["memopt", "schedules", *arguments])
        with contextlib.suppress(SystemExit):
            main()
        out, err = capsys.readouterr()
        assert not (out and err.replace(next(iter(DRAWN.findall(err)), ""), ""))
        return out or err

    return run


def test_all_are_listed_with_a_curve_and_when_to_choose_them(run):
    rows = [line.split("\t") for line in run().splitlines()]
    assert [row[0] for row in rows] == NAMES
    curves = {name: drawn for name, drawn, _ in rows}
    assert curves["constant"] == " ▃▇" + 21 * "█"
    assert curves["restarts"].count("█") == 4
    assert {len(drawn) for drawn in curves.values()} == {24}
    assert all(when for _, _, when in rows)


def test_in_a_terminal_they_are_a_table(run, monkeypatch):
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setenv("TERM", "dumb")
    lines = run().splitlines()
    assert lines[0].split() == ["name", "1000", "steps", "when", "to", "choose", "it"]
    assert {line.split()[0] for line in lines} >= {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_each_is_described_and_plotted(run, name):
    shown = run(name, "--steps=400")
    rows = {**schedules.SHAPES, **schedules.BATCH_SHAPES}
    assert rows[name].when.split()[0] in shown
    options = rows[name].defaults if name in schedules.SHAPES else ("first", "last", "length")
    assert all(option in shown for option in options)
    assert sum("█" in line for line in shown.splitlines()) == 8
    assert f"{'step' if name in schedules.SHAPES else 'batches used up'} 400: " in shown


def test_power_says_the_multipliers_that_it_needs(run):
    shown = " ".join(run("power").split())
    for said in ("hold under the paper's µP only", "0.1 / √m", "multiplied by 12", "0.22 to 0.28"):
        assert said in shown


def test_json_has_all_or_the_one_that_is_named(run):
    found = json.loads(run("--json"))
    assert list(found) == NAMES
    assert json.loads(run("restarts", "--json")) == found["restarts"]
    assert list(json.loads(run("wsd", "ramp", "--json"))) == ["wsd", "ramp"]
    assert found["restarts"]["options"]["cycles"]["default"] == 4
    assert all(option["help"] for row in found.values() for option in row["options"].values())


def test_a_curve_is_that_of_a_run_with_the_same_options():
    given = ["--steps=50", "--warmup=0.2", "--final-learning-rate=0.3", "--seq-len=32"]
    run = parse([*given, "--schedule=power", "--schedule-option=a=2", "--learning-rate=0.1"])
    options = Options(
        *((), 50, 0.1, 0.2, 0.2, 0.3, ("a=2",)), batch_size=run.text.batch_size, seq_len=32
    )
    rate = follow(run.phases)
    expected = [float(rate(step)) for step in range(51)]
    np.testing.assert_allclose(curve("power", options), expected, rtol=1e-5)


def test_the_curve_of_a_batch_is_that_of_a_run_with_the_same_options():
    options = Options(steps=90, schedule_option=("first=2", "last=16", "length=60"))
    grow = schedules.batch_schedule("doubling", 2, 16, 60)
    np.testing.assert_array_equal(curve("doubling", options), [grow(used) for used in range(91)])
    of_half = schedules.batch_schedule("ramp", 1, 8, 45)
    np.testing.assert_array_equal(
        curve("ramp", Options(steps=90)), [of_half(used) for used in range(91)]
    )


def test_bars_are_as_high_as_their_values():
    assert bars([0.0, 0.0]) == ["  "]
    drawn = bars(np.linspace(0, 5, 41), lines=5)
    heights = [sum(" ▁▂▃▄▅▆▇█".index(line[i]) for line in drawn) for i in range(41)]
    assert heights == list(range(41))


def test_curves_are_drawn_into_a_png(run, tmp_path):
    image = tmp_path / "schedules.png"
    assert "wsd" in run("wsd", f"--plot={image}", "--json")
    one = imread(image)
    run("wsd", "ramp", f"--plot={image}")
    assert imread(image).shape[0] == 2 * one.shape[0]  # a batch is no learning rate: two axes


def test_each_curve_is_drawn_and_the_file_is_named(monkeypatch, tmp_path, capsys):
    drawn = {}
    monkeypatch.setattr(command, "plot_panels", lambda panels, image, x: drawn.update(panels))
    command.schedules([f"--plot={tmp_path / 'all.PNG'}", "--json"])
    assert [name for panel in drawn.values() for name in panel] == NAMES
    out, err = capsys.readouterr()
    assert json.loads(out)
    assert str(tmp_path / "all.PNG") in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["restart"], "did you mean 'restarts'"),
        (["wsd", "--warmup=0.9"], "must leave room in steps=1000"),
        (["wsd", "--decay=0"], "decay_steps must be at least 1, got 0"),
        (["wsd", "--warmup=2"], "warmup must be between 0 and 1, got 2"),
        (["wsd", "--steps=0"], "steps must be at least 1"),
        (["wsd", "--schedule-option=decay_steps=3"], "is given as --decay"),
        (["wsd", "rex", "--schedule-option=cycles=3"], "belongs to one schedule"),
        (["ramp", "--schedule-option=cycles=3"], "option of ramp: 'cycles' is unknown"),
        (["ramp", "--schedule-option=shape=doubling"], "option of ramp: 'shape' is unknown"),
        (["ramp", "--schedule-option=last=0"], "last must be at least 1, got 0"),
        (["wsd", "--plot=curves.jpg"], "plot must be a file whose name ends with .png"),
        (["wsd", "--plot=/nowhere/at/all.png"], "cannot be written (No such file"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_a_sentence(run, arguments, says):
    complaint = run(*arguments)
    assert complaint.startswith("memopt: ")
    assert complaint.count("\n") == 1
    assert says in complaint
