"""Accumulated gradients: once a cycle, exact or unbiased, and nothing in between."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import memopt
from memopt import accumulate, accumulate_in_subspace, projectors
from tests.optimizers.kinds import slow_unless
from tests.optimizers.test_common import LAYERS, close, draw, run

EVERY, RANK, MICRO_STEPS = 3, 4, 8  # two cycles and two micro-steps of a third

WRAPPERS = {
    "exact": lambda inner, every=EVERY: accumulate(inner, every),
    "subspace": lambda inner, every=EVERY: accumulate_in_subspace(inner, every, RANK),
}
SHAPES = {
    "embed": {"embedding": (64, 16)},
    "blocks": {"up": {"kernel": (LAYERS, 16, 32)}, "norm": {"scale": (LAYERS, 16)}},
}
SPECS = {
    "embed": {"embedding": jax.P("a", "b")},
    "blocks": {"up": {"kernel": jax.P(None, "a", "b")}, "norm": {"scale": jax.P(None, "b")}},
}
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)
tree = functools.partial(draw, SHAPES)


def wrap(wrapper, every=EVERY):
    return WRAPPERS[wrapper](memopt.adafactor(1e-2), every)


@functools.cache
def plain(wrapper):
    """The run that most tests compare with."""
    return run(wrap(wrapper), tree(0), tree, MICRO_STEPS)


def lifted(gradients, **options):
    """Runs one cycle: the gradient that the inner optimizer gets, and the state after."""
    tx = accumulate_in_subspace(optax.identity(), len(gradients), **options)
    state = tx.init(gradients[0])
    for g in gradients:
        updates, state = tx.update(g, state)
    return updates, state


@pytest.mark.parametrize(
    ("inner", "every"), [(optax.sgd, EVERY), (optax.adam, 1), (memopt.adafactor, EVERY)]
)
def test_equals_multi_steps(inner, every):
    params, _ = run(accumulate(inner(1e-2), every), tree(0), tree, MICRO_STEPS)
    expected, _ = run(optax.MultiSteps(inner(1e-2), every), tree(0), tree, MICRO_STEPS)
    close(params, expected, rtol=2e-4)


@every_wrapper
def test_a_schedule_gives_the_micro_steps_of_each_cycle(wrapper):
    """A number is a constant schedule."""
    grows = lambda cycle: 1 + cycle
    tx = WRAPPERS[wrapper](optax.sgd(1.0), grows)
    state, moved = tx.init(tree(0)), []
    for t in range(10):
        updates, state = tx.update(tree(t), state)
        moved.append(any(bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates)))
    assert [t + 1 for t, moves in enumerate(moved) if moves] == [1, 3, 6, 10]
    assert (int(state.cycle), int(state.micro_step)) == (4, 0)
    constant, number = (WRAPPERS[wrapper](optax.sgd(1.0), every) for every in (lambda _: 2, 2))
    params, _ = run(constant, tree(0), tree, 4)
    chex.assert_trees_all_equal(params, run(number, tree(0), tree, 4)[0])


def test_a_schedule_equals_multi_steps():
    grows = lambda cycle: 1 + cycle
    params, _ = run(accumulate(optax.adam(1e-2), grows), tree(0), tree, 10)
    expected, _ = run(optax.MultiSteps(optax.adam(1e-2), grows), tree(0), tree, 10)
    close(params, expected, rtol=2e-4)


def counted(runs):
    """A transformation that tells the host each time it is computed."""

    def update(updates, state, params=None):
        jax.debug.callback(lambda: runs.append(1))
        return jax.tree.map(jnp.sqrt, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


@pytest.mark.parametrize(
    ("wrapper", "computed"),
    [*((WRAPPERS[name], 2) for name in WRAPPERS), (optax.MultiSteps, MICRO_STEPS)],
    ids=[*WRAPPERS, "MultiSteps"],
)
def test_computes_the_inner_update_once_a_cycle(wrapper, computed):
    """Optax's MultiSteps computes it at every micro-step."""
    runs = []
    run(wrapper(counted(runs), EVERY), tree(0), tree, MICRO_STEPS)
    jax.effects_barrier()
    assert len(runs) == computed


