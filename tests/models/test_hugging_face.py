"""Hugging Face directories: read, written, refused, and never left half written."""

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from safetensors.numpy import load_file, save_file

from memopt.models import hugging_face
from memopt.models.llama import (
    RopeScaling,
    abstract_model,
    from_hugging_face,
    preset,
    to_hugging_face,
)
from tests.models.examples import SMALL, YARDSTICK, init, split

SCALING = RopeScaling(factor=4.0, original_max_seq_len=64)


@pytest.fixture
def directory(model, tmp_path) -> Path:
    to_hugging_face(model, tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in content.items() if v is not None}))


def rewrite(directory: Path, **changes) -> None:
    """Change tensors of a directory ("__" for "."); None removes one."""
    content = load_file(directory / "model.safetensors")
    content |= {name.replace("__", "."): value for name, value in changes.items()}
    content = {name: value for name, value in content.items() if value is not None}
    save_file(content, directory / "model.safetensors")


def test_names_shapes_and_values_are_hugging_faces(recorded, tmp_path):
    to_hugging_face(recorded["model"], tmp_path / "model")
    ours = load_file(tmp_path / "model" / "model.safetensors")
    chex.assert_trees_all_equal(ours, load_file(YARDSTICK / "weights.safetensors"))


@pytest.mark.parametrize(
    ("tied", "dtype"), [(False, "float32"), (True, "bfloat16"), (False, "float16")]
)
def test_a_round_trip_changes_nothing(tmp_path, tied, dtype):
    config = dataclasses.replace(SMALL, tied=tied, param_dtype=dtype, rope_scaling=SCALING)
    model = init(config)
    to_hugging_face(model, tmp_path / "model")
    loaded = from_hugging_face(tmp_path / "model")
    assert loaded.config == config
    chex.assert_trees_all_equal(split(loaded)[1], split(model)[1])


def test_many_files_hold_what_one_holds(model, tmp_path):
    to_hugging_face(model, tmp_path / "one")
    to_hugging_face(model, tmp_path / "many", max_shard_bytes=10_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(path.stat().st_size < 12_000 for path in files)
    assert index["weight_map"]["lm_head.weight"] == files[-1].name
    assert index["metadata"]["total_size"] == 4 * sum(p.size for p in jax.tree.leaves(split(model)))
    whole = load_file(tmp_path / "one" / "model.safetensors")
    parts = {name: value for path in files for name, value in load_file(path).items()}
    chex.assert_trees_all_equal(parts, whole)
    chex.assert_trees_all_equal(split(from_hugging_face(tmp_path / "many"))[1], split(model)[1])


def test_parameters_take_the_type_asked_for(directory):
    model = from_hugging_face(directory, param_dtype="bfloat16", dtype="bfloat16", remat="full")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(split(model)[1])} == {"bfloat16"}
    assert (model.config.dtype, model.config.remat) == ("bfloat16", "full")


def test_split_parameters_are_the_whole_ones(model, directory):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    loaded = from_hugging_face(directory, mesh=mesh)
    assert loaded.blocks.mlp.up.kernel.sharding.spec == jax.P(None, "fsdp", "tensor")
    chex.assert_trees_all_equal(jax.device_get(split(loaded)[1]), jax.device_get(split(model)[1]))


LLAMA_3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | {
    "original_max_position_embeddings": 64
}


@pytest.mark.parametrize(
    ("written", "theta", "scaling"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA_3}, 5e5, SCALING),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | LLAMA_3}, 5e5, SCALING),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}, 7e4, None),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 7e4} | LLAMA_3}, 7e4, SCALING),
        ({"rope_theta": None, "rope_scaling": None}, 1e4, None),
    ],
)
def test_old_and_new_rotary_keys(directory, written, theta, scaling):
    edit(directory / "config.json", **({"rope_theta": None, "rope_scaling": None} | written))
    config = from_hugging_face(directory).config
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


def test_keys_that_older_configs_lack(tmp_path):
    """A LLaMA 1 config knows neither grouped heads nor a head width."""
    config = dataclasses.replace(SMALL, num_kv_heads=4, bos_id=1, eos_ids=(2,))
    to_hugging_face(init(config), tmp_path / "model")
    absent = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias")
    edit(tmp_path / "model" / "config.json", **dict.fromkeys(absent))
    assert from_hugging_face(tmp_path / "model").config == config


