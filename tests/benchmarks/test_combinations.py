"""docs/combinations.md holds what `benchmarks.combinations` finds, and nothing that fails."""

import pytest

from benchmarks import combinations
from tests.optimizers.kinds import slow_unless

QUICK = {("lion", "in_subspace"), ("lion", "int8 state"), ("oasis", "in_subspace")}


def test_the_table_is_that_of_the_results():
    results = combinations.read()
    assert set(results) == set(combinations.rows())
    assert combinations.table(results) in combinations.DOCS.read_text()
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
    assert combinations.found(name, combination) == combinations.read()[name][combination]
