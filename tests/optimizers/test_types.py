"""Types are those of the parameters: under jax_enable_x64, and for one model on each device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from benchmarks.extra_arguments import with_extra_arguments
from memopt import projectors, recombine
from tests.optimizers.kinds import KINDS, slow_unless

ADAM = memopt.CarryOver(0.9, 0.999)
SUBSPACES = {
    "reset": (projectors.svd(2), recombine.lift_and_sign(), 2, "reset"),
    "reset_moments": (projectors.gaussian(2), recombine.lift(), 2, "reset_moments"),
    "keep": (projectors.orthogonal(2), recombine.lift(), 2, "keep"),
    "carry": (projectors.power_iteration(2, b1=0.9), recombine.lift(), 2, ADAM),
    "recover": (projectors.gaussian(2), recombine.lift_and_residual(recover=0.9), 2, "carry"),
}
TRANSFORMS = {
    "accumulate": memopt.accumulate(optax.adam(1e-2), 2),
    "clip_by_previous_norm": memopt.clip_by_gradient_norm(1.0, previous=True),
    "limit_norm_growth": memopt.limit_norm_growth(),
    "quantize_state": memopt.quantize_state(optax.scale_by_adam(), min_size=0),
    "skip_nonfinite": memopt.skip_nonfinite(optax.adam(1e-2)),
}
MAKES = (
    dict.fromkeys(memopt.available("memopt"), with_extra_arguments(memopt.optimizer))
    | {
        name: lambda name, _: memopt.in_subspace(optax.scale_by_adam(), *SUBSPACES[name])
        for name in SUBSPACES
    }
    | {name: lambda name, _: TRANSFORMS[name] for name in TRANSFORMS}
)
SHAPES = {"up": (2, 8, 12), "norm": (2, 8)}


def steps(tx, params, state, count=3):
    """The parameters and the state after some steps, whose types do not change."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), None, count)[0]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=slow_unless(n in {"ldadam", "carry", "recover"})) for n in MAKES],
)
def test_types_stay_under_x64(name):
    tx = MAKES[name](name, 1e-2)
    for x64 in (True, False):
        with jax.enable_x64(x64):
            for dtype in (jnp.float32, jnp.bfloat16, *[jnp.float64] * x64):
                params = {n: jax.ShapeDtypeStruct(s, dtype) for n, s in SHAPES.items()}
                jax.eval_shape(lambda p: steps(tx, p, tx.init(p)), params)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=slow_unless(n in {*KINDS, *SUBSPACES, *TRANSFORMS})) for n in MAKES],
)
def test_one_model_per_device_with_varying_axes_checked(name):
    """The state is begun on the device, or given."""
    mesh = jax.make_mesh((2,), ("models",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = MAKES[name](name, 1e-2)

    def begin(params):
        one = jax.tree.map(lambda x: x[0], params)
        return jax.tree.map(lambda x: x[None], steps(tx, one, tx.init(one)))

    def resume(params, state):
        one = jax.tree.map(lambda x: x[0], (params, state))
        return jax.tree.map(lambda x: x[None], steps(tx, *one))

    def both(params):
        axes = {"mesh": mesh, "in_specs": jax.P("models"), "out_specs": jax.P("models")}
        return jax.shard_map(resume, **axes)(*jax.shard_map(begin, **axes)(params))

    draw = np.random.default_rng(0)
    params = {n: jnp.asarray(draw.normal(size=(2, *s)), jnp.float32) for n, s in SHAPES.items()}
    if name != "galore":  # types are known without compiling
        jax.eval_shape(both, params)
        return
    found, _ = jax.jit(both)(params)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], params)
        expected, _ = jax.jit(lambda p: steps(tx, p, tx.init(p), count=6))(one)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-5), found, expected
        )