def test_null_keys_count_as_absent(model, directory):
    path = directory / "config.json"
    null = dict.fromkeys(("head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act"))
    path.write_text(json.dumps(json.loads(path.read_text()) | null))
    assert from_hugging_face(directory).config == model.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, r"only \['LlamaForCausalLM'\] is supported"),
        ({"model_type": "qwen2"}, r"architectures is \['LlamaForCausalLM'\]; only \['Qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only one of silu, swish, gelu_py"),
        ({"attention_bias": True}, "lacks tensor model.layers.0.self_attn.q_proj.bias"),
        ({"mlp_bias": True}, "mlp_bias is True; only False is supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type is 'longrope'; only one of default, l"),
        ({"rope_scaling": {"type": "llama3"}}, "config.json lacks 'factor'"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5; only 1.0 is supp",
        ),
        ({"hidden_size": None}, "config.json lacks 'hidden_size'"),
        ({"intermediate_size": 40}, r"gate_proj.weight has shape \(48, 32\).* makes it \(40, 32\)"),
        ({"num_hidden_layers": 1}, "has unexpected tensor model.layers.1.input_layernorm.weight"),
        ({"num_hidden_layers": 3}, "lacks tensor model.layers.2.input_layernorm.weight.*and more"),
    ],
)
def test_configs_that_do_not_fit_are_refused(directory, changes, message):
    edit(directory / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        from_hugging_face(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_head__weight": None}, "lacks tensor lm_head.weight"),
        ({"extra": np.zeros(2, np.float32)}, "has unexpected tensor extra"),
        ({"model__norm__weight": np.ones(31, np.float32)}, r"shape \(31,\).* makes it \(32,\)"),
        (
            {"model__norm__weight": np.ones(32, np.int8)},
            "model.norm.weight: type 'I8' is unknown. Allowed: F32, F16, BF16",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(directory, changes, message):
    rewrite(directory, **changes)
    with pytest.raises(ValueError, match=message):
        from_hugging_face(directory)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_buffers_are_passed_over_and_decide_no_dtype(tmp_path, dtype):
    model = init(dataclasses.replace(SMALL, param_dtype="bfloat16"))
    to_hugging_face(model, tmp_path / "model")
    frequencies = np.ones(4, dtype)
    rewrite(tmp_path / "model", model__layers__0__self_attn__rotary_emb__inv_freq=frequencies)
    loaded = from_hugging_face(tmp_path / "model")
    assert loaded.config.param_dtype == "bfloat16"
    chex.assert_trees_all_equal(split(loaded)[1], split(model)[1])


@pytest.fixture(scope="module")
def tied_original(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tied") / "model"
    to_hugging_face(init(dataclasses.replace(SMALL, tied=True, param_dtype="float16")), directory)
    return directory


@pytest.fixture
def tied(tied_original, tmp_path) -> Path:
    return shutil.copytree(tied_original, tmp_path / "tied")


def stored_embedding(directory: Path) -> np.ndarray:
    return load_file(directory / "model.safetensors")["model.embed_tokens.weight"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_tied_model_may_carry_a_copy_of_its_head(tied, dtype):
    expected = from_hugging_face(tied)
    rewrite(tied, lm_head__weight=stored_embedding(tied).astype(dtype))
    found = from_hugging_face(tied)
    assert found.config == expected.config
    chex.assert_trees_all_equal(split(found)[1], split(expected)[1])


def test_a_stored_head_that_differs_makes_the_model_untied(tied, monkeypatch):
    head = stored_embedding(tied)
    head[-1, -1] += 1
    rewrite(tied, lm_head__weight=head)
    with pytest.warns(UserWarning, match="lm_head.weight differs from model.embed_tokens.weight"):
        found = from_hugging_face(tied)
    assert not found.config.tied
    with monkeypatch.context() as patched:
        patched.setattr(hugging_face, "_equal", None)  # read and warned about once
        assert not hugging_face.read_config(tied).tied
    rewrite(tied, lm_head__weight=stored_embedding(tied))
    assert hugging_face.read_config(tied).tied
    np.testing.assert_array_equal(found.head.kernel[...], head.T)
    np.testing.assert_array_equal(found.embed.embedding[...], stored_embedding(tied))


def test_a_tied_model_may_be_stored_by_its_head(tied):
    expected = from_hugging_face(tied)
    rewrite(tied, lm_head__weight=stored_embedding(tied), model__embed_tokens__weight=None)
    chex.assert_trees_all_equal(split(from_hugging_face(tied))[1], split(expected)[1])


def test_one_file_precedes_an_index_as_in_transformers(model, tmp_path):
    to_hugging_face(init(SMALL), tmp_path / "model", max_shard_bytes=10_000)
    to_hugging_face(model, tmp_path / "one")
    (tmp_path / "one" / "model.safetensors").rename(tmp_path / "model" / "model.safetensors")
    chex.assert_trees_all_equal(split(from_hugging_face(tmp_path / "model"))[1], split(model)[1])
    (tmp_path / "model" / "model.safetensors.index.json").write_text("{}")
    from_hugging_face(tmp_path / "model")


def test_links_are_followed_as_in_the_cache_of_hugging_face(model, directory, tmp_path):
    for path in list(directory.iterdir()):
        path.rename(tmp_path / f"blob-{path.name}")
        path.symlink_to(f"../blob-{path.name}")
    chex.assert_trees_all_equal(split(from_hugging_face(directory))[1], split(model)[1])


@pytest.mark.parametrize("eos", [(), (2,), (2, 7)])
@pytest.mark.parametrize("bos", [None, 0])
def test_special_tokens_survive(model, tmp_path, bos, eos):
    config = dataclasses.replace(SMALL, bos_id=bos, eos_ids=eos)
    hugging_face.write(tmp_path / "model", config, split(model)[1], 10**9)
    assert hugging_face.read_config(tmp_path / "model") == config


def test_generation_config_decides_the_special_tokens_and_keeps_its_other_keys(directory):
    generation = directory / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [5, 6], "temperature": 0.6}))
    edit(directory / "config.json", eos_token_id=3, bos_token_id=1)
    loaded = from_hugging_face(directory)
    assert (loaded.config.bos_id, loaded.config.eos_ids) == (1, (5, 6))
    to_hugging_face(loaded, directory)
    expected = {"bos_token_id": 1, "eos_token_id": [5, 6], "temperature": 0.6}
    assert json.loads(generation.read_text()) == expected
    config = json.loads((directory / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [5, 6])
    assert from_hugging_face(directory).config == loaded.config


def test_directories_without_readable_weights_are_refused(directory, tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json; give a model directory"):
        from_hugging_face(tmp_path / "nowhere")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read as safetensors"):
        from_hugging_face(directory)
    weights.unlink()
    with pytest.raises(ValueError, match=r"lacks model.safetensors\."):
        from_hugging_face(directory)


def test_a_lost_shard_is_named(model, tmp_path):
    to_hugging_face(model, tmp_path / "model", max_shard_bytes=10_000)
    lost = min((tmp_path / "model").glob("*.safetensors"))
    lost.unlink()
    with pytest.raises(ValueError, match=f"lacks {lost.name}"):
        from_hugging_face(tmp_path / "model")


def no_space(*_, **__):
    raise OSError("No space left on device")


def fail_second_file(monkeypatch):
    outcomes = iter([save_file, no_space])
    monkeypatch.setattr(safetensors.numpy, "save_file", lambda *a, **k: next(outcomes)(*a, **k))


def fail_taking_the_place(monkeypatch):
    """The earlier directory has already been moved aside by then."""
    rename = Path.rename
    broken = lambda path, to: no_space() if path.name == "new" else rename(path, to)
    monkeypatch.setattr(Path, "rename", broken)


@pytest.mark.parametrize("fail", [fail_second_file, fail_taking_the_place])
def test_an_interrupted_export_leaves_the_earlier_one(model, directory, monkeypatch, fail):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    fail(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        to_hugging_face(model, directory, max_shard_bytes=10_000)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_a_new_export_replaces_the_earlier_and_keeps_the_tokenizer(model, directory):
    (directory / "tokenizer.json").write_text("{}")
    to_hugging_face(model, directory, max_shard_bytes=10_000)
    to_hugging_face(model, directory)
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_a_directory_of_something_else_is_not_replaced(model, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is taken: give a new, an empty or a model directory"):
        to_hugging_face(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_presets_name_their_tensors_as_meta_does():
    """Llama-3.2-1B has no head of its own: it is the embedding."""
    state = nnx.to_flat_state(nnx.state(abstract_model(preset("llama-3.2-1b")), nnx.Param))
    shapes = {"/".join(path): param for path, param in state}
    names = {tensor.name: tensor.shape for tensor in hugging_face.tensors(shapes)}
    assert len(names) == 146
    assert names["model.embed_tokens.weight"] == (128256, 2048)
    assert names["model.layers.15.self_attn.k_proj.weight"] == (512, 2048)
    assert "lm_head.weight" not in names
