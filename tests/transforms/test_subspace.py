"""Refreshes, state and errors of `in_subspace`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt import projectors, recombine
from memopt.trees import named_leaves

IDENTITY = projectors.replay({"w": {1: np.eye(4)}}, side="left")


def updates_of(tx, gradients):
    state, seen = tx.init(gradients[0]), []
    for g in gradients:
        updates, state = jax.jit(tx.update)(g, state)
        seen.append(float(updates["w"][0, 0]))
    return seen


@pytest.mark.parametrize(
    ("on_refresh", "expected"),
    [("keep", [1.0, 1.5, 1.75, 1.875]), ("reset", [1.0, 1.5, 1.0, 1.5])],
)
def test_moments_are_kept_or_reset_at_a_refresh(on_refresh, expected):
    """In the whole space the inner momentum is seen as it is; a refresh comes every 2 steps."""
    momentum = optax.trace(0.5)
    tx = memopt.in_subspace(momentum, IDENTITY, recombine.lift(), 2, on_refresh)
    assert updates_of(tx, [{"w": jnp.ones((4, 6))}] * 4) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("on_refresh", "count"), [("keep", 6), ("carry", 6), ("reset", 2), ("reset_moments", 2)]
)
def test_the_moments_of_fira_average_the_steps_since_they_were_reset(on_refresh, count):
    """The bases are refreshed at steps 1, 3 and 5; step 5 keeps the basis, but resets moments."""
    g = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)}
    lazy = projectors.lazy_svd(2, queue=1)
    tx = memopt.fira(0.1, rank=2, projector=lazy, refresh_every=2, on_refresh=on_refresh)
    step = lambda state, _: (tx.update(g, state, g)[1], None)
    state = jax.jit(lambda: jax.lax.scan(step, tx.init(g), None, length=6)[0])()
    (mu,) = (x for name, x in named_leaves(state)[0] if "/mu/" in name and x.shape == (2, 6))
    projected = np.linalg.svd(np.asarray(g["w"]), compute_uv=False)[:2]
    mean = np.linalg.norm(mu) / np.linalg.norm(projected)
    assert mean == pytest.approx(1 - 0.9**count, rel=1e-4)


def test_in_the_whole_space_lifting_changes_nothing():
    adam = optax.scale_by_adam()
    gradients = [
        {"w": jnp.asarray(np.random.default_rng(t).normal(size=(4, 6)), jnp.float32)}
        for t in range(3)
    ]
    tx = memopt.in_subspace(adam, IDENTITY, recombine.lift())
    np.testing.assert_allclose(updates_of(tx, gradients), updates_of(adam, gradients), rtol=1e-5)


def test_other_parameters_go_through_the_inner_optimizer():
    g = {"w": jnp.ones((4, 6)), "norm": jnp.arange(4.0), "embed": jnp.ones((8, 4))}
    tx = memopt.in_subspace(optax.scale(3.0), projectors.gaussian(2), recombine.lift())
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates["norm"], 3 * g["norm"])
    np.testing.assert_array_equal(updates["embed"], 3 * g["embed"])


def test_extra_arguments_reach_the_inner_optimizer():
    def update(updates, state, params=None, *, factor, **extra):
        return jax.tree.map(lambda u: factor * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = memopt.in_subspace(inner, IDENTITY, recombine.lift())
    g = {"w": jnp.ones((4, 6))}
    updates, _ = tx.update(g, tx.init(g), factor=2.0)
    np.testing.assert_array_equal(updates["w"], 2 * g["w"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"refresh_every": 0}, "refresh_every must be at least 1, got 0"),
        ({"on_refresh": "rest"}, "did you mean 'reset'"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        memopt.in_subspace(optax.identity(), IDENTITY, recombine.lift(), **options)


def test_reset_moments_keeps_the_step_count():
    """Adam's own bias correction goes on: its first moment counts for less than all of it."""
    adam = optax.scale_by_adam(b1=0.5, b2=0.5, eps=0.0)
    seen = {}
    for on_refresh in ("reset", "reset_moments"):
        tx = memopt.in_subspace(adam, IDENTITY, recombine.lift(), 2, on_refresh)
        seen[on_refresh] = updates_of(tx, [{"w": jnp.ones((4, 6))}] * 3)
    assert seen["reset"] == pytest.approx([1.0, 1.0, 1.0])
    mu, nu = 0.5 / (1 - 0.5**3), 0.5 / (1 - 0.5**3)
    assert seen["reset_moments"] == pytest.approx([1.0, 1.0, mu / np.sqrt(nu)])


