"""Newton–Schulz in batches, dealt out to devices."""

import functools
import math
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType, NamedSharding

import memopt
from memopt.transforms.orthogonalization import _polynomials, _restarts
from tests.yardstick import yardstick

AXIS_TYPES = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
LAYERS = 8
SHAPES = {
    "q": (LAYERS, 64, 64),
    "o": (LAYERS, 64, 64),
    "up": (LAYERS, 64, 128),
    "down": (LAYERS, 128, 64),
}
# A mesh, and of a matrix that reads from the model and of one that writes to it the spec; how many
# times what a device has of the parameters moves, there and back.
ROWS = ({"fsdp": 8}, (None, "fsdp"), (None, None, "fsdp"), 2.4)
BOTH = ({"fsdp": 4, "tensor": 2}, (None, "fsdp", "tensor"), (None, "tensor", "fsdp"), 4.4)
STACK = ({"fsdp": 4, "tensor": 2}, (("fsdp", "tensor"),), (("fsdp", "tensor"),), 4.1)
# Of copies the update is made once and then gathered.
COPIES = ({"data": 2, "fsdp": 4}, (None, "fsdp"), (None, None, "fsdp"), 2.4)
ALL = (
    {"data": 2, "fsdp": 2, "tensor": 2},
    *((None, "fsdp", "tensor"), (None, "tensor", "fsdp"), 4.4),
)
LAYOUTS = {"rows": ROWS, "both": BOTH, "stack": STACK, "copies": COPIES, "all": ALL}


def tree(seed=0, shapes=SHAPES):
    draw = np.random.default_rng(seed)
    return {n: np.asarray(draw.normal(size=s), np.float32) for n, s in shapes.items()}


def places(layout, axis_type):
    sizes, reads, writes, _ = LAYOUTS[layout]
    types = (axis_type,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types)
    spec = lambda name: jax.P(*(writes if name in ("o", "down") else reads))
    return {name: NamedSharding(mesh, spec(name)) for name in SHAPES}


def update(tree, **options):
    return memopt.orthogonalize().update(tree, optax.EmptyState(), **options)[0]


def test_matrices_become_orthogonal():
    for u in update(tree()).values():
        assert ((s := np.linalg.svd(u, compute_uv=False)) > 0.5).mean() > 0.95
        assert s.max() < 1.25


def test_equals_optax():
    """Without Nesterov, of which each has its own: Optax corrects both of its terms."""
    params = {n: x[0] for n, x in tree().items()}
    options = {"nesterov": False, "eps": 1e-8, "weight_decay": 0.1}
    for rms in (None, 0.2):
        ours = memopt.muon(1e-2, **options, consistent_rms=rms)
        theirs = optax.contrib.muon(1e-2, **options, consistent_rms=rms)
        state, other = ours.init(params), theirs.init(params)
        for t in range(3):
            gradients = {n: x[0] for n, x in tree(t + 1).items()}
            found, state = jax.jit(ours.update)(gradients, state, params)
            expected, other = jax.jit(theirs.update)(gradients, other, params)
            chex.assert_trees_all_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("layers", [1, 3, 8])
def test_neither_batches_nor_devices_change_the_numbers(layers):
    shapes = {n: (layers, *s[1:]) for n, s in SHAPES.items()} | {"more": (5, 64, 64), "v": (7,)}
    gradients = tree(shapes=shapes)
    apart = update(gradients, leaf_by_leaf=True)
    chex.assert_trees_all_close(update(gradients), apart, atol=1e-5)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    whole = jax.device_put(gradients, NamedSharding(mesh, jax.P()))
    chex.assert_trees_all_close(jax.device_get(update(whole)), apart, atol=1e-5)


@AXIS_TYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_moves_but_on_the_way_there_and_back(layout, axis_type):
    placed = places(layout, axis_type)
    given = {n: jax.ShapeDtypeStruct(s, "float32", sharding=placed[n]) for n, s in SHAPES.items()}
    with jax.set_mesh(placed["q"].mesh):
        hlo = jax.jit(update, out_shardings=placed).lower(given).compile().as_text()
    moves = re.findall(r"= (.*?) ((?:all|collective|reduce)-[a-z-]+)\(", hlo)
    kinds = {"all-to-all", "collective-permute"} | (
        {"all-gather"} if "data" in placed["q"].mesh.shape else set()
    )
    assert {kind for _, kind in moves} <= kinds
    sizes = [sum(map(numbers, re.findall(r"f32\[([\d,]+)\]", shapes))) for shapes, _ in moves]
    share = sum(math.prod(placed[n].shard_shape(s)) for n, s in SHAPES.items())
    assert share <= sum(sizes) <= LAYOUTS[layout][-1] * share


def test_one_array_is_orthogonalised_as_in_a_tree():
    updates = update(tree())
    for name, g in tree().items():
        np.testing.assert_allclose(memopt.newton_schulz(g), updates[name], atol=1e-5)


