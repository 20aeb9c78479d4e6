"""The command `memopt compare`."""

import json

import pytest

from memopt.cli import compare as command
from memopt.comparison import report
from memopt.comparison.protocol import PRESETS
from memopt.comparison.records import read_records
from memopt.comparison.worker import OutOfTimeError


@pytest.fixture(autouse=True)
def quick(protocol, trained, monkeypatch):
    """Makes the preset small, runs of it immediate, and pictures empty."""
    monkeypatch.setitem(PRESETS, "cpu", protocol)
    for plot in ("plot_front", "plot_curves", "plot_sensitivity"):
        monkeypatch.setattr(report, plot, lambda groups, path, **options: path.touch())


@pytest.fixture(autouse=True)
def planned(monkeypatch):
    """Replaces planning by peaks of one megabyte; the chips that were asked about."""
    asked = []

    def plan_peaks(runs, *, chip, tell):
        asked.append(chip)
        tell("Planned at once.")
        return {run["key"]: report.Peak(10**6, chip or "cpu", "guess 1.0") for run in runs}

    monkeypatch.setattr(command, "plan_peaks", plan_peaks)
    return asked


def test_it_shows_each_run_then_the_tables_and_writes_a_report(tmp_path, capsys):
    command.compare_command(["--output", str(tmp_path), "--methods", "lion", "--seeds", "7"])
    shown = capsys.readouterr().out
    runs = [line for line in shown.splitlines() if "2^" in line]
    records = read_records(tmp_path / "compare.jsonl")
    assert len(runs) == len(records)
    assert runs[-1].startswith("nano  lion  2^-7 b2=0.99  20×2  seed 7  loss 7.0000  (0 s)")
    assert f"run {len(runs)}/{len(runs)}" in runs[-1]
    table = [line.split()[:2] for line in shown.splitlines() if line not in runs]
    assert ["adamw", "7.000"] in table
    assert ["lion", "7.000"] in table
    assert {"report.md", "report.json", "front.png"} <= {path.name for path in tmp_path.iterdir()}
    assert shown.endswith(f"Tables and pictures: {tmp_path / 'report.md'}, and beside it.\n")


def test_runs_of_before_are_not_shown_again(tmp_path, capsys):
    for methods in ("adamw", "lion"):
        command.compare_command(["--output", str(tmp_path), "--methods", methods])
    methods = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if "2^" in line]
    assert methods == sorted(methods)
    assert set(methods) == {"adamw", "lion"}


def test_peaks_are_planned_for_the_chip_that_is_named(tmp_path, capsys, planned):
    command.compare_command(["--output", str(tmp_path), "--methods", "lion", "--chip", "v5e"])
    shown = capsys.readouterr().out
    assert planned == ["v5e"]
    assert shown.count(" 1 MB ") == 2
    assert "Planned at once." in shown.splitlines()
    text = (tmp_path / "report.md").read_text()
    assert "Peaks are those of one step, planned for v5e by guess 1.0." in text
    peaks = [one["peak"] for one in json.loads((tmp_path / "report.json").read_text())]
    assert peaks == 2 * [{"peak_bytes": 10**6, "compiled_for": "v5e", "compiler": "guess 1.0"}]


def test_peaks_may_be_left_out(tmp_path, planned):
    command.compare_command(["--output", str(tmp_path), "--methods", "lion", "--chip", "none"])
    assert planned == []
    assert "| peak |" not in (tmp_path / "report.md").read_text()
    command.compare_command(["--output", str(tmp_path), "--methods", "lion"])
    assert planned == [None]
    assert "| peak |" in (tmp_path / "report.md").read_text()


def test_targets_have_a_file_of_their_own(tmp_path):
    options = ["--target-loss", "2.5", "--over", "batch_size"]  # the loss is out of reach
    command.compare_command(["--output", str(tmp_path), "--methods", "lion", *options])
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["targets.jsonl"]
    assert {x["batch_size"] for x in read_records(tmp_path / "targets.jsonl")} == {2, 4}


def test_options_change_the_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("Text of one's own. " * 500)
    given = "--steps 40 --batch-size 4 --seq-len 8 --eval-tokens 32 --tuning-runs 4 --seeds 5"
    options = ["--output", "out", "--methods", "lion", "--data", "own.txt", *given.split()]
    command.compare_command(["--output", "out", "--methods", "lion"])
    command.compare_command(options)
    first, last = (
        [x for x in read_records(tmp_path / "out" / "compare.jsonl") if x["steps"] == steps]
        for steps in (20, 40)
    )
    names = ("batch_size", "seq_len", "eval_tokens")
    assert {tuple(x[name] for name in names) for x in last} == {(4, 8, 32)}
    assert {x["text"] for x in last}.isdisjoint(x["text"] for x in first)
    lion = [x for x in last if x["method"] == "lion"]
    assert [x["seed"] for x in lion if x["tuned"]] == [5]
    assert sum(not x["tuned"] for x in lion) >= 4
    text = (tmp_path / "out" / "report.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(titles) == 2
    assert titles[1].startswith("## nano parameters, 40 steps of 4×8 tokens, 1.28k in all, text ")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--methods", "lyon"], "optimizer 'lyon' is unknown; did you mean 'lion'?"),
        (["--over", "batch_size"], "over must be given with target_loss"),
        (["--sizes", "3M"], "size '3M' is unknown"),
        (["--steps", "30"], "steps must be a multiple of 20, got 30."),
        (["--chip", "v5ee"], "chip 'v5ee' is unknown; did you mean 'v5e'?"),
        (["--data", "nowhere"], "data 'nowhere' matches no text file"),
        (["--batch-sizes", "4"], "batch_sizes must be given with over"),
        (
            ["--target-loss", "2", "--over", "batch_size", "--batch-size", "4"],
            "batch_size must be left out with over",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path, capsys, options, error):
    with pytest.raises(SystemExit) as ended:
        command.compare_command(["--output", str(tmp_path), *options])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"memopt: {error}")


def test_a_method_that_fails_is_named_and_the_others_are_trained(tmp_path, capsys, fail):
    fail(ValueError("no room"), optimizer="lion")
    methods = ["lion", "lion, released", "sgd"]
    with pytest.raises(SystemExit) as ended:
        command.compare_command(["--output", str(tmp_path), "--methods", *methods])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "memopt: some methods cannot be trained, all others were (lion at nano: no room).\n"
    )
    assert {x["method"] for x in read_records(tmp_path / "compare.jsonl")} == {"adamw", "sgd"}
    assert "| sgd |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("stop", "code", "shown"),
    [
        (KeyboardInterrupt, 130, "memopt: interrupted. All finished runs are kept"),
        (OutOfTimeError, None, "longer than --minutes 9. All finished runs are kept"),
    ],
)
def test_a_stop_says_how_to_go_on(tmp_path, capsys, fail, planned, stop, code, shown):
    fail(stop, after=12)
    ended = None
    try:
        command.compare_command(["--output", str(tmp_path), "--minutes", "9"])
    except SystemExit as error:
        ended = error.code
    assert ended == code
    assert planned == []  # it ends, rather than compile
    output = capsys.readouterr()
    assert shown in output.out + output.err
