"""What training takes on a pod: memory of a chip, and what moves between chips.

    python -m benchmarks.pods [--optimizers sgd adafactor ...] [--grids v5e-16 ...] [--models 7b]

The step is that of `benchmarks.memory`, compiled by the TPU's own compiler (the extra `aot`) for
all chips of a pod, one row of 2048 tokens for each part that the batch is split into. Of a method
with refreshes it is a step without one. Nothing is run, and no chip is needed.

A row is written as soon as it is measured, and rows that are there are not measured again: it can
be stopped and started at any time. Prints a table of all, with a plot beside the JSON.
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks import hlo, memory
from benchmarks.report import save
from memopt.errors import check_choice
from memopt.models.sharding import BATCH_AXES
from memopt.planning.step_memory import step_memory
from memopt.training.placement import parse_mesh

BASELINE = "sgd"
GRIDS = {  # the chip and the mesh
    "v5e-16": ("v5e", "fsdp=16"),
    "v5e-256": ("v5e", "fsdp=256"),
    "v5e-256-3d": ("v5e", "data=4,fsdp=16,tensor=4"),
    "v5p-256": ("v5p", "fsdp=256"),
    "v5p-256-3d": ("v5p", "data=4,fsdp=16,tensor=4"),
}
EIGHT_BITS = "_8bit"
KEYS = ("model", "optimizer", "grid", "release")


class Options(NamedTuple):
    """What to measure.

    Attributes:
      optimizers: names known to `memopt.optimizer`, also with _8bit at their end for a state of
        int8; what each adds is beside "sgd".
      grids: among those of `GRIDS`.
      models: presets.
      release: steps that update each block while the backward pass runs (1), ordinary ones (0).
      output: the JSON file; the plot stands beside it.
    """

    optimizers: tuple[str, ...] = (
        *(BASELINE, "adafactor", "apollo_mini", "lion", "galore", "adamw" + EIGHT_BITS),
    )
    grids: tuple[str, ...] = tuple(GRIDS)
    models: tuple[str, ...] = ("7b",)
    release: tuple[int, ...] = (0, 1)
    output: Path = Path(__file__).parent / "results" / "pods.json"


def measure(model: str, optimizer: str, grid: str, release: bool) -> dict[str, Any]:
    """The record of one step."""
    chip, mesh = GRIDS[grid]
    sizes = parse_mesh(mesh)
    options = memory.Options(
        model=model,
        release=release,
        state="int8" if optimizer.endswith(EIGHT_BITS) else None,
        chip=chip,  # type: ignore[arg-type]
        mesh=mesh,
        batch_size=math.prod(sizes.get(axis, 1) for axis in BATCH_AXES),
    )
    start = time.monotonic()
    compiled, state = memory.compile_step(optimizer.removesuffix(EIGHT_BITS), options)
    found = hlo.collectives(compiled.as_text() or "")
    sizes_of = step_memory(compiled, state.params, state.opt_state)
    return {
        **dict(zip(KEYS, (model, optimizer, grid, release), strict=True)),
        **{"chip": chip, "mesh": mesh, "batch_size": options.batch_size},
        "peak_bytes": sizes_of.peak,
        "parameter_bytes": sizes_of.parameters,
        "state_bytes": sizes_of.state,
        "collective_bytes": hlo.total_bytes(found),
        "collectives": hlo.by_kind(found),
        "compile_seconds": round(time.monotonic() - start),
    }


def added(record: dict[str, Any], results: Sequence[dict[str, Any]]) -> float | None:
    """What part of the collective bytes a step has above that of SGD; None without one."""
    same = lambda r: all(r[key] == record[key] for key in KEYS if key != "optimizer")
    base = next((r for r in results if r["optimizer"] == BASELINE and same(r)), None)
    return record["collective_bytes"] / base["collective_bytes"] - 1 if base else None


def table(results: Sequence[dict[str, Any]]) -> Table:
    """The records as a table for the terminal."""
    shown = Table(title="A training step on a pod, for each chip", box=SIMPLE_HEAD)
    for column in ("model", "optimizer", "grid", "released"):
        shown.add_column(column)
    for column in ("peak GiB", "state GiB", "moved GB", "above SGD"):
        shown.add_column(column, justify="right")
    for r in results:
        more = added(r, results)
        shown.add_row(
            *(r["model"], r["optimizer"], r["grid"], "yes" if r["release"] else ""),
            f"{r['peak_bytes'] / memory.GIB:.2f}",
            f"{r['state_bytes'] / memory.GIB:.3f}",
            f"{r['collective_bytes'] / 1e9:.2f}",
            "" if more is None else f"{100 * more:+.2f}%",
        )
    return shown


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of the peak, a group for each grid; ordinary steps pale behind released ones."""
    from matplotlib.figure import Figure

    grids = list(dict.fromkeys((r["model"], r["grid"]) for r in results))
    names = list(dict.fromkeys(r["optimizer"] for r in results))
    figure = Figure(figsize=(2 + 1.9 * len(grids), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        for release in (False, True):
            rows = [r for r in results if (r["optimizer"], r["release"]) == (name, release)]
            places = [grids.index((r["model"], r["grid"])) + (i + 0.5) * width for r in rows]
            axes.bar(
                places,
                [r["peak_bytes"] / memory.GIB for r in rows],
                width=0.9 * width,
                color=f"C{i}",
                alpha=1 if release else 0.35,
                label=name if release else None,
            )
    axes.set_xticks(
        [i + 0.4 for i in range(len(grids))],
        [f"{model}\n{grid}\n{GRIDS[grid][1]}" for model, grid in grids],
        fontsize=7,
    )
    axes.set_yscale("log")
    axes.set_ylabel("peak of a chip, GiB (pale: ordinary, full: released)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str]) -> None:
    """Measures what is missing, writing each row, and prints the table."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    for grid in options.grids:
        check_choice("grid", grid, GRIDS)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.pods", *arguments]),
        "results": [],
    }
    if options.output.exists():
        report["results"] = json.loads(options.output.read_text())["results"]
    results = report["results"]
    there = {tuple(r[key] for key in KEYS) for r in results}
    wanted = [
        (model, optimizer, grid, bool(release))
        for model in options.models
        for grid in options.grids
        for release in options.release
        for optimizer in options.optimizers
    ]
    for key in wanted:
        if key not in there:
            print("compiling", *key, file=sys.stderr, flush=True)
            results.append(measure(*key))
            save(report, options.output, lambda path: plot(results, path))
    Console(width=110).print(table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
