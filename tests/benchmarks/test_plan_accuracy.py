"""The committed comparison of planned and measured peaks on the CPU."""

import json

import pytest

from benchmarks import plan_accuracy

RESULTS = json.loads(plan_accuracy.RESULTS.read_text())["results"]
#: YNNPACK copies operands of attention, which take much of these peaks.
COPIED = ("Lion, 1024 tokens", "Adafactor, tiny, 32 rows")


def ratios(**condition):
    return {r["row"]: r["ratio"] for r in RESULTS if condition.items() <= r.items()}


def test_every_step_is_measured_on_the_cpu():
    assert set(ratios(chip="cpu", threads="one", library="ynnpack")) == set(plan_accuracy.ROWS)


@pytest.mark.parametrize("row", [row for row in plan_accuracy.ROWS if row not in COPIED])
def test_plans_are_within_5_percent_of_runs_on_the_cpu(row):
    assert abs(ratios(chip="cpu", threads="one", library="ynnpack")[row] - 1) <= 0.05


@pytest.mark.parametrize("row", COPIED)
def test_those_are_too_without_the_librarys_own_copies(row):
    assert abs(ratios(chip="cpu", threads="one", library="eigen")[row] - 1) <= 0.05


def test_bad_input_ends_with_one_sentence():
    for words, message in (
        ("--chip v5e", "chip 'v5e' is unknown"),
        ("--rows AdamV", "did you mean 'AdamW'"),
    ):
        with pytest.raises(SystemExit, match=message):
            plan_accuracy.main(words.split())
