"""Finds the rows and columns of the parameters in a tree.

They are determined by the axis names in boxes of other libraries, or else by the parameter's
module, or else they are the last two axes.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from memopt.names import ATTENTION_INPUTS, VECTOR, Entry, attention_part, kind_of, words


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The axes of an array that are the rows and columns of a matrix.

    All other axes are *stack* axes: the array is a stack of separate matrices (scanned layers,
    experts), and every transformation of memopt treats each of them separately, in one batched
    operation.

    Rows are assumed to be inputs and columns outputs, which matters for Muon's scale and for the
    side that a subspace projects in square matrices; see `memopt.out_in`.

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


def as_tuple(side: int | Sequence[int]) -> tuple[int, ...]:
    """The axes of one side of a `Matrix`, as a tuple."""
    return tuple(side) if isinstance(side, Sequence) else (side,)


class Axes(NamedTuple):
    """Rows and columns of an array, as in `memopt.parameters.Parameter`."""

    matrix: Matrix | None
    why: str
    doubt: str = ""
    otherwise: Matrix = Matrix()
    alike: tuple[str, ...] = ()


LAST_TWO = Axes(Matrix(), "its last two axes")


def axes_of(entries: Sequence[Entry]) -> dict[str, Axes]:
    """Finds rows and columns for the parameters whose axes are not simply the last two."""
    found = {}
    for e in entries:
        matrix, settled = _by_axis_names(e.axes or ())
        if settled:
            text = "×".join(name or "?" for name in e.axes or ())
            found[e.name] = Axes(matrix, f"its box names its axes {text}")
    return _attention(entries) | _low_rank_pairs(entries) | _convolutions(entries) | found


LAYER_AXES = frozenset({"layer", "layers"})
"""Names that are only used for an axis of layers; other names may be those of mesh axes."""

STACK_AXES = LAYER_AXES | {"block", "blocks", "stack", "scan", "stage", "stages", "repeats"}
STACK_AXES |= {"circular_repeats", "qkv", "exp", "expert", "experts", "num_experts"}
"""Names of stack axes."""

HEAD_AXES = frozenset(
    {"head", "heads", "num_heads", "q_heads", "kv_head", "kv_heads", "num_kv_heads"}
    | {"q_heads_per_group", "kv", "head_dim", "head_size", "kv_head_dim", "d_head"}
)
"""Names of axes of heads or inside a head; together they form one side of a matrix."""


def _by_axis_names(names: tuple[str | None, ...]) -> tuple[Matrix | None, bool]:
    """Rows and columns by axis names, None for a vector; and whether the names determine them.

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
    layered = bool(LAYER_AXES.intersection(names))
    if len(core) == 2 < len(names) and (layered or None not in names):
        return Matrix(*core), True
    if len(core) == 1 and len(names) == 2 and layered and None not in names:
        return None, True
    if len(core) > 2 and heads and len(others) == 1 and names[others[0]]:
        heads_last = others[0] < heads[-1]
        return (Matrix(others[0], heads) if heads_last else Matrix(heads, others[0])), True
    return None, False


def _attention(entries: Sequence[Entry]) -> dict[str, Axes]:
    """Rows and columns of attention kernels with separate axes for heads.

    Such an output kernel is (heads, head_dim, d) and the query kernel (d, heads, head_dim); stacked
    dense kernels are (…, n, d) and (…, d, n). Gemma names its kernels "einsum" and puts heads
    first.
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
    """Rows and columns of one module's kernels, from the shapes of its output and query."""
    inputs = [e for part in ATTENTION_INPUTS for e in kinds.get(part, ())]
    outputs = kinds.get("output", ())
    if not inputs:
        return {}  # an output without a query, for example of an MLP
    query = inputs[0]
    if not outputs:
        return _in_doubt(inputs, f"no output beside {query.name!r} tells heads from layers")
    output = outputs[0]
    o, q = output.shape, query.shape
    dense = o[:-2] == q[:-2] and o[-2] == q[-1]
    stacked = _is_stacked(_around(module), o[0], entries)
    if dense and stacked:
        return {}
    for stack in _stacks(len(o)):
        h, hd, d = (a for a in range(len(o)) if a not in stack)
        alike = len(q) >= len(o) and all(o[a] == q[a] for a in stack)
        if alike and q[-2] == o[h] and (q[-1] == o[hd] or q[h] > o[h]):
            to_heads = [_to_heads(e.shape, stack, o[h]) for e in inputs]
            doubt = "it may be a stack of matrices" if dense and stacked is None else ""
            why = f"it has the head axes of {output.name!r}"
            found = {
                e.name: Axes(matrix, why, doubt)
                for e, matrix in zip(inputs, to_heads, strict=True)
                if matrix
            }
            why = f"it has the head axes of {query.name!r}"
            found[output.name] = Axes(Matrix((h, hd), d), why, doubt)
            if stack == (1,):
                found |= _scanned_along(1, o[1], module, entries, found)
            return found
    if dense:
        return {}
    doubt = f"{query.name!r} and {output.name!r} do not tell heads from layers"
    found = _in_doubt(inputs, doubt)
    axes = LAST_TWO._replace(doubt=doubt, otherwise=Matrix((-3, -2), -1))
    return found | ({output.name: axes} if found else {})


