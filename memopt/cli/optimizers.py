"""`memopt optimizers`: what can be trained with, and when to choose it."""

import dataclasses
import json
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from memopt.cli.errors import fail
from memopt.errors import check_choice
from memopt.optimizers import available
from memopt.optimizers.registry import EXTRA_ARGUMENTS, METHODS

#: Columns of what is shown, also in a wider terminal.
WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Options:
    """List the optimizers, for `--optimizer`, or describe one and its options, for `--option`.

    The state is in numbers for an m×n matrix with the sides p ≤ q; r is the rank and ρ the density.
    In a file or a pipe, the list has a line for each optimizer, with tabs between its columns.

    Attributes:
        name: The optimizer to describe; if left out, all are listed.
        json: Print JSON.
    """

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME")] = None
    json: bool = False


def optimizers(arguments: list[str]) -> None:
    """Runs `memopt optimizers` with these arguments."""
    config = (tyro.conf.FlagCreatePairsOff,)
    options = tyro.cli(Options, prog="memopt optimizers", args=arguments, config=config)
    if options.name is not None:
        try:
            check_choice("optimizer", options.name, available())
        except ValueError as error:
            fail(error)
    names = available() if options.name is None else (options.name,)
    described = {name: describe(name) for name in names}
    if options.json:
        print(json.dumps(described if options.name is None else described[options.name], indent=2))
        return
    console = Console(highlight=False, markup=False)
    console.width = min(console.width, WIDTH)
    if options.name is not None:
        _show(options.name, described[options.name], console)
    elif console.is_terminal:
        table = Table(box=None, pad_edge=False)
        for column in ("name", "state", "rate", "when to choose it"):
            table.add_column(column, no_wrap=column != "when to choose it")
        for row in _rows(described):
            table.add_row(*row)
        console.print(table)
    else:
        for row in _rows(described):
            print("\t".join(row))


def describe(name: str) -> dict[str, Any]:
    """Returns what the registry knows of an optimizer, JSON-serialisable.

    Example:
        >>> lion = describe("lion")
        >>> lion["state"], lion["options"]["b2"]
        ('mn', {'default': 0.99, 'help': 'the decay of the momentum.'})
    """
    method = METHODS[name]
    plain = lambda x: x if x is None or isinstance(x, bool | int | float | str) else _called(x)
    return {
        "library": method.library,
        "state": method.state,
        "learning_rate": method.learning_rate,
        "when": method.when,
        "needs": EXTRA_ARGUMENTS.get(method.needs, ""),
        "options": {
            option: {"default": plain(default), "help": method.help.get(option, "")}
            for option, default in method.defaults.items()
        },
    }


def _called(x: Any) -> str:
    return getattr(x, "__name__", None) or repr(x)


def _rows(described: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (name, x["state"], f"{x['learning_rate']:g}", x["when"]) for name, x in described.items()
    ]


def _show(name: str, described: dict[str, Any], console: Console) -> None:
    console.print(f"{name}: {described['when']}")
    console.print(f"numbers for an m×n matrix: {described['state']}")
    console.print(f"default learning rate: {described['learning_rate']:g}")
    if described["needs"]:
        console.print(f"needs {described['needs']}, which the training step passes")
    console.print("\noptions, as --option NAME=VALUE for numbers, words, True, False and None:")
    table = Table(box=None, pad_edge=False)
    for column in ("name", "default", "meaning"):
        table.add_column(column, no_wrap=column == "name")
    for option, found in described["options"].items():
        table.add_row(option, str(found["default"]), found["help"])
    console.print(table)
