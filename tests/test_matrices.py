"""Rows, columns and stack."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import memopt
from memopt import Matrix, every_matrix, hidden_matrices, projectors, recombine
from memopt.matrices import map_matrices


def layout(array, matrix):
    return map_matrices(lambda layout, _: layout, array, matrices=matrix)


@pytest.mark.parametrize(
    ("name", "shape", "hidden", "factored"),
    [
        ("blocks/attention/q/kernel", (8, 512, 512), True, True),
        ("layers/0/mlp/up_proj/weight", (512, 1376), True, True),
        ("multi_head_attention/out/kernel", (512, 512), True, True),
        ("experts/w1", (4, 8, 512, 1376), True, True),
        ("embed/embedding", (32000, 512), False, True),
        ("model/embed_tokens/weight", (32000, 512), False, True),
        ("wte", (32000, 512), False, True),
        ("pos_emb", (1024, 512), False, True),
        ("lm_head/kernel", (512, 32000), False, True),
        ("head/kernel", (512, 32000), False, True),
        ("blocks/attention_norm/scale", (8, 512), False, False),
        ("ln_1/scale", (8, 512), False, False),
        ("blocks/attention/q/bias", (8, 512), False, False),
        ("LayerNorm_0/gamma", (8, 512), False, False),
        ("w", (512,), False, False),
        ("conv/kernel", (512, 1), False, False),
    ],
)
def test_default_selections(name, shape, hidden, factored):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert (hidden_matrices(name, leaf) is not None) == hidden
    assert (every_matrix(name, leaf) is not None) == factored


@st.composite
def arrays_and_matrices(draw):
    ndim = draw(st.integers(2, 5))
    axes = draw(st.permutations(range(ndim)))
    rows = draw(st.integers(1, ndim - 1))
    cols = draw(st.integers(1, ndim - rows))
    shape = draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim))
    return tuple(shape), Matrix(tuple(axes[:rows]), tuple(axes[rows : rows + cols]))


@settings(max_examples=50, deadline=None)
@given(arrays_and_matrices())
def test_to_matrices_and_back(case):
    shape, matrix = case
    array = np.arange(np.prod(shape)).reshape(shape)
    axes = layout(array, matrix)
    matrices = axes.to_matrices(array)
    assert matrices.shape == axes.shape(array)
    stack = [a for a in range(len(shape)) if a not in matrix.rows + matrix.cols]
    expected = np.transpose(array, stack + list(matrix.rows + matrix.cols))
    np.testing.assert_array_equal(matrices.ravel(), expected.ravel())
    np.testing.assert_array_equal(axes.from_matrices(matrices, array), array)


def test_nothing_is_reshaped_where_rows_and_columns_are_last():
    tx = memopt.in_subspace(optax.scale_by_adam(), projectors.gaussian(2), recombine.lift())
    params = {"w": jnp.ones((3, 8, 4))}
    jaxpr = str(jax.make_jaxpr(lambda g: layout(g, Matrix()).to_matrices(g))(params["w"]))
    assert "reshape" not in jaxpr
    assert "transpose" not in jaxpr
    axes = layout(params["w"], Matrix())
    assert axes.to_matrices(params["w"]) is params["w"]
    tx.init(params)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(memopt.adafactor, marks=pytest.mark.slow),
        pytest.param(lambda lr, **o: memopt.apollo(lr, rank=2, **o), marks=pytest.mark.slow),
        memopt.apollo_mini,
    ],
    ids=["adafactor", "apollo", "apollo_mini"],
)
def test_an_attention_kernel_is_the_matrix_its_axes_say(method):
    """(d, heads, head_dim), (heads, head_dim, d) and a stack of them are what they flatten to."""
    draw = np.random.default_rng(0)
    kernel, out = draw.normal(size=(3, 8, 2, 6)), draw.normal(size=(2, 6, 8))
    flat = {"q": kernel.reshape(3, 8, 12), "o": out.reshape(12, 8)}
    params = {"q": kernel, "o": out}
    axes = {"q": Matrix(1, (2, 3)), "o": Matrix((0, 1), 2)}

    def step(tx, params):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        return params

    ours = step(method(1e-2, matrices=axes), params)
    expected = step(method(1e-2), flat)
    for name in params:
        assert ours[name].shape == params[name].shape
        np.testing.assert_allclose(ours[name].reshape(expected[name].shape), expected[name], 1e-5)


def test_a_pytree_may_be_a_prefix():
    params = {"blocks": {"up": jnp.ones((4, 8)), "b": jnp.ones(8)}, "head": jnp.ones((8, 4))}
    kinds = map_matrices(
        lambda axes, _: axes.is_matrix,
        params,
        matrices={"blocks": {"up": Matrix(), "b": None}, "head": None},
    )
    assert kinds == {"blocks": {"up": True, "b": False}, "head": False}
    only_head = {"blocks": None, "head": Matrix()}
    kinds = map_matrices(lambda axes, _: axes.is_matrix, params, matrices=only_head)
    assert kinds == {"blocks": {"up": False, "b": False}, "head": True}


@pytest.mark.parametrize(
    ("matrices", "sentence"),
    [
        (Matrix(0, 2), r"names axis 2, but 'w' has shape \(4, 8\)"),
        (Matrix(0, 0), "must name each axis once"),
        (Matrix((), 1), "at least one for rows"),
        (lambda name, leaf: "yes", "must give a Matrix or None for 'w', got 'yes'"),
        ({"v": Matrix()}, r"matrices has no entry for 'w'; it has \['v'\]"),
    ],
)
def test_errors(matrices, sentence):
    with pytest.raises(ValueError, match=sentence):
        memopt.adafactor(1e-2, matrices=matrices).init({"w": jnp.ones((4, 8))})


def test_a_parameter_in_a_box_has_the_name_of_its_box():
    model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    names = map_matrices(lambda axes, _: axes.name, nnx.state(model, nnx.Param))
    assert set(jax.tree.leaves(names)) == {"kernel", "bias"}
