"""What each parameter of a tree is, and which of its axes are rows and columns.

Read, in this order, from the axis names in the boxes of other libraries, from the module that a
parameter is in, and from its last two axes.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from memopt.names import attention_part, kind_of, words
from memopt.trees import axis_names, named_leaves, open_box

MATRIX, EMBEDDING, POSITION = "matrix", "embedding", "position"
ROUTER, HEAD, VECTOR = "router", "head", "vector"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Names the axes of an array that are a matrix's rows and columns.

    Every axis that is not named is a *stack*: an array is as many separate matrices as its
    stack has entries (scanned layers, experts), and every transform of memopt treats each of
    them on its own, in one batched operation.

    Rows are taken for inputs and columns for outputs, which matters to Muon's scale and to the
    choice of the side that a subspace projects in square matrices; see `memopt.out_in`.

    Attributes:
      rows: the axis, or axes, that index rows; negative ones count from the end.
      cols: the axis, or axes, that index columns.

    Example:
      >>> Matrix()                        # a Dense kernel, scanned or not
      Matrix(rows=-2, cols=-1)
      >>> Matrix(rows=0, cols=(1, 2))     # an attention kernel (d, heads, head_dim)
      Matrix(rows=0, cols=(1, 2))
    """

    rows: int | tuple[int, ...] = -2
    cols: int | tuple[int, ...] = -1


class Parameter(NamedTuple):
    """What is known of a parameter; a selection of matrices is given it in place of the array.

    Attributes:
      name: its keys joined by ``/``.
      shape: of the array.
      dtype: of the array.
      kind: "matrix", "embedding", "position", "router", "head" or "vector".
      matrix: its rows and columns; None of a vector.
      why: what says so.
      doubt: what speaks against it, "" if nothing does.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    kind: str
    matrix: Matrix | None
    why: str
    doubt: str = ""

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def warn_of_doubt(self) -> None:
        """Says once which entry of `matrices` would settle what is in doubt."""
        if self.doubt:
            _warn_once(
                f"{self.name!r} of shape {self.shape} is taken for {self.matrix}, {self.why}, but "
                f"{self.doubt}; settle it by matrices=lambda name, leaf: {self.matrix} if name == "
                f"{self.name!r} else memopt.hidden_matrices(name, leaf); see memopt.describe."
            )


class Entry(NamedTuple):
    """A parameter as it is read.

    Attributes:
      name: its keys joined by ``/``.
      shape: of the array.
      axes: the names of its axes, if known.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...] | None


class Axes(NamedTuple):
    """Rows and columns, None of a vector; what says so, and what speaks against it."""

    matrix: Matrix | None
    why: str
    doubt: str = ""


_LAST_TWO = Axes(Matrix(), "its last two axes")

_KNOWN: contextvars.ContextVar[Mapping[str, Parameter] | None] = contextvars.ContextVar(
    "memopt_known_parameters", default=None
)

_NAMED: dict[tuple[str, tuple[int, ...]], tuple[str | None, ...]] = {}
"""Axis names by parameter, where the boxes that had them say more than shapes do.

Trainers open the boxes between ``tx.init`` and ``tx.update``: `nnx.Optimizer` always, MaxText
too. A bare array of the same name and shape is the one that was in the box.
"""


