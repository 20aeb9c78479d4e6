"""The files of a tokenizer, and bytes as a tokenizer.json."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.text.tokenizer import ByteTokenizer, load_tokenizer, train_tokenizer
from memopt.text.tokenizer_files import tokenizer_files


@pytest.fixture(scope="module")
def as_file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bytes")
    for name, content in tokenizer_files("bytes").items():
        (directory / name).write_bytes(content)
    return load_tokenizer(str(directory))


def test_the_ids_of_bytes_are_bytes(as_file):
    assert (as_file.vocab_size, as_file.eos_id) == (257, 256)
    low = "".join(map(chr, range(0x800)))  # all bytes but those of longer sequences
    every = (
        low
        + "".join(map(chr, range(0x800, 0x11000, 61)))
        + "\U0010ffff\U00040000\U00080000\U000c0000"
    )
    every = every.encode("utf-8", "replace").decode()
    ids = as_file.encode(every)
    np.testing.assert_array_equal(ids, ByteTokenizer().encode(every))
    assert set(ids.tolist()) == set(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}  # no UTF-8
    assert as_file.decode(ids) == every


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_has_the_ids_of_its_bytes(as_file, text):
    text += random.choice(["", " ", "<|endoftext|>", "\n\n", "  a"])
    np.testing.assert_array_equal(as_file.encode(text), ByteTokenizer().encode(text))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=12))
def test_any_ids_are_decoded_alike(as_file, data):
    ids = [*data, 256, *data]
    assert as_file.decode(ids) == ByteTokenizer().decode(ids)


def test_all_files_of_a_tokenizer_are_found_and_no_others(tmp_path):
    train_tokenizer(["abc"] * 3, 260, tmp_path / "tokenizer.json")
    own = {"chat_template.jinja": "{{ x }}", "generation_config.json": "{}"}
    config = {"eos_token": {"content": "<|endoftext|>"}, "chat_template": "{{ y }}"}
    own |= {"tokenizer_config.json": json.dumps(config), "special_tokens_map.json": "{}"}
    for name, text in (own | {"config.json": "{}", "other.txt": ""}).items():
        (tmp_path / name).write_text(text)
    files = tokenizer_files(str(tmp_path))
    assert files.pop("tokenizer.json") == (tmp_path / "tokenizer.json").read_bytes()
    assert files == {name: text.encode() for name, text in own.items()}
    assert tokenizer_files(str(tmp_path / "tokenizer.json")).keys() == files.keys() | {
        "tokenizer.json"
    }