@every_wrapper
def test_the_inner_update_stands_in_one_branch(wrapper):
    tx = WRAPPERS[wrapper](counted([]))
    jaxpr = jax.make_jaxpr(tx.update)(tree(0), tx.init(tree(0)))
    conds = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    assert len(conds) == 1
    wait, step = conds[0].params["branches"]
    roots = lambda jaxpr: str(jaxpr).count(" sqrt ")
    assert roots(jaxpr) == roots(step) == len(jax.tree.leaves(tree(0)))
    assert {e.primitive.name for e in wait.eqns} <= {"broadcast_in_dim"}  # zeros


@every_wrapper
def test_zeros_until_the_cycle_ends(wrapper):
    tx = wrap(wrapper)
    state, moved = tx.init(tree(0)), []
    update = jax.jit(tx.update)
    for t in range(MICRO_STEPS):
        before = state.inner
        updates, state = update(tree(t), state, tree(0))
        moved.append(any(bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates)))
        if not moved[-1]:
            chex.assert_trees_all_equal(before, state.inner)
    assert moved == [(t + 1) % EVERY == 0 for t in range(MICRO_STEPS)]
    assert int(state.micro_step) == MICRO_STEPS


@every_wrapper
def test_state_bytes_are_the_formula(wrapper):
    table = memopt.state_bytes(wrap(wrapper), tree(0))
    inner = memopt.state_bytes(memopt.adafactor(1e-2), tree(0))
    for name, size in table.parameters.items():
        kept = size
        if "kernel" in name and wrapper != "exact":
            k, m, n = SHAPES["blocks"][name.split("/")[1]]["kernel"]
            kept = 4 * k * RANK * max(m, n)
        assert table[name] == inner[name] + kept, name
    assert table.shared == inner.shared + 4


@pytest.mark.parametrize(
    ("projector", "shape"),
    [
        pytest.param(projector, shape, marks=slow_unless(i == j))
        for i, projector in enumerate(("gaussian", "rademacher", "sparse"))
        for j, shape in enumerate(((12, 20), (20, 12), (2, 12, 12)))
    ],
)
def test_the_lifted_mean_is_unbiased(projector, shape):
    """Its average over seeds nears the mean gradient, as fast as its variance says."""
    draw = np.random.default_rng(0)
    gradients = [{"w": jnp.asarray(draw.normal(size=shape), jnp.float32)} for _ in range(EVERY)]
    mean = sum(g["w"] for g in gradients) / EVERY
    sample = lambda seed: lifted(gradients, rank=RANK, projector=projector, seed=seed)[0]["w"]
    samples = jax.jit(jax.vmap(sample))(jnp.arange(4000))
    error = np.abs(samples.mean(0) - mean) / (samples.std(0) / np.sqrt(4000))
    assert error.max() < 5  # standard errors
    assert np.square(error).mean() < 1.5
    one = jnp.square(samples[0] - mean).sum() / jnp.square(mean).sum()
    assert 1 < one < 6  # about side/r = 3: a single sample is noisy


def test_one_projection_a_cycle_and_a_new_one_the_next():
    g = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)}
    tx = accumulate_in_subspace(optax.identity(), 2, RANK)
    state, seen = tx.init(g), []
    for sign in [1, 1, 1, -1, 1, 1]:
        updates, state = tx.update(jax.tree.map(lambda x, sign=sign: sign * x, g), state)
        seen.append(updates["w"])
    np.testing.assert_allclose(seen[3], 0, atol=1e-6)  # down(g) + down(-g), by one basis
    assert jnp.abs(seen[5] - seen[1]).max() > 0.1 * jnp.abs(seen[1]).max()


def rotations():
    """One for each of two cycles, not of two micro-steps."""
    draw = np.random.default_rng(0)
    given = {t: np.linalg.qr(draw.normal(size=(6, 6)))[0] for t in (1, 2)}
    return projectors.replay({"w": given}, side="right")


