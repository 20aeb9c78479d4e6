"""The search for the best learning rate, and the table that it makes."""

import json
import math

import pytest

from benchmarks import convergence
from memopt.optimizers.registry import METHODS


@pytest.mark.parametrize(("best", "start"), [(0, 0), (3, 0), (-4, 0), (1, -6)])
def test_the_grid_grows_until_the_best_rate_is_inside(best, start):
    done = {}
    while (rate := convergence.next_rate(done, start)) is not None:
        assert rate not in done
        done[rate] = abs(rate - best) if rate <= best + 2 else math.inf
    assert min(done, key=lambda rate: done[rate]) == best
    assert {best - 1, best + 1} <= done.keys()
    assert len(done) <= 3 + abs(best - start)


def test_every_row_is_measured():
    results = json.loads(convergence.Options().output.read_text())["results"]
    assert {r["row"] for r in results} == set(convergence.ROWS)
    for row in convergence.ROWS.values():
        assert set(row.options) <= set(METHODS[row.optimizer].defaults)


@pytest.mark.slow
def test_a_row_with_state_in_8_bits_trains():
    options = convergence.Options(steps=20, eval_tokens=512, hidden_size=32, layers=1)
    row = convergence.ROWS["soap, factors too"]
    assert convergence.train(options, row, -7, seed=0) < math.log(264) - 0.5
