"""Clipping of the largest fraction of all entries."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import memopt
from memopt.training.release.per_parameter_update import PerParameterUpdate
from memopt.transforms import selection as module
from memopt.transforms.selection import kth_magnitude


def draw(seed, dtype=jnp.float32):
    """Arrays of different sizes and scales, with ties, zeros and a scalar."""
    rng = np.random.default_rng(seed)
    wide = rng.normal(size=(2, 40, 16)) * np.array([1.0, 1e-3])[:, None, None]
    tree = {"layers": wide, "bias": rng.normal(size=17).round(1), "one": 0.25, "none": np.ones(0)}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree | {"zeros": np.zeros((8, 4))})


def magnitudes(tree):
    flat = np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
    return np.sort(np.abs(flat))[::-1]


def check_threshold(tree, fraction):
    tx = memopt.clip_by_fraction(fraction)
    found = jax.jit(lambda g: tx.update(g, tx.init(g))[0])(tree)
    sizes = magnitudes(tree)
    threshold = sizes[int(sizes.size * fraction)]
    expected = jax.tree.map(
        lambda x: jnp.clip(x, *(jnp.asarray(t, x.dtype) for t in (-threshold, threshold))), tree
    )
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize(
    ("dtype", "fraction"), [(jnp.float32, 0.0), (jnp.float32, 0.1), (jnp.bfloat16, 0.5)]
)
def test_the_threshold_is_the_entry_at_that_place(dtype, fraction):
    check_threshold(draw(0, dtype), fraction)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float64])
def test_the_threshold_is_exact_in_other_dtypes(dtype):
    with jax.enable_x64(True):
        check_threshold(draw(1, dtype), 0.25)
        check_threshold(draw(1, dtype) | {"other": jnp.ones(3, jnp.float32)}, 0.25)


def test_every_place_of_numbers_of_all_sizes_is_found():
    """Also of infinite ones and zero, which subnormal ones count as."""
    x = jnp.array([0.0, 1e-45, -2e-38, 1.0, 1.0000001, -3.4e38, jnp.inf])
    found = jax.jit(jax.vmap(lambda k: kth_magnitude([x], k)))(jnp.arange(1, 8))
    order = np.sort(np.abs(np.asarray(x)))[::-1]
    assert [float(value) for value in found] == [*order[:5].tolist(), 0.0, 0.0]


def test_counts_beyond_an_int32_are_kept_in_two_parts(monkeypatch):
    """Here beyond 4, in parts of 2 bits."""
    for name, value in {"_LARGE": 4, "_LOW": 2, "_MASK": 3}.items():
        monkeypatch.setattr(module, name, value)
    tree = draw(2)
    leaves, sizes = jax.tree.leaves(tree), magnitudes(tree)
    ranks = (4, 1299)
    found = jax.jit(lambda: [kth_magnitude(leaves, rank + 1) for rank in ranks])()
    assert [float(value) for value in found] == [np.float32(sizes[rank]) for rank in ranks]


def test_each_matrix_and_vector_has_a_threshold_of_its_own_if_asked():
    tree = draw(3)
    tx = memopt.clip_by_fraction(0.5, per="matrix")
    found = tx.update(tree, tx.init(tree))[0]
    for got, x in zip(
        [*found["layers"], found["bias"]], [*tree["layers"], tree["bias"]], strict=True
    ):
        assert np.abs(got).max() == magnitudes(x)[x.size // 2]
    assert not found["zeros"].any()


def test_nothing_is_clipped_if_fewer_entries_differ_from_zero():
    """Otherwise an embedding of which a batch reads few rows would never move."""
    g = jnp.zeros((10, 4)).at[3].set(2.0)
    for per in ("tree", "matrix"):
        tx = memopt.clip_by_fraction(0.5, per=per)
        np.testing.assert_array_equal(tx.update(g, tx.init(g))[0], g)


def test_a_fraction_outside_of_its_range_is_refused():
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"fraction must be at least 0.* got {wrong}"):
            memopt.clip_by_fraction(wrong)
    with pytest.raises(ValueError, match="per 'leaf' is unknown"):
        memopt.clip_by_fraction(0.1, per="leaf")


@pytest.mark.parametrize(
    "axis_type", [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit]
)
def test_on_a_mesh_only_counts_are_exchanged(axis_type):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(axis_type,))
    g = {"up": draw(4)["layers"], "down": draw(5)["layers"]}
    split = {"up": jax.P(None, "fsdp"), "down": jax.P(None, None, "fsdp")}
    tx = memopt.clip_by_fraction(0.1)
    clip = jax.jit(lambda g: tx.update(g, optax.EmptyState())[0])
    with jax.set_mesh(mesh):
        placed = jax.device_put(g, {n: NamedSharding(mesh, spec) for n, spec in split.items()})
        compiled = clip.lower(placed).compile()
        found = compiled(placed)
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(clip(g)))
    text = compiled.as_text()
    assert "all-reduce" in text
    assert not {"all-gather(", "all-to-all(", "collective-permute("} & set(text.split())
    assert "all-gather" not in text


def test_a_released_step_clips_matrices_and_refuses_the_tree():
    params = {"up": jnp.ones((3, 8, 4)), "norm": jnp.ones(4)}
    with pytest.raises(ValueError, match="gradients are never held together"):
        PerParameterUpdate(memopt.clip_by_fraction(0.1), params, [False, True])
    PerParameterUpdate(memopt.clip_by_fraction(0.1, per="matrix"), params, [False, True])


def test_first_moments_average_clipped_gradients_and_second_moments_all():
    clip = memopt.clip_by_fraction(0.5)
    both = memopt.clip_first_moment(optax.scale_by_adam(), clip)
    gradients = [{"layers": draw(seed)["layers"]} for seed in range(2)]
    update, clipped = jax.jit(both.update), jax.jit(lambda g: clip.update(g, None)[0])
    state, adam, m = both.init(gradients[0]), optax.scale_by_adam(), 0.0
    plain = adam.init(gradients[0])
    for t, g in enumerate(gradients, 1):
        updates, state = update(g, state)
        _, plain = adam.update(g, plain)
        m = 0.9 * m + 0.1 * clipped(g)["layers"]
        v = plain.nu["layers"]
        expected = (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(updates["layers"], expected, rtol=1e-4)
    chex.assert_trees_all_equal(state.inner.nu, plain.nu)


def test_clipped_first_moments_in_a_subspace_and_in_fewer_bits():
    g = {"up": {"kernel": jnp.ones((16, 8)).at[0].set(9.0)}}
    clipped = functools.partial(
        memopt.clip_first_moment, clip=memopt.clip_by_fraction(0.25, per="matrix")
    )
    inside = clipped(memopt.scale_by_uncorrected_adam())
    space = memopt.projectors.gaussian(4), memopt.recombine.lift()
    for tx in (
        memopt.in_subspace(inside, *space, on_refresh="carry"),
        memopt.quantize_state(clipped(optax.scale_by_adam()), min_size=0),
    ):
        updates, _ = jax.eval_shape(tx.update, g, tx.init(g))
        assert updates["up"]["kernel"].shape == (16, 8)
    wrong = clipped(memopt.quantize_state(optax.scale_by_adam(), min_size=0))
    with pytest.raises(ValueError, match="must keep a first moment in floats, got quantize_state"):
        jax.eval_shape(wrong.update, g, wrong.init(g))


def test_a_transformation_without_a_first_moment_is_refused():
    tx = memopt.clip_first_moment(optax.sgd(0.1), memopt.clip_by_fraction(0.1))
    with pytest.raises(ValueError, match="inner must keep a first moment in floats, got chain"):
        tx.update(draw(0), tx.init(draw(0)))
