"""Infers the sharding of an optimizer's state from its `init`."""

import math
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import NamedSharding

from memopt.checked import checked
from memopt.errors import check_choice
from memopt.parameters import init_shapes
from memopt.state.following import Axis, Follower, followers
from memopt.state.owners import parts
from memopt.state.quantized_params import dequantize_params, is_quantized
from memopt.trees import named_leaves, open_box


@checked
def state_sharding(
    tx: optax.GradientTransformation,
    params: Any,
    *,
    spread_over: str | None = None,
    explain: bool = False,
) -> Any:
    """Returns a sharding for each state array of any optimizer, from those of its parameters.

    ``tx.init`` is evaluated on shapes several times, with axes of the parameters made longer or
    shorter. A state axis whose length changes in proportion to a parameter axis follows that axis
    and is split over the same mesh axes, if it divides as evenly. This covers moments, factors,
    low-rank moments, projections, codes and their scales of any transformation. A square array of
    which both axes follow the same parameter axis, as the average of G Gᵀ in Shampoo, is split as
    its parameter is, over the mesh axes of rows and of columns. Arrays that follow no split axis,
    or not clearly, are replicated. No array is allocated.

    Args:
        tx: any Optax transformation.
        params: arrays or ``jax.ShapeDtypeStruct``, each with a `NamedSharding` over Auto or
            Explicit axes; parameters from `memopt.quantize_params` have the sharding of their
            codes.
        spread_over: a mesh axis, such as "data", over which each state array is split further
            (ZeRO-1): along its longest unsplit axis that is divisible, or else along a split one.
            An Explicit mesh axis must not split any parameter, because an update's type would then
            be split over it twice.
        explain: whether to also return {name of a state array: a sentence with the reason}.

    Returns:
        A tree like ``tx.init(params)`` of `NamedSharding`; with `explain`, a pair of that tree and
        the sentences.

    Raises:
        ValueError: if a parameter has no `NamedSharding`, parameters are on several meshes, or
            `spread_over` is not an axis of their mesh.

    Example:
        >>> mesh = jax.make_mesh((1,), ("fsdp",))
        >>> rows = NamedSharding(mesh, jax.P("fsdp"))
        >>> w = jax.ShapeDtypeStruct((64, 32), "float32", sharding=rows)
        >>> shardings, notes = state_sharding(optax.sm3(1e-3), {"w": w}, explain=True)
        >>> [x.spec for x in jax.tree.leaves(shardings)]
        [P('fsdp',), P(), P('fsdp',)]
        >>> notes["0/mu/w/0"]
        "axis 0 follows axis 0 of 'w' over 'fsdp'."
    """
    placed = placed_params(params)
    mesh = placed[0].sharding.mesh
    if spread_over is not None:
        check_choice("spread_over", spread_over, mesh.axis_names)
    like = dense_like(params)
    state = init_shapes(tx.init, like)
    squares = _owners_of_squares(state, like)
    axes = [p.all_axes if i in squares else p.axes for i, p in enumerate(placed)]
    found = iter(followers(tx, like, axes))
    notes = {}

    names = iter([name for name, _ in named_leaves(state)[0]])

    def place(x: jax.ShapeDtypeStruct) -> NamedSharding:
        follower = next(found)
        entries, reasons = _followed(x.shape, follower, placed, mesh)
        if spread_over is not None:
            reasons.append(_spread(x.shape, entries, spread_over, mesh))
        notes[next(names)] = "; ".join(filter(None, reasons)) + "."
        owner = None if follower.owner is None else placed[follower.owner]
        if owner and (x.shape, tuple(entries)) == (owner.like.shape, owner.entries):
            return NamedSharding(mesh, owner.sharding.spec)  # as the user wrote it
        return NamedSharding(mesh, jax.P(*entries) if any(entries) else jax.P())

    shardings = jax.tree.map(place, state)
    return (shardings, notes) if explain else shardings


