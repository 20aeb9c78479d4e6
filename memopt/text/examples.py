"""Examples to fine-tune on: all of them as ids, packed whole into rows."""

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable

import grain
import numpy as np

from memopt.errors import check_choice
from memopt.text.chats import Chat, ChatEncoder
from memopt.text.documents import Documents
from memopt.text.finding import NAMED, SECONDS_BETWEEN_LINES, SECONDS_OF_SILENCE, DataWarning
from memopt.text.packing import AHEAD, THREADS, Batch, fitted, row_of
from memopt.text.templates import UnusableTemplateError


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Examples of one data set, in rows of whole examples.

    Which examples share a row never changes; the order of the rows does, from epoch to epoch.

    Attributes:
        ids: The ids of all examples, one after another, int32 (tokens,).
        learned: Whether each is of an answer, bool (tokens,).
        ends: Where each example ends.
        seq_len: Tokens of a row.
        has_chats: Whether any is a `Chat`; otherwise all are prompts with completions.
    """

    ids: np.ndarray
    learned: np.ndarray
    ends: np.ndarray
    seq_len: int
    has_chats: bool

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        """Returns row `index`, as `memopt.text.batches.train_batches` describes it."""
        spans = [self._span(example) for example in self._rows[index]]
        take = lambda array: [array[span] for span in spans]
        return row_of(take(self.ids), self.seq_len, take(self.learned))

    @functools.cached_property
    def _rows(self) -> list[list[int]]:
        pairs = np.diff(self.ends, prepend=0) - 1
        return fitted(pairs.tolist(), self.seq_len)

    def _span(self, example: int) -> slice:
        return slice(int(self.ends[example - 1]) if example else 0, int(self.ends[example]))

    def epochs(self, seed: int) -> grain.IterDataset:
        """Repeats the rows without end, shuffled anew in each epoch."""
        return self._read(grain.MapDataset.range(len(self)).shuffle(seed=seed).repeat())

    def once(self) -> grain.IterDataset:
        """Returns every row once."""
        return self._read(grain.MapDataset.range(len(self)))

    def _read(self, numbers: grain.MapDataset) -> grain.IterDataset:
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
        return numbers.map(self.__getitem__).to_iter_dataset(options)

    def summary(self, batch_size: int) -> str:
        """Says how many there are, and how much of a row they fill.

        Args:
            batch_size: Rows of a batch.
        """
        rows, examples = len(self), len(self.ends)
        filled = (len(self.ids) - examples) / (rows * self.seq_len)
        return (
            f"{examples:,} examples in {rows:,} rows of {self.seq_len}, {filled:.0%} filled, "
            f"{self.learned.mean():.0%} of the tokens are learned; {rows / batch_size:.4g} batches "
            "an epoch"
        )


def encode_examples(
    documents: Documents,
    encoder: ChatEncoder,
    seq_len: int,
    *,
    name: str = "data",
    long_examples: str = "skip",
    bad_records: str = "skip",
    progress: Callable[[str], None] | None = None,
) -> Examples:
    """Makes ids of all examples, which are then held in memory, 5 bytes a token.

    Args:
        documents: The examples, found as `memopt.text.chats.CHATS`.
        encoder: Makes ids of them.
        seq_len: Tokens of a row.
        name: What errors and warnings call the examples.
        long_examples: What to do about those that are longer: "skip" them or "truncate" them, with
            a warning.
        bad_records: What to do about those that the chat template refuses: "skip" them with a
            warning, or "stop" with an error.
        progress: Called with a line to show, now and then if it takes more than a second.

    Returns:
        The examples, in an order that depends on the documents only.

    Raises:
        ValueError: None is left, or one is bad and `bad_records` is "stop".

    Warns:
        DataWarning: Examples are left out or cut.
    """
    check_choice("long_examples", long_examples, ("skip", "truncate"))
    bad, long = _Named(), _Named()
    ids: list[np.ndarray] = []
    learned: list[np.ndarray] = []
    has_chats = False
    due, count = time.monotonic() + SECONDS_OF_SILENCE, 0
    with encoder:
        for count, piece in enumerate(documents.once(), 1):
            if progress and time.monotonic() > due:
                due = time.monotonic() + SECONDS_BETWEEN_LINES
                progress(f"tokenizing the {name}: {count:,} examples")
            try:
                own, of_answers = encoder.encode(piece.content)
            except UnusableTemplateError:
                raise
            except (ValueError, RecursionError) as error:
                deep = isinstance(error, RecursionError)
                what = f"{piece.name} {'is nested too deeply' if deep else error}"
                if bad_records == "stop":
                    raise ValueError(
                        f"{name}: {what}: repair it, or leave it out with --bad-records skip."
                    ) from error
                bad.add(what)
                continue
            if len(own) > seq_len + 1:
                long.add(f"{piece.name} has {len(own):,}")
                own, of_answers = own[: seq_len + 1], of_answers[: seq_len + 1]
                if long_examples == "skip" or not of_answers[1:].any():
                    continue
            has_chats |= isinstance(piece.content, Chat)
            ids.append(own)
            learned.append(of_answers)
    too_long = f"longer than the {seq_len + 1:,} tokens that seq_len={seq_len} has room for"
    if not ids:
        why = f"all are {too_long}: {long}" if long.count else f"{bad}" if bad.count else "empty"
        raise ValueError(f"{name} holds no example that can be used: {why}.")
    if bad.count:
        warnings.warn(
            f"{name}: skipped {bad.count:,} of {count:,} examples: {bad}.",
            DataWarning,
            stacklevel=2,
        )
    if long.count:
        done = {"skip": "skipped", "truncate": "truncated"}[long_examples]
        warnings.warn(
            f"{name}: {done} {long.count:,} of {count:,} examples, {too_long}: {long}.",
            DataWarning,
            stacklevel=2,
        )
    ends = np.cumsum(list(map(len, ids)))
    return Examples(np.concatenate(ids), np.concatenate(learned), ends, seq_len, has_chats)


class _Named:
    """Counts examples and names the first of them."""

    def __init__(self) -> None:
        self.count = 0
        self._names: list[str] = []

    def add(self, name: str) -> None:
        self.count += 1
        if self.count <= NAMED:
            self._names.append(name)

    def __str__(self) -> str:
        return "; ".join(self._names) + "; …" * (self.count > NAMED)