def _in_doubt(entries: Sequence[Entry], doubt: str) -> dict[str, Axes]:
    """Uses the last two axes, with a doubt if the axis before them may be the model's width."""
    names = [e.name for e in entries if e.shape[-3] > e.shape[-2]]
    axes = LAST_TWO._replace(doubt=doubt, otherwise=Matrix(-3, (-2, -1)), alike=tuple(names))
    return dict.fromkeys(names, axes)


def _stacks(ndim: int) -> list[tuple[int, ...]]:
    """Candidate stack axes of an array with three other axes: the first axes, or axis 1."""
    return [tuple(range(ndim - 3)), *([(1,)] if ndim == 4 else [])]


def _to_heads(shape: tuple[int, ...], stack: tuple[int, ...], heads: int) -> Matrix | None:
    """Rows and columns of a (d, heads, head_dim) kernel, or None if the heads do not match.

    A fused (d, 3, heads, head_dim) or (3, d, heads, head_dim) kernel is a stack of three.

    Args:
        shape: the shape of the array.
        stack: the axes of layers.
        heads: the number of the output's heads; keys and values may have fewer.
    """
    core = [a for a in range(len(shape)) if a not in stack]
    if len(core) < 3 or shape[core[-2]] == 0 or heads % shape[core[-2]]:
        return None
    return Matrix(max(core[:-2], key=lambda a: shape[a]), (core[-2], core[-1]))


def _around(module: str) -> str:
    """The common prefix of the names in the block around an attention module."""
    parent = module.split("*")[0].rstrip("/").rpartition("/")[0]
    return f"{parent}/" if parent else ""


def _is_stacked(prefix: str, layers: int, entries: Sequence[Entry]) -> bool | None:
    """Whether a block's norms and biases have a first axis of layers; None if it has neither."""
    kind = lambda e: (kind_of(e.name) or ("",))[0]
    vectors = [e.shape for e in entries if e.name.startswith(prefix) and kind(e) == VECTOR]
    return all(len(s) > 1 and s[0] == layers for s in vectors) if vectors else None


def _scanned_along(
    axis: int, layers: int, module: str, entries: Sequence[Entry], found: Mapping[str, Axes]
) -> dict[str, Axes]:
    """Rows and columns of the other kernels in a block that is scanned along this axis."""
    around = _around(module)
    why = f"its axis {axis} counts the layers of {around!r}"
    return {
        e.name: Axes(Matrix(0, 2), why)
        for e in entries
        if e.name.startswith(around) and e.name not in found
        if len(e.shape) == 3 and e.shape[axis] == layers
    }


def _low_rank_pairs(entries: Sequence[Entry]) -> dict[str, Axes]:
    """Rows and columns of LoRA's A and B: the rank is the last axis of A and the first of B."""
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


_CONVOLUTION = re.compile(r"(?:^|_)conv(?:_?([123])_?d)?(_transpose$|$|_)")


def _convolutions(entries: Sequence[Entry]) -> dict[str, Axes]:
    """Rows and columns of convolutions; outputs are the last axis, or the first of a "weight"."""
    found = {}
    for e in entries:
        *modules, last = e.name.split("/")
        ndim = len(e.shape)
        matches = (_CONVOLUTION.search(words(part)) for part in [last, *modules[-1:]])
        named = next(filter(None, matches), None)
        window = ndim == 4 and e.shape[0] == e.shape[1]
        unnamed = window and e.shape[0] in (3, 5, 7) and last == "kernel"
        if ndim < 3 or not (named or unnamed) or re.search("expert|moe", e.name.lower()):
            continue
        if named and named[2] == "_" and not window:
            continue  # a name such as conv_proj is not always a convolution
        outputs_first = last == "weight"
        if e.shape[1 if outputs_first else -2] == 1:
            found[e.name] = Axes(None, "it is a convolution with one input for each output")
            continue
        block = "/".join(modules[:-1])
        stack = int(ndim > 3 and bool(_is_stacked(block, e.shape[0], entries)))
        equal = len(set(e.shape[: ndim - 2])) == 1
        dimensions = int(named[1] or 0) if named else 2
        dimensions = dimensions or (ndim - 2 if equal else min(2, ndim - 2))
        doubt = f"a convolution in {dimensions} dimensions has {dimensions + 2} axes"
        doubt = doubt if not stack and ndim > dimensions + 2 else ""
        first, *others = axes = tuple(range(stack, ndim))
        matrix = Matrix(first, tuple(others)) if outputs_first else Matrix(axes[:-1], ndim - 1)
        found[e.name] = Axes(matrix, "it is a convolution", doubt)
    return found
