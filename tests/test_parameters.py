"""Kinds and axes of parameters, by names, boxes and modules."""

import warnings
from fnmatch import fnmatch

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx

import memopt
from memopt import Matrix
from memopt.matrices import map_matrices
from memopt.names import LIBRARIES, split_layer, words
from memopt.parameters import init_shapes, known, read_parameters
from memopt.state.describe import _SAID
from memopt.training.release.per_parameter_update import PerParameterUpdate
from tests.clients.trees import CLIENTS
from tests.optimizers.kinds import slow_unless


def shapes(tree):
    is_shape = lambda x: isinstance(x, tuple)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, "float32"), tree, is_leaf=is_shape)


def read(tree):
    return {p.name: p for p in read_parameters(tree)}


def boxed(shape, *names):
    return nnx.Param(jnp.ones(shape), out_sharding=names, eager_sharding=False)


ATTENTION = {
    "query": {"kernel": (64, 8, 16), "bias": (8, 16)},
    "key": {"kernel": (64, 2, 16)},
    "out": {"kernel": (8, 16, 64)},
}


def test_attention_kernels_are_the_matrices_of_their_heads():
    found = read(shapes({"attn": ATTENTION}))
    assert found["attn/query/kernel"].matrix == Matrix(0, (1, 2))
    assert found["attn/key/kernel"].matrix == Matrix(0, (1, 2))
    assert found["attn/out/kernel"].matrix == Matrix((0, 1), 2)
    assert found["attn/query/bias"].kind == "vector"


@pytest.mark.parametrize("axis", [0, 1])
def test_scanned_attention_kernels(axis):
    """With the layers' axis first, as Flax has it, or second, as MaxText."""
    stack = lambda s: (*s[:axis], 5, *s[axis:])
    block = {
        "attn": {part: {"kernel": stack(x["kernel"])} for part, x in ATTENTION.items()},
        "mlp": {"wi": {"kernel": stack((64, 96))}, "wo": {"kernel": stack((96, 64))}},
    }
    found = read(shapes({"layers": block}))
    expected = {
        "layers/attn/query/kernel": ((64, 8, 16), (0, (1, 2))),
        "layers/attn/out/kernel": ((8, 16, 64), ((0, 1), 2)),
        "layers/mlp/wi/kernel": ((64, 96), (0, 1)),
        "layers/mlp/wo/kernel": ((96, 64), (0, 1)),
    }
    for name, (shape, axes) in expected.items():
        array = np.arange(np.prod(shape)).reshape(shape)
        one = map_matrices(lambda x, a: x.to_matrices(a), array, matrices=Matrix(*axes))
        layers = np.stack([array] * 5, axis)
        matrix = found[name].matrix
        all_ = map_matrices(lambda x, a: x.to_matrices(a), layers, matrices=matrix)
        np.testing.assert_array_equal(all_, np.stack([one] * 5))


def test_stacked_dense_kernels_stay_what_they_are():
    kernel = {"kernel": (4, 64, 64)}
    blocks = {"attn": {"q": kernel, "k": kernel, "v": kernel, "o": kernel}}
    blocks |= {"experts": {"w1": (4, 3, 64, 96)}}
    assert {p.matrix for p in read_parameters(shapes({"blocks": blocks}))} == {Matrix()}


def test_layers_as_many_as_columns_are_told_by_their_norms():
    kernel = {"kernel": (16, 16, 16)}
    blocks = {"attn": {"q": kernel, "o": kernel}}
    with pytest.warns(UserWarning, match="may be a stack of matrices"):
        memopt.apollo_mini(1e-2).init(jax.tree.map(jnp.zeros, blocks, is_leaf=is_shape))
    found = read(shapes({"blocks": blocks | {"norm": {"scale": (16, 16)}}}))
    assert found["blocks/attn/q/kernel"].matrix == Matrix()
    assert found["blocks/attn/q/kernel"].doubt == ""


def is_shape(x):
    return isinstance(x, tuple)


