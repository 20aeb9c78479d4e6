"""Every family and rotary scaling computes what transformers computed, and keeps its files."""

import json
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from memopt.models.families import FAMILIES, config_json, parse_config
from memopt.models.llama import abstract_params, from_hugging_face, to_hugging_face
from tests.models.examples import OPTIONS, init, logits, split
from tests.models.families import (
    CASES,
    LOGITS,
    SIZES,
    TOKENS,
    family_config,
    write_directory,
)

# The others differ from these by options that these have together.
QUICK = ("linear", "yarn", "yarn-options", "mistral", "qwen2", "qwen3-window", "gemma")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES],
)
def test_logits_are_those_of_transformers(tmp_path, name):
    model = from_hugging_face(write_directory(name, tmp_path / "model"))
    np.testing.assert_allclose(logits(model, TOKENS), np.load(LOGITS)[name], atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_family_keeps_its_layout_on_the_way_through(tmp_path, name):
    model = from_hugging_face(write_directory(name, tmp_path / "theirs"))
    to_hugging_face(model, tmp_path / "ours")
    again = from_hugging_face(tmp_path / "ours")
    assert again.config == model.config
    chex.assert_trees_all_equal(split(again)[1], split(model)[1])
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    family = CASES[name]["model_type"]
    assert written["model_type"] == family
    assert written["architectures"] == [FAMILIES[family].architecture]


def test_biases_and_norms_are_read_in_parts(tmp_path):
    directory = write_directory("qwen3-window", tmp_path / "model")
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    parts = split(from_hugging_face(directory, mesh=mesh))[1]
    assert parts["blocks"]["attention"]["k"]["bias"].sharding.spec == jax.P(None, "tensor")
    whole = split(from_hugging_face(directory))[1]
    chex.assert_trees_all_equal(jax.device_get(parts), jax.device_get(whole))


def test_options_that_no_family_has_are_not_written(tmp_path):
    with pytest.raises(
        ValueError, match=r"No Hugging Face family of llama, .*qk_norm=True.*window"
    ):
        to_hugging_face(init(OPTIONS), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def parse(**changes):
    return parse_config(Path("config.json"), SIZES | changes)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("options", "window"),
    [
        ({}, None),
        ({"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, 5),
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}, None),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 4096),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_windows_of_qwen(name, options, window):
    assert parse(model_type=name, **options).sliding_window == window


@pytest.mark.parametrize(
    "options",
    [
        {"max_window_layers": 1},
        {"layer_types": ["full_attention", "sliding_attention"]},
    ],
)
def test_windows_in_some_layers_are_refused(options):
    with pytest.raises(ValueError, match="1 of 2 layers have a sliding window; only all or none"):
        parse(model_type="qwen2", use_sliding_window=True, sliding_window=5, **options)


@pytest.mark.parametrize(
    ("options", "window"),
    [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 7}, 7)],
)
def test_window_of_mistral(options, window):
    assert parse(model_type="mistral", **options).sliding_window == window


def test_gelu_of_the_first_gemma_is_its_approximation():
    assert parse(model_type="gemma", hidden_act="gelu") == family_config("gemma")


def test_swish_is_silu():
    assert parse(hidden_act="swish") == parse(hidden_act="silu")


THETA = {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e4}


@pytest.mark.parametrize(
    ("options", "theta", "factor"),
    [
        ({"rope_scaling": THETA, "rope_parameters": {"rope_theta": 5e4}}, 7e4, 2.0),
        ({"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_parameters": THETA}, 1e4, 3.0),
        ({"rope_scaling": None, "rope_parameters": THETA, "rope_theta": 9e4}, 7e4, 2.0),
        ({"rope_scaling": {}, "rope_parameters": THETA}, 7e4, 2.0),
    ],
)
def test_rope_scaling_precedes_rope_parameters_as_in_transformers(options, theta, factor):
    config = parse(**options)
    assert (config.rope_theta, config.rope_scaling.factor) == (theta, factor)


@pytest.mark.parametrize("beside", [{}, {"original_max_position_embeddings": 24}])
def test_the_length_before_a_stretch_is_found_as_in_transformers(beside):
    yarn = {"rope_type": "yarn", "factor": 2.0}
    given = {"original_max_position_embeddings": 16} if beside else {}
    scaling = parse(rope_scaling=yarn | given, **beside).rope_scaling
    assert scaling.original_max_seq_len == beside.get("original_max_position_embeddings", 64)


def test_defaults_are_those_of_the_family():
    config = parse(model_type="gemma", head_dim=None, num_key_value_heads=None)
    assert (config.head_dim, config.num_kv_heads, config.tied) == (8, 4, True)
    assert (config.bos_id, config.eos_ids) == (2, (1,))
    assert config_json(config)["attention_bias"] is False


def published(*sizes, **more):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads")
    return dict(zip(names, sizes, strict=True)) | {"rope_scaling": None} | more


# The keys that decide something, as the files on the hub have them, and the published counts.
PUBLISHED = {
    "Mistral-7B-v0.1": (
        published(32000, 4096, 14336, 32, 32, 8, model_type="mistral", sliding_window=4096),
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        published(151936, 896, 4864, 24, 14, 2, model_type="qwen2", tie_word_embeddings=True)
        | {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 24},
        494_032_768,
    ),
    "Qwen3-0.6B": (
        published(151936, 1024, 3072, 28, 16, 8, model_type="qwen3", tie_word_embeddings=True)
        | {"head_dim": 128, "attention_bias": False, "use_sliding_window": False}
        | {"sliding_window": None, "max_window_layers": 28},
        596_049_920,
    ),
    "gemma-2b": (
        published(256000, 2048, 16384, 18, 8, 1, model_type="gemma", hidden_act="gelu")
        | {"head_dim": 256, "attention_bias": False},
        2_506_172_416,
    ),
    "TinyLlama-1.1B": (
        published(32000, 2048, 5632, 22, 32, 4, model_type="llama", pretraining_tp=1),
        1_100_048_384,
    ),
    "SmolLM2-135M": (
        published(49152, 576, 1536, 30, 9, 3, model_type="llama", tie_word_embeddings=True)
        | {"rope_interleaved": False, "is_llama_config": True},
        134_515_008,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_size(name):
    raw, count = PUBLISHED[name]
    params = abstract_params(parse_config(Path("config.json"), raw))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
