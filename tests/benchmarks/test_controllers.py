"""The runs of each controller, and the tables that they make."""

import json

import pytest

from benchmarks import controllers
from memopt.training.controllers import CONTROLLERS

RESULTS = controllers.Options().output


def test_each_controller_has_a_row():
    shown = {row.options.get("controller") for row in controllers.ROWS.values()}
    assert shown - {None} == set(CONTROLLERS)


def test_every_row_is_measured():
    results = json.loads(RESULTS.read_text())["results"]
    assert {result["row"] for result in results} == set(controllers.ROWS)


@pytest.mark.slow
def test_a_row_trains_and_says_what_it_searched(tmp_path):
    options = controllers.Options(steps=300, eval_tokens=512, hidden_size=32, layers=1)
    row = controllers.ROWS["autolrs"]
    points = controllers.run(controllers.describe(options, row, 0, tmp_path / "run", {}))
    assert points[-1]["step"] == 300
    assert points[-1]["tokens"] == 300 * 8 * 64
    assert points[-1]["search_steps"] == 10 * (20 + 7)  # stages of 200 and 70
    assert points[-1]["val_loss"] < points[0]["val_loss"]
