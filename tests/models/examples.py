"""Models and batches shared by the tests of models."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from memopt.models.hugging_face import tensors
from memopt.models.llama import Llama, LlamaConfig, RopeScaling, loss

YARDSTICK = Path(__file__).parents[1] / "yardstick" / "llama_tiny"

SMALL = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)

# Every option that a family of Hugging Face has.
OPTIONS = dataclasses.replace(
    SMALL,
    tied=True,
    activation="gelu_tanh",
    attention_bias="qkvo",
    qk_norm=True,
    sliding_window=3,
    norm_offset=True,
    scale_embedding=True,
    rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=16),
)


def by_name(params) -> dict[str, np.ndarray]:
    """Parameters, or their gradients, under the names and in the layout of Hugging Face."""
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    arrays = {}
    for tensor in tensors(flat):
        leaf = flat[tensor.leaf]
        array = leaf if tensor.layer is None else leaf[tensor.layer]
        arrays[tensor.name] = array.T if tensor.transposed else array
    return arrays


def init(config: LlamaConfig) -> Llama:
    """A new model, compiled: much faster than op by op."""
    return nnx.jit(lambda: Llama(config, rngs=nnx.Rngs(0)))()


def enlarge(model: Llama) -> Llama:
    """Matrices larger than the initial 0.02, so that every path matters; biases that are not 0."""
    graphdef, params = nnx.split(model, nnx.Param)

    def change(path, leaf):
        name = jax.tree_util.keystr(path)
        return leaf if "scale" in name else leaf + 0.1 if "bias" in name else 5 * leaf

    return nnx.merge(graphdef, jax.tree.map_with_path(change, params))


def split(model):
    """The model's definition, and its parameters as nested dicts."""
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def mean_loss(model, batch, **options):
    total, count = loss(model, batch, **options)
    return total / count


def logits(model, *inputs):
    """The model's call, compiled; unlike `nnx.jit` it leaves the arrays on their devices."""
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))(state, *inputs)


def value_and_grad(graphdef, params, batch, **options):
    """Mean loss and its gradient, compiled."""
    objective = lambda params, batch: mean_loss(nnx.merge(graphdef, params), batch, **options)
    return jax.jit(jax.value_and_grad(objective))(params, batch)
