"""Optimizers gather no whole parameter, gradient or state."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding

import memopt
from memopt.optimizers.registry import METHODS
from memopt.planning import chips, hlo
from tests.optimizers.kinds import KINDS, slow_unless

PARAMS = {
    "blocks": {
        "up": {"kernel": ((8, 64, 256), jax.P(None, "fsdp"))},
        "down": {"kernel": ((8, 256, 64), jax.P(None, None, "fsdp"))},
        "norm": {"scale": ((8, 64), jax.P())},
    },
    "embed": {"embedding": ((2048, 64), jax.P(None, "fsdp"))},
}
WHOLE = 8 * 64 * 256  # numbers in each of the three that are split
GATHERS = ("optax_muon",)  # Newton–Schulz as XLA splits it, by itself


def on_mesh(devices):
    """The parameters' shapes and places."""
    mesh = Mesh(devices, ("fsdp",), axis_types=(AxisType.Auto,))
    place = lambda p: jax.ShapeDtypeStruct(p[0], jnp.float32, sharding=NamedSharding(mesh, p[1]))
    return jax.tree.map(place, PARAMS, is_leaf=lambda x: isinstance(x, tuple))


def collectives(tx, params, places=None, spread_over=None):
    """Those of an update, with everything where `memopt.state_sharding` puts it."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    places = memopt.state_sharding(tx, places or params, spread_over=spread_over)
    like = jax.eval_shape(tx.init, jax.tree.map(lambda p: p.update(sharding=None), params))
    state = jax.tree.map(lambda x, s: x.update(sharding=s), like, places)
    loss = lambda params: sum(jnp.square(p).sum() for p in jax.tree.leaves(params))

    def update(gradients, state, params):
        return tx.update(gradients, state, params, obj_fn=loss, value=jnp.float32(1))

    shardings = (jax.tree.map(lambda p: p.sharding, params), places)
    with jax.set_mesh(mesh):
        jitted = jax.jit(update, donate_argnums=(0, 1), out_shardings=shardings)
        return hlo.collectives(jitted.lower(params, state, params).compile().as_text())


def most_numbers(name):
    """The largest array moved between refreshes, as a fraction of a whole parameter."""
    if name in ("muon", "normuon"):
        return WHOLE // 8  # each device's share of two of them, in whole matrices
    if name == "soap":
        return 256**2  # a factor of the longer side, of one layer
    method = METHODS[name]
    is_low_rank = method.has_free_rank or "density" in method.defaults
    return WHOLE // 4 if is_low_rank else WHOLE // 32  # the default rank


def check(name, devices):
    tx = optax.with_extra_args_support(memopt.optimizer(name, 1e-3))
    found = collectives(tx, on_mesh(devices))
    largest = max(found, key=lambda c: c.largest, default=None)
    if name in GATHERS:
        assert largest.largest == WHOLE
    else:
        assert largest is None or largest.largest <= most_numbers(name), largest


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=slow_unless(name in {*KINDS, *GATHERS, "adamw", "apollo"}))
        for name in memopt.available()
    ],
)
def test_nothing_whole_moves_between_devices(name):
    check(name, jax.devices())


@pytest.mark.tpu
@pytest.mark.parametrize("name", memopt.available())
def test_nothing_whole_moves_between_chips(name):
    """Compiled for 4×4 chips of v5e."""
    check(name, chips.devices("v5e", 16))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=slow_unless(name == "galore"))
        for name, method in METHODS.items()
        if method.sums_projections
    ],
)
def test_less_moves_where_shorter_sides_are_whole(name):
    tx, params = memopt.optimizer(name, 1e-3), on_mesh(jax.devices())
    moved = lambda *where: hlo.total_bytes(collectives(*where, spread_over="fsdp"))
    by_layer, by_stack = (
        moved(memopt.reshard_update(tx, params, places), params, places)
        for places in (
            memopt.unshard_short_side(params, one_layer_at_a_time=b) for b in (True, False)
        )
    )
    plain = moved(tx, params)
    assert by_layer < 0.8 * plain
    assert by_stack < by_layer
