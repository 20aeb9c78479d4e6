"""Evaluates a model on text."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax

from memopt.models import llama
from memopt.text.batches import batches_in_order
from memopt.text.documents import Documents
from memopt.text.files import Piece
from memopt.text.tokenizer import Tokenizer
from memopt.training.load import LoadedModel


class Evaluation(NamedTuple):
    """The loss of a model on text.

    Attributes:
        total: Summed loss in nats.
        tokens: Tokens that were predicted, ends of documents among them.
        bytes: Bytes of text, in UTF-8, that they stand for.

    Example:
        >>> found = Evaluation(total=200.0, tokens=100, bytes=400)
        >>> found.loss, f"{found.perplexity:.2f}", f"{found.bits_per_byte:.3f}"
        (2.0, '7.39', '0.721')
    """

    total: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the loss a token."""
        return _exp(self.loss)

    @property
    def loss_per_byte(self) -> float:
        """Nats a byte."""
        return self.total / self.bytes

    @property
    def perplexity_per_byte(self) -> float:
        """The exponential of the loss a byte."""
        return _exp(self.loss_per_byte)

    @property
    def bits_per_byte(self) -> float:
        """The loss a byte in bits."""
        return self.loss_per_byte / math.log(2)


def evaluate_text(
    loaded: LoadedModel,
    documents: Documents,
    *,
    batch_size: int = 8,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluates a model on documents, packed into rows as for training.

    Args:
        loaded: The model, from `load_run` or `load_model`.
        documents: The text, or a part of it.
        batch_size: Rows that are evaluated at a time.
        seq_len: Tokens of a row, which is what the model sees before a token, at most; by default
            that of the run, or the model's longest up to 1024.
        max_tokens: Evaluate on so many tokens at most, in whole rows; None: on all.
        progress: Called after each batch with the tokens so far.

    Raises:
        ValueError: There is no text, or the rows are longer than the model accepts.
    """
    config = loaded.model_config
    if seq_len is None:
        seq_len = loaded.config.text.seq_len if loaded.config else min(config.max_seq_len, 1024)
    if seq_len > config.max_seq_len:
        raise ValueError(
            f"seq_len={seq_len} is longer than the {config.max_seq_len} tokens that the model "
            "accepts: choose a shorter --seq-len."
        )
    loss = jax.jit(lambda params, batch: llama.loss(llama.build_model(config, params), batch))
    total, tokens = 0.0, 0
    for batch in batches_in_order(
        documents,
        loaded.tokenizer,
        batch_size=batch_size,
        seq_len=seq_len,
        max_tokens=max_tokens,
    ):
        summed, counted = loss(loaded.params, batch)
        total, tokens = total + float(summed), tokens + int(counted)
        if progress:
            progress(tokens)
    if not tokens:
        raise ValueError("the data holds no text to evaluate on: give more.")
    return Evaluation(total, tokens, covered_bytes(documents.once(), loaded.tokenizer, tokens))


def covered_bytes(pieces: Iterable[Piece], tokenizer: Tokenizer, tokens: int) -> int:
    """Counts the bytes of text that the first predicted tokens stand for.

    Args:
        pieces: The text.
        tokenizer: Makes ids of it.
        tokens: How many are predicted, ends of documents among them.
    """
    total = 0
    for piece in pieces:
        if not tokens:
            break
        ids = tokenizer.encode(piece.text)
        first = (
            0 if piece.begins else 1
        )  # the first token of the rest of a document has none before
        count = min(max(len(ids) - first + piece.ends, 0), tokens)
        is_whole = not first and count >= len(ids)
        text = piece.text if is_whole else tokenizer.decode(ids[first : first + count])
        total, tokens = total + len(text.encode("utf-8", "replace")), tokens - count
    return total


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700))
