"""Our optimizers in Flax's own `nnx.Optimizer`."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import memopt
from tests.state import test_sharding as sharded


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(8, 32, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.head = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.norm(nnx.relu(self.up(x))))


@pytest.mark.parametrize("name", ["adafactor", "apollo", "apollo_mini", "lion"])
def test_nnx_optimizer(name):
    model = Network(nnx.Rngs(0))
    rate = 1e-3 if name == "lion" else 1e-2
    optimizer = nnx.Optimizer(model, memopt.optimizer(name, rate), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (64, 8))
    y = jnp.stack([x[:, 0] * x[:, 1], x[:, 2], jnp.abs(x[:, 3]), -x[:, 4]], axis=1)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


class Parameters(nnx.Module):
    def __init__(self, arrays: dict[str, jax.Array]):
        for name, x in arrays.items():
            setattr(self, name, nnx.Param(x))


def gradients(name, t, shardings):
    placed = jax.device_put(sharded.tree(name, 100 + t), shardings)
    return nnx.state(Parameters(placed), nnx.Param)


SOME = ("adafactor", "int8")


@sharded.AXIS_TYPES
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in SOME))
        for name in sharded.TRANSFORMATIONS
        if name not in sharded.NOT_EXPLICIT  # whose updates explicit axes stop
    ],
)
def test_nnx_optimizer_on_a_mesh(name, axis_type):
    """State is made, and stays, where `state_sharding` says; the numbers are those of a device."""
    tx = optax.with_extra_args_support(sharded.TRANSFORMATIONS[name])
    shardings = sharded.places(name, axis_type)
    model = Parameters(jax.device_put(sharded.tree(name, 0), shardings))
    placed = tx._replace(init=functools.partial(memopt.init_sharded, tx))
    optimizer = nnx.Optimizer(model, placed, wrt=nnx.Param)
    expected = memopt.state_sharding(tx, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    loss = lambda params: sum(jnp.square(p).sum() for p in jax.tree.leaves(params))

    @nnx.jit
    def step(model, optimizer, gradients):
        optimizer.update(model, gradients, obj_fn=loss)

    def check_places():
        for x, where in zip(
            arrays(model, optimizer), jax.tree.leaves((shardings, expected)), strict=True
        ):
            assert x.sharding.is_equivalent_to(where, x.ndim)

    check_places()
    with jax.set_mesh(sharded.mesh_of(axis_type)):
        for t in range(sharded.STEPS):
            step(model, optimizer, gradients(name, t, shardings))
    if axis_type == AxisType.Explicit:  # of Auto axes the compiler has its say
        check_places()
    found = jax.device_get(arrays(model, optimizer))
    sharded.assert_close(found, jax.tree.leaves(sharded.on_one_device(name)))


def arrays(model, optimizer):
    """Parameters and state, in the order of their trees."""
    state = jax.tree.leaves(optimizer.opt_state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    variables = [getattr(model, name) for name in sorted(nnx.to_pure_dict(nnx.state(model)))]
    return jax.tree.leaves([variable.get_value() for variable in variables + state])
