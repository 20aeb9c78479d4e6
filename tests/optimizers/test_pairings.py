"""Projectors with recombinations, a few; all, and the whole common suite, with ``-m slow``."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import memopt
from memopt import projectors, recombine
from tests.optimizers import pairings

LAYERS, STEPS = 4, 5
SHAPES = {"up": {"kernel": (LAYERS, 8, 12)}, "norm": {"scale": (LAYERS, 8)}}
SPECS = {"up": {"kernel": jax.P(None, "a", "b")}, "norm": {"scale": jax.P(None, "a")}}


def gradients() -> dict:
    """Gradients of every step, whose matrices have distinct singular values."""
    draw = np.random.default_rng(0)
    tree = jax.tree.map(
        lambda s: draw.normal(size=(STEPS, *s)), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )
    u, _, v = np.linalg.svd(tree["up"]["kernel"], full_matrices=False)
    tree["up"]["kernel"] = (u * 2.0 ** -np.arange(8)) @ v
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def run(tx, gradients):
    """Every step's updates, and the last state."""

    @jax.jit
    def steps(gradients):
        zeros = jax.tree.map(lambda g: jnp.zeros_like(g[0]), gradients)
        step = lambda state, g: tx.update(g, state, zeros)[::-1]
        state, updates = jax.lax.scan(step, tx.init(zeros), gradients)
        return updates, state

    return steps(gradients)


def close(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * max(1e-2, np.abs(b).max()))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if i % 16 else [])
        for i, name in enumerate(sorted(pairings.covering()))
    ],
)
def test_a_pairing_works(name):
    space, rule, inner = pairings.cells()[name]
    tx = pairings.transformation(space, rule, inner)
    stacked, state = run(tx, gradients())

    assert any(jnp.abs(u).max() > 1e-3 for u in jax.tree.leaves(stacked))
    shape = SHAPES["up"]["kernel"]
    numbers = inner.matrix(*space.low(*shape)) + space.keeps(*shape) + rule.keeps(*shape)
    params = jax.tree.map(lambda g: g[0], gradients())
    assert memopt.state_bytes(tx, params)["up/kernel"] == 4 * numbers

    narrow = jax.eval_shape(lambda: jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    before = jax.eval_shape(tx.init, narrow)
    updates, after = jax.eval_shape(tx.update, narrow, before, narrow)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, narrow)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    if inner is not pairings.INNERS["lion"]:
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)

    layers = lambda i: jax.tree.map(lambda g: g[:, i], gradients())
    separate, _ = run(tx, {str(i): layers(i) for i in range(LAYERS)})
    for i in range(LAYERS):
        close(separate[str(i)], jax.tree.map(lambda u, i=i: u[:, i], stacked))

    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        spread = jax.tree.map(lambda s: NamedSharding(mesh, jax.P(None, *s)), SPECS)
        sharded, _ = run(tx, jax.device_put(gradients(), spread))
    close(sharded, stacked)


@pytest.mark.parametrize("pair", sorted(pairings.SENSELESS), ids="-".join)
def test_incompatible_pairings_are_refused_when_built(pair):
    projector, rule = pair
    space = pairings.PROJECTORS[projector]
    with pytest.raises(memopt.IncompatiblePairingError, match=f"^{rule} needs"):
        pairings.transformation(space, pairings.RULES[rule], pairings.INNERS["adam"])


@pytest.mark.parametrize(
    ("projector", "on_refresh", "sentence"),
    [
        (projectors.blocks(0.5), "keep", "hand the moments of one layer to the next"),
        (projectors.online_pca(4), "reset", "on_refresh must be 'keep', got 'reset'"),
        (projectors.online_pca(4), memopt.CarryOver(), "on_refresh must be 'keep'"),
    ],
)
def test_incompatible_refreshes_are_refused(projector, on_refresh, sentence):
    with pytest.raises(memopt.IncompatiblePairingError, match=sentence):
        memopt.in_subspace(
            optax.scale_by_adam(), projector, recombine.lift(), on_refresh=on_refresh
        )


def test_every_projector_and_recombination_is_in_the_table():
    """Every public projector and recombination stands in it."""
    public = lambda module: {
        name
        for name, f in vars(module).items()
        if name[0].islower() and getattr(f, "__module__", "").startswith(module.__name__)
    }
    assert public(projectors) - {"by_name", "replay"} == set(pairings.PROJECTORS)
    assert public(recombine) - {"norm"} == set(pairings.RULES)
    pairs = {tuple(name.split("-")[:2]) for name in pairings.covering()}
    every = set(itertools.product(pairings.PROJECTORS, pairings.RULES))
    assert pairs == every - pairings.SENSELESS


@pytest.mark.parametrize("name", ["galore", "apollo", "muon", "frugal", "ldadam"])
def test_explicit_axes_need_no_mesh_set(name):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    rows = NamedSharding(mesh, jax.P("a", "b"))
    apart = np.random.default_rng(0).normal(size=(16, 24)) * 1.3 ** -np.arange(24)
    tx, alone = memopt.optimizer(name, 1e-2), {"up": jnp.asarray(apart, jnp.float32)}
    placed = jax.device_put(alone, rows)
    step = lambda params: jax.jit(tx.update)(params, tx.init(params), params)[0]["up"]
    sharded = step(placed)
    assert jax.typeof(sharded).sharding.spec == rows.spec
    np.testing.assert_allclose(sharded, step(alone), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["apollo", "galore", "adafactor"])
def test_heads_may_be_split_over_explicit_axes(name):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    draw = np.random.default_rng(0)
    plain = {n: draw.normal(size=s).astype("f4") for n, s in SHAPES_OF_HEADS.items()}
    specs = {"q": jax.P(None, "x"), "o": jax.P(None, "y")}
    params = {n: jax.device_put(w, NamedSharding(mesh, specs[n])) for n, w in plain.items()}
    tx = memopt.optimizer(name, 1e-2)
    updates, _ = jax.jit(tx.update)(params, memopt.init_sharded(tx, params), params)
    expected, _ = tx.update(plain, tx.init(plain), plain)
    for n in plain:
        assert jax.typeof(updates[n]).sharding == jax.typeof(params[n]).sharding
        np.testing.assert_allclose(updates[n], expected[n], atol=1e-6)


SHAPES_OF_HEADS = {"q": (8, 4, 16), "o": (4, 16, 8)}
