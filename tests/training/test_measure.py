"""Measurements of micro-batches' gradients are the same in every kind of step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt.training.placement import make_mesh
from memopt.training.release import release_step
from memopt.training.setup import abstract_batch, set_up
from memopt.training.step import train_step
from tests.training.test_release import CONFIG, RATE, llama_run, make_batch, run, toy

KINDS = {"norms": {"micro_square"}, "inner_products": {"micro_square", "micro_dot_square"}}
SGD = optax.sgd(RATE)


def uneven(seed=0):
    """A batch whose last of four micro-batches has no token that counts; the others differ."""
    batch = make_batch(seed)
    return batch | {"weights": batch["weights"].at[3::4].set(0.0)}


def expected(loss, params, batch, pieces):
    """The two statistics in float64, from the gradient of each micro-batch."""
    gradients, counts = [], []
    for j in range(pieces):
        piece = {name: x[j::pieces] for name, x in batch.items()}
        gradient, count = jax.grad(loss, has_aux=True)(params, piece)
        flat = np.concatenate([np.ravel(g).astype(float) for g in jax.tree.leaves(gradient)])
        counts.append(float(count))
        gradients.append(flat / max(counts[-1], 1))
    share, gradients = np.array(counts) / sum(counts), np.stack(gradients)
    mean = share @ gradients
    return {
        "micro_square": share @ (gradients**2).sum(1),
        "micro_dot_square": share @ (gradients @ mean) ** 2,
    }


def assert_close(metrics, wanted, rtol=1e-5):
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=rtol, err_msg=name)


@pytest.mark.parametrize("kind", [pytest.param("norms", marks=pytest.mark.slow), "inner_products"])
def test_micro_batches_count_by_their_tokens_and_nothing_else_changes(kind):
    """One of them has none, and divides by nothing."""
    model, params = toy()
    options = {"loss": model.loss, "accumulation": 4}
    plain = run(train_step, SGD, params, [uneven()], **options)
    state, metrics = run(train_step, SGD, params, [uneven()], measure=kind, **options)
    assert metrics.keys() - plain[1].keys() == KINDS[kind]
    wanted = expected(model.loss, params, uneven(), 4)
    assert_close(metrics, {name: wanted[name] for name in KINDS[kind]} | plain[1])
    jax.tree.map(np.testing.assert_array_equal, state, plain[0])


def test_a_measured_variance_is_never_negative():
    """With equal weights the mean square of these gradients would be less than that of ḡ."""
    loss = lambda w, batch: (jnp.sum(batch["t"] * batch["y"] * w), jnp.sum(batch["t"]))
    batch = {"t": jnp.array([1.0, 99.0]), "y": jnp.array([0.0, 1.0])}
    _, metrics = run(
        train_step, SGD, jnp.ones(()), [batch], loss=loss, accumulation=2, measure="norms"
    )
    assert metrics["micro_square"] > metrics["gradient_norm"] ** 2


@pytest.mark.parametrize("step", [pytest.param(train_step, marks=pytest.mark.slow), release_step])
def test_statistics_of_bfloat16_gradients_are_float32(step):
    model, params = toy()
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    options = {"loss": model.loss} if step is train_step else {"model": model}
    options |= {"measure": "inner_products", "accumulation": 4}
    _, metrics = run(step, SGD, params, [uneven()], **options)
    assert {metrics[name].dtype for name in KINDS["inner_products"]} == {jnp.dtype("float32")}
    # The gradients themselves are rounded to 8 bits.
    assert_close(metrics, expected(model.loss, params, uneven(), 4), rtol=2e-2)


@pytest.mark.parametrize("step", [train_step, release_step])
def test_one_micro_batch_is_refused(step):
    model, params = toy()
    options = {"loss": model.loss} if step is train_step else {"model": model}
    with pytest.raises(ValueError, match=r"measure='norms' .* at least 2, got 1\."):
        run(step, SGD, params, [make_batch(0)], measure="norms", **options)


@pytest.mark.parametrize("kind", [pytest.param("norms", marks=pytest.mark.slow), "inner_products"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("clips", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_released_step_measures_the_same(kind, tied, clips):
    """A tied embedding's two gradients are one; clipping walks backward twice."""
    model, params = toy(tied=tied)
    tx = optax.adam(RATE)
    tx = optax.chain(memopt.clip_by_gradient_norm(1e-2), tx) if clips else tx
    options = {"accumulation": 4, "measure": kind}
    ordinary, released = (
        run(step, tx, params, [uneven(), uneven(1)], **model, **options)
        for step, model in [
            (train_step, {"loss": model.loss}),
            (release_step, {"model": model}),
        ]
    )
    assert released[1].keys() == ordinary[1].keys() >= KINDS[kind]
    assert_close(released[1], ordinary[1])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, ordinary[0], released[0])


