"""EasyDeL's own loop and factory of optimizers, where it is installed."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memopt
from tests.clients.page import run
from tests.clients.trainers import BY_NAME, assert_on_the_page, assert_same
from tests.clients.training import HEADS, HIDDEN, LENGTH, VOCABULARY, WIDTH

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]  # its own warnings
eformer = pytest.importorskip("eformer.optimizers")

STEPS, ROWS = 3, 8
PARAMS = {
    "embed_tokens": {"embedding": jnp.ones((64, 16))},
    "up_proj": {"kernel": jnp.ones((16, 32))},
}


def make_model(seed):
    import easydel
    from flax import nnx

    config = easydel.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        attn_mechanism="vanilla",
        sharding_axis_dims=(1, 4, 1, 2, 1),
    )
    dtypes = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    return easydel.LlamaForCausalLM(config, **dtypes, rngs=nnx.Rngs(seed)).shard_model()


def trained(directory, seed=0, **more):
    """Trains by the page's code and returns its trainer and the state after the last step."""
    from datasets import Dataset

    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (STEPS * ROWS, LENGTH))
    columns = {"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}
    names = run({}, "EasyDeL", "optimizer")
    names["optimizer"] |= {
        "learning_rate": 1e-2,
        "total_batch_size": ROWS,
        "max_length": LENGTH,
        "use_wandb": False,
        "track_memory": False,
    } | more
    given = {
        "directory": str(directory),
        "steps": STEPS,
        "model": make_model(seed),
        "dataset": Dataset.from_dict(columns),
    }
    return run(names | given, "EasyDeL", "train")


@pytest.mark.parametrize(("method", "options"), BY_NAME)
def test_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(method, options, tmp_path):
    chosen = {"extra_optimizer_kwargs": {"method": method, "options": options}}
    whole = trained(tmp_path, **chosen)
    shutil.rmtree(next(tmp_path.glob(f"**/run-{STEPS}")))
    resumed = trained(tmp_path, seed=1, **chosen)
    assert resumed["trainer"]._resumed_from_checkpoint
    first, second = (
        (names["state"].step, names["state"].graphstate, names["state"].opt_state)
        for names in (whole, resumed)
    )
    assert int(first[0]) == STEPS
    assert_same(first, second)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(first[1]))


def test_the_page_has_its_names():
    from flax import nnx

    params = nnx.state(make_model(0), nnx.Param)
    assert_on_the_page("EasyDeL", made(), params)


def made(**options):
    """Calls the factory with the arguments that `TrainingArguments` passes to it."""
    scheduler = eformer.SchedulerConfig(learning_rate=1e-2)
    given = run({}, "EasyDeL", "optimizer")["optimizer"] | options
    extra = given["extra_optimizer_kwargs"]
    tx, _ = eformer.OptimizerFactory.create(
        given["optimizer"], scheduler, weight_decay=0.0, clip_grad=1.0, mu_dtype=None, **extra
    )
    return tx


def shapes(tx):
    """The shapes of the state's arrays, without step counts."""
    return sorted(x.shape for x in jax.tree.leaves(tx.init(PARAMS)) if x.ndim)


def test_the_page_makes_the_method_with_its_options():
    assert shapes(made()) == shapes(memopt.apollo_mini(1e-2, rank=1))
    updates, _ = made().update(PARAMS, made().init(PARAMS), PARAMS)
    assert all(x.all() for x in jax.tree.leaves(updates))


def test_options_reach_the_method():
    options = {"method": "galore", "options": {"rank": 4}}
    assert shapes(made(extra_optimizer_kwargs=options)) == shapes(memopt.galore(1e-2, rank=4))


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="did you mean 'apollo'"):
        made(extra_optimizer_kwargs={"method": "apolo"})
