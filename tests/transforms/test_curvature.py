"""Steps from curvature: the Hessian's diagonal, OASIS's step size, and Polyak's."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import memopt
from memopt.transforms.hutchinson import random_signs

DIM, CLASSES, ROWS, STEPS = 4, 3, 20, 12


def logistic():
    """A start, and for each step a batch of points with CLASSES labels of ±1 each."""
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(DIM, CLASSES)), "bias": rng.normal(size=CLASSES)}
    x = rng.normal(size=(STEPS, ROWS, DIM)) * np.array([1.0, 3.0, 0.3, 0.05])
    return params, (x, np.sign(rng.normal(size=(STEPS, ROWS, CLASSES))))


def logistic_loss(params, batch):
    x, labels = batch
    heights = labels * (x @ params["kernel"] + params["bias"])
    return jnp.log1p(jnp.exp(-heights)).sum(-1).mean()


class Logistic:
    """The loss's derivatives, written out, for a matrix with the bias as a further row."""

    def __init__(self, x, labels):
        self.x, self.labels = np.concatenate([x, np.ones((len(x), 1))], -1), labels

    def missed(self, w):
        """The probability of the other label."""
        return 1 / (1 + np.exp(self.labels * (self.x @ w)))

    def gradient(self, w):
        return -self.x.T @ (self.labels * self.missed(w)) / len(self.x)

    def hessian(self, w):
        """(inputs, inputs, classes); classes do not depend on each other."""
        p = self.missed(w)
        return np.einsum("bi,bj,bc->ijc", self.x, self.x, p * (1 - p)) / len(self.x)


def joined(tree):
    return np.concatenate([np.asarray(tree["kernel"]), np.asarray(tree["bias"])[None]])


def oasis_box(w, batches, signs, first_probes, rate=1e-3):
    """W after each step, by the algorithm box of the paper; `signs` maps (step, probe) to z."""
    d, past, ratio = 0.0, None, np.inf
    for t, f in enumerate(batches):
        hessian = f.hessian(w)
        products = [
            signs(t, i) * np.einsum("ijc,jc->ic", hessian, signs(t, i))
            for i in range(1 if t else first_probes)
        ]
        d = 0.999 * d + 0.001 * products[0] if t else np.mean(products, 0)
        capped, g = np.maximum(np.abs(d), 1e-3), f.gradient(w)
        if t:
            moved = np.sqrt((capped * (w - past) ** 2).sum())
            turned = np.sqrt(((g - f.gradient(past)) ** 2 / capped).sum())
            new = min(np.sqrt(1 + ratio) * rate, 0.5 * moved / turned)
            rate, ratio = new, new / rate
        past = w
        w = w - rate * g / capped
        yield w


@pytest.mark.parametrize("first_probes", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_oasis_is_its_algorithm_box_in_float64(first_probes):
    with jax.enable_x64(True):
        params, batches = jax.tree.map(jnp.asarray, logistic())
        tx = memopt.oasis(1.0, first_probes=first_probes, seed=3)

        def step(carry, batch):
            params, state = carry
            loss = lambda params: logistic_loss(params, batch)
            updates, state = tx.update(jax.grad(loss)(params), state, params, obj_fn=loss)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        _, found = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), batches))(params)
        draw = jax.jit(lambda t, i: random_signs(params, 3, t, i))
        signs = lambda t, i: joined(draw(t, i))
        box = oasis_box(joined(params), map(Logistic, *batches), signs, first_probes)
        for t, expected in enumerate(box):
            got = joined(jax.tree.map(lambda x, t=t: x[t], found))
            assert np.abs(got - expected).max() <= 1e-10


def bowl(curvatures):
    """A loss with a diagonal Hessian, which one random vector finds exactly."""
    return lambda params: (
        0.5
        * sum((c * p**2).sum() for c, p in zip(curvatures, jax.tree.leaves(params), strict=True))
    )


def test_a_momentum_is_divided_by_the_curvature():
    loss, w = bowl([jnp.array([4.0, -0.25])]), jnp.array([1.0, 2.0])
    tx = memopt.oasis(0.5, adaptive=False)
    g = jnp.array([8.0, 1.0])
    updates, _ = jax.jit(lambda g: tx.update(g, tx.init(w), w, obj_fn=loss))(g)
    np.testing.assert_allclose(updates, [-0.5 * 8 / 4, -0.5 * 1 / 0.25], rtol=1e-6)


def test_a_step_size_survives_a_step_that_moved_nothing():
    """A learning rate of 0, from which warm-up begins, moves nothing."""
    loss = bowl([jnp.array([4.0, 0.25])])
    tx = memopt.scale_by_oasis()

    def step(carry, learning_rate):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w, obj_fn=loss)
        return (w - learning_rate * updates, state), state.rate

    rates = jnp.array([0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0])
    start = jnp.ones(2)
    _, found = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), rates))()
    np.testing.assert_allclose(found, [1e-3, 1e-3, 1e-3, *[0.5] * 4], rtol=1e-3)


