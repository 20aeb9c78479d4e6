"""Arguments that several commands have."""

from typing import Annotated, Literal

from tyro import conf

#: The checkpoint of a run to read.
Step = Annotated[
    Literal["best", "last"] | int,
    conf.arg(
        metavar="{best,last,INT}",
        help="Of a run: best (by validation loss), last, or the number of a step that has a "
        "checkpoint.",
    ),
]
