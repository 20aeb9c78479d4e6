"""Any Optax transformation, run on one parameter, or one layer of it, at a time."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.internals import Call, Cond, Program, Scan, While, trace
from memopt.parameters import init_shapes, known, read_parameters

CHOICES = (
    "Take one that looks at each matrix by itself (memopt.clip_by_matrix_rms), or "
    "memopt.clip_by_gradient_norm, which divides by the norm of the step before (previous=True) "
    "or, at the price of a second backward pass, by this step's own."
)


class PerParameterUpdate:
    """The update of a transformation, cut into the parts that compute each parameter's.

    ``tx.update`` is traced once, on shapes. The part of that program that computes the update of a
    parameter, and the new state that goes with it, runs when its gradient is there. The program
    also tells which state goes with which parameter, so that masks, partitions and injected
    hyperparameters need no rule of their own. Parameters with a leading axis of layers are updated
    one layer at a time, as stacks of one.

    A parameter or a state array goes by its place in ``jax.tree.leaves``.

    Args:
      tx: any transformation; it is given `value` and `gradient_norm` as extra arguments.
      params: its parameters, or their shapes.
      stacked: for each parameter whether its first axis counts layers; all count as many.

    Attributes:
      axes: of each state array the axis that counts layers, or None.
      needs_norm: whether an update depends on the norm of this step's whole gradient.

    Raises:
      ValueError: if the update of a parameter depends on other parameters or their gradients,
        or that of a layer on other layers.

    Example:
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
      >>> tx = optax.adam(0.1)
      >>> per_parameter = PerParameterUpdate(tx, params, [False, False])
      >>> state = jax.tree.leaves(tx.init(params))
      >>> update, state = per_parameter.update(
      ...     1, jnp.ones(3), params["b"], state, value=0.0, gradient_norm=0.0
      ... )
      >>> update.shape, list(state)                        # of b: its update, and its two moments
      ((3,), [2, 4])
    """

    def __init__(
        self, tx: optax.GradientTransformation, params: Any, stacked: Sequence[bool]
    ) -> None:
        parameters = read_parameters(params)
        self.names = [p.name for p in parameters]
        self.stacked = list(stacked)
        shapes = [p.shape for p in parameters]
        counts = {s[0] for s, layered in zip(shapes, stacked, strict=True) if layered}
        if len(counts) > 1:
            raise ValueError(f"stacked parameters must count the same layers, got {counts}.")
        # A number of layers that no other axis has tells an axis of layers by its length.
        layers = counts.pop() if counts else 1
        prime = _prime_beyond(layers, {n for s in shapes for n in s[1:]} | {layers})
        one, some = (_with_layers(params, stacked, n) for n in (1, prime))
        with known(parameters):  # of other numbers of layers, too
            states = [jax.tree.leaves(init_shapes(tx.init, p)) for p in (params, one, some)]
            self._program, with_some = _trace(tx, one), _trace(tx, some)
        self.axes = _layer_axes(*states, layers=layers, prime=prime)
        self._owners, self.needs_norm = self._separate()
        tags = [int(s) for s in stacked] * 2 + [int(a is not None) for a in self.axes] + [0, 0]
        mixed = _mixed(with_some, tags, prime)
        for name, layered, tag in zip(self.names, stacked, mixed, strict=False):
            if layered and tag == _MIXED:
                raise ValueError(
                    f"the update of {name!r} treats its layers together, as "
                    "optax.clip_by_block_rms, norms of whole arrays and random draws do: it "
                    "cannot be made a layer at a time. Take a transform that looks at each matrix "
                    "by itself, such as memopt.clip_by_matrix_rms."
                )

    def state_of(self, leaf: int | None, *, layered: bool) -> list[int]:
        """The state arrays that go with a parameter, or with none: counts, hyperparameters.

        Args:
          leaf: the parameter, or None.
          layered: those that count layers, or those that do not.
        """
        own = zip(self._owners, self.axes, strict=True)
        return [i for i, (o, axis) in enumerate(own) if o == leaf and (axis is not None) == layered]

    def update(
        self, leaf: int, gradient: Array, param: Array, state: Sequence[Array], **scalars: Any
    ) -> tuple[Array, dict[int, Array]]:
        """The update of a parameter, and the new state that goes with it.

        Args:
          leaf: which.
          gradient: of it, a layer as a stack of one.
          param: it, likewise.
          state: all state arrays as they were before the step, likewise.
          **scalars: `value`, the loss, and `gradient_norm`, the norm of the whole gradient, which
            is read only if `needs_norm`.
        """
        owned = self.state_of(leaf, layered=self.stacked[leaf])
        outputs = [leaf, *(len(self.names) + i for i in owned)]
        update, *new = self._run(outputs, {leaf: gradient}, {leaf: param}, state, **scalars)
        return update, dict(zip(owned, new, strict=True))

    def update_shared(
        self, state: Sequence[Array], *, layered: bool, **scalars: Any
    ) -> dict[int, Array]:
        """The new state that goes with no parameter, once a step or once a layer."""
        which = self.state_of(None, layered=layered)
        new = self._run([len(self.names) + i for i in which], {}, {}, state, **scalars)
        return dict(zip(which, new, strict=True))

    def _run(
        self,
        outputs: Sequence[int],
        gradients: Mapping[int, Array],
        params: Mapping[int, Array],
        state: Sequence[Array],
        value: Any,
        gradient_norm: Any,
    ) -> list[Array]:
        """Some outputs of the traced update; in the order of their numbers, as they are given."""
        leaves = range(len(self.names))
        given = [gradients.get(i) for i in leaves] + [params.get(i) for i in leaves]
        return self._program.needed(outputs)(*given, *state, value, gradient_norm)

    def _separate(self) -> tuple[list[int | None], bool]:
        """The parameter that each new state array depends on; whether an update reads the norm."""
        n = len(self.names)
        reads = []  # of each output: parameters, state arrays
        needs_norm = False
        for output in range(n + len(self.axes)):
            used = self._program.needed([output]).reads
            leaves = {i % n for i in range(2 * n) if used[i]}
            reads.append((leaves, {i for i in range(len(self.axes)) if used[2 * n + i]}))
            once = output >= n and not leaves and self.axes[output - n] is None
            needs_norm |= used[-1] and not once
        owners = [next(iter(leaves), None) for leaves, _ in reads[n:]]
        for output, (leaves, states) in enumerate(reads):
            own = {output} if output < n else leaves
            others = leaves - own or (leaves if len(leaves) > 1 else set())
            others |= {k for s in states if (k := owners[s]) is not None} - own
            if others:
                first = self.names[min(own)] if own else "shared state"
                second = self.names[min(others - {min(own)}) if own else min(others)]
                raise ValueError(
                    f"the update of {first!r} depends on {second!r} too, as clipping by the norm "
                    "of all gradients does, but the gradients are never held together here. "
                    f"{CHOICES}"
                )
        for axis, owner in zip(self.axes, owners, strict=True):
            if owner is not None and self.stacked[owner] != (axis is not None):
                raise ValueError(
                    f"state kept for {self.names[owner]!r} has no place for each of its layers: "
                    "it cannot be updated a layer at a time."
                )
        return owners, needs_norm


def _trace(tx: optax.GradientTransformation, params: Any) -> Program:
    """``tx.update`` as a program of flat gradients, parameters, state, loss and norm."""

    def loss(_: Any) -> Any:
        raise ValueError(
            "the optimizer evaluates the loss once more (obj_fn), which has no place in a step "
            "that updates parameters while the backward pass runs."
        )

    def update(gradients: Any, params: Any, state: Any, value: Array, norm: Array) -> Any:
        extra = {"value": value, "obj_fn": loss, "gradient_norm": norm, "leaf_by_leaf": True}
        updates, state = optax.with_extra_args_support(tx).update(gradients, state, params, **extra)
        structure: Any = jax.tree.structure(params)
        return structure.flatten_up_to(updates), jax.tree.leaves(state)

    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    state = init_shapes(tx.init, params)
    return trace(update, params, params, state, scalar, scalar)


def _with_layers(params: Any, stacked: Sequence[bool], layers: int) -> Any:
    """The shapes of the parameters if they had `layers` layers."""
    structure: Any
    leaves, structure = jax.tree.flatten(params)
    shapes = [
        jax.ShapeDtypeStruct((layers, *p.shape[1:]) if layered else p.shape, p.dtype)
        for p, layered in zip(leaves, stacked, strict=True)
    ]
    return structure.unflatten(shapes)


def _prime_beyond(least: int, sizes: set[int]) -> int:
    """The first prime above `least` that divides none of the sizes."""
    product = math.prod(n for n in sizes if n)
    n = least + 1
    while any(n % k == 0 for k in range(2, math.isqrt(n) + 1)) or product % n == 0:
        n += 1
    return n


def _layer_axes(
    full: Sequence[Any], one: Sequence[Any], some: Sequence[Any], *, layers: int, prime: int
) -> list[int | None]:
    """The axis of each state array that follows the number of layers, or None."""
    refused = ValueError(
        "the optimizer's state does not grow by equal parts with the number of layers, so that it "
        "cannot be updated a layer at a time; transforms that choose or group layers do this."
    )
    if not len(full) == len(one) == len(some):
        raise refused
    axes: list[int | None] = []
    for a, b, c in zip(full, one, some, strict=True):
        moved = [i for i, (m, n) in enumerate(zip(a.shape, c.shape, strict=False)) if m != n]
        axis = moved[0] if moved else None
        expected = list(a.shape)
        for other, size in ((c, prime), (b, 1)):
            if axis is not None:
                expected[axis] = size
            if tuple(expected) != other.shape or a.dtype != other.dtype:
                raise refused
        if axis is not None and a.shape[axis] != layers:
            raise refused
        axes.append(axis)
    return axes


_CLEAN, _BY_LAYER, _MIXED = range(3)


def _mixed(program: Program, tags: Sequence[int], prime: int) -> list[int]:
    """Whether the layers of a program's inputs meet on the way to its outputs.

    Layers are counted by axes whose length `prime` divides, and by no others. What is computed
    from an array with such an axis and has none itself has seen several layers.

    Args:
      program: traced with `prime` layers.
      tags: of its inputs, `_CLEAN`, `_BY_LAYER` or `_MIXED`.
      prime: the number of layers.

    Returns:
      The tags of its outputs.
    """
    seen = dict(zip(program.inputs, tags, strict=True))
    tag = lambda v: seen.get(v, _CLEAN)  # a variable without a tag is a constant
    layered = lambda v: any(n and n % prime == 0 for n in getattr(v.aval, "shape", ()))
    inner = lambda program, tags: _mixed(program, tags, prime)

    for eqn in program.equations():
        given = [tag(v) for v in eqn.inputs]
        match eqn.inner:
            case Cond(branches):
                each = [inner(branch, given[1:]) for branch in branches]
                outs = [max(column) for column in zip(*each, strict=True)]
                outs = [_MIXED] * len(outs) if given[0] else outs
            case Scan(body, constants, count):
                carried = slice(constants, constants + count)
                outs, before = inner(body, given), None
                while before != given[carried]:
                    before = given[carried]
                    given[carried] = list(map(max, before, outs))
                    outs = inner(body, given)
            case While(test, body, of_test, of_body):
                carry, before = given[of_test + of_body :], None
                while before != carry:
                    before = carry
                    carry = list(map(max, carry, inner(body, given[of_test:][:of_body] + carry)))
                stop = inner(test, given[:of_test] + carry)[0]
                outs = [_MIXED] * len(carry) if stop else carry
            case Call(body):
                outs = inner(body, given)
            case None:
                outs = [max(given, default=_CLEAN)] * len(eqn.outputs)
        drawn = eqn.name == "random_bits"
        from_layers = any(
            t == _BY_LAYER and layered(v) for t, v in zip(given, eqn.inputs, strict=True)
        )
        for v, t in zip(eqn.outputs, outs, strict=True):
            lost = t == _BY_LAYER and from_layers and not layered(v)
            seen[v] = _MIXED if lost or (drawn and layered(v)) else t
    return [tag(v) for v in program.outputs]
