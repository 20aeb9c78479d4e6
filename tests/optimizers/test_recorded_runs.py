"""Our optimizers against runs recorded from the authors' own implementations."""

from pathlib import Path

import pytest

from tests.optimizers import recorded_runs
from tests.yardstick import yardstick


@pytest.mark.parametrize("transpose", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize("run", recorded_runs.RUNS)
def test_equals_the_recorded_run(run, transpose):
    errors, tolerances = recorded_runs.errors(run, transpose), recorded_runs.tolerances(run)
    assert set(errors) == set(yardstick.SHAPES)
    for leaf, steps in errors.items():
        assert set(steps) == set(yardstick.SNAP)
        for step, error in steps.items():
            assert error <= tolerances[leaf][step], (leaf, step, error)


def test_every_recording_is_followed():
    assert set(recorded_runs.RUNS) == {p.stem for p in Path(yardstick.HERE, "ref").iterdir()}