@checked
def init_sharded(
    tx: optax.GradientTransformation, params: Any, *, spread_over: str | None = None
) -> Any:
    """Computes ``tx.init(params)`` with the shardings of `state_sharding`.

    No array is ever whole on one device, whatever `tx` does.

    Args:
        tx: any Optax transformation.
        params: arrays with a `NamedSharding`, over Auto or Explicit axes.
        spread_over: as in `state_sharding`.

    Returns:
        The state.

    Raises:
        ValueError: as in `state_sharding`.

    Example:
        >>> import jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("fsdp",))
        >>> params = {"w": jax.device_put(jnp.ones((4, 2)), NamedSharding(mesh, jax.P("fsdp")))}
        >>> init_sharded(optax.adam(1e-3), params)[0].mu["w"].sharding.spec
        P('fsdp',)
    """
    shardings = state_sharding(tx, params, spread_over=spread_over)
    mesh: Any = placed_params(params)[0].sharding.mesh

    def init(params: Any) -> Any:
        return tx.init(dequantize_params(params))

    with jax.set_mesh(mesh):
        # Under Explicit axes, types would determine the shardings, or raise an error.
        auto = jax.sharding.auto_axes(init, out_sharding=shardings)
        return jax.jit(auto, out_shardings=shardings)(params)


class Placed(NamedTuple):
    """The name, shape and sharding of a parameter, dequantised if it is quantised.

    Attributes:
        name: the name in its tree.
        like: the shape and dtype.
        sharding: the sharding.
    """

    name: str
    like: jax.ShapeDtypeStruct
    sharding: NamedSharding

    @property
    def entries(self) -> tuple[Any, ...]:
        """The mesh axes that split each axis."""
        spec = tuple(self.sharding.spec)
        return spec + (None,) * (len(self.like.shape) - len(spec))

    @property
    def axes(self) -> list[Axis]:
        """The axes that are split."""
        mesh = self.sharding.mesh
        return [Axis(a, part_count(mesh, entry)) for a, entry in enumerate(self.entries) if entry]

    @property
    def all_axes(self) -> list[Axis]:
        """All axes, if any is split."""
        mesh = self.sharding.mesh
        every = [Axis(a, part_count(mesh, entry)) for a, entry in enumerate(self.entries)]
        return every if any(self.entries) else []


def dense_like(params: Any) -> Any:
    """The shapes and dtypes of the parameters, for quantised ones those after dequantising."""
    shape = lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype)
    return jax.tree.map(shape, params, is_leaf=is_quantized)


