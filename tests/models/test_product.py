import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memopt.models.product import dot_general

X, KERNEL = np.random.default_rng(0).normal(size=(2, 6)).astype("f4"), jnp.ones((3, 5))
X = jnp.asarray(X.reshape(2, 2, 3))


def gradients(product, x, kernel):
    return jax.grad(lambda x, kernel: jnp.sin(product(x, kernel)).sum(), (0, 1))(x, kernel)


def test_gradients_are_those_of_the_plain_product():
    for ours, plain in zip(
        gradients(dot_general, X, KERNEL), gradients(jnp.dot, X, KERNEL), strict=True
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("platform", "joined"), [("cpu", True), ("tpu", False), ("cuda", False)])
def test_only_cpus_join_the_axes_of_rows_and_tokens(platform, joined):
    traced = jax.jit(lambda x, kernel: gradients(dot_general, x, kernel)).trace(X, KERNEL)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("contracting_dims = [0, 1] x [0, 1]" not in text) == joined
