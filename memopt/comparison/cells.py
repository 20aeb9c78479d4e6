"""Cells of a comparison: all that decides the result of a run, and the run itself."""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memopt import schedules
from memopt.comparison.protocol import PIECES
from memopt.functions import digest_of_source
from memopt.machine import core_count
from memopt.models import llama
from memopt.models.config import LlamaConfig
from memopt.optimizers.registry import optimizer
from memopt.state.bytes import bytes_of
from memopt.text.packing import FIELDS
from memopt.text.tokenizer import load_tokenizer
from memopt.training.batches import find_text, open_batches
from memopt.training.config import Config, Optimization, Text
from memopt.training.placement import make_mesh
from memopt.training.setup import Setup, abstract_batch, set_up
from memopt.training.step import Predict, TrainState

#: A run has diverged when so many steps in a row were not finite, as one of `memopt pretrain`.
MAX_SKIPPED = Optimization().max_skipped

#: Rows that are evaluated at a time, and tokens of held-out text that they are chosen from.
EVAL_ROWS, HELD_OUT_TOKENS = 8, 2**22

#: Short runs take up to every 20th batch, from all over so many tokens: rows are mixed within
#: windows of 2^18 tokens, a few files, so that seeds would differ by what they read.
TRAINING_TOKENS, MOST_APART = 2**22, 20

#: Part of all keys; another one when the same cell would come out otherwise than before.
VERSION = 1

Options = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """The part of a cell that a step is compiled for.

    Attributes:
        optimizer: As `memopt.comparison.rows.Row.optimizer`.
        options: All options that it is given, in the order of their names.
        state: As `memopt.comparison.rows.Row.state`.
        weights: As `memopt.comparison.rows.Row.weights`.
        release: As `memopt.comparison.rows.Row.release`.
        model: The model's shapes and options.
        batch_size: Rows of a batch.
        seq_len: Tokens of a row.
    """

    optimizer: str
    options: Options
    state: str | None
    weights: str | None
    release: bool
    model: LlamaConfig
    batch_size: int
    seq_len: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """All that decides the result of a run.

    Attributes:
        program: What the step is compiled for.
        seed: Decides the first weights and the order of the data.
        learning_rate: The highest learning rate.
        steps: Steps of the run.
        schedule: The schedule's name.
        warmup: Share of the steps in which the learning rate rises from 0.
        final_learning_rate: Learning rate at the end, as a share of the highest.
        data: The text, as `memopt.training.config.Text.data`.
        text: A digest of its content, as `text_identity` returns.
        eval_tokens: Held-out tokens that are evaluated on.
    """

    program: Program
    seed: int
    learning_rate: float
    steps: int
    schedule: str
    warmup: float
    final_learning_rate: float
    data: tuple[str, ...]
    text: str
    eval_tokens: int

    @functools.cached_property
    def key(self) -> str:
        """A digest of all fields: of two runs with the same key, one is enough."""
        fields = dataclasses.asdict(self)
        del fields["data"]  # the same text under another name is the same
        if self.source:
            fields["source"] = self.source
        text = json.dumps(fields | {"version": VERSION}, sort_keys=True, default=repr)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def source(self) -> str | None:
        """A digest of the file with a user's optimizer; None for those of the registry."""
        name = self.program.optimizer
        return digest_of_source(name) if ":" in name else None

    @property
    def rates(self) -> np.ndarray:
        """The learning rate of each step."""
        rate = schedules.schedule(
            self.schedule,
            self.learning_rate,
            self.steps,
            warmup_steps=round(self.warmup * self.steps),
            end_value=self.final_learning_rate * self.learning_rate,
        )
        return np.asarray(jax.vmap(rate)(jnp.arange(self.steps)), np.float32)


