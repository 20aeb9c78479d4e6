"""Reads the kinds of the parameters in a tree, and their rows and columns."""

import contextlib
import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import optax

from memopt.axes import LAST_TWO, Axes, Matrix, as_tuple, axes_of
from memopt.names import MATRIX, VECTOR, Entry, kinds_of
from memopt.trees import axis_names, named_leaves, open_box


class Parameter(NamedTuple):
    """The description of a parameter that is passed to selections of matrices.

    Attributes:
        name: the parameter's keys joined by ``/``.
        shape: the shape of the array.
        dtype: the dtype of the array; None if it was read without a tree.
        kind: "matrix", "embedding", "position", "router", "head" or "vector".
        matrix: its rows and columns; None for a vector.
        why: the reason for `kind` and `matrix`.
        doubt: a reason why `matrix` may be wrong, or "".
        otherwise: the rows and columns if the doubt is justified.
        alike: names of the parameters with the same doubt.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    kind: str
    matrix: Matrix | None
    why: str
    doubt: str = ""
    otherwise: Matrix = Matrix()
    alike: tuple[str, ...] = ()

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def warn_of_doubt(self, selection: str) -> None:
        """Warns once if `matrix` is in doubt, and suggests the `matrices` that resolves it.

        Args:
            selection: the name of the selection in `memopt` to use for the other parameters.
        """
        subject = re.sub(r"\d+", "", self.doubt)
        if self.doubt and subject not in _WARNED:
            _WARNED.add(subject)
            tail = lambda name: re.split(r"(?:^|/)\d+/", name)[-1]  # the same in all layers
            ends = tuple(map(tail, self.alike or (self.name,)))
            warnings.warn(
                f"{self.name!r} of shape {self.shape} is taken for memopt.{self.matrix} "
                f"({self.why}), but {self.doubt}; it may be memopt.{self.otherwise}. Choose one by "
                f"matrices=lambda name, p: memopt.{self.otherwise} if name.endswith({ends}) "
                f"else memopt.{selection}(name, p), or with the former; see memopt.describe.",
                stacklevel=2,
            )


_WARNED: set[str] = set()
_KNOWN: ContextVar[Mapping[str, Parameter]] = ContextVar("known", default=MappingProxyType({}))

_AXES_AT_INIT: dict[tuple[tuple[str, tuple[int, ...]], ...], tuple[Any, ...]] = {}
"""Axis names of trees with boxes, by the names and shapes of all leaves.

