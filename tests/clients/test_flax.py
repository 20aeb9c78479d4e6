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
from tests.clients.trees import assert_like


def methods(*quick: str) -> Any:
    """All of them; those that are not quick are tried with ``-m integrations``."""
    marks = lambda name: [] if name in quick else [pytest.mark.integrations]
    return pytest.mark.parametrize("method", [pytest.param(m, marks=marks(m)) for m in METHODS])


RULES = (("vocab", "tp"), ("embed", "fsdp"), ("heads", "tp"), ("mlp", "tp"), ("kv", None))


class Model(nnx.Module):
    """One block of a language model; its parameters name logical axes."""

    def __init__(self, rngs: nnx.Rngs):
        on = lambda *axes: nnx.with_partitioning(nnx.initializers.lecun_normal(), axes)
        linear = lambda inputs, outputs, *axes: nnx.Linear(
            inputs, outputs, kernel_init=on(*axes), rngs=rngs
        )
        self.token_emb = nnx.Embed(
            VOCABULARY, WIDTH, embedding_init=on("vocab", "embed"), rngs=rngs
        )
        self.mha = nnx.MultiHeadAttention(
            HEADS,
            WIDTH,
            decode=False,
            kernel_init=on("embed", "heads", "kv"),
            out_kernel_init=on("heads", "kv", "embed"),
            rngs=rngs,
        )
        self.layer_norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.linear1 = linear(WIDTH, HIDDEN, "embed", "mlp")
        self.linear2 = linear(HIDDEN, WIDTH, "mlp", "embed")
        self.output_layer = linear(WIDTH, VOCABULARY, "embed", "vocab")

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.token_emb(tokens)
        x = x + self.mha(self.layer_norm1(x), mask=nn.make_causal_mask(tokens))
        return self.output_layer(x + self.linear2(nnx.gelu(self.linear1(x))))


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


@methods("adafactor")
def test_nnx_optimizer(method, tmp_path):
    with jax.set_mesh(make_mesh()), nnx.logical_axis_rules(RULES):
        check(*nnx_training(method), tmp_path)


class LinenModel(nn.Module):
    """The same in Linen; as in Flax's example, attention's boxes name two of its three axes."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        init = nn.initializers
        on = lambda init, *axes: nn.with_logical_partitioning(init, axes)
        matrix = lambda *axes: on(init.lecun_normal(), *axes)
        dense = lambda size, *axes, **options: nn.Dense(
            size, kernel_init=matrix(*axes), bias_init=on(init.zeros, axes[1]), **options
        )
        norm = nn.LayerNorm(scale_init=on(init.ones, "embed"), bias_init=on(init.zeros, "embed"))
        attention = nn.MultiHeadDotProductAttention(
            HEADS, kernel_init=matrix("embed", "kv"), use_bias=False
        )
        x = nn.Embed(VOCABULARY, WIDTH, embedding_init=matrix("vocab", "embed"))(tokens)
        x = x + attention(norm(x), mask=nn.make_causal_mask(tokens))
        y = nn.gelu(dense(HIDDEN, "embed", "mlp")(x))
        x = x + dense(WIDTH, "mlp", "embed")(y)
        return dense(VOCABULARY, "embed", "vocab", name="logitdense")(x)


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


@methods("adafactor")
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


@methods()
def test_linen_train_state(method, tmp_path):
    with jax.set_mesh(make_mesh()):
        check(*bare_linen_training(method), tmp_path)


def test_trees_by_hand_are_flaxs():
    with nnx.use_eager_sharding(False):
        assert_like("flax_nnx", nnx.state(Model(nnx.Rngs(0)), nnx.Param))
    assert_like("lm1b", LinenModel().init(jax.random.key(0), TOKENS)["params"])
