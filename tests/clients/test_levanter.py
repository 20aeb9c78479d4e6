"""Levanter's Llama and its optimizers' configuration, where it is installed (extra `levanter`)."""

import itertools
import shutil

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
import yaml

import memopt
from memopt.integrations import register_levanter
from memopt.trees import named_leaves
from tests.clients.optimizers import METHODS
from tests.clients.page import TRAINERS, run
from tests.clients.trainers import BY_NAME, assert_on_the_page, assert_same
from tests.clients.training import (
    HEADS,
    HIDDEN,
    TOKENS,
    VOCABULARY,
    WIDTH,
    make_mesh,
    next_token_loss,
    rate,
    saved_and_read,
)
from tests.clients.trees import assert_like

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]  # its own warnings
llama = pytest.importorskip("levanter.models.llama")
levanter_trainer = pytest.importorskip("levanter.trainer")

STEPS = 4
PLAIN = {"lr_schedule": "constant", "warmup": 0, "weight_decay": 0.0}


def make_model(seed=0):
    import haliax as hax

    config = llama.LlamaConfig(
        max_seq_len=TOKENS.shape[1],
        hidden_dim=WIDTH,
        intermediate_dim=HIDDEN,
        num_layers=4,
        num_heads=HEADS,
        num_kv_heads=2,
    )
    vocabulary = hax.Axis("vocab", VOCABULARY)
    return llama.LlamaLMHeadModel.init(vocabulary, config, key=jax.random.key(seed))


def parsed(**options):
    """The optimizer's configuration, from the page's YAML with some options changed."""
    import draccus
    from levanter.optim.config import OptimizerConfig

    run({}, "Levanter", "register")
    given = yaml.safe_load(TRAINERS["Levanter"]["configuration"]) | options
    return draccus.decode(OptimizerConfig, given)


def loss_of(model, tokens, key=None):
    return next_token_loss(model(tokens).rearrange(("batch", "position", "vocab")).array)


def trained(directory, seed, optimizer):
    """The last state of Levanter's trainer, from a checkpoint or from weights drawn with `seed`."""
    import haliax as hax
    from levanter.checkpoint import CheckpointerConfig
    from levanter.tracker import NoopConfig
    from levanter.utils.mesh import MeshConfig

    config = levanter_trainer.TrainerConfig(
        id="run",
        tracker=NoopConfig(),
        log_dir=directory / "logs",
        log_jaxprs=False,
        log_xla_hlo=False,
        require_accelerator=False,
        num_train_steps=STEPS,
        train_batch_size=len(TOKENS),
        mesh=MeshConfig(axes={"data": 4, "model": 2}),
        checkpointer=CheckpointerConfig(
            base_path=str(directory), save_interval=None, keep=[{"every": 2}]
        ),
    )
    names = {
        "config": config,
        "tx": optimizer.build(config.num_train_steps),
        "loss": loss_of,
        "key": jax.random.PRNGKey(0),  # Levanter cannot save the new kind
        "model_init": lambda: make_model(seed),
        "batches": itertools.repeat(hax.named(jnp.asarray(TOKENS), ("batch", "position"))),
    }
    return run(names, "Levanter", "train")["state"]


@pytest.mark.parametrize("method", METHODS)
def test_trains(method, tmp_path):
    """State is made and kept where Levanter's axis names put it; the loss falls."""
    import equinox as eqx
    import haliax as hax

    tx = METHODS[method](rate(method))
    mapping = {"embed": "fsdp", "mlp": "tp", "vocab": "tp"}
    tokens = hax.named(jnp.asarray(TOKENS), ("batch", "position"))
    with jax.set_mesh(make_mesh()), hax.axis_mapping(mapping):
        params, static = eqx.partition(make_model(), eqx.is_inexact_array)
        params = hax.shard(params)
        state = hax.named_jit(tx.init, out_axis_resources=mapping)(params)

        @hax.named_jit(axis_resources=mapping)
        def step(params, state):
            loss = lambda params: loss_of(eqx.combine(params, static), tokens)
            value, gradients = eqx.filter_value_and_grad(loss)(params)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, value

        losses = []
        for _ in range(3):
            params, state, loss = step(params, state)
            losses.append(float(loss))
    assert losses[-1] < losses[0]
    chex.assert_tree_all_finite((params, state))
    for name, x in named_leaves(state)[0]:
        if isinstance(x, hax.NamedArray):
            assert x.array.ndim == len(x.axis_names), name
    saved_and_read((params, state), tmp_path)


