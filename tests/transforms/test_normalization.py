"""Updates normalised by neuron, by rows and columns, and by their averages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt

HEADS = memopt.Matrix(rows=0, cols=(1, 2))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def once(tx, g):
    return jax.jit(lambda g: tx.update(g, tx.init(g), g)[0])(g)


def rms(x, axis=None):
    return np.sqrt(np.square(np.asarray(x, np.float64)).mean(axis))


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("norm", ["rms", "l2"])
def test_neurons_have_norm_one_and_their_scale_has_no_effect(axis, norm):
    g = draw(3, 24, 16)
    tx = memopt.normalize_neurons(axis, norm)
    u = once(tx, g)
    size = g.shape[axis] if norm == "l2" else 1
    np.testing.assert_allclose(rms(u, axis) * np.sqrt(size), 1, rtol=1e-5)
    scales = jnp.abs(draw(3, 1, 16) if axis == -2 else draw(3, 24, 1)) + 0.1
    np.testing.assert_allclose(once(tx, g * scales), u, rtol=1e-5)


def test_a_neuron_without_a_gradient_stays_and_a_vector_is_one_neuron():
    g = {"w": draw(8, 4).at[:, 1].set(0.0), "b": jnp.array([3.0, -4.0])}
    u = once(memopt.normalize_neurons(norm="l2"), g)
    assert not u["w"][:, 1].any()
    assert np.isfinite(u["w"]).all()
    np.testing.assert_allclose(u["b"], [0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        memopt.normalize_neurons,
        memopt.sinkhorn,
        memopt.scale_by_rows_and_columns,
        memopt.scale_by_neuron_rms,
    ],
)
def test_axes_of_heads_count_together(make):
    g = draw(12, 4, 6)
    heads = {"matrices": lambda name, leaf: HEADS}
    flat = once(make(), g.reshape(12, 24))
    np.testing.assert_allclose(once(make(**heads), g), flat.reshape(g.shape), atol=1e-6)


def test_rows_and_columns_end_with_one_norm_whatever_scales_them():
    g, tx = draw(64, 48), memopt.sinkhorn()
    u = once(tx, g)
    np.testing.assert_allclose(rms(u, 0), 1, rtol=1e-5)
    np.testing.assert_allclose(rms(u, 1), 1, rtol=1e-4)
    rows, columns = jnp.exp(draw(64, 1, seed=1)), jnp.exp(draw(1, 48, seed=2))
    np.testing.assert_allclose(once(memopt.sinkhorn(20), rows * g * columns), u, atol=1e-3)
    np.testing.assert_allclose(once(memopt.sinkhorn(1), jnp.sign(g)), jnp.sign(g), rtol=1e-6)


def test_zeros_stay_zeros():
    g = jnp.stack([draw(6, 4).at[2].set(0.0).at[:, 1].set(0.0), jnp.zeros((6, 4))])
    for make in (memopt.sinkhorn, memopt.scale_by_rows_and_columns, memopt.scale_by_neuron_rms):
        u = np.asarray(once(make(), g))
        assert np.isfinite(u).all()
        assert not u[1].any()
        assert not u[0, 2].any()
        assert u[0, 0].any()


def test_factors_approach_the_largest_singular_vectors_of_the_squares():
    with jax.enable_x64(True):
        g = jnp.asarray(np.random.default_rng(0).normal(size=(7, 5)))
        u, s, v = np.linalg.svd(np.square(g))
        closest = s[0] * np.outer(u[:, 0], v[0])
        tx = memopt.scale_by_rows_and_columns(decay=0.0, iterations=40)
        np.testing.assert_allclose(once(tx, g), g / np.sqrt(closest), rtol=1e-10)


def test_normuon_has_steps_of_one_size():
    params = {"w": draw(24, 16)}
    tx = memopt.normuon(1.0, b2=0.0)
    u = once(tx, {"w": draw(24, 16, seed=1)})["w"]
    np.testing.assert_allclose(rms(u, 0), 0.2, rtol=1e-4)
    tx = memopt.normuon(1.0)
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(3):
        u, state = update({"w": 10.0**t * draw(24, 16, seed=t)}, state, params)
        assert rms(u["w"]) == pytest.approx(0.2, rel=1e-5)
    assert not once(tx, {"w": jnp.zeros((24, 16))})["w"].any()


def test_rmnp_without_momentum_is_scale_and_of_orthogonal_neurons_is_muon():
    g = {"w": draw(24, 16)}
    found = once(memopt.rmnp(1.0, beta=0.0), g)["w"]
    np.testing.assert_allclose(found, once(memopt.scale(1.0), g)["w"] / np.sqrt(24), rtol=1e-5)
    q = jnp.linalg.qr(g["w"])[0]
    apart = {"w": q * jnp.linspace(0.1, 2.0, 16)}
    exact = [(1.5, -0.5, 0.0)] * 30
    muon = once(memopt.muon(1.0, ns_coeffs=exact, nesterov=False), apart)["w"]
    np.testing.assert_allclose(once(memopt.rmnp(1.0), apart)["w"], muon, atol=1e-5)


def test_scale_has_a_momentum_for_the_head_and_normalises_the_embedding_over_its_tokens():
    params = {"embed": {"embedding": draw(32, 8)}, "up": {"kernel": draw(8, 16)}}
    params |= {"lm_head": {"kernel": draw(8, 32)}, "norm": {"scale": draw(8)}}
    tx = memopt.scale(1.0)
    state, update = tx.init(params), jax.jit(tx.update)
    first = jax.tree.map(lambda p: draw(*p.shape, seed=1), params)
    then = jax.tree.map(lambda p: draw(*p.shape, seed=2), params)
    _, state = update(first, state, params)
    u, _ = update(then, state, params)
    unit = lambda x: x / rms(x, 0)
    expected = then["embed"]["embedding"], then["up"]["kernel"]
    found = u["embed"]["embedding"], u["up"]["kernel"]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, -unit(b), rtol=1e-5)
    head = 0.9 * 0.1 * first["lm_head"]["kernel"] + 0.1 * then["lm_head"]["kernel"]
    np.testing.assert_allclose(u["lm_head"]["kernel"], -unit(head), rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: memopt.normalize_neurons(0), "axis 0 is unknown"),
        (lambda: memopt.normalize_neurons(norm="max"), "norm 'max' is unknown"),
        (lambda: memopt.sinkhorn(0), "iterations must be at least 1, got 0"),
        (lambda: memopt.racs(1e-3, scale=-1.0), "scale must be at least 0"),
        (lambda: memopt.rmnp(1e-3, shape_scale="kimi"), "shape_scale 'kimi' is unknown"),
        (lambda: memopt.rmnp(1e-3, nesterov=True, as_released=True), "nesterov must be left out"),
        (lambda: memopt.normuon(1e-3, consistent_rms=-0.2), "consistent_rms must be at least 0"),
    ],
)
def test_bad_options_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_scale_normalises_embedding_and_head_of_models_with_outputs_first():
    params = {
        "embedding": {"weight": jnp.ones((12, 8))},
        "up": {"weight": jnp.ones((24, 8))},
        "unembed": {"weight": jnp.ones((12, 8))},
    }
    tx = memopt.scale(1e-3, matrices=memopt.out_in)
    assert memopt.state_bytes(tx, params).states == {
        "embedding/weight": 0,
        "unembed/weight": 4 * 12 * 8,
        "up/weight": 0,
    }
