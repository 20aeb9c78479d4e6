"""Runs on several named sources: losses of each, and exactly the same batches after a kill."""

import itertools
import json
import math
import shutil

import chex
import numpy as np
import pytest
from rich.console import Console

from memopt.cli.evaluate import evaluate
from memopt.cli.finetune import parse_finetune
from memopt.cli.pretrain import parse
from memopt.json_lines import read_json_lines
from memopt.training import data
from memopt.training.control import Plan, Seen
from memopt.training.controllers import controller
from memopt.training.evaluation import evaluate_data
from memopt.training.load import load_run
from memopt.training.loop import train
from memopt.training.open import open_run

FLAGS = ["--model=nano", "--batch-size=4", "--seq-len=32", "--eval-tokens=64", "--mesh=data=1"]
FLAGS += ["--schedule=constant", "--warmup=0", "--eval-every=2", "--checkpoint-every=2"]


@pytest.fixture(autouse=True, scope="module")
def small_windows():
    """Small windows, so that opening a run tokenizes little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memopt.text.batches.WINDOW_TOKENS", 2**10)
        yield


def write_lines(path, count):
    """Writes JSON lines that are documents made of the file's first letter."""
    letter = path.name[0]
    path.write_text("".join(f'{{"text": "{f"{letter}{i} " * 9}"}}\n' for i in range(count)))
    return path


def write_sources(home):
    """Writes two sources, `a` and `b`; returns the options that name them."""
    paths = [write_lines(home / f"{name}.jsonl", count) for name, count in (("a", 120), ("b", 30))]
    return ["--data", *(f"{path.stem}={path}" for path in paths)]


