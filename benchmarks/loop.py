"""Measures how long a device waits for the training loop between two steps.

    python -m benchmarks.loop [--step-ms 10] [--steps 200] [--repeats 5]

The step of a run is replaced by a computation of about `--step-ms` milliseconds on one core, which
needs the result of the step before. All else is as in `memopt pretrain`: Python's source as text,
batches, metrics.jsonl, TensorBoard events, display. Two loops are compared:

- synchronous, the loop as it was: each step waits for its result before its metrics are written,
  and its batch is placed when it is asked for.
- now, the loop as it is.

When a step has been dispatched, the device has waited for it if the step before is done by then:
since its result was there or, where nobody waited for that, at most since it was dispatched. The
mean over a run counts, and the least of several runs, because other programs disturb it. Prints a
line for each loop and writes all as JSON.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

from benchmarks.report import Report, milliseconds
from memopt.errors import check_at_least
from memopt.training.batches import find_text, open_batches
from memopt.training.config import Architecture, Config, Optimization, Run, Text
from memopt.training.loop import train
from memopt.training.open import open_run
from memopt.training.placement import rows_here
from memopt.training.setup import Setup, Step
from memopt.training.step import Batch, Metrics, TrainState

#: Steps at the start of a run that are left out.
WARM_UP = 20


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark.

    Attributes:
        step_ms: the time of a step, about.
        steps: the steps of a run.
        repeats: the runs of each loop.
        output: the JSON file.
    """

    step_ms: float = 10.0
    steps: int = 200
    repeats: int = 5
    output: Path = Path(__file__).parent / "results" / "loop.json"


class Waiting(NamedTuple):
    """How long a device waited for the host, on average over the steps of a run.

    Attributes:
        step_milliseconds: the time from a step to the next.
        waiting_milliseconds: the part of it in which no step was queued, at most.
        share: their quotient.
    """

    step_milliseconds: float
    waiting_milliseconds: float
    share: float


def busy_step(iterations: int) -> Step:
    """A step that computes for a time, counts itself, and leaves all else as it was."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # Of matrices: JAX runs on the CPU what it takes for cheap in the thread that asks for it.
        first = jnp.eye(128) * (1 + state.step + batch["inputs"][0, 0])
        multiply = lambda _, x: jnp.tanh(x @ x)
        loss = jax.lax.fori_loop(0, iterations, multiply, first)[0, 0]
        metrics = dict.fromkeys(("loss", "gradient_norm", "learning_rate"), loss)
        metrics |= {"tokens": jnp.float32(batch["inputs"].size), "skipped_in_row": state.skipped}
        one = 1 + (0 * loss).astype(jnp.int32)
        return state._replace(step=state.step + one), metrics

    return step


def calibrate(options: Options) -> int:
    """The iterations of a step of about the time that is asked for."""
    iterations, state = 100, TrainState((), (), *jnp.zeros((3,), jnp.int32))
    batch = {"inputs": jnp.zeros((1, 1), jnp.int32)}
    for _ in range(3):
        step = jax.jit(busy_step(iterations))
        run = lambda step=step: jax.block_until_ready(step(state, batch))
        run()
        found = min(milliseconds(run) for _ in range(WARM_UP))
        iterations = max(1, int(iterations * options.step_ms / found))
    return iterations


def measure(synchronous: bool, iterations: int, options: Options) -> Waiting:
    """Trains, and returns how long the device waited for each step."""
    with tempfile.TemporaryDirectory() as directory:
        run = open_run(configuration(options, Path(directory) / "run"))
        run.setup = setup = dataclasses.replace(run.setup, step=busy_step(iterations))
        if synchronous:
            rows = rows_here(setup.mesh, run.config.text.batch_size)
            opened = open_batches(run.config, find_text(run.config), run.tokenizer, rows)
            run.batches = opened.batches
        watched = Watched(setup, synchronous)
        vars(setup)["jitted"] = watched
        train(run, Console(quiet=True))
    return watched.waiting()


class Watched:
    """A jitted step that notes when it is dispatched, and whether a device waited for it."""

    def __init__(self, setup: Setup, synchronous: bool):
        self._jitted, self.lower = setup.jitted, setup.jitted.lower
        self._place = setup.place if synchronous else None
        self._busy = 0.0  # the latest moment at which a step was known to be in the queue
        self._last: Any = None
        self._moments: list[float] = []
        self._waited: list[float] = []

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Takes a step."""
        state, metrics = self._jitted(state, self._place(batch) if self._place else batch)
        now, before = time.perf_counter(), self._last
        self._moments.append(now)
        waited = now - self._busy if before is not None and before.is_ready() else 0.0
        self._waited.append(waited)
        self._last = metrics["loss"]
        if self._place:
            jax.block_until_ready(metrics)
        self._busy = time.perf_counter()
        return state, metrics

    def waiting(self) -> Waiting:
        """How long the device waited for the steps after the warm-up."""
        waited, moments = self._waited[WARM_UP:], self._moments[WARM_UP - 1 :]
        mean, step = sum(waited) / len(waited), (moments[-1] - moments[0]) / len(waited)
        return Waiting(1e3 * step, 1e3 * mean, mean / step)


def configuration(options: Options, directory: Path) -> Config:
    """A run of the smallest model, whose only evaluation and checkpoint are at its end."""
    never = options.steps + 1
    return Config(
        architecture=Architecture(num_layers=1),
        text=Text(eval_tokens=128),
        optimization=Optimization(steps=options.steps),
        run=Run(output=directory, mesh="data=1", eval_every=never, checkpoint_every=never),
    )


def main(arguments: Sequence[str]) -> None:
    """Measures, prints and writes the file."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    try:
        check_at_least("steps", options.steps, WARM_UP + 1)
        check_at_least("repeats", options.repeats, 1)
    except ValueError as error:
        sys.exit(f"error: {error}")
    iterations = calibrate(options)
    found: dict[str, list[Waiting]] = {"synchronous": [], "now": []}
    for name in tuple(found) * options.repeats:
        found[name].append(measure(name == "synchronous", iterations, options))
    results = {}
    for name, runs in found.items():
        least = min(runs, key=lambda run: run.share)
        results[name] = {key: round(value, 4) for key, value in least._asdict().items()}
        Console().print(name, results[name])
    statistic = (
        f"mean over a run; the run of {options.repeats} with the least share; other programs ran "
        "on the same cores"
    )
    Report("loop", arguments, options.output, results, statistic=statistic).save()


if __name__ == "__main__":
    main(sys.argv[1:])
