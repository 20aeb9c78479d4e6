"""Compares the time of a step of each optimizer in one process.

    python -m benchmarks.step_time [--model 60m] [--layout list] [--optimizers adamw lion ...]

A step is one jitted ``update`` and ``apply_updates`` with donated parameters and state, on the
shapes of a model and fixed gradients, without forward and backward pass. The optimizers are timed
in turn in each round, so that other load on the machine affects all of them, and each time is
divided by AdamW's in the same round. Optimizers of torch, rollfast and flashoptim-jax are included
if they are installed: ``pip install torch rollfast flashoptim-jax``.

Prints a table and writes it as JSON, with a plot of the same name.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import optax
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import memopt
from benchmarks import jax_optimizers, torch_optimizers
from benchmarks.jax_optimizers import JAX_OPTIMIZERS
from benchmarks.report import Report, markdown_table
from benchmarks.torch_optimizers import TORCH_OPTIMIZERS
from benchmarks.updates import (
    LEARNING_RATE,
    Contender,
    measure,
    model_shapes,
    on_one_device,
    torch_contenders,
)
from memopt.errors import check_at_least, check_choice
from memopt.optimizers.registry import METHODS

BASELINE = "adamw"
LIBRARIES = ("torch", "apollo-torch", "lion-pytorch", *jax_optimizers.PACKAGES)
EIGHT_BITS = "_8bit"
DEFAULTS = (
    *("adamw" + EIGHT_BITS, "adafactor", "optax_adafactor", "lion", "optax_lion"),
    *("apollo", "apollo_mini"),
)
COLORS = {"memopt": "C0", "optax": "C7", "torch": "C1", "rollfast": "C2", "flashoptim_jax": "C4"}


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark.

    Attributes:
        optimizers: names known to `memopt.optimizer`, with the suffix _8bit for int8 state, and
            those in `TORCH_OPTIMIZERS` and `JAX_OPTIMIZERS`; by default the methods of memopt,
            their baselines, and those of other libraries that are installed.
        model: the preset whose shapes are used.
        layout: "stacked" for one array per kernel, "list" for one array per kernel and block.
        dtype: the dtype of parameters and gradients.
        repeats: the number of timed rounds.
        output: the JSON file; the plot has the same name.
    """

    optimizers: tuple[str, ...] = ()
    model: str = "60m"
    layout: Literal["stacked", "list"] = "stacked"
    dtype: Literal["float32", "bfloat16"] = "float32"
    repeats: int = 20
    output: Path = Path(__file__).parent / "results" / "step_time.json"


def contenders(options: Options) -> list[Contender]:
    """Builds all optimizers to compare, the baseline first."""
    others = (*torch_optimizers.installed(), *jax_optimizers.installed())
    names = dict.fromkeys((BASELINE, *(options.optimizers or (*DEFAULTS, *others))))
    for name in names:
        method = name.removesuffix(EIGHT_BITS)
        check_choice("optimizer", method, (*memopt.available(), *TORCH_OPTIMIZERS, *JAX_OPTIMIZERS))
    shapes = model_shapes(options.model, options.dtype, options.layout)
    parameters = on_one_device(shapes)

    def contender(name: str) -> Contender:
        if name not in JAX_OPTIMIZERS:
            return parameters.contender(name, *optimizer(name))
        other = JAX_OPTIMIZERS[name]
        tx = jax_optimizers.build(name, LEARNING_RATE, shapes)
        # Compiled, FlashOptim's first state would take hours: XLA folds its codes of zeros.
        uncompiled = lambda tx, params: tx.init(params)
        return parameters.contender(name, other.package, tx, other.apply, uncompiled)

    found = [contender(name) for name in names if name not in TORCH_OPTIMIZERS]
    from_torch = [name for name in names if name in TORCH_OPTIMIZERS]
    return found + torch_contenders(shapes, options.dtype, from_torch)


