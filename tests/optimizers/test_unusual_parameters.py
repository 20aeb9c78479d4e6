"""Scalars, arrays of no elements, complex numbers, 64 bits, and numbers too large to be squared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from benchmarks.extra_arguments import with_extra_arguments
from memopt.state.precision import bounded, bounded_squares, in_float32, largest_squared

METHODS = memopt.available("memopt")
SHAPES = {
    **{"up": (8, 4), "layers": (2, 16, 12), "norm": (5,), "scale": (), "one": (1,)},
    **{"nothing": (0,), "no_rows": (0, 4), "no_cols": (2, 4, 0), "no_layers": (0, 8, 4)},
}
TRANSFORMS = {
    "cautious": lambda: memopt.cautious(memopt.lion(0.1)),
    "cautious_decay": lambda: memopt.cautious_decay(memopt.lion(0.1), 0.1, 0.1),
    "clip_by_gradient_norm": functools.partial(memopt.clip_by_gradient_norm, 1.0, previous=True),
    "clip_by_matrix_rms": memopt.clip_by_matrix_rms,
    "clip_by_step": memopt.clip_by_step,
    "hyperball": lambda: memopt.hyperball(memopt.lion(0.1), 0.1),
    "limit_norm_growth": memopt.limit_norm_growth,
    "normalize_by_group": memopt.normalize_by_group,
    "orthogonalize": memopt.orthogonalize,
    "scale_by_factored_matrix_rms": memopt.scale_by_factored_matrix_rms,
    "scale_by_matrix_sm3": memopt.scale_by_matrix_sm3,
    "scale_by_matrix_trust_ratio": memopt.scale_by_matrix_trust_ratio,
    "scale_by_parameter_rms": memopt.scale_by_parameter_rms,
    "scale_by_past_norms": memopt.scale_by_past_norms,
    "scale_by_past_rms": memopt.scale_by_past_rms,
    "scale_by_raw_amsgrad": memopt.scale_by_raw_amsgrad,
    "scale_by_uncorrected_adam": memopt.scale_by_uncorrected_adam,
}
CODECS = ("int8", "int4", "float8", "bfloat16")


def shapes(dtype):
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in SHAPES.items()}


def trace(tx, params):
    """Traces two steps under scan; the state's types and the updates' must not change."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        assert {k: u.dtype for k, u in updates.items()} == {k: p.dtype for k, p in params.items()}
        return (params, state), None

    run = lambda p: jax.lax.scan(step, (p, tx.init(p)), None, length=2)[0]
    with jax.numpy_rank_promotion("raise"):
        return jax.eval_shape(run, params)[1]


def check_types(make):
    make = with_extra_arguments(make)
    trace(make(), shapes("float32"))
    with jax.enable_x64(True):
        for dtype in ("float32", "bfloat16", "float64"):
            trace(make(), shapes(dtype))


@pytest.mark.parametrize("name", METHODS)
def test_methods_take_any_shape_and_real_dtype_with_64_bits_or_without(name):
    check_types(functools.partial(memopt.optimizer, name, 1e-2))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_released_methods_take_any_shape_and_real_dtype(name):
    check_types(functools.partial(memopt.optimizer, name, 1e-2, as_released=True))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_take_any_shape_and_real_dtype(name):
    check_types(TRANSFORMS[name])


@pytest.mark.parametrize("codec", CODECS)
def test_a_single_number_and_an_array_of_no_elements_are_not_quantised(codec):
    state = trace(memopt.quantize_state(memopt.apollo(1e-2), codec, min_size=0), shapes("float32"))
    kept = jax.tree_util.tree_leaves_with_path(state.codes)
    coded = {path[-1].key for path, x in kept if x.dtype not in (jnp.float32, jnp.int32)}
    assert coded == {"up", "layers", "norm"}


@pytest.mark.parametrize("name", sorted(set(TRANSFORMS) - {"clip_by_gradient_norm"}))
def test_a_scalar_is_a_vector_of_one_number(name):
    tx = TRANSFORMS[name]()

    @functools.partial(jax.jit, static_argnums=0)
    def run(shape):
        params, gradients = jnp.full(shape, 3.0), (jnp.full(shape, x) for x in (2.0, -40.0))
        state, updates = tx.init(params), []
        for g in gradients:
            u, state = tx.update(g, state, params)
            updates.append(u.reshape(()))
        return updates

    assert run(()) == run((1,))