@pytest.mark.parametrize("r", [8, 32])
def test_carried_momentum_still_points_where_it_did(r):
    """A random projection of side m keeps a correlation of √(r/(r+m+1)), a second one r/(r+m+1)."""
    m, n = 64, 1000
    g = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(m, n)), jnp.float32)}
    none = jax.tree.map(jnp.zeros_like, g)

    @jax.jit
    def correlations(seed):
        tx = memopt.in_subspace(
            *(optax.trace(1.0), projectors.gaussian(r, seed=seed), recombine.lift(), 1, "carry")
        )
        first, state = tx.update(g, tx.init(g))
        carried, _ = tx.update(none, state)
        cosine = lambda u: (
            (u["w"] * g["w"]).sum() / jnp.sqrt((u["w"] ** 2).sum() * (g["w"] ** 2).sum())
        )
        inner = lambda u: (u["w"] * g["w"]).sum() / (g["w"] ** 2).sum()
        return cosine(first), cosine(carried), inner(carried)

    once, twice, unbiased = np.mean(jax.vmap(correlations)(jnp.arange(100)), axis=1)
    assert once == pytest.approx(np.sqrt(r / (r + m + 1)), rel=0.02)
    assert twice == pytest.approx(r / (r + m + 1), rel=0.05)
    assert unbiased == pytest.approx(1.0, rel=0.05)


def test_carried_moments_in_a_turned_basis():
    """A rotation carries the first moment exactly, the second as its rule says."""
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    bases = projectors.replay({"w": {1: np.eye(4), 2: turn}}, side="left")
    g = [np.random.default_rng(t).normal(size=(4, 6)) for t in range(2)]
    adam = optax.scale_by_adam(b1=0.9, b2=0.99)
    tx = memopt.in_subspace(adam, bases, recombine.lift(), 1, memopt.CarryOver(0.9, 0.99))
    state = tx.init({"w": jnp.zeros((4, 6))})
    for gradient in g:
        _, state = tx.update({"w": jnp.asarray(gradient, jnp.float32)}, state)
    m, v = 0.1 * g[0], 0.01 * g[0] ** 2
    t = turn.T
    m_hat, v_hat = m / 0.1, v / 0.01
    v = 0.01 * np.abs(t**2 @ (v_hat - m_hat**2) + (t @ m_hat) ** 2)
    low = t @ g[1]
    np.testing.assert_allclose(state.inner.mu["w"], 0.9 * (t @ m) + 0.1 * low, atol=1e-6)
    np.testing.assert_allclose(state.inner.nu["w"], 0.99 * v + 0.01 * low**2, atol=1e-7)


def test_refresh_phases_take_turns_by_name():
    """Matrices of different names refresh at different steps, layers of one name together."""
    g = {name: jnp.ones((4, 6)) for name in ("a", "b", "layers_0", "layers_1")}
    tx = memopt.in_subspace(
        *(optax.identity(), projectors.gaussian(2), recombine.lift(), 4),
        refresh_phase=(0, 2),
    )
    state, before, refreshed = tx.init(g), None, {name: [] for name in g}
    for step in range(9):
        updates, state = tx.update(g, state)
        for name in g:
            if before is not None and jnp.abs(updates[name] - before[name]).max() > 1e-3:
                refreshed[name].append(step)
        before = updates
    assert refreshed == {"a": [4, 8], "b": [2, 6], "layers_0": [4, 8], "layers_1": [4, 8]}


