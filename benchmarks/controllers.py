"""Trains a small LLaMA with each controller, and without, on the same tokens.

    nice python -m benchmarks.controllers [--rows cosine autolrs ...] [--seeds 0 1 2]

Three questions, each with rows of its own:

- rate: AutoLRS against a cosine schedule, both from a good learning rate, an eighth and eight times
  of it; and the cosine schedule with twice the steps, which is what the search costs.
- batch: controllers of the batch against small batches and large ones.
- mixture: dynamic batch loading against equal shares of three sources: Python's standard library,
  licences of installed packages, and Python's C headers. The reference is what equal shares of
  twice the tokens reach.

The text is Python's standard library where nothing else is said. Every run is saved as soon as it
is finished, and not repeated when the command is given again. Prints a table, writes it into
docs/controllers.md, and all as JSON with a plot of the same name.
"""

import dataclasses
import json
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from rich.console import Console

from benchmarks import width
from benchmarks.report import Report, markdown_table, read_results
from benchmarks.results import write_pages
from memopt.errors import check_choice
from memopt.json_lines import read_json_lines
from memopt.training.config import Architecture, Config, Optimization, Run, Text
from memopt.training.loop import train
from memopt.training.open import open_run

#: The lower of AdamW's two best learning rates for this model, of powers of two, in 300 steps:
#: scheme "all", width 64 in benchmarks/results/width.json, from `python -m benchmarks.width`.
RATE = 2.0**-9

#: Evaluations of a run, and the metrics that are kept of each.
POINTS = 20
#: The seed whose runs are plotted.
SEED_SHOWN = 0
KEPT = ("step", "val_loss", "learning_rate", "weight")

ROOT = Path(__file__).parents[1]


class Row(NamedTuple):
    """A run.

    Attributes:
        question: what it is compared for.
        options: its options.
        times: how many times as many tokens as others it is trained on.
        rows: how many times as many rows as theirs its batches have.
        reference: the row whose last loss of each source is its reference, "" for none.
    """

    question: str
    options: Mapping[str, Any]
    times: int = 1
    rows: int = 1
    reference: str = ""


def _autolrs(rate: float) -> Row:
    """AutoLRS with the authors' ratios, and stages a fifth as long."""
    given = ["trial_steps=20", "stage_steps=200", "most_stage_steps=1600"]
    return Row("rate", {"controller": "autolrs", "controller_option": given, "learning_rate": rate})


def _batch(controller: str, *given: str) -> Row:
    """A controller of the batch, of up to 8 batches."""
    options = {"learning_rate": RATE, "accumulation": 2}
    return Row("batch", {**options, "controller": controller, "controller_option": list(given)})


SOURCES = {
    "code": "python",
    "licences": f"{sysconfig.get_path('purelib')}/*.dist-info/licenses/*",
    "headers": f"{sysconfig.get_path('include')}/**/*.h",
}
"""Sources of different kind."""

MIXED = {
    "learning_rate": RATE,
    "data": [f"{name}={spec}" for name, spec in SOURCES.items()],
    "eval_tokens": 2**13,
}
"""Options of rows on a mixture."""


def _mixture(*given: str) -> Row:
    """Dynamic batch loading."""
    options = {**MIXED, "controller": "dynamic_mixture", "controller_option": list(given)}
    return Row("mixture", options, reference="equal shares, twice the tokens")


