"""`memopt schedules`: lists and plots the schedules of the learning rate and of the batch."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.console import Console

from memopt.cli import listing
from memopt.cli.errors import fail
from memopt.docstrings import argument_help, keyword_defaults
from memopt.errors import check_at_least
from memopt.schedules import BATCH_SHAPES, SHAPES, batch_names, batch_schedule, names
from memopt.training.config import Config, Optimization, Text
from memopt.training.phases import check_shares, follow
from memopt.training.plots import Curve, plot_panels
from memopt.training.writing import why

#: Columns of a curve in the list, and those and the lines of one that is shown alone.
SPARKLINE, WIDE, HIGH = 24, 72, 8

#: Batches of a step at the end of the curves of batches, which begin with one.
LAST_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """List the schedules, for `--schedule`, or describe some and plot them.

    The curves are those of `memopt pretrain` with the same options. The schedules of the batch are
    for `--controller batch_schedule`. In a file or a pipe, the list has a line for each schedule,
    with tabs between its columns.

    Attributes:
        names: The schedules to describe; if left out, all are listed.
        steps: Length of the curves.
        peak: Highest learning rate.
        warmup: Share of the steps in which the learning rate rises from 0.
        decay: Share of the steps in which wsd, wsd_exponential, wsd_sqrt and power decay.
        final_learning_rate: Learning rate at the end, as a share of the highest.
        schedule_option: Argument of a schedule, such as cycles=3, with one NAME.
        batch_size: Rows of a batch, by which power goes.
        seq_len: Tokens of a row, by which power goes.
        plot: Draw the curves into a PNG: learning rates above batches, if there are both.
        json: Print JSON.
    """

    names: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME ...")] = ()
    steps: int = 1000
    peak: float = 5e-3
    warmup: float = 0.1
    decay: float = 0.2
    final_learning_rate: float = 0.1
    schedule_option: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")
    ] = ()
    batch_size: int = 8
    seq_len: int = 128
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    json: bool = False


def schedules(arguments: list[str]) -> None:
    """Runs `memopt schedules` with these arguments."""
    config = (tyro.conf.FlagCreatePairsOff,)
    options = tyro.cli(Options, prog="memopt schedules", args=arguments, config=config)
    available = (*names(), *batch_names())
    listing.choose("schedule", options.names, available)
    chosen = options.names or available
    if options.schedule_option and len(chosen) > 1:
        fail("schedule_option belongs to one schedule: give its NAME alone.")
    try:
        curves = {name: curve(name, options) for name in chosen}
    except ValueError as error:
        fail(error)
    described = {name: describe(name) for name in chosen}
    if options.plot:
        panels: dict[str, dict[str, Curve]] = {}
        for name in sorted(chosen, key=available.index):
            panel = panels.setdefault(described[name]["kind"], {})
            panel[name] = np.arange(len(curves[name])), curves[name], {}
        try:
            plot_panels(panels, options.plot, x="step")
        except OSError as error:
            fail(f"plot {str(options.plot)!r} cannot be written ({why(error)}).")
    console = listing.make_console()
    if options.json:
        shown = described[chosen[0]] if len(options.names) == 1 else described
        print(json.dumps(shown, indent=2, ensure_ascii=False))
    elif options.names:
        for name in chosen:
            _show(name, described[name], curves[name], console)
    else:
        rows = [
            (name, bars(_sampled(curves[name], SPARKLINE))[0], found["when"])
            for name, found in described.items()
        ]
        listing.print_list(("name", f"{options.steps} steps", "when to choose it"), rows, console)


def describe(name: str) -> dict[str, Any]:
    """Returns what the tables know of a schedule, JSON-serialisable.

    Example:
        >>> restarts = describe("restarts")
        >>> restarts["kind"], restarts["options"]["cycles"]["default"]
        ('learning rate', 4)
    """
    shape = SHAPES.get(name) or BATCH_SHAPES[name]
    return {
        "kind": "learning rate" if name in SHAPES else "batch",
        "when": shape.when,
        "source": shape.source,
        "description": _described(shape.make),
        "options": listing.describe_options(
            keyword_defaults(shape.make), argument_help(shape.make)
        ),
    }


def _described(function: Callable) -> str:
    """The paragraphs of a docstring before its arguments, each on a line."""
    text, _, _ = (inspect.getdoc(function) or "").partition("\n\nArgs:")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def curve(name: str, options: Options) -> np.ndarray:
    """Returns the values of a schedule from the first step to the one after the last.

    Args:
        name: Its name.
        options: What a run with it would have.

    Raises:
        ValueError: An option cannot work.

    Example:
        >>> curve("linear", Options(steps=4, peak=1.0, warmup=0.5, final_learning_rate=0))
        array([0. , 0.5, 1. , 0.5, 0. ], dtype=float32)
    """
    for argument, least in (("steps", 1), ("peak", 0), ("batch_size", 1), ("seq_len", 1)):
        check_at_least(argument, getattr(options, argument), least)
    counts = np.arange(options.steps + 1)
    if name in BATCH_SHAPES:
        if options.schedule_option:
            raise ValueError(f"schedule_option must be left out: {name!r} has no options.")
        batches = batch_schedule(name, 1, LAST_BATCH, options.steps)
        return np.array([batches(int(count)) for count in counts])
    optimization = Optimization(
        schedule=name,
        schedule_option=options.schedule_option,
        learning_rate=options.peak,
        steps=options.steps,
        warmup=options.warmup,
        decay=options.decay,
        final_learning_rate=options.final_learning_rate,
    )
    check_shares(optimization)
    text = Text(batch_size=options.batch_size, seq_len=options.seq_len)
    rate = follow(Config(text=text, optimization=optimization).phases)
    return np.asarray(jax.jit(jax.vmap(rate))(counts))


def bars(values: Sequence[float] | np.ndarray, lines: int = 1) -> list[str]:
    r"""Draws values of at least 0 as columns, relative to the highest one.

    Args:
        values: One for each column.
        lines: How high the highest is.

    Example:
        >>> bars([0, 1, 2, 3, 4, 5, 6, 7, 8])
        [' ▁▂▃▄▅▆▇█']
        >>> print("|" + "|\n|".join(bars([1, 4, 2], lines=2)) + "|")
        | █ |
        |▄██|
    """
    eighths = np.rint(8 * lines * np.asarray(values) / (np.max(values) or 1)).astype(int)
    return [
        "".join(" ▁▂▃▄▅▆▇█"[height] for height in np.clip(eighths - 8 * line, 0, 8))
        for line in reversed(range(lines))
    ]


def _sampled(values: np.ndarray, columns: int) -> np.ndarray:
    return values[np.linspace(0, len(values) - 1, columns).round().astype(int)]


def _show(name: str, described: dict[str, Any], values: np.ndarray, console: Console) -> None:
    console.print(f"{name}, a schedule of the {described['kind']}: {described['when']}\n")
    console.print(described["description"])
    if described["source"]:
        console.print(f"\nsource: {described['source']}", soft_wrap=True)
    top, end = f"{values.max():.3g}", f"{values[-1]:.3g}"
    console.print()
    for line, text in enumerate(bars(_sampled(values, WIDE), HIGH)):
        console.print(f"{top if line == 0 else '':>9} {text}", soft_wrap=True)
    last = f"step {len(values) - 1}: {end}"
    console.print(f"{'':>9} 0{last:>{WIDE - 1}}", soft_wrap=True)
    listing.print_options("--schedule-option", described["options"], console)
    console.print()
