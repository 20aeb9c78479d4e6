"""The data of a run: its text, the batches made of it, and whether its tokenizer fits the model."""

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
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
from memopt.text.documents import Documents
from memopt.text.examples import Examples, encode_examples
from memopt.text.files import TEXT, Files
from memopt.text.mixtures import (
    Mixture,
    errors_of_source,
    find_mixture,
    mixture_shares,
    named_sources,
)
from memopt.text.packing import Batch, piece_ids
from memopt.text.tokenizer import Tokenizer
from memopt.training.checkpoint import Record
from memopt.training.config import Config
from memopt.training.data import COMPLETIONS, Data
from memopt.training.processes import is_main_process

#: Embeddings of a model per id of its tokenizer, at most, unless the options give the vocabulary.
#: It leaves room for rounding up and for a few added ids; bytes in a vocabulary of 32000 have 125.
MOST_ROWS_PER_ID = 1.25


#: Pieces of a source that are tokenized to estimate how many tokens it has.
SAMPLED_PIECES = 16


def find_text(
    config: Config,
    history: Sequence[Data] = (),
    progress: Callable[[str], None] | None = None,
) -> Mixture:
    """Finds a run's text.

    Args:
        config: The options of the run.
        history: What it was trained on so far: the same content has its names again.
        progress: Called with a line to show, now and then if it takes long.

    Returns:
        The documents of each source.

    Raises:
        ValueError: There is no such text.
    """
    return _as_before(_find(config, named_sources(config.text.data), progress), history)


def find_held_out(config: Config, history: Sequence[Data] = ()) -> Mixture:
    """Finds the text that a run holds out: its `eval_data`, and parts of sources that have none.

    Args:
        config: The options of the run.
        history: What it was trained on so far: the same content has its names again.

    Raises:
        ValueError: There is no such text.
    """
    others = _named_eval_data(config)
    sources = named_sources(config.text.data)
    own = {name: specs for name, specs in sources.items() if name not in others}
    _, held_out = _as_before(_find(config, own), history).split()
    return Mixture({**held_out.sources, **_find(config, others).sources})


def _find(
    config: Config,
    sources: Mapping[str, Sequence[str]],
    progress: Callable[[str], None] | None = None,
) -> Mixture:
    records = CHATS if config.text.format == "chats" else TEXT
    bad_records = config.text.bad_records
    return find_mixture(sources, records=records, bad_records=bad_records, progress=progress)


def _as_before(documents: Mixture, history: Sequence[Data]) -> Mixture:
    is_named = "" not in documents.sources
    listings = [x.files for x in history if ("data sources" in x.identity) == is_named]
    return documents.renamed(listings)


def shares(config: Config) -> dict[str, float]:
    """Returns the share of each source of a run's data; of one without a name, {"": 1.0}.

    Raises:
        ValueError: `mixture` does not fit `data`.
    """
    return mixture_shares(list(named_sources(config.text.data)), config.text.mixture)


class Opened(NamedTuple):
    """A run's data.

    Attributes:
        batches: The training batches.
        validation: The held-out batches of each source.
        identity: What identifies the data.
        examples: The examples of each source that the training batches are made of; empty for text.
        rows: How many rows a pass over each source has, of text about; None if nobody knows.
    """

    batches: Batches
    validation: dict[str, list[Batch]]
    identity: Record
    examples: dict[str, Examples]
    rows: dict[str, float | None]


