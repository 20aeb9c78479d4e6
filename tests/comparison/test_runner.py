"""Grids of comparisons: which runs are made, in which order, and what they record."""

import collections
import dataclasses
import functools
import math
import os
import signal

import numpy as np
import optax
import pytest

from memopt.comparison import cells, compare, make_protocol, worker
from memopt.comparison.grid import Grid, rows_of
from memopt.comparison.protocol import PRESETS, TUNING_SEED
from memopt.comparison.records import read_records
from memopt.comparison.rows import METHOD_ROWS, ROWS, STARTS, TUNED, Row, first_rate, tuned_options
from memopt.comparison.tuning import Point
from memopt.comparison.worker import IncompleteError, OutOfTimeError
from memopt.errors import check_choice
from memopt.optimizers.registry import METHODS, available
from memopt.training.lock import Lock


def user_optimizer(learning_rate, *, momentum=0.5):
    """An optimizer that is entered by its name."""
    return optax.sgd(learning_rate, momentum)


OWN = f"{__name__}:user_optimizer"


def lethal(learning_rate):
    """An optimizer that ends its process, as the kernel does for lack of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def by_method(records):
    counts = collections.Counter((x["method"], x["tuned"]) for x in records)
    return {name: (counts[name, False], counts[name, True]) for name, _ in counts}


def test_a_grid_from_end_to_end(protocol, tmp_path):
    name = "lion, state int8, released"
    protocol = dataclasses.replace(protocol, seeds=(0,))
    records = compare(tmp_path, protocol, methods=[name])
    assert records == read_records(tmp_path / "compare.jsonl")
    found = {x["method"]: x for x in records if x["tuned"]}
    assert list(found) == ["adamw", "lion", name]
    for record in found.values():
        assert math.isfinite(record["val_loss"])
        assert [step for step, _ in record["val_losses"]] == list(range(1, 21))
        assert record["val_losses"][-1] == [20, record["val_loss"]]
        assert (record["tokens"], record["diverged"]) == (640, False)
        assert record["step_cpu_seconds"] > 0
    exact, small = found["lion"], found[name]
    assert (small["tuned_as"], small["release"], small["state"]) == ("lion", True, "int8")
    assert small["learning_rate"] == exact["learning_rate"]
    assert small["state_bytes"] < exact["state_bytes"]
    assert small["parameter_bytes"] == exact["parameter_bytes"]
    assert 0 < abs(small["val_loss"] - exact["val_loss"]) < 0.1


@pytest.mark.slow
def test_rows_differ_from_their_exact_twins_in_precision_only(protocol, tmp_path):
    names = ["muon, released", "muon, state int8", "muon, weights int8"]
    protocol = dataclasses.replace(protocol, seeds=(0,))
    records = compare(tmp_path, protocol, methods=names, jobs=2)
    exact, released, state, weights = (x for x in records if x["tuned"] and x["method"] != "adamw")
    np.testing.assert_allclose(released["val_loss"], exact["val_loss"], rtol=1e-4)
    assert state["state_bytes"] < exact["state_bytes"]
    assert weights["parameter_bytes"] < exact["parameter_bytes"]
    assert weights["parameters"] == exact["parameters"]
    for record in (state, weights):
        assert 0 < abs(record["val_loss"] - exact["val_loss"]) < 0.1


@pytest.mark.slow
def test_processes_that_are_killed_are_told_and_lose_no_run(protocol, tmp_path):
    with pytest.raises(IncompleteError, match=r"2 of 2 processes .* \(killed by SIGKILL"):
        compare(tmp_path, protocol, methods=[f"{__name__}:lethal"], jobs=2)
    found = by_method(read_records(tmp_path / "compare.jsonl"))
    assert [(name, tuned) for name, (_, tuned) in found.items()] == [("adamw", 2)]


def test_a_run_that_is_not_finite_has_diverged(protocol):
    grid = Grid(protocol, rows_of(["lion"]), (2,))
    cell = grid.cell(grid.units[1], 20, Point(100.0, (0,)), 0)
    outcome = cells.train(cell, evaluate_pieces=True)
    assert (outcome.diverged, outcome.val_loss) == (True, math.inf)
    assert all(math.isfinite(loss) for _, loss in outcome.val_losses)


def test_a_user_function_is_trained(protocol, trained, tmp_path):
    compare(tmp_path, protocol, methods=[f"{OWN}, momentum=0.8"])
    last = read_records(tmp_path / "compare.jsonl")[-1]
    assert (last["method"], last["options"]) == (f"{OWN}, momentum=0.8", {"momentum": 0.8})
    grid = Grid(protocol, rows_of([last["method"]]), (2,))
    cell = grid.cell(grid.units[1], 20, Point(-4), 0)
    outcome = cells.train(cell, evaluate_pieces=False)
    assert outcome.val_loss < 5  # from 5.6
    assert outcome.state_bytes == outcome.parameter_bytes + 4  # and a count


def test_another_text_or_an_edited_function_is_another_experiment(
    protocol, trained, tmp_path, monkeypatch
):
    first = compare(tmp_path, protocol, methods=[OWN])
    assert compare(tmp_path, protocol, methods=[OWN]) == first
    monkeypatch.setattr(cells, "digest_of_source", lambda name: "edited")
    second = compare(tmp_path, protocol, methods=[OWN])
    again = [x for x in second if x not in first]
    assert {x["method"] for x in again} == {OWN}
    assert {x["source"] for x in again} == {"edited"}
    longer = compare(tmp_path, dataclasses.replace(protocol, steps=40), methods=[OWN])
    assert {x["steps"] for x in longer} == {40}


def test_whatever_a_method_raises_the_others_are_trained(protocol, fail, tmp_path):
    fail(KeyError("missing"), optimizer="lion")
    with pytest.raises(ValueError, match="lion at nano: KeyError: 'missing'"):
        compare(tmp_path, protocol, methods=["lion", "muon"])
    assert by_method(read_records(tmp_path / "compare.jsonl"))["muon"][1] == len(protocol.seeds)


def test_all_methods_have_the_same_budget_and_the_baseline_more(protocol, trained, tmp_path):
    protocol = dataclasses.replace(protocol, tuning_runs=8)
    counts = by_method(compare(tmp_path, protocol, methods=["lion", "adam", "muon", OWN]))
    assert counts.pop("adamw") == (12, 2)
    assert set(counts.values()) == {(8, 2)}


def test_tuned_runs_have_the_best_setting_and_seeds_that_were_not_tuned_on(
    protocol, trained, tmp_path
):
    protocol = dataclasses.replace(protocol, tuning_runs=8)
    records = [x for x in compare(tmp_path, protocol, methods=["lion"]) if x["method"] == "lion"]
    assert {x["seed"] for x in records if not x["tuned"]} == {TUNING_SEED}
    assert [x["seed"] for x in records if x["tuned"]] == [0, 1]
    assert {x["learning_rate"] for x in records if x["tuned"]} == {2.0**-7}
    assert records[0]["learning_rate"] == 2.0 ** first_rate(Row("lion"))


def test_the_baseline_comes_first_and_rows_at_the_settings_of_others_after_them(protocol):
    rows = rows_of(["muon, state int8", "lion, released", "sgd"])
    sizes = {"small": protocol.models["nano"], "large": protocol.models["nano"]}
    units = Grid(dataclasses.replace(protocol, models=sizes), rows, (2,)).units
    names = ["adamw", "muon", "lion", "sgd", "muon, state int8", "lion, released"]
    assert [(x.size, x.row.name) for x in units] == [(s, n) for s in sizes for n in names]


def test_no_run_is_repeated(protocol, trained, tmp_path):
    methods = ["lion", "lion, state int8"]
    records = compare(tmp_path, protocol, methods=methods)
    assert compare(tmp_path, protocol, methods=methods) == records
    assert set(trained.values()) == {1}
    protocol = dataclasses.replace(protocol, seeds=(1, 2))
    more = compare(tmp_path, protocol, methods=methods)
    assert {x["seed"] for x in more if x["tuned"]} == {1, 2}
    assert set(trained.values()) == {1}


def test_a_run_whose_line_was_torn_is_repeated_alone(protocol, trained, tmp_path):
    records = compare(tmp_path, protocol, methods=["lion"])
    path = tmp_path / "compare.jsonl"
    path.write_text(path.read_text()[:-10])
    assert compare(tmp_path, protocol, methods=["lion"]) == records
    assert sorted(trained.values()) == [1] * (len(records) - 1) + [2]


def test_a_stopped_grid_goes_on(protocol, trained, fail, tmp_path, monkeypatch):
    train = worker.train
    fail(KeyboardInterrupt, after=4)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path, protocol, methods=["lion"])
    assert len(read_records(tmp_path / "compare.jsonl")) == 4
    monkeypatch.setattr(worker, "train", train)
    compare(tmp_path, protocol, methods=["lion"])
    assert set(trained.values()) == {1}


def test_a_row_that_another_process_works_on_is_left_to_it(
    protocol, trained, tmp_path, monkeypatch
):
    acquire, taken = Lock.acquire, []

    def busy(self):  # the first row is another's for one round
        if not taken:
            taken.append(self)
            raise ValueError
        acquire(self)

    monkeypatch.setattr(Lock, "acquire", busy)
    records = compare(tmp_path, protocol, methods=["lion", "adamw, state int8"])
    assert records[0]["method"] == "lion"
    assert [x["method"] for x in records[-2:]] == ["adamw, state int8"] * 2


def test_it_ends_before_a_run_that_would_take_too_long(protocol, trained, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(worker.time, "monotonic", lambda: next(clock))
    with pytest.raises(OutOfTimeError):
        compare(tmp_path, protocol, methods=["lion"], minutes=4)
    assert 0 < len(read_records(tmp_path / "compare.jsonl")) < 8


def test_steps_to_a_target_at_every_batch_size(protocol, trained, tmp_path):
    records = compare(
        tmp_path, protocol, methods=["lion, state int8"], target_loss=4.5, over="batch_size"
    )
    assert {x["target_loss"] for x in records} == {4.5}
    assert not (tmp_path / "compare.jsonl").exists()
    found = {(x["method"], x["batch_size"], x["steps"]) for x in records if x["tuned"]}
    methods = ("adamw", "lion", "lion, state int8")
    assert found == {(name, batch, 40) for name in methods for batch in (2, 4)}
    assert all(x["val_loss"] <= 4.5 for x in records if x["tuned"])


def test_runs_are_shared_between_targets(protocol, trained, tmp_path):
    first = compare(tmp_path, protocol, methods=["lion"], target_loss=4.5)
    again = compare(tmp_path, protocol, methods=["lion"], target_loss=4.4)
    assert {x["target_loss"] for x in again} == {4.4}
    assert {x["key"] for x in first} & {x["key"] for x in again}
    assert set(trained.values()) == {1}


def test_the_learning_rates_are_those_of_the_schedule(protocol):
    grid = Grid(protocol, rows_of(["schedule_free"]), (2,))
    cosine, constant = (
        grid.cell(x, 20, Point(-3, (0,) * n), 0).rates
        for x, n in zip(grid.units, (2, 1), strict=True)
    )
    assert cosine[:3].tolist() == [0, 0.0625, 0.125]
    np.testing.assert_allclose(cosine[11], 0.0625, rtol=1e-6)
    assert 0 < cosine[-1] < 0.002
    assert set(constant[2:].tolist()) == {0.125}


def changed(value):
    """Another value of the same type."""
    if isinstance(value, bool | type(None)):
        return "int8" if value is None else not value
    if isinstance(value, tuple):
        return (*value, ("nesterov", True))
    if isinstance(value, str):
        return f"{value}x"
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, hidden_size=2 * value.hidden_size)
    return value * 2 + 1


def test_the_key_covers_all_that_decides_a_result(protocol):
    grid = Grid(protocol, rows_of(["lion"]), (2,))
    cell = grid.cell(grid.units[1], 20, Point(-7, (0,)), 0)
    others = [
        dataclasses.replace(
            cell, program=dataclasses.replace(cell.program, **{name: changed(value)})
        )
        for name, value in vars(cell.program).items()
    ]
    fields = {field.name for field in dataclasses.fields(cell)} - {"program", "data"}
    others += [dataclasses.replace(cell, **{n: changed(getattr(cell, n))}) for n in fields]
    assert len({x.key for x in (cell, *others)}) == 1 + len(others) == 1 + 8 + 8
    assert dataclasses.replace(cell, data=("elsewhere.txt",)).key == cell.key
    assert dataclasses.replace(cell).key == cell.key


def test_the_text_decides_the_key_and_its_name_does_not(tmp_path):
    for name, text in {"a.txt": "one " * 50, "b.txt": "two " * 50}.items():
        (tmp_path / name).write_text(text)
    one, two = (cells.text_identity((str(tmp_path / name),)) for name in ("a.txt", "b.txt"))
    assert one != two


def test_all_methods_of_the_registry_are_compared():
    left_out = {name for name in available() if name.startswith("optax_")} | {"adam"}
    assert set(METHOD_ROWS) == {*available()} - left_out


def test_the_table_of_tuned_options_fits_the_methods():
    check = functools.partial(check_choice, "option")
    for name, tuned in TUNED.items():
        check(tuned.option, METHODS[name].defaults)
        assert len(set(tuned.values)) == len(tuned.values) > 1
        assert tuned.reason
    assert tuned_options(Row("adamw")).keys() == {"b2", "weight_decay"}


@pytest.mark.parametrize("name", [*ROWS, "galore, rank=0.125, state int4, weights int8, released"])
def test_names_of_rows_are_read_back(name):
    assert Row.parse(name).name == name


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("lyon", "did you mean 'lion'"),
        ("lion, b3=0.9", "option of lion: 'b3' is unknown"),
        ("lion, state int3", "state 'int3' is unknown"),
        ("lion, fast", "must be NAME=VALUE"),
        ("schedule_free, state int8", "its state is weights"),
        ("nowhere:function", "'nowhere:function' must be MODULE:FUNCTION"),
        ("math:pi", "must be MODULE:FUNCTION, got 3.14"),
    ],
)
def test_wrong_rows_are_refused(name, error):
    with pytest.raises(ValueError, match=error):
        Row.parse(name)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"preset": "gpu"}, "preset 'gpu' is unknown"),
        ({"sizes": ("3M",)}, "size '3M' is unknown"),
        ({"seeds": ()}, "seeds must be at least 1"),
        ({"seeds": (0, 0)}, "seeds must differ, got 0 0"),
        ({"seeds": (TUNING_SEED,)}, "which methods are tuned on"),
        ({"steps": 30}, "steps must be a multiple of 20, got 30"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_sizes": (4, 0)}, "batch_sizes must be at least 1, got 0"),
        ({"seq_len": 1}, "seq_len must be at least 2, got 1"),
        ({"eval_tokens": 63}, "eval_tokens must be at least 64, got 63"),
        ({"tuning_runs": 0}, "tuning_runs must be at least 1, got 0"),
    ],
)
def test_protocols_that_make_no_sense_are_refused(changes, error):
    with pytest.raises(ValueError, match=error):
        make_protocol(**changes)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"jobs": 0}, "jobs must be at least 1"),
        ({"over": "batch_size"}, "over must be given with target_loss"),
        ({"target_loss": math.nan}, "target_loss must be finite"),
        ({"minutes": math.nan}, "minutes must be at least 0, got nan"),
        ({"protocol": make_protocol(data=("nowhere",))}, "nowhere"),
    ],
)
def test_wrong_options_are_refused(options, error, tmp_path):
    with pytest.raises(ValueError, match=error):
        compare(tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


def test_presets_have_the_sizes_of_their_names():
    for protocol in PRESETS.values():
        for name, model in protocol.models.items():
            millions = cells.count_parameters(model) / 1e6
            assert float(name.removesuffix("M")) == pytest.approx(millions, rel=0.07)


def test_every_method_has_a_first_rate_that_does_not_follow_its_default():
    assert set(STARTS) == set(METHOD_ROWS)
