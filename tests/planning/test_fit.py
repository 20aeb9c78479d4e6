"""Searches over plans of a stub whose peak is a formula; `plan` itself has tests of its own."""

import itertools
import json
from types import SimpleNamespace

import jax
import pytest

from memopt.planning.fit import fit_batch_size, fit_mesh, fit_optimizer

LIMIT = 1000


def planned(peak):
    return SimpleNamespace(
        peak_bytes=peak,
        limit_bytes=LIMIT,
        margin_bytes=LIMIT - peak,
        fits=peak <= LIMIT,
        compiler="a compiler",
    )


def by_batch(peak):
    return lambda *, batch_size, **options: planned(peak(batch_size))


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 31])
def test_the_largest_batch_of_a_linear_peak_takes_four_plans_at_most(rows):
    edge = fit_batch_size(plan=by_batch(lambda b: LIMIT * (b + 5) / (rows + 5.5)))
    assert (edge.fits, edge.exceeds) == (rows, rows + 1)
    assert len(edge.planned) <= 4


@pytest.mark.parametrize("power", [0.3, 1.7, 4.0])
def test_the_largest_batch_of_a_curved_peak(power):
    for rows in (1, 10, 47, 1000):
        edge = fit_batch_size(
            plan=by_batch(lambda b, rows=rows: LIMIT * (b / (rows + 0.5)) ** power)
        )
        assert (edge.fits, edge.exceeds) == (rows, rows + 1)
        assert len(edge.planned) <= 30


def test_the_largest_batch_of_a_peak_in_steps():
    edge = fit_batch_size(plan=by_batch(lambda b: LIMIT - 1 if b <= 200 else LIMIT + 1))
    assert (edge.fits, edge.exceeds) == (200, 201)
    assert len(edge.planned) <= 30


def test_batches_are_multiples_of_accumulation_and_of_what_splits_rows():
    def plan(*, batch_size, mesh, accumulation, model):
        assert (mesh, accumulation, model) == ("data=2,fsdp=4,tensor=8", 3, "7b")
        return planned(10 * batch_size)

    edge = fit_batch_size(plan=plan, mesh="data=2,fsdp=4,tensor=8", accumulation=3, model="7b")
    assert (edge.fits, edge.exceeds) == (96, 120)
    assert all(size % 24 == 0 for size in edge.planned)


def test_no_batch_fits():
    edge = fit_batch_size(plan=by_batch(lambda b: LIMIT + b))
    assert (edge.fits, edge.exceeds, list(edge.planned)) == (None, 1, [1])


def test_the_largest_batch_to_try_fits():
    edge = fit_batch_size(plan=by_batch(lambda b: 1), most=50)
    assert (edge.fits, edge.exceeds) == (50, None)


def test_every_plan_is_reported():
    seen = []
    edge = fit_batch_size(plan=by_batch(lambda b: 100 * b), report=seen.append)
    assert seen == list(edge.planned.values())


def fails(*args):
    raise jax.errors.JaxRuntimeError("INTERNAL: no tiles.\nAnd so on.")


@pytest.mark.parametrize("most", [1, 5, 100])
def test_a_batch_that_the_compiler_fails_on_counts_as_not_fitting(most):
    edge = fit_batch_size(plan=by_batch(lambda b: b if b <= most else fails()))
    assert (edge.fits, edge.exceeds) == (most, most + 1)
    assert edge.failed[most + 1] == "INTERNAL: no tiles."
    assert most + 1 not in edge.planned
    assert len(edge.planned) + len(edge.failed) <= 15


def by_mesh(peak):
    return lambda *, mesh, **options: planned(peak(int(mesh.rpartition("=")[2])))


