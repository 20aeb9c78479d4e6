"""Arguments that several commands have."""

from typing import Annotated, Literal

from tyro import conf

#: The names of what a command describes; without one, it lists all.
Names = Annotated[
    conf.Positional[tuple[str, ...]], conf.arg(metavar="[NAME ...]", help_behavior_hint="")
]

#: The checkpoint of a run to read.
Step = Annotated[
    Literal["best", "last"] | int,
    conf.arg(
        metavar="{best,last,INT}",
        help="Of a run: best (by validation loss), last, or the number of a step that has a "
        "checkpoint.",
    ),
]
