"""Tokenizers: what goes in comes out, and nothing that comes in can break them."""

import json
import tracemalloc

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, processors

from memopt.text.tokenizer import END_OF_DOCUMENT, load_tokenizer, train_tokenizer

TEXT = ["def add(a, b):\n    return a + b\n", "the quick brown fox jumps over the lazy dog. " * 20]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXT, 300, path)
    return path


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request, directory):
    return load_tokenizer("bytes" if request.param == "bytes" else str(directory))


@given(text=st.text())
def test_decoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eos_id for i in ids)
    assert tokenizer.decode(ids) == text


@given(ids=st.lists(st.integers(-(2**40), 2**40) | st.integers(-2, 310)))
def test_decoding_never_raises(tokenizer, ids):
    assert isinstance(tokenizer.decode(ids), str)


def test_decoding_takes_arrays(tokenizer):
    assert tokenizer.decode(tokenizer.encode("naïve").astype(np.int64)) == "naïve"


def test_lone_surrogates_are_encoded(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_bytes_are_the_ids():
    tokenizer = load_tokenizer("bytes")
    np.testing.assert_array_equal(tokenizer.encode("aé"), [97, 0xC3, 0xA9])
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.decode([97, 256, 263, 98]) == "ab"


def test_trained_vocabulary_is_smaller_in_tokens(directory):
    tokenizer = load_tokenizer(str(directory))
    assert tokenizer.vocab_size == 300
    assert tokenizer.eos_id == 0
    assert len(tokenizer.encode(TEXT[1])) < len(TEXT[1]) / 2


def test_file_and_directory_are_the_same_tokenizer(directory):
    one, two = load_tokenizer(str(directory)), load_tokenizer(str(directory / "tokenizer.json"))
    assert one.digest == two.digest
    np.testing.assert_array_equal(one.encode(TEXT[0]), two.encode(TEXT[0]))


def test_a_special_token_written_in_a_text_is_text(directory):
    tokenizer = load_tokenizer(str(directory))
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_truncation_and_padding_in_the_file_are_ignored(directory, tmp_path):
    inner = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    inner.enable_truncation(4)
    inner.enable_padding(length=4)
    inner.save(str(tmp_path / "tokenizer.json"))
    whole = load_tokenizer(str(directory)).encode(TEXT[0])
    np.testing.assert_array_equal(load_tokenizer(str(tmp_path)).encode(TEXT[0]), whole)
    assert len(load_tokenizer(str(tmp_path)).encode("a")) == 1


@pytest.mark.parametrize("token", END_OF_DOCUMENT)
def test_known_ends_of_document_are_found(tmp_path, token):
    tokenizers.Tokenizer(models.WordLevel({"a": 0, token: 1}, "a")).save(str(tmp_path / "t.json"))
    assert load_tokenizer(str(tmp_path / "t.json")).eos_id == 1


def test_an_end_of_document_that_no_file_calls_special_is_text_too(tmp_path):
    letters = {letter: i for i, letter in enumerate("ab</s>")}
    inner = tokenizers.Tokenizer(models.BPE({**letters, "</s>": 9}, []))
    inner.add_tokens([tokenizers.AddedToken("</s>", special=False)])
    assert inner.encode("a</s>b").ids == [0, 9, 1]
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.eos_id == 9
    ids = tokenizer.encode("a</s>b</s></s>")
    assert [*"a</s>b</s></s>"] == [tokenizer.decode([i]) for i in ids]


@pytest.mark.parametrize("value", ["stop", {"content": "stop", "special": True}])
def test_the_configured_end_of_document_comes_first(tmp_path, value):
    vocabulary = {"a": 0, "</s>": 1, "stop": 2}
    tokenizers.Tokenizer(models.WordLevel(vocabulary, "a")).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).eos_id == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
    assert load_tokenizer(str(tmp_path)).eos_id == 2


def with_large_id(path, largest):
    tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "b": 2}, "a")).save(str(path))
    path.write_text(path.read_text().replace('"b": 2', f'"b": {largest}'))
    return load_tokenizer(str(path))


def test_a_large_id_takes_no_memory(tmp_path):
    tokenizer = with_large_id(tmp_path / "t.json", 2**24)
    tracemalloc.start()
    encode = tokenizer.encoder_with({"</s>": "xyz"})
    assert (encode("b").tolist(), encode("xyz").tolist()) == ([2**24], [1])
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_an_id_that_no_array_holds_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has the id 4294967295, but ids are below 2"):
        with_large_id(tmp_path / "t.json", 2**32 - 1)


def test_an_id_is_not_taken_for_a_special_token(tmp_path):
    vocabulary = {"</s>": 0, "a": 2}  # the next free id seems to be 2
    tokenizers.Tokenizer(models.WordLevel(vocabulary, "a")).save(str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match="leaves out ids"):
        load_tokenizer(str(tmp_path / "t.json")).encoder_with({"</s>": "xyz"})


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ([{"name": ["x"], "template": "x"}, {"name": "default", "template": "y"}], "y"),
        ([{"name": "other", "template": "x"}, "z"], None),
    ],
)
def test_the_default_of_several_chat_templates_is_taken(tmp_path, templates, expected):
    vocabulary = {"a": 0, "</s>": 1}
    tokenizers.Tokenizer(models.WordLevel(vocabulary, "a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert load_tokenizer(str(tmp_path)).chat_template == expected


def test_a_tokenizer_without_end_of_document_is_refused(tmp_path):
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"no token that ends a document; name one of .*</s>"):
        load_tokenizer(str(tmp_path))


def test_a_broken_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json' cannot be read: .* line 1"):
        load_tokenizer(str(tmp_path))


def test_a_directory_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json: give another --tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("files", [["tokenizer.model"], ["vocab.json", "merges.txt"]])
@pytest.mark.parametrize("given", ["directory", "file"])
def test_a_tokenizer_in_another_format_says_how_it_is_converted(tmp_path, files, given):
    for name in ("tokenizer_config.json", "model.safetensors", *files):
        (tmp_path / name).touch()
    makes = rf"\.save_pretrained\('{tmp_path}'\) makes of {', '.join(files)} in Python\."
    with pytest.raises(ValueError, match=rf"as a tokenizer.json, which .*AutoTokenizer.*{makes}"):
        load_tokenizer(str(tmp_path / files[0] if given == "file" else tmp_path))


def test_the_directory_of_a_hugging_face_model_is_a_tokenizer(directory, tmp_path):
    """With special tokens beyond the vocabulary, a template that adds one, and other files."""
    inner = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    inner.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    inner.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 300)]
    )
    inner.save(str(tmp_path / "tokenizer.json"))
    configured = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(configured))
    for name in ("config.json", "special_tokens_map.json", "model.safetensors"):
        (tmp_path / name).touch()
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (302, 301)
    np.testing.assert_array_equal(
        tokenizer.encode(TEXT[0]), load_tokenizer(str(directory)).encode(TEXT[0])
    )


@pytest.mark.parametrize(
    ("spec", "near"), [("byte", "'bytes'"), ("tokeniser.json", "tokenizer.json")]
)
def test_an_unknown_name_suggests_the_nearest(directory, monkeypatch, spec, near):
    monkeypatch.chdir(directory)
    with pytest.raises(ValueError, match=rf"Did you mean .*{near}"):
        load_tokenizer(spec)


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size=256 is too small.*need 257"):
        train_tokenizer(TEXT, 256, tmp_path)
