"""`memopt optimizers`: lists the optimizers."""

import dataclasses

import tyro

from memopt.optimizers import available


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """List the optimizers, for `memopt pretrain --optimizer NAME`."""


def optimizers(arguments: list[str]) -> None:
    """Runs `memopt optimizers` with these arguments."""
    tyro.cli(Options, prog="memopt optimizers", args=arguments)
    print("\n".join(available()))
