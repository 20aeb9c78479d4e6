"""Evaluates a model on text."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax

from memopt.models import llama
from memopt.text.batches import batches_in_order, example_validation
from memopt.text.documents import Documents
from memopt.text.examples import encode_examples
from memopt.text.files import Piece
from memopt.text.mixtures import errors_of_source
from memopt.text.packing import Batch, piece_ids
from memopt.text.tokenizer import Tokenizer
from memopt.training.batches import find_held_out, find_text
from memopt.training.config import Config
from memopt.training.data import read_history
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
        return perplexity(self.loss)

    @property
    def loss_per_byte(self) -> float:
        """Nats a byte."""
        return self.total / self.bytes

    @property
    def perplexity_per_byte(self) -> float:
        """The exponential of the loss a byte."""
        return perplexity(self.loss_per_byte)

    @property
    def bits_per_byte(self) -> float:
        """The loss a byte in bits."""
        return self.loss_per_byte / math.log(2)


def pooled(evaluations: Iterable[Evaluation]) -> Evaluation:
    """Returns the evaluation of all tokens together.

    Example:
        >>> pooled([Evaluation(10.0, 5, 20), Evaluation(30.0, 5, 10)]).loss
        4.0
    """
    return Evaluation(*map(sum, zip(*evaluations, strict=True)))


def perplexity(nats: float) -> float:
    """The exponential of a loss, at most that of 700, which a float still holds.

    Example:
        >>> perplexity(0.0), perplexity(1e4) < math.inf
        (1.0, True)
    """
    return math.exp(min(nats, 700))


def evaluate_data(
    loaded: LoadedModel,
    data: Sequence[str] = (),
    *,
    format: Literal["text", "chats"] | None = None,
    batch_size: int = 8,
    seq_len: int | None = None,
) -> dict[str, Evaluation]:
    """Evaluates a model on data or, without, on what its run held out.

    Args:
        loaded: The model, from `load_run` or `load_model`.
        data: Text or chats, as in `memopt.training.config.Text`, all of it; empty: what the run
            held out, as much as its own validation reads.
        format: "text" or "chats"; None: as the model was trained.
        batch_size: As in `evaluate_text`.
        seq_len: As in `evaluate_text`.

    Returns:
        The evaluation of each source of the data; of one without a name, under "".

    Raises:
        ValueError: There is no such data, none is given for a model that is not from a run, or the
            rows are longer than the model accepts.
    """
    if not (loaded.config or data):
        raise ValueError(f"{str(loaded.path)!r} is a model without data of its own: give --data.")
    config = loaded.config or Config()
    text = dataclasses.replace(config.text, format=format or config.text.format)
    if data:
        text = dataclasses.replace(text, data=tuple(data))
        documents = find_text(dataclasses.replace(config, text=text))
    else:
        history = read_history(loaded.path)  # names of data that has moved
        documents = find_held_out(dataclasses.replace(config, text=text), history)
    rows: Any = {"batch_size": batch_size, "seq_len": seq_len}
    rows |= {"max_tokens": None if data else text.eval_tokens}
    evaluate: Callable[..., Evaluation] = evaluate_text
    if text.format == "chats":
        evaluate, rows = evaluate_chats, rows | {"long_examples": text.long_examples}
    found = {}
    for name, part in documents.sources.items():
        with errors_of_source(name):
            found[name] = evaluate(loaded, part, **rows)
    return found


def evaluate_text(
    loaded: LoadedModel,
    documents: Documents,
    *,
    batch_size: int = 8,
    seq_len: int | None = None,
    max_tokens: int | None = None,
) -> Evaluation:
    """Evaluates a model on documents, packed into rows as for training.

    Args:
        loaded: The model, from `load_run` or `load_model`.
        documents: The text, or a part of it.
        batch_size: Rows that are evaluated at a time.
        seq_len: Tokens of a row, which is what the model sees before a token, at most; by default
            that of the run, or the model's longest up to 1024.
        max_tokens: Evaluate on so many tokens at most, in whole rows; None: on all.

    Raises:
        ValueError: There is no text or it is empty, or the rows are longer than the model accepts.
    """
    tokenizer = loaded.tokenizer
    batches = batches_in_order(
        documents,
        tokenizer,
        batch_size=batch_size,
        seq_len=_row_length(loaded, seq_len),
        max_tokens=max_tokens,
    )
    total, tokens = _evaluate(loaded, batches)
    return _checked(total, tokens, covered_bytes(documents.once(), tokenizer, tokens))


def evaluate_chats(
    loaded: LoadedModel,
    documents: Documents,
    *,
    batch_size: int = 8,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    long_examples: str = "skip",
) -> Evaluation:
    """Evaluates a model on the answers in chats, packed into rows as for fine-tuning.

    Args:
        loaded: As in `evaluate_text`.
        documents: The chats, of `find_documents(…, records=CHATS)`, or a part of them.
        batch_size: As in `evaluate_text`.
        seq_len: As in `evaluate_text`.
        max_tokens: As in `evaluate_text`.
        long_examples: "skip" chats that are longer than a row, or "truncate" them.

    Returns:
        The evaluation; its bytes are those that the answers decode to.

    Raises:
        ValueError: There is no chat or all answers are empty, or the rows are longer than the model
            accepts.
    """
    length = _row_length(loaded, seq_len)
    encoder = loaded.chat_encoder()
    examples = encode_examples(documents, encoder, length, long_examples=long_examples)
    batches = example_validation(examples, batch_size=batch_size, max_tokens=max_tokens)
    decode = loaded.tokenizer.decode
    texts = (
        decode(targets[weights == 1])
        for batch in batches
        for targets, weights in zip(batch["targets"], batch["weights"], strict=True)
    )
    return _checked(*_evaluate(loaded, batches), sum(map(_size, texts)))


def _row_length(loaded: LoadedModel, seq_len: int | None) -> int:
    longest = loaded.model_config.max_seq_len
    if seq_len is None:
        return loaded.config.text.seq_len if loaded.config else min(longest, 1024)
    if seq_len > longest:
        raise ValueError(
            f"seq_len={seq_len} is longer than the {longest} tokens that the model accepts: choose "
            "a shorter --seq-len."
        )
    return seq_len


def _evaluate(loaded: LoadedModel, batches: Iterable[Batch]) -> tuple[float, int]:
    """Returns the summed loss and the tokens."""
    config = loaded.model_config
    loss = jax.jit(lambda params, batch: llama.loss(llama.build_model(config, params), batch))
    total, tokens = 0.0, 0
    for batch in batches:
        summed, counted = loss(loaded.params, batch)
        total, tokens = total + float(summed), tokens + int(counted)
    return total, tokens


def _checked(total: float, tokens: int, size: int) -> Evaluation:
    if not size:  # of documents or answers that are all empty, too
        raise ValueError("the data holds no text to evaluate on: give more.")
    return Evaluation(total, tokens, size)


def _size(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


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
        # No token is before the first one.
        ids = piece_ids(piece, tokenizer)[1:]
        predicted = ids[:tokens]
        is_whole = piece.begins and len(predicted) == len(ids)
        shown = predicted[predicted != tokenizer.eos_id]  # which not every file calls special
        text = piece.content if is_whole else tokenizer.decode(shown)
        total, tokens = total + _size(text), tokens - len(predicted)
    return total