@pytest.mark.parametrize(
    ("name", "shape", "matrix"),
    [
        ("conv/kernel", (3, 3, 3, 8), Matrix((0, 1, 2), 3)),
        ("Conv_0/kernel", (5, 16, 8), Matrix((0, 1), 2)),
        ("conv2_d/w", (3, 3, 3, 8), Matrix((0, 1, 2), 3)),
        ("conv1/weight", (8, 3, 3, 3), Matrix(0, (1, 2, 3))),
        ("conv/kernel", (3, 3, 1, 8), None),
    ],
)
def test_convolutions(name, shape, matrix):
    assert read(shapes({name: shape}))[name].matrix == matrix


def test_what_is_in_doubt_is_warned_about_once_with_what_settles_it():
    params = {"attn": {"query": {"kernel": jnp.ones((64, 8, 16))}}}
    with pytest.warns(UserWarning, match="query/kernel") as caught:
        memopt.apollo_mini(1e-2).init(params)
    (warning,) = caught
    code = f"{warning.message}".partition("by matrices=")[2].partition(", or with")[0]
    matrices = eval(code, {"memopt": memopt})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memopt.apollo_mini(1e-2, matrices=matrices).init(params)
        assert (
            "but no output beside"
            in memopt.describe(optax.sgd(1.0), params)["attn/query/kernel"].why
        )


def test_names_of_axes_come_before_modules_and_after_matrices():
    params = {"q": boxed((64, 8, 16), "layers", "embed", "mlp"), "o": jnp.ones((8, 16, 64))}
    assert read(params)["q"].matrix == Matrix(1, 2)
    low = lambda tx: tx.init(params)[0]["matrices"].inner_state[0].inner.mu["q"].shape
    assert low(memopt.apollo_mini(1e-2)) == (64, 1, 16)
    axes = {"q": Matrix(0, (1, 2)), "o": Matrix((0, 1), 2)}
    assert low(memopt.apollo_mini(1e-2, matrices=axes)) == (1, 128)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=slow_unless(name in ("apollo_mini", "muon")))
        for name in ("adafactor", "apollo_mini", "galore", "muon")
    ],
)
def test_axes_named_at_init_are_known_once_the_boxes_are_open(name):
    """`nnx.Optimizer` opens them between `init` and `update`."""

    class Model(nnx.Module):
        def __init__(self):
            self.wi = boxed((64, 3, 96), "embed", "layers", "mlp")

    model, flat = Model(), {"wi": jnp.ones((3, 64, 96))}
    tx = memopt.optimizer(name, 1e-2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    draw = np.random.default_rng(0).normal
    state, expected = tx.init(flat), flat
    for _ in range(2):
        g = jnp.asarray(draw(size=(3, 64, 96)), "float32")
        gradients = nnx.State({"wi": nnx.Param(jnp.swapaxes(g, 0, 1))})
        optimizer.update(model, gradients)
        updates, state = tx.update({"wi": g}, state, expected)
        expected = optax.apply_updates(expected, updates)
    found = jnp.swapaxes(model.wi.get_value(), 0, 1)
    np.testing.assert_allclose(found, expected["wi"], rtol=1e-5, atol=1e-6)


def test_a_head_is_known_by_the_vocabulary_if_by_no_name():
    layers = {"linear": {"w": (64, 96)}, "linear_1": {"w": (96, 64)}}
    params = {"embed": {"embeddings": (512, 64)}, **layers, "linear_2": {"w": (64, 512)}}
    found = read(shapes(params))
    assert found["linear_2/w"].kind == "head"
    assert found["linear/w"].kind == "matrix"
    wide = {"up": {"w": (64, 512)}, "down": {"w": (512, 64)}}  # an MLP as wide as the vocabulary
    assert read(shapes(params | wide))["linear_2/w"].kind == "matrix"


def test_numbers_of_dimensions_do_in_place_of_a_matrix():
    params = jax.tree.map(jnp.ones, {"q": (64, 4, 16), "o": (4, 16, 64)}, is_leaf=is_shape)
    numbers = {
        "q": optax.contrib.MuonDimensionNumbers((0,), (1, 2)),
        "o": optax.contrib.MuonDimensionNumbers((0, 1), (2,)),
    }
    tx = memopt.apollo_mini(1e-2, matrices=numbers)
    assert memopt.state_bytes(tx, params)["q"] == memopt.state_bytes(tx, params)["o"] == 516


def test_out_in_is_the_other_orientation():
    params = {"up": {"weight": jnp.ones((256, 64))}, "norm": {"weight": jnp.ones(64)}}
    turned = jax.tree.map(lambda x: x.T, params)
    tx = memopt.muon(1.0)
    expected, _ = tx.update(turned, tx.init(turned), turned)
    tx = memopt.muon(1.0, matrices=memopt.out_in)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["up"]["weight"], expected["up"]["weight"].T, atol=1e-5)
    plain = memopt.muon(1.0)
    smaller, _ = plain.update(params, plain.init(params), params)
    ratio = updates["up"]["weight"] / smaller["up"]["weight"]
    np.testing.assert_allclose(ratio, 2.0, rtol=1e-4)  # √max(1, out/in)


