"""`memopt tokenizer train`: learns a vocabulary from text."""

import dataclasses
from pathlib import Path

import tyro

from memopt.cli.errors import failing
from memopt.text.mixtures import find_mixture, named_sources
from memopt.text.tokenizer import train_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Learn a byte-level BPE vocabulary, for `memopt pretrain --tokenizer FILE`.

    Attributes:
        output: Where to write: a file ending in .json, or a directory to hold tokenizer.json.
        data: Text to learn from, as in `memopt pretrain`.
        vocab_size: Largest number of ids.
    """

    output: Path
    data: tuple[str, ...] = ("python",)
    vocab_size: int = 4096


def train(arguments: list[str]) -> None:
    """Runs `memopt tokenizer train` with these arguments."""
    options = tyro.cli(Options, prog="memopt tokenizer train", args=arguments)
    with failing():
        training, _ = find_mixture(named_sources(options.data)).split()
        texts = (piece.content for part in training.sources.values() for piece in part.once())
        tokenizer = train_tokenizer(texts, options.vocab_size, options.output)
    print(f"{tokenizer.vocab_size} ids in {tokenizer.name}")
