"""Projectors by their names."""

import inspect
import numbers
from collections.abc import Callable, Collection
from typing import Any

from jax import Array

from memopt.errors import check_choice, check_left_out
from memopt.transforms.projectors.base import Projector
from memopt.transforms.projectors.random import gaussian, orthogonal, rademacher, sparse
from memopt.transforms.projectors.selected import blocks, columns, coordinates
from memopt.transforms.projectors.singular import randomized_svd, svd
from memopt.transforms.projectors.tracked import online_pca, power_iteration

NAMED: dict[str, Callable[..., Projector]] = {
    f.__name__: f
    for f in (
        *(gaussian, rademacher, sparse, orthogonal),
        *(svd, randomized_svd, online_pca, power_iteration),
        *(columns, coordinates, blocks),
    )
}


def by_name(
    projector: Projector | str,
    size: float = 0.25,
    *,
    seed: int | Array = 0,
    rho: float = 0.908,
    **others: Any,
) -> Projector:
    """Returns a projector as it is, or makes the one of this name.

    Args:
      projector: a `Projector`, or the name of a function of `memopt.projectors`.
      size: its rank, or its density.
      seed: of a random projector.
      rho: of `memopt.projectors.power_iteration`.
      **others: further arguments; left out where the function does not have them.

    Raises:
      ValueError: if the name is unknown; or if `size`, `seed` or `rho` is neither its default nor
        used: a `Projector` has its own, and not every named one has a seed or a rho.

    Example:
      >>> by_name("rademacher", 4, seed=1) == rademacher(4, seed=1)
      True
      >>> by_name("svd", 4, seed=1)
      Traceback (most recent call last):
      ValueError: seed must be left out, since projector 'svd' does not take it, got 1.
    """
    known: Collection[str] = ()
    why = "the projector given has its own"
    if isinstance(projector, Projector):
        if not (isinstance(size, numbers.Real) and size == projector.rank):
            check_left_out("rank or density", size, 0.25, why)
    else:
        check_choice("projector", projector, NAMED)
        known = inspect.signature(NAMED[projector]).parameters
        why = f"projector {projector!r} does not take it"
    for name, given, default in (("seed", seed, 0), ("rho", rho, 0.908)):
        if name not in known:
            check_left_out(name, given, default, why)
    if isinstance(projector, Projector):
        return projector
    options = {"seed": seed, "rho": rho, **others}
    return NAMED[projector](size, **{k: v for k, v in options.items() if k in known})
