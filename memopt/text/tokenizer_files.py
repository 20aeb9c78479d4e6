"""The files of a tokenizer, to be kept with a run and given away with a model."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from memopt.text.tokenizer import (
    END_OF_DOCUMENT,
    SETTINGS,
    TEMPLATE,
    ByteTokenizer,
    load_tokenizer,
)

#: Files of a model directory that say how text becomes ids, and how a model speaks.
BESIDE = (SETTINGS, "special_tokens_map.json", TEMPLATE, "generation_config.json")


def tokenizer_files(spec: str) -> dict[str, bytes]:
    """Returns the files of a tokenizer by name, as `transformers.AutoTokenizer` loads them.

    Those of bytes encode as `ByteTokenizer` does, with a vocabulary of the 256 bytes and
    `<|endoftext|>`.

    Args:
        spec: The tokenizer, as `memopt.text.tokenizer.load_tokenizer` takes it.

    Raises:
        OSError: One cannot be read.

    Example:
        >>> sorted(tokenizer_files("bytes"))
        ['tokenizer.json', 'tokenizer_config.json']
    """
    if spec == "bytes":
        files = {"tokenizer.json": _bytes_as_json()}
    else:
        path = Path(spec)
        file = path / "tokenizer.json" if path.is_dir() else path
        found = [name for name in BESIDE if (file.parent / name).is_file()]
        files = {"tokenizer.json": file.read_bytes()}
        files |= {name: (file.parent / name).read_bytes() for name in found}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": load_tokenizer(spec).variables["eos_token"],
    }
    content = json.dumps({**config, "clean_up_tokenization_spaces": False}, indent=2)
    return {SETTINGS: content.encode()} | files


def _bytes_as_json() -> bytes:
    # The alphabet of byte-level vocabularies: printable bytes are themselves, the others follow.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable}
    alphabet |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    vocabulary = {alphabet[byte]: byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_DOCUMENT[0]])
    assert tokenizer.token_to_id(END_OF_DOCUMENT[0]) == ByteTokenizer.eos_id
    return tokenizer.to_str(pretty=True).encode()
