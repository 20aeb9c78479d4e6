"""Projectors by their names."""

import inspect
from collections.abc import Callable
from typing import Any

from memopt.errors import check_choice
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


def by_name(projector: Projector | str, size: float, **options: Any) -> Projector:
    """A projector as it is, or the one of this name.

    Args:
      projector: a `Projector`, or the name of a function of `memopt.projectors`.
      size: its rank, or its density; for a name only.
      **options: further arguments, for a name only; those it does not have are left out.

    Raises:
      ValueError: if the name is unknown.

    Example:
      >>> by_name("rademacher", 4, seed=1) == rademacher(4, seed=1)
      True
    """
    if isinstance(projector, Projector):
        return projector
    check_choice("projector", projector, NAMED)
    make = NAMED[projector]
    known = inspect.signature(make).parameters
    return make(size, **{k: v for k, v in options.items() if k in known})
