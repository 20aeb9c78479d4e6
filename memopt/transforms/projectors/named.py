"""Builds projectors by name."""

import inspect
import numbers
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from memopt.errors import check_choice, check_unused
from memopt.transforms.projectors.base import Projector
from memopt.transforms.projectors.fixed import dct, haar
from memopt.transforms.projectors.random import gaussian, orthogonal, rademacher, sparse
from memopt.transforms.projectors.selected import blocks, columns, coordinates
from memopt.transforms.projectors.singular import randomized_svd, svd
from memopt.transforms.projectors.tracked import (
    coap,
    grassmann,
    lazy_svd,
    online_pca,
    power_iteration,
)

NAMED: dict[str, Callable[..., Projector]] = {
    f.__name__: f
    for f in (
        *(gaussian, rademacher, sparse, orthogonal),
        *(svd, randomized_svd, online_pca, power_iteration),
        *(columns, coordinates, blocks, dct, haar),
        *(lazy_svd, coap, grassmann),
    )
}


def by_name(
    projector: Projector | str,
    of: Callable[..., Any],
    *,
    known: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Projector:
    """Returns a given projector unchanged, or builds one by name.

    Args:
        projector: a `Projector`, or the name of a function of `memopt.projectors`.
        of: the function whose arguments `options` are.
        known: further arguments, ignored if the projector's function does not have them.
        **options: `rank` or `density`, and other arguments of the projector's function. Those that
            it does not have, and all if a `Projector` is given, must be at the defaults of `of`.

    Raises:
        ValueError: if the name is unknown, or an option has no effect.

    Example:
        >>> def method(rank=0.25, seed=0): ...
        >>> by_name("rademacher", method, rank=4, seed=1) == rademacher(4, seed=1)
        True
        >>> by_name("svd", method, rank=4, seed=1)
        Traceback (most recent call last):
        ValueError: seed must be left out, since projector 'svd' does not take it, got 1.
    """
    size = "density" if "density" in options else "rank"
    if isinstance(projector, Projector):
        if isinstance(options[size], numbers.Real) and options[size] == projector.rank:
            del options[size]
        check_unused(of, "the projector given has its own", **options)
        return projector
    check_choice("projector", projector, NAMED)
    make, rank = NAMED[projector], options.pop(size)
    takes = inspect.signature(make).parameters
    unused = {name: value for name, value in options.items() if name not in takes}
    check_unused(of, f"projector {projector!r} does not take it", **unused)
    options = {**known, **options}
    return make(rank, **{name: value for name, value in options.items() if name in takes})
