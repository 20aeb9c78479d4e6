"""Everything a run needs, made and checked before it begins."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from memopt import optimizers, schedules
from memopt.errors import check_at_least
from memopt.models import llama
from memopt.state.quantize import quantize_state
from memopt.state.quantized import dequantize_params, quantize_params
from memopt.text.batches import (
    Batch,
    Batches,
    fingerprint,
    train_batches,
    validation_batches,
)
from memopt.text.documents import find_documents
from memopt.text.tokenizer import Tokenizer, load_tokenizer
from memopt.training.checkpoint import Checkpoints, Record
from memopt.training.config import Config, Optimization
from memopt.training.directory import check_same, choose_directory, open_directory
from memopt.training.placement import (
    abstract_state,
    batch_sharding,
    make_mesh,
    place_update,
    rows_here,
)
from memopt.training.processes import check_alike
from memopt.training.step import TrainState, init_state


@dataclasses.dataclass
class Training:
    """A run that is ready to be trained.

    Attributes:
        config: Its options.
        directory: Where it writes.
        tokenizer: Turns text into ids and back.
        model_config: The model's shapes and options.
        tx: The optimizer.
        learning_rate: Its schedule.
        mesh: The devices.
        batches: The training data, from where the state stands.
        validation: The held-out batches.
        identity: What identifies the data.
        checkpoints: Where the state is saved.
        state: The state to begin with.
    """

    config: Config
    directory: Path
    tokenizer: Tokenizer
    model_config: llama.LlamaConfig
    tx: optax.GradientTransformation
    learning_rate: optax.Schedule
    mesh: Mesh
    batches: Batches
    validation: list[Batch]
    identity: Record
    checkpoints: Checkpoints
    state: TrainState

    def model(self, params: Any) -> llama.Llama:
        """The model with these parameters; of quantised ones it reads a block at a time."""
        graphdef, _ = nnx.split(llama.abstract_model(self.model_config), nnx.Param)
        rest = {name: part for name, part in params.items() if name != "blocks"}
        return nnx.merge(graphdef, params | dequantize_params(rest))

    def loss(self, params: Any, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        """The summed loss of a batch and its number of tokens."""
        return llama.loss(self.model(params), batch)

    def place(self, batch: Batch) -> dict[str, jax.Array]:
        """Puts this process's rows of a batch on its devices."""
        shape = (self.config.text.batch_size, self.config.text.seq_len)
        return jax.make_array_from_process_local_data(batch_sharding(self.mesh), batch, shape)

    def save(self, state: TrainState, val_loss: float | None = None) -> None:
        """Starts to save a checkpoint of everything that changes, and of what it belongs to."""
        record = {
            "config": self.config.flat(),
            "identity": self.identity,
            "batches": self.batches.get_state(),
        }
        self.checkpoints.save(state, record, val_loss)


def prepare(config: Config) -> Training:
    """Makes all a run needs, and checks it; writes nothing before all is well.

    Args:
        config: The options of the run. With `run.resume`, those it was started with, but for
            `memopt.training.directory.MAY_CHANGE`.

    Returns:
        The run, at its first step or, resumed, at that of its newest whole checkpoint.

    Raises:
        ValueError: An option, or a combination of them, cannot work; says what to change.
    """
    directory = choose_directory(config)
    if config.run.resume:
        check_same(directory, json.loads((directory / "config.json").read_text()), config.flat())
    for name in ("eval_every", "checkpoint_every", "keep"):
        check_at_least(name, getattr(config.run, name), 1)
    check_at_least("eval_tokens", config.text.eval_tokens, config.text.seq_len)

    tokenizer = load_tokenizer(config.text.tokenizer)
    model_config = _model_config(config, tokenizer)
    mesh = make_mesh(config.run.mesh, _rows_at_once(config))
    learning_rate = _learning_rate(config.optimization)

    def init() -> TrainState:
        seed, store = config.optimization.seed, functools.partial(_stored, config)
        return init_state(llama.init_params(model_config, seed=seed, store=store), tx)

    with _naming_options(config):
        tx = optimizers.optimizer(
            config.optimization.optimizer, learning_rate=learning_rate, **config.optimizer_options
        )
        if config.optimization.state:
            tx = quantize_state(tx, config.optimization.state)
        params = _stored(config, llama.abstract_params(model_config, mesh))
        name, by_layer = config.optimization.optimizer, config.optimization.release
        tx, places = place_update(tx, name, params, by_layer=by_layer)
        like = abstract_state(params, tx, mesh, places)
    training, held_out = find_documents(config.text.data).split()
    shape = {"batch_size": config.text.batch_size, "seq_len": config.text.seq_len}
    rows = rows_here(mesh, config.text.batch_size)
    batches = train_batches(training, tokenizer, **shape, seed=config.optimization.seed, rows=rows)
    validation = validation_batches(
        held_out, tokenizer, max_tokens=config.text.eval_tokens, **shape, rows=rows
    )
    identity = fingerprint(training, tokenizer, **shape, seed=config.optimization.seed)
    identity = {f"data {name}": value for name, value in identity.items()}

    check_alike({"output": str(directory), **config.flat(), "content of the data": identity})

    checkpoints = Checkpoints(directory / "checkpoints", config.run.keep)
    restored = checkpoints.restore(like) if config.run.resume else None
    if restored:
        state, record = restored
        check_same(directory, record["identity"], identity)
        batches.set_state(record["batches"])
    open_directory(directory, config)
    if not restored:
        with jax.set_mesh(mesh):
            state = jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, like))()
    return Training(
        config=config,
        directory=directory,
        tokenizer=tokenizer,
        model_config=model_config,
        tx=tx,
        learning_rate=learning_rate,
        mesh=mesh,
        batches=batches,
        validation=validation,
        identity=identity,
        checkpoints=checkpoints,
        state=state,
    )


def _stored(config: Config, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters as the run stores them."""
    weights = config.architecture.weights
    return quantize_params(params, weights) if weights else params


def _model_config(config: Config, tokenizer: Tokenizer) -> llama.LlamaConfig:
    options = config.architecture
    model = llama.preset(options.model)
    model = dataclasses.replace(
        model,
        vocab_size=options.vocab_size or model.vocab_size,
        param_dtype=options.param_dtype,
        dtype=options.compute_dtype,
        remat=options.remat,
    )
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids, but model "
            f"{options.model!r} only {model.vocab_size}: add --vocab-size {tokenizer.vocab_size}."
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