def placed_params(params: Any) -> list[Placed]:
    """Returns the parameters in the order of their leaves.

    Raises:
        ValueError: if there is none, one has no `NamedSharding`, or they are on several meshes.
    """
    placed = []
    for name, node in named_leaves(params, is_quantized)[0]:
        p = open_box(node)
        sharding = getattr(p.codes if is_quantized(p) else p, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            where = "a numpy array" if sharding is None else f"on {sharding}"
            raise ValueError(
                f"params: {name!r} has no NamedSharding, it is {where}; put all "
                "parameters on a mesh, as by jax.device_put(params, NamedSharding(mesh, jax.P()))."
            )
        placed.append(Placed(name, jax.ShapeDtypeStruct(p.shape, p.dtype), sharding))
        if sharding.mesh != placed[0].sharding.mesh:
            raise ValueError(
                f"params must be on one mesh: {placed[0].name!r} is on {placed[0].sharding.mesh}, "
                f"{name!r} on {sharding.mesh}."
            )
    if not placed:
        raise ValueError("params has no array, and therefore no mesh for the state.")
    return placed


def _owners_of_squares(state: Any, params: Any) -> set[int]:
    """The indices of parameters with a square array in the state that is no known moment."""
    structure = named_leaves(params)[1]
    is_square = lambda x: len(x.shape) > 1 and x.shape[-1] == x.shape[-2] > 1
    return {
        i
        for part in parts(state, params)
        if part.has_parameters and part.moment is None
        for i, node in enumerate(structure.flatten_up_to(part.tree))
        if any(is_square(open_box(x)) for _, x in named_leaves(node)[0])
    }


def _followed(
    shape: tuple[int, ...], follower: Follower, placed: list[Placed], mesh: Any
) -> tuple[list[Any], list[str]]:
    """The mesh axes that split each axis of a state array, and the reasons."""
    entries: list[Any] = [None] * len(shape)
    if follower.owner is None:
        what = "changes with several parameters" if follower.changes else "follows no parameter"
        return entries, [what]
    owner = placed[follower.owner]
    reasons = []
    if square := _square(shape, follower, owner, entries, mesh):
        reasons.append(square)
    for mine, theirs in follower.axes:
        entry = owner.entries[theirs]
        if square or entry is None:
            continue
        reason = f"axis {mine} follows axis {theirs} of {owner.name!r}"
        if _names(entry) & _names(*entries):
            reason += f", but {_text(entry)} splits an axis already"
        elif entries[mine]:
            reason += f", but {_text(entries[mine])} splits it already"
        else:  # an axis that follows the parts is divisible by their number
            entries[mine] = entry
            reason += f" over {_text(entry)}"
        reasons.append(reason)
    for theirs in follower.unclear or (() if reasons else follower.uneven):
        parts = part_count(mesh, owner.entries[theirs])
        reasons.append(
            f"no axis clearly follows axis {theirs} of {owner.name!r} in {parts} equal parts"
        )
    return entries, reasons or [f"follows no split axis of {owner.name!r}"]


def _square(
    shape: tuple[int, ...], follower: Follower, owner: Placed, entries: list[Any], mesh: Any
) -> str:
    """Splits an array with two axes that follow the same one, and returns the reason.

    Mesh axes that split the owner before that axis split the first of the two, and the others the
    second; without any before, its own split the first. So L and R of G, L with the axes of rows
    and R with those of columns, are split as G is.
    """
    pairs: dict[int, list[int]] = {}
    for mine, theirs in follower.axes:
        pairs.setdefault(theirs, []).append(mine)
    is_square = lambda mine: len(mine) == 2 and shape[mine[0]] == shape[mine[1]]
    twice = [theirs for theirs, mine in pairs.items() if is_square(mine)]
    if not twice:
        return ""
    for theirs, (mine, *more) in pairs.items():
        if not more:
            entries[mine] = owner.entries[theirs]
    split = [a for a, e in enumerate(owner.entries) if e and (a in twice or a not in pairs)]
    own = [a for a in split if a in twice]
    before = [a for a in split if a < twice[0]]
    after = [a for a in split if a not in own + before]
    groups = (before, own + after) if before else (own, after)
    for mine, axes in zip(pairs[twice[0]], groups, strict=True):
        names = tuple(name for a in axes for name in axis_names(owner.entries[a]))
        if names and shape[mine] % part_count(mesh, names) == 0:
            entries[mine] = names if len(names) > 1 else names[0]
    first, second = pairs[twice[0]]
    return (
        f"axes {first} and {second} follow axis {twice[0]} of {owner.name!r}, "
        "and are split as its axes are"
    )


def _spread(shape: tuple[int, ...], entries: list[Any], over: str, mesh: Any) -> str:
    """Splits one more axis over a mesh axis, and returns the reason."""
    if over in _names(*entries) or not shape:
        return ""
    parts = mesh.shape[over]
    lengths = [n // part_count(mesh, entry) for n, entry in zip(shape, entries, strict=True)]
    whole = {a: n for a, n in enumerate(lengths) if entries[a] is None and n % parts == 0}
    split = {a: n for a, n in enumerate(lengths) if entries[a] is not None and n % parts == 0}
    choices = whole or split
    if not choices:
        return f"no axis divides by {over!r}={parts}"
    axis = max(choices, key=lambda a: choices[a])
    entries[axis] = (*axis_names(entries[axis]), over) if entries[axis] else over
    return f"axis {axis} is spread over {over!r}"


def axis_names(entry: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a `jax.P` names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _names(*entries: Any) -> set[str]:
    return {name for entry in entries for name in axis_names(entry)}


def part_count(mesh: Any, entry: Any) -> int:
    """The number of parts into which an entry splits an axis."""
    return math.prod(mesh.shape[name] for name in axis_names(entry))


def _text(entry: Any) -> str:
    return "×".join(map(repr, axis_names(entry)))
