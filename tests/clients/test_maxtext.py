"""MaxText's own function for optimizers with memopt's, where it is installed (extra `maxtext`)."""

import types

import jax
import jax.numpy as jnp
import optax
import pytest

import memopt
from memopt.integrations import maxtext_optimizer

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]  # its own warnings
optimizers = pytest.importorskip("maxtext.optimizers.optimizers")

PARAMS = {
    "token_embedder": {"embedding": jnp.ones((64, 16))},
    "mlp": {"wi_0": {"kernel": jnp.ones((16, 32))}},
}


def configuration(**options):
    """The options of a configuration that MaxText's function reads."""
    given = {
        "opt_type": "adam_pax",
        "adam_b1": 0.9,
        "adam_b2": 0.95,
        "adam_eps": 1e-8,
        "adam_eps_root": 0.0,
        "adam_weight_decay": 0.0,
        "adamw_mask": [],
        "skip_step_on_spikes": False,
        "trainable_parameters_mask": [],
    }
    return types.SimpleNamespace(**given | options)


def made(**options):
    return optimizers.get_optimizer(configuration(**options), optax.constant_schedule(1e-2))


def test_the_context_makes_the_method_and_then_is_over():
    before = optimizers.get_optimizer, optimizers.adam_pax
    with maxtext_optimizer("apollo_mini", rank=1):
        expected = memopt.state_bytes(memopt.apollo_mini(1e-2, rank=1), PARAMS).states
        assert memopt.state_bytes(made(), PARAMS).states == expected
    assert before == (optimizers.get_optimizer, optimizers.adam_pax)
    assert isinstance(made().init(PARAMS), optax.ScaleByAdamState)


def test_decay_and_its_mask_are_those_of_the_configuration():
    with maxtext_optimizer("lion"):
        tx = made(adam_weight_decay=0.5, adamw_mask=["embedding"])
    still = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(still, tx.init(PARAMS), PARAMS)
    assert not updates["token_embedder"]["embedding"].any()
    assert updates["mlp"]["wi_0"]["kernel"].all()


def test_methods_of_optax_take_no_decay_from_the_configuration():
    with maxtext_optimizer("sgd", momentum=0.9):
        made(adam_weight_decay=0.5).init(PARAMS)


def test_maxtexts_wrappers_stay_around_it():
    with maxtext_optimizer("galore", rank=2):
        spikes = {"skip_step_interval": 8, "skip_step_scaling_factor": 6.0}
        state = made(skip_step_on_spikes=True, **spikes).init(PARAMS)
        frozen = made(trainable_parameters_mask=["mlp"])
    assert {"inner_state", "losses"} <= state.keys()
    updates, _ = frozen.update(PARAMS, frozen.init(PARAMS), PARAMS)
    assert not updates["token_embedder"]["embedding"].any()


def test_another_opt_type_is_refused():
    with (
        maxtext_optimizer("apollo_mini"),
        pytest.raises(ValueError, match=r"opt_type must be 'adam_pax', .*apollo_mini, got 'adamw'"),
    ):
        made(opt_type="adamw")