@pytest.fixture
def sources(tmp_path):
    return write_sources(tmp_path)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A directory with `a.jsonl` and `b.jsonl`, and a run of four steps on them, `run`."""
    home = tmp_path_factory.mktemp("mixed")
    trained(home / "run", *write_sources(home), "--mixture", "b=1", "a=3", "--steps=4")
    return home


@pytest.fixture
def begun(mixed, tmp_path):
    """The directory of that run and its data, to be resumed."""
    shutil.copytree(mixed, tmp_path, dirs_exist_ok=True)
    return tmp_path


def go_on(home, *flags):
    return opened(home / "run", "--resume", "--steps=40", *flags)


def opened(directory, *flags):
    return open_run(parse([*FLAGS, f"--output={directory}", *map(str, flags)]))


def trained(directory, *flags):
    state, _ = train(opened(directory, *flags), Console(quiet=True))
    return state


def letters_of(batch):
    """The source of each row."""
    return ["a" if (row == ord("a")).any() else "b" for row in np.asarray(batch["inputs"])]


def shares_of(run, batches=8):
    """The share of source `a` in the next batches."""
    found = [name for batch in itertools.islice(run.batches, batches) for name in letters_of(batch)]
    run.batches.close()
    return found.count("a") / len(found)


def evaluated(directory):
    lines = read_json_lines(directory / "metrics.jsonl")
    return [line for line in lines if "val_loss" in line]


def test_a_run_shows_the_loss_of_each_source_and_their_mean_by_share(mixed, capsys):
    run = mixed / "run"
    lines = evaluated(run)
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["val_loss a"] != line["val_loss b"]
        mean = 0.75 * line["val_loss a"] + 0.25 * line["val_loss b"]
        assert line["val_loss"] == pytest.approx(mean, rel=1e-12)
    loaded = load_run(run, "last")
    assert loaded.val_loss == lines[-1]["val_loss"]
    found = evaluate_data(loaded)
    assert list(found) == ["a", "b"]
    for name, evaluation in found.items():
        assert evaluation.loss == pytest.approx(lines[-1][f"val_loss {name}"], rel=1e-5)
    given = evaluate_data(loaded, [f"x={mixed / 'b.jsonl'}"])
    assert given["x"].tokens > found["b"].tokens
    evaluate([str(run), "--step=last"])
    shown = capsys.readouterr().out
    assert f"a: 64 tokens, {found['a'].bytes:,} bytes, loss {found['a'].loss:.4f} a token" in shown
    assert f"b: 64 tokens, {found['b'].bytes:,} bytes, loss {found['b'].loss:.4f} a token" in shown
    assert "what the run held out: 128 tokens" in shown


def test_a_run_says_how_often_it_reads_each_source(sources, tmp_path):
    run = opened(tmp_path / "run", *sources, "--mixture", "a=3", "b=1", "--steps=100")
    run.batches.close()
    training = 28  # lines of b that are not held out, or nearly
    passes = 100 / (sum(9 * len(f"b{i} ") + 1 for i in range(training)) / 32)
    assert run.mixture[0].startswith("a 75%: 300 of 400 rows, about ")
    found = run.mixture[1].removeprefix("b 25%: 100 of 400 rows, about ").removesuffix(" passes")
    assert float(found) == pytest.approx(passes, rel=0.1)


def test_other_weights_apply_from_the_step_on_that_a_run_is_resumed_at(begun):
    assert shares_of(go_on(begun)) == 0.75
    means = r"^val_loss is the mean of the sources by the new mixture from here on"
    with pytest.warns(UserWarning, match=means):
        assert shares_of(go_on(begun, "--mixture", "a=1", "b=7")) == 0.125
    with pytest.warns(UserWarning, match=means):
        assert shares_of(go_on(begun)) == 0.125  # killed before the next checkpoint
    assert [entry.after for entry in data.read_history(begun / "run")] == [0]


@pytest.mark.slow
def test_moved_sources_go_on_and_another_source_must_be_accepted(begun):
    run = go_on(begun)
    expected = next(run.batches)["inputs"]
    run.batches.close()
    moved = {name: begun / f"moved-{name}.jsonl" for name in "ab"}
    for name, path in moved.items():
        (begun / f"{name}.jsonl").rename(path)
    specs = [f"{name}={path}" for name, path in reversed(moved.items())]
    run = go_on(begun, "--data", *specs)
    np.testing.assert_array_equal(next(run.batches)["inputs"], expected)
    run.batches.close()
    more = f"c={write_lines(begun / 'c.jsonl', 30)}"
    weights = ["--mixture", "a=1", "b=1", "c=2"]
    with pytest.raises(ValueError, match=r"has changed: 1 new \(c=c\.jsonl\)\. .*--accept-data"):
        go_on(begun, "--data", *specs, more, *weights)
    with pytest.raises(ValueError, match=r"has changed: 1 gone \(b=b\.jsonl\)"):
        go_on(begun, "--data", specs[1], "--mixture", "a=1")
    with pytest.raises(ValueError, match=r"has changed: .*2 gone \(a=a\.jsonl, b=b\.jsonl\)"):
        go_on(begun, "--data", *moved.values(), "--mixture")
    with pytest.raises(ValueError, match="must give each source of the data one weight"):
        go_on(begun, "--data", *specs, more)
    run = go_on(begun, "--data", *specs, more, *weights, "--accept-data-change")
    assert run.batches.weights == {"b": 0.25, "a": 0.25, "c": 0.5}
    run.batches.close()


def test_a_source_may_have_other_data_to_be_evaluated_on(sources, tmp_path):
    other = write_lines(tmp_path / "z.jsonl", 40)
    run = opened(tmp_path / "run", *sources, "--eval-data", f"b={other}")
    run.batches.close()
    letters = {
        name: {chr(i) for row in batches[0]["inputs"] for i in row[row < 256]} & set("abz")
        for name, batches in run.validation.items()
    }
    assert letters == {"a": {"a"}, "b": {"z"}}
    assert run.identity["data sources"]["b"]["bytes"] == (tmp_path / "b.jsonl").stat().st_size
    with pytest.raises(ValueError, match=r"eval_data must be named as .*'c' is no source of it"):
        opened(tmp_path / "other", *sources, "--eval-data", f"c={other}")
    with pytest.raises(ValueError, match=r"eval_data must be named as the sources"):
        opened(tmp_path / "other", *sources, "--eval-data", other)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--mixture", "a=1"], "mixture 'a=1' must give each source of the data one weight"),
        (["--mixture", "a=1", "b=none"], "'b=none' must be NAME=WEIGHT with a positive weight"),
        (["--data", "python", "--mixture", "a=1"], "the named sources are none: give each as"),
        (["--data", "a=python", "python"], "data must name all of its sources or none"),
    ],
)
def test_what_does_not_go_together_is_refused(sources, tmp_path, flags, says):
    with pytest.raises(ValueError, match=says):
        opened(tmp_path / "run", *sources, *flags)
    assert not (tmp_path / "run").exists()


def test_chats_of_several_sources_are_mixed(tmp_path):
    for name, count in (("a", 200), ("b", 40)):
        rows = ({"prompt": f"{name}{i}", "completion": f"{name}{i:09d}"} for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", *(f"{name}={tmp_path / name}.jsonl" for name in "ab"), "--epochs=1"]
    flags += ["--mixture", "a=3", "b=1", f"--output={tmp_path / 'run'}"]
    run = open_run(parse_finetune([*FLAGS, *flags]))
    assert [text.partition(":")[0] for text in run.examples.split("epoch; ")] == ["a", "b"]
    rows = sum(len(range(count)) * 0.95 / 2 for count in (200, 40))  # of two examples each
    assert run.config.optimization.steps == pytest.approx(rows / 4, rel=0.15)
    assert sorted(run.validation) == ["a", "b"]
    found = [letters_of(batch) for batch in itertools.islice(run.batches, 4)]
    assert [batch.count("a") for batch in found] == [3] * 4
    run.batches.close()


# --- the controller --------------------------------------------------------------------------


def plan(**sources):
    return Plan(100, 10, 1e-3, 8, 1, sources)


def changed(made, *evaluations):
    """The weights after each evaluation."""
    state, found = made.init(), []
    for number, losses in enumerate(evaluations):
        metrics = {f"val_loss {name}": loss for name, loss in losses.items()}
        state = json.loads(json.dumps(state))  # as a checkpoint keeps it
        state, control = made.update(state, Seen(number, number, metrics), None)
        found.append(dict(control.weights))
    return found


@pytest.mark.parametrize("difference", ["excess", "signed"])
def test_dynamic_mixture_is_the_closed_form(difference):
    options = {"reference": "a=2.0, b=1.5,c=1", "eta": 0.7, "smoothing": 0.01}
    made = controller(
        "dynamic_mixture", plan(a=0.5, b=0.3, c=0.2), options | {"difference": difference}
    )
    losses = np.array([[3.0, 1.25, 2.5], [2.1, 1.0, 0.5]])
    w, expected = np.array([0.5, 0.3, 0.2]), []
    for row in losses:
        gap = row - [2.0, 1.5, 1.0]
        w = w * np.exp(0.7 * (gap if difference == "signed" else np.maximum(gap, 0)))
        w = 0.99 * w / w.sum() + 0.01 / 3
        expected.append(w)
    found = changed(made, *(dict(zip("abc", row.tolist(), strict=True)) for row in losses))
    np.testing.assert_allclose([list(x.values()) for x in found], expected, rtol=1e-14)


def test_dynamic_mixture_changes_nothing_without_an_evaluation():
    made = controller("dynamic_mixture", plan(a=0.6, b=0.4), {"reference": "a=2,b=2"})
    none = {"a": 3.0}, {}, {"a": math.nan, "b": 3.0}
    assert changed(made, *none) == [{"a": 0.6, "b": 0.4}] * 3


@pytest.mark.parametrize(
    ("sources", "options", "says"),
    [
        ({"": 1.0}, {"reference": "a=1"}, "needs data of at least two named sources"),
        ({"a": 1.0}, {"reference": "a=1"}, "needs data of at least two named sources"),
        ({}, {}, "reference must give one loss of each source, a=LOSS,b=LOSS; got ''"),
        ({}, {"reference": "a=1"}, "reference must give one loss of each source"),
        ({}, {"reference": "a=1,b=x"}, "reference must give one loss of each source"),
        ({}, {"reference": "a=1,b=1,a=2"}, "reference must give one loss of each source"),
        ({}, {"reference": "a=1,b=1", "eta": 0}, "eta must be positive, got 0"),
        ({}, {"reference": "a=1,b=1", "smoothing": 1}, "smoothing must be above 0 and below 1"),
        ({}, {"reference": "a=1,b=1", "difference": "x"}, "difference"),
    ],
)
def test_dynamic_mixture_refuses_what_cannot_work(sources, options, says):
    with pytest.raises(ValueError, match=says):
        controller("dynamic_mixture", plan(**(sources or {"a": 0.5, "b": 0.5})), options)


DYNAMIC = ["--controller=dynamic_mixture", "--controller-option", "reference=a=1.0,b=9.0"]


@pytest.mark.parametrize(
    "extra",
    [
        [],
        pytest.param(
            ["--release", "--state=int8", "--weights=int8", "--accumulation=2"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["--mesh=data=2"], marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_with_the_mixture_it_had_decided(sources, tmp_path, extra):
    flags = [*sources, "--mixture", "a=1", "b=3", *DYNAMIC, *extra]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = trained(whole, *flags, "--steps=6")
    lines = read_json_lines(whole / "metrics.jsonl")
    shares = [line["weight a"] for line in lines]
    assert shares[0] == shares[1] == 0.25
    assert 0.9 < shares[2] == shares[3] < shares[4] == shares[5] < 1
    mean = 0.25 * lines[5]["val_loss a"] + 0.75 * lines[5]["val_loss b"]
    assert lines[5]["val_loss"] == pytest.approx(mean, rel=1e-12)  # of the mixture it began with

    finished = opened(whole, "--resume", *extra)
    assert finished.batches.weights["a"] == pytest.approx(shares[5], rel=1e-12)
    finished.batches.close()

    shutil.copytree(whole, cut)
    for step in (4, 6):
        shutil.rmtree(cut / "checkpoints" / f"{step}")
    state = trained(cut, "--resume", *extra)
    chex.assert_trees_all_equal(state, expected)
    kept = lambda path: [
        {name: value for name, value in line.items() if name != "tokens_per_second"}
        for line in read_json_lines(path / "metrics.jsonl")
    ]
    assert kept(cut) == kept(whole)
    with pytest.raises(
        ValueError, match="mixture must stay as it was in a run that has a controller"
    ):
        opened(cut, "--resume", *extra, "--mixture", "a=1", "b=1")


def test_a_run_on_other_data_does_not_inherit_the_mixture(mixed):
    assert parse([f"--init={mixed / 'run'}"]).text.mixture == ("b=1", "a=3")
    assert parse([f"--init={mixed / 'run'}", "--data", "python"]).text.mixture == ()
