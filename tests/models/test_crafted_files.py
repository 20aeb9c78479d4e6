"""Files made to harm: each is refused in one sentence that names the file, and nothing happens."""

import json
import os
import pickle
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from memopt import json_files
from memopt.models.llama import from_hugging_face
from tests.models.families import raw_config, write_directory


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write_directory("llama", tmp_path_factory.mktemp("crafted") / "model")


@pytest.fixture
def directory(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def refused(directory: Path) -> str:
    """The error, which must be one sentence and come soon."""
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the tests look at the message
        from_hugging_face(directory)
    assert time.monotonic() - start < 10
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    assert message.endswith(".")
    return message


def configure(directory: Path, **changes) -> None:
    (directory / "config.json").write_text(json.dumps(raw_config("llama") | changes))


def shard(directory: Path, named: str, file: str = "part.safetensors") -> None:
    """Moves the weights to a file, and writes an index that names another."""
    names = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").rename(directory / file)
    index = {"weight_map": dict.fromkeys(names, named)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "sub/../../other.safetensors", "{}/other.safetensors", ".."]
)
def test_an_index_names_only_files_of_its_directory(directory, name):
    name = name.format(directory.parent)
    shutil.copy(directory / "model.safetensors", directory.parent / "other.safetensors")
    shard(directory, name)
    message = refused(directory)
    assert "model.safetensors.index.json: weight_map names" in message
    assert "must be a file of the same directory" in message


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_an_index_without_names_is_refused(directory, index):
    shard(directory, "part.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "weight_map must hold the name of a file for each tensor" in refused(directory)


def test_an_index_may_not_name_a_pipe(directory):
    """Which would be waited for."""
    shard(directory, "pipe.safetensors")
    os.mkfifo(directory / "pipe.safetensors")
    assert "lacks pipe.safetensors" in refused(directory)


def test_a_tensor_in_two_files_is_refused(directory):
    shard(directory, "part.safetensors")
    save_file({"model.norm.weight": np.ones(32)}, directory / "more.safetensors")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["extra"] = "more.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "tensor model.norm.weight is also in more.safetensors" in refused(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_never_loaded(directory, name):
    """The pickle would create a directory if it were read."""

    class Plant:
        def __reduce__(self):
            return os.mkdir, (str(directory / "planted"),)

    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(pickle.dumps(Plant()))
    assert "pickled weights, which are never loaded" in refused(directory)
    assert not (directory / "planted").exists()


def test_a_pickle_named_safetensors_is_not_read(directory):
    (directory / "model.safetensors").write_bytes(pickle.dumps(["weights"] * 100))
    assert "model.safetensors cannot be read as safetensors" in refused(directory)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 10**9}, "config.json makes it (32, 1000000000)"),
        ({"vocab_size": 10**9}, "config.json makes it (1000000000, 32)"),
        ({"intermediate_size": 2**31 - 1}, "config.json makes it (2147483647, 32)"),
        ({"num_hidden_layers": 10**9}, "lacks tensor model.layers.2.input_layernorm.weight"),
        ({"num_attention_heads": 10**9, "num_key_value_heads": 1}, "makes it (8000000000, 32)"),
        ({"hidden_size": 10**18}, "hidden_size is 1000000000000000000; it must be a whole number"),
        ({"hidden_size": -32}, "hidden_size is -32; it must be a whole number"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0; it must be a whole number"),
        ({"hidden_size": "32"}, "hidden_size is '32'; it must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number"),
        ({"head_dim": [8]}, "head_dim is [8]; it must be a whole number"),
        ({"head_dim": 7}, "config.json: head_dim=7 is odd"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; it must be a positive number"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; it must be true or false"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_type is ['yarn']; only one of default, li"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'; it must be a posit"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 0.5}}, "beta_slow=1.0 must"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be the id of a token"),
        ({"hidden_act": ["silu"]}, "hidden_act is ['silu']; only one of silu"),
        ({"model_type": {"a": 1}}, "model_type is {'a': 1}; only one of llama, mistral"),
        ({"model_type": "x" * 10**5}, "model_type is 'xxx"),
    ],
)
def test_sizes_and_options_are_checked_before_anything_is_allocated(directory, changes, words):
    configure(directory, **changes)
    assert words in refused(directory)