def optimizer(name: str) -> tuple[str, optax.GradientTransformation]:
    """The library and ``memopt.optimizer(name)``, with int8 state if the name ends in _8bit."""
    method = name.removesuffix(EIGHT_BITS)
    tx = memopt.optimizer(method, learning_rate=LEARNING_RATE)
    tx = tx if method == name else memopt.quantize_state(tx)
    return METHODS[method].library if method == name else "memopt", tx


def describe(shapes: Any, model: str, dtype: str, repeats: int) -> dict[str, Any]:
    """The settings of a report."""
    leaves = jax.tree.leaves(shapes)
    return {
        "model": model,
        "dtype": dtype,
        "parameter_bytes": sum(math.prod(p.shape) * p.dtype.itemsize for p in leaves),
        "repeats": repeats,
    }


def table(report: dict[str, Any], baseline: str = "optax.adamw") -> Table:
    """The records as a table for the terminal."""
    title = f"LLaMA-{report['model']}, {report['dtype']}, {report['cores']} cores"
    shown = Table(
        title=f"{title}: a step ÷ {baseline}'s of the same round", box=SIMPLE_HEAD, pad_edge=False
    )
    shown.add_column("optimizer", no_wrap=True)
    shown.add_column("from", no_wrap=True)
    for column in ("ms", "ratio", "min–max", "state MB", "temp MB"):
        shown.add_column(column, justify="right", no_wrap=True)
    for result in report["results"]:
        ratio, temp = result["ratio"], result["temp_bytes"]
        shown.add_row(
            result["name"],
            result["library"],
            f"{result['milliseconds']['median']:.1f}",
            f"{ratio['median']:.2f}",
            f"{ratio['min']:.2f}–{ratio['max']:.2f}",
            f"{result['state_bytes'] / 1e6:.1f}",
            "" if temp is None else f"{temp / 1e6:.1f}",
        )
    return shown


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws the ratios as bars with whiskers from minimum to maximum, coloured by library."""
    from matplotlib.figure import Figure

    results = report["results"]
    figure = Figure(figsize=(7, 0.8 + 0.32 * len(results)), layout="constrained")
    axes = figure.subplots()
    for library, color in COLORS.items():
        rows = [i for i, result in enumerate(results) if result["library"] == library]
        ratios = [results[i]["ratio"] for i in rows]
        middle = [r["median"] for r in ratios]
        below = [r["median"] - r["min"] for r in ratios]
        above = [r["max"] - r["median"] for r in ratios]
        if rows:
            axes.barh(rows, middle, color=color, label=library, xerr=[below, above])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(results)), [result["name"] for result in results])
    axes.invert_yaxis()
    axes.set_xlabel("time of a step ÷ optax.adamw's")
    axes.set_title(f"LLaMA-{report['model']}, {report['dtype']}, {report['cores']} cores")
    axes.legend()
    figure.savefig(path, dpi=120)


def markdown(report: dict[str, Any]) -> str:
    """The table for the docs."""
    columns = ("optimizer", "from", "ms", "÷ optax.adamw", "min–max", "state MB")
    return markdown_table(columns, map(_row, report["results"]))


def _row(r: dict[str, Any]) -> tuple[str, ...]:
    ratio = r["ratio"]
    return (
        *(r["name"], r["library"], f"{r['milliseconds']['median']:.0f}", f"{ratio['median']:.2f}"),
        *(f"{ratio['min']:.2f}–{ratio['max']:.2f}", f"{r['state_bytes'] / 1e6:.1f}"),
    )


def main(arguments: Sequence[str]) -> None:
    """Measures, prints the table and writes the files."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    try:
        check_at_least("repeats", options.repeats, 1)
        found = contenders(options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    shapes = model_shapes(options.model, options.dtype, options.layout)
    settings = describe(shapes, options.model, options.dtype, options.repeats)
    settings["layout"] = options.layout
    results = measure(found, options.repeats)
    report = Report("step_time", arguments, options.output, results, LIBRARIES, **settings)
    Console().print(table(report.content()))
    report.save(lambda path: plot(report.content(), path))


if __name__ == "__main__":
    main(sys.argv[1:])
