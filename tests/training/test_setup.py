"""The step is described without files, by one module, and compiled for devices that cannot run."""

import dataclasses
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import memopt
from memopt.text.tokenizer import load_tokenizer
from memopt.training.batches import check_vocabulary, find_text, open_batches
from memopt.training.config import Architecture, Config, Optimization, Run, Start, Text
from memopt.training.describe import describe_run
from memopt.training.release import release_step
from memopt.training.setup import abstract_batch, set_up
from memopt.training.step import train_step
from tests.training.nano import NANO


def config(**optimization):
    return Config(
        architecture=Architecture(model="nano", weights=optimization.pop("weights", None)),
        text=Text(data=("nowhere",), tokenizer="nowhere", batch_size=8, seq_len=32),
        optimization=Optimization(**optimization),
        run=Run(mesh="fsdp=4", resume=True),
    )


def placed(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)


@pytest.mark.parametrize("release", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_is_described_and_compiled_without_a_file_and_steps_as_described(
    tmp_path, monkeypatch, release
):
    """Neither its text nor its directory exists."""
    monkeypatch.chdir(tmp_path)
    codes = {"weights": "int8", "state": "int8"} if release else {"optimizer": "galore"}
    setup = describe_run(config(release=release, **codes))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(setup.state))
    assert setup.step.func is (release_step if release else train_step)
    compiled = setup.compile()
    assert compiled.memory_analysis().argument_size_in_bytes > 0
    assert compiled.output_shardings[0] == jax.tree.map(lambda x: x.sharding, setup.state)
    assert list(tmp_path.iterdir()) == []

    rows = {name: np.ones(x.shape, x.dtype) for name, x in setup.batch.items()}
    with jax.set_mesh(setup.mesh):
        state = setup.jit_init(0)()
        assert placed(state) == placed(setup.state)
        state, metrics = setup.jitted(state, setup.place(rows))  # compiled above
    assert placed(state) == placed(setup.state)
    assert state.step == 1
    assert metrics["tokens"] == 8 * 32


def test_calls_do_not_compile_again(caplog):
    setup = describe_run(config(optimizer="sgd"))
    rows = {name: np.ones(x.shape, x.dtype) for name, x in setup.batch.items()}
    with jax.set_mesh(setup.mesh):
        state, batch = setup.jit_init(0)(), setup.place(rows)
        setup.compile()
        with jax.log_compiles():
            setup.jitted(state, batch)
    assert "Compiling jit(train_step)" not in caplog.text


def test_a_run_s_step_is_that_of_its_parts():
    """Benchmarks, which have no `Config`, compile what training compiles."""
    from_options = describe_run(config(optimizer="adafactor", learning_rate=1e-3))
    mesh = Mesh(np.array(jax.devices()[:4]), "fsdp", axis_types=(AxisType.Auto,))
    rate = from_options.learning_rate
    names = tuple(from_options.batch)
    from_parts = set_up(
        NANO,
        mesh,
        memopt.adafactor(rate),
        abstract_batch(mesh, 8, 32, names),
        optimizer="adafactor",
        learning_rate=rate,
    )
    texts = []
    for setup in (from_options, from_parts):
        with jax.set_mesh(setup.mesh):
            texts.append(setup.jitted.lower(setup.state, setup.batch).as_text())
    assert texts[0] == texts[1]


def test_an_optimizer_says_which_parameters_to_evaluate():
    """The parameters trained, as they are stored, unless it averages others."""
    setup = describe_run(config(optimizer="schedule_free", weights="int8"))
    state = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), setup.state)
    state = state._replace(opt_state=state.opt_state._replace(b1=jnp.float32(0.9)))
    found = setup.eval_params(state)
    x = lambda y: (y - 0.1) / 0.9
    expected = jax.tree.map(x, memopt.dequantize_params(state.params))
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    assert jax.eval_shape(setup.loss, found, setup.batch)[0].shape == ()
    plain = dataclasses.replace(setup, optimizer="sgd")
    assert plain.eval_params(state) is state.params


def test_an_option_that_an_optimizer_cannot_take_is_named():
    with pytest.raises(ValueError, match=r"rank=x is neither .*rank: the rank r .*default 0\.25"):
        describe_run(config(optimizer="apollo", option=("rank=x",)))
    with pytest.raises(ValueError, match=r"'apollo' cannot work with option b1=\(1,\)"):
        describe_run(config(optimizer="apollo", option=("b1=(1,)",)))


def test_text_is_opened_alone(text):
    tokenizer = load_tokenizer("bytes")
    options = Config(text=Text(data=(str(text),), batch_size=8, seq_len=32, eval_tokens=512))
    opened = open_batches(options, find_text(options), tokenizer, rows=[2, 5])
    batches, validation, identity = opened.batches, opened.validation[""], opened.identity
    assert next(batches)["inputs"].shape == (2, 32)
    assert [batch["inputs"].shape for batch in validation] == [(2, 32)] * 2
    assert identity["data tokenizer"] == "bytes"
    batches.close()


def vocabulary(rows, *, resume=False, init=None, vocab_size=None):
    config = Config(
        architecture=Architecture(model="60m", vocab_size=vocab_size),
        start=Start(init=init),
        run=Run(resume=resume),
    )
    check_vocabulary(load_tokenizer("bytes"), config, rows)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
    vocabulary(257)
    with pytest.raises(ValueError, match=r"'bytes' has 257 ids, but model '60m' only 256: add"):
        vocabulary(256, vocab_size=256)


def test_a_vocabulary_over_a_quarter_larger_than_the_tokenizer_s_must_be_given():
    vocabulary(321)
    with pytest.raises(ValueError, match=r"'60m' has 322 ids.*'bytes' only 257.*--vocab-size 257"):
        vocabulary(322)
    vocabulary(322, vocab_size=322)


@pytest.mark.parametrize("begun", [{"resume": True}, {"init": Path("runs/60m")}])
def test_a_run_begun_with_too_large_a_vocabulary_goes_on_with_a_warning(begun):
    with pytest.warns(UserWarning, match="'60m' has 32000 ids, .* only 257; the other embeddings"):
        vocabulary(32000, **begun)