def test_signs_differ_by_layer_step_and_probe_but_not_by_how_layers_are_kept():
    stack = jnp.zeros((3, 16, 8))
    draw = lambda *at: np.asarray(random_signs({"layers": {"up": stack}}, 0, *at)["layers"]["up"])
    stacked = draw(2)
    apart = random_signs({"layers": [{"up": x} for x in stack]}, 0, 2)["layers"]
    np.testing.assert_array_equal(stacked, [layer["up"] for layer in apart])
    matrices = np.concatenate([stacked, draw(3), draw(2, 1)]).reshape(9, -1)
    assert set(np.unique(matrices)) == {-1.0, 1.0}
    assert np.abs(np.corrcoef(matrices) - np.eye(9)).max() < 0.3
    with jax.enable_x64(True):
        np.testing.assert_array_equal(stacked, draw(2))


def test_estimates_of_many_probes_come_to_the_diagonal():
    params, (x, labels) = logistic()
    batch, w = (x[0], labels[0]), jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    tx = memopt.scale_by_hutchinson(first_probes=3000)
    loss = lambda w: logistic_loss(w, batch)
    _, state = jax.jit(lambda w: tx.update(w, tx.init(w), w, obj_fn=loss))(w)
    exact = np.einsum("iic->ic", Logistic(*batch).hessian(joined(params)))
    np.testing.assert_allclose(joined(state.hessian), exact, atol=0.05 * exact.max())


def test_an_estimate_is_made_every_few_steps():
    tx = memopt.scale_by_hutchinson(0.5, refresh_every=2)
    w = jnp.ones(2)

    def step(state, curvature):
        loss = lambda w: 0.5 * curvature * (w**2).sum()
        _, state = tx.update(w, state, w, obj_fn=loss)
        return state, state.hessian[0]

    _, found = jax.lax.scan(step, tx.init(w), jnp.array([8.0, 1.0, 2.0, 1.0, jnp.inf, 3.0]))
    assert found.tolist() == [8.0, 8.0, 5.0, 5.0, 5.0, 5.0]  # what is not finite is left out


@pytest.mark.parametrize(
    "axis_type", [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit]
)
def test_eight_devices_find_the_same(axis_type):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(axis_type,))
    w = {"up": jax.random.normal(jax.random.key(0), (2, 16, 8)), "norm": jnp.ones(8)}
    split = {"up": jax.P(None, "fsdp"), "norm": jax.P()}
    loss = lambda w: jnp.square(jnp.tanh(w["up"]) * w["norm"]).sum() + (w["up"].sum() ** 2) * 1e-3
    tx = memopt.scale_by_polyak(memopt.scale_by_oasis(first_probes=4), slack="L1")

    @jax.jit
    def run(w):
        def step(carry, _):
            w, state = carry
            value, g = jax.value_and_grad(loss)(w)
            updates, state = tx.update(g, state, w, obj_fn=loss, value=value)
            return (jax.tree.map(lambda w, u: w - 0.01 * u, w, updates), state), None

        return jax.lax.scan(step, (w, tx.init(w)), None, 3)[0]

    with jax.set_mesh(mesh):
        place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        found = jax.device_get(run(jax.tree.map(place, w, split)))
    chex.assert_trees_all_close(found, jax.device_get(run(w)), rtol=1e-3, atol=1e-5)


def quadratic(seed=0):
    """A loss whose smallest value is zero, on a tree."""
    target = {"a": jax.random.normal(jax.random.key(seed), (4, 3)), "b": jnp.arange(3.0)}
    return lambda w: sum(
        jnp.square(x - y).sum() for x, y in zip(*map(jax.tree.leaves, (w, target)), strict=True)
    )


ZEROS = {"a": jnp.zeros((4, 3)), "b": jnp.zeros(3)}


def descend(tx, loss, w, steps=4):
    def step(carry, _):
        w, state = carry
        value, g = jax.value_and_grad(loss)(w)
        updates, state = tx.update(g, state, w, value=value)
        w = optax.apply_updates(w, updates)
        return (w, state), w

    return jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), None, steps)[1])(w)


@pytest.mark.parametrize("cap", [None, pytest.param(0.1, marks=pytest.mark.slow)])
def test_without_a_preconditioner_polyak_is_optax(cap):
    ours = optax.chain(memopt.scale_by_polyak(cap=cap), optax.scale_by_learning_rate(1.0))
    theirs = optax.polyak_sgd(max_learning_rate=jnp.inf if cap is None else cap)
    found, expected = (descend(tx, quadratic(), ZEROS) for tx in (ours, theirs))
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    ours = optax.chain(memopt.scale_by_polyak(f_star=1.0), optax.scale_by_learning_rate(1.0))
    theirs = optax.polyak_sgd(max_learning_rate=jnp.inf, f_min=1.0)
    found, expected = (descend(tx, lambda w: quadratic()(w) + 1, ZEROS) for tx in (ours, theirs))
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def boxes(slack, weight):
    """γ and the slack at each step for q = ⟨G, U⟩ and the loss f, as in the paper."""
    s = 0.0

    def step(f, q):
        nonlocal s
        if slack is None:
            return f / q
        if slack == "L1":
            wide = max(f - s + weight, 0) / (1 + q)
            s = max(s - weight + wide, 0)
            return min(wide, f / q)
        shrink = 1 / (1 + weight)
        rate = max(f - shrink * s, 0) / (q + shrink)
        s = shrink * (s + rate)
        return rate

    return step


