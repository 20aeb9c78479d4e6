"""Measures the memory and communication of a LLaMA's training step on a pod, by its compiler.

    python -m benchmarks.pods [--only "7b v5e fsdp=16 apollo_mini"]

Steps are those of `benchmarks.memory`, with one row of 2048 tokens per chip; the first of each
kind is plain SGD, to show what other optimizers add to it. Every row takes minutes. It is written
as soon as it is measured, and rows already in the file are not measured again, so that you may
stop at any time. The compiler takes half an hour for GaLore's SVD; except on the first pod, its
steps are therefore without a refresh.
"""

import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import memory
from benchmarks.report import GIB, markdown_table, save
from memopt.machine import versions
from memopt.planning import hlo
from memopt.planning.chips import only_compile
from memopt.training.placement import parse_mesh

BASELINE = "sgd"
OPTIMIZERS: list[tuple[str, Any]] = [
    *((BASELINE, None), ("apollo_mini", None), ("adafactor", None), ("lion", None)),
    *(("adamw", "int8"), ("galore", None)),
]
PODS = [
    ("7b", "v5e", "fsdp=16"),
    ("7b", "v5e", "fsdp=256"),
    ("7b", "v5e", "data=4,fsdp=16,tensor=4"),
    ("7b", "v5p", "fsdp=256"),
    ("7b", "v5p", "data=4,fsdp=16,tensor=4"),
]
TITLES = {
    PODS[0]: "4×4 chips of a v5e, `fsdp=16`",
    PODS[1]: "16×16 chips of a v5e, `fsdp=256`",
    PODS[2]: ("16×16 chips of a v5e, `data=4,fsdp=16,tensor=4`, four rows to every four chips"),
    PODS[3]: "4×8×8 chips of a v5p, `fsdp=256`",
    PODS[4]: "4×8×8 chips of a v5p, `data=4,fsdp=16,tensor=4`",
}
LARGE = [("70b", "v5p", "fsdp=256", "adafactor", None, released) for released in (False, True)]
LIST = [
    *(
        (*pod, *method, released)
        for pod, released, method in itertools.product(PODS, (False, True), OPTIMIZERS)
    ),
    *LARGE,
]
KEY = ("model", "chip", "mesh", "optimizer", "state", "release")


class Options(NamedTuple):
    """The options of this benchmark.

    Attributes:
        only: words that a row must have, such as "v5e fsdp=16 released"; by default all rows.
        output: the JSON file; the plot has the same name.
    """

    only: str = ""
    output: Path = Path(__file__).parent / "results" / "pods.json"


def measure(
    model: str, chip: Any, mesh: str, optimizer: str, state: Any, release: bool
) -> dict[str, Any]:
    """The record of one step: that of `benchmarks.memory`, and the bytes moved between chips.

    For conditionals, the branch that moves least is counted, as in steps between two refreshes;
    "refresh_bytes" counts the branch that moves most, unless the step cannot refresh.
    """
    refresh = optimizer != "galore" or (model, chip, mesh) == PODS[0]
    chips = math.prod(parse_mesh(mesh).values())
    options = memory.Options(
        *(model, optimizer, release),
        **{"state": state, "chip": chip, "mesh": mesh, "batch_size": chips, "refresh": refresh},
    )
    record = memory.measure(optimizer, options)
    return record | {"chips": chips} | versions(("libtpu",)) | moved(record, refresh=refresh)


def moved(record: dict[str, Any], *, refresh: bool) -> dict[str, Any]:
    """The bytes that a step moves; None if the compiler does not tell."""
    size = lambda kinds: kinds and sum(one["bytes"] for one in kinds.values())
    return {
        "collective_bytes": size(record["collectives"]),
        "refresh_bytes": size(record["refresh_collectives"]) if refresh else None,
    }


def key(record: dict[str, Any]) -> tuple[Any, ...]:
    """The fields that identify a row."""
    return tuple(record[name] for name in KEY)


