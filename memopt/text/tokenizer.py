"""Tokenizers: bytes, or a `tokenizer.json` of Hugging Face's `tokenizers`.

A tokenizer is anything with the members of `Tokenizer`. `load_tokenizer` makes one from a
name or a path, `train_tokenizer` learns a new one from text.
"""

import difflib
import hashlib
import itertools
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from memopt.json_files import read_json

#: Names of the token that ends a document in well-known models, most specific first.
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>")

#: Files beside a tokenizer.json: which token ends a document, and a chat template.
SETTINGS, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"

#: Files of tokenizers that do not say all that a tokenizer.json says.
OTHER_FORMATS = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        name: `load_tokenizer(name)` returns this tokenizer again.
        digest: A hash of everything that decides which ids a text becomes.
        vocab_size: One more than the largest id.
        eos_id: The id that ends a document.
        begin_ids: The ids that begin a document: as its file says or, without, `eos_id`.
        special_tokens: Ids of the tokens that stand for no text, by name, that of `eos_id` among
            them.
        variables: What chat templates find, such as `eos_token`.
        chat_template: Its own chat template, if any.
    """

    name: str
    digest: str
    vocab_size: int
    eos_id: int
    begin_ids: tuple[int, ...]
    special_tokens: Mapping[str, int]
    variables: Mapping[str, Any]
    chat_template: str | None

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, int32 (tokens,), without special tokens."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`. Never raises: ids that stand for no text are dropped."""

    def encoder_with(self, stand_ins: Mapping[str, str]) -> Callable[[str], np.ndarray]:
        """Returns an `encode` in which some strings stand for special tokens.

        Args:
            stand_ins: The strings, by the names of the tokens.

        Raises:
            ValueError: Ids without token leave no room for them.
        """


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
    begin_ids: tuple[int, ...] = (256,)
    special_tokens: Mapping[str, int] = types.MappingProxyType({END_OF_DOCUMENT[0]: 256})
    variables: Mapping[str, Any] = types.MappingProxyType({"eos_token": END_OF_DOCUMENT[0]})
    chat_template: str | None = None

    def encode(self, text: str) -> np.ndarray:
        """Returns the UTF-8 bytes of `text`, int32 (bytes,)."""
        # A lone surrogate (JSON can hold one) has no UTF-8 form and becomes "?".
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; bytes that are no UTF-8 become U+FFFD, other ids vanish."""
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", "replace")

    def encoder_with(self, stand_ins: Mapping[str, str]) -> Callable[[str], np.ndarray]:
        """Returns an `encode` in which some strings stand for special tokens."""
        [stand_in] = stand_ins.values()
        eos = np.array([self.eos_id], np.int32)

        def encode(text: str) -> np.ndarray:
            first, *rest = map(self.encode, text.split(stand_in))
            return np.concatenate([first, *(part for ids in rest for part in (eos, ids))])

        return encode


class FileTokenizer:
    """A `tokenizer.json`, as `tokenizers` and Hugging Face models write it.

    Special tokens written out in a text (`"</s>"` in a page about HTML) are encoded as the plain
    text they are, so that no document can end itself.

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
        if self.vocab_size >= 2**31:
            raise ValueError(
                f"tokenizer {str(file)!r} has the id {self.vocab_size - 1}, but ids are below 2^31."
            )
        self._ids = set(vocabulary.values())
        named = _named_tokens(file.parent)
        candidates = (named.get("eos_token"), *END_OF_DOCUMENT)
        eos = next((token for token in candidates if token in vocabulary), None)
        if eos is None:
            raise ValueError(
                f"tokenizer {str(file)!r} has no token that ends a document; name one of "
                f"{', '.join(END_OF_DOCUMENT)} in its vocabulary, or give `eos_token` in a "
                f"{SETTINGS} beside it."
            )
        self.eos_id: int = vocabulary[eos]
        self.variables: Mapping[str, Any] = {**named, "eos_token": eos}
        self.chat_template = _chat_template(file.parent)
        added = self._tokenizer.get_added_tokens_decoder().items()
        special = {token.content: number for number, token in added if token.special}
        self.special_tokens: Mapping[str, int] = special | {eos: self.eos_id}
        example = self._tokenizer.encode("a", add_special_tokens=True)
        before = itertools.takewhile(bool, example.special_tokens_mask)
        self.begin_ids = tuple(example.ids[: len(list(before))]) or (self.eos_id,)

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, int32 (tokens,), without special tokens."""
        clean = text.encode("utf-8", "replace").decode("utf-8")
        ids = self._tokenizer.encode(clean, add_special_tokens=False).ids
        if self.eos_id in ids:  # of a token that the file does not call special
            eos = self.variables["eos_token"]
            first, *rest = clean.split(eos)
            pieces = [first, *(eos[1:] + piece for piece in rest)]
            pieces = [*(piece + eos[:1] for piece in pieces[:-1]), pieces[-1]]
            batch = self._tokenizer.encode_batch(pieces, add_special_tokens=False)
            ids = [number for encoding in batch for number in encoding.ids]
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; special tokens and unknown ids vanish."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def encoder_with(self, stand_ins: Mapping[str, str]) -> Callable[[str], np.ndarray]:
        """Returns an `encode` in which some strings stand for special tokens.

        Spaces beside a token vanish if the file says so, as when the token itself is parsed.
        """
        inner: Any = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        inner.encode_special_tokens = True
        added = {token.content: token for token in inner.get_added_tokens_decoder().values()}
        copies = []
        for name, stand_in in stand_ins.items():
            strip = {side: getattr(added.get(name), side, False) for side in ("lstrip", "rstrip")}
            copies.append(tokenizers.AddedToken(stand_in, normalized=False, **strip))
        inner.add_tokens(copies)
        numbers = {name: inner.token_to_id(stand_in) for name, stand_in in stand_ins.items()}
        if not self._ids.isdisjoint(numbers.values()):
            raise ValueError(f"cannot be encoded: tokenizer {self.name!r} leaves out ids")
        pairs = sorted((number, self.special_tokens[name]) for name, number in numbers.items())
        found, meant = np.array(pairs, np.int32).T

        def encode(text: str) -> np.ndarray:
            clean = text.encode("utf-8", "replace").decode("utf-8")
            ids = np.array(inner.encode(clean, add_special_tokens=False).ids, np.int32)
            near = np.searchsorted(found, ids).clip(max=len(found) - 1)
            return np.where(found[near] == ids, meant[near], ids)

        return encode


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


def _named_tokens(directory: Path) -> dict[str, Any]:
    """The tokens by their use, as in `eos_token`, that tokenizer_config.json names."""
    names: dict[str, Any] = {}
    for name, token in _settings(directory).items():
        token = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(token, str):
            names[name] = token
    return names


def _chat_template(directory: Path) -> str | None:
    """The chat template in `directory`: that in a file of its own first, as in transformers."""
    file = directory / TEMPLATE
    if file.is_file():
        return read_template(file)
    template = _settings(directory).get("chat_template")
    if isinstance(template, list):  # several by name
        named = [entry for entry in template if isinstance(entry, dict)]
        default = (entry.get("template") for entry in named if entry.get("name") == "default")
        template = next(default, None)
    if template is not None and not isinstance(template, str):
        raise ValueError(f"chat_template in {str(directory)!r} must be text, got {template!r:.40}.")
    return template


def read_template(file: Path) -> str:
    """Reads a chat template.

    Raises:
        ValueError: It cannot be read, or is not text.
    """
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"chat_template {str(file)!r} is not text: {error.reason}.") from error
    except OSError as error:
        raise ValueError(
            f"chat_template {str(file)!r} cannot be read: {error.strerror}."
        ) from error


def _settings(directory: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json, empty if there is none."""
    file = directory / SETTINGS
    return read_json(file) if file.is_file() else {}
