"""Projector × recombination × inner optimizer: every pairing, and the bytes that it keeps."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import memopt
from memopt import projectors, recombine

RANK = 4


class Space(NamedTuple):
    """A projector, and for a stack of k matrices m×n the shape of R and the numbers it keeps."""

    make: Callable[[], Any]
    low: Callable[[int, int, int], tuple[int, int, int]]
    keeps: Callable[[int, int, int], int]
    on_refresh: Any = "keep"
    refresh_every: int = 3


class Inner(NamedTuple):
    """An inner optimizer, and the numbers it keeps for a matrix and for a vector."""

    make: Callable[[], Any]
    matrix: Callable[[int, int, int], int]
    vector: Callable[..., int]


class Rule(NamedTuple):
    """A recombination, and the numbers it keeps."""

    make: Callable[[], Any]
    keeps: Callable[[int, int, int], int]


dense = lambda k, m, n: (k, RANK, n) if m <= n else (k, m, RANK)
once = lambda *shape: math.prod(shape)
twice = lambda *shape: 2 * math.prod(shape)
nothing = lambda k, m, n: 0
basis = lambda k, m, n: k * RANK * min(m, n)
limiter = memopt.GrowthLimiter(1.01)
adam = memopt.CarryOver(0.9, 0.999)

PROJECTORS = {
    "gaussian": Space(lambda: projectors.gaussian(RANK), dense, nothing, "carry"),
    "rademacher": Space(lambda: projectors.rademacher(RANK), dense, nothing, "reset"),
    "sparse": Space(lambda: projectors.sparse(RANK), dense, nothing, "reset_moments"),
    "orthogonal": Space(
        lambda: projectors.orthogonal(RANK), dense, lambda k, m, n: RANK * min(m, n), adam
    ),
    "svd": Space(lambda: projectors.svd(RANK), dense, basis),
    "randomized_svd": Space(lambda: projectors.randomized_svd(RANK), dense, basis, adam),
    "online_pca": Space(
        lambda: projectors.online_pca(RANK), dense, lambda k, m, n: 3 * basis(k, m, n) + 1
    ),
    "power_iteration": Space(
        lambda: projectors.power_iteration(RANK, b1=0.9), dense, basis, adam, 1
    ),
    "columns": Space(
        lambda: projectors.columns(0.25),
        lambda k, m, n: (k, math.ceil(m / 4), n),
        nothing,
        "carry",
    ),
    "coordinates": Space(
        lambda: projectors.coordinates(0.5),
        lambda k, m, n: (k, math.ceil(m / 2), n),
        nothing,
        "reset",
    ),
    "blocks": Space(
        lambda: projectors.blocks(0.5),
        lambda k, m, n: (math.ceil(k / 2), m, n),
        nothing,
        "reset",
    ),
    "dct": Space(lambda: projectors.dct(RANK), dense, lambda k, m, n: k * RANK, adam),
    "haar": Space(
        lambda: projectors.haar(0.125), lambda k, m, n: (k, math.ceil(m / 8), n), nothing
    ),
    "lazy_svd": Space(
        lambda: projectors.lazy_svd(RANK), dense, lambda k, m, n: basis(k, m, n) + 6 * k, "carry"
    ),
    "coap": Space(lambda: projectors.coap(RANK, recalibrate_every=2), dense, basis, "carry", 1),
    "grassmann": Space(lambda: projectors.grassmann(RANK), dense, basis, adam, 1),
}
INNERS = {
    "adam": Inner(optax.scale_by_adam, twice, twice),
    "lion": Inner(memopt.scale_by_sign_momentum, once, once),
    "momentum": Inner(lambda: optax.trace(0.9), once, once),
    "muon": Inner(lambda: optax.chain(optax.trace(0.9), memopt.orthogonalize()), once, once),
    "adafactor": Inner(memopt.scale_by_factored_matrix_rms, lambda k, m, n: k * (m + n), once),
}
RULES = {
    "lift": Rule(recombine.lift, nothing),
    "lift_and_sign": Rule(recombine.lift_and_sign, nothing),
    "lift_and_residual": Rule(lambda: recombine.lift_and_residual(0.1, recover=0.9), nothing),
    "lift_and_scaled_residual": Rule(
        lambda: recombine.lift_and_scaled_residual(0.25, limiter), lambda k, m, n: k
    ),
    "lift_with_error_feedback": Rule(
        lambda: recombine.lift_with_error_feedback(0.9), lambda k, m, n: k * m * n
    ),
    "scale_gradient": Rule(lambda: recombine.scale_gradient("channel", limiter), lambda k, m, n: k),
}

SENSELESS = {
    *itertools.product(("gaussian", "rademacher", "sparse", "coap"), ("lift_with_error_feedback",)),
    ("blocks", "lift_and_scaled_residual"),
    ("blocks", "scale_gradient"),
}
"""Projector and recombination that are refused."""


def transformation(space: Space, rule: Rule, inner: Inner) -> optax.GradientTransformation:
    """One cell of the table."""
    return memopt.in_subspace(
        inner.make(), space.make(), rule.make(), space.refresh_every, space.on_refresh
    )


def cells() -> dict[str, tuple[Space, Rule, Inner]]:
    """Every cell that makes sense, by its name."""
    return {
        f"{p}-{r}-{i}": (PROJECTORS[p], RULES[r], INNERS[i])
        for p, r, i in itertools.product(PROJECTORS, RULES, INNERS)
        if (p, r) not in SENSELESS
    }


def covering() -> set[str]:
    """Cells in which every projector meets every recombination, inner optimizers in turns."""
    names = itertools.product(enumerate(PROJECTORS), enumerate(RULES))
    inners = list(INNERS)
    return {f"{p}-{r}-{inners[(i + j) % len(inners)]}" for (i, p), (j, r) in names} & set(cells())
