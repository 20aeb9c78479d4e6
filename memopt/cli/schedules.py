"""`memopt schedules`: lists and plots the schedules of the learning rate and of the batch."""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.console import Console

from memopt.cli import listing
from memopt.cli.arguments import Names
from memopt.cli.errors import fail, failing
from memopt.errors import check_at_least, check_choice
from memopt.schedules import BATCH_SHAPES, SHAPES, batch_names, names
from memopt.training.config import Config, Optimization, Text
from memopt.training.control import Losses, Plan, Seen
from memopt.training.controllers import CONTROLLERS, controller
from memopt.training.phases import check_shares, follow
from memopt.training.plots import Curve, plot_panels
from memopt.training.writing import why

#: Columns of a curve in the list, and those and the lines of one that is shown alone.
SPARKLINE, WIDE, HIGH = 24, 72, 8

#: What a schedule of each kind counts. Without a controller, a step uses up one batch.
COUNTED = {"learning rate": "step", "batch": "batches used up"}


@dataclasses.dataclass(frozen=True)
class Options:
    """List the schedules, or describe some, and plot them.

    The curves are those of `memopt pretrain` with the same options. The schedules of the learning
    rate are for `--schedule`; those of the batch, ramp and doubling, are the shapes of
    `--controller batch_schedule`, and count the batches that are used up.
    In a file or a pipe, the list has a line for each schedule, with tabs between its columns.

    Attributes:
        names: The schedules to describe; if left out, all are listed.
        steps: Length of the curves.
        peak: Highest learning rate.
        warmup: Share of the steps in which the learning rate rises from 0.
        decay: Share of the steps in which wsd, wsd_exponential, wsd_sqrt and power decay.
        final_learning_rate: Learning rate at the end, as a share of the highest.
        schedule_option: An option of the schedule, such as cycles=3 of restarts or last=16 of
            doubling; with one NAME, whose description lists them.
        batch_size: Rows of a batch, by which power goes.
        seq_len: Tokens of a row, by which power goes.
        plot: Draw the curves into a PNG file: learning rates above batches, if there are both.
        json: Print JSON.
    """

    names: Names = ()
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
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png", help_behavior_hint="")] = None
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
    with failing():
        curves = {name: curve(name, options) for name in chosen}
    if options.plot:
        _plot(curves, options.plot)
    listing.show(
        options.names,
        available,
        describe=describe,
        show_one=lambda name, found, console: _show(name, found, curves[name], console),
        columns=("name", f"{options.steps} steps", "when to choose it"),
        row=lambda name, found: (name, bars(_sampled(curves[name], SPARKLINE))[0], found["when"]),
        as_json=options.json,
    )


def _plot(curves: Mapping[str, np.ndarray], image: Path) -> None:
    """Draws curves into a PNG file, and says so on standard error: the list may go to a pipe."""
    if image.suffix.lower() != ".png":
        fail(f"plot must be a file whose name ends with .png, got {str(image)!r}.")
    panels: dict[str, dict[str, Curve]] = {}
    for name, values in curves.items():
        panels.setdefault(_kind(name), {})[name] = np.arange(len(values)), values, {}
    panels = {kind: panels[kind] for kind in COUNTED if kind in panels}
    try:
        plot_panels(panels, image, x=COUNTED[[*panels][-1]])
    except OSError as error:
        fail(f"plot {str(image)!r} cannot be written ({why(error)}).")
    print(f"memopt: the curves are drawn in {image}", file=sys.stderr)


def _kind(name: str) -> str:
    return "learning rate" if name in SHAPES else "batch"


def describe(name: str) -> dict[str, Any]:
    """Returns what the tables know of a schedule, JSON-serialisable.

    Example:
        >>> restarts = describe("restarts")
        >>> restarts["kind"], restarts["options"]["cycles"]["default"]
        ('learning rate', 4)
    """
    shape = SHAPES.get(name) or BATCH_SHAPES[name]
    options = SHAPES.get(name) or CONTROLLERS["batch_schedule"]
    defaults = {option: x for option, x in options.defaults.items() if option != "shape"}
    return {
        "kind": _kind(name),
        "when": shape.when,
        "source": shape.source,
        "description": _described(shape.make),
        "options": listing.describe_options(defaults, options.help),
    }


def _described(function: Callable) -> str:
    """The paragraphs of a docstring before its arguments, each on a line."""
    text, _, _ = (inspect.getdoc(function) or "").partition("\n\nArgs:")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def curve(name: str, options: Options) -> np.ndarray:
    """Returns the values of a schedule from the first step to the one after the last.

    Schedules of the batch have one for each number of batches that are used up.

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
    config = Config(text=text, optimization=optimization)
    if name in BATCH_SHAPES:
        return _batches(name, config)
    return np.asarray(jax.jit(jax.vmap(follow(config.phases)))(np.arange(options.steps + 1)))


def _batches(name: str, config: Config) -> np.ndarray:
    """The batches of a step by how many are used up, as the controller of a run decides them."""
    for option in config.schedule_options:
        check_choice(f"option of {name}:", option, describe(name)["options"])
    steps, text = config.optimization.steps, config.text
    plan = Plan(steps, 0, 1.0, text.batch_size, 1, {"": 1.0})
    made = controller("batch_schedule", plan, {"shape": name, **config.schedule_options})
    state = made.init()

    def batches(used: int) -> int:
        return made.update(state, Seen(used, used, {}), _no_trial)[1].batches

    return np.array([batches(used) for used in range(steps + 1)])


def _no_trial(learning_rate: float, steps: int, *, validate_every: int | None = None) -> Losses:
    raise NotImplementedError


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
    last = f"{COUNTED[described['kind']]} {len(values) - 1}: {end}"
    console.print(f"{'':>9} 0{last:>{WIDE - 1}}", soft_wrap=True)
    in_a_run = "" if name in SHAPES else " (in a run: --controller-option)"
    listing.print_options(f"--schedule-option{in_a_run}", described["options"], console)
