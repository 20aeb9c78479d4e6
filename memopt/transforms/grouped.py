"""Second moments that groups of entries share: rows, columns, heads, blocks, whole matrices."""

import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from memopt.checked import checked
from memopt.errors import check_choice
from memopt.matrices import Layout, Matrices, every_matrix, map_matrices
from memopt.reductions import scale_to_one, total
from memopt.state.precision import (
    average,
    bias_correction,
    bounded,
    statistics_dtype,
    to_float32,
)
from memopt.transforms.per_matrix import per_matrix
from memopt.trees import NOTHING

Group = str | tuple[str, int]
"""The entries that share a second moment: "entry" (none do), "row", "column", "head" or "matrix",
or ("row", k) or ("column", k) for blocks of k successive rows or columns."""

Groups = Group | Mapping[str, Group] | Callable[[Layout], Group]
"""A `Group` for all parameters, for each by its name, or a function of the `memopt.Layout`."""

GROUPS = ("entry", "row", "column", "head", "matrix")


class ScaleByGroupedRmsState(NamedTuple):
    """State of `scale_by_grouped_rms`.

    Attributes:
        count: steps taken, int32.
        mu: first moment, float32 or wider, shaped like the parameters; ``MaskedNode`` without `b1`.
        nu: second moment, one number for each group, likewise float32.
    """

    count: Array  # type: ignore[assignment]
    mu: Any
    nu: Any


