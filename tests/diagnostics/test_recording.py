"""Values recorded by `with_diagnostics`, and the steps that it leaves as they are."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt import diagnostics, projectors
from memopt.diagnostics import recorded, with_diagnostics
from tests.training.test_release import both


def tree(seed):
    first, second, third = jax.random.split(jax.random.key(seed), 3)
    return {
        "embed": {"embedding": jax.random.normal(first, (20, 8))},
        "up": {"kernel": jax.random.normal(second, (3, 8, 12))},
        "norm": {"scale": 1 + 0.1 * jax.random.normal(third, (3, 8))},
    }


PARAMS = tree(0)


def steps(tx, count=5, params=PARAMS):
    """Yields gradients, updates, parameters and state of each step."""
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in range(1, count + 1):
        gradients = tree(seed)
        updates, state = update(gradients, state, params)
        yield gradients, updates, params, state
        params = optax.apply_updates(params, updates)


def test_updates_and_the_optimizers_state_are_unchanged():
    tx = memopt.galore(0.1, rank=2)
    plain, wrapped = steps(tx), steps(with_diagnostics(tx, every=3))
    for one, other in zip(plain, wrapped, strict=True):
        chex.assert_trees_all_equal(one[1], other[1])
        chex.assert_trees_all_equal(one[3], other[3].inner)


def test_values_are_those_of_each_matrix_of_a_stack():
    for gradients, updates, params, state in steps(with_diagnostics(memopt.lion(0.1))):
        found = recorded(state)
        norm = lambda x: np.sqrt(np.square(np.float64(x)).sum((-2, -1)))
        for name, group in (("embed/embedding", "embed"), ("up/kernel", "up")):
            g, u, w = (jax.tree.leaves(x[group])[0] for x in (gradients, updates, params))
            np.testing.assert_allclose(
                found["update_to_weight"][name], norm(u) / norm(w), rtol=1e-5
            )
            size = (g.shape[-1] * g.shape[-2]) ** 0.5
            np.testing.assert_allclose(found["gradient_rms"][name], norm(g) / size, rtol=1e-5)
            spectrum = np.linalg.svd(np.float64(u), compute_uv=False)
            rank = np.square(spectrum).sum(-1) / np.square(spectrum[..., 0])
            over = found["update_stable_rank"][name] / rank  # power iteration has not converged
            assert (over > 1 - 1e-5).all()
            assert (over < 1.15).all()
        scale = np.sqrt(np.square(gradients["norm"]["scale"]).mean(-1))
        np.testing.assert_allclose(found["gradient_rms"]["norm/scale"], scale, rtol=1e-5)
        assert "norm/scale" not in found["update_stable_rank"]


def test_values_are_those_of_the_last_measurement():
    measures = {"mean": diagnostics.measure(lambda layout, g: g.mean(layout.core), "gradient")}
    tx = with_diagnostics(optax.sgd(0.1), measures, every=3)
    assert np.isnan(recorded(tx.init(PARAMS))["mean"]["up/kernel"]).all()
    found = [(g, recorded(state)["mean"]["up/kernel"]) for g, _, _, state in steps(tx)]
    for step, (_, mean) in enumerate(found):
        gradients = found[step // 3 * 3][0]
        np.testing.assert_allclose(mean, gradients["up"]["kernel"].mean((1, 2)), rtol=1e-5)


def test_the_energy_in_a_subspace_is_that_of_the_basis_it_was_chosen_with():
    measures = {
        "fresh": diagnostics.projected_energy(projectors.svd(2)),
        "held": diagnostics.projected_energy(projectors.svd(2), refresh_every=3),
    }
    first = None
    for step, (gradients, _, _, state) in enumerate(
        steps(with_diagnostics(optax.sgd(0.1), measures))
    ):
        found = recorded(state)
        g = np.float64(gradients["up"]["kernel"])
        u, spectrum, _ = np.linalg.svd(g)
        energy = np.square(spectrum)
        share = energy[:, :2].sum(-1) / energy.sum(-1)
        np.testing.assert_allclose(found["fresh"]["up/kernel"], share, rtol=1e-4)
        first = u[..., :2] if step % 3 == 0 else first
        held = np.square(first.transpose(0, 2, 1) @ g).sum((1, 2)) / np.square(g).sum((1, 2))
        np.testing.assert_allclose(found["held"]["up/kernel"], held, rtol=1e-4)
        assert list(found["fresh"]) == ["up/kernel"]


def test_it_is_found_within_other_transformations():
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.inject_hyperparams(lambda rate: with_diagnostics(memopt.lion(rate)))(0.1),
    )
    *_, state = next(steps(tx))
    assert np.isfinite(recorded(state)["update_rms"]["up/kernel"]).all()


def test_a_released_step_records_the_same():
    ordinary, released = both(with_diagnostics(memopt.lion(1e-2), every=2), steps=4)
    one, other = (recorded(state.opt_state) for state, _ in (ordinary, released))
    chex.assert_trees_all_close(one, other, rtol=1e-3)


def test_sharded_values_are_the_unsharded_ones():
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = with_diagnostics(memopt.apollo_mini(0.1))
    placed = jax.device_put(PARAMS, jax.NamedSharding(mesh, jax.P()))
    sharded = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    placed["up"]["kernel"] = jax.device_put(PARAMS["up"]["kernel"], sharded)
    state = memopt.init_sharded(tx, placed)
    assert state.values["update_rms"]["up"]["kernel"].sharding.is_fully_replicated
    _, state = jax.jit(tx.update)(placed, state, placed)
    _, expected = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(recorded(state), recorded(expected), rtol=1e-4)


def test_values_are_read_in_a_quantised_state_and_are_not_rounded():
    inner = with_diagnostics(
        optax.adam(0.1), {"g": diagnostics.measure(lambda layout, g: g, "gradient")}
    )
    tx = memopt.quantize_state(inner, min_size=8)
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    assert state.codes.inner[0].mu["up"]["kernel"].dtype == "int8"
    np.testing.assert_array_equal(recorded(state)["g"]["up/kernel"], PARAMS["up"]["kernel"])


def test_averaged_parameters_are_those_without_diagnostics():
    tx = memopt.optimizer("schedule_free", 0.1)
    state = tx.init(PARAMS)
    _, state = tx.update(tree(1), state, PARAMS)
    wrapped = with_diagnostics(tx).init(PARAMS)._replace(inner=state)
    found = (memopt.eval_params("schedule_free", x, tree(2)) for x in (state, wrapped))
    chex.assert_trees_all_equal(*found)
    with pytest.raises(ValueError, match=r"state must hold one optax\.contrib\.ScheduleFreeState"):
        memopt.eval_params("schedule_free", memopt.quantize_state(tx).init(PARAMS), PARAMS)


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        with_diagnostics(optax.sgd(0.1), every=0)
    tx = with_diagnostics(optax.sgd(0.1))
    with pytest.raises(ValueError, match="params must be given to update"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match=r"must be of an optimizer in .*with_diagnostics"):
        recorded(optax.sgd(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="measure 'gradient_rms' is recorded twice"):
        recorded(with_diagnostics(tx).init(PARAMS))
    with pytest.raises(ValueError, match="of 'updates' is unknown; did you mean 'update'"):
        diagnostics.rms("updates")
    with pytest.raises(ValueError, match=r"of 'parameter' is unknown.*Allowed: gradient, update"):
        diagnostics.projected_energy(projectors.svd(2), of="parameter")
    with pytest.raises(ValueError, match="projector must have orthonormal bases"):
        diagnostics.projected_energy(projectors.gaussian(2))


def test_measures_do_not_depend_on_the_scale_of_what_they_measure():
    scale = 1e-30
    measures = dict(diagnostics.DEFAULT) | {
        "energy": diagnostics.projected_energy(projectors.svd(2))
    }
    tx = with_diagnostics(optax.identity(), measures)
    found = []
    for factor in (1.0, scale):
        scaled = jax.tree.map(lambda x, factor=factor: factor * x, PARAMS)
        found.append(recorded(tx.update(scaled, tx.init(scaled), scaled)[1]))
    plain, other = found
    for name in ("gradient_rms", "update_rms"):
        plain[name] = {key: scale * x for key, x in plain[name].items()}
    chex.assert_trees_all_close(other, plain, rtol=1e-4)


def test_measures_of_zeros_are_zero():
    tx = with_diagnostics(optax.sgd(0.1), {"rms": diagnostics.rms("gradient")})
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    values = recorded(tx.update(zeros, tx.init(PARAMS), PARAMS)[1])["rms"]
    assert all((x == 0).all() for x in values.values())


def test_measures_of_integers_keep_their_dtype():
    def count(layout, g):
        return (g > 0).sum(layout.core)

    tx = with_diagnostics(optax.sgd(0.1), {"positive": diagnostics.measure(count, "gradient")})
    state = tx.init(PARAMS)
    for _ in range(2):
        _, after = jax.jit(tx.update)(PARAMS, state, PARAMS)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    up = PARAMS["up"]["kernel"]
    expected = (np.asarray(up) > 0).sum((1, 2))
    np.testing.assert_array_equal(recorded(after)["positive"]["up/kernel"], expected)