def test_out_in_selects_what_a_method_selects():
    """Adafactor factors embeddings too; a subspace of them would not be one of hidden matrices."""
    params = {"embedding": {"weight": jnp.ones((96, 16))}, "up": {"weight": jnp.ones((32, 16))}}
    for make in (memopt.adafactor, memopt.apollo_mini, memopt.sm3):
        plain, turned = (
            memopt.state_bytes(make(1e-2, matrices=m), params)["embedding/weight"]
            for m in (None, memopt.out_in)
        )
        assert turned == plain


def test_layers_may_be_taken_one_by_one():
    """A released step makes updates of attention kernels as `tx.update` would."""
    block = {part: {"kernel": (3, *x["kernel"])} for part, x in ATTENTION.items()}
    params = jax.tree.map(jnp.ones, {"blocks": {"attn": block}}, is_leaf=is_shape)
    tx = memopt.adafactor(1e-2)
    per_parameter = PerParameterUpdate(tx, params, [True] * 3)
    assert [x.shape for x in jax.tree.leaves(tx.init(params)[0].rows)] == [
        (3, 64),
        (3, 8, 16),
        (3, 64),
    ]
    assert per_parameter.axes.count(0) == 6


def test_state_of_attention_kernels_follows_their_axes():
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    place = lambda s, *spec: jax.ShapeDtypeStruct(
        s, "float32", sharding=jax.NamedSharding(mesh, jax.P(*spec))
    )
    params = {"query": place((64, 8, 16), "a", "b"), "out": place((8, 16, 64), "b", None, "a")}
    places = memopt.state_sharding(memopt.adafactor(1e-2), params)
    assert places[0].rows["query"].spec == jax.P("a")
    assert places[0].cols["query"].spec == jax.P("b", None)
    assert places[0].rows["out"].spec == jax.P("b", None)


def test_a_description_is_of_what_the_optimizer_does():
    params = {"attn": ATTENTION, "embed": {"embedding": (512, 64)}, "odd": {"kernel": (64, 32)}}
    selection = lambda name, leaf: None if "odd" in name else memopt.hidden_matrices(name, leaf)
    found = memopt.describe(memopt.galore(1e-2, rank=4, matrices=selection), shapes(params))
    assert found["attn/out/kernel"].axes == "rows 0 1, cols 2"
    assert found["attn/out/kernel"].kept_by == ("in_subspace", "scale_by_adam")
    assert found["embed/embedding"].kind == "embedding"
    assert found["embed/embedding"].kept_by == ("scale_by_adam",)
    assert (found["odd/kernel"].kind, found["odd/kernel"].why) == ("rest", _SAID)
    assert found["attn/query/bias"].kind == "vector"
    assert memopt.describe(memopt.adafactor(1e-2), shapes(params))["embed/embedding"].axes
    table = memopt.state_bytes(memopt.galore(1e-2, rank=4, matrices=selection), shapes(params))
    assert {row.name: row.state for row in found.rows} == dict(table.states)
    text = str(found)
    assert all(row.name in text for row in found.rows)