@checked
def scale_by_grouped_rms(
    groups: Groups = "column",
    b1: float | None = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    debias: bool = True,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with one second moment for each group of entries.

    With the mean over the entries of a group, and M = G without `b1`::

        M ← β₁ M + (1 − β₁) G
        V ← β₂ V + (1 − β₂) mean(G²)
        U = M / (1 − β₁ᵗ) / (√(V / (1 − β₂ᵗ)) + ε)

    Groups of an m×n matrix, with m inputs and n outputs, and the size of V: "entry" is Adam, mn;
    "row" has one for each input, m; "column" for each output, n; ("column", k) for k successive
    outputs, n/k; "head" for each attention head of a kernel whose rows or columns are several axes;
    "matrix" has one. Vectors have one for each entry, or one with "matrix". State: mn numbers with
    `b1`, and V.

    Args:
        groups: a group for all parameters; groups by the parameters' names; or a function of a
            `memopt.Layout`, which has the name and the kind.
        b1: decay of the first moment; None for none.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        debias: whether moments are divided by the sum of their weights.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`. By default `memopt.matrices.every_matrix`.

    Returns:
        A transformation whose state is a `ScaleByGroupedRmsState`.

    Raises:
        ValueError: by `init`, if a group is unknown, a parameter has none, it has no axis of heads,
            or blocks do not divide its side.

    References:
        Zhang et al., Adam-mini, 2024, https://arxiv.org/abs/2406.16793, Algorithm 1; Kalra et al.,
        SlimAdam, 2025, https://arxiv.org/abs/2503.01843, section 3.

    Example:
        >>> params = {"q": jnp.ones((3, 64, 4, 16)), "o": jnp.ones((3, 4, 16, 64))}  # 4 heads
        >>> state = scale_by_grouped_rms({"q": "head", "o": "column"}).init(params)
        >>> state.nu["q"].shape, state.nu["o"].shape
        ((3, 4), (3, 64))
    """
    moments = lambda layout, p: _like(layout, p, group_of(groups, layout), b1 is not None)
    rule = functools.partial(
        divide_by_grouped_rms, groups=groups, b1=b1, b2=b2, eps=eps, debias=debias
    )
    return per_matrix(
        rule,
        ScaleByGroupedRmsState,
        moments,
        schedules={"steps": optax.safe_increment},
        matrices=matrices,
    )


def _like(layout: Layout, p: Array, group: Group, has_momentum: bool) -> tuple[Any, Any]:
    """Arrays like the two moments."""
    p = p.astype(statistics_dtype(p))
    return p if has_momentum else NOTHING, group_means(layout, p, group)


def divide_by_grouped_rms(
    layout: Layout,
    g: Array,
    mu: Any,
    nu: Array,
    *,
    steps: Array,
    groups: Groups,
    b1: Any,
    b2: Any,
    eps: Any,
    debias: bool,
) -> tuple[Array, Any, Array]:
    """Returns the update of `scale_by_grouped_rms`, and the new moments."""
    group = group_of(groups, layout)
    nu = average(b2, nu, group_means(layout, jnp.square(bounded(g)), group))
    mu = NOTHING if b1 is None else average(b1, mu, bounded(g))
    correct = lambda decay, x: x / bias_correction(decay, steps, x.dtype) if debias else x
    u = bounded(g) if b1 is None else correct(b1, mu)
    root = jnp.sqrt(correct(b2, nu)) + eps
    return (u / spread(layout, root, group)).astype(g.dtype), mu, nu


def group_of(groups: Groups, layout: Layout) -> Group:
    """The group of a parameter.

    Raises:
        ValueError: if it is unknown, or the parameter has none.
    """
    group: Any = groups
    if isinstance(groups, Mapping):
        if layout.name not in groups:
            raise ValueError(
                f"groups has no entry for {layout.name!r}; it has {sorted(groups)}. "
                "Give every parameter a group."
            )
        group = groups[layout.name]
    elif callable(groups):
        group = groups(layout)
    is_pair = isinstance(group, tuple | list) and len(group) == 2  # a list, if read from JSON
    kind, block = group if is_pair else (group, 1)
    check_choice("groups", kind, GROUPS)
    if not isinstance(block, numbers.Integral) or block < 1:
        raise ValueError(f"groups must have blocks of at least one row or column, got {group!r}.")
    if block != 1 and kind not in ("row", "column"):
        raise ValueError(f"groups must have blocks of rows or columns only, got {group!r}.")
    return (kind, int(block)) if block != 1 else kind


def group_means(layout: Layout, x: Array, group: Group) -> Array:
    """The mean of `x` over the entries of each group, in the shape of the groups.

    Args:
        layout: the axes of `x`.
        x: an array, or an expression that is cheap to compute.
        group: the group.

    Raises:
        ValueError: if `x` has no such groups.
    """
    averaged, block = _averaged(layout, group)
    means = total(x, averaged) / max(1, math.prod(x.shape[a] for a in averaged))
    if block == 1:
        return means
    axis, sides = _kept(layout, averaged), means.shape
    if sides[axis] % block:
        raise ValueError(
            f"groups, or the head_dim that makes them, must divide the {group[0]}s of "
            f"{layout.name!r} into blocks, got blocks of {block} for {sides[axis]}."
        )
    return means.reshape(*sides[:axis], -1, block, *sides[axis + 1 :]).mean(axis + 1)


def spread(layout: Layout, x: Array, group: Group) -> Array:
    """Gives an array with a number for each group the axes of the parameter, to broadcast."""
    averaged, block = _averaged(layout, group)
    if block != 1:
        x = jnp.repeat(x, block, _kept(layout, averaged))
    return jnp.expand_dims(x, averaged)


def _averaged(layout: Layout, group: Group) -> tuple[tuple[int, ...], int]:
    """The axes to average over, and the size of the blocks along the one that is left."""
    kind, block = group if isinstance(group, tuple) else (group, 1)
    if kind == "matrix":
        return layout.core, 1
    if kind == "entry" or not layout.is_matrix:
        return (), 1
    if kind != "head":
        averaged, kept = layout.cols, layout.rows
        if kind == "column":
            averaged, kept = kept, averaged
        if block != 1 and len(kept) > 1:
            raise ValueError(
                f"groups[{layout.name!r}] must not have blocks, got {group!r}: its {kind}s are "
                f"{len(kept)} axes, so give 'head'."
            )
        return averaged, block
    heads = next((side[:-1] for side in (layout.cols, layout.rows) if len(side) > 1), None)
    if heads is None:
        raise ValueError(
            f"groups[{layout.name!r}] must not be 'head': neither its rows nor its columns are two "
            "axes, heads and their entries; give ('column', size of a head)."
        )
    return tuple(a for a in layout.core if a not in heads), 1


def _kept(layout: Layout, averaged: tuple[int, ...]) -> int:
    """The position of the axis that is left of a matrix, once others are averaged over."""
    (axis,) = set(layout.core) - set(averaged)
    return axis - sum(a < axis for a in averaged)


@checked
def choose_groups(
    second_moments: Sequence[Any], cutoff: float = 1.0, *, matrices: Matrices = None
) -> dict[str, Group]:
    """Chooses groups by how alike the second moments of full Adam are within them.

    For each matrix, each second moment V of a run, and K "row", "column" or "matrix"::

        SNR_K = mean over groups of (mean_K V)² / var_K V

    averaged over the given second moments and the layers of a stack. The group of the largest
    signal-to-noise ratio is chosen if that is above `cutoff`, else "entry".

    Args:
        second_moments: trees of Adam's second moment, such as the ``nu`` of
            ``optax.ScaleByAdamState``, at several steps of a short run. The paper takes every 100th
            step up to 1000, then every 1000th.
        cutoff: the least signal-to-noise ratio to share a number.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`. By default `memopt.matrices.every_matrix`.

    Returns:
        Groups by name, for `scale_by_grouped_rms` and `memopt.slim_adam`. Vectors have "entry".

    Raises:
        TypeError: if there is one tree instead of a list.
        ValueError: if there is no tree, an array of integers, or a number that is not finite.

    References:
        Kalra et al., SlimAdam, 2025, https://arxiv.org/abs/2503.01843, section 3.

    Example:
        >>> v = {"up": jnp.array([[1.0, 4.0, 9.0], [1.1, 4.1, 9.1]]), "bias": jnp.ones(3)}
        >>> choose_groups([v])
        {'bias': 'entry', 'up': 'column'}
    """
    ratios: dict[str, list[dict[str, float]]] = {}

    if not second_moments:
        raise ValueError("second_moments must have at least one tree, got none.")

    def measure(layout: Layout, v: Array) -> None:
        if not jnp.issubdtype(v.dtype, jnp.floating):
            raise ValueError(f"second_moments must be floats, got {layout.name!r} in {v.dtype}.")
        if not jnp.isfinite(v).all():
            raise ValueError(
                f"second_moments must be finite, got infinity or NaN in {layout.name!r}."
            )
        of = {group: _signal_to_noise(layout, v, group) for group in ("row", "column", "matrix")}
        ratios.setdefault(layout.name, []).append(of if layout.is_matrix else {})

    for tree in second_moments:
        map_matrices(measure, tree, matrices=matrices, default=every_matrix)
    chosen: dict[str, Group] = {}
    for name, steps in ratios.items():
        means = {group: np.mean([step[group] for step in steps]) for group in steps[0]}
        best = max(means, key=means.__getitem__, default="entry")
        chosen[name] = best if means.get(best, 0.0) > cutoff else "entry"
    return chosen


def _signal_to_noise(layout: Layout, v: Array, group: Group) -> float:
    """The mean over groups of the squared mean of V over its variance."""
    tiny = jnp.finfo(statistics_dtype(v)).tiny
    v = to_float32(v)
    v *= scale_to_one(v, layout.core)[0]  # squares of V would underflow
    mean = group_means(layout, v, group)
    variance = group_means(layout, jnp.square(v - spread(layout, mean, group)), group)
    return float(jnp.mean(jnp.square(mean) / jnp.maximum(variance, tiny)))
