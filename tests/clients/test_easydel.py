"""EasyDeL's own factory of optimizers with memopt's, where it is installed (extra `easydel`)."""

import jax
import jax.numpy as jnp
import pytest

import memopt
from tests.clients.page import run

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]  # its own warnings
eformer = pytest.importorskip("eformer.optimizers")

PARAMS = {
    "embed_tokens": {"embedding": jnp.ones((64, 16))},
    "up_proj": {"kernel": jnp.ones((16, 32))},
}


def made(**options):
    """Calls the factory with the arguments that `TrainingArguments` passes to it."""
    scheduler = eformer.SchedulerConfig(learning_rate=1e-2)
    given = run({}, "EasyDeL", "optimizer")["optimizer"] | options
    extra = given["extra_optimizer_kwargs"]
    tx, _ = eformer.OptimizerFactory.create(
        given["optimizer"], scheduler, weight_decay=0.0, clip_grad=1.0, mu_dtype=None, **extra
    )
    return tx


def test_the_page_makes_the_method_with_its_options():
    expected = memopt.state_bytes(memopt.apollo_mini(1e-2, rank=1), PARAMS).states
    assert memopt.state_bytes(made(), PARAMS).states == expected
    updates, _ = made().update(PARAMS, made().init(PARAMS), PARAMS)
    assert all(x.all() for x in jax.tree.leaves(updates))


def test_options_reach_the_method():
    options = {"method": "galore", "options": {"rank": 4}}
    expected = memopt.state_bytes(memopt.galore(1e-2, rank=4), PARAMS).states
    assert memopt.state_bytes(made(extra_optimizer_kwargs=options), PARAMS).states == expected


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="did you mean 'apollo'"):
        made(extra_optimizer_kwargs={"method": "apolo"})