def test_null_is_the_default(directory):
    configure(directory, max_position_embeddings=None, rms_norm_eps=None, rope_theta=None)
    config = from_hugging_face(directory).config
    assert (config.max_seq_len, config.norm_eps, config.rope_theta) == (2048, 1e-6, 1e4)


def header(directory: Path, change) -> None:
    """Changes the header of the weights, a dict."""
    path = directory / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    content = change(json.loads(data[8 : 8 + size]))
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data[8 + size :])


def overlapping(content):
    content["model.norm.weight"]["data_offsets"] = content["lm_head.weight"]["data_offsets"]
    return content


def outside(content):
    content["model.norm.weight"]["data_offsets"] = [2**40, 2**40 + 128]
    return content


def larger(content):
    content["model.norm.weight"]["shape"] = [2**31, 2**31]
    return content


@pytest.mark.parametrize(
    "change",
    [
        overlapping,
        outside,
        larger,
        pytest.param(lambda content: b"[" * 10_000, id="nested"),
        pytest.param(lambda content: b"\xff\xfe", id="not utf-8"),
        pytest.param(lambda content: {}, id="empty"),
    ],
)
def test_damaged_headers_are_refused(directory, change):
    header(directory, change)
    assert "model.safetensors cannot be read as safetensors" in refused(directory)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 8, struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 100) + b"{}"]
)
def test_truncated_files_are_refused(directory, data):
    (directory / "model.safetensors").write_bytes(data)
    assert "model.safetensors cannot be read as safetensors" in refused(directory)


def test_missing_bytes_at_the_end_are_noticed(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "model.safetensors cannot be read as safetensors" in refused(directory)


def test_names_in_messages_do_not_reach_the_terminal_raw(directory):
    content = load_file(directory / "model.safetensors")
    content |= {f"{i}\x1b[2J\n" + "x" * 10**5: np.ones(1, np.float32) for i in range(3)}
    save_file(content, directory / "model.safetensors")
    assert refused(directory).isprintable()


AUTO_MAP = {"AutoModelForCausalLM": "modeling.Plant", "AutoConfig": "modeling.Plant"}


@pytest.mark.parametrize("model_type", ["llama", "planted"])
def test_code_beside_the_weights_is_never_run(directory, model_type):
    (directory / "modeling.py").write_text(f"import os; os.mkdir({str(directory / 'planted')!r})")
    configure(directory, model_type=model_type, auto_map=AUTO_MAP, trust_remote_code=True)
    if model_type == "llama":
        from_hugging_face(directory)
    else:
        assert "model_type is 'planted'; only one of llama, mistral" in refused(directory)
    assert not (directory / "planted").exists()


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b'{"a":' * 100_000, "is not valid JSON: it is nested too deeply"),
        (b'{"rms_norm_eps": NaN}', "is not valid JSON: NaN is no number"),
        (b'{"rope_theta": -Infinity}', "is not valid JSON: -Infinity is no number"),
        (b'{"hidden_size": 1' + b"0" * 10_000 + b"}", "is not valid JSON: Exceeds the limit"),
        (b'{"a": "\xff"}', "is not valid JSON: it is not UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "is not valid JSON: Unexpected UTF-8 BOM"),
        (None, "is not a file"),
    ],
)
def test_json_that_is_none_is_refused(directory, file, content, words):
    path = directory / file
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    assert f"{path} {words}" in refused(directory)


def test_json_is_not_read_when_it_is_huge(directory, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_BYTES", 100)
    assert "config.json has" in refused(directory)
