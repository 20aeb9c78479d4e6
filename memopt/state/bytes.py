"""How many bytes an optimizer's state takes, and for which parameter."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import optax

from memopt.matrices import leaf_name


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """What `state_bytes` found; ``print`` shows it as a table.

    Attributes:
      parameters: {leaf name: bytes of the parameter}.
      states: {leaf name: bytes of the state kept for it}.
      shared: bytes of state that belong to no one parameter: step counts, hyperparameters.
    """

    parameters: Mapping[str, int]
    states: Mapping[str, int]
    shared: int

    @property
    def total(self) -> int:
        """All bytes of the state."""
        return sum(self.states.values()) + self.shared

    def __getitem__(self, name: str) -> int:
        return self.states[name]

    def __str__(self) -> str:
        rows = [(name, size, self.states[name]) for name, size in self.parameters.items()]
        rows += [("shared", 0, self.shared), ("total", sum(self.parameters.values()), self.total)]
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{'leaf':<{width}} {'parameter':>16} {'state':>16}"]
        lines += [f"{name:<{width}} {p:>16,} {s:>16,}" for name, p, s in rows]
        return "\n".join(lines)


def state_bytes(tx: optax.GradientTransformation, params: Any) -> StateBytes:
    """Counts the bytes of ``tx.init(params)``, exactly and without allocating any of it.

    Args:
      tx: any Optax transformation.
      params: arrays, or ``jax.ShapeDtypeStruct`` in their place.

    Returns:
      Bytes leaf by leaf. State that stands at a parameter's place in a tree shaped like
      `params` counts for that parameter, whatever its own shape.

    Example:
      >>> params = {"w": jax.ShapeDtypeStruct((8, 4), "bfloat16")}
      >>> print(state_bytes(optax.adam(1e-3), params))
      leaf          parameter            state
      w                    64              128
      shared                0                4
      total                64              132
    """
    structure: Any
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [leaf_name(path) for path, _ in leaves]
    states = dict.fromkeys(names, 0)
    shared = 0
    for like_params, part in _parts(jax.eval_shape(tx.init, params), structure):
        if like_params:
            for name, kept in zip(names, structure.flatten_up_to(part), strict=True):
                states[name] += _bytes(kept)
        else:
            shared += _bytes(part)
    parameters = {name: _bytes(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}
    return StateBytes(parameters, states, shared)


def _parts(state: Any, structure: Any) -> Iterator[tuple[bool, Any]]:
    """Subtrees of a state shaped like the parameters, and the leaves that are in none."""
    try:
        structure.flatten_up_to(state)
    except ValueError:
        children = jax.tree.leaves(state, is_leaf=lambda x: x is not state)
        if len(children) == 1 and children[0] is state:
            yield False, state
        else:
            for child in children:
                yield from _parts(child, structure)
    else:
        yield True, state


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