def test_a_refresh_is_a_branch_of_its_own():
    """A gradient is decomposed in one branch of a conditional only."""
    tx = memopt.in_subspace(optax.scale_by_adam(), projectors.svd(2), recombine.lift())
    g = {"w": jnp.ones((4, 6))}
    jaxpr = jax.make_jaxpr(tx.update)(g, tx.init(g)).jaxpr
    assert "eigh" not in str([e for e in jaxpr.eqns if e.primitive.name != "cond"])
    (refresh,) = [e for e in jaxpr.eqns if e.primitive.name == "cond" and "eigh" in str(e)]
    with_eigh = ["eigh" in str(branch) for branch in refresh.params["branches"]]
    assert sorted(with_eigh) == [False, True]


def test_error_feedback_adds_the_residual_to_the_next_gradient():
    """Error feedback: over all steps everything is applied but what still waits."""
    bases = projectors.replay({"w": {1: np.eye(4)[:, :2], 2: np.eye(4)[:, 2:]}}, side="left")
    rule = recombine.lift_with_error_feedback()
    tx = memopt.in_subspace(optax.identity(), bases, rule, 1)
    g, applied = {"w": jnp.ones((4, 6))}, 0.0
    state = tx.init(g)
    for _ in range(3):
        updates, state = tx.update(g, state)
        applied = applied + updates["w"]
    np.testing.assert_allclose(applied + state.recombine["w"], 3 * g["w"])
    assert state.recombine["w"][0].tolist() == [2.0] * 6


@pytest.mark.parametrize("transform", ["plain", "in turns"])
def test_hyperparameters_may_be_traced(transform):
    """Everything but the rank: with `inject_hyperparams`, say."""
    phase = 0 if transform == "plain" else (0, 1)
    g = {"up": jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)}

    @jax.jit
    def two_steps(refresh_every, scale, b1):
        tx = memopt.in_subspace(
            optax.scale_by_adam(b1),
            projectors.power_iteration(2, rho=scale, b1=b1),
            recombine.lift_and_residual(scale, recover=b1),
            refresh_every,
            memopt.CarryOver(b1, 0.999),
            refresh_phase=phase,
        )
        _, state = tx.update(g, tx.init(g))
        return tx.update(g, state)[0]["up"]

    moved = two_steps(2, 0.5, 0.9)
    assert jnp.isfinite(moved).all()
    assert jnp.abs(moved - two_steps(2, 0.1, 0.9)).max() > 1e-3


@pytest.mark.parametrize(
    ("inner", "seconds"),
    [
        (optax.scale_by_adadelta(), lambda s: (s.e_g, s.e_x)),
        (optax.scale_by_adan(), lambda s: (s.n,)),
        (optax.scale_by_rms(), lambda s: (s.nu,)),
        (optax.scale_by_amsgrad(), lambda s: (s.nu, s.nu_max)),
    ],
    ids=["adadelta", "adan", "rms", "amsgrad"],
)
def test_second_moments_that_are_carried_stay_positive(inner, seconds):
    """Whatever the field they stand in is called."""
    tx = memopt.in_subspace(inner, projectors.gaussian(4), recombine.lift(), 2, "carry")
    params = {"w": jnp.zeros((8, 24))}
    state, update, draw = tx.init(params), jax.jit(tx.update), np.random.default_rng(0)
    for _ in range(7):
        g = {"w": jnp.asarray(draw.normal(size=(8, 24)), jnp.float32)}
        updates, state = update(g, state, params)
        assert np.isfinite(updates["w"]).all()
        assert all((moment["w"] >= 0).all() for moment in seconds(state.inner))


def test_quantised_moments_are_not_carried_but_refused():
    inner = memopt.quantize_state(optax.scale_by_adam(), min_size=1)
    tx = memopt.in_subspace(inner, projectors.gaussian(4), recombine.lift(), 2, "carry")
    with pytest.raises(
        memopt.IncompatiblePairingError, match=r"memopt\.quantize_state\(in_subspace"
    ):
        tx.init({"w": jnp.zeros((8, 24))})