def read_parameters(tree: Any) -> list[Parameter]:
    """What each parameter of a tree is, in the order of its leaves.

    Args:
      tree: any pytree of arrays, or of shapes, in boxes or bare.

    Example:
      >>> import jax
      >>> params = {"q": (64, 4, 16), "o": (4, 16, 64), "lm_head": (64, 512)}
      >>> params = {name: jax.ShapeDtypeStruct(s, "float32") for name, s in params.items()}
      >>> for p in read_parameters(params):
      ...     print(p.name, p.kind, p.matrix, p.why, sep="; ")
      lm_head; head; Matrix(rows=-2, cols=-1); 'lm_head' in its name
      o; matrix; Matrix(rows=(0, 1), cols=2); its axes are those of 'q' turned round
      q; matrix; Matrix(rows=0, cols=(1, 2)); its axes are those of 'o' turned round
    """
    nodes, _ = named_leaves(tree)
    arrays = [(name, open_box(node)) for name, node in nodes]
    said = _KNOWN.get() or {}
    if all(name in said for name, _ in arrays):
        return [said[name]._replace(shape=tuple(x.shape), dtype=x.dtype) for name, x in arrays]
    shapes = [(name, tuple(x.shape)) for name, x in arrays]
    names = [axis_names(node) for _, node in nodes]
    if any(names):
        _remember(shapes, names)
    entries = tuple(
        Entry(*shape, own or _NAMED.get(shape)) for shape, own in zip(shapes, names, strict=True)
    )
    found = zip(arrays, _read(entries), strict=True)
    return [
        Parameter(name, tuple(x.shape), x.dtype, *(said[name][3:] if name in said else what))
        for (name, x), what in found
    ]


def read_parameter(name: str, leaf: Any) -> Parameter:
    """What a parameter is that stands alone.

    Args:
      name: its keys joined by ``/``.
      leaf: anything with a `shape`; a `Parameter` is what it is.
    """
    if isinstance(leaf, Parameter):
        return leaf
    shape = tuple(leaf.shape)
    (what,) = _read((Entry(name, shape, None),))
    found = Parameter(name, shape, getattr(leaf, "dtype", None), *what)
    return found._replace(doubt="")  # what is beside it would settle it


@contextlib.contextmanager
def known(parameters: Sequence[Parameter]) -> Iterator[None]:
    """Within it these parameters are what they are said to be, whatever their shapes.

    Example:
      >>> import jax
      >>> w = jax.ShapeDtypeStruct((8, 4), "float32")
      >>> with known([Parameter("w", w.shape, w.dtype, "matrix", Matrix(1, 0), "as said")]):
      ...     read_parameters({"w": w.update(shape=(8, 5))})[0].matrix
      Matrix(rows=1, cols=0)
    """
    token = _KNOWN.set({**(_KNOWN.get() or {}), **{p.name: p for p in parameters}})
    try:
        yield
    finally:
        _KNOWN.reset(token)


def _remember(
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    names: Sequence[tuple[str | None, ...] | None],
) -> None:
    """Keeps the axis names without which a parameter would be read otherwise."""
    rows = [Entry(*shape, own) for shape, own in zip(shapes, names, strict=True)]
    without = _read(tuple(e._replace(axes=None) for e in rows))
    for shape, e, a, b in zip(shapes, rows, _read(tuple(rows)), without, strict=True):
        if e.axes and a[:2] != b[:2]:
            _NAMED[shape] = e.axes
        else:
            _NAMED.pop(shape, None)


@functools.lru_cache(maxsize=256)
def _read(entries: tuple[Entry, ...]) -> tuple[tuple[str, Matrix | None, str, str], ...]:
    """Of each parameter its kind, rows and columns, what says so, and what is in doubt."""
    axes, kinds = _axes(entries), _kinds(entries)
    return tuple(_parameter(e, axes.get(e.name, _LAST_TWO), kinds.get(e.name)) for e in entries)


def _parameter(
    entry: Entry, axes: Axes, kind: tuple[str, str] | None
) -> tuple[str, Matrix | None, str, str]:
    if len(entry.shape) < 2:
        return VECTOR, None, "it has fewer than two axes", ""
    if kind and kind[0] == VECTOR:
        return VECTOR, None, kind[1], ""
    if axes.matrix is None:
        return VECTOR, None, axes.why, ""
    sides = (axes.matrix.rows, axes.matrix.cols)
    if min(math.prod(entry.shape[a] for a in as_tuple(side)) for side in sides) < 2:
        return VECTOR, None, "it has a side of fewer than two", ""
    return (kind[0], axes.matrix, kind[1], "") if kind else (MATRIX, *axes)


