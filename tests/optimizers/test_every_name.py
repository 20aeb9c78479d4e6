"""The checks that Optax runs on its optimizers, on every name of the registry.

Optax has them in ``optax/_src/alias_test.py``: convergence, dtypes, the structure of the state,
schedules, `tree_map_params`, `inject_hyperparams`, `MultiSteps`, `masked`, one compilation. Some
names run always, the others with ``-m slow``; memopt's methods also pass the common suite.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import memopt
from benchmarks.extra_arguments import with_extra_arguments
from memopt.optimizers.registry import METHODS
from tests.optimizers.kinds import slow_unless

QUICK = ("adafactor", "apollo_mini", "lion", "adamw")
every_name = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=slow_unless(n in QUICK)) for n in memopt.available()]
)
STEPS = 1000
RATES = {
    **{
        "sgd": 5e-3,
        "lars": 1.0,
        "lomo": 5e-3,
        "mkor": 1e-3,
        "racs": 0.02,
        "sm3": 0.3,
        "optax_muon": 0.3,
        "muon": 0.3,
    },
    **{"optax_lars": 1.0, "optax_muon": 0.3, "optax_sm3": 0.3},
    **{name: 1.0 for name, method in METHODS.items() if method.finds_step},
}
"""The first learning rates, of a linear decay to zero; others take 0.1."""


def draw(seed, dtype=jnp.float32):
    """A hidden matrix, a stack of two, and a vector; all are positive."""
    rng = np.random.default_rng(seed)
    shapes = {"first": {"kernel": (6, 4)}, "blocks": {"kernel": (2, 4, 8)}, "bias": (6,)}
    one = lambda shape: jnp.asarray(0.5 + 0.3 * rng.normal(size=shape), dtype)
    return jax.tree.map(one, shapes, is_leaf=lambda x: isinstance(x, tuple))


def parabola(params):
    """Zero at one."""
    return sum(jnp.sum(jnp.square(x - 1)) for x in jax.tree.leaves(params))


def rosenbrock(params):
    """Zero at one, at the end of a narrow bent valley in each row."""
    pairs = [(x[..., ::2], x[..., 1::2]) for x in jax.tree.leaves(params)]
    return sum(jnp.sum(10 * jnp.square(b - jnp.square(a)) + jnp.square(a - 1)) for a, b in pairs)


def options_of(name):
    options = {"refresh_every": 10} if "refresh_every" in METHODS[name].defaults else {}
    if METHODS[name].has_free_rank:
        options["rank"] = 2
    if name == "online_subspace_descent":
        options["projector_learning_rate"] = 0.05  # for a thousand steps
    return options


def make(name, learning_rate):
    return with_extra_arguments(memopt.optimizer)(name, learning_rate, **options_of(name))


def update(tx, gradients, state, params, loss=parabola):
    # Sophia and MoMo need them, others ignore them.
    return tx.update(gradients, state, params, obj_fn=loss, value=loss(params))


@every_name
@pytest.mark.parametrize("loss", [parabola, rosenbrock])
def test_a_minimum_is_found(name, loss):
    rate = RATES.get(name, 0.1)
    tx = make(name, optax.linear_schedule(rate, 0.0, STEPS))

    def step(carry, _):
        params, state = carry
        updates, state = update(tx, jax.grad(loss)(params), state, params, loss)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def descend(params):
        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
        return memopt.eval_params(name, state, params)

    start = draw(0)
    assert loss(descend(start)) < 0.05 * loss(start)


@every_name
def test_state_and_updates_keep_structure_and_dtypes(name):
    for dtype in (jnp.float32, jnp.bfloat16):
        tx, params = make(name, 0.1), jax.eval_shape(lambda dtype=dtype: draw(0, dtype))
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(functools.partial(update, tx), params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        assert jax.tree.structure(optax.tree_map_params(tx, lambda x: x, state)) == (
            jax.tree.structure(state)
        )


@every_name
def test_wrappers_of_optax_change_no_number_and_steps_compile_once(name):
    def train(tx, gradients):
        step = jax.jit(functools.partial(update, tx))
        params, state = draw(0), jax.jit(tx.init)(draw(0))
        for g in gradients:
            updates, state = step(g, state, params)
            params = optax.apply_updates(params, updates)
        assert step._cache_size() == 1
        return params

    schedule = optax.linear_schedule(0.1, 0.0, 4)
    gradients = [draw(10 + t) for t in range(3)]
    expected = train(make(name, schedule), gradients)
    twice = [g for g in gradients for _ in range(2)]
    found = {
        "MultiSteps": train(optax.MultiSteps(make(name, schedule), 2), twice),
        "masked": train(optax.masked(make(name, schedule), True), gradients),
    }
    if name in memopt.available("memopt"):
        inject = optax.inject_hyperparams(with_extra_arguments(getattr(memopt, name)))
        found["inject_hyperparams"] = train(
            inject(learning_rate=schedule, **options_of(name)), gradients
        )
    for wrapper, params in found.items():
        chex.assert_trees_all_close(
            params, expected, rtol=1e-4, atol=1e-5, custom_message=f"{wrapper} of {name}"
        )