def test_a_description_says_what_an_optimizer_refuses():
    found = memopt.describe(memopt.apollo(1e-2, rank=100), shapes({"w": (64, 32)}))
    assert found["w"].state is None
    assert "refused: rank must be between 1 and 32" in str(found)


def test_descriptions_do_not_depend_on_what_was_traced_before():
    params = shapes({"attn": ATTENTION})
    tx = memopt.apollo_mini(1e-2)
    memopt.state_bytes(tx, params)
    first, second = memopt.describe(tx, params), memopt.describe(tx, params)
    assert first == second
    assert first["attn/out/kernel"].axes == "rows 0 1, cols 2"


def test_shapes_are_those_of_the_parameters_as_they_are_known():
    """Though JAX has traced the same function of the same shapes before."""
    params, tx = shapes({"attn": ATTENTION}), memopt.adafactor(1e-2)
    cols = lambda: init_shapes(tx.init, params)[0].cols["attn"]["query"]["kernel"].shape
    assert cols() == (8, 16)
    with known([p._replace(matrix=Matrix()) for p in read_parameters(params) if p.matrix]):
        assert cols() == (64, 16)


def test_parts_of_a_partition_see_the_whole_tree():
    """The norms, and a kernel that `matrices` leaves out, tell how the others are to be read."""
    kernel, norm = {"kernel": (16, 16, 16)}, {"scale": (16, 16)}
    params = shapes({"blocks": {"attn": {"q": kernel, "o": kernel}, "norm": norm}})
    tx = memopt.apollo_mini(1e-2)
    low = tx.init(params).inner_states["matrices"].inner_state[0].inner.mu
    assert low["blocks"]["attn"]["q"]["kernel"].shape == (16, 1, 16)

    params = shapes({"attn": ATTENTION})
    all_but_out = lambda name, leaf: None if "out" in name else memopt.hidden_matrices(name, leaf)
    tx = memopt.apollo_mini(1e-2, matrices=all_but_out)
    low = tx.init(params).inner_states["matrices"].inner_state[0].inner.mu
    assert low["attn"]["query"]["kernel"].shape == (1, 128)
    assert memopt.describe(tx, params)["attn/query/kernel"].state == (2 * 128 + 1) * 4


def test_axis_names_are_remembered_for_their_own_tree():
    """A model without boxes is not read by those of another, though a leaf is called alike."""
    memopt.muon(1.0).init({"wi": boxed((8, 8, 8), "embed", "layers", "mlp"), "norm": jnp.ones(8)})
    bare = {"wi": jnp.ones((8, 8, 8)), "bias": jnp.ones(8)}
    assert read(bare)["wi"].matrix == Matrix()


def test_every_pattern_of_a_name_is_needed():
    """It matches a part of a client's name, and no other pattern of its kind does."""
    parts = {words(p) for c in CLIENTS.values() for name in c.leaves for p in name.split("/")}
    idle = []
    for kind in {kind for library in LIBRARIES.values() for kind in library}:
        patterns = [p for names in LIBRARIES.values() for p in names.get(kind, "").split()]
        assert len(patterns) == len(set(patterns))
        for pattern in patterns:
            others = [p for p in patterns if p != pattern]
            mine = {part for part in parts if fnmatch(part, pattern)}
            if not any(not any(fnmatch(part, p) for p in others) for part in mine):
                idle.append((kind, pattern))
    assert not idle


def test_parts_of_staggered_refreshes_see_the_whole_tree():
    params = shapes({"attn": ATTENTION, "mlp": {"up": (64, 128), "down": (128, 64)}})
    found = []
    for phases in (0, (0, 50)):
        basis, lift = memopt.projectors.gaussian(2), memopt.recombine.lift()
        tx = memopt.in_subspace(optax.scale_by_adam(), basis, lift, refresh_phase=phases)
        found.append({row.name: (row.axes, row.why) for row in memopt.describe(tx, params).rows})
    assert found[0] == found[1]


