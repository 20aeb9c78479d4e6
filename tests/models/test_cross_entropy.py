"""Cross-entropy in parts of the vocabulary equals that of all logits."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt.models.cross_entropy import chunked_cross_entropy
from memopt.state.quantized_params import Deferred
from tests.optimizers.kinds import slow_unless

OTHER_CODECS = {("int4", 0, 300), ("bfloat16+8", 1, 384)}
DRAW = np.random.default_rng(0)
TARGETS = jnp.asarray(DRAW.integers(0, 300, (2, 5)))
WEIGHTS = jnp.asarray(DRAW.integers(0, 2, (2, 5)), jnp.float32)


def arrays(dtype):
    x, kernel = DRAW.normal(size=(2, 5, 8)), DRAW.normal(size=(8, 300))
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype), WEIGHTS


def in_parts(columns, axis=1):
    def total(x, kernel, weights):
        return chunked_cross_entropy(x, kernel, TARGETS, weights, 4 * 10 * columns, axis)

    return total


def at_once(x, kernel, weights):
    logits = jnp.dot(x, kernel, preferred_element_type=jnp.float32)
    return (optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS) * weights).sum()


@pytest.mark.parametrize("columns", [7, 128, 299, 1000])
def test_parts_change_neither_loss_nor_gradients(columns):
    """With a part that is left over, of a row of lanes, and one part for all."""
    given = arrays(jnp.float32)
    gradients = lambda f: jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*given)
    chex.assert_trees_all_close(
        gradients(in_parts(columns)), gradients(at_once), rtol=1e-5, atol=1e-6
    )


def test_the_gradient_in_bfloat16_is_rounded_once():
    given = arrays(jnp.bfloat16)
    ours = jax.grad(in_parts(128), 1)(*given)
    x, kernel, weights = given
    exact = jax.grad(at_once, 1)(x.astype(jnp.float32), kernel.astype(jnp.float32), weights)
    assert ours.dtype == jnp.bfloat16
    error = jnp.linalg.norm(ours.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert error < 2**-8


def test_a_loss_that_is_not_finite_stays_so():
    x, kernel, weights = arrays(jnp.float32)
    assert not jnp.isfinite(in_parts(128)(x.at[0, 0, 0].set(jnp.nan), kernel, weights))


def test_the_gradient_can_be_differentiated_forwards():
    """Estimates of the Hessian's diagonal do that."""
    x, kernel, weights = arrays(jnp.float32)
    direction = jnp.asarray(DRAW.choice([-1.0, 1.0], kernel.shape), jnp.float32)

    def curvature(f):
        gradient = jax.grad(lambda kernel: f(x, kernel, weights))
        return jax.jvp(gradient, (kernel,), (direction,))[1]

    chex.assert_trees_all_close(curvature(in_parts(128)), curvature(at_once), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("codec", "axis", "vocab"),
    [
        pytest.param(*case, marks=slow_unless(case[0] == "int8" or case in OTHER_CODECS))
        for case in itertools.product(("int8", "int4", "bfloat16+8"), (0, 1), (384, 300))
    ],
)
def test_a_deferred_kernel_is_its_dense_one(codec, axis, vocab):
    """With blocks of a scale that parts can be cut by, and with others."""
    targets, weights = TARGETS % vocab, WEIGHTS
    x = jnp.asarray(DRAW.normal(size=(2, 5, 256)) / 16, jnp.float32)
    shape = (256, vocab) if axis else (vocab, 256)
    stored = memopt.quantize_params({"w": jnp.asarray(DRAW.normal(size=shape), "f4")}, codec)["w"]

    def loss(kernel, x):
        return chunked_cross_entropy(x, kernel, targets, weights, 4 * 10 * 128, axis)

    dense = stored.dequantize()
    deferred = lambda change, x: loss(Deferred(stored, change), x)
    chex.assert_trees_all_close(
        jax.jit(jax.value_and_grad(deferred, (0, 1)))(jnp.zeros_like(dense), x),
        jax.jit(jax.value_and_grad(loss, (0, 1)))(dense, x),
        rtol=1e-6,
    )