@pytest.mark.parametrize("basis", [rotations(), projectors.orthogonal(6)], ids=["replay", "drawn"])
def test_in_the_whole_space_it_is_exact(basis):
    whole = lambda inner: accumulate_in_subspace(inner, EVERY, projector=basis)
    params = {"w": jnp.ones((8, 6))}
    gradient = lambda seed: {"w": jnp.asarray(np.random.default_rng(seed).normal(size=(8, 6)))}
    got, _ = run(whole(optax.adam(1e-2)), params, gradient, 6)
    expected, _ = run(accumulate(optax.adam(1e-2), EVERY), params, gradient, 6)
    close(got, expected, rtol=2e-4)


@pytest.mark.parametrize(("codec", "most"), [("int4", 0.4), (memopt.codecs.Integers(), 0.04)])
def test_sums_may_be_stored_in_few_bits(codec, most):
    draw = np.random.default_rng(0).standard_t(4, size=(EVERY, 32, 256))
    gradients = [{"w": jnp.asarray(g, jnp.float32)} for g in draw]
    tx = memopt.quantize_state(accumulate(optax.identity(), EVERY), {"^sum/": codec})
    state, update = tx.init(gradients[0]), jax.jit(tx.update)
    assert state.codes.sum["w"].dtype == ("int4" if codec == "int4" else "int8")
    for _ in range(2):
        for g in gradients:
            mean, state = update(g, state)
        error = np.asarray(mean["w"], float) - draw.mean(0)
        assert np.square(error).mean() < most**2 * np.square(draw.mean(0)).mean()
        slope = (error * draw.mean(0)).sum() / np.square(draw.mean(0)).sum()
        assert abs(slope) < most / 32  # nothing is clipped, and rounding is unbiased


@every_wrapper
def test_sums_are_float32(wrapper):
    """A thousand bfloat16 gradients of one would stop adding up at 256."""
    ones = jax.tree.map(lambda x: jnp.ones_like(x, jnp.bfloat16), tree(0))
    tx = wrap(wrapper, every=1000)
    start = tx.init(ones)
    chex.assert_trees_all_equal_dtypes(start.sum, tree(0))
    update = jax.jit(lambda g, state: tx.update(g, state, g))
    add = lambda _, state: update(ones, state)[1]
    after = jax.jit(lambda state: jax.lax.fori_loop(0, 999, add, state))(start)
    np.testing.assert_array_equal(after.sum["blocks"]["norm"]["scale"], 999)
    chex.assert_trees_all_equal_shapes_and_dtypes(start, after)
    updates, _ = update(ones, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, ones)

    narrow = tree(0, jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    chex.assert_trees_all_equal(update(narrow, start)[1].sum, update(wide, start)[1].sum)


@every_wrapper
def test_none_leaves_and_empty_trees_change_no_number(wrapper):
    with_none = lambda seed: tree(seed) | {"frozen": None, "nothing": {}}
    params, _ = run(wrap(wrapper), with_none(0), with_none, MICRO_STEPS)
    close(params, plain(wrapper)[0] | {"frozen": None, "nothing": {}})
    assert run(wrap(wrapper), {}, lambda seed: {}, EVERY)[0] == {}


@every_wrapper
def test_init_of_shapes_is_init_of_arrays(wrapper):
    shapes = jax.eval_shape(lambda: tree(0))
    for state in wrap(wrapper).init(shapes), jax.eval_shape(wrap(wrapper).init, shapes):
        chex.assert_trees_all_equal_shapes_and_dtypes(state, plain(wrapper)[1])


@every_wrapper
def test_the_state_is_carried_through_scan(wrapper):
    tx = wrap(wrapper)

    def step(carry, g):
        updates, state = tx.update(g, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    gradients = jax.tree.map(lambda *g: jnp.stack(g), *(tree(100 + t) for t in range(MICRO_STEPS)))
    train = lambda params: jax.lax.scan(step, (params, tx.init(params)), gradients)[0]
    close(jax.jit(train)(tree(0)), plain(wrapper))


@every_wrapper
def test_stacked_layers_are_separate_layers(wrapper):
    def unstack(params):
        layers = [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(LAYERS)]
        return params | {"blocks": layers}

    separate, _ = run(wrap(wrapper), unstack(tree(0)), lambda t: unstack(tree(t)), MICRO_STEPS)
    close(unstack(plain(wrapper)[0]), separate)


@every_wrapper
@pytest.mark.parametrize(
    "axis_type",
    [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit],
    ids=["auto", "explicit"],
)
def test_sharded_is_unsharded(wrapper, axis_type):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type, axis_type))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    place = lambda seed: jax.device_put(tree(seed), shardings)
    with jax.set_mesh(mesh):
        params, state = run(wrap(wrapper), place(0), place, MICRO_STEPS)
        if axis_type == AxisType.Explicit:
            chex.assert_trees_all_equal(jax.tree.map(lambda x: x.sharding, params), shardings)
    close((params, state), plain(wrapper), rtol=1e-4)


