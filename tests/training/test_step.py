"""The step: accumulation, skipping, what is logged, sharding."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt.state.quantized_params import apply_rounded_updates
from memopt.training.step import evaluate, init_state, train_step

DIM, BATCH = 6, 16
SCHEDULE = optax.linear_schedule(0.1, 0.0, 10)


def loss(params, batch):
    """Squared error summed over the rows that count."""
    error = jnp.tanh(batch["x"] @ params["kernel"]) @ params["head"] - batch["y"]
    return jnp.sum(batch["weights"] * error**2), jnp.sum(batch["weights"])


def make_params():
    first, second = jax.random.split(jax.random.key(0))
    return {
        "kernel": jax.random.normal(first, (DIM, DIM)),
        "head": jax.random.normal(second, (DIM,)),
    }


def make_batch(seed):
    x, y, weights = jax.random.split(jax.random.key(seed), 3)
    return {
        "x": jax.random.normal(x, (BATCH, DIM)),
        "y": jax.random.normal(y, (BATCH,)),
        "weights": jax.random.bernoulli(weights, 0.7, (BATCH,)).astype(jnp.float32),
    }


def make_step(tx=None, **options):
    tx = optax.adam(SCHEDULE) if tx is None else tx
    options = {"loss": loss, "learning_rate": SCHEDULE, **options}
    return functools.partial(train_step, tx=tx, **options)


def run(step, tx, batches, params=None):
    params = jax.tree.map(jnp.copy, make_params() if params is None else params)
    state, metrics = init_state(params, tx), None
    step = jax.jit(step, donate_argnums=0)
    for batch in batches:
        state, metrics = step(state, batch)
    return state, metrics


def test_gradient_is_that_of_the_mean_loss_over_tokens():
    batch, params = make_batch(1), make_params()

    def mean(params):
        total, tokens = loss(params, batch)
        return total / tokens

    tx = optax.sgd(1.0)
    state, metrics = run(make_step(tx), tx, [batch])
    gradient = jax.grad(mean)(params)
    expected = jax.tree.map(jnp.subtract, params, gradient)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], mean(params), rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-6)
    assert metrics["tokens"] == batch["weights"].sum()


@pytest.mark.parametrize("accumulation", [2, 4, BATCH])
def test_accumulation_weighs_micro_batches_by_their_tokens(accumulation):
    """Micro-batches hold different numbers of tokens: averaging their means would be wrong."""
    tx, batches = optax.adam(SCHEDULE), [make_batch(seed) for seed in range(3)]
    whole, whole_metrics = run(make_step(), tx, batches)
    cut, cut_metrics = run(make_step(accumulation=accumulation), tx, batches)
    chex.assert_trees_all_close(whole, cut, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(whole_metrics, cut_metrics, rtol=1e-5, atol=1e-6)


def test_accumulation_sums_in_float32():
    """In bfloat16 the many small terms of a sum are lost against it."""
    tx = optax.sgd(1.0)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_params())
    batch = make_batch(1)
    state, _ = run(make_step(tx, accumulation=BATCH), tx, [batch], params)

    rows = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(BATCH)]
    gradients = [jax.grad(lambda p, row: loss(p, row)[0])(params, row) for row in rows]
    exact = jax.tree.map(lambda *g: sum(x.astype(jnp.float32) for x in g), *gradients)
    mean = lambda g: -(g / batch["weights"].sum()).astype(jnp.bfloat16)
    expected = apply_rounded_updates(params, jax.tree.map(mean, exact), 0)
    chex.assert_trees_all_equal_dtypes(state.params, params)
    chex.assert_trees_all_equal(state.params, expected)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_a_step_with_anything_not_finite_changes_nothing_but_the_counters(accumulation, poison):
    tx = optax.adam(SCHEDULE)
    bad = make_batch(5) | {"y": jnp.full((BATCH,), poison)}
    good = [make_batch(seed) for seed in range(4)]
    clean, _ = run(make_step(accumulation=accumulation), tx, good)
    holed, metrics = run(
        make_step(accumulation=accumulation), tx, [good[0], bad, *good[1:3], bad, bad, good[3]]
    )
    chex.assert_trees_all_equal(clean.params, holed.params)
    chex.assert_trees_all_equal(clean.opt_state, holed.opt_state)
    assert (holed.step, holed.skipped, holed.skipped_in_row) == (7, 3, 0)
    ended_badly, metrics = run(make_step(accumulation=accumulation), tx, [*good, bad, bad])
    assert metrics["skipped_in_row"] == ended_badly.skipped_in_row == 2


def test_one_infinite_gradient_behind_a_finite_loss_is_seen():
    def steep(params, batch):
        total, tokens = loss(params, batch)
        return total + jnp.sqrt(params["zero"]), tokens  # value 0, slope infinite

    tx = optax.sgd(0.1)
    params = make_params() | {"zero": jnp.zeros(())}
    step = functools.partial(train_step, loss=steep, tx=tx, learning_rate=SCHEDULE)
    state, metrics = run(step, tx, [make_batch(0)], params)
    assert jnp.isfinite(metrics["loss"])
    assert state.skipped == 1
    chex.assert_trees_all_equal(state.params, params)


def test_logged_learning_rate_is_the_one_the_optimizer_used():
    """Also after a skipped step, which does not advance the optimizer's own count."""
    tx = optax.inject_hyperparams(optax.sgd)(SCHEDULE)
    bad = make_batch(0) | {"y": jnp.full((BATCH,), jnp.nan)}
    step, state = jax.jit(make_step(tx)), init_state(make_params(), tx)
    for batch in [make_batch(1), bad, make_batch(2), bad, bad, make_batch(3)]:
        state, metrics = step(state, batch)
        if metrics["skipped_in_row"] == 0:
            used = state.opt_state.hyperparams["learning_rate"]
            np.testing.assert_allclose(metrics["learning_rate"], used, rtol=1e-6)
    np.testing.assert_allclose(metrics["learning_rate"], SCHEDULE(2), rtol=1e-6)


