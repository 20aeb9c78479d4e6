"""Finds the axes of an optimizer's state that follow axes of its parameters."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from memopt.parameters import init_shapes, known, read_parameters
from memopt.state.owners import is_state_array, owners
from memopt.trees import named_leaves, open_box

Path = tuple[Any, ...]
"""The path of a state array in its tree."""

Sizes = Mapping[int, tuple[int, ...]]
"""Changed shapes of some parameters, by their index in ``jax.tree.leaves``."""

Shapes = Mapping[Path, jax.ShapeDtypeStruct]
Moves = Mapping[Path, tuple[int, ...] | None]
"""The axes of state arrays that changed in proportion; None if an array changed otherwise."""


class Axis(NamedTuple):
    """An axis of a parameter, and the number of equal parts into which it is split."""

    number: int
    parts: int


class Follower(NamedTuple):
    """The parameter and the axes that a state array follows.

    Attributes:
        owner: the parameter that the array belongs to; None if it belongs to none, or changes with
            several.
        changes: whether it belongs to, or changes with, any parameter.
        axes: pairs of an axis of the array and the axis of the owner that it follows.
        unclear: axes of the owner for which valid tries give different results.
        uneven: axes of the owner with which the array changes only in invalid tries.
    """

    owner: int | None
    changes: bool
    axes: tuple[tuple[int, int], ...] = ()
    unclear: tuple[int, ...] = ()
    uneven: tuple[int, ...] = ()

    def seen(self, axis: int, tries: Sequence[Moves], path: Path) -> "Follower":
        """Adds the result of the tries with an axis of the owner for the array at `path`."""
        moves = {moves[path] for moves in _sound(tries) or tries}
        moved = moves.pop() if len(moves) == 1 else None
        if moved is None:
            return self._replace(unclear=(*self.unclear, axis))
        if not moved and any(moves[path] is None for moves in tries):
            return self._replace(uneven=(*self.uneven, axis))
        return self._replace(axes=tuple(sorted((*self.axes, *((mine, axis) for mine in moved)))))


def followers(
    tx: optax.GradientTransformation, params: Any, axes: Sequence[Sequence[Axis]]
) -> list[Follower]:
    """Finds the state axes that follow given axes of the parameters, from `tx.init` alone.

    It is evaluated on shapes in which an axis is longer, or shorter, by one of its parts. State
    axes that change in proportion follow that axis. If a change alters a decision of the optimizer
    (which side is shorter, whether a matrix is large enough to be factored), other arrays change
    out of proportion, and that try is invalid and ignored.

    Args:
        tx: any Optax transformation.
        params: a tree of ``jax.ShapeDtypeStruct``.
        axes: for each parameter the axes of interest.

    Returns:
        A `Follower` for each array of ``tx.init(params)``, in the order of ``jax.tree.leaves``.

    Example:
        >>> w = jax.ShapeDtypeStruct((64, 32), "float32")
        >>> rows, cols, momentum = followers(optax.sm3(1e-3), w, [[Axis(0, 4), Axis(1, 2)]])
        >>> rows.axes, cols.axes, momentum.axes
        (((0, 0),), ((0, 1),), ((0, 0), (1, 1)))
    """
    init = _Init(tx, params)
    base = init({})
    arrays = jax.tree.leaves(owners(init.state({}), params), is_leaf=is_state_array)
    found = {
        path: Follower(array.parameter, array.parameter is not None)
        for path, array in zip(base, arrays, strict=True)
    }
    # Arrays outside of trees like the parameters, such as a flat vector, are matched by growth.
    if unowned := [p for p, follower in found.items() if base[p].ndim and follower.owner is None]:
        grown = _tries_by_parameter(init, {path: base[path] for path in unowned})
        for path, moved in grown.moved.items():
            found[path] = Follower(grown.owner(moved), bool(moved))
    owner_of = {path: follower.owner for path, follower in found.items()}
    for position in range(max(map(len, axes), default=0)):
        chosen = {i: own[position] for i, own in enumerate(axes) if len(own) > position}
        tries = _tries_by_axis(init, base, owner_of, chosen)
        for path, owner in owner_of.items():
            if owner in chosen:
                found[path] = found[path].seen(chosen[owner].number, tries[owner], path)
    return list(found.values())


class _Init:
    """``tx.init`` as a function of the shapes of some parameters; the others are unchanged.

    Parameters keep their kinds and axes, and are passed without boxes.
    """

    def __init__(self, tx: optax.GradientTransformation, params: Any) -> None:
        self.tx, self.parameters = tx, read_parameters(params)
        nodes, self.structure = named_leaves(params)
        self.leaves = [open_box(node) for _, node in nodes]

    def state(self, sizes: Sizes) -> Any:
        """The shapes of the state."""
        leaves = [p.update(shape=sizes.get(i, p.shape)) for i, p in enumerate(self.leaves)]
        with known(self.parameters):
            return init_shapes(self.tx.init, self.structure.unflatten(leaves))

    def __call__(self, sizes: Sizes) -> Shapes:
        """The shapes of the state's arrays by their paths."""
        return dict(jax.tree_util.tree_leaves_with_path(self.state(sizes)))

    def parts(self, sizes: Sizes) -> Iterator[tuple[Sizes, Shapes]]:
        """Yields the same for groups of parameters, without those that `tx.init` refuses."""
        try:
            yield sizes, self(sizes)
        except Exception:
            items = list(sizes.items())
            half = len(items) // 2
            for some in (items[:half], items[half:]) if half else ():
                yield from self.parts(dict(some))


