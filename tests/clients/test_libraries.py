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
from tests.clients.page import model_of
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
    params, static = eqx.partition(model_of("Equinox")["model"], eqx.is_array)
    return params, lambda params: jax.vmap(eqx.combine(params, static))(TOKENS)


def haiku_model() -> tuple[Any, Callable[[Any], jax.Array]]:
    pytest.importorskip("haiku")
    names = model_of("Haiku")
    return names["params"], lambda params: names["model"].apply(params, TOKENS)


def keras_model(by_name: bool = True) -> tuple[Any, Callable[[Any], jax.Array]]:
    os.environ["KERAS_BACKEND"] = "jax"
    keras = pytest.importorskip("keras")
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    model = model_of("Keras")["model"]
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
