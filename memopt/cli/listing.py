"""Lists of optimizers, schedules and controllers to choose by name, and tables of their options."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from memopt.cli.errors import failing
from memopt.errors import check_choice

#: Columns of what is shown, also in a wider terminal.
WIDTH = 100


def choose(kind: str, given: Iterable[str], available: Sequence[str]) -> None:
    """Ends the command with a sentence if a given name is unknown.

    Args:
        kind: What is named, such as "optimizer".
        given: The given names.
        available: Those that are known.
    """
    with failing():
        for name in given:
            check_choice(kind, name, available)


def show(
    given: Sequence[str],
    available: Sequence[str],
    *,
    describe: Callable[[str], dict[str, Any]],
    show_one: Callable[[str, dict[str, Any], Console], None],
    columns: Sequence[str],
    row: Callable[[str, dict[str, Any]], Sequence[str]],
    as_json: bool,
) -> None:
    """Prints the descriptions of the given names or, without one, the list of all.

    JSON of one name is its description, otherwise an object of them by name.

    Args:
        given: The names to describe; see `choose`.
        available: All names.
        describe: Maps a name to its description, JSON-serialisable.
        show_one: Prints a description.
        columns: Titles of the columns of the list.
        row: Makes a row of the list.
        as_json: Whether to print JSON.
    """
    described = {name: describe(name) for name in given or available}
    console = make_console()
    if as_json:
        shown = described[given[0]] if len(given) == 1 else described
        print(json.dumps(shown, indent=2, ensure_ascii=False))
    elif given:
        for name, found in described.items():
            if name != given[0]:
                console.print()
            show_one(name, found, console)
    else:
        print_list(columns, [row(name, found) for name, found in described.items()], console)


def describe_options(
    defaults: Mapping[str, Any], help: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Returns options with their defaults and descriptions, JSON-serialisable.

    Args:
        defaults: The default of each option.
        help: Their descriptions; may be incomplete.

    Example:
        >>> describe_options({"rank": 4, "projector": max}, {"rank": "the rank."})["projector"]
        {'default': 'max', 'help': ''}
    """
    return {
        option: {"default": _plain(default), "help": help.get(option, "")}
        for option, default in defaults.items()
    }


def _plain(x: Any) -> Any:
    if x is None or isinstance(x, bool | int | float | str):
        return x
    return getattr(x, "__name__", None) or repr(x)


def make_console() -> Console:
    """Returns a console that shows text as it is, no wider than `WIDTH`."""
    console = Console(highlight=False, markup=False)
    console.width = min(console.width, WIDTH)
    return console


def print_list(columns: Sequence[str], rows: Iterable[Sequence[str]], console: Console) -> None:
    """Prints a table whose last column is wrapped.

    In a file or a pipe, each row is a line with tabs between its columns, without a header.

    Args:
        columns: Titles of the columns.
        rows: A text for each column.
        console: Where to print it.
    """
    if not console.is_terminal:
        for row in rows:
            print("\t".join(row))
        return
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column != columns[-1])
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_options(flag: str, options: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Prints a table of options, as `describe_options` returns them, if there are any.

    Args:
        flag: The flag that takes them, such as "--option".
        options: The options.
        console: Where to print it.
    """
    if not options:
        return
    console.print(f"\noptions, as {flag} NAME=VALUE for numbers, words, True, False and None:")
    table = Table(box=None, pad_edge=False)
    for column in ("name", "default", "meaning"):
        table.add_column(column, no_wrap=column == "name")
    for option, found in options.items():
        table.add_row(option, str(found["default"]), found["help"])
    console.print(table)
