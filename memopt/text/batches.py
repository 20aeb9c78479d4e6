"""Batches for pretraining: documents tokenized, packed into rows, mixed and split by rows.

The pipeline is Grain's from end to end. A document becomes `[bos] text [eos]`, or
`[eos] text [eos]` where the tokenizer has no token that begins one; every token but the first is
predicted once. Documents are packed one after another into rows of `seq_len`, cut where a row ends,
so that a row holds no padding. Rows are mixed within windows of 2^18 tokens.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from memopt import internals
from memopt.errors import check_at_least
from memopt.text.chats import ChatEncoder
from memopt.text.documents import Documents
from memopt.text.examples import Examples
from memopt.text.finding import SECONDS_OF_SILENCE
from memopt.text.mixing import Mixed
from memopt.text.mixtures import Mixture, normalized
from memopt.text.packing import Batch, packed
from memopt.text.tokenizer import Tokenizer

#: Rows are mixed within windows of this many tokens.
WINDOW_TOKENS = 2**18
#: Batches made and placed ahead by a thread.
PREFETCH = 8


class Batches(Iterator[Any]):
    """An endless iterator of batches whose state can be saved and restored exactly.

    Batches are made ahead by a thread; the state is that of the batch handed out last.
    """

    def __init__(self, dataset: grain.IterDataset, progress: Callable[[str], None] | None = None):
        self._iterator: Any = iter(dataset)
        self._progress = progress

    def __next__(self) -> Any:
        """Returns the next batch, placed if there is a `place`."""
        progress, self._progress = self._progress, None  # the first batch alone fills a window
        with _told_if_slow(progress, "reading text for the first batch …"):
            return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Returns the iterator's position, JSON-serialisable: a few hundred bytes."""
        return json.loads(json.dumps(self._iterator.get_state()))

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a state that `get_state` returned, here or in another process."""
        self._iterator.set_state(state)

    @property
    def weights(self) -> dict[str, float]:
        """The share of each named source; empty if there are none."""
        return dict(self._iterator.get_state().get("weights", {}))

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Changes the shares of the sources, from the next batch on.

        Batches that were made ahead are made anew, for which a window of each source is read again.

        Args:
            weights: A positive weight for each source; their sum does not matter.

        Raises:
            ValueError: They are not that, or the data has no named sources.
        """
        before = self.weights
        if not before:
            raise ValueError("data must have named sources, NAME=SOURCE, to be weighted.")
        if (weights := normalized(weights, list(before))) != before:
            self.set_state(self.get_state() | {"weights": weights})

    def close(self) -> None:
        """Stops the thread that makes batches ahead; no batch follows."""
        if self._iterator is not None:  # freed here: at exit, Grain's could not be
            self._iterator.close()
            self._iterator = None