@pytest.mark.parametrize("slack", [pytest.param(None, marks=pytest.mark.slow), "L1", "L2"])
def test_polyak_with_a_preconditioner_is_its_formula(slack):
    loss, scale = quadratic(1), jnp.array([0.5, 2.0, 0.1])
    divide = optax.stateless(lambda g, _: jax.tree.map(lambda x: x * scale, g))
    tx = memopt.scale_by_polyak(divide, slack=slack, slack_weight=0.3)
    found = descend(optax.chain(tx, optax.scale(-1.0)), loss, ZEROS)
    w, rule = ZEROS, boxes(slack, 0.3)
    for t in range(4):
        value, g = jax.value_and_grad(loss)(w)
        u = jax.tree.map(lambda x: x * scale, g)
        rate = rule(float(value), float(optax.tree.vdot(g, u)))
        w = jax.tree.map(lambda w, u, rate=rate: w - rate * u, w, u)
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, t=t: x[t], found), w, rtol=2e-5, atol=1e-6
        )


def test_polyak_rests_where_the_gradient_vanishes_and_goes_on():
    tx = memopt.scale_by_polyak(slack="L2")
    w = jnp.ones(2)
    still, state = tx.update(jnp.zeros(2), tx.init(w), w, value=1.0)
    assert not still.any()
    assert state.slack == 0
    assert tx.update(w, state, w, value=1.0)[0].all()


def test_polyak_takes_the_diagonal_of_the_hessian():
    """Newton's step on a bowl is twice Polyak's."""
    loss, w = bowl([jnp.array([9.0, 0.5])]), jnp.array([1.0, -2.0])
    tx = memopt.scale_by_polyak(memopt.scale_by_hutchinson(first_probes=1))
    value, g = jax.value_and_grad(loss)(w)
    updates, _ = tx.update(g, tx.init(w), w, value=value, obj_fn=loss)
    np.testing.assert_allclose(updates, w / 2, rtol=1e-6)


def test_a_part_of_the_parameters_is_scaled_by_its_own_curvature():
    """With another optimizer for the rest; in fewer bits, but for the last parameters."""
    params = {"up": {"kernel": jnp.ones((8, 4))}, "norm": {"scale": jnp.ones(4)}}
    loss = lambda p: 2.0 * jnp.square(p["up"]["kernel"] * p["norm"]["scale"]).sum()
    tx = memopt.oasis(1.0, rest=optax.sgd(0.5), first_step=0.25, first_probes=1)
    g = jax.grad(loss)(params)
    updates, state = tx.update(g, tx.init(params), params, obj_fn=loss)
    np.testing.assert_allclose(updates["up"]["kernel"], -0.25, rtol=1e-5)
    np.testing.assert_allclose(updates["norm"]["scale"], -0.5 * g["norm"]["scale"])
    state = memopt.quantize_state(memopt.oasis(1.0), min_size=0).init(params)
    dtypes = {str(x.dtype) for x in jax.tree.leaves(state.codes[0].previous)}
    assert dtypes == {"float32"}
    assert state.codes[0].curvature.hessian["up"]["kernel"].dtype == jnp.int8


def test_a_projected_loss_is_refused():
    tx = memopt.galore(1e-2, rank=2, inner=memopt.scale_by_hutchinson())
    params = {"up": {"kernel": jnp.ones((8, 4))}}
    state = tx.init(params)
    with pytest.raises(memopt.IncompatiblePairingError, match="inner must not evaluate the loss"):
        jax.eval_shape(lambda g: tx.update(g, state, params, obj_fn=lambda p: 0.0), params)


def test_what_an_update_needs_is_named():
    w = jnp.ones(2)
    for name, tx in {
        "obj_fn, the loss": memopt.scale_by_hutchinson(),
        "obj_fn, the loss as a function of the parameters": memopt.oasis(1.0),
        "value, the loss,": memopt.scale_by_polyak(),
    }.items():
        state = tx.init(w)
        with pytest.raises(ValueError, match=name):
            tx.update(w, state, w)
    with pytest.raises(ValueError, match="'oasis' needs obj_fn, the loss as a function"):
        memopt.optimizer("oasis", 1.0).update(w, state, w)
    for options, says in (
        ({"slack": "l1"}, "slack 'l1' is unknown"),
        ({"cap": -1.0}, "cap must be at least 0"),
    ):
        with pytest.raises(ValueError, match=says):
            memopt.scale_by_polyak(**options)
    for options, says in (
        ({"b1": 0.5}, "b1 must be left out, since an adaptive step has no first moment"),
        ({"adaptive": False, "first_step": 1.0}, "first_step must be left out"),
        ({"first_probes": 0}, "first_probes must be at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            memopt.oasis(1.0, **options)
