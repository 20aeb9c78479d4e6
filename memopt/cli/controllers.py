"""`memopt controllers`: lists the controllers, which decide between steps how a run goes on."""

import dataclasses
import inspect
from typing import Any

import tyro
from rich.console import Console

from memopt.cli import listing
from memopt.cli.arguments import Names
from memopt.training.controllers import CONTROLLERS


@dataclasses.dataclass(frozen=True)
class Options:
    """List the controllers, for `--controller`, or describe some and their `--controller-option`s.

    A controller sees the metrics of each step, and may change the learning rate, the batch or the
    mixture of the data.
    In a file or a pipe, the list has a line for each controller, with tabs between its columns.

    Attributes:
        names: The controllers to describe; if left out, all are listed.
        json: Print JSON.
    """

    names: Names = ()
    json: bool = False


def controllers(arguments: list[str]) -> None:
    """Runs `memopt controllers` with these arguments."""
    config = (tyro.conf.FlagCreatePairsOff,)
    options = tyro.cli(Options, prog="memopt controllers", args=arguments, config=config)
    listing.choose("controller", options.names, sorted(CONTROLLERS))
    listing.show(
        options.names,
        sorted(CONTROLLERS),
        describe=describe,
        show_one=_show,
        columns=("name", "when to choose it"),
        row=lambda name, found: (name, found["when"]),
        as_json=options.json,
    )


def describe(name: str) -> dict[str, Any]:
    """Returns what the table knows of a controller, JSON-serialisable.

    Example:
        >>> describe("autolrs")["options"]["candidates"]
        {'default': 10, 'help': 'Learning rates that are tried before a stage.'}
    """
    choice = CONTROLLERS[name]
    options = listing.describe_options(choice.defaults, choice.help)
    summary = (inspect.getdoc(choice.make) or "").partition("\n\n")[0]
    return {
        "summary": " ".join(summary.split()),
        "when": choice.when,
        "source": choice.source,
        "needs": choice.needs,
        "options": options,
    }


def _show(name: str, described: dict[str, Any], console: Console) -> None:
    console.print(f"{name}: {described['when']}")
    console.print(described["summary"])
    for what in ("needs", "source"):
        if described[what]:
            console.print(f"{what} {described[what]}")
    listing.print_options("--controller-option", described["options"], console)
