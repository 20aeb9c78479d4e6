"""Methods and assertions that the tests of trainers share."""

from typing import Any

import chex
import jax

import memopt
from memopt.names import split_layer
from tests.clients.page import TRAINERS_PAGE, by_column, table_row

SOME = ("adafactor", "apollo_mini", "galore", "muon", "adamw_8bit")

# The same for trainers that choose an optimizer by its name: each with its options.
BY_NAME: list[tuple[str, dict[str, Any]]] = [
    ("adafactor", {}),
    ("apollo_mini", {"rank": 2}),
    ("galore", {"rank": 2}),
    ("muon", {}),
    ("tests.clients.optimizers:adamw_8bit", {}),
]


def assert_on_the_page(trainer: str, tx: Any, params: Any) -> None:
    """Asserts that the page's table has the names that `memopt.describe` has of a model."""
    without_layer = lambda name: split_layer(name)[0]
    row = table_row(trainer, by_column(memopt.describe(tx, params), without_layer))
    assert row in TRAINERS_PAGE, row


def assert_same(first: Any, second: Any) -> None:
    """Asserts that two trees are equal, bit for bit, however their arrays are sharded."""
    chex.assert_trees_all_equal(*map(jax.device_get, (first, second)))
