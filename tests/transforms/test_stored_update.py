"""The update that a stored state gives, and parameters predicted by it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import memopt
from memopt.training.config import Config, Optimization, Run
from memopt.training.describe import describe_run
from memopt.training.step import init_state, train_step
from tests.optimizers.kinds import slow_unless

RATE, STEPS = 0.1, 3


def draw(seed):
    normal = np.random.default_rng(seed).normal
    return {"up": jnp.asarray(normal(size=(8, 4)), jnp.float32), "norm": jnp.ones(4) * seed}


def after(tx, steps=STEPS, params=None):
    """The state after some steps, and the parameters."""
    params = draw(0) if params is None else params
    state = tx.init(params)
    for t in range(steps):
        _, state = tx.update(draw(t + 1), state, params)
    return state, params


def check(tx, expected, **options):
    """`expected` is the update, from the state of the first transformation."""
    state, params = after(tx)
    found = jax.jit(lambda state, params: memopt.predict_parameters(tx, state, params, 2))
    moved = jax.tree.map(lambda p, u: p + 2 * u, params, expected(state[0]))
    chex.assert_trees_all_close(found(state, params), moved, rtol=1e-5, atol=1e-6)


def test_momentum_predicts_by_its_momentum():
    check(optax.sgd(RATE, 0.9), lambda s: jax.tree.map(lambda v: -RATE * v, s.trace))


@pytest.mark.parametrize("schedule", [pytest.param(False, marks=pytest.mark.slow), True])
def test_adam_predicts_by_its_moments_at_the_stored_count(schedule):
    """And at the learning rate of the coming step."""
    rate = optax.linear_schedule(RATE, 0.0, 4) if schedule else RATE
    now = rate(STEPS) if schedule else rate

    def expected(state):
        correct = lambda b: 1 - b**STEPS
        one = lambda m, v: -now * (m / correct(0.9)) / (jnp.sqrt(v / correct(0.999)) + 1e-8)
        return jax.tree.map(one, state.mu, state.nu)

    check(optax.adam(rate), expected)
    check(optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(rate)), expected)


def test_before_the_first_step_nothing_is_predicted():
    for tx in (optax.adam(RATE), optax.sgd(RATE, 0.9), memopt.keep_update(memopt.muon(RATE))):
        found = memopt.predict_parameters(tx, tx.init(draw(0)), draw(0), 5)
        chex.assert_trees_all_equal(found, draw(0))


def test_decay_is_left_out_by_a_transformation_made_without_it():
    tx = optax.adamw(RATE, weight_decay=0.5)
    state, params = after(tx)
    predict = lambda tx, state: memopt.predict_parameters(tx, state, params, 1.0)
    without = predict(optax.adamw(RATE, weight_decay=0.0), state)
    of_adam = predict(optax.adam(RATE), (state[0], state[2]))
    chex.assert_trees_all_close(without, of_adam, rtol=1e-6)
    decayed = jax.tree.map(lambda x, p: x - RATE * 0.5 * p, without, params)
    chex.assert_trees_all_close(predict(tx, state), decayed, rtol=1e-5, atol=1e-6)


REFUSED = {
    "nesterov": optax.sgd(RATE, 0.9, nesterov=True),
    "lion": memopt.lion(RATE),
    "muon": memopt.muon(RATE),
    "int8": memopt.quantize_state(optax.adam(RATE), min_size=0),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=slow_unless(n == "lion")) for n in REFUSED])
def test_an_update_that_reads_the_gradient_is_refused_but_can_be_kept(name):
    tx = REFUSED[name]
    with pytest.raises(ValueError, match=r"wrapped in memopt\.keep_update"):
        memopt.predict_parameters(tx, tx.init(draw(0)), draw(0), 1)
    kept, params = memopt.keep_update(tx), draw(0)
    state = kept.init(params)
    updates, state = jax.jit(kept.update)(draw(1), state, params)
    found = memopt.predict_parameters(kept, state, params, 3)
    chex.assert_trees_all_close(found, jax.tree.map(lambda p, u: p + 3 * u, params, updates))
    bytes_kept = memopt.state_bytes(kept, params).total - memopt.state_bytes(tx, params).total
    assert bytes_kept == 4 * (32 + 4)


def test_what_is_kept_goes_through_the_rest_of_its_chain():
    direction = memopt.keep_update(optax.scale_by_sign())
    tx = optax.chain(direction, optax.scale_by_learning_rate(optax.linear_schedule(1.0, 0.0, 4)))
    state, params = after(tx)
    found = memopt.predict_parameters(tx, state, params, 1)["up"]
    np.testing.assert_allclose(found, params["up"] - 0.25 * jnp.sign(draw(STEPS)["up"]), rtol=1e-6)


@pytest.mark.parametrize(
    "axis_type", [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit]
)
def test_on_a_mesh_parameters_are_predicted_where_they_are(axis_type):
    tx = optax.chain(memopt.scale_by_factored_matrix_rms(), optax.trace(0.9))
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(axis_type,))
    state, params = after(tx)
    expected = memopt.predict_parameters(tx, state, params, 2)
    with jax.set_mesh(mesh):
        split = {"up": NamedSharding(mesh, jax.P("fsdp")), "norm": NamedSharding(mesh, jax.P())}
        state, params = after(tx, params=jax.device_put(draw(0), split))
        found = jax.jit(lambda s, p: memopt.predict_parameters(tx, s, p, 2))(state, params)
        assert found["up"].sharding.is_equivalent_to(split["up"], 2)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-5)


def test_momentum_that_predicts_its_next_update_is_nesterovs():
    """Without a gradient the next one is −η β v. Optax keeps the predicted weights themselves."""
    loss = lambda w, batch: (jnp.square(jnp.tanh(w) - batch["y"]).sum(), jnp.asarray(1.0))
    batches = [{"y": jnp.asarray([0.1, -0.2, 0.4]) * t} for t in range(1, 7)]
    tx, nesterov = optax.sgd(RATE, 0.9), optax.sgd(RATE, 0.9, nesterov=True)
    predict = functools.partial(memopt.predict_parameters, tx, steps=0.9)
    step = functools.partial(train_step, loss=loss, learning_rate=optax.constant_schedule(RATE))
    state = init_state(jnp.ones(3), tx)
    point, moving = jnp.ones(3), nesterov.init(jnp.ones(3))
    predicted = jax.jit(functools.partial(step, tx=tx, predict=predict))
    for batch in batches:
        np.testing.assert_allclose(predict(state.opt_state, state.params), point, rtol=1e-5)
        g = jax.grad(lambda w, batch=batch: loss(w, batch)[0])(point)
        updates, moving = nesterov.update(g, moving)
        point = point + updates
        state, _ = predicted(state, batch)


def test_the_command_line_predicts_without_decay_and_not_with_release():
    options = {"optimizer": "adamw", "option": ("weight_decay=0.1",), "predict_steps": 2}
    config = lambda **more: Config(
        optimization=Optimization(**(options | more)), run=Run(mesh="data=1")
    )
    describe_run(config())
    with pytest.raises(ValueError, match="predict_steps must be left out with release"):
        describe_run(config(release=True))
    with pytest.raises(ValueError, match="predict_steps must be at least 1"):
        describe_run(config(predict_steps=0))