def test_learning_rate_may_be_a_number():
    tx = optax.adam(0.5)
    _, metrics = run(make_step(tx, learning_rate=0.5), tx, [make_batch(0)])
    assert metrics["learning_rate"] == 0.5


def test_the_optimizer_is_given_the_loss():
    seen = []

    def update(updates, state, params=None, *, value, obj_fn, **extra):
        seen.append((value, obj_fn(params)))
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    _, metrics = make_step(tx)(init_state(make_params(), tx), make_batch(0))
    assert seen == [(metrics["loss"], metrics["loss"])]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sharded_over_eight_devices_gives_the_same_numbers(accumulation):
    tx, batches = optax.adam(SCHEDULE), [make_batch(seed) for seed in range(3)]
    plain, plain_metrics = run(make_step(accumulation=accumulation), tx, batches)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    batches = [jax.device_put(batch, rows) for batch in batches]
    params = jax.device_put(make_params(), jax.NamedSharding(mesh, jax.P()))
    split, split_metrics = run(make_step(accumulation=accumulation), tx, batches, params)
    chex.assert_trees_all_close(plain, split, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(plain_metrics, split_metrics, rtol=1e-5, atol=1e-6)


def test_state_is_donated():
    tx = optax.adam(SCHEDULE)
    state = init_state(make_params(), tx)
    compiled = jax.jit(make_step(), donate_argnums=0).lower(state, make_batch(0)).compile()
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= state_bytes


def test_evaluation_divides_the_summed_loss_by_the_tokens():
    params, batches = make_params(), [make_batch(seed) for seed in range(3)]
    whole = jax.tree.map(lambda *rows: jnp.concatenate(rows), *batches)
    total, tokens = loss(params, whole)
    np.testing.assert_allclose(evaluate(params, batches, loss), total / tokens, rtol=1e-6)


def test_evaluation_reads_a_loss_before_it_asks_for_the_next_batch():
    """Two programs under way at a time hang several CPU processes, now and then."""
    events = []

    class Number:
        def __float__(self):
            events.append("read")
            return 2.0

    def batches():
        for _ in range(3):
            events.append("batch")
            yield {}

    assert evaluate(None, batches(), lambda params, batch: (Number(), Number())) == 1.0
    assert events == ["batch", "read", "read"] * 3


def test_float16_is_refused_because_no_loss_is_scaled():
    narrow = jax.tree.map(lambda p: p.astype(jnp.float16), make_params())
    with pytest.raises(ValueError, match=r"'head' must be in float32 or bfloat16, got float16"):
        init_state(narrow, optax.adam(1e-3))


def observed_loss(params, batch, statistics):
    """The same loss; the matrix reports what it sees."""
    y = memopt.observe(statistics["kernel"], batch["x"], batch["x"] @ params["kernel"])
    error = jnp.tanh(y) @ params["head"] - batch["y"]
    return jnp.sum(batch["weights"] * error**2), jnp.sum(batch["weights"])


@pytest.mark.parametrize("accumulation", [1, 4])
def test_statistics_of_layers_are_those_of_the_whole_batch(accumulation):
    """The update is what MKOR makes of the mean input and the gradient of a bias."""
    params, batch = make_params(), make_batch(1)
    tx = memopt.mkor(SCHEDULE, refresh_every=1)
    step = make_step(tx, loss=observed_loss, observe=True, accumulation=accumulation)
    state, _ = run(step, tx, [batch])

    def shifted(params, bias):
        error = jnp.tanh(batch["x"] @ params["kernel"] + bias) @ params["head"] - batch["y"]
        return (batch["weights"] * error**2).sum() / batch["weights"].sum()

    g, outputs = jax.grad(shifted, argnums=(0, 1))(params, jnp.zeros(DIM))
    seen = memopt.LayerStatistics(batch["x"].mean(0), outputs, jnp.ones(()))
    updates, _ = tx.update(g, tx.init(params), params, statistics={"kernel": seen})
    chex.assert_trees_all_close(state.params, optax.apply_updates(params, updates), rtol=1e-5)
