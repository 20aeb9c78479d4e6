"""Tokens of documents, packed one after another into rows without padding.

Grain's own packing takes a tenth of a millisecond for a document, however short it is.
"""

import bisect
import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from memopt.text.files import Piece
from memopt.text.tokenizer import Tokenizer

#: The arrays of a row or a batch, int32 (..., seq_len) each.
FIELDS = ("inputs", "targets", "segment_ids", "positions", "weights")
Batch = dict[str, np.ndarray]

#: Threads that read and tokenize, and how many pieces they are ahead if these come one by one.
THREADS, AHEAD = 4, 16


def packed(
    pieces: grain.MapDataset | grain.IterDataset,
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    chunk: int = 2,
) -> grain.IterDataset:
    """Packs pieces of text into rows of `seq_len` tokens.

    A document begins with the tokenizer's `begin_ids` and ends with its `eos_id`.

    Args:
        pieces: The pieces, `memopt.text.files.Piece`.
        tokenizer: Makes ids of text.
        seq_len: The tokens of a row.
        chunk: So many pieces are read at a time, if they can be read in any order.

    Returns:
        Rows, dicts of int32 arrays (seq_len,), as `train_batches` describes them; zeros fill up the
        last.
    """
    encode = functools.partial(piece_ids, tokenizer=tokenizer)
    if isinstance(pieces, grain.MapDataset):
        return _Rows(_Mapped(pieces, encode, chunk), seq_len)
    return _Rows(pieces.map(encode), seq_len)


def piece_ids(piece: Piece, tokenizer: Tokenizer) -> np.ndarray:
    """Returns the ids of a piece of text, with those that begin and end its document, int32."""
    begin = np.array(tokenizer.begin_ids if piece.begins else (), np.int32)
    end = np.array([tokenizer.eos_id] if piece.ends else (), np.int32)
    return np.concatenate([begin, tokenizer.encode(piece.content), end])


class _Mapped(grain.IterDataset[np.ndarray]):
    """A function of each piece, called in threads for a chunk of pieces at a time."""

    def __init__(
        self, pieces: grain.MapDataset, function: Callable[[Piece], np.ndarray], chunk: int
    ):
        super().__init__()
        chunks = pieces.batch(chunk, batch_fn=list)
        chunks = chunks.map(lambda pieces: [function(piece) for piece in pieces])
        ahead = max(AHEAD // chunk, THREADS)
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=ahead)
        self._chunks, self._chunk = chunks.to_iter_dataset(options), chunk

    def __iter__(self) -> "_MappedIterator":
        return _MappedIterator(iter(self._chunks), self._chunk)


class _MappedIterator(grain.DatasetIterator[np.ndarray]):
    """Its state is the number of the next piece, however many are in a chunk."""

    _behind: int  # pieces of the next chunk that come before

    def __init__(self, chunks: grain.DatasetIterator, chunk: int):
        super().__init__(chunks)
        self._chunks, self._chunk = chunks, chunk
        self._seek(0)

    def __next__(self) -> np.ndarray:
        while not self._left:
            self._left.extend(next(self._chunks)[self._behind :])
            self._behind = 0
        self._index += 1
        return self._left.popleft()

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self._index}

    def set_state(self, state: dict[str, Any]) -> None:
        self._seek(state["next_index"])

    def _seek(self, index: int) -> None:
        self._index = index
        self._left: deque[np.ndarray] = deque()
        number = index // self._chunk
        self._behind = index % self._chunk
        self._chunks.set_state({"next_index": number})


class _Rows(grain.IterDataset[Batch]):
    """Rows of pairs of tokens, each token and the one after it in its piece."""

    def __init__(self, pieces: grain.IterDataset, seq_len: int):
        super().__init__()
        self._pieces, self._seq_len = pieces, seq_len

    def __iter__(self) -> "_RowIterator":
        return _RowIterator(iter(self._pieces), self._seq_len)


class _RowIterator(grain.DatasetIterator[Batch]):
    """Its state is that before the piece that comes next, and the pairs of it already used."""

    def __init__(self, pieces: grain.DatasetIterator, seq_len: int):
        super().__init__(pieces)
        self._pieces, self._seq_len = pieces, seq_len
        self._continue(pieces.get_state(), 0)

    def _continue(self, before: dict[str, Any], used: int) -> None:
        self._before, self._used = before, used
        self._tokens: np.ndarray | None = None

    def __next__(self) -> Batch:
        parts, room = [], self._seq_len
        while (tokens := self._piece()) is not None:
            pairs = max(len(tokens) - 1, 0)
            if not room and self._used < pairs:
                break
            # A piece without pairs counts as a segment of its row, too.
            count = min(pairs - self._used, room)
            parts.append(tokens[self._used : self._used + count + 1])
            room -= count
            self._used += count
            if self._used < pairs:
                break
            self._continue(self._pieces.get_state(), 0)
        if room == self._seq_len:
            raise StopIteration
        return row_of(parts, self._seq_len)

    def _piece(self) -> np.ndarray | None:
        """The piece that comes next, or what is left of it; None at the end."""
        if self._tokens is None:
            self._tokens = next(self._pieces, None)
        return self._tokens

    def get_state(self) -> dict[str, Any]:
        return {"parent_state": self._before, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._pieces.set_state(state["parent_state"])
        if "used" in state:
            self._continue(state["parent_state"], state["used"])
            return
        # Release 0.1 packed with Grain, whose state is that before one of the last rows.
        self._continue(state["parent_state"], max(state["remainder_slices"]["inputs"][0], 0))
        for _ in range(state["elements_from_buffer_after_checkpoint"]):
            next(self)


def row_of(
    parts: Sequence[np.ndarray], seq_len: int, learned: Sequence[np.ndarray] | None = None
) -> Batch:
    """Returns a row of documents, or parts of them, each a segment; zeros fill it up.

    Args:
        parts: Ids; each but a part's first is a target.
        seq_len: Tokens of the row.
        learned: Whether each id counts as a target; all do, if not given.
    """
    lengths = [max(len(part) - 1, 0) for part in parts]
    ends = np.cumsum(lengths)
    used = ends[-1]
    row = {name: np.zeros(seq_len, np.int32) for name in FIELDS}
    row["inputs"][:used] = np.concatenate([part[:-1] for part in parts])
    row["targets"][:used] = np.concatenate([part[1:] for part in parts])
    row["segment_ids"][:used] = np.repeat(np.arange(1, len(parts) + 1), lengths)
    row["positions"][:used] = np.arange(used) - np.repeat(ends - lengths, lengths)
    row["weights"][:used] = 1 if learned is None else np.concatenate([x[1:] for x in learned])
    return row


def fitted(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Packs things into bins, each, from the largest on, into the fullest bin that has room.

    Args:
        lengths: What each takes, at most `room`.
        room: What a bin holds.

    Returns:
        The things in each bin, by number.

    Example:
        >>> fitted([3, 6, 2, 4], room=8)
        [[1, 2], [3, 0]]
    """
    bins: list[list[int]] = []
    left: dict[int, list[int]] = {}  # bins by the room left in them
    rooms: list[int] = []  # the keys, sorted
    for thing in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(rooms, lengths[thing])
        if at < len(rooms):
            space = rooms[at]
            chosen = left[space].pop()
            if not left[space]:
                del left[space], rooms[at]
        else:
            space, chosen = room, len(bins)
            bins.append([])
        bins[chosen].append(thing)
        space -= lengths[thing]
        if space not in left:
            left[space] = []
            bisect.insort(rooms, space)
        left[space].append(chosen)
    return bins
