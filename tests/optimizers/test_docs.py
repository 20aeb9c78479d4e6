"""The tables of docs/subspace.md say what memopt does."""

import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import memopt
from tests.optimizers import pairings

PAGE = Path(__file__).parents[2] / "docs" / "subspace.md"
METHODS = ("apollo", "flora", "frugal", "galore", "fira", "ldadam")  # files with an in_subspace


def tables():
    """Every table of the page: for each row {column: text}, the first column its name."""
    for block in re.findall(r"(?:^\|.*\n)+", PAGE.read_text(), re.MULTILINE):
        head, _, *rows = (line.strip("|").split("|") for line in block.splitlines())
        names = [cell.strip(" `") for cell in head]
        yield [dict(zip(names, map(str.strip, row), strict=True)) for row in rows]


PICTURE, RULES, DEFAULTS = tables()
CELLS = {
    (row["projector"].strip("`"), rule): row[rule] for row in PICTURE for rule in list(row)[3:]
}
PUBLISHED = [
    pytest.param(*cell, *found, id=f"{'-'.join(cell)}-{found[1]}")
    for cell, text in CELLS.items()
    for found in re.findall(r"(\*\*)?`(\w+)(?:\((.*?)\))?`", text)
]


@pytest.fixture
def subspaces(monkeypatch):
    """The arguments of every in_subspace that a method builds."""
    seen = []

    def record(inner, projector, recombine, refresh_every=200, on_refresh="keep", **options):
        seen.append((projector, recombine, refresh_every, on_refresh))
        return memopt.in_subspace(*(inner, *seen[-1]), **options)

    for name in METHODS:
        module = importlib.import_module(f"memopt.optimizers.{name}")
        monkeypatch.setattr(module, "in_subspace", record)
    return seen


def test_the_picture_is_whole():
    assert set(CELLS) == {(p, r) for p in pairings.PROJECTORS for r in pairings.RULES}
    assert {cell for cell, text in CELLS.items() if text == "✗"} == pairings.SENSELESS
    named = {param.values[3] for param in PUBLISHED}
    assert named == {re.search(r"`(\w+)`", row["method"])[1] for row in DEFAULTS}
    marks = re.sub(r"(\*\*)?`\w+(\(.*?\))?`(\*\*)?", "", " ".join(CELLS.values()))
    assert set(marks) <= {" ", "✗"}


@pytest.mark.parametrize(("projector", "rule", "is_default", "method", "options"), PUBLISHED)
def test_a_published_cell_is_that_method(projector, rule, is_default, method, options, subspaces):
    options = eval(f"dict({options})")
    if not is_default:
        options["projector"] = projector
    getattr(memopt, method)(1e-3, **options)
    [(found, recombine, *_)] = subspaces
    assert type(found) is type(pairings.PROJECTORS[projector].make())
    assert type(recombine) is type(pairings.RULES[rule].make())


@pytest.mark.parametrize("cell", [c for c, text in CELLS.items() if text != "✗"], ids="-".join)
def test_a_cell_runs(cell):
    projector, rule = (pairings.PROJECTORS[cell[0]], pairings.RULES[cell[1]])
    tree = {"up": {"kernel": jax.ShapeDtypeStruct((4, 8, 12), jnp.float32)}}
    for inner in pairings.INNERS.values():
        tx = pairings.transformation(projector, rule, inner)
        state = jax.eval_shape(tx.init, tree)
        assert jax.eval_shape(tx.update, tree, state, tree) == (tree, state)


def test_what_is_kept():
    p, q, r = 5, 7, pairings.RANK
    for table, spaces in ((PICTURE, pairings.PROJECTORS), (RULES, pairings.RULES)):
        for row in table:
            name = re.match(r"`(\w+)", next(iter(row.values())))[1]
            keeps = eval(row["keeps"].replace("·", "*"), {"p": p, "r": r, "m": p, "n": q})
            assert keeps == spaces[name].keeps(1, p, q), name


def test_the_defaults(subspaces):
    for row in DEFAULTS:
        getattr(memopt, re.search(r"`(\w+)`", row["method"])[1])(1e-3)
        projector, _, every, on_refresh = subspaces.pop()
        assert row["refresh_every"] == ("–" if projector.moves else str(every))
        carries = isinstance(on_refresh, memopt.CarryOver)
        assert row["on_refresh"] == ("carry" if carries else on_refresh)
