"""Flax's two trainers, `nnx.Optimizer` and Linen's `TrainState`, with parameters in their boxes."""

from typing import Any

import jax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import memopt
from tests.clients.optimizers import METHODS
from tests.clients.training import (
    HEADS,
    HIDDEN,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Step,
    check,
    make_mesh,
    next_token_loss,
    rate,
)


def methods(*quick: str) -> Any:
    """All of them; those that are not quick are tried with ``-m integrations``."""
    marks = lambda name: [] if name in quick else [pytest.mark.integrations]
    return pytest.mark.parametrize("method", [pytest.param(m, marks=marks(m)) for m in METHODS])


RULES = (("vocab", "tp"), ("embed", "fsdp"), ("heads", "tp"), ("mlp", "tp"), ("kv", None))


class Model(nnx.Module):
    """One block of a language model; its parameters name axes of the mesh."""

    def __init__(self, rngs: nnx.Rngs):
        on = lambda *axes: nnx.with_partitioning(nnx.initializers.lecun_normal(), axes)
        self.embed = nnx.Embed(VOCABULARY, WIDTH, embedding_init=on("tp", "fsdp"), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS,
            WIDTH,
            decode=False,
            kernel_init=on("fsdp", "tp", None),
            out_kernel_init=on("tp", None, "fsdp"),
            rngs=rngs,
        )
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, kernel_init=on("fsdp", "tp"), rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, kernel_init=on("tp", "fsdp"), rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, kernel_init=on("fsdp", "tp"), rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x), mask=nn.make_causal_mask(tokens))
        return self.head(x + self.down(nnx.gelu(self.up(x))))


def nnx_training(method: str) -> tuple[Any, Step]:
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, METHODS[method](rate(method)), wrt=nnx.Param)
    definition, state = nnx.split((model, optimizer))

    def step(state):
        model, optimizer = nnx.merge(definition, state)
        loss, gradients = nnx.value_and_grad(lambda m: next_token_loss(m(TOKENS)))(model)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), loss

    return state, step


@methods("adafactor", "apollo_mini", "adamw_8bit")
def test_nnx_optimizer(method, tmp_path):
    with jax.set_mesh(make_mesh()):
        check(*nnx_training(method), tmp_path)


class LinenModel(nn.Module):
    """The same in Linen; its parameters name logical axes."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        on = lambda *axes: nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
        x = nn.Embed(VOCABULARY, WIDTH, embedding_init=on("vocab", "embed"))(tokens)
        x = x + nn.MultiHeadDotProductAttention(
            HEADS,
            kernel_init=on("embed", "heads", "kv"),
            out_kernel_init=on("heads", "kv", "embed"),
        )(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
        y = nn.Dense(HIDDEN, kernel_init=on("embed", "mlp"))(x)
        x = x + nn.Dense(WIDTH, kernel_init=on("mlp", "embed"))(nn.gelu(y))
        return nn.Dense(VOCABULARY, kernel_init=on("embed", "vocab"), name="logitdense")(x)


def linen_training(method: str) -> tuple[Any, Step]:
    model = LinenModel()
    tx = METHODS[method](rate(method))

    def create() -> TrainState:
        params = model.init(jax.random.key(0), TOKENS)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    mesh = jax.sharding.get_mesh()
    specs = nn.get_partition_spec(jax.eval_shape(create))
    state = jax.jit(create, out_shardings=nn.logical_to_mesh_sharding(specs, mesh, RULES))()

    return state, step_of_train_state


def step_of_train_state(state: TrainState) -> tuple[TrainState, jax.Array]:
    loss = lambda params: next_token_loss(state.apply_fn({"params": params}, TOKENS))
    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), value


@methods("adafactor", "galore")
def test_linen_train_state_in_boxes(method, tmp_path):
    with jax.set_mesh(make_mesh()):
        check(*linen_training(method), tmp_path)


def bare_linen_training(method: str) -> tuple[Any, Step]:
    """Parameters without boxes, each in its place; the state's places are found from them."""
    model = LinenModel()
    mesh = jax.sharding.get_mesh()
    tx = METHODS[method](rate(method))
    boxed = model.init(jax.random.key(0), TOKENS)["params"]
    places = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
    params = jax.device_put(nn.unbox(boxed), places)
    placed = tx._replace(init=lambda params: memopt.init_sharded(tx, params))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=placed)
    return state.replace(step=jax.numpy.asarray(0)), step_of_train_state


@methods("ldadam")
def test_linen_train_state(method, tmp_path):
    with jax.set_mesh(make_mesh()):
        check(*bare_linen_training(method), tmp_path)
