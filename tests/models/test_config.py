"""Presets have their published sizes, and impossible shapes are refused in one sentence."""

import dataclasses
import json

import jax
import pytest
from flax import nnx

from memopt.models.llama import PRESETS, LlamaConfig, RopeScaling, abstract_model, preset


@pytest.mark.parametrize(
    ("name", "millions", "within"),
    [
        ("tiny", 2.0, 0.2),
        ("60m", 58.1, 0.05),
        ("130m", 134.1, 0.05),
        ("350m", 368.0, 0.05),
        ("1b", 1339, 0.5),
        ("7b", 6738, 0.5),
        ("13b", 13000, 50),
        ("70b", 68977, 0.5),
        ("llama-2-7b", 6738, 0.5),
        ("llama-3-8b", 8030, 0.5),
        ("llama-3.2-1b", 1236, 0.5),
    ],
)
def test_presets_have_their_published_size(name, millions, within):
    params = nnx.state(abstract_model(preset(name)), nnx.Param)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert abs(count / 1e6 - millions) <= within


def test_every_preset_is_measured():
    assert len(PRESETS) == 11


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(
        ValueError, match=r"'60mm' is unknown; did you mean '60m'\? Allowed: tiny, 60m"
    ):
        preset("60mm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads=8 is not a multiple of num_kv_heads=3"),
        ({"head_dim": 33}, "head_dim=33 is odd"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown. Allowed: float32, bfloat16, float16"),
        ({"remat": "some"}, "remat 'some' is unknown. Allowed: none, dots, full"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(preset("60m"), **change)


def test_rope_scaling_wants_its_factors_in_order():
    with pytest.raises(ValueError, match="must be positive and less than"):
        RopeScaling(low_freq_factor=4.0, high_freq_factor=4.0)


def test_a_config_survives_json():
    config = preset("llama-3.2-1b")
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
    assert LlamaConfig(**values) == config
