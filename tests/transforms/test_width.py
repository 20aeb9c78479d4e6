"""Roles, learning rates and initial scales of wider models."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding

import memopt
from memopt.models import llama
from memopt.training.release.per_parameter_update import PerParameterUpdate
from memopt.transforms import width
from tests.training.nano import NANO

# The learning rates' exponents c of embeddings, hidden matrices and readouts.
TABLE = {
    ("standard", "full"): (0, 1, 1),
    ("standard", "none"): (0, 1 / 2, 1 / 2),
    ("ntk", "full"): (0, 1 / 2, 1 / 2),
    ("ntk", "none"): (0, 0, 0),
    ("mup", "full"): (1 / 2, 1, 1 / 2),
    ("mup", "none"): (1 / 2, 1 / 2, 0),
    ("mean_field", "full"): (0, 1 / 2, 0),
    ("mean_field", "none"): (0, 0, -1 / 2),
}
LAYERS, VOCABULARY, GROWTH = 3, 12, 4
EMBEDDINGS, READOUTS = ("embed/embedding", "blocks/norm/scale", "first"), ("head/kernel", "last")


def shapes(d, layers=LAYERS):
    kernels = {
        "q": (layers, d, d // 4, 4),
        "o": (layers, d // 4, 4, d),
        "up": (layers, d, 3 * d),
        "down": (layers, 3 * d, d),
    }
    return {
        "embed": {"embedding": (VOCABULARY, d)},
        "blocks": {name: {"kernel": shape} for name, shape in kernels.items()}
        | {"norm": {"scale": (layers, d)}},
        "first": (1, d),
        "last": (d, 1),
        "head": {"kernel": (d, VOCABULARY), "bias": (VOCABULARY,)},
    }


def draw(d, seed=0, dtype=jnp.float32):
    normal = np.random.default_rng(seed).normal
    return jax.tree.map(
        lambda s: jnp.asarray(normal(size=s), dtype),
        shapes(d),
        is_leaf=lambda x: isinstance(x, tuple),
    )


BASE, WIDE = draw(8), draw(8 * GROWTH)


def scaled(tx, updates):
    return tx.update(updates, tx.init(updates))[0]


def factors(tx, updates):
    """The factor of each update, by name."""
    ratio = jax.tree.map(lambda a, b: float((a / b).mean()), scaled(tx, updates), updates)
    return {memopt.trees.leaf_name(path): x for path, x in jax.tree.leaves_with_path(ratio)}


def test_roles_are_found_from_shapes():
    roles = memopt.width_roles(WIDE, BASE)
    hidden = {f"blocks/{name}/kernel" for name in ("q", "o", "up", "down")}
    expected = (
        dict.fromkeys(hidden, "hidden")
        | dict.fromkeys(EMBEDDINGS, "embedding")
        | dict.fromkeys(READOUTS, "readout")
        | {"head/bias": "fixed"}
    )
    assert {name: found.role for name, found in roles.items()} == expected
    assert {found.growth for found in roles.values()} == {GROWTH, 1.0}
    assert memopt.width_roles(BASE, BASE, wider=WIDE) == {
        name: memopt.WidthRole(role, 1.0) for name, role in expected.items()
    }


@pytest.mark.parametrize(("name", "alignment"), TABLE)
def test_learning_rates_are_those_of_the_table(name, alignment):
    tx = memopt.scale_by_width(name, BASE, alignment=alignment)
    table = dict(zip(width.ROLES, TABLE[name, alignment], strict=True)) | {"fixed": 0}
    for leaf, factor in factors(tx, WIDE).items():
        role = memopt.width_roles(WIDE, BASE)[leaf].role
        np.testing.assert_allclose(factor, np.float64(GROWTH) ** -table[role], rtol=1e-6)


@pytest.mark.parametrize("name", width.PARAMETERIZATIONS)
@pytest.mark.parametrize("multipliers", [True, False])
def test_it_is_the_identity_at_the_base_width(name, multipliers):
    tx = memopt.scale_by_width(name, BASE, multipliers=multipliers)
    chex.assert_trees_all_equal(scaled(tx, BASE), BASE)
    initial = memopt.scale_initial_by_width(BASE, BASE, name, multipliers=multipliers)
    chex.assert_trees_all_equal(initial, BASE)


@pytest.mark.parametrize("name", width.PARAMETERIZATIONS)
def test_a_model_without_multipliers_trains_as_the_one_with_them(name):
    """Three layers, in float64: W is used as n^-a W, or multipliers=False."""
    inputs = np.random.default_rng(1).normal(size=(5, 2))
    exponents = memopt.width_exponents(name)

    @functools.partial(jax.jit, static_argnums=0)
    def run(multipliers):
        used = exponents if multipliers else dict.fromkeys(exponents, width.Exponents(0, 0, 0))

        def apply(params, n):
            x = inputs
            for role in width.ROLES:
                x = jnp.tanh(x @ params[role] * float(n) ** -used[role].a)
            return x

        size = lambda n: {"embedding": (2, n), "hidden": (n, n), "readout": (n, 3)}
        normal = np.random.default_rng(0).normal
        params = {role: jnp.asarray(normal(size=s)) for role, s in size(32).items()}
        base = {role: jnp.ones(s) for role, s in size(1).items()}
        params = memopt.scale_initial_by_width(params, base, name, multipliers=multipliers)
        tx = optax.chain(
            memopt.scale_by_adam_atan2(),
            memopt.scale_by_width(name, base, multipliers=multipliers),
            optax.scale_by_learning_rate(0.1),
        )
        state, outputs = tx.init(params), [apply(params, 32)]
        for _ in range(4):
            grads = jax.grad(lambda p: jnp.square(apply(p, 32) - 0.5).sum())(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            outputs.append(apply(params, 32))
        return jnp.stack(outputs)

    with jax.enable_x64(True):
        with_them, without = np.asarray(run(True)), np.asarray(run(False))
    np.testing.assert_allclose(with_them, without, rtol=1e-9)
    assert np.abs(with_them[-1] - with_them[0]).max() > 1e-2


def test_constants_multiply_roles_and_need_a_wider_model_at_the_base_width():
    gammas = width.MUP_ADAM_CONSTANTS
    tx = memopt.scale_by_width("mup", BASE, constants=list(gammas), wider=WIDE)
    named = dict(zip(width.ROLES, gammas, strict=True)) | {"fixed": 1.0}
    for leaf, factor in factors(tx, BASE).items():
        np.testing.assert_allclose(
            factor, named[memopt.width_roles(WIDE, BASE)[leaf].role], rtol=1e-5
        )
    with pytest.raises(ValueError, match="wider must be given with constants"):
        scaled(memopt.scale_by_width("mup", BASE, constants=gammas), BASE)


def test_stacked_layers_are_separate_layers():
    def separate(tree):
        layers = [jax.tree.map(lambda x, i=i: x[i], tree["blocks"]) for i in range(LAYERS)]
        return tree | {"blocks": layers}

    tx = lambda base: memopt.scale_by_width("mup", base)
    found = separate(scaled(tx(BASE), WIDE))
    chex.assert_trees_all_equal(found, scaled(tx(separate(BASE)), separate(WIDE)))


def test_a_released_step_scales_layers_one_at_a_time():
    up, base = (tree["blocks"]["up"]["kernel"] for tree in (WIDE, BASE))
    tx = memopt.scale_by_width("standard", base)
    update, _ = PerParameterUpdate(tx, up, [True]).update(0, up[:1], up[:1], [], (0.0, 0.0, 0))
    chex.assert_trees_all_equal(update, scaled(tx, up)[:1])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_is_unsharded(axis_type):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type, axis_type))
    wide = WIDE["blocks"]["up"]["kernel"], WIDE["embed"]["embedding"]
    base = BASE["blocks"]["up"]["kernel"], BASE["embed"]["embedding"]
    tx = memopt.scale_by_width("mup", base)
    places = tuple(NamedSharding(mesh, jax.P(*spec)) for spec in ((None, "a", "b"), ("b", "a")))
    with jax.set_mesh(mesh):
        found = jax.jit(lambda u: scaled(tx, u))(jax.device_put(wide, places))
    assert all(x.sharding.is_equivalent_to(s, x.ndim) for x, s in zip(found, places, strict=True))
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(scaled(tx, wide)))


def test_state_beside_it_is_sharded_as_without_it():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    place = NamedSharding(mesh, jax.P("a", "b"))
    shape = lambda *s: jax.ShapeDtypeStruct(s, "float32", sharding=place)
    tree = lambda d: {"embed": shape(16, d), "up": shape(d, 2 * d), "head": shape(d, 16)}
    factors = memopt.scale_by_factored_matrix_rms()
    both = optax.chain(factors, memopt.scale_by_width("mup", tree(8), wider=tree(16)))
    [found, _] = memopt.state_sharding(both, tree(8))
    assert found == memopt.state_sharding(factors, tree(8))


def test_missing_masked_and_narrow_leaves():
    tx = memopt.scale_by_width("standard", BASE)
    whole = scaled(tx, WIDE)
    frozen = WIDE | {"embed": None, "first": optax.MaskedNode()}
    assert scaled(tx, frozen)["embed"] is None
    chex.assert_trees_all_equal(scaled(tx, frozen)["blocks"], whole["blocks"])
    labels = {name: "a" if name == "blocks" else "b" for name in WIDE}
    parts = optax.partition({"a": tx, "b": memopt.scale_by_width("standard", BASE)}, labels)
    chex.assert_trees_all_equal(scaled(parts, WIDE), whole)
    narrow = scaled(tx, draw(32, dtype=jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("box", [nnx.Param, lambda x: linen.Partitioned(x, (None,) * x.ndim)])
def test_boxes_are_opened_and_refilled(box):
    tx = memopt.scale_by_width("mup", jax.tree.map(box, BASE))
    found = scaled(tx, jax.tree.map(box, WIDE))
    expected = jax.tree.map(box, scaled(memopt.scale_by_width("mup", BASE), WIDE))
    chex.assert_trees_all_equal(found, expected)


def test_kernels_of_outputs_and_inputs():
    """Kernels are (out, in), as in Equinox; embeddings are not."""
    no_tables = lambda name, p: None if p.kind == "embedding" else memopt.out_in(name, p)
    pick = lambda tree: {
        "embedding": tree["embed"]["embedding"],
        "up": {"weight": tree["blocks"]["up"]["kernel"].mT},
        "head": {"weight": tree["head"]["kernel"].T},
    }
    roles = memopt.width_roles(pick(WIDE), pick(BASE), matrices=memopt.out_in)
    assert {name: found.role for name, found in roles.items()} == {
        "embedding": "embedding",
        "up/weight": "hidden",
        "head/weight": "readout",
    }
    with pytest.raises(ValueError, match=r"matrices must give a memopt\.Matrix for 'embedding'"):
        memopt.width_roles(pick(WIDE), pick(BASE), matrices=no_tables)


def of(**shapes):
    return {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("params", "base", "message"),
    [
        (of(w=(8, 8)), of(v=(4, 4)), "base must have every parameter, but it has no 'w'"),
        (of(w=(8, 8)), of(w=(1, 4, 4)), r"'w' has shape \(1, 4, 4\) there"),
        (of(w=(8, 2)), of(w=(4, 4)), r"'w' must be wider or narrower than in base on all sides"),
    ],
)
def test_shapes_of_another_model_are_refused(params, base, message):
    with pytest.raises(ValueError, match=message):
        memopt.width_roles(params, base)


def test_other_arguments_are_refused():
    with pytest.raises(ValueError, match="base must have every parameter"):
        memopt.scale_by_width("mup", of(v=(4, 4))).init(of(w=(4, 4)))
    with pytest.raises(ValueError, match="did you mean 'mup'"):
        memopt.scale_by_width("mups", BASE)
    with pytest.raises(ValueError, match="alignment 'half' is unknown"):
        memopt.scale_by_width("mup", BASE, alignment="half")
    with pytest.raises(
        ValueError, match=r"constants must be three numbers above 0.*got \(1.0, 2.0\)"
    ):
        memopt.scale_by_width("mup", BASE, constants=(1.0, 2.0))
    mixed = of(w=(8, 4))
    with pytest.raises(ValueError, match="all three must be of the same model"):
        memopt.width_roles(mixed, of(w=(4, 4)), wider=of(w=(4, 8)))


def test_llama_starts_as_a_parameterization_says():
    config = lambda d: dataclasses.replace(
        NANO, hidden_size=d, intermediate_size=2 * d, num_heads=d // 8, num_kv_heads=d // 8
    )
    params = jax.jit(lambda: llama.init_params(config(64)))()
    base = llama.abstract_params(config(16))
    std = lambda part: float(part.std()) / 0.02
    for name, powers in {"standard": (0, 0.5, 0.5), "mup": (0, 0.5, 1)}.items():
        found = memopt.scale_initial_by_width(params, base, name, multipliers=False)
        up = found["blocks"]["mlp"]["up"]["kernel"]
        parts = found["embed"]["embedding"], up, found["head"]["kernel"]
        for part, power in zip(parts, powers, strict=True):
            np.testing.assert_allclose(std(part), 4.0**-power, rtol=0.1)
        chex.assert_trees_all_equal(found["final_norm"], params["final_norm"])
