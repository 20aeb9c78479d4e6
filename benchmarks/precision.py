"""Compares the final losses of training in fewer bits with float32.

    nice python -m benchmarks.precision [--steps 200] [--seeds 0 1 2] [--cases float32 int8-state]

It trains the tiny LLaMA on the source of Python's standard library by AdamW, with state or weights
stored in fewer bits. Everything else is the same, including, for each seed, the initial weights
and the data. A case is indistinguishable from float32 if their mean validation losses differ by no
more than the larger of both standard deviations over the seeds.

Prints a table and writes it as JSON, with a plot of the same name.
"""

import dataclasses
import functools
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

import memopt
from benchmarks.report import Report, markdown_table
from memopt.errors import check_at_least, check_choice
from memopt.state.codecs import bits_of
from memopt.training.config import Config, Optimization, Run, Text
from memopt.training.open import Training, open_run
from memopt.training.step import evaluate, init_state, train_step


class Case(NamedTuple):
    """The precision of state and weights; None is float32."""

    state: str | None = None
    weights: str | None = None


BASELINE = "float32"
CASES = {
    BASELINE: Case(),
    "int8-state": Case(state="int8"),
    "int4-state": Case(state="int4"),
    "bfloat16-state": Case(state="bfloat16"),
    "int8-weights": Case(weights="int8"),
    "bfloat16-weights": Case(weights="bfloat16"),
    "bfloat16+8-weights": Case(weights="bfloat16+8"),
    "int8-both": Case(state="int8", weights="int8"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark.

    Attributes:
        cases: the cases to train.
        seeds: the seeds of the initial weights and the order of the data.
        steps: training steps.
        seq_len: tokens per row.
        batch_size: rows per batch.
        eval_tokens: held-out tokens for the validation loss.
        learning_rate: the peak; warm-up takes a tenth of the steps, a cosine decay the others.
        output: the JSON file; the plot has the same name.
    """

    cases: tuple[str, ...] = tuple(CASES)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 200
    seq_len: int = 64
    batch_size: int = 8
    eval_tokens: int = 2**15
    learning_rate: float = 2e-3
    output: Path = Path(__file__).parent / "results" / "precision.json"


def train(run: Training, case: Case, seed: int) -> dict[str, float]:
    """Trains one run; returns the validation loss, and bytes per weight of state and weights."""
    setup, adam = run.setup, optax.scale_by_adam()
    if case.state:
        adam = memopt.quantize_state(adam, case.state, seed=seed)
    decay = optax.add_decayed_weights(0.1)
    tx = optax.chain(adam, decay, optax.scale_by_learning_rate(setup.learning_rate))

    params = run.state.params
    stored = memopt.quantize_params(params, case.weights) if case.weights else params
    state, size = init_state(stored, tx), sum(p.size for p in jax.tree.leaves(params))
    kept = lambda tree: sum(x.size * bits_of(x.dtype) for x in jax.tree.leaves(tree)) / 8 / size
    options = {"loss": setup.loss, "tx": tx, "learning_rate": setup.learning_rate}
    step = jax.jit(functools.partial(train_step, **options))
    for _ in range(run.config.optimization.steps):
        state, _ = step(state, next(run.batches))
    loss = evaluate(state.params, map(setup.place, run.validation[""]), jax.jit(setup.loss))
    sizes = {"state_bytes": kept(state.opt_state), "weight_bytes": kept(state.params)}
    return {"loss": loss, **sizes}


def measure(options: Options) -> list[dict[str, Any]]:
    """Trains every case with every seed, and returns records."""
    names = dict.fromkeys((BASELINE, *options.cases))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as directory:
            run = open_run(configuration(options, seed, Path(directory) / "run"))
            start = run.batches.get_state()
            for name in track(names, description=f"seed {seed}", transient=True):
                run.batches.set_state(start)
                found[name].append(train(run, CASES[name], seed))
            run.batches.close()
    losses = {name: [one["loss"] for one in records] for name, records in found.items()}
    spread = {name: statistics.stdev(values) for name, values in losses.items()}
    mean = {name: statistics.mean(values) for name, values in losses.items()}
    return [
        {
            "name": name,
            "losses": losses[name],
            "mean": mean[name],
            "spread": spread[name],
            "difference": mean[name] - mean[BASELINE],
            "indistinguishable": abs(mean[name] - mean[BASELINE])
            <= max(spread[name], spread[BASELINE]),
            "state_bytes": found[name][0]["state_bytes"],
            "weight_bytes": found[name][0]["weight_bytes"],
        }
        for name in names
    ]


def configuration(options: Options, seed: int, output: Path) -> Config:
    """The configuration of one run."""
    return Config(
        text=Text(
            batch_size=options.batch_size,
            seq_len=options.seq_len,
            eval_tokens=options.eval_tokens,
        ),
        optimization=Optimization(
            optimizer="adamw",
            learning_rate=options.learning_rate,
            steps=options.steps,
            seed=seed,
        ),
        run=Run(output=output),
    )


def table(report: dict[str, Any]) -> Table:
    """The records as a table for the terminal."""
    title = f"Tiny LLaMA, {report['steps']} steps, {len(report['seeds'])} seeds: validation loss"
    shown = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("stored", no_wrap=True)
    for column in ("mean", "spread", "− float32", "state", "weights"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("same")
    for r in report["results"]:
        shown.add_row(
            r["name"],
            *(f"{r[key]:.4f}" for key in ("mean", "spread")),
            f"{r['difference']:+.4f}",
            *(f"{r[key]:.2f}" for key in ("state_bytes", "weight_bytes")),
            "yes" if r["indistinguishable"] else "no",
        )
    return shown


def markdown(report: dict[str, Any]) -> str:
    """The table for the docs."""
    columns = ("", "validation loss, mean", "spread over seeds", "− float32")
    rows = [
        (
            *(_title(r["name"]), f"{r['mean']:.3f}", f"{r['spread']:.3f}"),
            "" if r["name"] == BASELINE else f"{r['difference']:+.3f}".replace("-", "−"),
            *(f"{r[key]:.2f}" for key in ("state_bytes", "weight_bytes")),
        )
        for r in report["results"]
    ]
    return markdown_table((*columns, "bytes per weight: state", "weights"), rows)


def _title(name: str) -> str:
    """The name of a case in words."""
    kind, _, stored = name.partition("-")
    if kind == "bfloat16+8":
        return "bfloat16 weights with 8 extra bits"
    return f"{kind} {stored.replace('both', 'state and weights')}".rstrip()


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws every run's loss and the means over a band of float32's spread over seeds."""
    from matplotlib.figure import Figure

    results = report["results"]
    figure = Figure(figsize=(7, 1 + 0.35 * len(results)), layout="constrained")
    axes = figure.subplots()
    first = results[0]
    low, high = first["mean"] - first["spread"], first["mean"] + first["spread"]
    axes.axvspan(low, high, color="C7", alpha=0.3)
    for i, r in enumerate(results):
        axes.plot(r["losses"], [i] * len(r["losses"]), "o", color="C0", alpha=0.5)
        axes.plot(r["mean"], i, "|", color="black", markersize=14)
    axes.set_yticks(range(len(results)), [r["name"] for r in results])
    axes.invert_yaxis()
    axes.set_xlabel("validation loss; band: mean ± spread of float32")
    axes.set_title(f"Tiny LLaMA, {report['steps']} steps of AdamW")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str]) -> None:
    """Measures, prints the table and writes the files."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    try:
        check_at_least("steps", options.steps, 1)
        check_at_least("number of seeds", len(options.seeds), 2)
        for name in options.cases:
            check_choice("case", name, CASES)
    except ValueError as error:
        sys.exit(f"error: {error}")
    settings = ("steps", "seeds", "seq_len", "batch_size", "eval_tokens", "learning_rate")
    report = Report(
        "precision",
        arguments,
        options.output,
        measure(options),
        **{name: getattr(options, name) for name in settings},
    )
    Console().print(table(report.content()))
    report.save(lambda path: plot(report.content(), path))


if __name__ == "__main__":
    main(sys.argv[1:])
