"""Planned peaks of compared runs."""

import json
from types import SimpleNamespace

import optax
import pytest

from memopt.cli import peaks
from memopt.comparison.cells import Outcome, _compiled, count_parameters
from memopt.comparison.grid import Grid, Unit
from memopt.comparison.protocol import PRESETS
from memopt.comparison.records import make_record, program_of
from memopt.comparison.rows import Row, tuned_options
from memopt.comparison.tuning import Point
from memopt.planning import chips
from memopt.planning.step_memory import peak_bytes
from tests.comparison.conftest import protocol as protocol
from tests.training.conftest import compilation_cache as compilation_cache


def own(learning_rate, *, momentum=0.5):
    """An optimizer that is entered by its name."""
    return optax.sgd(learning_rate, momentum)


OWN = f"{__name__}:own"


@pytest.fixture(autouse=True)
def quick(protocol, tmp_path, monkeypatch):
    """Makes the preset small, and the cache empty."""
    monkeypatch.setitem(PRESETS, "cpu", protocol)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def made(protocol):
    """Makes the record of a run of a row."""

    def make(name, device="cpu", **changes):
        row = Row.parse(name)
        grid = Grid(protocol, (row,), (protocol.batch_size,))
        point = Point(-7, (0,) * len(tuned_options(row)))
        cell = grid.cell(Unit("nano", row, protocol.batch_size), protocol.steps, point, 0)
        outcome = Outcome(2.0, [], False, 8, 4, count_parameters(cell.program.model), None, None, 1)
        record = make_record("nano", row, cell, outcome, tuned=True)
        # As it is read from a file: JSON has no tuples.
        return json.loads(json.dumps(record | {"machine": {"device": device}} | changes)), cell

    return make


@pytest.fixture
def planned(monkeypatch):
    """Replaces compilation; the chips that steps were compiled for."""
    compiled = []

    def plan_compilable(make, chip, **options):
        make(chips.devices("cpu"), chip)
        compiled.append(chip)
        return SimpleNamespace(peak_bytes=len(compiled), compiled_for=chip, compiler="guess 1.0")

    monkeypatch.setattr(peaks, "plan_compilable", plan_compilable)
    return compiled


def plan(*runs, chip=None):
    told = []
    found = peaks.plan_peaks([run for run, _ in runs], chip=chip, tell=told.append)
    return found, told


def test_the_peak_is_that_of_the_step_that_the_run_takes(made):
    record, cell = made("lion, released")
    found, told = plan((record, cell))
    peak = found[cell.key]
    assert peak.peak_bytes == peak_bytes(_compiled(cell.program).setup.compile())
    assert (peak.compiled_for, peak.compiler) == ("cpu", chips.compiler("cpu"))
    assert told == []


@pytest.mark.parametrize("name", ["adagrad", "prodigy", "muon, weights int8", "lomo", OWN])
def test_a_record_tells_what_its_step_is_compiled_for(made, name):
    record, cell = made(name)
    assert program_of(record) == cell.program


def test_steps_are_planned_once_and_those_of_users_are_traced_again(made, planned):
    runs = [made("lion"), made("lion, state int8"), made(OWN)]
    first, second = plan(*runs), plan(*runs)
    assert planned == ["cpu", "cpu", "cpu", "cpu"]
    assert [peak.peak_bytes for peak in first[0].values()] == [1, 2, 3]
    assert [peak.peak_bytes for peak in second[0].values()] == [1, 2, 4]


def test_another_jax_is_asked_again(made, planned, monkeypatch):
    plan(made("lion"))
    monkeypatch.setattr(peaks.jax, "__version__", "0.99")
    plan(made("lion"))
    assert len(planned) == 2


def test_the_chip_is_that_of_the_runs_unless_it_is_named(made, planned, monkeypatch):
    for module in (chips, peaks.cache):
        monkeypatch.setattr(module, "compiler", lambda chip: f"compiler of {chip}")
    plan(made("lion", device="TPU v5 lite"), made("sgd", device="NVIDIA H200"))
    plan(made("lion"), chip="v6e")
    assert planned == ["v5e", "h200", "v6e"]


def test_a_missing_compiler_is_told_and_the_cpus_is_asked(made, planned, monkeypatch):
    def missing(chip):
        raise ModuleNotFoundError("compiling for a TPU needs libtpu.")

    monkeypatch.setattr(chips, "compiler", lambda chip: chip if chip == "cpu" else missing(chip))
    found, told = plan(made("lion"), chip="v5e")
    assert [peak.compiled_for for peak in found.values()] == planned == ["cpu"]
    assert told == ["compiling for a TPU needs libtpu. Compiled for this machine's CPU instead."]


def test_what_cannot_be_planned_is_told_and_all_else_is_planned(made, planned):
    runs = [
        made("sgd", device="abacus"),
        made("lion"),
        made("muon", parameters=7),
        made("adamw", device="abacus"),
        made(OWN, source="of before"),
    ]
    found, told = plan(*runs)
    assert [*found] == [runs[1][1].key]
    assert told == [
        "The peak is not known of sgd at nano; adamw at nano: no compiler is known for 'abacus': "
        "name a chip with --chip.",
        "The peak is not known of muon at nano: no preset has a model nano of 7 parameters.",
        f"The peak is not known of {OWN} at nano: the file of {OWN} has changed since its run.",
    ]