class _Tries(NamedTuple):
    """Tries in which parameters grow, each parameter in its own combination of tries.

    Attributes:
        combinations: for each parameter, the tries in which it grows.
        moved: for each state array, the tries in which it changes.
    """

    combinations: Sequence[tuple[int, ...]]
    moved: Mapping[Path, tuple[int, ...]]

    def owner(self, moved: tuple[int, ...]) -> int | None:
        """The parameter with this combination.

        All combinations have the same size, so that the union of two is never a third.
        """
        return self.combinations.index(moved) if moved in self.combinations else None


def _tries_by_parameter(init: _Init, base: Shapes) -> _Tries:
    """Doubles all axes of parameters; 11 tries distinguish 300 parameters."""
    count = len(init.leaves)
    size = lambda tries: (tries + 1) // 2
    tries = next(t for t in itertools.count(1) if math.comb(t, size(t)) >= count)
    combinations = list(itertools.islice(itertools.combinations(range(tries), size(tries)), count))
    changed: dict[Path, list[int]] = {path: [] for path in base}
    for number in range(tries):
        grown = [i for i, combination in enumerate(combinations) if number in combination]
        seen = list(init.parts({i: tuple(2 * n for n in init.leaves[i].shape) for i in grown}))
        for path, x in base.items():
            if any(path not in shapes or shapes[path].shape != x.shape for _, shapes in seen):
                changed[path].append(number)
    moved = {path: tuple(numbers) for path, numbers in changed.items()}
    return _Tries(combinations, moved)


def _tries_by_axis(
    init: _Init, base: Shapes, owner_of: Mapping[Path, int | None], chosen: Mapping[int, Axis]
) -> dict[int, list[Moves]]:
    """Changes one axis of each given parameter, all in the same try, and records what changes.

    The axes change by one of their parts; if no such try is valid, also by one.
    """
    owned = {i: [path for path, owner in owner_of.items() if owner == i] for i in chosen}
    tries: dict[int, list[Moves]] = {i: [] for i in chosen}
    for by_part in (True, False):
        unsettled = {i: axis for i, axis in chosen.items() if not _sound(tries[i])}
        for sign in (1, -1):
            sizes = {}
            for i, (axis, parts) in unsettled.items():
                shape = list(init.leaves[i].shape)
                shape[axis] += sign * (max(shape[axis] // max(parts, 2), 1) if by_part else 1)
                if shape[axis]:
                    sizes[i] = tuple(shape)
            for some, shapes in init.parts(sizes) if sizes else ():
                for i, other in some.items():
                    axis = chosen[i].number
                    ratio = init.leaves[i].shape[axis], other[axis]
                    tries[i].append({p: _moved(base[p], shapes.get(p), *ratio) for p in owned[i]})
    return tries


def _sound(tries: Sequence[Moves]) -> list[Moves]:
    """The valid tries: arrays change in proportion, except those that never do in any try."""
    odd = {path for path in tries[0] if all(t[path] is None for t in tries)} if tries else set()
    return [t for t in tries if all(moved is not None or p in odd for p, moved in t.items())]


def _moved(old: Any, new: Any, size: int, other: int) -> tuple[int, ...] | None:
    """The axes that changed, if all changed as `size` to `other`; otherwise None."""
    if new is None or len(new.shape) != len(old.shape):
        return None
    pairs = enumerate(zip(old.shape, new.shape, strict=True))
    changed = {a: (m, n) for a, (m, n) in pairs if m != n}
    if any(m * other != n * size for m, n in changed.values()):
        return None
    return tuple(changed)
