"""Trains a small LLaMA by most optimizers, each with its own grid of learning rates.

    nice python -m benchmarks.convergence [--rows sgd soap ...] [--seeds 0]

Each row is an optimizer with some options, trained on the source of Python's standard library with
its own grid of learning rates, a factor of two apart; the lowest validation loss counts. The grid
grows by itself until its best learning rate is not at an end. Every run is saved as soon as it is
finished, and not repeated when the command is given again. Prints a table, and writes it as JSON
and into docs/convergence.md.
"""

import dataclasses
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
import tyro
from jax import Array
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import memopt
from benchmarks import width
from benchmarks.report import Report, markdown_table, read_results
from benchmarks.results import write_pages
from memopt.errors import check_choice
from memopt.training.placement import make_mesh
from memopt.training.setup import abstract_batch, set_up

ROOT = Path(__file__).parents[1]


class Row(NamedTuple):
    """An optimizer to train with.

    Attributes:
        optimizer: its name in `memopt.available()`.
        rate: the power of two in the middle of its grid of learning rates.
        options: its options.
        stored: how its state is stored, see `memopt.quantize_state`; None: in float32.
    """

    optimizer: str
    rate: int
    options: Mapping[str, Any] = {}
    stored: Mapping[str, str] | None = None


BASES = "left_basis|right_basis"
ROWS = {
    "sgd": Row("sgd", -1),
    "sgd, momentum 0.9": Row("sgd", -3, {"momentum": 0.9}),
    "adamw": Row("adamw", -8, {"b2": 0.95}),
    "fira": Row("fira", -6),
    "ldadam": Row("ldadam", -7),
    "mkor": Row("mkor", -2),
    "mkor, hybrid": Row("mkor", -2, {"hybrid": True}),
    "mkor, inner=adam": Row("mkor", -8, {"inner": optax.scale_by_adam(0.9, 0.95)}),
    "muon": Row("muon", -6),
    "oasis": Row("oasis", 0, {"first_probes": 20}),
    "oasis, adaptive=False": Row("oasis", -5, {"adaptive": False, "first_probes": 20}),
    "soap": Row("soap", -7),
    "soap, moments in int8": Row("soap", -7, {}, {"/(mu|nu)/": "int8"}),
    "soap, moments and bases in int8": Row("soap", -7, {}, {f"/(mu|nu|{BASES})/": "int8"}),
    "soap, factors too": Row("soap", -7, {}, {f"/(mu|nu|left|right|{BASES})/": "int8"}),
    "adafactor": Row("adafactor", -5),
    "adagrad": Row("adagrad", -4),
    "adagrad_norm": Row("adagrad_norm", -1),
    "adagrad_norm, as_released": Row("adagrad_norm", -2, {"as_released": True}),
    "adalomo": Row("adalomo", -5),
    "apollo": Row("apollo", -6),
    "apollo_mini": Row("apollo_mini", -7),
    "flora": Row("flora", -5),
    "frugal": Row("frugal", -7),
    "galore": Row("galore", -6),
    "lamb": Row("lamb", -6),
    "lars": Row("lars", -2),
    "lion": Row("lion", -11),
    "online_subspace_descent": Row("online_subspace_descent", -6),
    "optax_adafactor": Row("optax_adafactor", -5),
    "optax_lars": Row("optax_lars", 3),
    "schedule_free": Row("schedule_free", -7),
    "sm3": Row("sm3", -3),
}
"""The rows of the table; the first two are tuned SGD."""


@dataclasses.dataclass(frozen=True)
class Options(width.Task):
    """The options of this benchmark.

    Attributes:
        rows: the rows to train; by default all of them.
        seeds: the seeds of initial weights and order of the data.
        hidden_size: the width of the model.
        output: the JSON file.
    """

    rows: tuple[str, ...] = tuple(ROWS)
    seeds: tuple[int, ...] = (0,)
    hidden_size: int = 64
    output: Path = ROOT / "benchmarks" / "results" / "convergence.json"


