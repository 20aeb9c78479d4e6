"""Small models of every family and rotary scaling, and what transformers computes with them.

`python -m tests.models.families` records the logits anew, where torch and transformers are
installed; the weights come from NumPy's generator.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from memopt.models.families import parse_config
from memopt.models.hugging_face import tensors
from memopt.models.llama import LlamaConfig, abstract_params

LOGITS = Path(__file__).with_name("families.npz")
TOKENS = np.random.default_rng(0).integers(0, 32, (1, 20), dtype=np.int32)

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
# In the words of config.json, without the sizes.
CASES = {
    "llama": {"model_type": "llama"},
    "llama-bias": {"model_type": "llama", "attention_bias": True},
    "llama-gelu": {"model_type": "llama", "hidden_act": "gelu_pytorch_tanh"},
    "linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "yarn": {"model_type": "llama", "rope_parameters": YARN},
    "yarn-options": {
        "model_type": "llama",
        "rope_scaling": YARN
        | {
            "beta_fast": 2,
            "beta_slow": 0.05,
            "truncate": False,
            "mscale": 2.0,
            "mscale_all_dim": 0.5,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen2-window": {"model_type": "qwen2"} | QWEN_WINDOW,
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-window": {"model_type": "qwen3", "attention_bias": True} | QWEN_WINDOW,
    "gemma": {"model_type": "gemma"},
}


def raw_config(name: str) -> dict:
    return SIZES | CASES[name]


def family_config(name: str) -> LlamaConfig:
    return parse_config(Path("config.json"), raw_config(name))


def weights(config: LlamaConfig) -> dict[str, np.ndarray]:
    """Far from zero, and far from one in the norms."""
    rng = np.random.default_rng(1)
    shapes = flatten_dict(abstract_params(config), sep="/")
    centre = lambda leaf: leaf.endswith("scale") and not config.norm_offset
    return {
        tensor.name: np.float32(rng.normal(size=tensor.shape) * 0.2 + centre(tensor.leaf))
        for tensor in tensors(shapes)
    }


def write_directory(name: str, directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw_config(name)))
    save_file(weights(family_config(name)), directory / "model.safetensors", {"format": "pt"})
    return directory


def logits_of_transformers(directory: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = {
            name: logits_of_transformers(write_directory(name, Path(scratch, name)))
            for name in CASES
        }
    np.savez_compressed(LOGITS, **found)
