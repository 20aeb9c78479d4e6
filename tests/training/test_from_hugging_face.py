"""Runs that start from a Hugging Face model directory."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import memopt
from memopt.cli.pretrain import parse
from memopt.json_lines import read_json_lines
from memopt.models import hugging_face, llama
from memopt.text.tokenizer_files import tokenizer_files
from memopt.training import start as start_module
from memopt.training.loop import train
from memopt.training.open import open_run
from tests.training.nano import NANO

LONGER = dataclasses.replace(NANO, vocab_size=300, num_kv_heads=1, num_layers=3)


@pytest.fixture(scope="module")
def model():
    return llama.Llama(LONGER, rngs=nnx.Rngs(3))


@pytest.fixture
def directory(model, tmp_path):
    """A model that is no preset, with the tokenizer of bytes and more rows than that has ids."""
    return save(model, tmp_path / "brought")


def save(model, directory):
    llama.to_hugging_face(model, directory)
    for name, content in tokenizer_files("bytes").items():
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture
def start(directory, text, tmp_path):
    flags = (
        f"--init={directory} --data {text} --batch-size=8 --seq-len=32 --eval-tokens=512 "
        f"--mesh=data=1 --steps=4 --warmup=0.5 --checkpoint-every=2 --eval-every=2 "
        f"--output={tmp_path / 'run'}"
    )
    return lambda *options: open_run(parse([*flags.split(), *options]))


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_weights_shapes_and_tokenizer_are_the_directory_s_and_the_state_is_fresh(
    start, model, directory, tmp_path
):
    run = start()
    chex.assert_trees_all_equal(run.state.params, params_of(model))
    chex.assert_trees_all_equal(run.state.opt_state, run.setup.tx.init(run.state.params))
    assert run.setup.model_config == LONGER
    assert run.config.architecture.model == "brought"
    assert (run.tokenizer.name, run.tokenizer.vocab_size) == (str(directory), 257)
    assert run.origin == f"from the weights of {directory}"
    assert [float(run.setup.learning_rate(step)) for step in (0, 1)] == [0, pytest.approx(2.5e-3)]
    state = train(run, Console(quiet=True))[0]
    assert int(state.step) == 4
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_resumed_it_does_not_need_the_directory(start, directory, tmp_path):
    run = start("--param-dtype=bfloat16")
    run.checkpoints.close()  # killed before its first step
    shutil.rmtree(directory)
    resumed = open_run(parse(["--resume", f"--output={tmp_path / 'run'}"]))
    chex.assert_trees_all_equal(resumed.state, run.state)
    assert resumed.config.architecture == run.config.architecture
    assert resumed.setup.model_config == run.setup.model_config
    assert resumed.tokenizer.digest == run.tokenizer.digest
    assert resumed.tokenizer.name == str(tmp_path / "run" / "tokenizer")
    copies = {path.name: path.read_bytes() for path in (tmp_path / "run" / "tokenizer").iterdir()}
    assert copies == tokenizer_files("bytes")


def test_killed_before_its_first_checkpoint_it_starts_from_the_directory_again(start, tmp_path):
    run = start()
    run.checkpoints.close()
    run.batches.close()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    resumed = open_run(parse(["--resume", f"--output={tmp_path / 'run'}"]))
    chex.assert_trees_all_equal(resumed.state, run.state)
    assert resumed.origin == run.origin


@pytest.mark.parametrize(
    ("weights", "mesh", "release"),
    [
        pytest.param("int8", "data=1", False, marks=pytest.mark.slow),
        ("int4", "data=1", True),
        pytest.param("bfloat16+8", "data=1", False, marks=pytest.mark.slow),
        ("int8", "data=2,fsdp=4", True),
        pytest.param(None, "fsdp=8", False, marks=pytest.mark.slow),
    ],
)
def test_weights_are_stored_and_placed_as_those_of_any_run(start, weights, mesh, release, model):
    more = [f"--weights={weights}"] * bool(weights) + ["--release"] * release
    run = start(f"--mesh={mesh}", *more)
    stored = params_of(model)
    stored = jax.jit(lambda x: memopt.quantize_params(x, weights))(stored) if weights else stored
    chex.assert_trees_all_equal(*jax.device_get((run.state.params, stored)))
    described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)
    assert described(run.state) == described(run.setup.state)
    run.checkpoints.close()


def test_the_dense_model_is_never_there_beside_the_quantised_one(start, monkeypatch, tmp_path):
    wide = dataclasses.replace(LONGER, num_layers=16, intermediate_size=128)
    directory = save(llama.Llama(wide, rngs=nnx.Rngs(0)), tmp_path / "wide")
    live = []

    class Watched:
        def __init__(self, tensor):
            self.tensor, self.get_shape, self.get_dtype = tensor, tensor.get_shape, tensor.get_dtype

        def __getitem__(self, index):
            live.append(sum(x.nbytes for x in jax.live_arrays()))
            return self.tensor[index]

    quantised, store = [], start_module.store_params

    def watched(params, weights):
        arrays = [x for x in jax.tree.leaves(params) if not isinstance(x, jax.ShapeDtypeStruct)]
        quantised.extend(x.size for x in arrays)
        return store(params, weights)

    monkeypatch.setattr(start_module, "store_params", watched)
    opened = hugging_face.open_tensors
    watch = lambda directory: {name: Watched(x) for name, x in opened(directory).items()}
    monkeypatch.setattr(hugging_face, "open_tensors", watch)
    before = sum(x.nbytes for x in jax.live_arrays())
    run = start(f"--init={directory}", "--weights=int8")
    kept = sum(x.nbytes for x in jax.tree.leaves(run.state.params))
    one_layer = 4 * wide.hidden_size * wide.intermediate_size
    assert max(quantised) == max(wide.vocab_size, wide.intermediate_size) * wide.hidden_size
    assert len(live) > 16 * 7
    assert max(live) - before < kept + 2 * one_layer < 2 * kept
    run.checkpoints.close()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_files_of_half_precision_are_read_to_the_type_of_the_run(start, model, tmp_path, dtype):
    half = jax.tree.map(lambda x: x.astype(dtype), params_of(model))
    directory = tmp_path / "half"
    config = dataclasses.replace(LONGER, param_dtype=dtype)
    hugging_face.write(directory, config, half, 10**9, files=tokenizer_files("bytes"))
    run = start(f"--init={directory}")
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    chex.assert_trees_all_equal(run.state.params, widened)
    run.checkpoints.close()


@pytest.mark.slow
def test_a_model_is_grown_and_its_run_can_be_started_from(start, model, tmp_path):
    run = start("--grow=2", "--weights=int8")
    assert (run.setup.model_config.num_layers, run.config.architecture.num_layers) == (6, 6)
    once = memopt.dequantize_params(memopt.quantize_params(params_of(model)))
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), once["blocks"])
    chex.assert_trees_all_close(
        memopt.dequantize_params(run.state.params)["blocks"], twice, atol=1e-6
    )
    run.checkpoints.close()
    shutil.rmtree(tmp_path / "brought")
    options = parse([f"--init={tmp_path / 'run'}", f"--output={tmp_path / 'next'}"])
    follows = open_run(options)
    chex.assert_trees_all_equal(follows.state.params, run.state.params)
    assert follows.setup.model_config == run.setup.model_config
    follows.checkpoints.close()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", memopt.available())
def test_every_optimizer_trains_from_a_directory(start, optimizer):
    assert int(train(start(f"--optimizer={optimizer}"), Console(quiet=True))[0].step) == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--model=nano"],
            "has another model, with grow=1: .*vocab_size is 300 there and 264 here",
        ),
        (["--num-layers=2"], "num_layers is 3 there and 2 here. Leave out --model"),
        (["--vocab-size=257"], "vocab_size is 300 there and 257 here"),
        (["--carry-state"], "carry_state must be left out, since init .* has no optimizer state"),
        (
            ["--seq-len=128"],
            "seq_len=128 is longer than the 64 tokens that model 'brought' accepts",
        ),
        (["--init=nowhere"], "init: there is no directory 'nowhere'.$"),
        (["--rewarm=0.1"], "it goes with --resume and --schedule NAME; a new run has --warmup"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(start, tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        start(*options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.safetensors", "lacks model.safetensors"),
        ("tokenizer.json", "holds no tokenizer.json: give another --tokenizer"),
        ("config.json", "is neither the directory of a run nor that of a Hugging Face model"),
    ],
)
def test_a_directory_that_lacks_a_file_is_refused(start, directory, tmp_path, name, says):
    (directory / name).unlink()
    with pytest.raises(ValueError, match=says):
        start()
    assert not (tmp_path / "run").exists()


def test_a_directory_whose_tensors_have_other_shapes_is_refused(start, directory, tmp_path):
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 8}))
    with pytest.raises(ValueError, match=r"mlp.gate_proj.weight has shape \(32, 16\)"):
        start()
    assert not (tmp_path / "run").exists()
