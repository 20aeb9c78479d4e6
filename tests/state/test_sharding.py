"""Shardings of state: array by array, for Optax's optimizers and for unusual ones."""

import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType, NamedSharding

import memopt
from benchmarks.extra_arguments import with_extra_arguments
from memopt.optimizers.registry import METHODS
from tests.optimizers.kinds import KINDS, slow_unless

AXIS_TYPES = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)


def mesh_of(axis_type=AxisType.Auto):
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type, axis_type))


def abstract(axis_type=AxisType.Auto, **params):
    """Parameters from their shapes and specs."""
    mesh = mesh_of(axis_type)
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in params.items()
    }


def specs(tx, params, **options):
    """{name of a state array: its spec}, with an entry for each axis; and the notes."""
    shardings, notes = memopt.state_sharding(tx, params, explain=True, **options)
    shapes = jax.eval_shape(tx.init, jax.tree.map(lambda p: p.update(sharding=None), params))
    chex.assert_trees_all_equal_structs(shapes, shardings)
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    padded = [(*s.spec, *(None,) * (len(x.shape) - len(s.spec))) for x, s in pairs]
    return dict(zip(notes, padded, strict=True)), notes


# A stack of matrices on both sides of the mesh, square ones, an embedding and a vector.
MODEL = {
    "up": ((4, 128, 512), jax.P(None, "a", "b")),
    "down": ((4, 512, 128), jax.P(None, "b", "a")),
    "square": ((4, 256, 256), jax.P(None, "a", "b")),
    "embed": ((1024, 128), jax.P("b", "a")),
    "norm": ((512,), jax.P("b")),
}
AS_PARAMETERS = {
    "up": (None, "a", "b"),
    "down": (None, "b", "a"),
    "square": (None, "a", "b"),
    "embed": ("b", "a"),
    "norm": ("b",),
}
NO = (None,)


def each(prefix, names, fields=("mu", "nu")):
    """The same places in some fields of a state."""
    return {
        f"{prefix}{field}/{n}".replace("//", "/"): s for field in fields for n, s in names.items()
    }


HIDDEN, REST = ("up", "down", "square"), {n: AS_PARAMETERS[n] for n in ("embed", "norm")}
MATRICES = {n: AS_PARAMETERS[n] for n in HIDDEN}
LOW = {"up": (None, None, "b"), "down": (None, "b", None), "square": (None, None, "b")}
# Where the rank is a fraction of the shorter side, it follows that side, as the basis does.
LOW_BY_SIDE = {"up": (None, "a", "b"), "down": (None, "b", "a"), "square": (None, "a", "b")}
BASES = dict.fromkeys(HIDDEN, (None, "a", None))
ONE_EACH = dict.fromkeys(HIDDEN, NO)
SCALE = {"up": (None, "a", None), "down": (None, "b", None), "square": (None, "a", None)}
SUBSPACE = "inner_states/matrices/inner_state/0/"
BY_ADAM = each("inner_states/rest/inner_state/0/", REST)
FACTORS = {
    **{"rows/up": (None, "a"), "cols/up": (None, "b")},
    **{"rows/down": (None, "b"), "cols/down": (None, "a")},
    **{"rows/square": (None, "a"), "cols/square": (None, "b")},
    **{"rows/embed": ("b",), "cols/embed": ("a",), "cols/norm": ("b",)},
}


def subspace(low=LOW, inner="inner/", bases=(), ones=(), others=()):
    """Adam's moments in a subspace, what a projector and a recombination keep, Adam elsewhere."""
    return (
        each(SUBSPACE, low, (f"{inner}mu", f"{inner}nu"))
        | each(SUBSPACE, BASES, bases)
        | each(SUBSPACE, ONE_EACH, ones)
        | each(SUBSPACE, MATRICES, others)
        | BY_ADAM
    )


