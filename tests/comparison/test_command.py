"""The command `memopt compare`."""

import pytest

from memopt.cli import compare as command
from memopt.comparison import report, runner
from memopt.comparison.cells import Outcome
from memopt.comparison.protocol import PRESETS
from memopt.comparison.records import read_records


@pytest.fixture(autouse=True)
def quick(protocol, monkeypatch):
    """Makes the preset small, and runs of it immediate."""
    outcome = Outcome(2.0, [[20, 2.0]], False, 8, 4, 1, None, None, 0.5)
    monkeypatch.setitem(PRESETS, "cpu", protocol)
    for plot in ("plot_front", "plot_curves", "plot_sensitivity"):
        monkeypatch.setattr(report, plot, lambda groups, path, baseline: path.touch())
    monkeypatch.setattr(runner, "train", lambda cell, **options: outcome)


def test_it_shows_each_run_then_the_tables_and_writes_a_report(tmp_path, capsys):
    command.compare_command(["--output", str(tmp_path), "--methods", "lion", "--seeds", "7"])
    shown = capsys.readouterr().out
    runs = [line for line in shown.splitlines() if "2^" in line]
    records = read_records(tmp_path / "compare.jsonl")
    assert len(runs) == len(records)
    assert runs[-1].startswith("nano  lion  2^-11 b2=0.99  20×2  seed 7  loss 2.0000  (0 s)")
    assert f"run {len(runs)}/{len(runs)}" in runs[-1]
    table = [line.split()[:2] for line in shown.splitlines() if line not in runs]
    assert ["adamw", "2.000"] in table
    assert ["lion", "2.000"] in table
    assert {"report.md", "report.json", "front.png"} <= {path.name for path in tmp_path.iterdir()}
    assert shown.endswith(f"Tables and pictures: {tmp_path / 'report.md'}, and beside it.\n")


def test_runs_of_before_are_not_shown_again(tmp_path, capsys):
    for methods in ("adamw", "lion"):
        command.compare_command(["--output", str(tmp_path), "--methods", methods])
    methods = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if "2^" in line]
    assert methods == sorted(methods)
    assert set(methods) == {"adamw", "lion"}


def test_targets_have_a_file_of_their_own(tmp_path):
    options = ["--target-loss", "2.5", "--over", "batch_size"]
    command.compare_command(["--output", str(tmp_path), "--methods", "lion", *options])
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["targets.jsonl"]
    assert {x["batch_size"] for x in read_records(tmp_path / "targets.jsonl")} == {2, 4}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--methods", "lyon"], "optimizer 'lyon' is unknown; did you mean 'lion'?"),
        (["--over", "batch_size"], "over must be given with target_loss"),
        (["--sizes", "3M"], "size '3M' is unknown"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path, capsys, options, error):
    with pytest.raises(SystemExit) as ended:
        command.compare_command(["--output", str(tmp_path), *options])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"memopt: {error}")


def test_a_method_that_fails_is_named_and_the_others_are_trained(tmp_path, capsys, monkeypatch):
    train = runner.train

    def failing(cell, **options):
        if cell.program.optimizer == "lion":
            raise ValueError("no room")
        return train(cell, **options)

    monkeypatch.setattr(runner, "train", failing)
    methods = ["lion", "lion, released", "sgd"]
    with pytest.raises(SystemExit) as ended:
        command.compare_command(["--output", str(tmp_path), "--methods", *methods])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "memopt: some methods cannot be trained, all others were (lion at nano: no room).\n"
    )
    assert {x["method"] for x in read_records(tmp_path / "compare.jsonl")} == {"adamw", "sgd"}


@pytest.mark.parametrize(
    ("stop", "code", "shown"),
    [
        (KeyboardInterrupt, 130, "memopt: interrupted. All finished runs are kept"),
        (runner.OutOfTimeError, None, "longer than --minutes 9. All finished runs are kept"),
    ],
)
def test_a_stop_says_how_to_go_on(tmp_path, capsys, monkeypatch, stop, code, shown):
    def stopped(cell, **options):
        raise stop

    monkeypatch.setattr(runner, "train", stopped)
    ended = None
    try:
        command.compare_command(["--output", str(tmp_path), "--minutes", "9"])
    except SystemExit as error:
        ended = error.code
    assert ended == code
    output = capsys.readouterr()
    assert shown in output.out + output.err