class Outcome(NamedTuple):
    """Measurements of a run.

    Attributes:
        val_loss: The loss on the held-out tokens at the end, infinite if the run diverged.
        val_losses: Steps and losses on the way, the last one at the end.
        diverged: Whether the losses ceased to be finite.
        state_bytes: Bytes of the optimizer's state.
        parameter_bytes: Bytes of the parameters.
        parameters: How many parameters there are.
        step_seconds: Median time of a step; None if other programs used the processor.
        step_cpu_seconds: Median time of a step that processor cores worked on it, all together,
            which other programs hardly change; None on other devices.
        seconds: Time of the run, with its compilation.
    """

    val_loss: float
    val_losses: list[list[float]]
    diverged: bool
    state_bytes: int
    parameter_bytes: int
    parameters: int
    step_seconds: float | None
    step_cpu_seconds: float | None
    seconds: float


@functools.cache
def text_identity(data: tuple[str, ...]) -> str:
    """Returns a digest of the content of a text, read as bytes.

    Args:
        data: As `memopt.training.config.Text.data`.

    Raises:
        ValueError: There is no such text.
    """
    found = find_text(Config(text=Text(data=data))).describe()
    text = json.dumps([found, load_tokenizer("bytes").digest], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def train(cell: Cell, *, evaluate_pieces: bool, alone: bool = True) -> Outcome:
    """Trains a model from nothing, by the step of `memopt pretrain`.

    Args:
        cell: The run.
        evaluate_pieces: Whether to evaluate on the way, too.
        alone: Whether the processor does nothing else, as far as the caller knows.

    Raises:
        ValueError: The optimizer cannot work in this way.
    """
    began = time.perf_counter()
    program = _compiled(cell.program)
    setup, steps = program.setup, cell.steps // PIECES
    training, validation = _batches(
        cell.data,
        cell.program.batch_size,
        cell.program.seq_len,
        cell.eval_tokens,
        cell.steps,
        cell.seed,
    )
    rates, diverged = cell.rates, False
    losses: list[list[float]] = []
    times: list[tuple[float, float]] = []
    with jax.set_mesh(setup.mesh):
        state = program.init(jax.random.key(cell.seed))
        for piece in range(PIECES):
            part = slice(piece * steps, (piece + 1) * steps)
            batches = {name: jnp.asarray(x[part]) for name, x in training.items()}
            start, cpu_start = time.perf_counter(), time.process_time()
            state, skipped = program.advance(state, batches, jnp.asarray(rates[part]))
            diverged = int(skipped) >= MAX_SKIPPED
            now, cpu_now = time.perf_counter(), time.process_time()
            times.append(((now - start) / steps, (cpu_now - cpu_start) / steps))
            if not diverged and (evaluate_pieces or piece + 1 == PIECES):
                loss = float(program.evaluate(setup.eval_params(state), validation))
                losses.append([part.stop, loss])
                diverged = not math.isfinite(loss)
            if diverged:
                break
    step, cpu = map(statistics.median, zip(*(times[1:] or times), strict=True))
    return Outcome(
        val_loss=math.inf if diverged else losses[-1][1],
        val_losses=[pair for pair in losses if math.isfinite(pair[1])],
        diverged=diverged,
        state_bytes=bytes_of(setup.state.opt_state),
        parameter_bytes=bytes_of(setup.state.params),
        parameters=program.parameters,
        step_seconds=step if alone and times[1:] and _quiet() else None,
        step_cpu_seconds=cpu if times[1:] and jax.default_backend() == "cpu" else None,
        seconds=time.perf_counter() - began,
    )


class _Compiled(NamedTuple):
    """A training step of which many are taken at a time, with their learning rates as arguments.

    Attributes:
        setup: The step.
        init: Maps a key to the first state.
        advance: Maps state, batches and learning rates to the state and the largest number of steps
            in a row that were not finite.
        evaluate: Maps parameters and batches to the mean loss a token.
        parameters: How many parameters there are.
    """

    setup: Setup
    init: Callable[[jax.Array], TrainState]
    advance: Callable[[TrainState, Any, jax.Array], tuple[TrainState, jax.Array]]
    evaluate: Callable[[Any, Any], jax.Array]
    parameters: int


def set_up_program(program: Program, devices: Sequence[jax.Device] | None = None) -> Setup:
    """Puts the step of a run together, with its learning rate as an argument.

    Args:
        program: What the step is compiled for.
        devices: The devices, of which it takes the first, such as those of a compiler. None: this
            machine's.
    """

    def remake(rate: optax.Schedule) -> tuple[optax.GradientTransformation, Predict | None]:
        options = dict(program.options)
        return optimizer(program.optimizer, rate, state=program.state, **options), None

    mesh = make_mesh("data=1", program.batch_size, devices)
    zero = optax.constant_schedule(0.0)
    return set_up(
        program.model,
        mesh,
        remake(zero)[0],
        abstract_batch(mesh, program.batch_size, program.seq_len, FIELDS),
        optimizer=program.optimizer,
        learning_rate=zero,
        weights=program.weights,
        release=program.release,
        remake=remake,
    )


@functools.lru_cache(maxsize=1)
def _compiled(program: Program) -> _Compiled:
    setup = set_up_program(program)
    shardings = jax.tree.map(lambda x: x.sharding, setup.state)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def advance(state: TrainState, batches: Any, rates: jax.Array) -> tuple[TrainState, jax.Array]:
        def step(state: TrainState, inputs: Any) -> tuple[TrainState, jax.Array]:
            batch, rate = inputs
            state, metrics = setup.step(state, (batch,), rate)
            return state, metrics["skipped_in_row"]

        state, skipped = jax.lax.scan(step, state, (batches, rates))
        return state, skipped.max()

    @jax.jit
    def evaluate(params: Any, batches: Any) -> jax.Array:
        total, tokens = jax.lax.map(lambda batch: setup.loss(params, batch), batches)
        return total.sum() / tokens.sum()

    init = jax.jit(lambda key: setup.jit_init(key)(), out_shardings=shardings)
    return _Compiled(setup, init, advance, evaluate, count_parameters(program.model))


@functools.lru_cache(maxsize=4)
def _batches(
    data: tuple[str, ...], batch_size: int, seq_len: int, eval_tokens: int, steps: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, jax.Array]]:
    """All training and validation batches, each a dict of arrays (batches, rows, tokens)."""
    config = Config(
        text=Text(data=data, batch_size=batch_size, seq_len=seq_len, eval_tokens=HELD_OUT_TOKENS),
        optimization=Optimization(steps=steps, seed=seed),
    )
    opened = open_batches(config, find_text(config), load_tokenizer("bytes"), range(batch_size))
    apart = min(MOST_APART, max(1, TRAINING_TOKENS // (steps * batch_size * seq_len)))
    training = list(itertools.islice(opened.batches, 0, steps * apart, apart))
    opened.batches.close()
    [held_out] = opened.validation.values()
    join = lambda parts, function: {n: function([part[n] for part in parts]) for n in FIELDS}
    rows = spread_rows(join(held_out, np.concatenate), eval_tokens // seq_len)
    return join(training, np.stack), jax.tree.map(jnp.asarray, rows)


def spread_rows(rows: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Returns rows from all over a text, in batches of 8: its beginning may be a single file.

    Args:
        rows: Arrays (rows, tokens); rows of weight 0 are left out.
        count: How many rows to return, if there are as many, in whole batches.

    Example:
        >>> rows = {"inputs": np.arange(100)[:, None], "weights": np.ones((100, 1), np.int32)}
        >>> spread_rows(rows, 16)["inputs"][..., 0]
        array([[ 0,  6, 12, 18, 25, 31, 37, 43],
               [50, 56, 62, 68, 75, 81, 87, 93]])
    """
    [found] = np.nonzero(rows["weights"].any(axis=1))
    size = min(EVAL_ROWS, count, len(found))
    count = min(count, len(found)) // size * size
    chosen = found[np.arange(count) * len(found) // count]
    return {name: x[chosen].reshape(-1, size, *x.shape[1:]) for name, x in rows.items()}


@functools.cache
def count_parameters(model: LlamaConfig) -> int:
    """Counts all parameters of a model."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(llama.abstract_params(model)))


def _quiet() -> bool:
    """Whether other programs hardly used the processor in the last minute."""
    return os.getloadavg()[0] <= (core_count() or 1) + 0.5
