"""Statistics of a batch for each matrix of a LLaMA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memopt
from memopt.models.llama import head_loss
from tests.models.examples import SMALL, init, mean_loss, split

TOKENS = jax.random.randint(jax.random.key(0), (2, 2, 12), 0, SMALL.vocab_size)
BATCH = {"inputs": TOKENS[0], "targets": TOKENS[1]}


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_scanned_blocks_report_inputs_and_gradients_of_outputs(remat):
    graphdef, params = split(init(dataclasses.replace(SMALL, remat=remat)))
    zeros = memopt.zero_statistics(params)
    observed = lambda params, zeros: mean_loss(nnx.merge(graphdef, params), BATCH, statistics=zeros)
    plain = lambda params: mean_loss(nnx.merge(graphdef, params), BATCH)
    (g, seen), expected = jax.jit(
        lambda: (jax.grad(observed, (0, 1))(params, zeros), jax.grad(plain)(params))
    )()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), g, expected)
    assert seen["embed"]["embedding"] is None
    blocks = seen["blocks"]
    kernels = [blocks["attention"][x]["kernel"] for x in "qkvo"]
    kernels += [blocks["mlp"][x]["kernel"] for x in ("gate", "up", "down")]
    assert all(kernel.tokens.tolist() == [24, 24] for kernel in kernels)

    model = nnx.merge(graphdef, params)
    first = jax.tree.map(lambda x: x[0], model.block_function()[1])
    scale = first["attention_norm"]["scale"]
    x = model.embed_tokens(BATCH["inputs"])
    normed = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + SMALL.norm_eps) * scale
    for kernel in kernels[:3]:
        np.testing.assert_allclose(kernel.inputs[0], normed.sum((0, 1)), rtol=1e-4, atol=1e-5)
    last = jax.grad(lambda shift: head_loss(model, model.hidden(TOKENS[0]) + shift, BATCH)[0] / 24)
    expected = last(jnp.zeros(SMALL.hidden_size))
    np.testing.assert_allclose(kernels[-1].outputs[1], expected, rtol=1e-4, atol=1e-8)
