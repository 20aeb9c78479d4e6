"""Random bases and replayed ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt import projectors, recombine
from memopt.transforms.projectors import Leaf, When

LEAF = Leaf("blocks/up", (3, 64, 96), jnp.float32)
random = pytest.mark.parametrize("make", [projectors.gaussian, projectors.rademacher])


def basis(projector, leaf=LEAF, step=0, every=10):
    return projector.basis(leaf, None, When.at(jnp.asarray(step, jnp.int32), every))


@random
def test_entries_have_variance_one_over_r(make):
    p = np.asarray(basis(make(64), Leaf("w", (1000, 2000), jnp.float32)))
    assert p.shape == (1000, 64)
    assert abs(p.mean()) < 4 * (1 / 8) / np.sqrt(p.size)
    assert p.var() == pytest.approx(1 / 64, rel=0.03)
    np.testing.assert_allclose(np.corrcoef(p.T), np.eye(64), atol=0.16)


def test_rademacher_entries_are_signs():
    p = np.asarray(basis(projectors.rademacher(16)))
    assert set(np.unique(p)) == {-0.25, 0.25}


@random
def test_projection_keeps_lengths_on_average(make):
    g = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    ratios = [
        np.square(make(8, seed=seed).down(LEAF, basis(make(8, seed=seed)), g)).sum(-2)
        / np.square(g).sum(-2)
        for seed in range(100)
    ]
    np.testing.assert_allclose(np.mean(ratios), 1.0, atol=0.05)


@random
def test_a_basis_depends_on_seed_parameter_and_refresh_only(make):
    first = basis(make(4))
    np.testing.assert_array_equal(first, basis(make(4), step=9))
    for other in (
        basis(make(4), step=10),
        basis(make(4, seed=1)),
        basis(make(4), Leaf("blocks/down", LEAF.shape, jnp.float32)),
    ):
        assert np.abs(first - other).max() > 0.1
    layer = Leaf("blocks/2/up", LEAF.shape[1:], jnp.float32)
    np.testing.assert_array_equal(first, basis(make(4), layer))


@random
@pytest.mark.parametrize("stored", [False, True])
def test_stored_and_redrawn_are_the_same_numbers(make, stored):
    tx = memopt.in_subspace(
        optax.identity(), make(4, stored=stored), recombine.lift(), refresh_every=2
    )
    g = {"up": jnp.asarray(np.random.default_rng(1).normal(size=(3, 16, 24)), jnp.float32)}
    state = tx.init(g)
    lifted = []
    for _ in range(4):
        updates, state = jax.jit(tx.update)(g, state)
        lifted.append(updates["up"])
    np.testing.assert_array_equal(lifted[0], lifted[1])
    np.testing.assert_array_equal(lifted[2], lifted[3])
    assert np.abs(lifted[1] - lifted[2]).max() > 0.1
    p = make(4).basis(Leaf("up", (3, 16, 24), jnp.float32), None, When.first())
    np.testing.assert_allclose(lifted[0], p @ (p.T @ g["up"]), rtol=1e-4, atol=1e-5)
    kept = sum(x.size for x in jax.tree.leaves(state.projector))
    assert kept == (16 * 4 if stored else 0)


@pytest.mark.parametrize(
    ("side", "shape", "low"),
    [
        ("short", (16, 24), (4, 24)),
        ("short", (24, 16), (24, 4)),
        ("short", (16, 16), (4, 16)),
        ("long", (16, 24), (16, 4)),
        ("left", (24, 16), (4, 16)),
        ("right", (16, 24), (16, 4)),
    ],
)
def test_sides(side, shape, low):
    projector = projectors.gaussian(4, side=side)
    leaf = Leaf("w", shape, jnp.float32)
    p = basis(projector, leaf)
    r = projector.down(leaf, p, jnp.ones(shape))
    assert r.shape == low
    assert projector.up(leaf, p, r).shape == shape


def test_replay_reads_sides_off_the_shapes():
    r, m, n = 4, 16, 24
    side = lambda matrix, shape: projectors.replay({"w": {1: matrix}}).is_left(
        Leaf("w", shape, jnp.float32)
    )
    assert side(np.ones((m, r)), (m, n))
    assert not side(np.ones((r, n)), (m, n))
    assert side(np.ones((r, n)), (n, m))
    assert side(np.ones((m, r)), (m, m))
    assert not side(np.ones((r, m)), (m, m))


def test_replay_uses_each_matrix_from_its_step_on():
    steps = {1: np.eye(4)[:, :1], 3: np.eye(4)[:, 1:2]}
    tx = memopt.in_subspace(
        optax.identity(), projectors.replay({"w": steps}), recombine.lift(), refresh_every=1
    )
    g = {"w": jnp.ones((4, 6))}
    state, rows = tx.init(g), []
    for _ in range(4):
        updates, state = tx.update(g, state)
        rows.append(int(jnp.argmax(updates["w"][:, 0])))
    assert rows == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("matrices", "sentence"),
    [
        ({"v": {1: np.ones((4, 2))}}, "leaf 'w' is unknown; did you mean|leaf 'w' is unknown"),
        ({"w": {2: np.ones((4, 2))}}, "must begin at step 1, not 2"),
        ({"w": {1: np.ones((5, 2))}}, r"longer side should be 4 \(rows\) or 6 \(columns\)"),
    ],
)
def test_replay_errors(matrices, sentence):
    tx = memopt.in_subspace(optax.identity(), projectors.replay(matrices), recombine.lift())
    with pytest.raises(ValueError, match=sentence):
        tx.init({"w": jnp.ones((4, 6))})
