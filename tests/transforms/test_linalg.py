"""Factorisations of stacks of matrices."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from memopt.transforms.linalg import leading_eigenvectors, orthonormal


@pytest.mark.parametrize(
    ("factorise", "shape"),
    [(orthonormal, (2, 3, 64, 16)), (lambda x: leading_eigenvectors(x, 4), (2, 3, 16, 16))],
    ids=["orthonormal", "leading_eigenvectors"],
)
def test_lapack_gets_one_matrix_at_a_time(factorise, shape):
    """Batches of it on several devices of one processor wait for each other's threads for ever."""
    x = jax.random.normal(jax.random.key(0), shape)
    x = x if shape[-1] != shape[-2] else x + x.mT
    compiled = jax.jit(factorise).lower(x).compile()
    calls = [line for line in compiled.as_text().splitlines() if '"lapack_' in line]
    sizes = [list(map(int, found.split(","))) for found in re.findall(r"\[([\d,]+)\]", str(calls))]
    assert calls
    assert all(math.prod(size) <= shape[-1] * shape[-2] for size in sizes)
    each = [[factorise(matrix) for matrix in row] for row in x]
    assert jnp.abs(compiled(x) - jnp.array(each)).max() < 1e-5