def test_an_empty_array_is_a_vector_whatever_matrices_says():
    seen = []
    note = lambda layout, x: seen.append((x.shape, layout.is_matrix))
    both = {"a": jnp.ones((4, 0)), "b": jnp.ones((4, 1))}
    memopt.matrices.map_matrices(note, both, matrices=lambda name, p: memopt.Matrix())
    assert seen == [((4, 0), False), ((4, 1), True)]


@pytest.mark.parametrize("name", ["columns", "blocks", "sparse", "rademacher", "gaussian"])
def test_draws_promote_no_ranks_and_do_not_depend_on_64_bits(name):
    projector = getattr(memopt.projectors, name)(0.25)
    spec = memopt.projectors.MatrixSpec("w", (8, 8, 8), jnp.float32)
    draw = lambda: projector.basis(spec, None, memopt.projectors.RefreshClock.first())
    narrow = draw()
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        np.testing.assert_allclose(narrow, draw(), rtol=1e-6)


def test_complex_parameters_are_refused_by_name_where_they_would_be_wrong():
    params = {"w": jnp.ones((8, 4), complex), "b": jnp.ones(4, complex)}
    right = {"lion", "lomo", "clip_by_gradient_norm"}
    makers = {name: functools.partial(memopt.optimizer, name, 1e-2) for name in METHODS}
    makers |= TRANSFORMS | {"in_subspace": lambda: memopt.galore(1e-2, projector="gaussian")}
    for name in makers.keys() - right:
        with pytest.raises(ValueError, match=r"params must be real, got '[wb]' of dtype complex64"):
            makers[name]().init(params)
    with pytest.raises(ValueError, match="params must be real, got 'b' of dtype complex64"):
        memopt.quantize_params(params)
    for name in right:
        makers[name]().init(params)


def test_transforms_that_take_complex_numbers_are_right():
    g = {"w": jnp.array([[3 + 4j, -4 + 3j]])}
    clip, lion = memopt.clip_by_gradient_norm(50**0.5 / 2), memopt.scale_by_sign_momentum()
    np.testing.assert_allclose(clip.update(g, clip.init(g))[0]["w"], g["w"] / 2, rtol=1e-6)
    np.testing.assert_allclose(lion.update(g, lion.init(g))[0]["w"], g["w"] / 5, rtol=1e-6)


def test_complex_parameters_train_as_their_real_and_imaginary_parts():
    target = jax.random.normal(jax.random.key(0), (8, 6), complex)
    loss = lambda w: jnp.square(jnp.abs(w - target)).sum()
    tx = optax.contrib.split_real_and_imaginary(memopt.adafactor(0.05))

    def step(carry, _):
        w, state = carry
        u, state = tx.update(jax.grad(loss)(w).conj(), state, w)
        return (w + u, state), None

    w = jnp.zeros_like(target)
    (w, _), _ = jax.jit(lambda: jax.lax.scan(step, (w, tx.init(w)), None, length=300))()
    assert loss(w) < 1e-3 * loss(jnp.zeros_like(target))


def test_a_previous_gradient_norm_is_kept_in_float32():
    tx = memopt.clip_by_gradient_norm(1.0, previous=True)
    with jax.enable_x64(True):
        g = {"w": jnp.full(2, 3e3, jnp.float64)}
        state = tx.update(g, tx.init(g))[1]
    assert state.norm.dtype == jnp.float32
    assert float(state.norm) == pytest.approx(3e3 * 2**0.5)


def test_bounds_leave_what_can_be_squared_and_what_is_not_a_number():
    x = jnp.array([1e15, -1e15, 2e-38, jnp.nan])
    np.testing.assert_array_equal(bounded(x), x)
    most = largest_squared(jnp.float32)
    assert bounded(jnp.array([3e38, -jnp.inf], jnp.bfloat16)).tolist() == [most, -most]
    assert float(bounded_squares(jnp.float32(jnp.inf), 4)) == 4 * most**2
    assert np.isfinite(bounded_squares(jnp.float32(jnp.inf), 2**40))
    with jax.enable_x64(True):
        assert float(bounded(jnp.float64(1e20))) == 1e20


