"""Measures the memory of a LLaMA's training step on a chip, by the chip's own compiler.

    python -m benchmarks.memory --model 7b --optimizer adafactor [--release] [--mesh fsdp=16]

The step is that of ``memopt pretrain``: forward, backward and update with bfloat16 parameters,
either the ordinary step with full rematerialisation, or the released one, which updates each block
while the backward pass runs. Nothing is run, and no chip is needed, only its compiler: libtpu (the
extra `plan`) for TPUs, JAX's CUDA plugin (the extra `plan-gpu`) for GPUs.

Attention processes queries in chunks, for GPUs too, although training there uses cuDNN's if it is
installed: only cuDNN itself reports its workspace.

Without ``--optimizer`` it measures a list, prints a table and writes it as JSON, with a plot. What
the file has from the same compiler is not measured again.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.report import COMPILERS, GIB, Report, markdown_table, read_results
from benchmarks.training_step import without_refresh
from memopt.planning.chips import CHIPS, GPUS, compiler, only_compile
from memopt.planning.plan import Plan, device_count, plan_compilable
from memopt.planning.run_options import run_config
from memopt.training.config import State, Weights
from memopt.training.describe import describe_run
from memopt.training.setup import Setup

RELEASED: dict[str, Any] = {"release": True}
INT8 = RELEASED | {"weights": "int8"}
FSDP: dict[str, Any] = {"mesh": "fsdp=16", "batch_size": 16}
LIST: list[tuple[str, dict[str, Any]]] = [
    ("adafactor", {}),
    ("adafactor", RELEASED),
    ("adafactor", INT8),
    ("adafactor", INT8 | {"weights": "int4"}),
    ("adalomo", {}),
    ("adalomo", RELEASED),
    ("adalomo", INT8),
    ("apollo_mini", {"state": "int8"}),
    ("apollo_mini", RELEASED | {"state": "int8"}),
    ("apollo_mini", INT8 | {"state": "int8"}),
    ("scale", INT8 | {"state": "int8"}),
    ("rmnp", INT8 | {"state": "int8"}),
    ("muon", INT8 | {"state": "int8"}),
    ("badam", RELEASED),
    ("badam", INT8),
    ("adafactor", INT8 | {"model": "13b"}),
    ("adafactor", FSDP),
    ("adafactor", RELEASED | FSDP),
]
LLAMA_3: dict[str, Any] = INT8 | {"model": "llama-3-8b"}  # a vocabulary of 128256
LISTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "methods": LIST,
    "fine-tuning": [
        ("adafactor", LLAMA_3),
        ("apollo_mini", LLAMA_3 | {"state": "int8"}),
        ("adafactor", LLAMA_3 | {"weights": "int4"}),
    ],
    "over-time": [("adafactor", {}), ("adafactor", RELEASED)],
}


class Options(NamedTuple):
    """The options of this benchmark.

    Attributes:
        model: a preset.
        optimizer: a name known to `memopt.optimizer`; by default those of `rows`, one by one.
        release: update each block while the backward pass runs.
        weights: how the parameters are stored; by default not quantised.
        state: how the optimizer's state is stored; by default as in the method.
        dtype: the dtype of parameters and activations; the CPU compiler widens bfloat16.
        chip: the chip to compile for.
        mesh: axes and their sizes, such as "fsdp=16"; by default one chip.
        batch_size: rows over all chips.
        seq_len: tokens per row.
        accumulation: the number of micro-batches per batch.
        refresh: whether the step may refresh a subspace, for example by an SVD, which the TPU
            compiler takes half an hour to compile.
        json: print one JSON object instead of a table.
        output: the JSON file of a list; the plot has the same name.
        rows: the list of configurations: all methods, fine-tuning of llama-3-8b, or two whose
            results include `Plan.over_time`.
    """

    model: str = "7b"
    optimizer: str | None = None
    release: bool = False
    weights: Weights | None = None
    state: State | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    chip: str = "v5e"
    mesh: str | None = None
    batch_size: int = 1
    seq_len: int = 2048
    accumulation: int = 1
    refresh: bool = True
    json: bool = False
    output: Path = Path(__file__).parent / "results" / "memory.json"
    rows: Literal["methods", "fine-tuning", "over-time"] = "methods"


RUN = ("release", "weights", "state", "dtype", "mesh", "batch_size", "seq_len", "accumulation")
"""Options of the run that is planned."""


def setting(optimizer: str, options: Options) -> dict[str, Any]:
    """Returns the fields that identify the record of a configuration."""
    names = ("model", *RUN, "chip", "refresh")
    return {"optimizer": optimizer} | {name: getattr(options, name) for name in names}


def measure(optimizer: str, options: Options) -> dict[str, Any]:
    """The record of one configuration, by the planner of `memopt plan`."""
    given = {name: getattr(options, name) for name in RUN}
    compiler(options.chip)  # raises if it is not installed

    def make(devices: Sequence[jax.Device], chip: str) -> Setup:
        config = run_config(options.model, optimizer, given, chip)
        setup = describe_run(config, devices=devices)
        if options.refresh:
            return setup
        return dataclasses.replace(setup, step=without_refresh(setup.step))

    count = device_count(options.mesh)
    found = plan_compilable(
        make, options.chip, count, cache=True, model=options.model, optimizer=optimizer
    ).to_json()
    planned = ("compiled_for", "compiler", *byte_fields(), "over_time")
    planned += ("collectives", "refresh_collectives")
    return setting(optimizer, options) | {name: found[name] for name in planned}


def byte_fields() -> list[str]:
    """The fields of a plan that count bytes, and are no property of the chip."""
    named = [field.name for field in dataclasses.fields(Plan) if field.name.endswith("_bytes")]
    return [name for name in named if name not in ("limit_bytes", "margin_bytes")]


def table(results: Sequence[dict[str, Any]]) -> Table:
    """The records as a table for the terminal."""
    shown = Table(title="GiB on a chip in one training step", box=SIMPLE_HEAD)
    for column in ("model", "optimizer", "released", "weights", "state", "chip", "mesh"):
        shown.add_column(column)
    for column in ("peak", "weights", "state"):
        shown.add_column(column, justify="right")
    for r in results:
        sizes = (r["peak_bytes"], r["parameter_bytes"], r["state_bytes"])
        shown.add_row(
            *(r["model"], r["optimizer"], "yes" if r["release"] else ""),
            *(r["weights"] or r["dtype"], r["state"] or ""),
            *(r["chip"], r["mesh"] or "", *(f"{size / GIB:.2f}" for size in sizes)),
        )
    return shown


def describe(record: dict[str, Any]) -> str:
    """A short description of a configuration."""
    parts = [record["model"], record["optimizer"], record["weights"] or record["dtype"]]
    parts += ["released"] * record["release"] + [record["mesh"]] * bool(record["mesh"])
    return ", ".join(parts + [f"state {record['state']}"] * bool(record["state"]))


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws one bar per configuration, divided into weights, state, gradients and the rest.

    Gradients are counted from their shapes; the rest is what remains of the compiler's peak.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.34 * len(results)), layout="constrained")
    axes = figure.subplots()
    rows, left = range(len(results)), np.zeros(len(results))
    parts = {
        "weights": "parameter_bytes",
        "optimizer state": "state_bytes",
        "gradients": "gradient_bytes",
    }
    sizes = {label: np.array([r[key] for r in results]) / GIB for label, key in parts.items()}
    peaks = np.array([r["peak_bytes"] for r in results]) / GIB
    sizes["activations and the rest"] = peaks - sum(sizes.values())
    for label, size in sizes.items():
        axes.barh(rows, size, left=left, label=label)
        left = left + size
    for row, peak in zip(rows, peaks, strict=True):
        axes.annotate(f" {peak:.1f}", (peak, row), va="center", fontsize=8)
    axes.set_yticks(rows, [describe(r) for r in results])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    first = results[0]
    if first["chip"] in CHIPS:
        axes.axvline(CHIPS[first["chip"]].memory / GIB, color="black", linestyle=":")
    axes.set_xlabel("GiB on a chip")
    figure.suptitle(f"One training step compiled for {first['chip']}, a row of 2048 tokens a chip")
    figure.legend(loc="outside lower right", ncols=4)
    figure.savefig(path, dpi=120)


def markdown(report: dict[str, Any]) -> str:
    """The table of LLaMA-7b for the docs, in GiB."""
    kinds: dict[str, dict[str, Any]] = {
        "ordinary": {"release": False, "weights": None},
        "released": {"release": True, "weights": None},
        "released, int8 weights": {"release": True, "weights": "int8"},
    }
    names = ("adafactor", "adalomo", "scale", "apollo_mini", "badam", "rmnp", "muon")
    rows = [(name, *(_peak(report, optimizer=name, **kinds[k]) for k in kinds)) for name in names]
    return markdown_table(("", *kinds), [row for row in rows if set(row[1:]) != {"–"}])


def fine_tuning_table(*reports: dict[str, Any]) -> str:
    """The table of the released LLaMA-3-8b for the docs, in GiB, a column for each chip."""
    rows = []
    for r in reports[0]["results"]:
        where = {key: r[key] for key in ("optimizer", "model", "weights", "state")}
        stored = f"{r['weights']} weights" + (" and state" if r["state"] else "")
        peaks = (_peak(report, **where) for report in reports)
        rows.append((f"{r['optimizer']}, {stored}", *peaks))
    return markdown_table(("llama-3-8b, released", "v5e", "RTX 4090"), rows)


def _peak(report: dict[str, Any], model: str = "7b", **values: Any) -> str:
    """The peak of the only step on one chip that has these values, if it was measured."""
    values |= {"model": model, "mesh": None}
    found = [r["peak_bytes"] for r in report["results"] if values.items() <= r.items()]
    assert len(found) < 2
    return f"{found[0] / GIB:.2f}" if found else "–"


def main(arguments: Sequence[str]) -> None:
    """Measures, prints and, for a list, writes the files."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    only_compile()
    chosen = [(options.optimizer, {})] if options.optimizer else LISTS[options.rows]
    results: list[dict[str, Any]] = []
    saved = [] if options.optimizer else read_results(options.output)
    report = Report("memory", arguments, options.output, results, COMPILERS)
    try:
        for optimizer, changes in track(chosen, transient=True, disable=len(chosen) == 1):
            if changes.get("mesh") and options.chip in GPUS:
                continue  # then the list has only this card
            one = options._replace(**changes)
            wanted = setting(optimizer, one) | {"compiler": compiler(options.chip)}
            known = [record for record in saved if wanted.items() <= record.items()]
            record = known[0] if known else measure(optimizer, one)
            if options.rows != "over-time":
                record.pop("over_time", None)
            results.append(record)
            if not options.optimizer:  # saved after each, because each takes minutes
                report.save(lambda path: plot(results, path))
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps(results[0] if options.optimizer else results))
    else:
        Console().print(table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