ROWS = {
    "cosine": Row("rate", {"learning_rate": RATE}),
    "autolrs": _autolrs(RATE),
    "cosine, rate / 8": Row("rate", {"learning_rate": RATE / 8}),
    "autolrs, rate / 8": _autolrs(RATE / 8),
    "cosine, rate × 8": Row("rate", {"learning_rate": RATE * 8}),
    "autolrs, rate × 8": _autolrs(RATE * 8),
    "cosine, twice the steps": Row("rate", {"learning_rate": RATE}, times=2),
    "8 rows": Row("batch", {"learning_rate": RATE}),
    "64 rows": Row("batch", {"learning_rate": RATE}, rows=8),
    "64 rows, rate × √8": Row("batch", {"learning_rate": RATE * 8**0.5}, rows=8),
    "adadagrad, norm": _batch("adadagrad", "most=8"),
    "adadagrad, inner product": _batch("adadagrad", "most=8", "test=inner_product"),
    "noise_ramp": _batch("noise_ramp", "most=8"),
    "batch_schedule": _batch("batch_schedule"),
    "equal shares": Row("mixture", MIXED),
    "equal shares, twice the tokens": Row("mixture", MIXED, times=2),
    "dynamic_mixture": _mixture(),
    "dynamic_mixture, eta=0.2": _mixture("eta=0.2"),
}
"""The rows of the tables."""


class Panel(NamedTuple):
    """A panel of the plot.

    Attributes:
        across: what is summed along the x axis.
        up: what is shown along the y axis.
    """

    across: tuple[str, ...]
    up: str


PANELS = {
    "rate": (
        Panel(("step",), "val_loss"),
        Panel(("step", "search_steps"), "val_loss"),
        Panel(("step",), "learning_rate"),
    ),
    "batch": (
        Panel(("tokens",), "val_loss"),
        Panel(("step",), "val_loss"),
        Panel(("tokens",), "rows"),
    ),
    "mixture": (
        Panel(("tokens",), "val_loss code"),
        Panel(("tokens",), "val_loss licences"),
        Panel(("tokens",), "weight code"),
    ),
}
"""The panels of each question."""

COLUMNS = {
    "rate": ("val_loss", "step", "search_steps"),
    "batch": ("val_loss", "step"),
    "mixture": (
        *(f"val_loss {name}" for name in SOURCES),
        *(f"weight {name}" for name in SOURCES),
    ),
}
"""The columns of each question's table, at the end of the runs."""


@dataclasses.dataclass(frozen=True)
class Options(width.Task):
    """The options of this benchmark.

    Attributes:
        rows: the rows to train; by default all of them.
        seeds: the seeds of initial weights and order of the data.
        hidden_size: the width of the model.
        steps: batches of most rows.
        output: the JSON file.
    """

    rows: tuple[str, ...] = tuple(ROWS)
    seeds: tuple[int, ...] = (0,)
    hidden_size: int = 64
    steps: int = 1000
    output: Path = ROOT / "benchmarks" / "results" / "controllers.json"


