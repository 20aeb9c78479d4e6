"""memopt on the trees of other people's libraries, in their boxes and out of them."""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding

import memopt
from memopt.matrices import Layout, map_matrices
from memopt.trees import leaf_name
from tests.clients import trees
from tests.clients.optimizers import METHODS, SOME
from tests.clients.trees import CLIENTS, NamedArray

# One of each kind of box, and of each place of the layers' axis.
KINDS = ("tunix_gemma", "maxtext", "lm1b", "lm1b_partitioned", "levanter_llama")
FEW = ("adafactor", "apollo_mini")


def pairs(quick: Callable[[str, str], bool], clients: Iterable[str] = CLIENTS) -> Any:
    """A client and a method; those that are not quick are tried with ``-m slow``."""
    slow = lambda client, method: [] if quick(client, method) else [pytest.mark.slow]
    return pytest.mark.parametrize(
        ("client", "method"),
        [pytest.param(c, m, marks=slow(c, m)) for c in clients for m in METHODS],
    )


def is_box(x: Any) -> bool:
    return isinstance(x, nnx.Variable | nn.Partitioned | NamedArray)


def contents(box: Any) -> Any:
    """Returns the array in a box, or the empty node that a mask put in its place."""
    if isinstance(box, nnx.Variable):
        return box.get_value()
    return box.array if isinstance(box, NamedArray) else box.value


def opened(tree: Any) -> Any:
    """A tree less its boxes."""
    return jax.tree.map(lambda x: contents(x) if is_box(x) else x, tree, is_leaf=is_box)


def parameter(client: str, path: tuple[Any, ...]) -> str:
    """The name of the parameter to which what stands at a path belongs."""
    name = leaf_name(path)
    if CLIENTS[client].box == "haliax":
        name = name.removesuffix("/0")
    ends = [n for n in CLIENTS[client].leaves if name == n or name.endswith("/" + n)]
    return max(ends, key=len)


@functools.cache
def shapes(client: str) -> Any:
    """The client's tree of shapes, in boxes, a leaf of each kind."""
    return jax.eval_shape(CLIENTS[client].one_of_each().params)


@functools.cache
def state_shapes(client: str, method: str) -> Any:
    return jax.eval_shape(METHODS[method](1e-2).init, shapes(client))


@pytest.mark.parametrize(
    ("client", "name"), [(c, n) for c in CLIENTS for n in CLIENTS[c].leaves], ids=str
)
def test_which_matrix_a_leaf_is(client, name):
    assert_layout(client, name, layouts(client)[name])


def assert_layout(client: str, name: str, layout: Layout) -> None:
    line = CLIENTS[client].leaves[name]
    if isinstance(line.what, str):
        assert not layout.is_matrix, f"{line.what} of shape {line.shape} is {layout}"
        return
    axes = lambda x: x if isinstance(x, tuple) else (x,)
    expected = (axes(line.what.rows), axes(line.what.cols))
    found = (layout.rows, layout.cols)
    if not CLIENTS[client].oriented:
        expected, found = set(expected), set(found)
    assert found == expected


@functools.cache
def layouts(client: str) -> dict[str, Layout]:
    """Returns the layout that memopt uses for each leaf."""
    params = jax.eval_shape(CLIENTS[client].params)
    tree = map_matrices(lambda layout, _: layout, params)
    is_layout = lambda x: isinstance(x, Layout)
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_layout)
    return {parameter(client, path): layout for path, layout in found}


@pairs(lambda client, method: client in KINDS and method in SOME)
def test_only_what_is_shaped_like_its_parameter_stands_in_its_box(client, method):
    state = state_shapes(client, method)
    found = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_box)
    for path, box in found:
        if is_box(box):
            line = CLIENTS[client].leaves[parameter(client, path)]
            assert getattr(contents(box), "shape", line.shape) == line.shape, leaf_name(path)


@pairs(lambda client, method: client == "maxtext")
def test_update_of_shapes(client, method):
    """In boxes all the while, and opened after `init` as by `nnx.Optimizer` and MaxText."""
    params, state = shapes(client), state_shapes(client, method)
    update = METHODS[method](1e-2).update
    for view in (lambda tree: tree, opened):
        updates, after = jax.eval_shape(update, view(params), view(state), view(params))
        assert jax.tree.structure(updates) == jax.tree.structure(view(params))
        assert jax.tree.structure(after) == jax.tree.structure(view(state))
        for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)


@pairs(lambda client, method: method in (SOME if client == "maxtext" else FEW), KINDS)
def test_boxes_change_no_number(client, method):
    """An update is the same program, down to its constants."""
    params, state = shapes(client), state_shapes(client, method)
    update = METHODS[method](1e-2).update
    boxed, bare = (
        jax.make_jaxpr(update)(*map(view, (params, state, params)))
        for view in (lambda tree: tree, opened)
    )
    assert without_addresses(boxed) == without_addresses(bare)
    for x, y in zip(boxed.consts, bare.consts, strict=True):
        np.testing.assert_array_equal(x, y)


def without_addresses(program: Any) -> str:
    return re.sub(r"0x[0-9a-f]+", "", str(program))


@pairs(lambda client, method: client == "maxtext", KINDS)
def test_tree_map_params(client, method):
    state = state_shapes(client, method)
    tx = METHODS[method](1e-2)
    same = optax.tree_map_params(tx, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    assert jax.tree.leaves(same) == jax.tree.leaves(state)


@functools.cache
def placed(client: str) -> Any:
    """The client's tree of shapes on a mesh, each split where an axis divides."""
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    sizes = dict(mesh.shape)

    def place(x: Any) -> Any:
        free, spec = list(sizes), []
        for length in x.shape:
            fits = [name for name in free if length % sizes[name] == 0]
            spec.append(fits[0] if fits else None)
            free = [name for name in free if name not in spec]
        sharding = NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, shapes(client))


@pairs(lambda client, method: client in KINDS and method in FEW)
def test_state_sharding(client, method):
    places = memopt.state_sharding(METHODS[method](1e-2), placed(client))
    state = state_shapes(client, method)
    for place, x in zip(jax.tree.leaves(places), jax.tree.leaves(state), strict=True):
        place.shard_shape(x.shape)  # raises where an axis does not divide
    assert any(tuple(place.spec) for place in jax.tree.leaves(places)) or method == "lomo"


@pytest.mark.parametrize("client", ["levanter_llama"])
def test_named_arrays_check_their_axes(client):
    """The constructor checks them, as in Haliax; unflattening a tree does not."""
    array = jax.tree.leaves(CLIENTS[client].params(), is_leaf=is_box)[0]
    with pytest.raises(ValueError, match="does not have the axes"):
        NamedArray(array.array[0], array.axes)
    assert jax.tree.map(lambda x: x[0], array).array.ndim == array.array.ndim - 1


def test_every_kind_of_box_is_tried():
    assert {CLIENTS[name].box for name in KINDS} == set(trees.BOXES) - {"bare"}
