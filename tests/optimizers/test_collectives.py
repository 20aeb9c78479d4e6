"""No optimizer gathers a whole weight, gradient or state on a device, not even at a refresh."""

import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import memopt
from benchmarks import hlo
from memopt import projectors

LAYERS, SHORT, LONG, RANK = 2, 256, 512, 4
SHAPES = {"up": (LAYERS, SHORT, LONG), "down": (LAYERS, LONG, SHORT), "q": (LAYERS, SHORT, SHORT)}
LAYOUTS = {  # as of a LLaMA's kernels
    "fsdp": (
        {"fsdp": 8},
        {"up": (None, "fsdp"), "down": (None, None, "fsdp"), "q": (None, "fsdp")},
    ),
    "both": (
        {"fsdp": 4, "tensor": 2},
        {n: (None, "tensor", "fsdp") if n == "down" else (None, "fsdp", "tensor") for n in SHAPES},
    ),
}
RANKED = ("apollo", "fira", "flora", "galore", "ldadam", "online_subspace_descent")
OURS = [name for name in memopt.available() if hasattr(memopt, name)]
TRANSFORMATIONS = {
    name: memopt.optimizer(name, 1e-3, **({"rank": RANK} if name in RANKED else {}))
    for name in OURS
} | {"adamw_8bit": memopt.quantize_state(optax.adamw(1e-3))}


def collectives(tx, layout, *, refresh):
    """What an update and `apply_updates` do between devices, compiled for eight."""
    sizes, specs = LAYOUTS[layout]
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    shapes = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in SHAPES.items()}
    shardings = {n: NamedSharding(mesh, jax.P(*specs[n])) for n in SHAPES}
    params = jax.tree.map(place, shapes, shardings)
    state_shardings = memopt.state_sharding(tx, params)
    state = jax.tree.map(place, jax.eval_shape(tx.init, shapes), state_shardings)

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        jitted = jax.jit(step, out_shardings=(shardings, state_shardings))
        text = jitted.lower(params, state, params).compile().as_text()
    return hlo.collectives(text, refresh=refresh)


SOME = {(name, "fsdp") for name in ("adafactor", "adamw_8bit", "apollo_mini", "galore", "lion")}
SELECTED = LAYERS * SHORT * LONG // 4  # FRUGAL moves the quarter of the columns that it selects


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (case not in SOME))
        for case in itertools.product(TRANSFORMATIONS, LAYOUTS)
    ],
)
def test_nothing_whole_is_gathered(name, layout):
    found = collectives(TRANSFORMATIONS[name], layout, refresh=True)
    allowed = SELECTED if name == "frugal" else SHORT * SHORT - 1
    assert [one for one in found if one.largest > allowed] == []


def test_a_whole_gradient_would_be_seen():
    """The exact singular vectors need one, under Auto axes."""
    tx = memopt.galore(1e-3, projector=projectors.svd(RANK))
    found = collectives(tx, "fsdp", refresh=True)
    assert max(one.largest for one in found) >= SHORT * LONG
    between = collectives(tx, "fsdp", refresh=False)
    assert max(one.largest for one in between) < SHORT * SHORT
