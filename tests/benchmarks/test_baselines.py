"""docs/baselines.md holds what `benchmarks.baselines` finds."""

import jax
import numpy as np
import pytest

import memopt
from benchmarks import baselines
from tests.optimizers.kinds import slow_unless

RESULTS = {r["optimizer"]: r for r in baselines.read()["results"]}


def test_every_baseline_is_measured():
    assert [*RESULTS] == [*baselines.BASELINES]
    assert set(RESULTS) == set(memopt.available("optax"))


def test_memopt_has_what_optax_does_wrong():
    """Its own are near the recordings, and stacked layers are separate ones."""
    for name, r in RESULTS.items():
        found = r.get("memopt", r["optax"])
        errors = [*found.get("errors", {}).values()]
        allowed = {"dowg": 2e-2, "optax_adopt": 1e-3, "prodigy": 4e-4}.get(name, 3e-4)
        assert max([*errors, 0.0]) <= allowed, name
        assert found["stacked"] < 1e-9, name
    for fact in baselines.read()["facts"]:
        assert fact.get("memopt", fact["optax"]) == pytest.approx(fact["paper"], rel=1e-4)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=slow_unless(n == "sgd")) for n in baselines.BASELINES],
)
def test_a_record_is_found_again(name):
    close = lambda a, b: a == b or np.isclose(a, b, rtol=1e-2, atol=1e-9)
    record = baselines.measure(name)
    for library in ("optax", "memopt"):
        found, expected = record.get(library), RESULTS[name].get(library)
        assert jax.tree.all(jax.tree.map(close, found, expected)), (found, expected)
