"""What tests of trainers share: the page's table of names, and comparing where two runs came to."""

from typing import Any

import chex
import jax

import memopt
from memopt.names import split_layer
from tests.clients.page import TRAINERS_PAGE
from tests.clients.test_recipes import braced

SOME = ("adafactor", "apollo_mini", "galore", "muon", "adamw_8bit")


def column(row: Any) -> str:
    """The column of the page's table in which a row of `memopt.describe` is."""
    if row.kind == "matrix":
        return "attention" if "att" in row.name else "other"
    if row.kind == "vector":
        return "norm" if "norm" in row.name.lower() or "ln_" in row.name else "bias"
    return "embedding" if row.kind == "position" else row.kind


def table_row(trainer: str, description: memopt.Description) -> str:
    """The row of the page's table that shows how a trainer names parameters."""
    found: dict[str, dict[str, None]] = {}
    for row in description.rows:
        found.setdefault(column(row), {})[split_layer(row.name)[0]] = None
    kinds = ("embedding", "head", "router", "attention", "other", "norm")
    return f"| {trainer} | {' | '.join(braced([*found.get(kind, {})]) for kind in kinds)} |"


def assert_on_the_page(trainer: str, tx: Any, params: Any) -> None:
    """Checks that the page's table says what `memopt.describe` says of a model of this trainer."""
    row = table_row(trainer, memopt.describe(tx, params))
    assert row in TRAINERS_PAGE, row


def assert_same(first: Any, second: Any) -> None:
    """Checks that two trees are equal, bit for bit, wherever their arrays are."""
    chex.assert_trees_all_equal(*map(jax.device_get, (first, second)))
