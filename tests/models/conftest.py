"""A model small enough for every test, and the recorded Hugging Face model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from memopt.models.llama import Llama, from_hugging_face
from tests.models.examples import OPTIONS, SMALL, YARDSTICK, enlarge, init


@pytest.fixture(scope="session")
def model() -> Llama:
    return enlarge(init(SMALL))


@pytest.fixture(scope="session")
def with_options() -> Llama:
    return enlarge(init(OPTIONS))


@pytest.fixture(scope="session")
def recorded_directory(tmp_path_factory) -> Path:
    """The recorded model as the directory that transformers 5 would have written."""
    directory = tmp_path_factory.mktemp("llama_tiny")
    info = json.loads((YARDSTICK / "info.json").read_text())
    header = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (directory / "config.json").write_text(json.dumps(header | info["config"]))
    shutil.copy(YARDSTICK / "weights.safetensors", directory / "model.safetensors")
    return directory


@pytest.fixture(scope="session")
def recorded(recorded_directory) -> dict:
    """The recorded model, its batch, logits, loss, and gradients by Hugging Face name."""
    io = np.load(YARDSTICK / "io.npz")
    return {
        "model": from_hugging_face(recorded_directory),
        "token_ids": io["input_ids"],
        "batch": {"inputs": io["input_ids"][:, :-1], "targets": io["input_ids"][:, 1:]},
        "logits": io["logits"],
        "loss": float(io["loss"]),
        "gradients": load_file(YARDSTICK / "grads.safetensors"),
    }
