"""Any tree of parameters is trained: random structures, shapes, dtypes, methods and pairings."""

import dataclasses
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

import memopt
from benchmarks.extra_arguments import with_extra_arguments
from tests.optimizers import pairings


class Pair(NamedTuple):
    """A node whose fields have the names of second moments."""

    rows: Any
    nu: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    """A node whose fields are those of a layer."""

    kernel: Any
    bias: Any


def optimizers() -> dict[str, Any]:
    """Every method, quantised Adam, and every projector with every recombination."""
    methods = {
        name: lambda name=name: memopt.optimizer(name, 1e-2) for name in memopt.available("memopt")
    }
    adam = optax.scale_by_adam()
    codes = {
        codec: lambda codec=codec: memopt.quantize_state(adam, codec, min_size=0)
        for codec in ("int8", "int4", "bfloat16")
    }
    cells = {
        name: lambda cell=cell: pairings.transformation(*cell)
        for name, cell in pairings.cells().items()
    }
    return methods | codes | cells


OPTIMIZERS = optimizers()
SIZES = st.sampled_from([0, 1, 1, 2, 3, 4, 8, 130])
SHAPES = st.lists(SIZES, max_size=5).filter(lambda shape: np.prod(shape) < 3000).map(tuple)
DTYPES = st.sampled_from([jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16])
LEAVES = st.one_of(st.none(), st.builds(jax.ShapeDtypeStruct, SHAPES, DTYPES))
NAMES = st.sampled_from(["kernel", "embedding", "blocks", "layers", "nu", "0", "scale"])


def nodes(children: st.SearchStrategy) -> st.SearchStrategy:
    """Dicts, lists, tuples, NamedTuples, dataclasses and states of NNX."""
    return st.one_of(
        st.dictionaries(NAMES, children, max_size=3),
        st.lists(children, max_size=3),
        st.tuples(children, children),
        st.builds(Pair, children, children),
        st.builds(Block, children, children),
        st.builds(lambda x: nnx.State({"layer": {"kernel": x}}), children),
    )


def trees(nodes: Any) -> st.SearchStrategy:
    """Parameters with such nodes."""
    return st.recursive(LEAVES, nodes, max_leaves=6).map(lambda tree: {"params": tree})


TREES = trees(nodes)


def check(name: str, shapes: Any, seed: int) -> None:
    """Two steps keep structure, shapes and dtypes, and every number is finite."""
    tx = with_extra_arguments(OPTIMIZERS[name])()
    draw = np.random.default_rng(seed)
    array = lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype)
    params, *gradients = (jax.tree.map(array, shapes) for _ in range(3))
    try:
        jax.eval_shape(tx.init, params)
    except ValueError as error:
        if not re.match("rank must be between 1 and", str(error)):
            raise
        reject()

    @jax.jit
    def train(params: Any, gradients: Any) -> Any:
        state = tx.init(params)
        steps = []
        for g in gradients:
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
            steps.append((params, updates, state))
        return steps

    first, last = train(params, gradients)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, last)
    for tree in last[:2]:
        chex.assert_trees_all_equal_shapes_and_dtypes(tree, params)
    for x in jax.tree.leaves(last):
        assert not jnp.issubdtype(x.dtype, jnp.inexact) or bool(jnp.isfinite(x).all())
    assert memopt.state_bytes(tx, params).total >= 0


def examples(count: int) -> Any:
    """The settings for so many examples, which are always the same."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


@examples(10)
@given(name=st.sampled_from(sorted(OPTIMIZERS)), shapes=TREES, seed=st.integers(0, 99))
def test_a_random_tree_is_trained(name, shapes, seed):
    check(name, shapes, seed)


@pytest.mark.slow
@examples(500)
@given(name=st.sampled_from(sorted(OPTIMIZERS)), shapes=TREES, seed=st.integers(0, 99))
def test_five_hundred_random_trees_are_trained(name, shapes, seed):
    check(name, shapes, seed)


@pytest.mark.integrations
@examples(100)
@given(st.data())
def test_random_trees_with_equinox_modules_are_trained(data):
    import equinox

    class Linear(equinox.Module):
        weight: Any
        bias: Any

    with_modules = lambda children: st.one_of(
        nodes(children), st.builds(Linear, children, children)
    )
    name = data.draw(st.sampled_from(sorted(OPTIMIZERS)))
    check(name, data.draw(trees(with_modules)), data.draw(st.integers(0, 99)))
