"""Measures the gradient noise scale of a run's model on its training data."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import numpy as np
import optax

from memopt.models import llama
from memopt.schedules.laws import (
    MeasuredRun,
    NoiseScale,
    noise_scale,
    noise_scale_by_sizes,
)
from memopt.training.batches import find_text, open_batches
from memopt.training.data import read_history
from memopt.training.load import LoadedModel
from memopt.training.step import init_state, train_step

#: Rows of a batch that is measured, in how many micro-batches it is cut, and batches.
ROWS, CUTS, BATCHES = 16, (16, 4), 8

#: Draws of the bootstrap, and the probability of its interval.
RESAMPLES, LEVEL = 1000, 0.9


class MeasuredNoise(NamedTuple):
    """The noise scale of a model, in rows.

    Attributes:
        by_rows: From gradients of single rows and of batches of 16.
        by_sizes: From gradients of 1, 4 and 16 rows.
        low: The lower end of the bootstrap interval of `by_rows.batch`, of 90%.
        high: The upper end; infinite if the noise may hide the gradient.
        loss: The loss of the rows that were measured, in nats a token.
        tokens_per_row: Their mean number of tokens that count.
        micro_batches: How many micro-batches of one row were measured.
    """

    by_rows: NoiseScale
    by_sizes: NoiseScale
    low: float
    high: float
    loss: float
    tokens_per_row: float
    micro_batches: int


def measure_noise(loaded: LoadedModel) -> MeasuredNoise:
    """Measures the noise scale from rows of a run's training data, in an order of their own.

    Args:
        loaded: The model of a run, with decoded weights.

    Raises:
        ValueError: The model is not from a run, or its data is not there or too little.

    References:
        As `memopt.schedules.laws.noise_scale`.
    """
    if loaded.config is None:
        raise ValueError(f"{str(loaded.path)!r} must be a run, to measure the noise on its data.")
    config = dataclasses.replace(
        loaded.config,
        text=dataclasses.replace(loaded.config.text, batch_size=ROWS),
        optimization=dataclasses.replace(
            loaded.config.optimization, seed=loaded.config.optimization.seed + 1
        ),
    )
    documents = find_text(config, read_history(loaded.path))
    is_chats = config.text.format == "chats"
    encoder = loaded.chat_encoder() if is_chats else loaded.tokenizer
    batches = open_batches(config, documents, encoder, range(ROWS)).batches
    loss = lambda params, batch: llama.loss(llama.build_model(loaded.model_config, params), batch)
    tx, rate = optax.set_to_zero(), optax.constant_schedule(0.0)
    steps = [
        jax.jit(
            functools.partial(
                train_step, loss=loss, tx=tx, learning_rate=rate, accumulation=k, measure="norms"
            )
        )
        for k in CUTS
    ]
    state = init_state(loaded.params, tx)
    squares, losses, tokens = [], [], []
    try:
        for _ in range(BATCHES):
            batch = next(batches)
            found = [jax.device_get(step(state, batch)[1]) for step in steps]
            squares.append(
                [*(float(x["micro_square"]) for x in found), float(found[0]["gradient_norm"]) ** 2]
            )
            losses.append(float(found[0]["loss"]))
            tokens.append(float(found[0]["tokens"]))
    finally:
        batches.close()
    loss_a_token = float(np.average(losses, weights=tokens))
    return _estimate(np.array(squares), loss_a_token, float(np.mean(tokens)))


def summarize_run(loaded: LoadedModel, noise: MeasuredNoise) -> MeasuredRun:
    """Returns what `memopt.schedules.laws.suggest` takes of a run.

    Args:
        loaded: The model of the run.
        noise: What `measure_noise` returned for it.
    """
    assert loaded.config
    assert loaded.step is not None
    text = loaded.config.text
    return MeasuredRun(
        loss=noise.loss,
        noise_batch=noise.by_rows.batch * noise.tokens_per_row,
        batch_tokens=text.batch_size * noise.tokens_per_row,
        tokens_seen=float(loaded.step * text.batch_size * text.seq_len),
        learning_rate=loaded.config.highest_learning_rate,
        optimizer=loaded.config.optimization.optimizer,
        vocab_size=loaded.model_config.vocab_size,
    )


def _estimate(squares: np.ndarray, loss: float, tokens: float) -> MeasuredNoise:
    """The estimates from the squared norms of each batch, (batches, sizes), smallest first."""

    def by_rows(squares: np.ndarray) -> NoiseScale:
        rows, *_, batches = squares.mean(axis=0).tolist()
        return noise_scale(rows, batches, micro_rows=1, micro_batches=ROWS)

    sizes = [*(ROWS // k for k in CUTS), ROWS]
    rng = np.random.default_rng(0)
    drawn = (rng.integers(len(squares), size=len(squares)) for _ in range(RESAMPLES))
    scales = [by_rows(squares[rows]).batch for rows in drawn]
    scales = [math.inf if math.isnan(x) else max(x, 0.0) for x in scales]  # NaN tells nothing
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(scales, ends, method="inverted_cdf").tolist()  # no means of infinities
    by_sizes = noise_scale_by_sizes(sizes, squares.mean(axis=0).tolist())
    rows = len(squares) * ROWS
    return MeasuredNoise(by_rows(squares), by_sizes, low, high, loss, tokens / ROWS, rows)
