"""Grows a stacked model in depth, its optimizer's state included."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.axis_types import on_auto_axes, spec_of
from memopt.checked import checked
from memopt.errors import check_at_least
from memopt.matrices import Layout, every_matrix, map_matrices
from memopt.parameters import init_shapes
from memopt.state.following import Axis, followers
from memopt.state.owners import is_state_array, owners
from memopt.state.quantized_params import is_quantized
from memopt.state.sharding import dense_like
from memopt.trees import named_leaves, open_box


@checked
def grow_depth(
    params: Any,
    state: Any,
    factor: int,
    *,
    tx: optax.GradientTransformation | None = None,
    layers: str = "blocks",
    axis: int = 0,
) -> tuple[Any, Any]:
    """Repeats the layers of a stacked model, and those of its optimizer's state (G_stack).

    Of L layers, new layer i takes layer i mod L; all other parameters stay as they are. In the
    state the axes that follow the layers' are repeated in the same way: it is then that of copies
    that had equal gradients from the start. G_stack itself begins with a new optimizer and
    schedule: pass ``()`` as the state, and call ``tx.init`` on the new parameters. Its authors grow
    fourfold, after d tokens with log₁₀ d = 0.88 log₁₀ N + 163.27 / log₁₀ C − 5.74 for N parameters
    and C floating-point operations.

    Args:
        params: the parameters, arrays or from `memopt.quantize_params`.
        state: the state of any Optax transformation, or ``()``.
        factor: how often the layers are repeated.
        tx: the transformation whose state it is. The axes are found from its `init`, as in
            `memopt.state_sharding`, whatever it is. Without it, arrays are repeated that have their
            parameter's shape, or begin with the axes that stack its matrices, as memopt's do.
        layers: the branch of `params` in which every array has an axis of layers, such as
            "decoder/layers"; "" if they all have one.
        axis: that axis, counted from the front.

    Returns:
        The parameters and the state; other arrays than the layers' are the ones given.

    Raises:
        ValueError: if `params` has no such branch, its layers are not stacked or differ in number,
            or the axis of layers in a state array is not certain.

    References:
        Du et al., Stacking Your Transformers, 2024, https://arxiv.org/abs/2405.15319.

    Example:
        >>> params = {"blocks": {"up": jnp.ones((2, 4, 8))}, "embed": jnp.ones((16, 4))}
        >>> tx = optax.adam(1e-3)
        >>> params, (adam, _) = grow_depth(params, tx.init(params), 2, tx=tx)
        >>> params["blocks"]["up"].shape, adam.mu["blocks"]["up"].shape, adam.mu["embed"].shape
        ((4, 4, 8), (4, 4, 8), (16, 4))
    """
    check_at_least("factor", factor, 1)
    check_at_least("axis", axis, 0)
    count = layer_count(params, layers, axis)
    structure: Any
    nodes, structure = named_leaves(params, is_quantized)
    grown = [_is_below(name, layers) for name, _ in nodes]

    def repeat(x: Array, along: int | None) -> Array:
        if along is None:
            return x
        join = lambda x: jnp.concatenate([x] * factor, along)
        return on_auto_axes(join, (x,), like=spec_of(x))

    repeated = [
        jax.tree.map(lambda x: repeat(x, axis), node) if grows else node
        for (_, node), grows in zip(nodes, grown, strict=True)
    ]
    new_params = structure.unflatten(repeated)
    if not jax.tree.leaves(state):
        return new_params, state
    if tx is None:
        along = _leading_axes(state, dense_like(params), grown, axis)
    else:
        along = _followed_axes(tx, state, dense_like(params), grown, Axis(axis, count))
    outline: Any
    arrays, outline = jax.tree.flatten(state)
    new_state = outline.unflatten([repeat(x, a) for x, a in zip(arrays, along, strict=True)])
    if tx is not None:
        _check_like_new(new_state, init_shapes(tx.init, dense_like(new_params)))
    return new_params, new_state


def layer_count(params: Any, layers: str = "blocks", axis: int = 0) -> int:
    """The number of layers in a branch of stacked parameters; see `grow_depth`.

    Raises:
        ValueError: if there is no such branch, or its layers are not stacked or differ in number.

    Example:
        >>> layer_count({"blocks": {"up": jnp.ones((2, 4, 8))}, "embed": jnp.ones((16, 4))})
        2
    """
    nodes = named_leaves(params, is_quantized)[0]
    counts: dict[int, str] = {}
    for name, node in nodes:
        if not _is_below(name, layers):
            continue
        inside = name.removeprefix(layers).strip("/").split("/")[0]
        shape = open_box(node).shape
        if inside.isdecimal() or len(shape) <= axis:
            raise ValueError(
                f"layers={layers!r} must name parameters whose axis {axis} counts layers, but "
                f"{name!r} of shape {shape} is of one layer: stack the layers, as by jax.vmap or "
                "jnp.stack."
            )
        counts.setdefault(shape[axis], name)
    if not counts:
        raise ValueError(
            f"layers={layers!r} is no branch of params, which has "
            f"{sorted({name.split('/')[0] for name, _ in nodes})}."
        )
    if len(counts) > 1:
        differ = ", ".join(f"{count} in {name!r}" for count, name in counts.items())
        raise ValueError(f"layers={layers!r} must have one number of layers, got {differ}.")
    return next(iter(counts))


def _is_below(name: str, branch: str) -> bool:
    return not branch or name == branch or name.startswith(f"{branch}/")


def _followed_axes(
    tx: optax.GradientTransformation, state: Any, params: Any, grown: list[bool], layers: Axis
) -> list[int | None]:
    """The axis of each state array that follows the layers', from the transformation's `init`."""
    names = [name for name, _ in named_leaves(state)[0]]
    found = followers(tx, params, [[layers] if grows else [] for grows in grown])
    if len(found) != len(names):
        raise ValueError(f"state has {len(names)} arrays, that of tx {len(found)}: pass its tx.")
    axes: list[int | None] = []
    for name, follower in zip(names, found, strict=True):
        mine = [a for a, _ in follower.axes]
        if follower.unclear or len(mine) > 1 or (follower.owner is None and follower.changes):
            raise ValueError(f"state has an array, {name!r}, whose axis of layers is not certain.")
        axes.append(mine[0] if mine else None)
    return axes


def _check_like_new(state: Any, like: Any) -> None:
    """Raises unless a grown state has the shapes of a new one."""
    for (name, x), y in zip(named_leaves(state)[0], jax.tree.leaves(like), strict=True):
        if open_box(x).shape != y.shape:
            raise ValueError(
                f"state cannot grow: {name!r} would have shape {open_box(x).shape}, that of a new "
                f"state has {y.shape}; start with tx.init of the new parameters."
            )


def _leading_axes(state: Any, params: Any, grown: list[bool], axis: int) -> list[int | None]:
    """Finds the axis of layers from shapes: the parameter's, or one that begins with its stack."""
    layouts: list[tuple[Layout, Any]] = []
    map_matrices(lambda layout, p: layouts.append((layout, p)), params, default=every_matrix)
    axes: list[int | None] = []
    arrays = jax.tree.leaves(owners(state, params), is_leaf=is_state_array)
    for array, x in zip(arrays, jax.tree.leaves(state), strict=True):
        if array.parameter is None:
            certain, along = x.ndim == 0 or not jnp.issubdtype(x.dtype, jnp.floating), None
        elif not grown[array.parameter]:
            certain, along = True, None
        else:
            layout, p = layouts[array.parameter]
            stack = tuple(p.shape[a] for a in layout.stack)
            begins = axis in layout.stack and x.shape[: len(stack)] == stack
            begins &= p.shape[axis] not in x.shape[len(stack) :]  # which may count something else
            certain = x.shape == p.shape or begins
            along = axis if x.shape == p.shape else layout.stack.index(axis) if begins else None
        if not certain:
            raise ValueError(
                f"tx must be given: the state array {array.name!r} of shape {x.shape} has neither "
                "its parameter's shape nor, at first and not again, the axes that stack its "
                "matrices."
            )
        axes.append(along)
    return axes
