"""Trains a small LLaMA by AdamW with several schedules, and keeps its validation losses.

    nice python -m benchmarks.schedules

All runs have the same initial weights, the same order of the data (the source of Python's standard
library) and the same highest learning rate, and are evaluated on the same held-out text every few
steps. Rows are shuffled over all the training text, not within windows as in `memopt pretrain`:
several windows of this text are tables of characters, and the validation loss rises while the model
trains on them. `memopt.schedules.laws.fit_annealing` is fitted to some of the curves and predicts
others: see notebooks/schedules.ipynb. results/schedules_high.json has curves with --peak 2^-8, with
which the law was tried first. Every run is saved as soon as it is finished, and not
repeated when the command is given again.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array
from rich.console import Console

import memopt
from benchmarks import width
from benchmarks.report import Report, read_results
from memopt.errors import check_choice
from memopt.schedules import schedule
from memopt.schedules.laws import Curve
from memopt.training.placement import make_mesh
from memopt.training.setup import Setup, abstract_batch, set_up


class Shape(NamedTuple):
    """A schedule to train with.

    Attributes:
        name: its name in `memopt.schedules.names()`.
        steps: how many of `Options.steps` it lasts.
        end: the last learning rate, as a part of the highest.
        decay: the length of the decay of "wsd", as a part of `steps`.
    """

    name: str
    steps: float = 1.0
    end: float = 0.0
    decay: float | None = None


SHAPES = {
    "constant": Shape("constant"),
    "cosine": Shape("cosine", end=0.1),
    "wsd, decay 10%": Shape("wsd", decay=0.1),
    "linear": Shape("linear"),
    "linear, half as long": Shape("linear", steps=0.5),
    "cosine, half as long": Shape("cosine", steps=0.5, end=0.1),
    "wsd, decay 30%": Shape("wsd", decay=0.3),
}
"""The schedules."""

FITTED = ("constant", "cosine")
"""The schedules whose curves the annealing law is fitted to; it predicts the others."""

DECAYS = (0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)
"""Candidates for the annealing law's λ, of which the fitted curves choose one."""


@dataclasses.dataclass(frozen=True)
class Options(width.Task):
    """The options of this benchmark.

    Attributes:
        shapes: the schedules to train with.
        hidden_size: the width of the model.
        steps: training steps of the longest schedule.
        warmup: steps in which the learning rate rises.
        peak: the highest learning rate.
        every: steps between evaluations.
        batch_size: rows per batch.
        eval_tokens: held-out tokens for the validation loss.
        seed: the seed of initial weights and order of the data.
        output: the JSON file.
    """

    shapes: tuple[str, ...] = tuple(SHAPES)
    hidden_size: int = 64
    steps: int = 3000
    warmup: int = 100
    peak: float = 2.0**-10
    every: int = 100
    batch_size: int = 16
    eval_tokens: int = 2**16
    seed: int = 0
    output: Path = Path(__file__).parent / "results" / "schedules.json"


def rates(settings: Mapping[str, Any], name: str) -> np.ndarray:
    """The learning rate of each step of a schedule, float64 (steps,).

    Args:
        settings: `steps`, `warmup` and `peak` of `Options`, such as those in the JSON file.
        name: one of `SHAPES`.
    """
    steps = round(SHAPES[name].steps * settings["steps"])
    return np.asarray(_schedule(settings, name)(jnp.arange(steps)), np.float64)


def curves(report: Mapping[str, Any]) -> dict[str, Curve]:
    """The curve of each schedule in the JSON file."""
    return {
        r["schedule"]: Curve(
            rates(report, r["schedule"]),
            report["every"] * np.arange(1, len(r["losses"]) + 1),
            np.array(r["losses"]),
        )
        for r in report["results"]
    }


def _schedule(settings: Mapping[str, Any], name: str) -> optax.Schedule:
    shape = SHAPES[name]
    steps = round(shape.steps * settings["steps"])
    return schedule(
        shape.name,
        settings["peak"],
        steps,
        warmup_steps=settings["warmup"],
        end_value=shape.end * settings["peak"],
        **({} if shape.decay is None else {"decay_steps": round(shape.decay * steps)}),
    )


def train(options: Options, name: str) -> list[float]:
    """The validation losses after every `options.every` steps."""
    learning_rate = _schedule(dataclasses.asdict(options), name)
    mesh = make_mesh("data=1", rows=options.batch_size)
    setup = set_up(
        width.model_config(options, options.hidden_size),
        mesh,
        memopt.optimizer("adamw", learning_rate, b2=0.95),
        abstract_batch(mesh, options.batch_size, options.seq_len),
        optimizer="adamw",
        learning_rate=learning_rate,
    )
    with jax.set_mesh(mesh):
        training, validation = (
            {name: x for name, x in batches.items() if name in setup.batch}
            for batches in width.data(options, options.seed)
        )
        training = _shuffled(training, options.seed)
        points = round(SHAPES[name].steps * options.steps) // options.every
        cut = lambda x: x[: points * options.every].reshape(points, options.every, *x.shape[1:])
        state = setup.jit_init(options.seed)()
        return _curve(setup, state, jax.tree.map(cut, training), validation).tolist()


def _shuffled(batches: dict[str, Array], seed: int) -> dict[str, Array]:
    """Batches (batches, rows, …) of the same rows, each drawn from all of them."""
    batch, rows, *_ = batches["inputs"].shape
    order = np.random.default_rng(seed).permutation(batch * rows)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[order].reshape(x.shape), batches)


def _curve(setup: Setup, state: Any, training: Any, validation: Any) -> Array:
    @jax.jit
    def run(state: Any, training: Any, validation: Any) -> Array:
        def point(state: Any, batches: Any) -> tuple[Any, Array]:
            state, _ = jax.lax.scan(setup.step, state, batches)
            params = setup.eval_params(state)
            losses, tokens = jax.lax.map(lambda batch: setup.loss(params, batch), validation)
            return state, losses.sum() / tokens.sum()

        return jax.lax.scan(point, state, training)[1]

    return run(state, training, validation)


def main(arguments: Sequence[str]) -> None:
    """Trains what is missing and writes the file."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    settings = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in ("shapes", "output")
    }
    try:
        for name in options.shapes:
            check_choice("schedule", name, SHAPES)
        results = read_results(options.output, settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    report = Report("schedules", arguments, options.output, results, **settings)
    done = {r["schedule"] for r in results}
    for name in options.shapes:
        if name not in done:
            losses = [round(loss, 5) for loss in train(options, name)]
            results.append({"schedule": name, "losses": losses})
            Console().print(f"{name:24} {losses[-1]:.4f}")
            report.save()


if __name__ == "__main__":
    main(sys.argv[1:])