def test_sums_of_squares_show_where_a_gradient_was_not_a_number():
    g = jnp.ones((64, 384)).at[5, 7].set(jnp.nan)  # XLA for CPUs loses it in a plain maximum
    tx = memopt.scale_by_matrix_sm3()
    state = tx.update(g, tx.init(g))[1]
    assert np.flatnonzero(np.isinf(state.rows)).tolist() == [5]
    assert np.flatnonzero(np.isinf(state.cols)).tolist() == [7]


LARGE = {
    "clip_by_matrix_rms": memopt.clip_by_matrix_rms,
    "factored": memopt.scale_by_factored_matrix_rms,
    "global_norm": lambda: memopt.clip_by_gradient_norm(1.0),
    "growth": memopt.limit_norm_growth,
    "orthogonalize": memopt.orthogonalize,
    "rest": lambda: in_float32(optax.scale_by_adam()),
    "uncorrected_adam": memopt.scale_by_uncorrected_adam,
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("large", [1e20, 3e38])
def test_a_large_entry_leaves_a_usual_update_and_a_finite_state(name, large):
    tx = LARGE[name]()
    usual = jax.random.normal(jax.random.key(0), (6, 4))

    @jax.jit
    def run(g):
        state = tx.update(usual, tx.init(usual))[1]
        updates, state = tx.update(g, state)
        return updates, tx.update(usual, state)

    updates, (later, state) = run(usual.at[1, 2].set(large))
    arrays = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(np.isfinite(x).all() for x in [updates, later, *arrays])
    assert 0 < np.abs(updates[1, 2]) <= 32  # Adam without bias correction: 1 / √(1 − β₂)
    assert name == "factored" or np.abs(updates).max() <= 32


def outlier_run(name, large, **options):
    """The largest update at the outlier of layer 0, and the final parameters and state."""
    tx = with_extra_arguments(memopt.optimizer)(name, 0.02, **options)
    goal = {
        "layers": jax.random.normal(jax.random.key(0), (2, 12, 16)),
        "norm": jax.random.normal(jax.random.key(1), (8,)),
    }

    def step(carry, t):
        params, state = carry
        g = jax.tree.map(jnp.subtract, params, goal)
        hit = {"layers": g["layers"].at[0, 1, 1].set(large), "norm": g["norm"].at[2].set(large)}
        g = jax.tree.map(lambda a, b: jnp.where(t == 12, a, b), hit, g)
        u, state = tx.update(g, state, params)
        return (optax.apply_updates(params, u), state), jnp.abs(u["layers"]).max((1, 2))

    start = jax.tree.map(jnp.zeros_like, goal)
    run = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), jnp.arange(40)))
    (params, state), sizes = run()
    return params, state, sizes


def check_outlier(name, large, **options):
    params, state, sizes = outlier_run(name, large, **options)
    arrays = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(np.isfinite(x).all() for x in [*jax.tree.leaves(params), *arrays])
    assert sizes[12:, 0].max() <= 5 * sizes[:12].max()  # no explosion
    assert sizes[30:, 0].min() > 0  # no matrix stands still
    usual = outlier_run(name, 1.0, **options)[0]
    np.testing.assert_allclose(params["layers"][1], usual["layers"][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adafactor", "apollo", "galore", "muon"])
def test_a_matrix_survives_one_large_entry(name):
    check_outlier(name, 1e20, **({"rank": 4} if name in ("apollo", "galore") else {}))


@pytest.mark.slow
@pytest.mark.parametrize("large", [1e20, 1e37])
@pytest.mark.parametrize("as_released", [False, True])
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"lomo", "lion", "mkor", "oasis"}))
def test_every_method_with_squares_survives_one_large_entry(name, as_released, large):
    check_outlier(name, large, as_released=as_released)