def test_matrices_may_be_made_from_boxed_parameters():
    params = {"up": boxed((8, 16), "embed", "mlp"), "bias": boxed((16,), "mlp")}
    matrices = jax.tree.map(lambda x: Matrix([0], [1]) if x.ndim == 2 else None, params)
    tx = memopt.galore(1e-2, rank=2, matrices=matrices)
    assert memopt.describe(tx, params)["up"].kept_by == ("in_subspace", "scale_by_adam")


def test_a_function_of_parameters_is_no_selection():
    """Optax's Muon takes such a function."""
    with pytest.raises(ValueError, match="function of a name and a parameter"):
        memopt.muon(1.0, matrices=lambda params: params).init({"w": jnp.ones((4, 8))})


def test_names_are_unique():
    params = {"a/b": jnp.ones((4, 8)), "a": {"b": jnp.ones((4, 8, 2))}}
    with pytest.raises(ValueError, match="two leaves of the same name, got 'a/b'"):
        memopt.adafactor(1e-2).init(params)


def test_a_leaf_that_is_no_array_is_named():
    """An Equinox model has its activation functions among its leaves."""
    params = {"layer": {"kernel": jnp.ones((4, 8)), "activation": jax.nn.relu}}
    with pytest.raises(TypeError, match="arrays only, got a custom_jvp at 'layer/activation'"):
        memopt.adafactor(1e-2).init(params)


def test_layers_are_warned_about_together():
    layer = {"query": {"kernel": (64, 8, 16)}, "value": {"kernel": (64, 8, 16)}}
    params = shapes({"layers": [{"mha": layer} for _ in range(3)]})
    with pytest.warns(UserWarning, match="no output beside") as caught:
        memopt.apollo_mini(1e-2).init(params)
    assert len(caught) == 1


def test_other_names_for_the_same_axes_are_warned_about():
    shape = (8, 6, 10)
    read({"w": boxed(shape, "embed", "layers", "mlp"), "other": jnp.ones(3)})
    with pytest.warns(UserWarning, match="had other names before"):
        read({"w": boxed(shape, "layers", "embed", "mlp"), "other": jnp.ones(3)})


def test_a_description_needs_no_mesh_in_scope():
    mesh = jax.make_mesh((8,), ("fsdp",))  # of Explicit axes
    place = jax.NamedSharding(mesh, jax.P("fsdp"))
    params = jax.device_put(jax.tree.map(jnp.ones, {"up": (64, 32)}, is_leaf=is_shape), place)
    assert memopt.describe(memopt.galore(1e-2, rank=4), params)["up"].state == 4 * (
        2 * 4 * 64 + 4 * 32
    )


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("blocks/mlp/layers/0/weight", ("blocks/mlp/layers/0/weight", None)),
        ("blocks/5/mlp/layers/0/weight", ("blocks/mlp/layers/0/weight", 5)),
        ("blocks/qkv/2", ("blocks/qkv/2", None)),
        ("transformer/0/block1/w", ("transformer/block1/w", 0)),
        ("encoder/block/0/layer/1/w", ("encoder/block/layer/1/w", 0)),
        ("layers_3/w", ("layers/w", 3)),
        ("3", ("3", None)),
    ],
)
def test_only_the_index_of_a_layer_is_left_out_of_a_name(name, split):
    assert split_layer(name) == split


def test_a_wrapper_does_not_hide_the_layout_of_the_optimizer_that_it_wraps():
    params = {"up": {"kernel": jnp.ones((3, 8, 16))}}
    inner = memopt.muon(0.1, matrices=memopt.out_in)
    found = memopt.describe(memopt.hyperball(inner, 0.1), params)["up/kernel"]
    assert found.axes == memopt.describe(inner, params)["up/kernel"].axes
    assert found.axes == "rows 2, cols 1, stack 0"