def test_tree_by_hand_is_levanters():
    import equinox as eqx

    assert_like("levanter_llama", eqx.filter(make_model(), eqx.is_inexact_array))


@pytest.mark.parametrize(("method", "options"), BY_NAME)
def test_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(method, options, tmp_path):
    optimizer = parsed(method=method, options=options)
    whole = trained(tmp_path, 0, optimizer)
    _, last = sorted((tmp_path / "run").iterdir())
    shutil.rmtree(last)
    resumed = trained(tmp_path, 1, optimizer)
    first, second = ((s.step, s.trainable_model, s.opt_state) for s in (whole, resumed))
    assert int(whole.step) == STEPS
    assert_same(first, second)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(whole.opt_state))


def test_the_page_has_its_names():
    import equinox as eqx

    tx, params = parsed().build(1000), eqx.filter(make_model(), eqx.is_inexact_array)
    assert_on_the_page("Levanter", tx, params)
    assert tx.init(params).hyperparams["learning_rate"] == 0.0  # the warm-up's; Levanter logs it


def test_which_axes_are_inputs_is_read_from_the_layers():
    import equinox as eqx
    import haliax as hax
    from levanter.models.gpt2 import Gpt2Config, Gpt2LMHeadModel

    tx = parsed(method="muon", options={}).build(10)
    rows = memopt.describe(tx, eqx.filter(make_model(), eqx.is_inexact_array))
    layers = "transformer/layers/stacked"
    assert rows[f"{layers}/mlp/up_proj/weight"].axes == "rows 2, cols 1, stack 0"
    assert rows[f"{layers}/self_attn/q_proj/weight"].axes == "rows 4, cols 1 2 3, stack 0"
    config = Gpt2Config(max_seq_len=8, hidden_dim=16, num_heads=4, num_layers=2)
    gpt2 = Gpt2LMHeadModel.init(hax.Axis("vocab", VOCABULARY), config, key=jax.random.key(0))
    rows = memopt.describe(tx, eqx.filter(gpt2, eqx.is_inexact_array))
    assert rows["transformer/blocks/stacked/mlp/c_fc/weight"].axes == "rows 1, cols 2, stack 0"


def test_frozen_layers_are_left_out():
    import equinox as eqx

    params = eqx.filter(make_model(), eqx.is_inexact_array)
    frozen = lambda layers: jax.tree.map(lambda _: None, layers)
    params = eqx.tree_at(lambda model: model.transformer, params, replace_fn=frozen)
    tx = memopt.muon(1e-2)  # the decay mask of a configuration, Levanter's own, needs all arrays
    updates, _ = tx.update(params, tx.init(params), params)
    assert {name for name, _ in named_leaves(updates)[0]} == {
        "embeddings/token_embeddings/weight",
        "lm_head/weight",
    }


def test_a_second_registration_returns_the_same_class():
    assert register_levanter() is register_levanter()


def test_decay_is_that_of_the_configuration():
    import equinox as eqx

    params = eqx.filter(make_model(), eqx.is_inexact_array)
    still = jax.tree.map(jnp.zeros_like, params)
    tx = parsed(method="lion", options={}, **PLAIN | {"weight_decay": 0.5}).build(10)
    updates, _ = tx.update(still, tx.init(params), params)
    decays = {name: bool(x.array.any()) for name, x in named_leaves(updates)[0]}
    assert decays["transformer/layers/stacked/mlp/up_proj/weight"]
    assert not decays["transformer/layers/stacked/input_layernorm/weight"]
    assert not decays["embeddings/token_embeddings/weight"]  # by Levanter's own mask