@pytest.mark.slow
@pytest.mark.parametrize("step", [train_step, release_step])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_llama_on_eight_devices_of_either_kind(step, kind):
    mesh = jax.make_mesh(
        (2, 4), ("data", "fsdp"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2
    )
    options = {"measure": "inner_products", "accumulation": 2}
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x[::-1]]), make_batch(0))
    _, one = llama_run(train_step, SGD, [batch], **options)
    _, many = llama_run(step, SGD, [batch], mesh, **options)
    assert one.keys() >= KINDS["inner_products"]
    assert_close(many, one, rtol=1e-4)


@pytest.mark.slow
def test_int8_weights_on_a_mesh_released_with_a_tied_head():
    config = dataclasses.replace(CONFIG, tied=True, vocab_size=256)
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, 256, (8, 16), np.int32) for name in ("inputs", "targets")}
    options = {"optimizer": "sgd", "learning_rate": RATE, "weights": "int8"}
    metrics = []
    for axes, release in [("data=1", False), ("data=2,fsdp=2", True)]:
        mesh = make_mesh(axes, rows=4)
        setup = set_up(
            *(config, mesh, SGD, abstract_batch(mesh, 8, 16)),
            **options,
            release=release,
            accumulation=2,
            measure="inner_products",
        )
        with jax.set_mesh(mesh):
            metrics.append(setup.jitted(setup.jit_init(0)(), setup.place(batch))[1])
    assert metrics[0].keys() >= KINDS["inner_products"]
    assert_close(metrics[1], metrics[0], rtol=1e-4)


def test_gradients_of_observed_layers_are_measured_without_their_statistics():
    def loss(params, batch, statistics=None):
        y = batch["x"] @ params["w"]
        if statistics:
            y = memopt.observe(statistics["w"], batch["x"], y)
        return jnp.sum((y - 1) ** 2), jnp.asarray(len(y))

    params, batch = {"w": jnp.ones((3, 2))}, {"x": jax.random.normal(jax.random.key(0), (8, 3))}
    tx = memopt.mkor(RATE)
    options = {"loss": loss, "accumulation": 4, "measure": "inner_products", "observe": True}
    _, metrics = run(train_step, tx, params, [batch], **options)
    assert_close(metrics, expected(loss, params, batch, 4))


def test_gradients_are_measured_where_they_are_taken():
    loss = lambda params, batch: (jnp.sum((batch["x"] @ params - 1) ** 2), jnp.asarray(8.0))
    params, batch = jnp.ones(3), {"x": jax.random.normal(jax.random.key(0), (8, 3))}
    ahead = lambda state, params: params + 1.0
    options = {"loss": loss, "accumulation": 4, "measure": "norms", "predict": ahead}
    _, metrics = run(train_step, SGD, params, [batch], **options)
    wanted = expected(loss, params + 1.0, batch, 4)
    assert_close(metrics, {"micro_square": wanted["micro_square"]})


def test_both_passes_over_a_micro_batch_draw_the_same_dropout():
    """Each gradient is its mask: with another one the product would be another."""

    def loss(params, batch):
        mask = jax.random.bernoulli(batch["rng"], 0.5, params.shape)
        return jnp.sum(mask * params), jnp.asarray(1.0)

    options = {"loss": loss, "accumulation": 2, "measure": "inner_products"}
    _, metrics = run(
        train_step, SGD, jnp.ones(64), [{"x": jnp.ones(2)}], rng=jax.random.key(3), **options
    )
    # Masks a and b: mean of the squares of ⟨a, (a + b)/2⟩ = (|a| + |ab|)/2 and of ⟨b, (a + b)/2⟩.
    keys = jax.random.split(jax.random.fold_in(jax.random.key(3), 0), 2)
    a, b = (np.array(jax.random.bernoulli(key, 0.5, (64,)), float) for key in keys)
    wanted = (((a + b) @ a / 2) ** 2 + ((a + b) @ b / 2) ** 2) / 2
    np.testing.assert_allclose(metrics["micro_dot_square"], wanted, rtol=1e-6)
