"""Tokenizers: bytes, or a `tokenizer.json` of Hugging Face's `tokenizers`.

A tokenizer is anything with the five members of `Tokenizer`. `load_tokenizer` makes one from a
name or a path, `train_tokenizer` learns a new one from text.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers

#: Names of the token that ends a document in well-known models, most specific first.
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>")

#: Files of tokenizers that do not say all that a tokenizer.json says.
OTHER_FORMATS = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        name: `load_tokenizer(name)` returns this tokenizer again.
        digest: A hash of everything that decides which ids a text becomes.
        vocab_size: One more than the largest id.
        eos_id: The id that ends a document.
    """

    name: str
    digest: str
    vocab_size: int
    eos_id: int

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, int32 (tokens,), without special tokens."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`. Never raises: ids that stand for no text are dropped."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 as end of document.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("né")
        array([110, 195, 169], dtype=int32)
        >>> tokenizer.decode([110, 195, 169, tokenizer.eos_id])
        'né'
    """

    name = "bytes"
    digest = "bytes"
    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> np.ndarray:
        """Returns the UTF-8 bytes of `text`, int32 (bytes,)."""
        # A lone surrogate (JSON can hold one) has no UTF-8 form and becomes "?".
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; bytes that are no UTF-8 become U+FFFD, other ids vanish."""
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", "replace")


class FileTokenizer:
    """A `tokenizer.json`, as `tokenizers` and Hugging Face models write it.

    Special tokens written out in a text (`"</s>"` in a page about HTML) are encoded as the plain
    text they are, so that no document can end itself.

    Attributes:
        eos_token: The text of the token that ends a document.
        begin_ids: The special tokens that the file itself puts before a text, int32.

    Args:
        path: A `tokenizer.json`, or a directory holding one, such as a Hugging Face model's. A
            `tokenizer_config.json` beside it says which token ends a document; without, the names
            in `END_OF_DOCUMENT` are tried.

    Raises:
        ValueError: No such file, not a tokenizer, or no token known to end a document.
    """

    def __init__(self, path: str | Path):
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        _check_format(file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer {str(file)!r} cannot be read: {error}.") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.name = str(path)
        self.digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        candidates = (_configured_eos(file.parent), *END_OF_DOCUMENT)
        eos = next((token for token in candidates if token in vocabulary), None)
        if eos is None:
            raise ValueError(
                f"tokenizer {str(file)!r} has no token that ends a document; name one of "
                f"{', '.join(END_OF_DOCUMENT)} in its vocabulary, or give `eos_token` in a "
                "tokenizer_config.json beside it."
            )
        self.eos_token, self.eos_id = eos, vocabulary[eos]
        alone = self._tokenizer.encode("a", add_special_tokens=True)
        first_of_text = [*alone.special_tokens_mask, 0].index(0)
        self.begin_ids = np.array(alone.ids[:first_of_text], np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, int32 (tokens,), without special tokens."""
        clean = text.encode("utf-8", "replace").decode("utf-8")
        encoding = self._tokenizer.encode(clean, add_special_tokens=False)
        return np.array(encoding.ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; special tokens and unknown ids vanish."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=True)


def load_tokenizer(spec: str) -> Tokenizer:
    """Returns the tokenizer that `spec` names.

    Args:
        spec: `"bytes"`, or the path of a `tokenizer.json` or of a directory holding one, such as
            a Hugging Face model's.

    Returns:
        The tokenizer.

    Raises:
        ValueError: `spec` is neither, or the file cannot be used (see `FileTokenizer`).

    Example:
        >>> load_tokenizer("bytes").vocab_size
        257
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if not path.exists():
        beside = map(str, path.parent.glob("*"))
        near = difflib.get_close_matches(spec, ["bytes", *beside], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"tokenizer {spec!r} is neither 'bytes' nor an existing tokenizer.json or directory "
            f"holding one.{hint}"
        )
    return FileTokenizer(path)


def train_tokenizer(documents: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
    """Learns a byte-level BPE vocabulary from text and writes it as `tokenizer.json`.

    Every text can be encoded, and decoding gives it back: the 256 bytes are in the vocabulary.
    Id 0 is `<|endoftext|>`. A small corpus may give fewer merges, so a smaller vocabulary.

    Args:
        documents: The texts to learn from.
        vocab_size: Largest vocabulary wanted, at least 257 (the bytes and end of document).
        path: Where to write: a name ending in `.json`, or a directory to hold `tokenizer.json`.

    Returns:
        The new tokenizer, as `load_tokenizer(path)` returns it.

    Raises:
        ValueError: `vocab_size` is below 257.

    References:
        Sennrich et al. 2016, "Neural machine translation of rare words with subword units"
        (arXiv:1508.07909); byte level as in Radford et al. 2019 (GPT-2), section 2.2.
    """
    if vocab_size < ByteTokenizer.vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: the 256 bytes and end of document need 257."
        )
    file = Path(path) if Path(path).suffix == ".json" else Path(path) / "tokenizer.json"
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    options = {"min_frequency": 0, "special_tokens": [END_OF_DOCUMENT[0]], "show_progress": False}
    tokenizer.train_from_iterator(documents, vocab_size, **options)
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file), pretty=True)
    return load_tokenizer(str(path))


def _check_format(file: Path) -> None:
    """Raises if there is no tokenizer.json; says so of files that can be converted to it."""
    if file.exists() and file.name not in OTHER_FORMATS:
        return
    directory = file.parent
    if found := [name for name in OTHER_FORMATS if (directory / name).exists()]:
        load = f"transformers.AutoTokenizer.from_pretrained({str(directory)!r})"
        raise ValueError(
            f"tokenizer {str(directory)!r} must be given as a tokenizer.json, which "
            f"{load}.save_pretrained({str(directory)!r}) makes of {', '.join(found)} in Python."
        )
    if not file.exists():
        raise ValueError(
            f"tokenizer {str(directory)!r} holds no tokenizer.json: give another --tokenizer."
        )


def _configured_eos(directory: Path) -> str | None:
    """The `eos_token` of the tokenizer_config.json in `directory`, if it names one."""
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return None
    try:
        token = json.loads(file.read_text("utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} is not a JSON object: {error}.") from error
    return token.get("content") if isinstance(token, dict) else token
