"""MaxText's own loop and function for optimizers, where it is installed (extra `maxtext`)."""

import shutil
import types

import jax
import jax.numpy as jnp
import optax
import pytest
import yaml

import memopt
from memopt.integrations import maxtext_optimizer
from tests.clients.page import run
from tests.clients.trainers import BY_NAME, assert_on_the_page, assert_same
from tests.clients.training import HEADS, HIDDEN, LENGTH, VOCABULARY, WIDTH

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]  # its own warnings
optimizers = pytest.importorskip("maxtext.optimizers.optimizers")

STEPS = 3  # MaxText names a checkpoint by the step before it, counted from 0
MODEL = {
    "base_emb_dim": WIDTH,
    "base_mlp_dim": HIDDEN,
    "base_num_query_heads": HEADS,
    "base_num_kv_heads": 2,
    "head_dim": WIDTH // HEADS,
    "base_num_decoder_layers": 2,
    "vocab_size": VOCABULARY,
    "max_target_length": LENGTH,
    "dtype": "float32",
}
RUN = {
    "base_config": "base.yml",
    "run_name": "run",
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "sharding_tolerance": 1.0,  # norms are whole on each device
    "dataset_type": "synthetic",
    "per_device_batch_size": 1,
    "steps": STEPS,
    "checkpoint_period": 1,
    "async_checkpointing": False,
    "enable_tensorboard": False,
}

PARAMS = {
    "token_embedder": {"embedding": jnp.ones((64, 16))},
    "mlp": {"wi_0": {"kernel": jnp.ones((16, 32))}},
}


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Trains by the page's code in a directory, and returns the state after the last step."""
    from maxtext.trainers.pre_train import train

    loop, states = train.train_loop, []
    monkeypatch.setattr(train, "train_loop", lambda *given: states.append(loop(*given)))

    def trained(optimizer, **more):
        configuration = tmp_path / "configuration.yml"
        here = {"base_output_directory": str(tmp_path)}
        configuration.write_text(yaml.safe_dump(RUN | MODEL | here | more))
        run({"optimizer": optimizer, "configuration": str(configuration)}, "MaxText", "train")
        return states.pop()

    generator = jax.config.jax_default_prng_impl
    yield trained
    jax.config.update("jax_default_prng_impl", generator)  # which MaxText changes


@pytest.mark.parametrize(("method", "options"), BY_NAME)
def test_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(method, options, trained, tmp_path):
    whole = trained(maxtext_optimizer(method, **options))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS - 1))
    resumed = trained(maxtext_optimizer(method, **options), init_weights_seed=1)
    assert int(whole.optimizer.step.get_value()) == STEPS
    assert_same(*map(arrays, (whole, resumed)))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(arrays(whole.model)))


def arrays(state):
    """All arrays of a model and of its optimizer, keys of random numbers as integers."""
    from flax import nnx

    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, nnx.pure(state))


def test_the_page_has_its_names(trained):
    from flax import nnx

    optimizer = run({}, "MaxText", "optimizer")["optimizer"]
    state = trained(optimizer, steps=1, enable_checkpointing=False)
    params = nnx.filter_state(state.model, nnx.Param)
    tx = memopt.apollo_mini(optax.constant_schedule(1e-2), rank=1)  # MaxText gives a schedule
    assert_on_the_page("MaxText", tx, params)
    shapes = lambda tree: sorted(x.shape for x in jax.tree.leaves(tree))  # NNX sorts the fields
    assert shapes(state.optimizer.opt_state) == shapes(tx.init(params))


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
        pytest.raises(
            ValueError, match=r"opt_type must be 'adam_pax', .*apollo_mini here, got 'adamw'"
        ),
    ):
        made(opt_type="adamw")
