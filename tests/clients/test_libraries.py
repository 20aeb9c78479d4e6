"""Training with models of Equinox, Haiku, Keras and Haliax, where they are installed."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import memopt
from tests.clients.optimizers import METHODS
from tests.clients.training import (
    HEADS,
    HIDDEN,
    LENGTH,
    TOKENS,
    VOCABULARY,
    WIDTH,
    check,
    make_mesh,
    next_token_loss,
    rate,
    shard,
)
from tests.clients.trees import assert_like

pytestmark = pytest.mark.integrations


def equinox_model() -> tuple[Any, Callable[[Any], jax.Array]]:
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 8)

    class Model(eqx.Module):
        embedding: eqx.nn.Embedding
        pos: jax.Array
        attention: eqx.nn.MultiheadAttention
        norm1: eqx.nn.LayerNorm
        mlp: eqx.nn.MLP
        unembed: eqx.nn.Linear

        def __call__(self, tokens):
            x = jax.vmap(self.embedding)(tokens) + self.pos
            y = jax.vmap(self.norm1)(x)
            x = x + self.attention(y, y, y, mask=jnp.tri(LENGTH, dtype=bool))
            return jax.vmap(self.unembed)(x + jax.vmap(self.mlp)(x))

    model = Model(
        eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0]),
        0.02 * jax.random.normal(keys[1], (LENGTH, WIDTH)),
        eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[2]),
        eqx.nn.LayerNorm(WIDTH),
        eqx.nn.MLP(WIDTH, WIDTH, HIDDEN, 1, key=keys[3]),
        eqx.nn.Linear(WIDTH, VOCABULARY, use_bias=False, key=keys[4]),
    )
    params, static = eqx.partition(model, eqx.is_array)
    return params, lambda params: jax.vmap(eqx.combine(params, static))(TOKENS)


def haiku_model() -> tuple[Any, Callable[[Any], jax.Array]]:
    hk = pytest.importorskip("haiku")

    def forward(tokens):
        init = hk.initializers.VarianceScaling(1.0)
        x = hk.Embed(VOCABULARY, WIDTH)(tokens)
        y = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        attention = hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=init, model_size=WIDTH)
        x = x + attention(y, y, y, mask=jnp.tri(LENGTH, dtype=bool)[None, None])
        y = hk.Linear(HIDDEN)(x)
        x = x + hk.Linear(WIDTH)(jax.nn.gelu(y))
        return hk.Linear(VOCABULARY)(x)

    model = hk.without_apply_rng(hk.transform(forward))
    return model.init(jax.random.key(0), TOKENS), lambda params: model.apply(params, TOKENS)


def keras_model(by_name: bool = True) -> tuple[Any, Callable[[Any], jax.Array]]:
    os.environ["KERAS_BACKEND"] = "jax"
    keras = pytest.importorskip("keras")
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, WIDTH)(tokens)
    y = keras.layers.LayerNormalization()(x)
    x = x + keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(y, y, use_causal_mask=True)
    y = keras.layers.Dense(HIDDEN, activation="gelu")(x)
    x = x + keras.layers.Dense(WIDTH)(y)
    model = keras.Model(tokens, keras.layers.Dense(VOCABULARY)(x))
    names = [v.path for v in model.trainable_variables]
    others = model.non_trainable_variables

    def logits(params):
        values = [params[name] for name in names] if by_name else params
        return model.stateless_call(values, others, TOKENS)[0]

    values = [v.value for v in model.trainable_variables]
    return dict(zip(names, values, strict=True)) if by_name else values, logits


def haliax_model() -> tuple[Any, Callable[[Any], jax.Array]]:
    hax = pytest.importorskip("haliax")
    eqx = pytest.importorskip("equinox")
    hnn = hax.nn
    Vocab, Embed, Mlp = hax.make_axes(vocab=VOCABULARY, embed=WIDTH, mlp=HIDDEN)
    Heads, Size, Batch = hax.make_axes(heads=HEADS, head_size=WIDTH // HEADS, batch=len(TOKENS))
    Position = hax.Axis("position", LENGTH)
    keys = jax.random.split(jax.random.key(0), 8)

    class Model(eqx.Module):
        token_embeddings: hnn.Embedding
        v_proj: hnn.Linear
        o_proj: hnn.Linear
        norm: hnn.LayerNorm
        up_proj: hnn.Linear
        down_proj: hnn.Linear
        lm_head: hnn.Linear

        def __call__(self, tokens):
            x = self.token_embeddings.embed(tokens)
            x = x + self.o_proj(self.v_proj(self.norm(x)))
            return self.lm_head(x + self.down_proj(hnn.gelu(self.up_proj(x))))

    linear = lambda key, In, Out: hnn.Linear.init(In, Out, key=key, use_bias=False)
    model = Model(
        hnn.Embedding.init(Vocab, Embed, key=keys[0]),
        linear(keys[1], Embed, (Heads, Size)),
        linear(keys[2], (Heads, Size), Embed),
        hnn.LayerNorm.init(Embed),
        linear(keys[3], Embed, Mlp),
        linear(keys[4], Mlp, Embed),
        linear(keys[5], Embed, Vocab),
    )
    params, static = eqx.partition(model, eqx.is_array)

    def logits(params):
        tokens = hax.named(jnp.asarray(TOKENS), (Batch, Position))
        return eqx.combine(params, static)(tokens).rearrange((Batch, Position, Vocab)).array

    return params, logits


MODELS = {
    "equinox": equinox_model,
    "haiku": haiku_model,
    "keras": keras_model,
    "haliax": haliax_model,
}


def training(tx: Any, params: Any, logits: Callable[[Any], jax.Array], mesh: Any) -> Any:
    """Parameters and state on the mesh, and a step."""
    params = shard(params, mesh)

    def step(state: Any) -> Any:
        params, state = state
        loss, gradients = jax.value_and_grad(lambda p: next_token_loss(logits(p)))(params)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return (params, memopt.init_sharded(tx, params)), step


@pytest.mark.parametrize("library", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_trains(library, method, tmp_path):
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        check(*training(METHODS[method](rate(method)), *MODELS[library](), mesh), tmp_path)


@pytest.mark.parametrize("method", ["galore", "muon"])
def test_keras_list(method, tmp_path):
    """Keras hands its own optimizers an unnamed list: which are matrices the user says."""
    named, _ = keras_model()
    params, logits = keras_model(by_name=False)
    which = {
        "query": memopt.Matrix(0, (1, 2)),
        "key": memopt.Matrix(0, (1, 2)),
        "value": memopt.Matrix(0, (1, 2)),
        "attention_output": memopt.Matrix((0, 1), 2),
        "dense": memopt.Matrix(),
    }
    matrices = [which.get(n.split("/")[-2]) if n.endswith("kernel") else None for n in named]
    assert sum(m is not None for m in matrices) == 5
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        tx = METHODS[method](rate(method), matrices=matrices)
        check(*training(tx, params, logits, mesh), tmp_path)


@pytest.mark.parametrize("library", ["equinox", "haiku", "keras"])
def test_trees_by_hand_are_the_librarys(library):
    assert_like(library, MODELS[library]()[0])