def added(record: dict[str, Any], results: Sequence[dict[str, Any]]) -> float | None:
    """The bytes that an optimizer adds to plain SGD's collectives, as a fraction of these."""
    same = record | {"optimizer": BASELINE, "state": None}
    plain = next((r for r in results if key(r) == key(same)), None)
    if plain is None or None in (record["collective_bytes"], plain["collective_bytes"]):
        return None
    return record["collective_bytes"] / plain["collective_bytes"] - 1


def describe(row: tuple[Any, ...]) -> str:
    """A short description of a row."""
    model, chip, mesh, optimizer, state, release = row
    words = [model, chip, mesh, optimizer, state or "", "released" if release else "ordinary"]
    return " ".join(filter(None, words))


def table(results: Sequence[dict[str, Any]]) -> Table:
    """The records as a table for the terminal."""
    gib = lambda size: "" if size is None else f"{size / GIB:.2f}"
    shown = Table(title="One step on each chip", box=SIMPLE_HEAD)
    shown.add_column("step")
    for column in ("peak GiB", "collectives GiB", "added to sgd", "with a refresh GiB"):
        shown.add_column(column, justify="right")
    for r in results:
        more = added(r, results)
        shown.add_row(
            describe(key(r)),
            gib(r["peak_bytes"]),
            gib(r["collective_bytes"]),
            "" if more is None else f"{100 * more:+.2f}%",
            gib(r["refresh_bytes"]),
        )
    return shown


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the peak, and the bytes moved by each kind of collective, as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.4 + 0.3 * len(results)), layout="constrained")
    peaks, bytes_moved = figure.subplots(1, 2, sharey=True)
    rows = range(len(results))
    peaks.barh(rows, [r["peak_bytes"] / GIB for r in results], color="tab:gray")
    peaks.set_yticks(rows, [describe(key(r)) for r in results])
    peaks.set_xlabel("peak, GiB on a chip")
    left = [0.0] * len(results)
    for kind in hlo.KINDS:
        sizes = [(r["collectives"] or {}).get(kind, {"bytes": 0})["bytes"] / GIB for r in results]
        if any(sizes):
            bytes_moved.barh(rows, sizes, left=left, label=kind)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    bytes_moved.set_xlabel("collectives of a step, GiB on a chip")
    bytes_moved.legend()
    peaks.invert_yaxis()
    figure.savefig(path, dpi=110)


def markdown(report: dict[str, Any]) -> str:
    """The tables for the docs, one for each pod."""
    columns = ("peak GiB", "collectives GiB", "more", "released: peak", "collectives", "more")
    found = {key(r): r for r in report["results"]}
    tables = []
    for pod in PODS:
        rows = []
        for optimizer, state in OPTIMIZERS:
            cells = [f"{optimizer}, {state} state" if state else optimizer]
            for release in (False, True):
                r = found[(*pod, optimizer, state, release)]
                more = added(r, report["results"])
                sizes = (r["peak_bytes"], r["collective_bytes"])
                cells += [f"{size / GIB:.2f}" for size in sizes]
                cells.append("–" if more is None else f"{more:.2%}")
            rows.append(cells)
        tables.append(markdown_table((TITLES[pod], *columns), rows))
    return "\n".join(tables)


def main(arguments: Sequence[str]) -> None:
    """Measures the missing rows, prints all rows and writes the files."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    only_compile()
    wanted = set(options.only.split())
    results: list[dict[str, Any]] = []
    if options.output.exists():
        results = json.loads(options.output.read_text())["results"]
    known, order = set(map(key, results)), list[tuple[Any, ...]](LIST)
    missing = [row for row in LIST if row not in known and wanted <= set(describe(row).split())]
    try:
        for row in track(missing, transient=True):
            results.append(measure(*row))
            results.sort(key=lambda r: order.index(key(r)))
            report = {"command": "python -m benchmarks.pods", "results": results}
            save(report, options.output, lambda path: plot(results, path))
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}")
    Console().print(table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
