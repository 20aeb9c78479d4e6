"""Runs from and to transformers, where it is installed."""

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import memopt
from memopt.cli.pretrain import parse
from memopt.models import llama
from memopt.text.tokenizer import load_tokenizer, train_tokenizer
from memopt.training.export import export
from memopt.training.load import load_run
from memopt.training.loop import train
from memopt.training.open import open_run

pytestmark = pytest.mark.interop

TEXTS = ["one two  three\n\nthree ", "größer 🙂 ", " \t x<y> '", "a" * 50]
FLAGS = "--model=nano --batch-size=8 --seq-len=32 --eval-tokens=512 --steps=2 --mesh=data=1"


def trained(directory, text, *options):
    flags = [*FLAGS.split(), f"--data={text}", f"--output={directory}", "--optimizer=lion"]
    train(open_run(parse([*flags, *options])), Console(quiet=True))
    return load_run(directory)


@pytest.fixture(scope="module", params=["bytes", "words"])
def run(request, tmp_path_factory, text):
    directory = tmp_path_factory.mktemp("run")
    options = ["--weights=int8"]
    if request.param == "words":
        train_tokenizer([text.read_text()], 300, directory / "words.json")
        options = [f"--tokenizer={directory / 'words.json'}", "--vocab-size=320"]
    return trained(directory / "run", text, *options)


def test_an_export_computes_the_same_in_transformers(torch, transformers, run, tmp_path):
    export(run, tmp_path / "model")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = np.random.default_rng(0).integers(0, 257, (2, 40))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    dense = llama.build_model(run.model_config, memopt.dequantize_params(run.params))
    np.testing.assert_allclose(dense(tokens), expected, atol=1e-5)
    assert theirs.generation_config.eos_token_id == run.tokenizer.eos_id


def test_an_export_has_the_same_ids_in_transformers(transformers, run, tmp_path):
    export(run, tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs.eos_token_id == run.tokenizer.eos_id
    for text in TEXTS:
        ids = run.tokenizer.encode(text).tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == text == run.tokenizer.decode(ids)


def test_what_transformers_saves_again_starts_a_run_with_the_same_bits(
    transformers, run, tmp_path, text
):
    export(run, tmp_path / "model")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").save_pretrained(
        tmp_path / "again"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "again")
    options = [f"--init={tmp_path / 'again'}", f"--data={text}", f"--output={tmp_path / 'next'}"]
    follows = open_run(parse([*options, *FLAGS.split()[1:]]))
    dense = memopt.dequantize_params(run.params)
    chex.assert_trees_all_equal(jax.device_get(follows.state.params), jax.device_get(dense))
    for text in TEXTS:
        np.testing.assert_array_equal(follows.tokenizer.encode(text), run.tokenizer.encode(text))
    assert follows.tokenizer.eos_id == run.tokenizer.eos_id
    follows.checkpoints.close()


def test_a_model_of_transformers_is_trained_and_goes_back(torch, transformers, tmp_path, text):
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=[256, 7],
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    directory, flags = tmp_path / "theirs", FLAGS.split()[1:]
    options = [f"--init={directory}", "--tokenizer=bytes", f"--data={text}", "--weights=int8"]
    run = open_run(parse([*options, *flags, f"--output={tmp_path / 'run'}", "--release"]))
    weights = jax.jit(memopt.quantize_params)(_params(directory))
    chex.assert_trees_all_equal(*jax.device_get((run.state.params, weights)))
    train(run, Console(quiet=True))
    export(load_run(tmp_path / "run"), tmp_path / "back", dtype="bfloat16")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.dtype == torch.bfloat16
    assert (back.config.bos_token_id, back.config.eos_token_id) == (1, [256, 7])
    assert load_tokenizer(str(tmp_path / "back")).eos_id == 256


def _params(directory):
    model = llama.from_hugging_face(directory, param_dtype="float32")
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
