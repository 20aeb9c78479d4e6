"""Shapes that projectors say, and those of what they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt import projectors, recombine
from memopt.internals import trace
from memopt.transforms.projectors import MatrixSpec, RefreshClock

SHAPES = [(24, 40), (40, 24), (24, 24), (8, 24, 40), (2, 8, 40, 24)]
REPLAYED = {
    "a matrix": np.eye(24)[:3],
    "lines": np.arange(5),
    "entries": np.arange(50),
    "off": True,
}
MAKE = {
    **{
        f"{make.__name__} {side}": lambda make=make, side=side: make(0.25, side=side)
        for make in (
            *(projectors.gaussian, projectors.rademacher, projectors.sparse, projectors.orthogonal),
            *(projectors.svd, projectors.randomized_svd),
            *(projectors.online_pca, projectors.power_iteration, projectors.lazy_svd),
            *(projectors.coap, projectors.grassmann),
            *(projectors.columns, projectors.coordinates, projectors.dct, projectors.haar),
        )
        for side in ("short", "left", "right")
    },
    "stored gaussian": lambda: projectors.gaussian(4, stored=True),
    "blocks": lambda: projectors.blocks(0.5),
    "from another start": lambda: projectors.online_pca(2, start=projectors.gaussian(5)),
    **{
        f"replay of {name}": lambda given=given: projectors.replay({"layers/up": {1: given}})
        for name, given in REPLAYED.items()
    },
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_projected_shapes_are_those_that_are_computed(name, shape):
    projector, spec = MAKE[name](), MatrixSpec("layers/up", shape, jnp.float32)

    def compute(g):
        kept = projector.init(spec)
        basis, new = projector.basis_at(spec, kept, g, RefreshClock.first(), None)
        return kept, new, projector.down(spec, basis, g)

    kept, new, low = jax.eval_shape(compute, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert projector.projected_shape(spec) == low.shape
    assert jax.tree.map(lambda x: (x.shape, x.dtype), kept) == jax.tree.map(
        lambda x: (x.shape, x.dtype), new
    )


@pytest.mark.parametrize("name", ["galore", "ldadam", "online_subspace_descent", "frugal", "flora"])
def test_init_traces_no_basis(name):
    params = {"layers": {"up": jax.ShapeDtypeStruct((8, 64, 96), "float32")}}
    program = trace(memopt.optimizer(name, 1e-2).init, params)
    computed = {eqn.name for eqn in program.equations()}
    assert not computed & {"eigh", "qr", "geqrf", "dot_general", "random_bits", "while", "scan"}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("layers/0/up", "layers/5/up", True),
        ("llama3/layers/0/up", "llama3/layers/5/up", True),
        ("h/0/w1", "h/0/w3", False),
        ("h/0/w1", "h/5/w1", True),
        ("Block_0/Dense_0/kernel", "Block_0/Dense_1/kernel", False),
        ("Block_0/Dense_1/kernel", "Block_1/Dense_1/kernel", True),
        ("blocks/0/mlp/layers/0/weight", "blocks/0/mlp/layers/1/weight", False),
        ("encoderblock_0/up", "encoderblock_11/up", True),
    ],
)
def test_layers_share_a_random_basis_and_matrices_of_one_layer_do_not(one, other, same):
    projector = projectors.gaussian(4)
    bases = [
        projector.basis(MatrixSpec(name, (24, 40), jnp.float32), None, RefreshClock.first())
        for name in (one, other)
    ]
    assert np.array_equal(*bases) == same


@pytest.mark.parametrize("names", ["llama3/layers/{}/up", "v2/h/{}/w1", "Block_{}/Dense_1/kernel"])
def test_one_of_every_c_layers_is_chosen_by_the_layer_index(names):
    """Layers by themselves train as their stack does."""
    tx = memopt.in_subspace(
        *(optax.sgd(1.0), projectors.blocks(0.25), recombine.lift()),
        refresh_every=1,
        on_refresh="reset",
        matrices=memopt.every_matrix,
    )
    flat = {names.format(layer): jnp.ones((4, 6)) for layer in range(8)}
    updates, _ = tx.update(flat, tx.init(flat))
    moved = [bool(jnp.any(updates[names.format(layer)] != 0)) for layer in range(8)]
    assert sum(moved[:4]) == sum(moved[4:]) == 1