def numbers(shape):
    return math.prod(map(int, shape.split(",")))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ns_steps": 0}, "ns_steps must be at least 1, got 0"),
        ({"ns_coeffs": (1.5, -0.5)}, "ns_coeffs must be three numbers"),
        ({"consistent_rms": -1.0}, "consistent_rms must be at least 0"),
        ({"ns_coeffs": "jordon"}, "ns_coeffs 'jordon' is unknown; did you mean 'jordan'"),
        ({"ns_coeffs": "nvidia", "ns_steps": 4}, "ns_steps must be left out"),
        ({"shape_scale": "spectra"}, "shape_scale 'spectra' is unknown; did you mean 'spectral'"),
        ({"shape_scale": "spectral", "consistent_rms": 0.2}, "shape_scale must be left out"),
    ],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        memopt.muon(1e-2, **options)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("jordan", 0.471, 1.202),
        ("polar_express", 0.847, 1.141),
        ("polar_express_1.05", 0.729, 1.124),
        ("you", 0.475, 1.145),
        ("nvidia", 1.000, 1.001),
        ("deepseek", 1.000, 1.001),
    ],
)
def test_published_coefficients_bring_singular_values_from_a_thousandth_up_near_one(
    name, least, most
):
    """The bounds were computed elsewhere, from each set as it was published."""
    s = np.geomspace(1e-3, np.sqrt(0.5), 500)
    matrices = np.stack([np.stack([s, 0 * s], -1), np.stack([0 * s, np.sqrt(1 - s**2)], -1)], -2)
    found = np.diagonal(memopt.newton_schulz(matrices, ns_coeffs=name), axis1=-2, axis2=-1)
    assert found.min() == pytest.approx(least, abs=1e-3)
    assert found.max() == pytest.approx(most, abs=1e-3)


@functools.cache
def gram_table():
    with np.load(Path(yardstick.HERE, "tables", "gram_newton_schulz.npz")) as table:
        return dict(table)


@pytest.mark.parametrize(("recorded", "name"), [("pe", "polar_express_1.05"), ("you", "you")])
def test_gram_form_equals_the_table_of_its_authors(recorded, name):
    """Square matrices, too, which take the ordinary form there and here."""
    table = gram_table()
    matrices = {key[3:]: x for key, x in table.items() if key.startswith("in/")}
    np.testing.assert_allclose(_polynomials(5, name), table[f"coef/{recorded}"], rtol=1e-12)
    for dtype, column, tolerance in ((None, "fp32", 1e-4), (jnp.float16, "fp16", 2e-2)):
        tx = memopt.orthogonalize(ns_coeffs=name, gram=True, dtype=dtype)
        for key, u in tx.update(matrices, optax.EmptyState())[0].items():
            if dtype and key == "square":
                continue  # normalised in float16, not before
            expected = table[f"out/{recorded}/r2/{column}/{key}"]
            assert np.abs(u - expected).max() <= tolerance * np.abs(expected).max(), key


def test_the_gram_matrix_is_formed_anew_where_that_of_its_authors_is():
    steps = _polynomials(5, "polar_express_1.05")
    assert _restarts(steps, jnp.float16) == {2}
    assert _restarts(steps, jnp.float32) == set()
    assert _restarts(_polynomials(10, "jordan"), jnp.float32) == {6}


@pytest.mark.parametrize(("steps", "tolerance"), [(5, 1e-4), (10, 2e-2)])
def test_gram_form_holds_for_matrices_of_low_rank(steps, tolerance):
    """Rounding makes eigenvalues of the Gram matrix negative; ten steps amplify it 10⁵ times."""
    draw = np.random.default_rng(0).normal
    g = np.asarray(draw(size=(24, 2)) @ draw(size=(2, 64)), np.float32)
    plain, gram = (memopt.newton_schulz(g, steps, gram=form) for form in (False, True))
    np.testing.assert_allclose(gram, plain, atol=tolerance)


def test_heads_and_experts_are_orthogonalised_apart_if_matrices_say_so():
    g = tree(shapes={"q": (32, 2, 16), "experts": (2, 32, 16)})
    by_head = {"q": memopt.Matrix(rows=0, cols=2), "experts": memopt.Matrix()}
    found, _ = memopt.orthogonalize(matrices=by_head).update(g, optax.EmptyState())
    one = jax.jit(memopt.newton_schulz)
    for i in range(2):
        np.testing.assert_allclose(found["q"][:, i], one(g["q"][:, i]), atol=1e-5)
        np.testing.assert_allclose(found["experts"][i], one(g["experts"][i]), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "factor"), [("jordan", 1.0), ("moonlight", 0.2 * 8), ("spectral", 0.5)]
)
def test_published_scales_of_a_matrix_of_64_inputs_and_16_outputs(name, factor):
    tx = memopt.scale_by_matrix_shape(shape_scale=name)
    u, _ = tx.update(np.ones((64, 16), np.float32), optax.EmptyState())
    np.testing.assert_allclose(u, factor, rtol=1e-6)


def test_each_step_may_have_a_polynomial_of_its_own():
    same = memopt.orthogonalize(ns_coeffs=[(3.4445, -4.7750, 2.0315)] * 5)
    found, _ = same.update(tree(), optax.EmptyState())
    chex.assert_trees_all_equal(found, update(tree()))
