"""docs/guarantees.md holds what `benchmarks.guarantees` finds, and only known exceptions."""

import pytest

from benchmarks import guarantees
from benchmarks.report import read_results
from tests.optimizers.kinds import slow_unless

# What holds nowhere without a wrapper, or is refused.
EXCEPTIONS = {
    "NaN": {"entry lost", "matrix lost"},
    "complex": {"refused"},
    "bfloat16": {"bfloat16 state"},  # Lion's momentum, and Optax's statistics
}
UNBOUNDED = ("adam", "lomo")  # Optax's rule, and plain gradient descent: inf stays inf


def test_what_is_measured_holds_but_for_known_exceptions():
    results = read_results(guarantees.RESULTS)
    assert set(results) == set(guarantees.rows())
    for name, words in results.items():
        assert set(words) == set(guarantees.CONDITIONS), name
        for condition, word in words.items():
            allowed = EXCEPTIONS.get(condition, set())
            if name in UNBOUNDED and condition == "inf":
                allowed = {"entry lost"}
            assert word == guarantees.HOLDS or word in allowed, (name, condition, word)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=slow_unless(n == "lion")) for n in guarantees.rows()]
)
def test_every_cell_is_found_again(name):
    found = {condition: guarantees.found(name, condition) for condition in guarantees.CONDITIONS}
    assert found == read_results(guarantees.RESULTS)[name]
