"""Cautious updates, cautious weight decay and fixed norms around any optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt.errors import IncompatiblePairingError
from memopt.transforms.wrappers import step_on_sphere

KEY = jax.random.key(0)
PARAMS = {
    "blocks": {"kernel": 0.1 * jax.random.normal(KEY, (3, 8, 12))},
    "norm": {"scale": jnp.ones(8)},
    "embed": {"embedding": jax.random.normal(KEY, (16, 8))},
}
GRADIENTS = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), PARAMS)
WRAPPERS = {
    "cautious": memopt.cautious,
    "cautious_decay": lambda tx: memopt.cautious_decay(tx, 0.1, 0.5),
    "hyperball": lambda tx: memopt.hyperball(tx, 0.05),
}


def steps(tx, params, count=3, gradients=GRADIENTS):
    """The parameters after some steps."""

    def step(carry, key):
        params, state = carry
        noise = lambda g: g + jax.random.normal(key, g.shape[-2:], g.dtype)
        updates, state = tx.update(jax.tree.map(noise, gradients), state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(2), count)
    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), keys)[0])(params)[0]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_layers_in_a_stack_are_updated_as_separate_ones(wrapper):
    tx = WRAPPERS[wrapper](memopt.muon(0.1, rest=optax.sgd(0.1)))
    split = lambda tree: {
        **tree,
        "blocks": {str(i): {"kernel": x} for i, x in enumerate(tree["blocks"]["kernel"])},
    }
    stacked = split(steps(tx, PARAMS))
    separate = steps(tx, split(PARAMS), gradients=split(GRADIENTS))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), separate, stacked)


def test_cautious_leaves_a_step_down_the_gradient_as_it_is():
    u = memopt.cautious(optax.sgd(0.1)).update(
        GRADIENTS, memopt.CautiousState(optax.sgd(0.1).init(PARAMS))
    )[0]
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.1 * g, rtol=1e-6), u, GRADIENTS)


def test_cautious_divides_by_the_share_of_each_matrix():
    momentum = optax.stateless(lambda g, _: jax.tree.map(lambda g: -jnp.ones_like(g), g))
    g = jnp.ones((2, 2, 2)).at[0, 0, 0].set(-1.0).at[1, 0].set(0.0)
    tx = memopt.cautious(momentum)
    u = tx.update(g, tx.init(g))[0]
    np.testing.assert_allclose(u[0].ravel(), [0, -4 / 3, -4 / 3, -4 / 3], atol=1e-6)
    np.testing.assert_allclose(u[1].ravel(), [0, 0, -2, -2], atol=1e-6)


def test_cautious_decay_does_not_move_weights_of_zero_or_growing_ones():
    w, g = jnp.array([0.0, 2.0, -2.0, 2.0]), jnp.array([1.0, 1.0, 1.0, 0.0])
    tx = memopt.cautious_decay(optax.sgd(0.1), optax.constant_schedule(0.1), 1.0)
    u = tx.update(g, tx.init(w), w)[0]
    np.testing.assert_allclose(u, [-0.1, -0.3, -0.1, -0.2], rtol=1e-6)


def test_cautious_decay_leaves_out_what_the_mask_does():
    tx = memopt.cautious_decay(
        optax.sgd(0.0), 0.1, 1.0, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    )
    u = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)[0]
    assert not np.any(u["norm"]["scale"])
    np.testing.assert_allclose(u["embed"]["embedding"], -0.1 * PARAMS["embed"]["embedding"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hyperball_keeps_norms_over_many_steps(dtype):
    params, gradients = jax.tree.map(lambda x: x.astype(dtype), (PARAMS, GRADIENTS))
    norm = lambda tree: jnp.linalg.norm(tree["blocks"]["kernel"].astype("float32"), axis=(1, 2))
    tx = memopt.hyperball(optax.sgd(1.0, momentum=0.9), 0.05)
    after = steps(tx, params, 300, gradients=gradients)
    rounding = {"float32": 1e-6, "bfloat16": 2e-3}[dtype]
    np.testing.assert_allclose(norm(after), norm(params), rtol=rounding)
    assert not np.allclose(after["blocks"]["kernel"], params["blocks"]["kernel"], atol=0.01)


def test_hyperball_does_not_depend_on_the_scale_of_the_update():
    after = [steps(memopt.hyperball(optax.sgd(rate), 0.05), PARAMS) for rate in (1e-3, 10.0)]
    kernels = [tree["blocks"]["kernel"] for tree in after]
    np.testing.assert_allclose(*kernels, rtol=1e-5)
    assert not np.allclose(*(tree["norm"]["scale"] for tree in after))


def test_hyperball_equals_a_decayed_run_of_the_same_updates():
    """With η = lr ‖U‖ / ((1 − lr λ) ‖W‖), both runs have the same W / ‖W‖."""
    rate, decay, w = 0.1, 0.5, np.asarray(PARAMS["blocks"]["kernel"][0], np.float64)
    sphere = PARAMS["blocks"]["kernel"][0]
    radius, kept = np.linalg.norm(w), jnp.float32(0)
    layout = memopt.Layout("w", (), (0,), (1,))
    for key in jax.random.split(KEY, 5):
        u = jax.random.normal(key, w.shape)
        relative = rate * np.linalg.norm(u) / ((1 - rate * decay) * np.linalg.norm(w))
        w = (1 - rate * decay) * w - rate * np.asarray(u, np.float64)
        step, kept = step_on_sphere(layout, -u, kept, sphere, rate=relative)
        sphere = sphere + step
    np.testing.assert_allclose(sphere / radius, w / np.linalg.norm(w), atol=2e-6)


def test_hyperball_refuses_matrices_of_zeros():
    zero = {"up": {"kernel": jnp.ones((2, 4, 4)).at[1].set(0.0)}}
    tx = memopt.hyperball(optax.sgd(0.1), 0.1)
    with pytest.raises(ValueError, match=r"params\['up/kernel'\] has a matrix of zeros"):
        tx.init(zero)
    state = jax.jit(tx.init)(zero)
    u = tx.update(zero, state, zero)[0]["up"]["kernel"]
    assert np.all(np.isfinite(u))  # an unused matrix, without a gradient
    u = tx.update(jax.tree.map(jnp.ones_like, zero), state, zero)[0]["up"]["kernel"]
    assert np.all(np.isfinite(u[0]))
    assert np.all(np.isnan(u[1]))


@pytest.mark.parametrize("inner", WRAPPERS)
@pytest.mark.parametrize("outer", WRAPPERS)
def test_wrappers_are_applied_once_and_in_order(inner, outer):
    tx = WRAPPERS[outer](memopt.quantize_state(WRAPPERS[inner](optax.adam(0.1))))
    names = list(WRAPPERS)
    if names.index(outer) > names.index(inner):
        updates, _ = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)
        assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
        return
    with pytest.raises(IncompatiblePairingError, match=f"memopt.{inner} before .* memopt.{outer}"):
        tx.init(PARAMS)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    ("outer", "skips"),
    [
        ("optax.MultiSteps", lambda tx: optax.MultiSteps(tx, 2).gradient_transformation()),
        ("memopt.accumulate", lambda tx: memopt.accumulate(tx, 2)),
        ("optax.apply_if_finite", lambda tx: optax.apply_if_finite(tx, 2)),
        ("memopt.skip_nonfinite", memopt.skip_nonfinite),
    ],
)
def test_skipping_belongs_outside_of_a_wrapper(wrapper, outer, skips):
    with pytest.raises(IncompatiblePairingError, match=f"in {outer} before .* memopt.{wrapper}"):
        WRAPPERS[wrapper](skips(optax.sgd(0.1))).init(PARAMS)
    skips(WRAPPERS[wrapper](optax.sgd(0.1))).init(PARAMS)


def test_hyperball_leaves_embeddings_alone_whatever_the_orientation():
    tx = memopt.hyperball(optax.sgd(0.1), 0.05, matrices=memopt.out_in)
    radius = jax.eval_shape(tx.init, PARAMS)[1].radius
    assert [x.shape for x in jax.tree.leaves(radius)] == [(3,)]


def test_all_three_together_train_sharded_as_on_one_device():
    tx = WRAPPERS["cautious_decay"](memopt.cautious(memopt.lion(0.01)))
    tx = memopt.hyperball(tx, 0.05)
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))
    spec = lambda p: (
        jax.P(*[None] * (p.ndim - 2), "fsdp", "tensor") if p.ndim > 1 else jax.P("fsdp")
    )
    place = lambda p: jax.device_put(p, jax.NamedSharding(mesh, spec(p)))
    alone = steps(tx, PARAMS)
    with jax.set_mesh(mesh):
        params, gradients = jax.tree.map(place, (PARAMS, GRADIENTS))
        split = steps(tx, params, gradients=gradients)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), split, alone)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_schedule_free_belongs_outside_of_a_wrapper(wrapper):
    """Its next point is computed from those that it keeps, without what a wrapper changed."""
    outer = "optax.contrib.schedule_free"
    with pytest.raises(IncompatiblePairingError, match=f"in {outer} before .* memopt.{wrapper}"):
        WRAPPERS[wrapper](optax.contrib.schedule_free_adamw(0.1)).init(PARAMS)
    optax.contrib.schedule_free(WRAPPERS[wrapper](optax.sgd(0.1)), 0.1).init(PARAMS)


def test_layers_without_a_turn_do_not_decay():
    turns = lambda tx: memopt.cycle_blocks(tx, switch_every=1)
    with pytest.raises(IncompatiblePairingError, match=r"wrap memopt\.cautious_decay in"):
        WRAPPERS["cautious_decay"](memopt.badam(0.1)).init(PARAMS)
    tx = turns(WRAPPERS["cautious_decay"](optax.sgd(0.1)))
    still = jax.tree.map(jnp.zeros_like, GRADIENTS)
    moved = [
        np.any(u, (-2, -1))
        for u in jax.tree.leaves(tx.update(still, tx.init(PARAMS), PARAMS)[0])
        if u.ndim == 3
    ]
    assert [m.tolist() for m in moved] == [[False, False, True]]