def test_quantised_moments_begin_anew():
    """Their codes are integers, but no step counts."""
    adam = memopt.quantize_state(optax.scale_by_adam(b1=0.5, b2=0.5, eps=0.0), min_size=1)
    exact = optax.scale_by_adam(b1=0.5, b2=0.5, eps=0.0)
    ones = [{"w": jnp.ones((4, 6))}] * 3
    expected, found = (
        updates_of(memopt.in_subspace(inner, IDENTITY, recombine.lift(), 2, "reset_moments"), ones)
        for inner in (exact, adam)
    )
    assert found == pytest.approx(expected, rel=0.02)


class UnknownState(NamedTuple):
    m: Any
    v: Any


def test_a_moment_of_unknown_order_is_not_carried():
    zeros = lambda params: jax.tree.map(jnp.zeros_like, params)
    inner = optax.GradientTransformation(
        lambda params: UnknownState(zeros(params), zeros(params)), lambda u, s, p=None: (u, s)
    )
    tx = memopt.in_subspace(inner, projectors.gaussian(2), recombine.lift(), on_refresh="carry")
    with pytest.raises(memopt.IncompatiblePairingError, match="the field 'v' of UnknownState"):
        tx.init({"w": jnp.ones((8, 16))})


def test_a_basis_may_be_moved_by_an_optimizer_with_a_factored_state():
    tx = memopt.online_subspace_descent(
        1e-2, rank=2, projector_optimizer=memopt.adafactor(1e-3), rest=optax.sgd(1.0)
    )
    params = {"w": jax.random.normal(jax.random.key(0), (3, 8, 16))}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
    assert jnp.isfinite(updates["w"]).all()
    layer = jax.tree.map(lambda x: x[1], params)
    alone = tx.init(layer)
    for _ in range(2):
        one, alone = tx.update(layer, alone, layer)
    assert jnp.abs(one["w"] - updates["w"][1]).max() < 1e-5


@pytest.mark.parametrize(
    "inner",
    [
        optax.novograd(1e-2, weight_decay=0.1),
        optax.chain(optax.scale_by_factored_rms(), optax.add_decayed_weights(0.1)),
        optax.lamb(1e-2),
    ],
    ids=["novograd", "factored_rms", "lamb"],
)
def test_an_inner_optimizer_is_given_projected_parameters(inner):
    """In the whole space they are the parameters; in a part they have the gradient's shape."""
    draw = np.random.default_rng(0)
    g, params = ({"w": jnp.asarray(draw.normal(size=(4, 6)), jnp.float32)} for _ in range(2))
    tx = memopt.in_subspace(inner, IDENTITY, recombine.lift())
    expected, _ = inner.update(g, inner.init(params), params)
    found, _ = jax.jit(tx.update)(g, tx.init(params), params)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-4)
    part = memopt.in_subspace(inner, projectors.svd(2), recombine.lift())
    assert jnp.isfinite(part.update(g, part.init(params), params)[0]["w"]).all()


def test_an_inner_optimizer_that_keeps_parameters_is_refused():
    inner = optax.contrib.schedule_free_adamw(1e-2)
    tx = memopt.in_subspace(inner, projectors.svd(2), recombine.lift())
    with pytest.raises(memopt.IncompatiblePairingError, match="inner must not keep values of its"):
        tx.init({"w": jnp.zeros((4, 6))})


def test_momentum_is_orthogonalised_in_a_subspace_as_it_would_be_outside():
    """Newton–Schulz iterations see singular values, which an orthonormal basis does not change."""
    draw = np.random.default_rng(0)
    gradients = [{"w": jnp.asarray(draw.normal(size=(3, 8, 12)), jnp.float32)} for _ in range(3)]
    low, orthogonal = optax.trace(0.9), memopt.orthogonalize()
    on = lambda inner: memopt.in_subspace(inner, projectors.orthogonal(2), recombine.lift(), 2)
    inside, outside = on(optax.chain(low, orthogonal)), optax.chain(on(low), orthogonal)
    states = inside.init(gradients[0]), outside.init(gradients[0])
    for g in gradients:
        (u, a), (v, b) = inside.update(g, states[0]), outside.update(g, states[1])
        states = a, b
        np.testing.assert_allclose(u["w"], v["w"], atol=1e-4)  # 3.4445⁵ ε
        assert jnp.linalg.matrix_rank(u["w"], rtol=1e-3).tolist() == [2, 2, 2]
