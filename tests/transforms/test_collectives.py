"""Gradients never move between devices."""

import itertools
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import memopt
from memopt import projectors, recombine
from memopt.planning import hlo
from tests.optimizers import pairings
from tests.optimizers.kinds import slow_unless

Auto = AxisType.Auto
SHAPE = (16, 512, 1024)
SPECS = {
    "rows": jax.P(None, ("a", "b"), None),
    "columns": jax.P(None, None, ("a", "b")),
    "both": jax.P(None, "a", "b"),
    "stack": jax.P(("a", "b"), None, None),
}


def gathered(text: str) -> list[int]:
    """The numbers in each array that a device gets from others whole."""
    kinds = ("all-gather", "all-to-all", "collective-permute")
    return [c.largest for c in hlo.collectives(text, refresh=True) if c.kind in kinds]


def compiled(tx, spec, axis_type):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        place = lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )
        g = {"up": place(jax.ShapeDtypeStruct(SHAPE, jnp.float32), spec)}
        state = jax.eval_shape(tx.init, g)
        # Of a moment the axes that are the gradient's lie as they do there.
        same = lambda x: [
            s if n == m else None for s, n, m in zip(spec, x.shape, SHAPE, strict=False)
        ]
        state = jax.tree.map(
            lambda x: place(
                x, jax.P(*(same(x) if x.shape[-1:] == SHAPE[-1:] else spec[: x.ndim and 1]))
            ),
            state,
        )
        return jax.jit(tx.update).lower(g, state).compile().as_text()


@pytest.mark.parametrize(
    ("projector", "layout", "axis_type"),
    [
        pytest.param(
            *case,
            marks=slow_unless(
                case[1] == "both" and (case[2] == Auto or case[0] in ("gaussian", "blocks"))
            ),
        )
        for case in itertools.product(pairings.PROJECTORS, SPECS, (Auto, AxisType.Explicit))
    ],
)
def test_no_gradient_is_gathered(projector, layout, axis_type):
    space = pairings.PROJECTORS[projector]
    tx = memopt.in_subspace(
        optax.scale_by_adam(),
        space.make(),
        recombine.lift(),
        space.refresh_every,
        space.on_refresh,
    )
    text = compiled(tx, SPECS[layout], axis_type)
    if projector == "svd" and layout in ("rows", "both"):
        assert max(gathered(text)) >= math.prod(SHAPE) // 4  # as its docstring says
        return
    assert "callback" not in text
    assert max(gathered(text), default=0) < math.prod(SHAPE) // 4


@pytest.mark.parametrize("layout", SPECS)
def test_no_gradient_is_gathered_for_a_structured_sketch(layout):
    """Its lines are in groups from 128 columns on, rank and oversampling together."""
    projector = projectors.randomized_svd(64, oversample=64)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, SPECS[layout])
        for shape in (SHAPE, (SHAPE[0], SHAPE[2], SHAPE[1])):
            spec = projectors.MatrixSpec("up", shape, jnp.float32)
            g = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
            basis = jax.jit(
                lambda g, spec=spec: projector.basis(spec, g, projectors.RefreshClock.first())
            )
            text = basis.lower(g).compile().as_text()
            assert max(gathered(text), default=0) < math.prod(SHAPE) // 4
