"""Second moments that are carried to a new subspace keep the expected size of updates."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt import projectors, recombine
from memopt.transforms.linalg import lengths_of
from memopt.transforms.moments import carry_first_moment, carry_second_moment
from memopt.transforms.recombine import Subspace
from tests.optimizers.kinds import slow_unless

RANK = 8
MAKES = {
    "gaussian": projectors.gaussian(RANK),
    "rademacher": projectors.rademacher(RANK),
    "sparse": projectors.sparse(RANK),
    "gaussian of full rank": projectors.gaussian(1.0),
    "orthogonal": projectors.orthogonal(RANK),
    "svd": projectors.svd(RANK),
    "randomized_svd": projectors.randomized_svd(RANK),
    "power_iteration": projectors.power_iteration(RANK),
    "columns": projectors.columns(0.25),
    "coordinates": projectors.coordinates(0.25),
    "dct": projectors.dct(RANK),
    "haar": projectors.haar(0.25),
    "lazy_svd": projectors.lazy_svd(RANK),
    "coap": projectors.coap(RANK),
    "grassmann": projectors.grassmann(RANK),
}
QUICK = ("gaussian", "orthogonal", "columns")
QUICK_RUNS = [("gaussian", 50, ()), ("orthogonal", 50, (2,)), ("columns", 50, ())]


def change(projector, shape, seeds=(0, 1)):
    """The change from one subspace to another, each from a gradient of its own."""
    spec = projectors.MatrixSpec("w", shape, jnp.float32)
    clock = projectors.RefreshClock.first()
    draw = lambda seed: jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
    at = lambda seed: projector.basis(spec, draw(seed), clock._replace(refresh=jnp.int32(seed)))
    old, new = map(at, seeds)
    return Subspace(projector, spec, draw(1), new, None, None, lambda: old)


@pytest.mark.parametrize("shape", [(18, 31), (2, 31, 18)], ids=["alone", "stacked"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=slow_unless(name in QUICK)) for name in MAKES]
)
def test_equal_second_moments_stay_equal(name, shape):
    """Those of white gradients are the squared lengths of the basis vectors."""
    space = change(MAKES[name], shape)
    old, new = jnp.square(space.lengths()[0]), jnp.square(space.lengths()[1])
    ones = jnp.ones(space.projector.projected_shape(space.spec))
    if name in ("columns", "coordinates"):  # no line beyond the matrix has a second moment
        ones = space.projector.down(space.spec, space.previous_basis(), jnp.ones(shape))
    carried = carry_second_moment(space, ones * old, rule=memopt.CarryOver(), steps=jnp.int32(9))
    np.testing.assert_allclose(carried / new, jnp.ones_like(carried), atol=1e-5)


@pytest.mark.parametrize("name", ["svd", "power_iteration"])
def test_moments_in_the_same_subspace_are_unchanged(name):
    space = change(MAKES[name], (18, 31), seeds=(0, 0))
    m, v = (jnp.asarray(np.random.default_rng(i).normal(size=(RANK, 31))) for i in range(2))
    v = jnp.square(v) + jnp.square(m)
    rule = memopt.CarryOver(0.9, 0.999)
    np.testing.assert_allclose(
        carry_second_moment(space, v, m, rule=rule, steps=jnp.int32(9)), v, rtol=1e-3
    )
    np.testing.assert_allclose(carry_first_moment(space, m), m, atol=1e-4)


def test_a_momentum_beside_second_moments_does_not_grow():
    """Bases of any length and angle, drawn anew at each step."""
    space, m, sizes = change(MAKES["gaussian of full rank"], (24, 40)), jnp.ones((24, 40)), []
    draw = jax.random.normal(jax.random.key(0), (30, 24, 24))
    for old, new in itertools.pairwise(draw):
        at = dataclasses.replace(space, basis=new, previous_basis=lambda old=old: old)
        m = carry_first_moment(at, m)
        sizes.append(float(jnp.square(m / lengths_of(new).mT).sum()))
    assert np.mean(np.diff(np.log(sizes))) < -0.3


@pytest.mark.parametrize(
    ("name", "every", "stack"),
    [
        pytest.param(name, every, stack, marks=slow_unless((name, every, stack) in QUICK_RUNS))
        for name in MAKES
        for every in (50, 1)
        for stack in ((), (2,))
    ],
)
def test_updates_of_white_gradients_keep_their_size(name, every, stack):
    """The last 20 of each 50 steps; stacked, the gradients are bfloat16."""
    shape, dtype = (*stack, 32, 32), jnp.bfloat16 if stack else jnp.float32
    tx = memopt.in_subspace(
        optax.scale_by_adam(), MAKES[name], recombine.lift(), every, on_refresh="carry"
    )
    params = {"w": jnp.zeros(shape, dtype)}

    def step(state, key):
        updates, state = tx.update({"w": jax.random.normal(key, shape, dtype)}, state)
        return state, jnp.square(updates["w"].astype(jnp.float32)).mean((-2, -1))

    keys = jax.random.split(jax.random.key(0), 350)
    sizes = jax.jit(lambda keys: jax.lax.scan(step, tx.init(params), keys)[1])(keys)
    sizes = np.sqrt(sizes.reshape(7, 50, -1)[:, 30:].mean(1))
    np.testing.assert_allclose(sizes / sizes[0], 1.0, atol=0.4)


def test_second_moments_of_other_layers_are_not_carried():
    """A selection of layers has none for a layer that it selects anew."""
    options = (projectors.blocks(0.5), recombine.lift(), 2, "carry")
    g = {"w": jnp.ones((4, 8, 12))}
    memopt.in_subspace(optax.trace(0.9), *options).init(g)
    with pytest.raises(memopt.IncompatiblePairingError, match="no second moment 'nu' for a layer"):
        memopt.in_subspace(optax.scale_by_adam(), *options).init(g)