def train(options: Options, row: Row, rate: int, seed: int) -> float:
    """The validation loss of one run; infinite if it is not a number."""
    highest = 2.0**rate
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, highest, options.steps // 10, options.steps, highest / 10
    )
    tx = memopt.optimizer(row.optimizer, schedule, **row.options)
    if row.stored:
        tx = memopt.quantize_state(tx, dict(row.stored))
    mesh = make_mesh("data=1", rows=options.batch_size)
    setup = set_up(
        width.model_config(options, options.hidden_size),
        mesh,
        tx,
        abstract_batch(mesh, options.batch_size, options.seq_len),
        optimizer=row.optimizer,
        learning_rate=schedule,
    )

    @jax.jit
    def run(state: Any, training: Any, validation: Any) -> Array:
        state, _ = jax.lax.scan(setup.step, state, training)
        params = setup.eval_params(state)
        losses = jax.lax.map(lambda batch: setup.loss(params, batch), validation)
        return losses[0].sum() / losses[1].sum()

    with jax.set_mesh(mesh):
        names = setup.batch
        training, validation = (
            {name: x for name, x in batches.items() if name in names}
            for batches in width.data(options, seed)
        )
        loss = float(run(setup.jit_init(seed)(), training, validation))
    return loss if math.isfinite(loss) else math.inf


def losses(
    results: Sequence[dict[str, Any]], name: str, seeds: Sequence[int] = (0,)
) -> dict[int, float]:
    """The mean loss of a row over seeds, by the learning rates at which all of them were tried."""
    found: dict[int, dict[int, float]] = {}
    for r in results:
        if r["row"] == name and r["seed"] in seeds:
            found.setdefault(r["rate"], {})[r["seed"]] = r["loss"]
    whole = {rate: of for rate, of in sorted(found.items()) if len(of) == len(seeds)}
    return {rate: statistics.mean(of.values()) for rate, of in whole.items()}


def next_rate(done: Mapping[int, float], middle: int) -> int | None:
    """The learning rate to try next; None if the best of those tried has worse neighbours.

    Example:
        >>> next_rate({}, 3), next_rate({2: 1, 3: 0.9, 4: 0.8}, 3), next_rate({2: 1, 3: 0, 4: 1}, 3)
        (3, 5, None)
    """
    best = min(done, key=lambda rate: (done[rate], rate), default=middle)
    return next((rate for rate in (best, best - 1, best + 1) if rate not in done), None)


def markdown(report: dict[str, Any]) -> str:
    """The table for the docs."""
    rows = []
    for name in ROWS:
        at = losses(report["results"], name)
        if not at:
            continue
        best = min(at, key=lambda rate: at[rate])
        near = [f"{at[rate]:.3f}" if rate in at else "–" for rate in (best - 1, best + 1)]
        rows.append((name, f"2^{best}", f"{at[best]:.3f}", *near))
    columns = ("optimizer", "best learning rate", "validation loss", "half", "twice")
    return markdown_table(columns, rows)


def main(arguments: Sequence[str]) -> None:
    """Trains what is missing, prints the table and writes the files."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    settings = {"hidden_size": options.hidden_size, **options.settings}
    try:
        for name in options.rows:
            check_choice("row", name, ROWS)
        results = read_results(options.output, settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    report = Report("convergence", arguments, options.output, results, **settings)
    table = Table(title="Validation loss", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("optimizer", "learning rate", "loss"):
        table.add_column(column, justify="right")
    console = Console()
    for name in options.rows:
        while (
            rate := next_rate(losses(results, name, options.seeds), ROWS[name].rate)
        ) is not None:
            done = [r["seed"] for r in results if (r["row"], r["rate"]) == (name, rate)]
            for seed in options.seeds:
                if seed not in done:
                    loss = train(options, ROWS[name], rate, seed)
                    results.append({"row": name, "rate": rate, "seed": seed, "loss": loss})
                    console.print(f"{name:32} 2^{rate:<4} seed {seed}  {loss:.4f}")
                    report.save()
        at = losses(results, name, options.seeds)
        best = min(at, key=lambda rate: at[rate])
        table.add_row(name, f"2^{best}", f"{at[best]:.3f}")
    console.print(table)
    report.save()
    write_pages()


if __name__ == "__main__":
    main(sys.argv[1:])