with_rank = {
    name: functools.partial(memopt.optimizer, name, 1e-3, rank=8)
    for name, method in METHODS.items()
    if method.has_free_rank
}
EXPECTED = {  # scalars, which are whole everywhere, apart
    "adafactor": (memopt.adafactor(1e-3), each("0/", FACTORS, [""])),
    "adalomo": (memopt.adalomo(1e-3), each("1/", FACTORS, [""])),
    "adam": (optax.adam(1e-3), each("0/", AS_PARAMETERS)),
    "adamw": (optax.adamw(1e-3), each("0/", AS_PARAMETERS)),
    "adopt": (optax.contrib.adopt(1e-3), each("0/", AS_PARAMETERS)),
    "amsgrad": (optax.amsgrad(1e-3), each("0/", AS_PARAMETERS, ("mu", "nu", "nu_max"))),
    "apollo": (with_rank["apollo"](), subspace(ones=["recombine"])),
    "apollo_mini": (memopt.apollo_mini(1e-3), subspace(ones=["recombine"])),
    "fira": (
        with_rank["fira"](),
        subspace(inner="inner/0/", bases=["projector/0"], ones=["recombine"]),
    ),
    "flora": (
        with_rank["flora"](),
        each("0/", FACTORS, [""]) | each("3/inner/", LOW | REST, ["ema"]),
    ),
    "frugal": (memopt.frugal(1e-3), subspace(LOW_BY_SIDE)),
    "galore": (with_rank["galore"](), subspace(bases=["projector/0"])),
    "galore_fraction": (
        memopt.galore(1e-3, rank=0.25),
        subspace(LOW_BY_SIDE, bases=["projector/0"]),
    ),
    "lamb": (optax.lamb(1e-3), each("0/", AS_PARAMETERS)),
    "lars": (optax.lars(1e-3), each("3/", AS_PARAMETERS, ["trace"])),
    "ldadam": (
        with_rank["ldadam"](),
        subspace(bases=["projector/0"], others=["recombine"]),
    ),
    "lion": (memopt.lion(1e-3), each("0/", AS_PARAMETERS, ["mu"])),
    "lomo": (memopt.lomo(1e-3), {}),
    "muon": (memopt.muon(1e-3), each(SUBSPACE, MATRICES, ["trace"]) | BY_ADAM),
    "online_subspace_descent": (
        with_rank["online_subspace_descent"](),
        subspace(bases=("projector/0", "projector/2", "projector/3")),
    ),
    "optax_adafactor": (
        optax.adafactor(1e-3),
        {
            # It reduces over the longest axis first, whichever that is.
            **{"0/v_row/up": (None, "a"), "0/v_col/up": (None, "b"), "0/v/up": NO},
            **{"0/v_row/down": (None, "a"), "0/v_col/down": (None, "b"), "0/v/down": NO},
            # Of equal ones shapes cannot tell.
            **{"0/v_row/square": (None, None), "0/v_col/square": (None, None), "0/v/square": NO},
            **{"0/v_row/embed": ("a",), "0/v_col/embed": ("b",), "0/v/embed": NO},
            **{"0/v_row/norm": NO, "0/v_col/norm": NO, "0/v/norm": ("b",)},
        },
    ),
    "optax_galore": (  # it leaves stacks at Adam's whole moments, and has a basis of the other side
        optax.contrib.galore(1e-3, rank=8),
        each("0/base_optimizer_state/", AS_PARAMETERS | {"embed": (None, "a")})
        | each(
            "0/",
            dict.fromkeys((*HIDDEN, "norm"), (None, None)) | {"embed": ("b", None)},
            ["projector"],
        ),
    ),
    "optax_lion": (optax.lion(1e-3), each("0/", AS_PARAMETERS, ["mu"])),
    "optax_muon": (  # it takes no stacks
        optax.contrib.muon(1e-3),
        each("inner_states/adam/inner_state/0/", MATRICES | {"norm": ("b",)})
        | {
            "inner_states/muon/inner_state/0/mu/embed": ("b", "a"),
            "inner_states/muon/inner_state/0/ns_coeffs": NO,
        },
    ),
    "schedule_free": (
        optax.contrib.schedule_free_adamw(1e-3),
        each("base_optimizer_state/0/", AS_PARAMETERS, ["nu"]) | each("", AS_PARAMETERS, ["z"]),
    ),
    "sgd": (optax.sgd(1e-3), {}),
    "sm3": (
        optax.sm3(1e-3),
        each("0/", AS_PARAMETERS, ["nu"])
        | {f"0/mu/{n}/{i}": (e,) for n, s in AS_PARAMETERS.items() for i, e in enumerate(s)},
    ),
    "soap": (
        memopt.soap(1e-3),
        each(SUBSPACE, MATRICES, ("left", "right", "left_basis", "right_basis"))
        | each(f"{SUBSPACE}inner/", MATRICES)
        | BY_ADAM,
    ),
    "sophia": (
        memopt.optimizer("sophia", 1e-3),
        each("0/", AS_PARAMETERS) | {"0/hessian_fn_state/key": NO},
    ),
    "int8": (
        memopt.quantize_state(optax.scale_by_adam()),
        each("codes/", AS_PARAMETERS)
        | {
            f"scales/0/{field}/{n}": s
            for field in ("mu", "nu")
            for n, s in (SCALE | {"embed": ("b", None)}).items()
        },
    ),
    # 512 numbers over 4 devices are a block of 128 each; 256 over 4 are half a block.
    "int4": (
        memopt.quantize_state(optax.trace(0.9), "int4"),
        each("codes/", AS_PARAMETERS, ["trace"])
        | {
            "scales/0/trace/up": (None, "a", "b"),
            "scales/0/trace/down": (None, "b", None),
            "scales/0/trace/square": (None, "a", None),
            "scales/0/trace/embed": ("b", None),
        },
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_state_of_each_optimizer_is_placed_leaf_by_leaf(name):
    tx, expected = EXPECTED[name]
    found, _ = specs(tx, abstract(**MODEL))
    assert {name: spec for name, spec in found.items() if spec} == expected


@pytest.mark.parametrize("name", memopt.available())
def test_an_array_shaped_like_its_parameter_is_sharded_like_it(name):
    params = abstract(**MODEL)
    tx = memopt.optimizer(name, 1e-3)
    found, _ = specs(tx, params)
    state = jax.eval_shape(tx.init, jax.tree.map(lambda p: p.update(sharding=None), params))
    for (path, spec), x in zip(found.items(), jax.tree.leaves(state), strict=True):
        parameter = path.rpartition("/")[2]
        if name == "mkor" and parameter == "square":
            continue  # its factors are of the same shape
        if parameter in MODEL and x.shape == MODEL[parameter][0]:
            assert spec == AS_PARAMETERS[parameter], path


@pytest.mark.parametrize("name", ["adafactor", "optax_adafactor", "galore", "int8"])
def test_auto_and_explicit_axes_place_state_alike(name):
    tx, params = EXPECTED[name][0], abstract(AxisType.Explicit, **MODEL)
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        assert specs(tx, params) == specs(tx, abstract(**MODEL))


# Whatever decides by comparing lengths must be seen through.
def untranspose_tuples(f):
    """A transformation with what `f` makes of each parameter's shape as its state."""
    zeros = lambda shapes: jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    init = lambda params: jax.tree.map(lambda p: zeros(f(p.shape)), params)
    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


def of_all(f):
    """A transformation whose state is what `f` makes of the parameters."""
    return optax.GradientTransformation(f, lambda updates, state, params=None: (updates, state))


W = {"w": ((64, 128), jax.P("a", "b"))}
SQUARE = {"w": ((64, 64), jax.P("a", "b"))}
CUBE = {"w": ((64, 64, 64), jax.P(None, "b", "a"))}
SHORT_BASIS = lambda s: [(min(s), 4), (4, s[1]) if s[0] <= s[1] else (s[0], 4)]
ODD = {
    "transposed": (lambda s: s[::-1], W, [("b", "a")]),
    "grams": (lambda s: [(n, n) for n in s], W, [("a", "b"), ("a", "b")]),
    "grams where rows are split": (
        lambda s: [(n, n) for n in s],
        {"w": ((64, 128), jax.P(("a", "b")))},
        [(("a", "b"), None)] * 2,
    ),
    "grams where columns are split": (
        lambda s: [(n, n) for n in s],
        {"w": ((64, 128), jax.P(None, "b"))},
        [(None, "b"), ("b", None)],
    ),
    "grams of a stack that is split": (
        lambda s: [(s[0], n, n) for n in s[1:]],
        {"w": ((4, 64, 128), jax.P("a", None, "b"))},
        [("a", None, "b"), ("a", "b", None)],
    ),
    "grams that are not divisible": (
        lambda s: [(s[0], n, n) for n in s[1:]],
        {"w": ((4, 63, 128), jax.P(None, None, "b"))},
        [(None, None, None), (None, "b", None)],
    ),
    "equal axes": (lambda s: (s[2], s[1]), CUBE, [("a", "b")]),
    "as long by chance": (lambda s: (64, 128), W, [(None, None)]),
    "columns of one": (
        lambda s: [(s[0], 1), (1, 1, s[1])],
        SQUARE,
        [("a", None), (None,) * 2 + ("b",)],
    ),
    "raveled": (lambda s: (s[0] * s[1],), W, [("a",)]),
    "shorter": (lambda s: (min(s),), W, [("a",)]),
    "longer": (lambda s: (max(s),), W, [("b",)]),
    "shorter of equal": (lambda s: (min(s),), SQUARE, [NO]),
    "longer of equal": (lambda s: (max(s),), SQUARE, [NO]),
    "shorter side of equal, seen by the other": (SHORT_BASIS, SQUARE, [("a", None), (None, "b")]),
    "beside one that goes by itself": (
        lambda s: [*SHORT_BASIS(s), (s[0] + s[1],)],
        *(SQUARE, [("a", None), (None, "b"), NO]),
    ),
    # Neither longer by a half nor shorter by it leaves everything as it is; by one does.
    "all but the longest axis, and large enough": (
        lambda s: [tuple(np.delete(s, np.argmax(s)).tolist()), (s[1],) if s[1] >= 48 else (1,)],
        {"w": ((40, 48, 56), jax.P(None, "a"))},
        [(None, "a"), ("a",)],
    ),
    "blocks": (lambda s: (s[0], -(-s[1] // 16)), W, [("a", "b")]),
    "blocks across devices": (lambda s: (s[0], -(-s[1] // 64)), W, [("a", None)]),
    "padded blocks": (lambda s: (s[0], -(-s[1] // 24)), W, [("a", None)]),
    "half the rank": (lambda s: (s[0], s[1] // 2), W, [("a", "b")]),
    "root": (lambda s: (math.isqrt(s[0]), s[1]), W, [(None, "b")]),
    "large enough": (
        lambda s: [(s[0],), (s[1],)] if min(s) >= 64 else [s],
        *(W, [("a",), ("b",)]),
    ),
    "just too small": (
        lambda s: [(s[0],), (s[1],), (1,)] if min(s) > 64 else [(1,), (1,), s],
        *(W, [NO, NO, ("a", "b")]),
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_axes_of_a_made_up_state_follow_their_parameter(name):
    f, params, expected = ODD[name]
    found, _ = specs(untranspose_tuples(f), abstract(**params))
    assert list(found.values()) == expected


PAIR = {"x": ((32, 64), jax.P("a", "b")), "y": ((64, 32), jax.P("b", None)), "z": ((8,), jax.P())}


def test_names_and_order_do_not_matter():
    swapped = of_all(lambda p: {"x": jnp.zeros(p["y"].shape), "y": jnp.zeros(p["x"].shape)})
    assert specs(swapped, abstract(**PAIR))[0] == {"x": ("b", None), "y": ("a", "b")}
    listed = of_all(lambda p: [jnp.zeros(x.shape[::-1]) for x in reversed(jax.tree.leaves(p))])
    expected = {"0": NO, "1": (None, "b"), "2": ("b", "a")}
    assert specs(listed, abstract(**PAIR))[0] == expected


def test_many_parameters_are_told_apart():
    params = {f"w{i}": ((8, 16), jax.P("a", "b") if i % 3 else jax.P("b")) for i in range(40)}
    found, _ = specs(
        of_all(lambda p: jax.tree.leaves(jax.tree.map(jnp.zeros_like, p))[::-1]), abstract(**params)
    )
    names = sorted(params)[::-1]  # the order of a dict's leaves, turned round
    assert list(found.values()) == [("a", "b") if int(n[1:]) % 3 else ("b", None) for n in names]


def test_an_init_that_refuses_other_shapes_places_the_others():
    def init(params):
        assert params["x"].shape == (32, 64)
        return jax.tree.map(jnp.zeros_like, params)

    assert specs(of_all(init), abstract(**PAIR))[0] == {
        **{"x": (None, None), "y": ("b", None), "z": NO}
    }


def test_keys_and_numbers_follow_no_parameter():
    def init(params):
        return {"key": jax.random.key(0), "number": 3, "none": None, "w": optax.MaskedNode()}

    assert specs(of_all(init), abstract(**W))[0] == {"key": (), "number": ()}


def test_state_in_wrappers_of_optax_is_placed():
    adam = optax.inject_hyperparams(optax.adam)(1e-3)
    masked = optax.masked(adam, {"x": True, "y": False, "z": True})
    found, _ = specs(optax.MultiSteps(masked, 2).gradient_transformation(), abstract(**PAIR))
    split = {n: s for n, s in found.items() if any(s)}
    assert {n.rpartition("/")[0].rpartition("/")[2] for n in split} == {"mu", "nu", "acc_grads"}
    assert all(s == (("a", "b") if n.endswith("x") else ("b", None)) for n, s in split.items())
    assert len(split) == 4


def test_notes_say_which_axis_follows_which():
    params = abstract(**W, v=((8,), jax.P()), s=((64, 64), jax.P("a", "b")))
    flat = lambda p: jnp.zeros(sum(x.size for x in jax.tree.leaves(p)))
    state = lambda p: {
        "flat": flat(p),
        "gram": jnp.zeros((p["w"].shape[0],) * 2),
        "blocks": jnp.zeros(-(-p["w"].shape[1] // 64)),
        "least": jnp.zeros(min(p["s"].shape)),
        "raveled": jnp.zeros(p["w"].size),
        "v": p["v"],
        "count": jnp.zeros(()),
    }
    _, notes = specs(of_all(state), params)
    assert notes == {
        "flat": "changes with several parameters.",
        "gram": "axes 0 and 1 follow axis 0 of 'w', and are split as its axes are.",
        "blocks": "no axis clearly follows axis 1 of 'w' in 4 equal parts.",
        "least": "no axis clearly follows axis 0 of 's' in 2 equal parts; no axis clearly follows "
        "axis 1 of 's' in 4 equal parts.",
        "raveled": "axis 0 follows axis 0 of 'w' over 'a'; axis 0 follows axis 1 of 'w', but 'a' "
        "splits it already.",
        "v": "follows no split axis of 'v'.",
        "count": "follows no parameter.",
    }


def test_state_is_spread_over_a_further_axis():
    params = abstract(
        m=((4, 16, 32), jax.P(None, "a")),
        tall=((16, 3), jax.P("a")),
        full=((16, 8), jax.P("b", None)),
        v=((30,), jax.P("a")),
    )
    found, notes = specs(optax.trace(0.9), params, spread_over="b")
    assert found == {
        "trace/m": (None, "a", "b"),  # the longest that is whole
        "trace/tall": (("a", "b"), None),  # the one that is split, as no other divides
        "trace/full": ("b", None),  # over it already
        "trace/v": ("a",),
    }
    assert notes["trace/m"].endswith("over 'a'; axis 2 is spread over 'b'.")
    assert notes["trace/v"].endswith("over 'a'; no axis divides by 'b'=4.")
    assert specs(optax.scale_by_adam(), params, spread_over="b")[0]["count"] == ()


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (abstract(**W), {"spread_over": "bb"}, "spread_over 'bb' is unknown; did you mean 'b'?"),
        ({"w": {"x": np.ones(4)}}, {}, "params: 'w/x' has no NamedSharding, it is a numpy array"),
        ({"w": jnp.ones(4)}, {}, r"params: 'w' has no NamedSharding, it is on SingleDevice"),
        ({}, {}, "params has no array"),
        (
            abstract(**W) | {"v": abstract(AxisType.Explicit, v=((4,), jax.P()))["v"]},
            *({}, "params must be on one mesh: 'v' is on"),
        ),
    ],
)
def test_parameters_that_are_not_on_one_mesh_are_refused(params, options, message):
    with pytest.raises(ValueError, match=message):
        memopt.state_sharding(optax.adam(1e-3), params, **options)


SPECS = {"stack": jax.P(None, "a", "b"), "matrix": jax.P("a", "b"), "norm": jax.P("b")}
SHAPES = {"stack": (2, 16, 32), "matrix": (16, 32), "norm": (32,)}
TRANSFORMATIONS = (
    {name: with_extra_arguments(memopt.optimizer)(name, 1e-2) for name in memopt.available()}
    | {
        "optax_galore": optax.contrib.galore(1e-2, rank=4),
    }
    | {
        codec: optax.chain(
            memopt.quantize_state(optax.scale_by_adam(), codec, min_size=200),
            optax.scale_by_learning_rate(1e-2),
        )
        for codec in ("int8", "flash8", "dynamic8")
    }
)
STEPS = 5
OF_DOT_PRODUCTS = ("dadapt_adamw", "mechanic", "momo", "momo_adam", "prodigy")
NOT_EXPLICIT = {
    **dict.fromkeys((*OF_DOT_PRODUCTS, "optax_muon"), "Contracting dimensions are sharded"),
    "optax_galore": "Input 0 to svd must be unsharded",
}
"""Updates of Optax that explicit axes stop, and how; some look at matrices without a stack."""
QUICK = {*KINDS, "optax_muon", "optax_galore", "int8", "adamw", "optax_adafactor"}
"""On a mesh; the others with ``-m slow``."""
EXPLICIT = {"galore", "optax_muon", "optax_galore", "optax_adafactor"}
"""Under explicit axes, where tests/optimizers/test_common.py trains our own of each kind."""


def test_a_state_is_made_of_parameters_on_a_mesh_of_one_device():
    split = NamedSharding(jax.make_mesh((1,), ("a",), devices=jax.devices()[:1]), jax.P(None, "a"))
    params = {"up": jax.device_put(jnp.ones((8, 4)), split)}
    for name in ("galore", "soap", "mkor"):
        memopt.optimizer(name, learning_rate=1e-2).init(params)


def leaves_of(name):
    return ("matrix" if name in NOT_EXPLICIT else "stack", "norm")


def tree(name, seed):
    draw = np.random.default_rng(seed)
    return {n: np.asarray(draw.normal(size=SHAPES[n]), np.float32) for n in leaves_of(name)}


def places(name, axis_type, **others):
    mesh = mesh_of(axis_type)
    return {n: NamedSharding(mesh, (SPECS | others)[n]) for n in leaves_of(name)}


def step_of(tx):
    tx = optax.with_extra_args_support(tx)
    loss = lambda params: sum(jnp.square(p).sum() for p in jax.tree.leaves(params))

    def step(params, state, g):
        updates, state = tx.update(g, state, params, obj_fn=loss, value=loss(params))
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def on_one_device(name):
    tx, params = TRANSFORMATIONS[name], tree(name, 0)
    state, step = jax.jit(tx.init)(params), jax.jit(step_of(tx))
    for t in range(STEPS):
        params, state = step(params, state, tree(name, 100 + t))
    return jax.device_get((params, state))


def check_placed(arrays, shardings):
    """Each lies where it should, in parts of the size that its spec says."""
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x.sharding, arrays), shardings)
    for x in jax.tree.leaves(arrays):
        parts = [
            math.prod(x.sharding.mesh.shape[n] for n in e or ())
            for e in map(names, x.sharding.spec)
        ]
        parts += [1] * (x.ndim - len(parts))
        expected = tuple(n // k for n, k in zip(x.shape, parts, strict=True))
        assert {shard.data.shape for shard in x.addressable_shards} == {expected}


def names(entry):
    return (entry,) if isinstance(entry, str) else entry


def run(name, axis_type, placed, *, auto_axes=False, **options):
    """Parameters and state after some steps on eight devices, both in their places."""
    tx = TRANSFORMATIONS[name]
    params = jax.device_put(tree(name, 0), placed)
    shardings = (placed, memopt.state_sharding(tx, params, **options))
    state = memopt.init_sharded(tx, params, **options)
    check_placed(state, shardings[1])
    step = step_of(tx)
    if auto_axes:
        step = jax.sharding.auto_axes(step, out_sharding=shardings)
    with jax.set_mesh(mesh_of(axis_type)):
        step = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
        for t in range(STEPS):
            params, state = step(params, state, jax.device_put(tree(name, 100 + t), placed))
    check_placed((params, state), shardings)
    return jax.device_get((params, state))


def assert_close(found: Any, expected: Any) -> None:
    """Relative to the largest number of each array; a code may be the one beside."""
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = map(jax.random.key_data, (x, y))
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.abs(x - y).max(initial=0) <= 1e-5 * np.abs(y).max(initial=1e-2)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=slow_unless(n in QUICK)) for n in TRANSFORMATIONS],
)
def test_trains_as_on_one_device(name):
    assert_close(run(name, AxisType.Auto, places(name, AxisType.Auto)), on_one_device(name))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=slow_unless(n in EXPLICIT)) for n in TRANSFORMATIONS],
)
def test_trains_under_explicit_axes(name):
    placed, fails = places(name, AxisType.Explicit), name in NOT_EXPLICIT
    if fails:
        with pytest.raises(Exception, match=NOT_EXPLICIT[name]):
            run(name, AxisType.Explicit, placed)
    assert_close(run(name, AxisType.Explicit, placed, auto_axes=fails), on_one_device(name))


@AXIS_TYPES
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_spread_state_trains_as_on_one_device(name, axis_type):
    placed = places(name, axis_type, stack=jax.P(None, "a"), norm=jax.P())
    # Gradients that are split less than the state have other types of explicit axes.
    auto_axes = axis_type == AxisType.Explicit
    found = run(name, axis_type, placed, auto_axes=auto_axes, spread_over="b")
    assert_close(found, on_one_device(name))


@AXIS_TYPES
def test_state_of_quantised_parameters_is_placed_as_of_dense_ones(axis_type):
    name = "schedule_free"  # whose state begins as the parameters
    placed = places(name, axis_type)
    params = jax.device_put(tree(name, 0), placed)
    with jax.set_mesh(mesh_of(axis_type)):
        stored = jax.jit(memopt.quantize_params)(params)
    state = memopt.init_sharded(TRANSFORMATIONS[name], stored)
    check_placed(state.z, placed)
    chex.assert_trees_all_close(state.z, memopt.dequantize_params(stored), rtol=1e-6)


@AXIS_TYPES
def test_an_init_that_explicit_axes_would_stop(axis_type):
    like = abstract(axis_type, w=((64, 128), jax.P("a", "b")))["w"]
    w = jax.device_put(jnp.ones(like.shape), like.sharding)
    state = memopt.init_sharded(of_all(lambda w: w.T @ w), w)
    assert state.sharding.spec == jax.P("a", "b")
    assert jnp.all(jax.device_get(state) == 64)
