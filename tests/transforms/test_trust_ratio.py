"""Trust ratios: what they are of, where they are one, and what a mask leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt

W = {"a": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "b": jnp.array([[0.0, 2.0], [0.0, 0.0]])}
G = {"a": jnp.array([[0.0, 1.0], [0.0, 0.0]]), "b": jnp.array([[0.0, 0.0], [3.0, 4.0]])}
ONLY_A = {"a": True, "b": False}


def first_update(tx, g=G, w=W):
    return jax.jit(lambda g, w: tx.update(g, tx.init(w), w)[0])(g, w)


def test_norms_are_of_the_gradient_and_of_the_weights_not_of_their_sum():
    tx = memopt.scale_by_matrix_trust_ratio(0.5, eps=1.0, weight_decay=2.0)
    found = first_update(tx)
    for name, (of_g, of_w) in {"a": (1.0, 5.0), "b": (5.0, 2.0)}.items():
        ratio = 0.5 * of_w / (of_g + 2 * of_w + 1)
        np.testing.assert_allclose(found[name], ratio * (G[name] + 2 * W[name]), rtol=1e-6)


def test_the_ratio_is_one_where_a_norm_is_zero():
    tx = memopt.scale_by_matrix_trust_ratio(0.5, weight_decay=2.0)
    stack = jnp.stack([W["a"], jnp.zeros((2, 2))])
    np.testing.assert_array_equal(first_update(tx, jnp.ones_like(stack), stack)[1], 1.0)
    with jax.debug_nans(True):
        np.testing.assert_array_equal(first_update(tx, jnp.zeros_like(stack), stack), 2 * stack)


@pytest.mark.parametrize("mask", [ONLY_A, lambda params: ONLY_A], ids=["tree", "function"])
def test_lars_without_decay_has_its_ratio_without_it(mask):
    options = {"trust_coefficient": 0.5, "weight_decay": 2.0}
    found = first_update(memopt.lars(1.0, weight_decay_mask=mask, **options))
    np.testing.assert_allclose(found["a"], first_update(memopt.lars(1.0, **options))["a"])
    np.testing.assert_allclose(found["b"], -0.5 * 2 / 5 * G["b"], rtol=1e-6)


@pytest.mark.parametrize("mask", [ONLY_A, lambda params: ONLY_A], ids=["tree", "function"])
def test_the_released_lamb_has_no_ratio_where_nothing_decays(mask):
    options = {"eps": 1e-12, "weight_decay": 2.0, "weight_decay_mask": mask}
    adam = 0.1 / 0.001**0.5  # of a first gradient, without bias correction
    sign = jnp.sign(G["b"])
    found = first_update(memopt.lamb(1.0, as_released=True, **options))
    np.testing.assert_allclose(found["b"], -adam * sign, rtol=1e-4)
    paper = first_update(memopt.lamb(1.0, **options))
    np.testing.assert_allclose(paper["b"], -2 / 2**0.5 * sign, rtol=1e-4)


@pytest.mark.parametrize("name", ["trust_coefficient", "eps", "weight_decay"])
def test_negative_numbers_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name} must be at least 0, got -1"):
        memopt.scale_by_matrix_trust_ratio(**{name: -1})
