"""Side by side with transformers, where it is installed."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memopt.models.config import preset
from memopt.models.generate import generate
from memopt.models.llama import Llama, RopeScaling, from_hugging_face, to_hugging_face
from memopt.models.rotary import inverse_frequencies
from tests.models.examples import SMALL, init, logits

pytestmark = pytest.mark.interop

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 40))
SCALING = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=32
)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


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
