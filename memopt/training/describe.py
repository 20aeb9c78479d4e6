"""A run's training step from its options, before anything is opened or written."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import optax

from memopt import optimizers, schedules
from memopt.errors import check_at_least
from memopt.models import llama
from memopt.state.quantized_state import quantize_state
from memopt.text.batches import FIELDS
from memopt.training.config import Config, Optimization
from memopt.training.placement import make_mesh
from memopt.training.setup import Setup, abstract_batch, set_up


def describe_run(config: Config) -> Setup:
    """Returns a run's model, mesh, optimizer and training step; touches no file and makes no array.

    Args:
        config: The options of the run.

    Returns:
        All that the step is compiled from.

    Raises:
        ValueError: An option, or a combination of them, cannot work; says what to change.

    Example:
        >>> from memopt.training.config import Run
        >>> setup = describe_run(Config(run=Run(mesh="data=1")))
        >>> setup.batch["inputs"].shape, setup.state.params["embed"]["embedding"].shape
        ((8, 128), (264, 192))
    """
    options = config.optimization
    model_config = _model_config(config)
    mesh = make_mesh(config.run.mesh, _rows_at_once(config))
    learning_rate = _learning_rate(options)
    with _naming_options(config):
        tx = optimizers.optimizer(
            options.optimizer, learning_rate=learning_rate, **config.optimizer_options
        )
        return set_up(
            model_config,
            mesh,
            quantize_state(tx, options.state) if options.state else tx,
            abstract_batch(mesh, config.text.batch_size, config.text.seq_len, FIELDS),
            optimizer=options.optimizer,
            learning_rate=learning_rate,
            weights=config.architecture.weights,
            release=options.release,
            accumulation=options.accumulation,
        )


def _model_config(config: Config) -> llama.LlamaConfig:
    options = config.architecture
    model = llama.preset(options.model)
    model = dataclasses.replace(
        model,
        vocab_size=options.vocab_size or model.vocab_size,
        param_dtype=options.param_dtype,
        dtype=options.compute_dtype,
        remat=options.remat,
    )
    if config.text.seq_len > model.max_seq_len:
        raise ValueError(
            f"seq_len={config.text.seq_len} is longer than the {model.max_seq_len} tokens that "
            f"model {options.model!r} accepts: choose a shorter --seq-len."
        )
    return model


@contextlib.contextmanager
def _naming_options(config: Config) -> Iterator[None]:
    """Turns what Python says of an option of the wrong type into a sentence."""
    try:
        yield
    except TypeError as error:
        if not config.optimization.option:
            raise
        raise ValueError(
            f"optimizer {config.optimization.optimizer!r} cannot work with "
            f"option {', '.join(config.optimization.option)} ({error})."
        ) from error


def _rows_at_once(config: Config) -> int:
    """The rows of a micro-batch."""
    rows, pieces = config.text.batch_size, config.optimization.accumulation
    check_at_least("batch_size", rows, 1)
    check_at_least("accumulation", pieces, 1)
    if rows % pieces:
        raise ValueError(f"accumulation={pieces} does not divide batch_size={rows}: change one.")
    return rows // pieces


def _learning_rate(options: Optimization) -> optax.Schedule:
    for name in ("warmup", "decay", "final_learning_rate"):
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {getattr(options, name)}.")
    check_at_least("steps", options.steps, 1)
    check_at_least("max_skipped", options.max_skipped, 1)
    check_at_least("learning_rate", options.learning_rate, 0)
    return schedules.schedule(
        options.schedule,
        options.learning_rate,
        options.steps,
        warmup_steps=round(options.warmup * options.steps),
        decay_steps=round(options.decay * options.steps) if options.schedule == "wsd" else None,
        end_value=options.final_learning_rate * options.learning_rate,
    )
