"""Old names work for one release."""

import functools

import jax.numpy as jnp
import optax
import pytest

import memopt
from memopt import projectors, recombine

OLD_NAMES = {
    "NoSuchPairing": memopt.IncompatiblePairingError,
    "apply_updates": memopt.apply_rounded_updates,
    "scale_by_factored_rms": memopt.scale_by_factored_matrix_rms,
    "scale_by_shape": memopt.scale_by_matrix_shape,
    "update_at": memopt.reshard_update,
    "whole_shorter_sides": memopt.unshard_short_side,
}
OLD_ARGUMENTS = {
    "adafactor": (memopt.adafactor, {"eps_scale": 0.5}, {"min_scale": 0.5}),
    "adalomo": (lambda **o: memopt.adalomo(1e-3, **o), {"eps_scale": 0.5}, {"min_scale": 0.5}),
    "factored": (memopt.scale_by_factored_matrix_rms, {"epsilon": 0.5}, {"eps": 0.5}),
    "clip": (memopt.clip_by_matrix_rms, {"threshold": 0.5}, {"clip_threshold": 0.5}),
    "group": (memopt.normalize_by_group, {"threshold": 0.5}, {"clip_threshold": 0.5}),
    "orthogonalize": (memopt.orthogonalize, {"steps": 2}, {"ns_steps": 2}),
    "by name": (
        lambda **o: memopt.optimizer("adafactor", 1e-2, **o),
        {"eps_scale": 0.5},
        {"min_scale": 0.5},
    ),
}


@pytest.mark.parametrize("old", OLD_NAMES)
def test_an_old_name_is_the_new_one_and_warns(old):
    with pytest.warns(DeprecationWarning, match=OLD_NAMES[old].__name__):
        assert getattr(memopt, old) is OLD_NAMES[old]


@pytest.mark.parametrize(
    ("old", "new"), [("Leaf", projectors.MatrixSpec), ("When", projectors.RefreshClock)]
)
def test_an_old_name_of_projectors_is_the_new_one_and_warns(old, new):
    with pytest.warns(DeprecationWarning, match=new.__name__):
        assert getattr(projectors, old) is new


def test_an_old_name_of_recombine_is_the_new_one_and_warns():
    with pytest.warns(DeprecationWarning, match="lift_and_residual"):
        assert recombine.lift_and_rest is recombine.lift_and_residual
    with pytest.warns(DeprecationWarning, match="Subspace"):
        assert recombine.Projected is recombine.Subspace


@pytest.mark.parametrize("case", OLD_ARGUMENTS)
def test_an_old_argument_means_the_new_one_and_warns(case):
    make, old, new = OLD_ARGUMENTS[case]
    w = 0.01 * jnp.arange(12.0).reshape(3, 4)
    update = lambda tx: tx.update(w + 1, tx.init(w), w)[0].tolist()
    default, expected = update(make()), update(make(**new))
    assert expected != default
    with pytest.warns(DeprecationWarning, match=rf"{next(iter(old))}=…\) is now"):
        assert update(make(**old)) == expected


def test_the_old_word_for_micro_steps_means_the_new_one_and_warns():
    with pytest.warns(DeprecationWarning, match="every_k_schedule"):
        tx = memopt.accumulate(optax.sgd(1.0), every=2)
    state = tx.init(jnp.zeros(1))
    assert not tx.update(jnp.ones(1), state)[0].any()


@pytest.mark.parametrize("make", [memopt.orthogonalize, functools.partial(memopt.muon, 1e-3)])
def test_the_old_name_of_the_replica_axis_works_and_warns(make):
    with pytest.warns(DeprecationWarning, match="replica_axis"):
        make(copied_over="x")


def test_an_argument_under_both_names_is_refused():
    with (
        pytest.raises(TypeError, match="both 'clip_threshold' and its old name 'threshold'"),
    ):
        memopt.clip_by_matrix_rms(threshold=1.0, clip_threshold=5.0)


def test_old_names_of_transforms_and_of_the_limiter_still_work():
    with pytest.warns(DeprecationWarning, match="scale_by_matrix_shape"):
        assert memopt.transforms.scale_by_shape is memopt.scale_by_matrix_shape
    with pytest.warns(DeprecationWarning, match="growth_limit"):
        assert memopt.GrowthLimiter(limit=2.0) == memopt.GrowthLimiter(2.0)
    limiter = memopt.GrowthLimiter(2.0)
    assert limiter._replace(growth_limit=3.0).growth_limit == 3.0


def test_a_projector_that_overrides_an_old_method_is_refused():
    with pytest.raises(TypeError, match=r"Mine\.rest is now residual"):
        type("Mine", (projectors.Projector,), {"rest": None})
