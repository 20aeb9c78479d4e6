"""`memopt plan --fit`: searches for what fits, with their progress and their tables."""

import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from memopt.cli.listing import make_console
from memopt.cli.plan_view import show, show_progress, shown
from memopt.optimizers.registry import find_method
from memopt.planning.fit import (
    RELEASES,
    STATES,
    STORAGES,
    Edge,
    Row,
    count_rows,
    fit_batch_size,
    fit_mesh,
    fit_optimizer,
)
from memopt.planning.plan import Plan

if TYPE_CHECKING:
    from memopt.cli.plan import Options


#: Explains a plan without a compiler in a table.
UNCOMPILED = "With '>' weights and state alone exceed the chip: the step was not compiled."


def search(options: "Options") -> None:
    """Searches, and prints what was found.

    Raises:
        ValueError: The options cannot work together, or with this search.
    """
    arguments = options.arguments()
    arguments["plan"] = functools.partial(
        options.planner(), cache=arguments.pop("cache"), skip_misfits=True
    )
    if options.fit == "optimizer":
        _search_optimizers(options, arguments)
    else:
        _search_edge(options, arguments)


def _search_edge(options: "Options", arguments: dict[str, Any]) -> None:
    """The largest batch or the smallest mesh."""
    if options.fit == "batch-size":
        if "batch_size" in arguments:
            raise ValueError("--batch-size must be left out with --fit batch-size, which finds it.")
        find: Callable[..., Edge[Any]] = fit_batch_size
    else:
        if "batch_size" not in arguments:
            raise ValueError("--fit mesh needs --batch-size, the rows over all devices.")
        find = fit_mesh
    with show_progress(total=None) as (working, done):
        edge = find(**arguments, progress=working, report=done)
    if options.json:
        plans = {str(name): found.to_json() for name, found in edge.planned.items()}
        result = {"fit": options.fit, "fits": edge.fits, "exceeds": edge.exceeds, "plans": plans}
        print(json.dumps(result | {"failed": edge.failed}))
        return
    console = make_console()
    console.print(edge_table(options.fit or "", edge))
    if not all(found.compiler for found in edge.planned.values()):
        console.print(UNCOMPILED)
    for name, words in edge.failed.items():
        console.print(f"the compiler fails on {name}, which counts as not fitting: {words}")
    console.print(describe(options.fit or "", edge))
    if edge.fits is not None:
        console.print()
        show(edge.planned[edge.fits], console)


