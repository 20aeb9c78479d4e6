"""The axes of an optimizer's state that follow axes of its parameters."""

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
"""Where a state array stands in its tree."""

Sizes = Mapping[int, tuple[int, ...]]
"""Other shapes for some of the parameters, by their place in ``jax.tree.leaves``."""

Shapes = Mapping[Path, jax.ShapeDtypeStruct]
Moves = Mapping[Path, tuple[int, ...] | None]
"""Of some state arrays the axes that moved in proportion; None where the array else changed."""


class Axis(NamedTuple):
    """An axis of a parameter, and into how many equal parts it is split."""

    number: int
    parts: int


class Follower(NamedTuple):
    """The parameter and the axes that a state array follows.

    Attributes:
      owner: the one parameter that it belongs to; None if it belongs to none, or changes with
        several.
      changes: whether it belongs to, or changes with, any.
      axes: pairs of an axis of it and an axis of the owner that it follows.
      unclear: axes of the owner of which the tries that count say different things.
      uneven: axes of the owner with which it changes only in tries that do not count.
    """

    owner: int | None
    changes: bool
    axes: tuple[tuple[int, int], ...] = ()
    unclear: tuple[int, ...] = ()
    uneven: tuple[int, ...] = ()

    def seen(self, axis: int, tries: Sequence[Moves], path: Path) -> "Follower":
        """With what the tries with an axis of the owner say of the array that stands there."""
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
    """Finds out which state axes follow some axes of the parameters, from `tx.init` alone.

    It is evaluated on shapes of which an axis is longer, or shorter, by one of its parts. What
    grows and shrinks with it in proportion follows it. A change that turns a decision of the
    optimizer (which side is shorter, whether a matrix is large enough to be factored) shows in
    arrays that change otherwise, and what was seen then does not count.

    Args:
      tx: any Optax transformation.
      params: a tree of ``jax.ShapeDtypeStruct``.
      axes: for each parameter the axes that matter.

    Returns:
      For each array of ``tx.init(params)`` what it follows, in the order of ``jax.tree.leaves``.

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
    # What stands in no tree like the parameters, a flat vector say, is known by its growth alone.
    if unowned := [p for p, follower in found.items() if base[p].ndim and follower.owner is None]:
        grown = _tries_by_parameter(init, {path: base[path] for path in unowned})
        for path, moved in grown.moved.items():
            found[path] = Follower(grown.owner(moved), bool(moved))
    owner_of = {path: follower.owner for path, follower in found.items()}
    for turn in range(max(map(len, axes), default=0)):
        chosen = {i: own[turn] for i, own in enumerate(axes) if len(own) > turn}
        tries = _tries_by_axis(init, base, owner_of, chosen)
        for path, owner in owner_of.items():
            if owner in chosen:
                found[path] = found[path].seen(chosen[owner].number, tries[owner], path)
    return list(found.values())


class _Init:
    """``tx.init`` as a function of the shapes of some parameters; the others keep theirs.

    Parameters keep their kinds and axes, and are given without boxes.
    """

    def __init__(self, tx: optax.GradientTransformation, params: Any) -> None:
        self.tx, self.parameters = tx, read_parameters(params)
        nodes, self.structure = named_leaves(params)
        self.leaves = [open_box(node) for _, node in nodes]

    def state(self, sizes: Sizes) -> Any:
        """The state, of shapes."""
        leaves = [p.update(shape=sizes.get(i, p.shape)) for i, p in enumerate(self.leaves)]
        with known(self.parameters):
            return init_shapes(self.tx.init, self.structure.unflatten(leaves))

    def __call__(self, sizes: Sizes) -> Shapes:
        """Its arrays by their paths."""
        return dict(jax.tree_util.tree_leaves_with_path(self.state(sizes)))

    def parts(self, sizes: Sizes) -> Iterator[tuple[Sizes, Shapes]]:
        """The same, without those parameters whose shape `tx.init` refuses."""
        try:
            yield sizes, self(sizes)
        except Exception:
            items = list(sizes.items())
            half = len(items) // 2
            for some in (items[:half], items[half:]) if half else ():
                yield from self.parts(dict(some))


class _Tries(NamedTuple):
    """Tries in which some parameters grow, each in a combination of its own.

    Attributes:
      combinations: of each parameter, in which tries it grows.
      moved: of each state array, in which it changes.
    """

    combinations: Sequence[tuple[int, ...]]
    moved: Mapping[Path, tuple[int, ...]]

    def owner(self, moved: tuple[int, ...]) -> int | None:
        """Combinations are as large as each other: no two together are a third."""
        return self.combinations.index(moved) if moved in self.combinations else None


def _tries_by_parameter(init: _Init, base: Shapes) -> _Tries:
    """Doubles all axes of parameters; 11 tries tell 300 parameters apart."""
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
    """Changes one axis of each of some parameters, all at the same time, and sees what moves.

    The axes change by one of their parts; where no such try counts, by one number too.
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
    """The tries in which no array changes in a way that it does not in every try."""
    odd = {path for path in tries[0] if all(t[path] is None for t in tries)} if tries else set()
    return [t for t in tries if all(moved is not None or p in odd for p, moved in t.items())]


def _moved(old: Any, new: Any, size: int, other: int) -> tuple[int, ...] | None:
    """The axes that changed, if all did as `size` to `other`; None if the array else changed."""
    if new is None or len(new.shape) != len(old.shape):
        return None
    pairs = enumerate(zip(old.shape, new.shape, strict=True))
    changed = {a: (m, n) for a, (m, n) in pairs if m != n}
    if any(m * other != n * size for m, n in changed.values()):
        return None
    return tuple(changed)