def as_tuple(side: int | tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a side of a `Matrix`."""
    return side if isinstance(side, tuple) else (side,)


def _kinds(entries: Sequence[Entry]) -> dict[str, tuple[str, str]]:
    """The kinds that names, and what else is in the tree, say; and what it is that says so."""
    found = {}
    names = {e.name for e in entries}
    for e in entries:
        said = kind_of(e.name)
        module, _, last = e.name.rpartition("/")
        around, _, own = module.rpartition("/")
        if said:
            found[e.name] = (said[0], f"{said[1]!r} in its name")
        elif last == "b" and module and f"{module}/a" not in names:
            found[e.name] = (VECTOR, "'b' in a module is a bias")
        elif words(own) == "gate" and _has_experts(around, names):
            found[e.name] = (ROUTER, f"{own!r} beside experts")
        elif e.axes and "vocab" in e.axes:
            kind = EMBEDDING if e.axes[0] == "vocab" else HEAD
            found[e.name] = (kind, "'vocab' in the axes of its box")
    embeddings = [e for e in entries if found.get(e.name, ("",))[0] == EMBEDDING]
    if len(embeddings) == 1 and HEAD not in {kind for kind, _ in found.values()}:
        # What else has a side as long as the vocabulary, if it is one only, gives logits.
        sides = sorted(embeddings[0].shape)
        others = [e for e in entries if e.name not in found and sorted(e.shape) == sides]
        if len(others) == 1 and len(sides) == 2 and sides[0] < sides[1]:
            why = f"no other matrix has the sides of {embeddings[0].name!r}"
            found[others[0].name] = (HEAD, why)
    return found


def _has_experts(module: str, names: set[str]) -> bool:
    """Whether a module is a mixture of experts: by its name, or by what it holds."""
    inside = [name for name in names if name.startswith(f"{module}/")]
    return "moe" in words(module.rpartition("/")[2]) or any("expert" in name for name in inside)


def _axes(entries: Sequence[Entry]) -> dict[str, Axes]:
    """Rows and columns of the arrays of which more is known than their last two axes."""
    found = {}
    for e in entries:
        matrix, settled = _by_axis_names(e.axes or ())
        if settled:
            text = "×".join(name or "?" for name in e.axes or ())
            found[e.name] = Axes(matrix, f"its box names its axes {text}")
    unsettled = [e for e in entries if e.name not in found]
    return _attention(unsettled) | _low_rank_pairs(unsettled) | _convolutions(unsettled) | found


STACK_AXES = frozenset(
    {"layer", "layers", "block", "blocks", "stack", "scan", "stage", "stages"}
    | {"repeats", "circular_repeats", "qkv", "exp", "expert", "experts", "num_experts"}
)
"""Names of axes that count matrices."""

HEAD_AXES = frozenset(
    {"head", "heads", "num_heads", "q_heads", "kv_head", "kv_heads", "num_kv_heads"}
    | {"q_heads_per_group", "kv", "head_dim", "head_size", "kv_head_dim", "d_head"}
)
"""Names of axes of heads and of what is within a head; together one side of a matrix."""


def _by_axis_names(names: tuple[str | None, ...]) -> tuple[Matrix | None, bool]:
    """Rows and columns by the names of axes, None of a vector; and whether these settle it.

    Example:
      >>> _by_axis_names(("embed", "layers", "q_heads", "kv"))
      (Matrix(rows=0, cols=(2, 3)), True)
      >>> _by_axis_names(("heads", "embed", "head_dim"))
      (Matrix(rows=1, cols=(0, 2)), True)
      >>> _by_axis_names(("norm", "layers")), _by_axis_names((None, "fsdp", None))
      ((None, True), (None, False))
    """
    core = [a for a, name in enumerate(names) if name not in STACK_AXES]
    heads = tuple(a for a in core if names[a] in HEAD_AXES)
    others = [a for a in core if names[a] not in HEAD_AXES]
    if len(core) < len(names) and len(core) <= 2:
        return (Matrix(*core) if len(core) == 2 else None), True
    if len(core) > 2 and heads and len(others) == 1 and names[others[0]]:
        heads_last = others[0] < heads[-1]
        return (Matrix(others[0], heads) if heads_last else Matrix(heads, others[0])), True
    return None, False


def _attention(entries: Sequence[Entry]) -> dict[str, Axes]:
    """Rows and columns of attention kernels whose heads have axes of their own.

    Their output is (heads, head_dim, d) where the query is (d, heads, head_dim); dense ones,
    stacked, are (…, n, d) and (…, d, n). Gemma's are named so and have heads first.
    """
    modules: dict[str, dict[str, list[Entry]]] = {}
    found: dict[str, Axes] = {}
    for e in entries:
        part = attention_part(e.name)
        ndim = len(e.shape)
        if part is None or ndim < 3:
            continue
        module, kind, own = part
        heads = (ndim - 3, ndim - 2) if kind == "output" else (ndim - 3, ndim - 1)
        if not own.endswith("einsum"):
            modules.setdefault(module, {}).setdefault(kind, []).append(e)
        elif kind == "output":
            found[e.name] = Axes(Matrix(heads, ndim - 1), f"{own!r} reads heads")
        else:
            found[e.name] = Axes(Matrix(ndim - 2, heads), f"{own!r} makes heads, its first axis")
    for module, kinds in modules.items():
        found |= _one_attention(module, kinds, entries)
    return found


def _one_attention(
    module: str, kinds: Mapping[str, Sequence[Entry]], entries: Sequence[Entry]
) -> dict[str, Axes]:
    makers = [*kinds.get("query", ()), *kinds.get("key and value", ())]
    if not makers:
        return {}  # an output alone, of an MLP say
    query, *outputs = makers[0], *kinds.get("output", ())
    if not outputs:
        return _in_doubt(makers, f"no output beside {query.name!r} tells heads from layers")
    output = outputs[0]
    o, q = output.shape, query.shape
    dense = o[:-2] == q[:-2] and o[-2:] == q[-2:][::-1]
    for stack in _stacks(len(o)):
        core = [a for a in range(len(o)) if a not in stack]
        h, hd, d = (o[a] for a in core)
        if any(o[a] != q[a] for a in stack) or not _makes_heads(q, stack, d, hd, h):
            continue
        if dense and _is_stacked(module, o[0], entries):
            return {}
        doubt = "it may be a stack of square matrices" if dense else ""
        found = {output.name: Axes(Matrix(tuple(core[:2]), core[2]), _turned(query), doubt)}
        for e in makers:
            if matrix := _makes_heads(e.shape, stack, d, hd):
                found[e.name] = Axes(matrix, _turned(output), doubt)
        if stack == (1,):
            found |= _scanned_along(1, o[1], module, entries, found)
        return found
    if dense:
        return {}
    doubt = f"those of {query.name!r} and {output.name!r} do not tell heads from layers"
    return _in_doubt([*makers, output], doubt)


def _in_doubt(entries: Sequence[Entry], doubt: str) -> dict[str, Axes]:
    """Their last two axes, of which a longer one before them is rather d than layers."""
    longer = lambda shape: shape[-3] > shape[-2]
    return {e.name: _LAST_TWO._replace(doubt=doubt) for e in entries if longer(e.shape)}


def _stacks(ndim: int) -> list[tuple[int, ...]]:
    """Which axes may be those of layers where three are not: the first, or the second alone."""
    return [tuple(range(ndim - 3)), *([(1,)] if ndim == 4 else [])]


def _makes_heads(
    shape: tuple[int, ...], stack: tuple[int, ...], d: int, head_dim: int, heads: int | None = None
) -> Matrix | None:
    """Rows and columns of what makes heads of d numbers; of q, k and v in one each is a matrix.

    Args:
      shape: of the array.
      stack: its axes of layers.
      d: the length of its first other axis.
      head_dim: that of its last.
      heads: that of the one before; None if there may be fewer.
    """
    core = [a for a in range(len(shape)) if a not in stack]
    if len(core) < 3 or (shape[core[0]], shape[core[-1]]) != (d, head_dim):
        return None
    return Matrix(core[0], (core[-2], core[-1])) if heads in (None, shape[core[-2]]) else None


def _turned(other: Entry) -> str:
    return f"its axes are those of {other.name!r} turned round"


def _is_stacked(module: str, layers: int, entries: Sequence[Entry]) -> bool:
    """Whether vectors around a module count as many layers on their first axis."""
    around = module.split("*")[0].rstrip("/").rpartition("/")[0]
    vectors = [
        e.shape
        for e in entries
        if e.name.startswith(around) and (kind_of(e.name) or ("",))[0] == VECTOR
    ]
    return any(len(shape) > 1 and shape[0] == layers for shape in vectors)


def _scanned_along(
    axis: int, layers: int, module: str, entries: Sequence[Entry], found: Mapping[str, Axes]
) -> dict[str, Axes]:
    """Rows and columns of what else is in a scanned module whose layers count along an axis."""
    around = module.split("*")[0].rstrip("/").rpartition("/")[0]
    why = f"its axis {axis} counts the layers of {around!r}"
    return {
        e.name: Axes(Matrix(0, 2), why)
        for e in entries
        if e.name.startswith(f"{around}/") and e.name not in found
        if len(e.shape) == 3 and e.shape[axis] == layers
    }


def _low_rank_pairs(entries: Sequence[Entry]) -> dict[str, Axes]:
    """Rows and columns of LoRA's A and B, whose rank is A's last axis and B's first."""
    by_name = {e.name: e for e in entries}
    found = {}
    for name, a in by_name.items():
        b = by_name.get(f"{name[:-1]}b")
        if not name.endswith("lora_a") or b is None:
            continue
        stack = min(len(a.shape), len(b.shape)) - 2
        if (
            len(a.shape) == len(b.shape) == 2
            or a.shape[:stack] != b.shape[:stack]
            or a.shape[-1] != b.shape[stack]
        ):
            continue
        why = "the rank is the last axis of A and the first of B"
        found[name] = Axes(Matrix(tuple(range(stack, len(a.shape) - 1)), len(a.shape) - 1), why)
        found[b.name] = Axes(Matrix(stack, tuple(range(stack + 1, len(b.shape)))), why)
    return found


def _convolutions(entries: Sequence[Entry]) -> dict[str, Axes]:
    """Rows and columns of convolutions: outputs are their last axis, the first of a "weight"."""
    found = {}
    for e in entries:
        *modules, last = e.name.split("/")
        ndim = len(e.shape)
        named = any(re.search("(^|_)conv", words(part)) for part in [last, *modules[-1:]])
        window = ndim == 4 and e.shape[0] == e.shape[1] and e.shape[0] in (3, 5, 7)
        if ndim < 3 or not (named or (window and last == "kernel")):
            continue
        outputs_first = last == "weight"
        inputs = e.shape[1 if outputs_first else -2]
        why = "a convolution, whose windows and inputs go together"
        doubt = "" if named else "nothing in its name says that it is a convolution"
        if ndim > 4:
            doubt = "an axis of it may count layers"
        if inputs == 1:
            found[e.name] = Axes(None, "a convolution of each channel by itself")
        elif outputs_first:
            found[e.name] = Axes(Matrix(0, tuple(range(1, ndim))), why, doubt)
        else:
            found[e.name] = Axes(Matrix(tuple(range(ndim - 1)), ndim - 1), why, doubt)
    return found


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
