"""`memopt controllers`: lists the controllers, which decide between steps how a run goes on."""

import dataclasses
import json
from typing import Annotated, Any

import tyro

from memopt.cli import listing
from memopt.docstrings import argument_help
from memopt.training.controllers import CONTROLLERS


@dataclasses.dataclass(frozen=True)
class Options:
    """List the controllers, for `--controller`, or describe one and its `--controller-option`s.

    A controller sees the metrics of each step, and may change the learning rate, the batch or the
    mixture of the data.
    In a file or a pipe, the list has a line for each controller, with tabs between its columns.

    Attributes:
        name: The controller to describe; if left out, all are listed.
        json: Print JSON.
    """

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME")] = None
    json: bool = False


def controllers(arguments: list[str]) -> None:
    """Runs `memopt controllers` with these arguments."""
    config = (tyro.conf.FlagCreatePairsOff,)
    options = tyro.cli(Options, prog="memopt controllers", args=arguments, config=config)
    names = sorted(CONTROLLERS) if options.name is None else [options.name]
    listing.choose("controller", names, sorted(CONTROLLERS))
    described = {name: describe(name) for name in names}
    console = listing.make_console()
    if options.json:
        print(json.dumps(described if options.name is None else described[options.name], indent=2))
    elif options.name is not None:
        console.print(f"{options.name}: {described[options.name]['when']}")
        listing.print_options("--controller-option", described[options.name]["options"], console)
    else:
        rows = [(name, found["when"]) for name, found in described.items()]
        listing.print_list(("name", "when to choose it"), rows, console)


def describe(name: str) -> dict[str, Any]:
    """Returns what the table knows of a controller, JSON-serialisable.

    Example:
        >>> describe("autolrs")["options"]["candidates"]
        {'default': 10, 'help': 'Learning rates that are tried before a stage.'}
    """
    entry = CONTROLLERS[name]
    options = listing.describe_options(entry.defaults, argument_help(entry.make))
    return {"when": entry.when, "options": options}
