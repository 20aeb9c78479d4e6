"""Counts the bytes of an optimizer's state for each parameter."""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import optax

from memopt.checked import checked
from memopt.parameters import init_shapes
from memopt.state.codecs import bits_of
from memopt.state.owners import parts
from memopt.trees import named_leaves


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """The result of `state_bytes`; ``print`` shows it as a table.

    Attributes:
        parameters: {leaf name: bytes of the parameter}.
        states: {leaf name: bytes of the state kept for it}.
        shared: bytes of state that belongs to no single parameter: step counts, hyperparameters.
        kept_by: {leaf name: the transformations that keep state for it}, by their states' names.
        formulas: {leaf name: the shapes of the arrays kept for it}. ``"2·(8×64×4) + 8"`` means two
            arrays of that shape and eight more numbers, in float32 unless another dtype is named.
        shared_formula: the same for the shared state.
    """

    parameters: Mapping[str, int]
    states: Mapping[str, int]
    shared: int
    kept_by: Mapping[str, tuple[str, ...]]
    formulas: Mapping[str, str]
    shared_formula: str

    @property
    def total(self) -> int:
        """All bytes of the state."""
        return sum(self.states.values()) + self.shared

    def __getitem__(self, name: str) -> int:
        return self.states[name]

    def __str__(self) -> str:
        rows = [(n, p, self.states[n], self.formulas[n]) for n, p in self.parameters.items()]
        rows.append(("shared", 0, self.shared, self.shared_formula))
        rows.append(("total", sum(self.parameters.values()), self.total, ""))
        width = max(len(row[0]) for row in rows)
        lines = [f"{'leaf':<{width}} {'parameter':>16} {'state':>16}  numbers kept (float32)"]
        lines += [f"{n:<{width}} {p:>16,} {s:>16,}  {f}".rstrip() for n, p, s, f in rows]
        return "\n".join(lines)


@checked
def state_bytes(tx: optax.GradientTransformation, params: Any) -> StateBytes:
    """Counts the bytes of ``tx.init(params)``, exactly and without allocating memory.

    Args:
        tx: any Optax transformation.
        params: arrays or ``jax.ShapeDtypeStruct``.

    Returns:
        The bytes for each leaf, and the shapes they come from. Where a subtree of the state has the
        structure of `params`, each of its nodes is charged to the parameter at the same position,
        whatever its shape.

    Example:
        >>> params = {"w": jax.ShapeDtypeStruct((8, 4), "bfloat16")}
        >>> print(state_bytes(optax.adam(1e-3), params))
        leaf          parameter            state  numbers kept (float32)
        w                    64              128  2·(8×4) bfloat16
        shared                0                4  1 int32
        total                64              132
    """
    leaves, structure = named_leaves(params)
    names = [name for name, _ in leaves]
    kept: dict[str, list[Any]] = {name: [] for name in names}
    kept_by: dict[str, dict[str, None]] = {name: {} for name in names}
    shared: list[Any] = []
    # Shardings are dropped, because they would need their mesh to be set.
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    for part in parts(init_shapes(tx.init, like), like):
        if not part.has_parameters:
            shared.append(part.tree)
            continue
        for name, found in zip(names, structure.flatten_up_to(part.tree), strict=True):
            if arrays := jax.tree.leaves(found):
                kept[name] += arrays
                kept_by[name][part.kept_by] = None
    return StateBytes(
        parameters={name: bytes_of([leaf]) for name, leaf in leaves},
        states={name: bytes_of(arrays) for name, arrays in kept.items()},
        shared=bytes_of(shared),
        kept_by={name: tuple(keepers) for name, keepers in kept_by.items()},
        formulas={name: _formula(arrays) for name, arrays in kept.items()},
        shared_formula=_formula(shared),
    )


def bytes_of(tree: Any) -> int:
    """The bytes of all arrays of a tree, or of `jax.ShapeDtypeStruct`."""
    return sum(math.prod(x.shape) * bits_of(x.dtype) // 8 for x in jax.tree.leaves(tree))


def _formula(arrays: list[Any]) -> str:
    """The shapes of arrays, with a count of equal ones."""

    def term(count: int, shape: tuple[int, ...], dtype: str) -> str:
        size = "×".join(map(str, shape))
        if not shape:
            size = f"{count}"
        elif count > 1:
            size = f"{count}·({size})" if len(shape) > 1 else f"{count}·{size}"
        return size if dtype == "float32" else f"{size} {dtype}"

    counts = collections.Counter((x.shape, str(x.dtype)) for x in arrays)
    return " + ".join(term(n, *which) for which, n in counts.items()) or "0"
