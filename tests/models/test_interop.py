"""Side by side with transformers, where it is installed."""

import dataclasses
import json

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from memopt.models.config import preset
from memopt.models.families import FAMILIES, parse_config
from memopt.models.generate import generate
from memopt.models.llama import Llama, RopeScaling, from_hugging_face, to_hugging_face
from memopt.models.rotary import inverse_frequencies
from tests.models.examples import SMALL, init, logits, split
from tests.models.families import CASES, logits_of_transformers, write_directory
from tests.models.families import TOKENS as FAMILY_TOKENS

pytestmark = pytest.mark.interop

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 40))
SCALING = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=32
)


def enlarged(config) -> Llama:
    """Weights far from zero, in the parameters' type."""
    model = init(config)
    for _, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if param.axes[-1] is not None:
            param[...] = param[...] * 5
    return model


@pytest.mark.parametrize("max_shard_bytes", [10_000, 10**9])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", [None, SCALING])
def test_transformers_loads_what_we_write(
    torch, transformers, tmp_path, tied, scaling, max_shard_bytes
):
    model = enlarged(dataclasses.replace(SMALL, tied=tied, rope_scaling=scaling))
    to_hugging_face(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(model, TOKENS), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_we_load_what_transformers_writes(torch, transformers, tmp_path, tied, scaled, dtype):
    rope = {"rope_type": "default", "rope_theta": 20000.0}
    if scaled:
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        rope_parameters=rope,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    ours = from_hugging_face(tmp_path / "model")
    assert ours.config.param_dtype == dtype
    assert ours.config.tied == tied
    # Read again rather than cast: a cast rounds transformers' rotary frequencies as well.
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(ours, TOKENS), expected, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_families_go_to_transformers_and_back(torch, transformers, tmp_path, name):
    ours = from_hugging_face(write_directory(name, tmp_path / "first"))
    expected = logits_of_transformers(tmp_path / "first")
    np.testing.assert_allclose(logits(ours, FAMILY_TOKENS), expected, atol=1e-5)
    to_hugging_face(ours, tmp_path / "ours")
    np.testing.assert_array_equal(logits_of_transformers(tmp_path / "ours"), expected)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert theirs.config.model_type == CASES[name]["model_type"]
    theirs.save_pretrained(tmp_path / "theirs")
    again = from_hugging_face(tmp_path / "theirs")
    assert again.config == ours.config
    chex.assert_trees_all_equal(split(again)[1], split(ours)[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_keys_have_the_defaults_of_transformers(transformers, tmp_path, name):
    """Both from a file with the sizes alone, and from what transformers writes of all defaults."""
    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 48}
    raw = {"model_type": name, **sizes, "num_hidden_layers": 2, "num_attention_heads": 32}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = parse_config(path, raw)
    assert ours == parse_config(path, json.loads(theirs.to_json_string()))
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.max_seq_len == theirs.max_position_embeddings
    assert ours.head_dim == getattr(theirs, "head_dim", 8)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))


def both_logits(directory):
    ours, expected = from_hugging_face(directory), logits_of_transformers(directory)
    np.testing.assert_allclose(logits(ours, FAMILY_TOKENS), expected, atol=1e-5)
    return expected


def test_contradictions_are_settled_as_in_transformers(torch, transformers, tmp_path):
    """A head beside a tied embedding, two rotary scalings, one file beside an index."""
    directory = write_directory("qwen2", tmp_path / "model")
    plain = both_logits(directory)
    linear, yarn = {"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 8.0}
    config = json.loads((directory / "config.json").read_text())
    rope = {"rope_scaling": linear, "rope_parameters": yarn | {"rope_theta": 1e3}}
    (directory / "config.json").write_text(json.dumps(config | rope))
    scaled = both_logits(directory)
    assert np.abs(scaled - plain).max() > 0.1

    content = load_file(directory / "model.safetensors")
    content["lm_head.weight"] = content["model.embed_tokens.weight"][::-1].copy()
    save_file(content, directory / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="the model is read as untied"):
        untied = both_logits(directory)
    assert np.abs(untied - scaled).max() > 0.1

    old = {name: value * 2 for name, value in content.items()}
    save_file(old, directory / "old.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(old, "old.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(both_logits(directory), untied)


def test_generation_is_transformers(torch, transformers, tmp_path):
    model = enlarged(SMALL)
    to_hugging_face(model, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prompt = torch.tensor(TOKENS[:, :8])
    options = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    expected = theirs.generate(prompt, max_new_tokens=16, do_sample=False, **options)
    np.testing.assert_array_equal(generate(model, jnp.asarray(TOKENS[:, :8]), 16), expected)


def test_llama3_frequencies_are_transformers(torch, transformers, tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = preset("llama-3.2-1b")
    scaling = config.rope_scaling
    theirs = transformers.LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        head_dim=config.head_dim,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": config.rope_theta,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    np.testing.assert_allclose(inverse_frequencies(config), expected.numpy(), rtol=2e-6)