def open_batches(
    config: Config,
    documents: Mixture,
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
    text, seed = config.text, config.optimization.seed
    training, held_out = _split(config, documents, progress)
    shape: Any = {"batch_size": text.batch_size, "seq_len": text.seq_len}
    mixed: Any = {"seed": seed, "weights": shares(config), "place": place}
    validation, examples = {}, {}
    if isinstance(tokenizer, ChatEncoder):
        encode = functools.partial(
            encode_examples,
            encoder=tokenizer,
            seq_len=text.seq_len,
            long_examples=text.long_examples,
            bad_records=text.bad_records,
            progress=progress,
        )
        other = "eval_data" if text.eval_data else "the held-out part of the data"
        size: Any = {"batch_size": text.batch_size, "rows": rows}
        for name, part in training.sources.items():
            with errors_of_source(name):
                examples[name] = encode(part)
                others = encode(held_out.sources[name], name=other)
                validation[name] = example_validation(others, max_tokens=text.eval_tokens, **size)
        batches = example_batches(examples, **mixed, **size)
        count: Callable[[str], float | None] = lambda name: len(examples[name])
    else:
        here: Any = {**shape, "rows": rows, "progress": progress}
        batches = train_batches(training, tokenizer, **mixed, **here)
        for name in training.sources:
            with errors_of_source(name):
                validation[name] = validation_batches(
                    held_out.sources[name], tokenizer, max_tokens=text.eval_tokens, **here
                )
        count = lambda name: _about_rows(training.sources[name], tokenizer, text.seq_len)
    identity = fingerprint(training, tokenizer, **shape, seed=seed)
    known = {f"data {name}": value for name, value in identity.items()}
    if examples and not any(part.has_chats for part in examples.values()):
        known[COMPLETIONS] = True
    passes = {name: count(name) for name in training.sources}
    return Opened(batches, validation, known, examples, passes)


def describe_mixture(config: Config, rows: Mapping[str, float | None]) -> list[str]:
    r"""Says the share of each named source in a run, and how often it is read.

    Args:
        config: The options of the run.
        rows: Rows of a pass over each source; None if nobody knows.

    Example:
        >>> from memopt.training.config import Text
        >>> text = Text(data=("web=pages.jsonl", "code=src"), mixture=("web=3", "code=1"))
        >>> print(*describe_mixture(Config(text=text), {"web": 1200.0, "code": None}), sep="\n")
        web 75%: 3,600 of 4,800 rows, about 3 passes
        code 25%: 1,200 of 4,800 rows
    """
    total = config.optimization.steps * config.text.batch_size
    lines = []
    for name, share in shares(config).items():
        if name:
            own = share * total
            size = rows[name]
            passes = f", about {own / size:.2g} passes" if size else ""
            lines.append(f"{name} {share:.0%}: {own:,.0f} of {total:,} rows{passes}")
    return lines


def _about_rows(documents: Documents, tokenizer: Tokenizer, seq_len: int) -> float | None:
    """Estimates the rows of a pass from a few pieces; None for a stream, which has no known end."""
    if not isinstance(documents, Files):
        return None
    sizes = documents.pieces["stop"] - documents.pieces["start"]
    numbers = range(0, len(documents), math.ceil(len(documents) / SAMPLED_PIECES))
    tokens = sum(len(piece_ids(documents[i], tokenizer)) - 1 for i in numbers)
    return int(sizes.sum()) * tokens / (int(sizes[numbers].sum()) * seq_len)


def _split(
    config: Config, documents: Mixture, progress: Callable[[str], None] | None
) -> tuple[Mixture, Mixture]:
    """The training part and the held-out part of each source, which may be other data."""
    sources = _named_eval_data(config)
    if not sources.keys() <= documents.sources.keys():
        unknown = ", ".join(map(repr, sources.keys() - documents.sources.keys()))
        raise ValueError(
            f"eval_data must be named as the sources of the data are: {unknown} is no source of it."
        )
    whole = {name: documents.sources[name] for name in sources}
    parts = {name: part for name, part in documents.sources.items() if name not in sources}
    training, held_out = Mixture(parts).split()
    others = _find(config, sources, progress)
    together = ({**training.sources, **whole}, {**held_out.sources, **others.sources})
    ordered = lambda part: Mixture({name: part[name] for name in documents.sources})
    return ordered(together[0]), ordered(together[1])


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


def _named_eval_data(config: Config) -> dict[str, tuple[str, ...]]:
    """The specs of `eval_data` by source; none, if it is not given."""
    return named_sources(config.text.eval_data, "eval_data") if config.text.eval_data else {}
