"""`memopt optimizers`: what can be trained with, and when to choose it."""

import dataclasses
from typing import Any

import tyro
from rich.console import Console

from memopt.cli import listing
from memopt.cli.arguments import Names
from memopt.optimizers import available
from memopt.optimizers.registry import EXTRA_ARGUMENTS, METHODS


@dataclasses.dataclass(frozen=True)
class Options:
    """List the optimizers, for `--optimizer`, or describe some and their options, for `--option`.

    The state is in numbers for an m×n matrix with the sides p ≤ q; r is the rank and ρ the density.
    In a file or a pipe, the list has a line for each optimizer, with tabs between its columns.

    Attributes:
        names: The optimizers to describe; if left out, all are listed.
        json: Print JSON.
    """

    names: Names = ()
    json: bool = False


def optimizers(arguments: list[str]) -> None:
    """Runs `memopt optimizers` with these arguments."""
    config = (tyro.conf.FlagCreatePairsOff,)
    options = tyro.cli(Options, prog="memopt optimizers", args=arguments, config=config)
    listing.choose("optimizer", options.names, available())
    listing.show(
        options.names,
        available(),
        describe=describe,
        show_one=_show,
        columns=("name", "state", "rate", "when to choose it"),
        row=lambda name, x: (name, x["state"], f"{x['learning_rate']:g}", x["when"]),
        as_json=options.json,
    )


def describe(name: str) -> dict[str, Any]:
    """Returns what the registry knows of an optimizer, JSON-serialisable.

    Example:
        >>> lion = describe("lion")
        >>> lion["state"], lion["options"]["b2"]
        ('mn', {'default': 0.99, 'help': 'the decay of the momentum.'})
    """
    method = METHODS[name]
    return {
        "library": method.library,
        "state": method.state,
        "learning_rate": method.learning_rate,
        "when": method.when,
        "needs": EXTRA_ARGUMENTS.get(method.needs, ""),
        "options": listing.describe_options(method.defaults, method.help),
    }


def _show(name: str, described: dict[str, Any], console: Console) -> None:
    console.print(f"{name}: {described['when']}")
    console.print(f"numbers for an m×n matrix: {described['state']}")
    console.print(f"default learning rate: {described['learning_rate']:g}")
    if described["needs"]:
        console.print(f"needs {described['needs']}, which the training step passes")
    listing.print_options("--option", described["options"], console)
