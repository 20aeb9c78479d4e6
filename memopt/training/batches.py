"""The data of a run: its text, the batches made of it, and whether its tokenizer fits the model."""

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from memopt.text.batches import (
    Batches,
    example_batches,
    example_validation,
    fingerprint,
    train_batches,
    validation_batches,
)
from memopt.text.chats import CHATS, ChatEncoder
from memopt.text.documents import Documents, find_documents
from memopt.text.examples import Examples, encode_examples
from memopt.text.files import TEXT
from memopt.text.packing import Batch
from memopt.text.tokenizer import Tokenizer
from memopt.training.checkpoint import Record
from memopt.training.config import Config
from memopt.training.data import COMPLETIONS, Data
from memopt.training.processes import is_main_process

#: Embeddings of a model per id of its tokenizer, at most, unless the options give the vocabulary.
#: It leaves room for rounding up and for a few added ids; bytes in a vocabulary of 32000 have 125.
MOST_ROWS_PER_ID = 1.25


def find_text(
    config: Config,
    history: Sequence[Data] = (),
    progress: Callable[[str], None] | None = None,
) -> Documents:
    """Finds a run's text.

    Args:
        config: The options of the run.
        history: What it was trained on so far: the same content has its names again.
        progress: Called with a line to show, now and then if it takes long.

    Returns:
        The documents.

    Raises:
        ValueError: There is no such text.
    """
    documents = _find(config, config.text.data, progress)
    for entry in reversed(history):
        if (renamed := documents.renamed(entry.files)) is not None:
            return renamed
    return documents


def _find(
    config: Config, specs: Sequence[str], progress: Callable[[str], None] | None
) -> Documents:
    records = CHATS if config.text.format == "chats" else TEXT
    bad_records = config.text.bad_records
    return find_documents(specs, records=records, bad_records=bad_records, progress=progress)


class Opened(NamedTuple):
    """A run's data.

    Attributes:
        batches: The training batches.
        validation: The held-out batches.
        identity: What identifies the data.
        examples: The examples that the training batches are made of; None for text.
    """

    batches: Batches
    validation: list[Batch]
    identity: Record
    examples: Examples | None


def open_batches(
    config: Config,
    documents: Documents,
    tokenizer: Tokenizer | ChatEncoder,
    rows: Sequence[int],
    place: Callable[[Batch], Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Opened:
    """Cuts a run's text into batches, or packs its examples.

    Args:
        config: The options of the run.
        documents: Its text.
        tokenizer: Makes ids of the text; for examples, a `ChatEncoder`.
        rows: The rows of a batch that this process holds.
        place: Applied to each training batch, ahead of its step.
        progress: Called with a line to show if a part of it takes long.

    Raises:
        ValueError: There is too little text.
    """
    if config.text.eval_data:
        training, held_out = documents, _find(config, config.text.eval_data, progress)
    else:
        training, held_out = documents.split()
    shape: Any = {"batch_size": config.text.batch_size, "seq_len": config.text.seq_len}
    seed, eval_tokens = config.optimization.seed, config.text.eval_tokens
    examples = None
    if isinstance(tokenizer, ChatEncoder):
        encode = functools.partial(
            encode_examples,
            encoder=tokenizer,
            seq_len=config.text.seq_len,
            long_examples=config.text.long_examples,
            bad_records=config.text.bad_records,
            progress=progress,
        )
        other = "eval_data" if config.text.eval_data else "the held-out part of the data"
        examples, others = encode(training), encode(held_out, name=other)
        size: Any = {"batch_size": config.text.batch_size, "rows": rows}
        batches = example_batches(examples, seed=seed, place=place, **size)
        validation = example_validation(others, max_tokens=eval_tokens, **size)
    else:
        here: Any = {**shape, "rows": rows, "progress": progress}
        batches = train_batches(training, tokenizer, seed=seed, place=place, **here)
        validation = validation_batches(held_out, tokenizer, max_tokens=eval_tokens, **here)
    identity = fingerprint(training, tokenizer, **shape, seed=seed)
    known = {f"data {name}": value for name, value in identity.items()}
    if examples and not examples.has_chats:
        known[COMPLETIONS] = True
    return Opened(batches, validation, known, examples)


def check_vocabulary(tokenizer: Tokenizer, config: Config, vocab_size: int) -> None:
    """Raises unless a model's vocabulary fits a tokenizer's.

    A run that was begun with too large a vocabulary, by an earlier version, is warned about only.
    The models of others have what they have.

    Args:
        tokenizer: The tokenizer.
        config: The options of the run.
        vocab_size: The ids that its model has embeddings for.

    Raises:
        ValueError: The tokenizer has more ids; or too few, unless the options give the vocabulary.
    """
    model, ids = config.architecture.model, tokenizer.vocab_size
    if ids > vocab_size:
        advice = f"add --vocab-size {ids}"
        if config.start.init:
            own = Path(config.text.tokenizer) == config.start.init
            advice = "leave out --tokenizer, or give one with fewer ids"
            if own:
                advice = "give another --tokenizer, or resize its embeddings in transformers"
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has {ids} ids, but model {model!r} only {vocab_size}: "
            f"{advice}."
        )
    if config.architecture.shape or config.architecture.vocab_size:
        return
    if vocab_size > MOST_ROWS_PER_ID * ids:
        mismatch = f"model {model!r} has {vocab_size} ids, tokenizer {tokenizer.name!r} only {ids}"
        if not (config.run.resume or config.start.init):
            raise ValueError(
                f"{mismatch}: choose another --tokenizer, such as one from `memopt tokenizer train "
                f"--vocab-size {vocab_size}`, or give --vocab-size {ids}."
            )
        if is_main_process():
            warnings.warn(f"{mismatch}; the other embeddings are never used.", stacklevel=2)
