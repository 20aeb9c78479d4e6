"""Counts the bytes of state of each optimizer for whole models, embedding and head included.

    python -m benchmarks.state_bytes [--models 60m 7b] [--optimizers adamw ...] [--layout list]

The figures are exact: they come from the abstract evaluation of each optimizer's ``init`` on the
model's shapes, and nothing is allocated. Prints a table and writes it as JSON, with a plot.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

import memopt
from benchmarks.jax_optimizers import JAX_OPTIMIZERS, PACKAGES, build
from benchmarks.report import Report
from benchmarks.updates import model_shapes
from memopt.comparison.rows import Row
from memopt.markdown import markdown_table

LEARNING_RATE = 1e-3
VARIANTS = {
    "soap": "2mn + 2m² + 2n² numbers",
    "soap, one_sided=True": "2mn + 2p² numbers",
    "soap, block_size=1024": "2mn + 2b(m + n) numbers, with blocks of length b",
    "soap, state int8": "2mn + 2m² + 2n² bytes",
    "soap, one_sided=True, state int8": "2mn + 2p² bytes",
}
"""SOAP and its cheaper variants, as rows of `memopt compare`, and what they keep for a matrix; the
scales of codes, of which there are fewer, are left out."""


class Options(NamedTuple):
    """The options of this benchmark.

    Attributes:
        optimizers: rows of `memopt compare`; by default AdamW, memopt's own methods, and
            `VARIANTS`. Names in `JAX_OPTIMIZERS` are other libraries' optimizers.
        layout: "stacked" for one array per kernel, "list" for one array per kernel and block.
        models: presets whose shapes are used; optimizers are sorted by the bytes of the last one.
        output: the JSON file; the plot has the same name.
    """

    optimizers: tuple[str, ...] = tuple(
        dict.fromkeys(("adamw", *memopt.available("memopt"), *VARIANTS))
    )
    layout: Literal["stacked", "list"] = "stacked"
    models: tuple[str, ...] = ("60m", "7b")
    output: Path = Path(__file__).parent / "results" / "state_bytes.json"


def count(name: str, model: str, layout: Literal["stacked", "list"]) -> dict[str, Any]:
    """Counts the bytes that one optimizer keeps for one model with float32 parameters."""
    shapes = model_shapes(model, "float32", layout)
    if name in JAX_OPTIMIZERS:
        tx = build(name, LEARNING_RATE, shapes)
    else:
        row = Row.parse(name)
        options = dict(row.options)
        tx = memopt.optimizer(row.optimizer, LEARNING_RATE, state=row.state, **options)
    table = memopt.state_bytes(tx, shapes)
    hidden = sum(size for leaf, size in table.states.items() if leaf.startswith("blocks/"))
    if name in JAX_OPTIMIZERS:  # whose arrays may be flat, without their parameters' names
        hidden = memopt.state_bytes(tx, {"blocks": shapes["blocks"]}).total
    return {
        "optimizer": name,
        "model": model,
        "parameter_bytes": sum(table.parameters.values()),
        "state_bytes": table.total,
        "hidden_bytes": hidden,
    }


def table(results: Sequence[dict[str, Any]]) -> Table:
    """The records as a table for the terminal."""
    shown = Table(title="Optimizer state, float32, embedding and head included")
    for column in ("model", "optimizer", "state MB", "blocks MB", "bytes per parameter"):
        shown.add_column(column, justify="left" if column in ("model", "optimizer") else "right")
    for r in results:
        shown.add_row(
            r["model"],
            r["optimizer"],
            f"{r['state_bytes'] / 1e6:,.1f}",
            f"{r['hidden_bytes'] / 1e6:,.1f}",
            f"{4 * r['state_bytes'] / r['parameter_bytes']:.3f}",
        )
    return shown


def variants(report: dict[str, Any]) -> str:
    """The table of SOAP's variants for the docs."""
    found = {(r["optimizer"], r["model"]): r for r in report["results"]}
    rows = []
    for name, formula in VARIANTS.items():
        sizes = [found[name, model]["state_bytes"] / 1e9 for model in ("60m", "7b")]
        rows.append((f"`{name}`", formula, *(f"{size:.2f} GB" for size in sizes)))
    kept = "kept for an m×n matrix"
    return markdown_table(("", kept, "LLaMA-60m", "LLaMA-7b"), rows, words=[kept])


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the bytes per parameter of each model as bars, divided into blocks and the rest."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(r["model"] for r in results))
    height = 1.1 + 0.22 * len({r["optimizer"] for r in results})
    figure = Figure(figsize=(8, height), layout="constrained")
    grid = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axes, model in zip(grid, models, strict=True):
        rows = [r for r in results if r["model"] == model]
        names = [r["optimizer"] for r in rows]
        scale = [4 / r["parameter_bytes"] for r in rows]
        hidden = [r["hidden_bytes"] * s for r, s in zip(rows, scale, strict=True)]
        rest = [r["state_bytes"] * s - h for r, s, h in zip(rows, scale, hidden, strict=True)]
        axes.barh(names, hidden, label="blocks")
        axes.barh(names, rest, left=hidden, label="embedding and head")
        for i, total in enumerate(h + r for h, r in zip(hidden, rest, strict=True)):
            side, color = ("right", "white") if total > 8.5 else ("left", "black")
            axes.annotate(
                f" {total:.3g} ",
                (min(total, 9.5), i),
                ha=side,
                va="center",
                color=color,
                fontsize=8,
            )
        axes.set(title=f"LLaMA-{model}", xlabel="state bytes a parameter", xlim=(0, 9.5))
        axes.margins(y=0.01)
    axes.invert_yaxis()  # all subplots share this axis
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str]) -> None:
    """Counts, prints the table and writes the files."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    try:
        results = [
            count(name, model, options.layout)
            for model in options.models
            for name in options.optimizers
        ]
    except ValueError as error:
        sys.exit(f"error: {error}")
    last = {r["optimizer"]: r["state_bytes"] for r in results}
    results.sort(key=lambda r: (options.models.index(r["model"]), -last[r["optimizer"]]))
    Console().print(table(results))
    others = PACKAGES if set(options.optimizers) & set(JAX_OPTIMIZERS) else ()
    report = Report(
        "state_bytes", arguments, options.output, results, others, layout=options.layout
    )
    report.save(lambda path: plot(results, path))


if __name__ == "__main__":
    main(sys.argv[1:])
