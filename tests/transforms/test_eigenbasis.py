"""Optimizers in the eigenbases of a matrix's factors: which sides have one, and when they wait."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import memopt
from memopt import projectors
from memopt.planning import hlo
from memopt.transforms import eigenbasis

STACK = (2, 12, 8)
OPTIONS = {
    "both": {},
    "long side left out": {"max_side": 10},
    "shorter side": {"one_sided": True},
    "blocks": {"block_size": 5},
}


@functools.cache
def run():
    """Gradients, and for each of `OPTIONS` the updates and states, with no optimizer inside.

    The second matrix has no gradient in the first two steps, the first none at the second refresh.
    """
    g = np.random.default_rng(0).normal(size=(7, *STACK))
    g[:2, 1] = g[3, 0] = 0
    g = jnp.asarray(g, jnp.float32)

    def steps(g):
        def one(options):
            tx = memopt.in_eigenbasis(optax.identity(), refresh_every=3, **options)

            def step(state, g):
                updates, state = tx.update({"w": g}, state)
                return state, (updates["w"], state)

            return jax.lax.scan(step, tx.init({"w": g[0]}), g)[1]

        return {name: one(options) for name, options in OPTIONS.items()}

    return g, jax.jit(steps)(g)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_update_is_rotated_there_and_back(name):
    """After the step that chooses the bases."""
    g, found = run()
    updates, _ = found[name]
    expected = g.at[0].set(0).at[2, 1].set(0)
    np.testing.assert_allclose(updates, expected, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_bases_are_orthonormal_and_wait_for_a_gradient(name):
    _, found = run()
    _, state = found[name]
    blocks = [
        basis["w"]
        for basis in (state.left_basis, state.right_basis)
        if isinstance(basis["w"], jax.Array)
    ]
    assert len(blocks) == (1 if name in ("long side left out", "shorter side") else 2)
    for basis in blocks:
        assert not basis[:2, 1].any()
        squares = basis.mT @ basis
        identity = jnp.eye(basis.shape[-1])
        for chosen in (squares[:, 0], squares[2:, 1]):
            np.testing.assert_allclose(chosen, jnp.broadcast_to(identity, chosen.shape), atol=1e-5)
        np.testing.assert_array_equal(basis[1, 0], basis[2, 0])  # refreshed in steps 3 and 6 alone
        assert (basis[3, 0] != basis[2, 0]).any()


def test_factors_of_a_second_moment_are_permuted_as_it_is():
    spec = projectors.MatrixSpec("w", STACK, jnp.float32)
    sides = eigenbasis.sides_of(spec, block_size=6)
    assert sides.blocks == (2, 2)
    draw = np.random.default_rng(0)
    order = lambda *shape: jnp.asarray(draw.normal(size=shape).argsort(-1))
    orders = order(2, 2, 6), order(2, 2, 4)
    turn = eigenbasis._Turn(sides, (None, None), (None, None), orders)
    v = jnp.asarray(draw.normal(size=STACK))
    new = eigenbasis._permuted("nu", turn, v)
    assert (new != v).any()
    for i in range(2):
        for k in range(2):
            rows, cols = 6 * k + orders[0][i, k], 4 * k + orders[1][i, k]
            np.testing.assert_array_equal(new[i, 6 * k, 4 * k], v[i, rows[0], cols[0]])
    for field, axis in (("rows", -1), ("cols", -2)):
        np.testing.assert_allclose(
            eigenbasis._permuted(field, turn, v.mean(axis)), new.mean(axis), rtol=1e-5
        )


class OddState(NamedTuple):
    acc: Any


def test_what_cannot_work_is_refused_in_a_sentence():
    w = {"w": jnp.ones((22, 4))}
    with pytest.raises(ValueError, match=r"block_size must leave equal blocks .* 23 of 'w'"):
        memopt.in_eigenbasis(optax.identity(), block_size=10).init({"w": jnp.ones((23, 4))})
    with pytest.raises(ValueError, match=r"projector must be .*replay.* got Gaussian"):
        memopt.soap(1e-3, projector=projectors.gaussian(4))
    odd = optax.GradientTransformation(
        lambda params: OddState(jax.tree.map(jnp.zeros_like, params)), optax.identity().update
    )
    with pytest.raises(memopt.IncompatiblePairingError, match="know whether the field 'acc'"):
        memopt.in_eigenbasis(odd).init(w)
    recorded = projectors.replay({"w": {"1.Q0": np.eye(21), "1.Q1": np.eye(4)}})
    tx = memopt.soap(1e-3, projector=recorded)
    with pytest.raises(ValueError, match=r"basis '1.Q0' to replay for 'w' must be 22×22"):
        jax.eval_shape(tx.update, w, tx.init(w), w)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [8, 3, 4])
@pytest.mark.parametrize("axes", [(None, "a", "b"), ("b", None, "a"), ("b", "a", None)])
def test_no_matrix_is_gathered_on_a_device(layers, axes):
    """With a matrix or more for each of eight devices, and with fewer; at refreshes too."""
    m, n = 160, 128
    if axes[0] == "b" and layers % 4:
        layers = 12
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    place = NamedSharding(mesh, jax.P(*axes))
    params = {"up": jax.ShapeDtypeStruct((layers, m, n), jnp.float32, sharding=place)}
    tx = memopt.soap(1e-3)
    places = memopt.state_sharding(tx, params)
    shapes = jax.eval_shape(tx.init, {"up": params["up"].update(sharding=None)})
    assert all(
        math.prod(s.shard_shape(x.shape)) <= max(x.size // 8, 1)
        for x, s in zip(*map(jax.tree.leaves, (shapes, places)), strict=True)
    )
    state = jax.tree.map(lambda x, s: x.update(sharding=s), shapes, places)
    with jax.set_mesh(mesh):
        step = jax.jit(tx.update, out_shardings=({"up": place}, places))
        text = step.lower(params, state, params).compile().as_text()
    found = hlo.collectives(text, refresh=True)
    gathered = {c.largest for c in found if c.kind == "all-gather"}
    assert m * n not in gathered
    assert max(gathered, default=0) <= m * m  # a basis of one layer
    exchanged = [c.largest for c in found if c.kind in ("all-to-all", "collective-permute")]
    assert max(exchanged) <= layers * m * m // 8
