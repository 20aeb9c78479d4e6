"""Batches of real text: the source of Python's standard library."""

import functools
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from memopt.text.files import Files
from memopt.text.finding import read_files
from memopt.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

#: The vocabulary of the LLaMA; smaller models read bytes.
VOCABULARY = 32_000
#: The number of pieces of text that the tokenizer is trained on.
LEARNED_FROM = 100


def batches(
    vocab_size: int, *, batch_size: int, seq_len: int, seed: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches endlessly: dicts of `inputs` and `targets`, int32 (batch_size, seq_len)."""
    documents, tokenizer = _documents(), _tokenizer(vocab_size)
    order = np.random.default_rng(seed).permutation(len(documents)).tolist()
    tokens = np.zeros(0, np.int32)
    count = batch_size * (seq_len + 1)
    for i in itertools.cycle(order):
        ids = tokenizer.encode(documents[i].content)
        tokens = np.concatenate([tokens, [tokenizer.eos_id], ids]).astype(np.int32)
        while len(tokens) >= count:
            rows, tokens = tokens[:count].reshape(batch_size, -1), tokens[count:]
            yield {"inputs": rows[:, :-1], "targets": rows[:, 1:]}


@functools.cache
def _documents() -> Files:
    return read_files(["python"])


@functools.cache
def _tokenizer(vocab_size: int) -> Tokenizer:
    if vocab_size < VOCABULARY:
        return load_tokenizer("bytes")
    documents = _documents()
    learned_from = np.random.default_rng(0).permutation(len(documents))[:LEARNED_FROM].tolist()
    with tempfile.TemporaryDirectory() as directory:
        texts = (documents[i].content for i in learned_from)
        return train_tokenizer(texts, VOCABULARY, Path(directory))
