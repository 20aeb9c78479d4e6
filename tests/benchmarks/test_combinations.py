"""docs/combinations.md holds what `benchmarks.combinations` finds, and nothing that fails."""

import pytest

from benchmarks import combinations
from benchmarks.report import read_results
from tests.optimizers.kinds import slow_unless

QUICK = {("lion", "in_subspace"), ("lion", "int8 state"), ("oasis", "in_subspace")}


def test_nothing_that_is_measured_fails():
    results = read_results(combinations.RESULTS)
    assert set(results) == set(combinations.rows())
    for name, words in results.items():
        assert set(words) == set(combinations.COMBINATIONS), name
        for combination, word in words.items():
            assert not word.startswith("fails"), (name, combination, word)
            assert word not in ("differs", "does not descend"), (name, combination)


@pytest.mark.parametrize(
    ("name", "combination"),
    [
        pytest.param(name, combination, marks=slow_unless((name, combination) in QUICK))
        for name in combinations.rows()
        for combination in combinations.COMBINATIONS
    ],
)
def test_every_cell_is_found_again(name, combination):
    assert (
        combinations.found(name, combination)
        == read_results(combinations.RESULTS)[name][combination]
    )