def describe(
    options: Options, row: Row, seed: int, directory: Path, reference: Mapping[str, float]
) -> Config:
    """The options of a run."""
    steps = options.steps * row.times // row.rows
    shape = width.model_config(options, options.hidden_size)
    given = [*row.options.get("controller_option", ())]
    if reference:
        given.append(f"reference={','.join(f'{name}={loss}' for name, loss in reference.items())}")
    config = Config(
        architecture=Architecture(model="small", shape=shape),
        optimization=Optimization(
            optimizer="adamw",
            option=("b2=0.95",),
            steps=steps,
            seed=seed,
        ),
        text=Text(
            batch_size=options.batch_size * row.rows,
            seq_len=options.seq_len,
            eval_tokens=options.eval_tokens,
        ),
        run=Run(
            output=directory,
            mesh="data=1",
            log=(),
            eval_every=max(1, steps // POINTS),
            checkpoint_every=steps,
        ),
    )
    return Config.from_flat({**row.options, "controller_option": given}, config)


def run(config: Config) -> list[dict[str, float]]:
    """Trains; returns what was measured where it was evaluated, with what was used up by then."""
    assert config.run.output is not None
    train(open_run(config), Console(quiet=True))
    trials = config.run.output / "trials.jsonl"
    lines = trials.read_text().splitlines() if trials.exists() else []
    searched = [(step, steps) for step, _, steps, *_ in map(json.loads, lines)]
    points, tokens = [], 0
    for line in read_json_lines(config.run.output / "metrics.jsonl"):
        tokens += line["tokens"]
        if "val_loss" in line:
            point = {name: x for name, x in line.items() if name.startswith(KEPT)}
            used = sum(steps for step, steps in searched if step < line["step"])
            rows = line["tokens"] / config.text.seq_len
            points.append({**point, "tokens": tokens, "search_steps": used, "rows": rows})
    return points


def find(results: Sequence[dict[str, Any]], row: str, seed: int) -> list[dict[str, float]]:
    """Measurements of a run; none if it has not been trained."""
    found = (r["points"] for r in results if (r["row"], r["seed"]) == (row, seed))
    return next(found, [])


def losses(results: Sequence[dict[str, Any]], row: str, seed: int) -> dict[str, float]:
    """The last loss of each source in a run."""
    points = find(results, row, seed)
    return {name: points[-1][f"val_loss {name}"] for name in SOURCES} if points else {}


def seeds(results: Sequence[dict[str, Any]], question: str) -> set[int]:
    """The seeds for which all rows of a question were trained."""
    names = [name for name, row in ROWS.items() if row.question == question]
    trained = [{r["seed"] for r in results if r["row"] == name} for name in names]
    return set.intersection(*trained)


def cell(column: str, found: Sequence[float]) -> str:
    """The mean over seeds, and for losses their standard deviation; "–" for nothing."""
    if not found:
        return "–"
    mean = statistics.mean(found)
    if column.endswith("step") or column.endswith("steps"):
        return f"{mean:,.0f}"
    if column.startswith("weight"):
        return f"{mean:.2f}"
    return f"{mean:.3f}" + (f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else "")


def markdown(report: dict[str, Any], question: str) -> str:
    """The rows of a question, where they ended, as a table for the docs."""
    results = report["results"]
    columns, counted = COLUMNS[question], seeds(results, question)
    titles = [column.replace("val_loss", "validation loss").replace("_", " ") for column in columns]
    rows = []
    for name, row in ROWS.items():
        if row.question == question:
            ends = [find(results, name, seed)[-1] for seed in sorted(counted)]
            cells = [
                cell(column, [end[column] for end in ends if column in end]) for column in columns
            ]
            rows.append((name, *cells))
    return markdown_table(("run", *titles), rows)


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the runs of one seed: a line of panels for each question."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4 * len(PANELS)), layout="constrained")
    for question, axes in zip(PANELS, figure.subplots(len(PANELS), 3), strict=True):
        names = [name for name, row in ROWS.items() if row.question == question]
        for panel, ax in zip(PANELS[question], axes, strict=True):
            heights = []
            for name in names:
                points = [x for x in find(results, name, SEED_SHOWN) if panel.up in x]
                heights += [point[panel.up] for point in points]
                across = [sum(point[key] for key in panel.across) for point in points]
                ax.plot(across, [point[panel.up] for point in points], label=name)
            ax.set_xlabel(" + ".join(panel.across).replace("_", " "))
            ax.set_ylabel(panel.up.replace("_", " "))
            if panel.up.startswith("val_loss") and heights:
                ax.set_ylim(min(heights) - 0.05, min(heights) + 1.0)
            else:
                ax.set_yscale("log", base=2)
        axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=100)


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
    report = Report("controllers", arguments, options.output, results, **settings)
    console = Console()
    for seed in options.seeds:
        for name in options.rows:
            if find(results, name, seed):
                continue
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as home:
                reference = losses(results, ROWS[name].reference, seed)
                points = run(describe(options, ROWS[name], seed, Path(home) / "run", reference))
            results.append({"row": name, "seed": seed, "points": points})
            taken = time.perf_counter() - began
            console.print(f"{name:32} seed {seed}  {points[-1]['val_loss']:.4f}  {taken:.0f} s")
            report.save()
    report.save(lambda path: plot(results, path))
    for question in PANELS:
        console.print(markdown(report.content(), question), markup=False)
    write_pages()


if __name__ == "__main__":
    main(sys.argv[1:])