def train_batches(
    documents: Documents | Mixture,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    weights: Mapping[str, float] | None = None,
    rows: Sequence[int] | None = None,
    place: Callable[[Batch], Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Batches:
    """Returns endless training batches, shuffled anew in each epoch.

    The order is a function of the documents, tokenizer, `batch_size`, `seq_len`, `seed` and
    `weights` alone.
    With `rows` a process gets these rows of every batch, so any number of processes together see
    the same batches (each of them tokenizes all the text for that).

    Args:
        documents: The training part of `find_documents(...).split()`, or of a
            `memopt.text.mixtures.Mixture`, whose sources are packed, shuffled and repeated each for
            itself.
        tokenizer: Makes ids of text.
        batch_size: Rows of the global batch, B.
        seq_len: Tokens of a row, S.
        seed: Decides the order.
        weights: The share of each named source in the rows of the batches; None: equal shares.
        rows: Which rows of the global batch to return, R of them; all, if not given.
        place: Applied to each batch by the thread that makes them ahead, to put it on devices.
        progress: Called with a line to show if the first batch takes longer than a second.

    Returns:
        An iterator of batches, or of what `place` makes of them: dicts of int32 arrays (R, S):
        `inputs`; `targets`, the token after each input in the same document; `segment_ids`, 1, 2,
        3 … for the documents of a row; `positions`, from 0 in each; `weights`, 1 where the target
        counts (everywhere, here).

    Raises:
        ValueError: `seq_len` below 2, a `batch_size` that is not positive, `rows` that a batch does
            not have, or a negative `seed`.

    Example:
        >>> from memopt.text.documents import find_documents
        >>> from memopt.text.tokenizer import load_tokenizer
        >>> training, validation = find_documents(["python"]).split()
        >>> batches = train_batches(
        ...     training, load_tokenizer("bytes"), batch_size=4, seq_len=32, seed=0
        ... )
        >>> batch = next(batches)
        >>> sorted(batch), batch["inputs"].shape
        (['inputs', 'positions', 'segment_ids', 'targets', 'weights'], (4, 32))
        >>> state = batches.get_state()
        >>> following = next(batches)
        >>> batches.set_state(state)
        >>> bool((next(batches)["inputs"] == following["inputs"]).all())
        True
        >>> batches.close()
    """
    rows = _check_rows(batch_size, seq_len, rows)
    _check_seed(seed)

    def shuffled(part: Documents) -> grain.IterDataset:
        in_order = packed(part.epochs(seed), tokenizer, seq_len, chunk=part.chunk)
        return internals.shuffled(in_order, max(1, WINDOW_TOKENS // seq_len), seed)

    sources = documents.sources if isinstance(documents, Mixture) else {"": documents}
    datasets = {name: shuffled(part) for name, part in sources.items()}
    dataset = _mixed(datasets, batch_size, seed, weights)
    return _ahead(dataset.map(_take(batch_size, rows)), place, progress)


def example_batches(
    examples: Mapping[str, Examples],
    *,
    batch_size: int,
    seed: int,
    weights: Mapping[str, float] | None = None,
    rows: Sequence[int] | None = None,
    place: Callable[[Batch], Any] | None = None,
) -> Batches:
    """Returns endless training batches of examples, as `train_batches` does of documents.

    Args:
        examples: The examples of each source, which are in rows already; of one without a name,
            under "".
        batch_size: As in `train_batches`.
        seed: As in `train_batches`.
        weights: As in `train_batches`.
        rows: As in `train_batches`.
        place: As in `train_batches`.

    Returns:
        An iterator of batches, with `weights` of 1 where the target belongs to an answer.

    Raises:
        ValueError: As `train_batches`.
    """
    rows = _check_rows(batch_size, next(iter(examples.values())).seq_len, rows)
    _check_seed(seed)
    datasets = {name: part.epochs(seed) for name, part in examples.items()}
    dataset = _mixed(datasets, batch_size, seed, weights)
    return _ahead(dataset.map(_take(batch_size, rows)), place)


def example_validation(
    examples: Examples,
    *,
    batch_size: int,
    max_tokens: int | None = 2**17,
    rows: Sequence[int] | None = None,
) -> list[Batch]:
    """Returns the same held-out batches at every call, as `validation_batches` does of documents.

    Args:
        examples: The examples, which are in rows already.
        batch_size: As in `validation_batches`.
        max_tokens: As in `validation_batches`; None holds all.
        rows: As in `validation_batches`.

    Raises:
        ValueError: As `validation_batches`.
    """
    rows = _check_rows(batch_size, examples.seq_len, rows)
    dataset = examples.once()
    if max_tokens is not None:
        check_at_least("max_tokens", max_tokens, examples.seq_len)
        dataset = internals.limited(dataset, max_tokens // examples.seq_len)
    return list(dataset.batch(batch_size).map(_take(batch_size, rows)))


def validation_batches(
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seq_len: int,
    max_tokens: int = 2**17,
    rows: Sequence[int] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Batch]:
    """Returns the same held-out batches at every call.

    The last batch is filled up with rows of weight 0: sums of `weights`·loss over all batches,
    divided by the sum of `weights`, are the exact mean over the held-out tokens, whatever the
    batch size.

    Args:
        documents: The validation part of `find_documents(...).split()`.
        tokenizer: Makes ids of text.
        batch_size: Rows of the global batch.
        seq_len: Tokens of a row.
        max_tokens: Hold at most this many tokens, in whole rows.
        rows: Which rows of the global batch to return, R of them; all, if not given.
        progress: Called with a line to show if it takes longer than a second.

    Returns:
        The batches, as `train_batches` describes them.

    Raises:
        ValueError: As `train_batches`; `max_tokens` below `seq_len`; or no text is held out.
    """
    shape: Any = {"batch_size": batch_size, "seq_len": seq_len, "max_tokens": max_tokens}
    with _told_if_slow(progress, "reading the held-out text …"):
        batches = list(batches_in_order(documents, tokenizer, **shape, rows=rows))
    if not batches:
        raise ValueError("the validation part of the data holds no text: give more data.")
    return batches


def batches_in_order(
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seq_len: int,
    max_tokens: int | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Reads documents once, in order.

    Args:
        documents: Any part of `find_documents(...)`.
        tokenizer: Makes ids of text.
        batch_size: Rows of the global batch; rows of weight 0 fill up the last one.
        seq_len: Tokens of a row.
        max_tokens: Read at most this many tokens, in whole rows; None reads all.
        rows: Which rows of the global batch to return; all, if not given.

    Returns:
        The batches, as `train_batches` describes them.

    Raises:
        ValueError: As `train_batches`; `max_tokens` below `seq_len`.
    """
    rows = _check_rows(batch_size, seq_len, rows)
    dataset = packed(documents.once(), tokenizer, seq_len, chunk=documents.chunk)
    if max_tokens is not None:
        check_at_least("max_tokens", max_tokens, seq_len)
        dataset = internals.limited(dataset, max_tokens // seq_len)
    return iter(dataset.batch(batch_size).map(_take(batch_size, rows)))


def fingerprint(
    documents: Documents | Mixture,
    tokenizer: Tokenizer | ChatEncoder,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
) -> dict[str, Any]:
    """Returns everything that decides the order of `train_batches`, JSON-serialisable.

    Store it beside the iterator state: where two of these differ, the state does not apply.

    Args:
        documents: As given to `train_batches`.
        tokenizer: As given to `train_batches`, or what encodes the examples.
        batch_size: As given to `train_batches`.
        seq_len: As given to `train_batches`.
        seed: As given to `train_batches`.

    Returns:
        A flat dict: files, bytes, a digest of names and pieces and one of the content (or the
        stream's name), of named sources all this by their names, as `sources`; the tokenizer's
        digest, the id that ends a document and, if that does not begin it, those that do,
        `batch_size`, `seq_len`, `seed`.
    """
    ids = {"tokenizer": tokenizer.digest, "eos_id": tokenizer.eos_id}
    if tokenizer.begin_ids != (tokenizer.eos_id,):  # earlier runs began documents with eos_id
        ids["begin_ids"] = list(tokenizer.begin_ids)
    options = {"batch_size": batch_size, "seq_len": seq_len, "seed": seed}
    return {**documents.describe(), **ids, **options}


@contextlib.contextmanager
def _told_if_slow(progress: Callable[[str], None] | None, line: str) -> Iterator[None]:
    """Shows a line if what is done in the block takes longer than a second."""
    if progress is None:
        yield
        return
    timer = threading.Timer(SECONDS_OF_SILENCE, progress, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _mixed(
    sources: Mapping[str, grain.IterDataset],
    batch_size: int,
    seed: int,
    weights: Mapping[str, float] | None,
) -> grain.IterDataset:
    """Batches of the rows of each source; one without a name is not mixed."""
    if "" in sources:
        return sources[""].batch(batch_size)
    return Mixed(sources, weights or dict.fromkeys(sources, 1.0), batch_size, seed)


def _take(batch_size: int, rows: Sequence[int]) -> Callable[[Batch], Batch]:
    """Returns what takes these rows of each batch; rows of zeros fill up the last one."""

    def take(batch: Batch) -> Batch:
        missing = [(0, batch_size - len(batch["inputs"])), (0, 0)]
        return {name: np.pad(array, missing)[rows] for name, array in batch.items()}

    return take


def _ahead(
    batches: grain.IterDataset,
    place: Callable[[Batch], Any] | None,
    progress: Callable[[str], None] | None = None,
) -> Batches:
    """The batches, made and placed ahead."""
    batches = batches.map(place) if place else batches
    return Batches(internals.prefetched(batches, PREFETCH), progress)


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed={seed} must be between 0 and 2147483647.")


def _check_rows(batch_size: int, seq_len: int, rows: Sequence[int] | None) -> Sequence[int]:
    check_at_least("seq_len", seq_len, 2)
    check_at_least("batch_size", batch_size, 1)
    rows = list(range(batch_size) if rows is None else rows)
    if not rows or min(rows) < 0 or max(rows) >= batch_size:
        raise ValueError(f"rows={rows} must be some of 0 to {batch_size - 1}, as batch_size says.")
    return rows