def edge_table(name: str, edge: Edge[Any]) -> Table:
    """The plans that a search made, in order of the batch or the mesh."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(name, justify="right")
    for column in ("peak", "of weights", "of state", "of the rest", "fits"):
        table.add_column(column, justify="right")
    order = sorted(edge.planned.items(), key=lambda one: (one[1].devices, one[0]))
    for value, found in order:
        rest = found.peak_bytes - found.parameter_bytes - found.state_bytes
        table.add_row(
            *(str(value), _peak(found), shown(found.parameter_bytes), shown(found.state_bytes)),
            *(shown(rest) if found.compiler else "", _margin(found)),
        )
    return table


def describe(name: str, edge: Edge[Any]) -> str:
    """Says what a search found, and what it assumed, in a sentence.

    Example:
        >>> describe("batch-size", Edge(6, 7, {}, {}))
        'The largest batch that fits is 6; 7 does not fit. All smaller ones are assumed to fit.'
        >>> describe("mesh", Edge(None, "fsdp=4", {}, {}))
        'No mesh fits, up to fsdp=4, the largest that divides the rows.'
    """
    what = "largest batch" if name == "batch-size" else "smallest mesh"
    if edge.fits is None:
        if name == "batch-size":
            return f"No batch fits: the smallest, {edge.exceeds}, does not."
        return f"No mesh fits, up to {edge.exceeds}, the largest that divides the rows."
    text = f"The {what} that fits is {edge.fits}"
    if edge.exceeds is None:
        most = "largest that was to be tried" if name == "batch-size" else "smallest there is"
        return f"{text}, the {most}."
    others = "smaller" if name == "batch-size" else "larger"
    return f"{text}; {edge.exceeds} does not fit. All {others} ones are assumed to fit."


def _search_optimizers(options: "Options", arguments: dict[str, Any]) -> None:
    """The table of all optimizers; what is given of state, weights and release restricts it."""
    if options.option:
        raise ValueError("--option goes with one optimizer, not with --fit optimizer.")
    if options.optimizer:
        raise ValueError("--optimizer must be left out with --fit optimizer; see --optimizers.")
    for name in options.optimizers:
        find_method(name)
    for name in ("state", "weights", "release"):
        arguments.pop(name, None)
    chosen: dict[str, Any] = {
        "optimizers": options.optimizers or None,
        "states": (options.state,) if options.state else STATES,
        "storages": (options.weights,) if options.weights else STORAGES,
        "releases": (True,) if options.release else RELEASES,
    }
    with show_progress(total=count_rows(**chosen)) as (working, done):
        processes = 1 if options.processes is None else options.processes
        if processes == 1:  # another process cannot say what it works on
            arguments["progress"] = working
        rows = fit_optimizer(**arguments, **chosen, processes=processes, report=done)
    if options.json:
        print(json.dumps([_row_json(row) for row in rows]))
        return
    console = make_console()
    console.print(optimizer_table(rows))
    console.print(explain(rows))
    refused = [row for row in rows if row.plan is None]
    for reason in dict.fromkeys(row.refused for row in refused):
        names = dict.fromkeys(row.options["optimizer"] for row in refused if row.refused == reason)
        console.print(f"cannot be planned: {', '.join(names)}: {reason}")
    first = next(row.plan for row in rows if row.plan)
    for note in first.notes:
        console.print(f"note {note}")


def optimizer_table(rows: list[Row]) -> Table:
    """The rows that could be planned, in their order; 80 columns hold a row on one line."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("optimizer", "weights", "state", "released"):
        table.add_column(column, no_wrap=True)
    for column in ("peak", "state", "traffic", "left"):
        table.add_column(f"{column}\nGiB", justify="right", no_wrap=True)
    for row in rows:
        if found := row.plan:
            options = row.options
            left = "refused" if found.margin_bytes >= 0 and not found.fits else ""
            table.add_row(
                options["optimizer"],
                options["weights"] or "",
                options["state"] or "",
                "yes" if options["release"] else "",
                f"{'' if found.compiler else '>'}{gib(found.peak_bytes)}",
                gib(found.state_bytes),
                "" if found.traffic_bytes is None else gib(found.traffic_bytes),
                left or gib(found.margin_bytes),
            )
    return table


def explain(rows: list[Row]) -> str:
    """Says how many rows of the table fit, and how to read it.

    Example:
        >>> from types import SimpleNamespace
        >>> fits = lambda fits, name: Row({}, SimpleNamespace(fits=fits, compiler=name))
        >>> explain([fits(True, "libtpu"), fits(False, "libtpu")])
        '1 of 2 fit. Bytes are those of one device; what is left is below 0 if it does not fit.'
    """
    plans = [row.plan for row in rows if row.plan]
    text = (
        f"{sum(found.fits for found in plans)} of {len(plans)} fit. Bytes are those of one device; "
        "what is left is below 0 if it does not fit."
    )
    if all(found.compiler for found in plans):
        return text
    return f"{text} {UNCOMPILED}"


def gib(size: int) -> str:
    """A number of bytes in GiB, without the unit.

    Example:
        >>> [gib(int(x * 2**30)) for x in (1234.5, 12.345, 0.0012345, -3.21)]
        ['1234', '12.3', '0.00123', '-3.21']
    """
    number = size / 2**30
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def _row_json(row: Row) -> dict[str, Any]:
    found = row.plan.to_json() if row.plan else {"refused": row.refused}
    return dict(row.options) | found


def _peak(found: Plan) -> str:
    return f"{'' if found.compiler else '> '}{shown(found.peak_bytes)}"


def _margin(found: Plan) -> str:
    if found.fits:
        return f"{shown(found.margin_bytes)} left"
    if not found.compiler:
        return f"no, >{shown(-found.margin_bytes)} short"
    return f"no, {shown(-found.margin_bytes)} short" if found.margin_bytes < 0 else "no"