@every_wrapper
def test_inject_hyperparams_inside_counts_cycles(wrapper):
    schedule = optax.linear_schedule(1e-2, 0.0, 4)
    inner = optax.inject_hyperparams(memopt.adafactor)(learning_rate=schedule)
    injected, state = run(WRAPPERS[wrapper](inner), tree(0), tree, MICRO_STEPS)
    scheduled, _ = run(WRAPPERS[wrapper](memopt.adafactor(schedule)), tree(0), tree, MICRO_STEPS)
    close(injected, scheduled)
    rate = state.inner.hyperparams["learning_rate"]
    assert float(rate) == pytest.approx(0.75e-2)  # the second cycle's


@every_wrapper
def test_extra_arguments_reach_the_inner_optimizer(wrapper):
    def update(updates, state, params=None, *, factor, **extra):
        return jax.tree.map(lambda u: factor * u, updates), state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    g = {"scale": jnp.ones(4)}
    tx = WRAPPERS[wrapper](inner, 1)
    np.testing.assert_array_equal(tx.update(g, tx.init(g), factor=2.0)[0]["scale"], 2)


@every_wrapper
def test_arguments_of_one_micro_batch_are_refused(wrapper):
    g = {"up": {"kernel": jnp.ones((8, 4))}}
    tx = WRAPPERS[wrapper](memopt.scale_by_hutchinson(first_probes=1), 2)
    with pytest.raises(memopt.IncompatiblePairingError, match="is that of the last micro-batch"):
        tx.update(g, tx.init(g), g, obj_fn=lambda params: params["up"]["kernel"].sum())
    with pytest.raises(memopt.IncompatiblePairingError, match="statistics are of the last micro-b"):
        tx.update(g, tx.init(g), g, statistics=memopt.zero_statistics(g))


@every_wrapper
def test_apply_if_finite_leaves_out_bad_micro_steps(wrapper):
    spoil = lambda g: jax.tree.map(lambda x: x * jnp.nan, g)
    order = [0, None, 1, 2, 3, None, 4, 5, 6, 7]  # None is a bad micro-step

    def gradient(t):
        i = order[t - 100]
        return spoil(tree(0)) if i is None else tree(100 + i)

    tx = optax.apply_if_finite(wrap(wrapper), max_consecutive_errors=5)
    params, state = run(tx, tree(0), gradient, len(order))
    close((params, state.inner_state), plain(wrapper))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: accumulate(optax.sgd(1.0), 0), "every_k_schedule must be at least 1, got 0"),
        (
            lambda: accumulate_in_subspace(optax.sgd(1.0), 0, 4),
            "every_k_schedule must be at least 1, got 0",
        ),
        (
            lambda: accumulate(optax.sgd(1.0), jnp.float32(2.5)),
            r"whole number or a function, got Array\(2\.5",
        ),
        (lambda: accumulate_in_subspace(optax.sgd(1.0), 2, 0), "rank must be at least 1, got 0"),
        (
            lambda: accumulate_in_subspace(optax.sgd(1.0), 2, 4, projector="gausian"),
            "did you mean 'gaussian'",
        ),
        (
            lambda: accumulate_in_subspace(optax.sgd(1.0), 2, 4, projector=projectors.svd(4)),
            "projector must be a random one or a replay, got Svd",
        ),
        (
            lambda: accumulate_in_subspace(optax.sgd(1.0), 2, 9).init({"w": jnp.ones((8, 16))}),
            r"between 1 and 8 for 'w'.*8×16.*got 9",
        ),
    ],
)
def test_bad_options_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
