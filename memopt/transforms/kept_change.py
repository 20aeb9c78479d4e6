"""Returns all but the largest changes of each matrix to the weights that training started from."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.checked import checked
from memopt.errors import check_at_least, check_static
from memopt.matrices import Layout, Matrices
from memopt.parameters import are_only_shapes
from memopt.reductions import for_any, total
from memopt.state.codecs import Codec
from memopt.state.precision import check_real, to_float32, zeros_of
from memopt.state.quantized_params import dequantize_params, quantize_params
from memopt.transforms.per_matrix import per_matrix
from memopt.transforms.selection import kth_largest, share_of
from memopt.trees import map_named, named_leaves, open_box


class KeepLargestChangeState(NamedTuple):
    """State of `keep_largest_change`.

    Attributes:
        count: steps taken, int32.
        base: the parameters to return to, arrays or `memopt.Quantized`.
    """

    count: Array  # type: ignore[assignment]
    base: Any


@checked
def keep_largest_change(
    base: Any,
    fraction: float,
    every: int,
    *,
    codec: str | Codec | None = None,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the largest changes of each matrix, and returns its other weights to a base (SeleKT).

    Place it last in a chain. At every `every`-th step, for each matrix W with an update U::

        D = W + U − W_base
        U ← U           for the ⌊fraction · size⌋ entries with the largest |D|
        U ← W_base − W  for all others

    Of equal |D| the first in the order of rows is kept, so that the number is exact. At other steps
    nothing is computed. The moments of the optimizer before it stay, as in the released code, which
    does this to each tensor; here a stack of layers is as many matrices, and a stack of vectors as
    many vectors. Threshold and ties are found by counting, in some 20 passes: nothing is sorted,
    and on a mesh nothing is gathered.

    `optax.apply_updates` computes W + (W_base − W), which is W_base up to the rounding of that
    difference; it is exact while a weight and its base are within a factor of two.

    State: the base, one number per parameter, or with ``codec="int8"`` 1.02 bytes. Training should
    then start from ``dequantize_params(quantize_params(params, "int8"))``, because the error of the
    codes counts as a change otherwise.

    Args:
        base: the parameters to return to, a tree with an entry for each parameter (a jitted `init`
            makes them constants of its program); None for those that `init` is given.
        fraction: the share of each matrix that keeps its change; the paper uses 0.05.
        every: steps between two selections; the paper uses an epoch.
        codec: how the matrices of the base are stored, see `memopt.quantize_params`; None: as they
            are.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`.

    Returns:
        A transformation whose state is a `KeepLargestChangeState`.

    Raises:
        ValueError: if `fraction` is not between 0 and 1, `every` is below one or, from `init`,
            `base` has no entry for a parameter, or one of another shape.

    References:
        Aggarwal et al., Robust Learning of Diverse Code Edits, 2025,
        https://arxiv.org/abs/2503.03656 (NextCoder).

    Example:
        >>> params = jnp.zeros(4)
        >>> tx = optax.chain(optax.sgd(1.0), keep_largest_change(None, fraction=0.5, every=2))
        >>> state = tx.init(params)
        >>> for g in [jnp.array([1.0, 4.0, 2.0, 3.0]), jnp.array([5.0, 0.0, 0.0, -3.0])]:
        ...     updates, state = tx.update(g, state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(params.tolist())
        [-1.0, -4.0, -2.0, -3.0]
        [-6.0, -4.0, 0.0, 0.0]
    """
    check_static("fraction", fraction)
    check_static("every", every)
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}.")
    check_at_least("every", every, 1)

    def init(params: Any) -> KeepLargestChangeState:
        check_real(params)
        start = map_named(_copied, params) if base is None else _entries(base, params)
        if codec is not None:
            start = quantize_params(start, codec, matrices=matrices)
        return KeepLargestChangeState(jnp.zeros((), jnp.int32), start)

    def select(layout: Layout, u: Array, base: Any, w: Array, *, now: Array) -> tuple[Array, Any]:
        def selected() -> Array:
            there, here = to_float32(dequantize_params(base)), to_float32(w)
            change = jnp.abs(here + to_float32(u) - there)
            count = share_of(fraction, math.prod(u.shape[axis] for axis in layout.core))
            keep = among_largest(change, count, layout.core)
            return jnp.where(keep, u, (there - here).astype(u.dtype))

        return jax.lax.cond(now, selected, lambda: u), base

    tx = per_matrix(
        select,
        KeepLargestChangeState,
        schedules={"now": lambda count: (count + 1) % every == 0},
        reads_params=True,
        matrices=matrices,
    )
    return optax.GradientTransformationExtraArgs(init, tx.update)


def among_largest(x: Array, count: int, axes: tuple[int, ...]) -> Array:
    """Whether each number is one of the `count` largest along these axes, the first of equal ones.

    Args:
        x: floats that are not negative.
        count: how many to choose.
        axes: counted from the front, in the order in which equal numbers are chosen.

    Example:
        >>> among_largest(jnp.array([1.0, 3.0, 3.0, 0.0, 3.0]), 2, (0,)).tolist()
        [False, True, True, False, False]
    """
    size = math.prod(x.shape[axis] for axis in axes)
    if count == 0 or count == size:
        return jnp.full(x.shape, count == size)
    bits = jnp.finfo(x.dtype).bits
    words = jax.lax.bitcast_convert_type(x, f"int{bits}")  # in the order of the numbers
    words = _stored(words, axes).astype(f"uint{bits}")
    threshold = kth_largest([words], count, bits - 1, words.dtype, axes=axes)
    above, equal = words > threshold, words == threshold
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in axes:
        place = place * x.shape[axis] + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    rank = jnp.where(equal, size - place, 0)
    wanted = count - total(above.astype(jnp.int32), axes, keepdims=True)
    last = kth_largest([rank], wanted, size.bit_length(), rank.dtype, axes=axes)
    return above | (equal & (rank >= last))


def _stored(words: Array, axes: tuple[int, ...]) -> Array:
    """Integers that are not negative, as an array in memory.

    XLA for CPUs computes cheap operands again, rounding a product and a sum together or not, and
    ignores `jax.lax.optimization_barrier`; the result of a condition it can only read.
    """
    first = words[tuple(0 if axis in axes else slice(None) for axis in range(words.ndim))]
    return jax.lax.cond(for_any(first >= 0), lambda: words, lambda: jnp.zeros_like(words))


def _copied(_: str, x: Any) -> Array:
    """A copy, so that parameters and state may both be donated; zeros for a shape."""
    return zeros_of(lambda x: x, x) if isinstance(x, jax.ShapeDtypeStruct) else jnp.array(x)


def _entries(base: Any, params: Any) -> Any:
    """The base's entries for these parameters, which may be a part of them."""
    entries = {name: open_box(x) for name, x in named_leaves(dequantize_params(base))[0]}

    def entry(name: str, p: Any) -> Array:
        if name not in entries:
            raise ValueError(f"base must have an entry for {name!r}, it has {sorted(entries)}.")
        x = jnp.array(entries[name], p.dtype)
        if x.shape == p.shape:
            return x
        if are_only_shapes():
            return jnp.zeros(p.shape, p.dtype)
        raise ValueError(f"base has shape {x.shape} for {name!r}, the parameter {p.shape}.")

    return map_named(entry, params)