`nnx.Optimizer` and MaxText open the boxes between ``tx.init`` and ``tx.update``. A tree without
boxes and with the same leaves is assumed to have the same axis names.
"""


def read_parameters(tree: Any) -> list[Parameter]:
    """Reads the kind, rows and columns of each parameter of a tree, in the order of its leaves.

    Args:
        tree: any pytree of arrays or ``jax.ShapeDtypeStruct``, with or without boxes.

    Raises:
        TypeError: if a leaf has no shape, such as an activation function in an Equinox model.
        ValueError: if two leaves have the same name.

    Example:
        >>> params = {"q": (64, 4, 16), "o": (4, 16, 64), "lm_head": (64, 512)}
        >>> params = {name: jax.ShapeDtypeStruct(s, "float32") for name, s in params.items()}
        >>> for p in read_parameters(params):
        ...     print(p.name, p.kind, p.matrix, p.why, sep="; ")
        lm_head; head; Matrix(rows=-2, cols=-1); 'lm_head' in its name
        o; matrix; Matrix(rows=(0, 1), cols=2); it has the head axes of 'q'
        q; matrix; Matrix(rows=0, cols=(1, 2)); it has the head axes of 'o'
    """
    nodes, _ = named_leaves(tree)
    arrays = [open_box(node) for _, node in nodes]
    for (name, _), x in zip(nodes, arrays, strict=True):
        if not hasattr(x, "shape"):
            raise TypeError(
                f"params must have arrays only, got a {type(x).__name__} at {name!r}; of a model "
                "of Equinox pass eqx.filter(model, eqx.is_array)."
            )
    shapes = tuple((name, tuple(x.shape)) for (name, _), x in zip(nodes, arrays, strict=True))
    axes = tuple(axis_names(node) for _, node in nodes)
    if len(dict(shapes)) < len(shapes):
        twice = next(name for name, _ in shapes if [s[0] for s in shapes].count(name) > 1)
        raise ValueError(f"params must not have two leaves of the same name, got {twice!r}.")
    if any(axes):
        if _AXES_AT_INIT.setdefault(shapes, axes) != axes:
            warnings.warn(
                f"the axes of {shapes[0][0]!r} and other parameters of the same names and shapes "
                "had other names before: without their boxes they are read by the new names.",
                stacklevel=2,
            )
        _AXES_AT_INIT[shapes] = axes
    else:
        axes = _AXES_AT_INIT.get(shapes, axes)
    found = _read(tuple(Entry(*shape, own) for shape, own in zip(shapes, axes, strict=True)))
    known = _KNOWN.get()
    return [
        known.get(p.name, p)._replace(shape=p.shape, dtype=x.dtype)
        for p, x in zip(found, arrays, strict=True)
    ]


def read_parameter(name: str, leaf: Any) -> Parameter:
    """Reads a parameter from its own name and shape, without the tree around it.

    Args:
        name: the parameter's keys joined by ``/``.
        leaf: any object with a `shape`; a `Parameter` is returned unchanged.
    """
    if isinstance(leaf, Parameter):
        return leaf
    return _read((Entry(name, tuple(leaf.shape), None),))[0]


@contextlib.contextmanager
def known(parameters: Sequence[Parameter]) -> Iterator[None]:
    """A context that fixes the kind and the axes of parameters by name, in every tree.

    JAX's trace caches ignore this context; inside it, call functions directly or by `init_shapes`.

    Example:
        >>> w = jax.ShapeDtypeStruct((8, 4), "float32")
        >>> with known([Parameter("w", w.shape, w.dtype, "matrix", Matrix(1, 0), "as said")]):
        ...     read_parameters({"w": w.update(shape=(8, 5))})[0].matrix
        Matrix(rows=1, cols=0)
    """
    token = _KNOWN.set({**_KNOWN.get(), **{p.name: p for p in parameters}})
    try:
        yield
    finally:
        _KNOWN.reset(token)


_SHAPES_ONLY: ContextVar[bool] = ContextVar("shapes_only", default=False)


def init_shapes(init: Any, params: Any) -> Any:
    """Evaluates the shapes of ``init(params)`` without JAX's trace cache."""
    token = _SHAPES_ONLY.set(True)
    try:
        return jax.eval_shape(lambda params: init(params), params)
    finally:
        _SHAPES_ONLY.reset(token)


def are_only_shapes() -> bool:
    """Whether `init_shapes` is evaluating an `init`, perhaps for shapes that no model has."""
    return _SHAPES_ONLY.get()


@functools.lru_cache(maxsize=256)
def _read(entries: tuple[Entry, ...]) -> tuple[Parameter, ...]:
    axes, kinds = axes_of(entries), kinds_of(entries)
    return tuple(_parameter(e, axes.get(e.name, LAST_TWO), kinds.get(e.name)) for e in entries)


def _parameter(entry: Entry, axes: Axes, kind: tuple[str, str] | None) -> Parameter:
    vector = lambda why: Parameter(entry.name, entry.shape, None, VECTOR, None, why)
    if len(entry.shape) < 2:
        return vector("it has fewer than two axes")
    if 0 in entry.shape:
        return vector("it has no elements")
    if kind and kind[0] == VECTOR:
        return vector(kind[1])
    if axes.matrix is None:
        return vector(axes.why)
    sides = (axes.matrix.rows, axes.matrix.cols)
    if min(math.prod(entry.shape[a] for a in as_tuple(side)) for side in sides) < 2:
        return vector("it has a side of fewer than two")
    if kind:
        return Parameter(entry.name, entry.shape, None, kind[0], axes.matrix, kind[1])
    return Parameter(entry.name, entry.shape, None, MATRIX, *axes)


def reading_whole_trees(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Makes the parts of a partition read parameters from the whole tree, not from their part.

    A part that evaluates the loss does so at its own parameters, and those of the others.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        with known(read_parameters(params)):
            return tx.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if extra.get("obj_fn") is not None:
            extra["obj_fn"] = _of_part(extra["obj_fn"], params)
        with known(read_parameters(updates)):
            return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _of_part(obj_fn: Callable[[Any], Any], params: Any) -> Callable[[Any], Any]:
    """The loss as a function of a part of the parameters; the others stay as they are."""
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    fill = lambda x, p: p if is_masked(x) else x
    return lambda part: obj_fn(jax.tree.map(fill, part, params, is_leaf=is_masked))
