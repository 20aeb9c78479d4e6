"""Moments of several tasks, and what they are for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt.transforms.projectors.random import Rademacher


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_factored_moments_are_row_and_column_sums():
    """Against sums in numpy, with the signs that a step on ones shows."""
    tx = memopt.scale_by_task_moments(2, b1=0.5, b2=0.75, factored=True)
    ones = {"w": jnp.ones((2, 6, 4))}
    spec = memopt.projectors.MatrixSpec("w", (2, 6, 4), jnp.float32)
    signs = np.asarray(Rademacher(1).entries(spec.key(0, jnp.int32(0)), (6, 4)))
    state = tx.update(ones, tx.init(ones), task=0)[1]
    np.testing.assert_allclose(state.mu_rows["w"][0], 0.5 * np.tile(signs.sum(1), (2, 1)))
    g = {"w": draw(2, 6, 4)}
    updates, state = tx.update(g, tx.init(g), task=0)
    other, state = tx.update(g, state, task=1)
    square = 0.25 * np.square(g["w"])
    rows, cols = square.mean(2), square.mean(1)
    v = rows[:, :, None] * cols[:, None, :] / rows.mean(1)[:, None, None]
    np.testing.assert_allclose(updates["w"], g["w"] / np.sqrt(v), rtol=1e-5)
    np.testing.assert_allclose(other["w"], g["w"] / np.sqrt(2 * np.exp(-5) * v), rtol=1e-5)
    np.testing.assert_allclose(state.mu["w"][1], 0.5 * (signs * g["w"]).sum(1), rtol=1e-5)


@pytest.mark.parametrize("cosine", [-0.5, 0.0, 0.8])
def test_factored_cosines_are_near_the_true_ones(cosine):
    """Steps on a second task, whose gradients have this cosine with those of the first."""
    a, b = draw(8, 64, 96), draw(8, 64, 96, seed=1)
    second = cosine * a + (1 - cosine**2) ** 0.5 * b

    def step(factored):
        tx = memopt.scale_by_task_moments(2, 1.0, b2=0.0, factored=factored)
        state = tx.update(a, tx.init(a), task=0)[1]
        return jnp.sqrt(jnp.square(tx.update(second, state, task=1)[0]).mean((1, 2)))

    # The second moments of these matrices are flat: exp(−cos) is all that their sizes depend on.
    flat = lambda cosine: 1 / np.sqrt(np.exp(-1) + np.exp(-cosine))
    found = np.asarray(step(factored=True))
    assert np.all(found > 0.98 * flat(cosine - 0.3))
    assert np.all(found < 1.02 * flat(cosine + 0.3))
    assert abs(found.mean() / flat(cosine) - 1) < 0.05


@pytest.mark.parametrize("factored", [False, True])
def test_a_task_without_gradients_is_like_no_other(factored):
    """The cosine with a zero vector is 0, and counts for nothing beside zero moments."""
    tx = memopt.scale_by_task_moments(3, eps=0.0, factored=factored)
    zero, g = {"w": jnp.zeros((4, 6)), "b": jnp.zeros(3)}, {"w": draw(4, 6), "b": draw(3)}
    state = tx.update(zero, tx.init(zero), task=0)[1]
    alone = memopt.scale_by_task_moments(1, eps=0.0, factored=factored)
    expected, _ = alone.update(g, alone.init(g))
    u, _ = tx.update(g, state, task=1)
    half = lambda x: x * np.exp(-2.5)  # the weight of the current one among several tasks
    jax.tree.map(lambda a, b: np.testing.assert_allclose(half(a), b, rtol=1e-5), u, expected)


def test_the_task_is_one_of_those_there_are():
    tx, g = memopt.tag(1e-2, tasks=2), {"w": jnp.ones((4, 6))}
    state = tx.init(g)
    with pytest.raises(ValueError, match="task, the number of the current one of 2 tasks, must be"):
        tx.update(g, state, g)
    with pytest.raises(ValueError, match="task must be between 0 and 1, got 2"):
        tx.update(g, state, g, task=2)
    traced = jax.jit(lambda task: tx.update(g, state, g, task=task)[0]["w"])
    assert np.isfinite(traced(1)).all()
    assert np.isnan(traced(2)).all()
    with pytest.raises(ValueError, match="tasks must be at least 1, got 0"):
        memopt.tag(1e-2, tasks=0)
    with pytest.raises(ValueError, match="factored must be False with adam=True"):
        memopt.tag(1e-2, adam=True, factored=True)
    with pytest.raises(ValueError, match="seed must be left out, since nothing is drawn"):
        memopt.tag(1e-2, seed=1)


# Three tasks one after another: the same clusters, with the coordinates in three orders.
TASKS, CLASSES, WIDTH, STEPS = 3, 10, 24, 100


def data(seed):
    """Points and labels of three tasks, the rows of each batch, and a network."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=(TASKS, 400))
    points = rng.normal(size=(CLASSES, WIDTH))[labels] + 0.7 * rng.normal(size=(TASKS, 400, WIDTH))
    points = np.stack([x[:, rng.permutation(WIDTH)] for x in points])
    rows = rng.integers(400, size=(TASKS * STEPS, 16))
    sizes = {"in": (WIDTH, 64), "out": (64, CLASSES)}
    layer = lambda m, n: {"kernel": rng.normal(size=(m, n)) / m**0.5, "bias": np.zeros(n)}
    network = {name: layer(*size) for name, size in sizes.items()}
    batches = [points[t // STEPS, r] for t, r in enumerate(rows)]
    given = [labels[t // STEPS, r] for t, r in enumerate(rows)]
    return network, (np.stack(batches), np.stack(given)), (points, labels)


def output(params, x):
    hidden = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def accuracy(make, rate, network, batches, everything):
    """The accuracy on each task after learning one after another."""
    tx = optax.with_extra_args_support(make(rate))
    loss = lambda params, x, y: optax.softmax_cross_entropy_with_integer_labels(
        output(params, x), y
    ).mean()

    def step(carry, batch):
        params, state, t = carry
        updates, state = tx.update(jax.grad(loss)(params, *batch), state, params, task=t // STEPS)
        return (optax.apply_updates(params, updates), state, t + 1), None

    start = network, tx.init(network), jnp.int32(0)
    params = jax.lax.scan(step, start, batches)[0][0]
    points, labels = everything
    return (output(params, points).argmax(-1) == labels).mean(1)


def best(make):
    """The mean accuracy over tasks and two seeds, at the best of four learning rates."""
    rates = jnp.array([5e-4, 1e-3, 2e-3, 4e-3])
    both = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), data(0), data(1))
    to32 = lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x
    one = functools.partial(accuracy, make)
    grid = jax.vmap(jax.vmap(one, (None, 0, 0, 0)), (0, None, None, None))
    found = jax.jit(grid)(rates, *jax.tree.map(to32, both))
    return float(found.mean((1, 2)).max())


@pytest.mark.slow
def test_of_three_tasks_more_is_left_than_after_adam():
    """Adam 0.82; TAG 0.87, factored 0.89, with Adam's momentum 0.87.

    The momentum makes the difference between Adam and RMSprop, which is left with 0.88: TAG gains
    on Adam by what it is, and on RMSprop nothing here.
    """
    adam = best(optax.adam)
    for options in ({}, {"factored": True}, {"adam": True, "b2": 0.999}):
        found = best(functools.partial(memopt.tag, tasks=TASKS, **options))
        assert found > adam + 0.03
