"""The tables of docs/subspace.md, and that of methods in docs/methods.md, say what memopt does."""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import memopt
from benchmarks import methods, parity
from benchmarks.report import read_results
from memopt.optimizers.registry import METHODS
from tests.optimizers import pairings

ROOT = Path(__file__).parents[2]


def tables(page):
    """Every table of a page: for each row {column: text}, the first column its name."""
    for block in re.findall(r"(?:^\|.*\n)+", (ROOT / page).read_text(), re.MULTILINE):
        head, _, *rows = (line.strip("|").split("|") for line in block.splitlines())
        names = [cell.strip(" `") for cell in head]
        yield [dict(zip(names, map(str.strip, row), strict=True)) for row in rows]


PICTURE, RULES, DEFAULTS, *_ = tables("docs/subspace.md")  # the others are measured
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

    for module in {inspect.getmodule(method.make) for method in METHODS.values()}:
        if hasattr(module, "in_subspace"):
            monkeypatch.setattr(module, "in_subspace", record)
    return seen


def test_the_table_of_pairings_is_complete():
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
    assert recombine.update.__qualname__.startswith(f"{rule}.")


@pytest.mark.parametrize("name", sorted(pairings.covering()))
def test_a_pairing_can_be_traced(name):
    """Each projector and each recombination with every inner optimizer, in turns."""
    projector, rule, inner = pairings.cells()[name]
    tree = {"up": {"kernel": jax.ShapeDtypeStruct((4, 8, 12), jnp.float32)}}
    tx = pairings.transformation(projector, rule, inner)
    state = jax.eval_shape(tx.init, tree)
    assert jax.eval_shape(tx.update, tree, state, tree) == (tree, state)


def test_documented_state_sizes_are_those_of_the_pairings():
    p, q, r = 5, 7, pairings.RANK
    for table, spaces in ((PICTURE, pairings.PROJECTORS), (RULES, pairings.RULES)):
        for row in table:
            name = re.match(r"`(\w+)", next(iter(row.values())))[1]
            keeps = eval(row["keeps"].replace("·", "*"), {"p": p, "r": r, "m": p, "n": q})
            assert keeps == spaces[name].keeps(1, p, q), name


def test_documented_defaults_are_those_of_the_methods(subspaces):
    for row in DEFAULTS:
        getattr(memopt, re.search(r"`(\w+)`", row["method"])[1])(1e-3)
        projector, _, every, on_refresh = subspaces.pop()
        assert row["refresh_every"] == ("–" if projector.moves else str(every))
        carries = isinstance(on_refresh, memopt.CarryOver)
        assert row["on_refresh"] == ("carry" if carries else on_refresh)


@pytest.mark.parametrize("name", memopt.available("memopt"))
def test_a_docstring_says_how_many_numbers_its_method_keeps(name):
    p, q = 8, 12
    formula = re.sub(r"(?<=\w)(?=[a-zρ])", "*", METHODS[name].state).replace("²", "**2")
    numbers = eval(formula, {"m": p, "n": q, "p": p, "q": q, "r": p // 4, "ρ": 0.25, "L": 1})
    tree = {"up": {"kernel": jax.ShapeDtypeStruct((p, q), jnp.float32)}}
    assert memopt.state_bytes(memopt.optimizer(name, 1e-3), tree)["up/kernel"] == 4 * numbers


@pytest.mark.parametrize("name", memopt.available("optax"))
def test_the_registry_says_how_many_numbers_optax_keeps(name):
    m, n = 200, 300
    numbers = eval(METHODS[name].state.replace("mn", "*m*n").lstrip("*"), {"m": m, "n": n})
    state = jax.eval_shape(METHODS[name].make(1.0).init, jax.ShapeDtypeStruct((m, n), jnp.float32))
    assert 0 <= sum(leaf.size for leaf in jax.tree.leaves(state)) - numbers < 30  # scalars


@pytest.mark.parametrize("name", memopt.available())
def test_a_method_says_when_to_choose_it_and_what_its_options_are(name):
    method = METHODS[name]
    assert 10 < len(method.when) <= 62
    assert method.help.keys() >= method.defaults.keys() - {"nesterov"}  # which optax.nadamw lacks


@pytest.mark.parametrize("name", memopt.available("memopt"))
def test_a_docstring_says_where_its_method_comes_from(name):
    assert re.fullmatch(r"\[\S.* \d{4}\]\(https://\S+\)", methods.source(name))


def test_recorded_runs_are_within_tolerance():
    results = read_results(parity.Options().output)
    assert max(r["error_over_tolerance"] for r in results) <= 1