@pytest.mark.parametrize("chips", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("replicated", [0, 0.4])
def test_the_smallest_mesh(chips, replicated):
    """Part of the peak is split; the rest, which every chip has, hides how many are needed."""
    split = (1 - replicated) * LIMIT * chips
    edge = fit_mesh(plan=by_mesh(lambda n: replicated * LIMIT + split / n), batch_size=32)
    smaller = f"fsdp={chips // 2}" if chips > 1 else None
    assert (edge.fits, edge.exceeds) == (f"fsdp={chips}", smaller)
    assert len(edge.planned) <= 4


def test_a_peak_of_three_limits_goes_on_with_four_chips():
    edge = fit_mesh(plan=by_mesh(lambda n: 3 * LIMIT / n), batch_size=32)
    assert list(edge.planned) == ["fsdp=1", "fsdp=4", "fsdp=2"]


def test_a_mesh_must_divide_a_micro_batch():
    edge = fit_mesh(plan=by_mesh(lambda n: 100 * LIMIT / n), batch_size=24, accumulation=3)
    assert (edge.fits, edge.exceeds, list(edge.planned)) == (None, "fsdp=8", ["fsdp=1", "fsdp=8"])
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of 6 .* got 16"):
        fit_mesh(plan=by_mesh(lambda n: 1), batch_size=16, accumulation=3, mesh="data=2")


def test_other_axes_of_a_mesh_stay():
    edge = fit_mesh(plan=by_mesh(lambda n: 2 * LIMIT / n), batch_size=8, mesh="data=2,tensor=2")
    assert edge.fits == "data=2,tensor=2,fsdp=2"
    with pytest.raises(ValueError, match="mesh 'fsdp=2' must leave out fsdp"):
        fit_mesh(plan=by_mesh(lambda n: 1), batch_size=8, mesh="fsdp=2")


def by_optimizer(*, optimizer, state, weights, release, model):
    assert model == "7b"
    if release and optimizer == "oasis":
        raise ValueError("release must be left out with oasis.")
    peak = {"adamw": 3000, "oasis": 3500, "lion": 1500}[optimizer]
    found = planned(peak - 1000 * (state == "int8") - 400 * (weights == "int8") - 50 * release)
    found.fits &= not release  # as a compiler may refuse what seems to fit
    return found


def test_all_storages_of_each_optimizer_sorted_by_what_fits():
    seen = []
    names = ["adamw", "oasis", "lion"]
    rows = fit_optimizer(plan=by_optimizer, optimizers=names, model="7b", report=seen.append)
    assert sorted(map(str, rows)) == sorted(map(str, seen))
    wanted = itertools.product(names, (None, "int8"), (None, "int8"), (False, True))
    assert {tuple(row.options.values()) for row in rows} == set(wanted)
    ranks = [
        (2, 0) if row.plan is None else (not row.plan.fits, row.plan.peak_bytes) for row in rows
    ]
    assert ranks == sorted(ranks)
    assert {first for first, _ in ranks} == {0, 1, 2}
    assert {row.refused for row in rows if not row.plan} == {"release must be left out with oasis."}


def test_a_step_that_the_compiler_fails_on_or_need_not_see_is_a_row():
    def plan(*, optimizer, **options):
        found = planned({"lion": 1001, "adamw": 9}.get(optimizer) or fails())
        return SimpleNamespace(**vars(found) | {"compiler": "" if optimizer == "lion" else "x"})

    once = {"states": [None], "storages": [None], "releases": [False]}
    rows = fit_optimizer(plan=plan, optimizers=["muon", "lion", "adamw"], **once)
    assert [row.options["optimizer"] for row in rows] == ["adamw", "lion", "muon"]
    assert rows[2].refused == "the compiler failed: INTERNAL: no tiles."


def test_some_storages_of_some_optimizers():
    rows = fit_optimizer(
        plan=by_optimizer, optimizers=["lion"], states=[None], storages=[None], model="7b"
    )
    assert [row.options["release"] for row in rows] == [True, False]


def test_nothing_that_can_be_planned_is_an_error_with_the_reason():
    with pytest.raises(ValueError, match="release must be left out with oasis"):
        fit_optimizer(plan=by_optimizer, optimizers=["oasis"], releases=[True], model="7b")


def test_all_of_memopts_own_methods_are_compared_by_default():
    rows = fit_optimizer(
        plan=lambda **options: planned(1), states=[None], storages=[None], releases=[False]
    )
    assert {"adafactor", "apollo_mini", "galore", "lion", "muon", "soap"} < {
        row.options["optimizer"] for row in rows
    }


@pytest.mark.slow
def test_processes_find_the_same_rows():
    options = {"optimizers": ["lion", "oasis"], "model": "7b"}
    one, two = (fit_optimizer(plan=by_optimizer, processes=n, **options) for n in (1, 2))
    assert list(map(str, one)) == list(map(str, two))


@pytest.fixture
def a_run(tmp_path):
    options = {"optimizer": "lion", "accumulation": 3, "mesh": "data=2", "release": True}
    (tmp_path / "config.json").write_text(json.dumps(options))
    return str(tmp_path)


def test_batches_and_meshes_are_multiples_of_the_accumulation_of_a_run(a_run):
    edge = fit_batch_size(plan=by_batch(lambda b: 10 * b), model=a_run)
    assert (edge.fits, edge.exceeds) == (96, 102)
    with pytest.raises(ValueError, match="batch_size must be a multiple of 3"):
        fit_mesh(plan=by_mesh(lambda n: 1), batch_size=16, model=a_run)


def test_a_run_that_is_released_has_no_rows_without(a_run):
    with pytest.raises(ValueError, match="must be a run without release"):
        fit_optimizer(plan=by_optimizer, optimizers=["lion"], model=a_run)
