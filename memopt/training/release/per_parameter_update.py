"""Any Optax transformation, applied to one parameter, or one layer of it, at a time."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.internals import Call, Cond, Program, Scan, While, trace
from memopt.parameters import init_shapes, known, read_parameters
from memopt.state.quantized_state import QuantizedState
from memopt.transforms.block_cycle import CycleBlocksState

Scalars = tuple[Any, Any, Any]
"""The loss, the norm of the whole gradient, and the number of the layer."""


class PerParameterUpdate:
    """Splits the update of a transformation into programs for one parameter each.

    ``tx.update`` is traced once, on shapes. The part of that program that computes the update of a
    parameter, and the new state that goes with it, runs when its gradient is there. The program
    also tells which state goes with which parameter, so that masks, partitions and injected
    hyperparameters need no rule of their own. Parameters with a leading axis of layers are updated
    one layer at a time, as stacks of one. State without an axis of layers is shared by all of
    them, if the update looks at the layer's number, as `memopt.cycle_blocks` does.

    Parameters and state arrays are numbered as in ``jax.tree.leaves``.

    Args:
        tx: any transformation; it is given `value` and `gradient_norm` as extra arguments, and
            `layer`, the number of a layer and how many there are.
        params: its parameters, or their shapes.
        stacked: for each parameter whether its first axis counts layers; all count as many.

    Attributes:
        axes: for each state array the axis that counts layers, or None.
        needs_norm: whether an update depends on the norm of this step's whole gradient.

    Raises:
        ValueError: if the update of a parameter depends on other parameters or their gradients,
            or that of a layer on other layers.

    Example:
        >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
        >>> tx = optax.adam(0.1)
        >>> per_parameter = PerParameterUpdate(tx, params, [False, False])
        >>> state = jax.tree.leaves(tx.init(params))
        >>> update, state = per_parameter.update(1, jnp.ones(3), params["b"], state, (0.0, 0.0, 0))
        >>> update.shape, list(state)                        # of b: its update, and its two moments
        ((3,), [2, 4])
    """

    def __init__(
        self, tx: optax.GradientTransformation, params: Any, stacked: Sequence[bool]
    ) -> None:
        parameters = read_parameters(params)
        self.names, self.stacked = [p.name for p in parameters], list(stacked)
        counts = {p.shape[0] for p, layered in zip(parameters, stacked, strict=True) if layered}
        if len(counts) > 1:
            raise ValueError(f"stacked parameters must count the same layers, got {counts}.")
        layers = counts.pop() if counts else 1
        # A number of layers that divides no other size tells an axis of layers by its length.
        prime = _prime_beyond(layers, {n for p in parameters for n in p.shape})
        shapes = [_with_layers(params, stacked, n) for n in (layers, 1, prime)]
        with known(parameters):  # of other numbers of layers, too
            states = [jax.tree.leaves(init_shapes(tx.init, p)) for p in shapes]
            self._program, with_prime = _trace(tx, shapes[1], layers), _trace(tx, shapes[2])
            _check_rounded_once(init_shapes(tx.init, params))
        self.axes = _layer_axes(states, (layers, 1, prime))
        self._owners, self.needs_norm = self._separate()
        by_layer = [*stacked, *stacked, *(axis is not None for axis in self.axes), *[False] * 3]
        tags = _mixed(with_prime, [_BY_LAYER if x else _CLEAN for x in by_layer], prime)
        for name, layered, tag in zip(self.names, stacked, tags, strict=False):
            if layered and tag == _MIXED:
                raise ValueError(
                    f"the update of {name!r} treats its layers together, as "
                    "optax.clip_by_block_rms, norms of whole arrays and random draws do: it "
                    "cannot be made a layer at a time. Take a transform that looks at each matrix "
                    "by itself, such as memopt.clip_by_matrix_rms."
                )

    def state_of(self, leaf: int) -> list[int]:
        """Finds the state arrays of a parameter."""
        return [i for i, owner in enumerate(self._owners) if owner == leaf]

    def state_in_loop(self) -> list[bool]:
        """Whether each state array has an axis of layers, or belongs to a stacked parameter."""
        own = zip(self.axes, self._owners, strict=True)
        of_stack = lambda owner: owner is not None and self.stacked[owner]
        return [axis is not None or of_stack(owner) for axis, owner in own]

    def update(
        self, leaf: int, gradient: Array, param: Array, state: Sequence[Array], scalars: Scalars
    ) -> tuple[Array, dict[int, Array]]:
        """Computes the update of a parameter, and its new state arrays.

        Args:
            leaf: the parameter.
            gradient: its gradient, that of a layer as a stack of one.
            param: its value, a layer as a stack of one.
            state: all state arrays before the step, layers as stacks of one.
            scalars: see `Scalars`; the norm is read only if `needs_norm`.
        """
        owned, leaves = self.state_of(leaf), len(self.names)
        given: list[Any] = [None] * 2 * leaves
        given[leaf], given[leaves + leaf] = gradient, param
        part = self._program.needed([leaf, *(leaves + i for i in owned)])
        update, *new = part(*given, *state, *scalars)
        return update, dict(zip(owned, new, strict=True))

    def update_shared(
        self, state: Sequence[Array], scalars: Scalars, *, layered: bool
    ) -> dict[int, Array]:
        """Computes the new state arrays of no parameter, once a step or once a layer."""
        own = enumerate(zip(self._owners, self.axes, strict=True))
        shared = [i for i, (o, axis) in own if o is None and (axis is not None) == layered]
        leaves = len(self.names)
        part = self._program.needed([leaves + i for i in shared])
        new = part(*[None] * 2 * leaves, *state, *scalars)
        return dict(zip(shared, new, strict=True))

    def _separate(self) -> tuple[list[int | None], bool]:
        """Finds the parameter of each state array, and whether an update reads the norm."""
        n = len(self.names)
        reads = [self._program.needed([i]).reads for i in range(n + len(self.axes))]
        leaves = [{i % n for i in range(2 * n) if used[i]} for used in reads]
        owners = [min(own, default=None) for own in leaves[n:]]
        needs_norm = False
        for output, used in enumerate(reads):
            own = {output} if output < n else leaves[output]
            states = zip(owners, used[2 * n : -3], strict=True)
            met = own | leaves[output] | {k for k, read in states if read and k is not None}
            first = min(own, default=None)
            if others := met - {first}:
                name = "shared state" if first is None else self.names[first]
                raise ValueError(
                    f"the update of {name!r} depends on {self.names[min(others)]!r} too, as "
                    "clipping by the norm of all gradients does, but the gradients are never held "
                    "together here. Take one that looks at each matrix by itself "
                    "(memopt.clip_by_matrix_rms), or memopt.clip_by_gradient_norm, which divides "
                    "by the norm of the step before (previous=True) or, at the price of a second "
                    "backward pass, by this step's own."
                )
            once = output >= n and not own and self.axes[output - n] is None
            needs_norm |= used[-2] and not once
        for axis, owner, used in zip(self.axes, owners, reads[n:], strict=True):
            if owner is None or self.stacked[owner] == (axis is not None):
                continue
            if not self.stacked[owner] or not used[-1]:
                raise ValueError(
                    f"state kept for {self.names[owner]!r} has no place for each of its layers: "
                    "it cannot be updated a layer at a time."
                )
        return owners, needs_norm


def _trace(tx: optax.GradientTransformation, params: Any, layers: int | None = None) -> Program:
    """Traces ``tx.update`` as a program of flat gradients, parameters, state and `Scalars`.

    Args:
        tx: the transformation.
        params: shapes.
        layers: how many layers there are, of which these are one; None if they are all.
    """

    def loss(_: Any) -> Any:
        raise ValueError(
            "the optimizer evaluates the loss once more (obj_fn), which has no place in a step "
            "that updates parameters while the backward pass runs."
        )

    def update(
        gradients: Any, params: Any, state: Any, value: Array, norm: Array, layer: Array
    ) -> Any:
        extra = {"value": value, "obj_fn": loss, "gradient_norm": norm, "leaf_by_leaf": True}
        extra |= {} if layers is None else {"layer": (layer, layers)}
        updates, state = optax.with_extra_args_support(tx).update(gradients, state, params, **extra)
        structure: Any = jax.tree.structure(params)
        return structure.flatten_up_to(updates), jax.tree.leaves(state)

    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    state = init_shapes(tx.init, params)
    return trace(update, params, params, state, scalar, scalar, number)


def _with_layers(params: Any, stacked: Sequence[bool], layers: int) -> Any:
    """Returns the shapes that the parameters would have with `layers` layers."""
    layered = iter(stacked)
    shape = lambda p: (layers, *p.shape[1:]) if next(layered) else p.shape
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(shape(p), p.dtype), params)


def _prime_beyond(least: int, sizes: set[int]) -> int:
    """Returns the first prime above `least` that divides none of the sizes."""
    is_prime = lambda n: all(n % k for k in range(2, math.isqrt(n) + 1))
    divides = lambda n: any(size and size % n == 0 for size in sizes)
    return next(n for n in itertools.count(least + 1) if is_prime(n) and not divides(n))


def _layer_axes(states: Sequence[Sequence[Any]], counts: tuple[int, int, int]) -> list[int | None]:
    """Finds the axis of each state array that counts layers, or None.

    Args:
        states: the arrays' shapes for each number of layers.
        counts: these numbers.
    """
    refused = ValueError(
        "the optimizer's state does not grow by equal parts with the number of layers, so that it "
        "cannot be updated a layer at a time; transforms that choose or group layers do this."
    )
    if len({len(arrays) for arrays in states}) > 1:
        raise refused
    axes = []
    for arrays in zip(*states, strict=True):
        kinds = {(len(x.shape), x.dtype) for x in arrays}
        sizes = list(zip(*(x.shape for x in arrays), strict=False))
        moved = [axis for axis, size in enumerate(sizes) if len(set(size)) > 1]
        if len(kinds) > 1 or len(moved) > 1 or any(sizes[axis] != counts for axis in moved):
            raise refused
        axes.append(moved[0] if moved else None)
    return axes


def _check_rounded_once(state: Any) -> None:
    """Raises if state that layers share is rounded again at each layer."""
    is_of = lambda kind: lambda x: isinstance(x, kind)
    for part in jax.tree.leaves(state, is_leaf=is_of(QuantizedState)):
        inside = jax.tree.leaves(part, is_leaf=is_of(CycleBlocksState))
        if isinstance(part, QuantizedState) and any(map(is_of(CycleBlocksState), inside)):
            raise ValueError(
                "quantize_state around cycle_blocks would round the state again at each layer: use "
                "cycle_blocks(quantize_state(…)), or badam(state=…)."
            )


_CLEAN, _BY_LAYER, _MIXED = range(3)


def _mixed(program: Program, tags: Sequence[int], prime: int) -> list[int]:
    """Finds the outputs of a program that mix the layers of its inputs.

    An axis counts layers if `prime` divides its length. An operation that maps an array with such
    an axis to one without mixes layers; so does a random draw of such an array.

    Args:
        program: traced with `prime` layers.
        tags: for each input `_CLEAN`, `_BY_LAYER` or `_MIXED`.
        prime: the number of layers.

    Returns:
        The tags of its outputs.
    """
    seen = dict(zip(program.inputs, tags, strict=True))
    tag = lambda v: seen.get(v, _CLEAN)  # a variable without a tag is a constant
    layered = lambda v: any(n and n % prime == 0 for n in getattr(v.aval, "shape", ()))
    inner = lambda program, tags: _mixed(program, tags, prime)

    def settled(body: Program, given: list[int], carried: slice) -> list[int]:
        """Returns the tags of a loop's outputs, repeated until those of its carry are stable."""
        outs, before = inner(body, given), None
        while before != given[carried]:
            before = given[carried]
            given[carried] = map(max, before, outs)
            outs = inner(body, given)
        return outs

    for eqn in program.equations():
        given = [tag(v) for v in eqn.inputs]
        match eqn.inner:
            case Cond(branches):
                each = [inner(branch, given[1:]) for branch in branches]
                outs = [max(column) for column in zip(*each, strict=True)]
                outs = [_MIXED] * len(outs) if given[0] else outs
            case Scan(body, constants, count):
                outs = settled(body, given, slice(constants, constants + count))
            case While(test, body, of_test, of_body):
                carry = given[of_test + of_body :]
                outs = settled(body, given[of_test:], slice(of_body, None))
                outs = list(map(max, carry, outs))
                if inner(test, given[:of_test] + outs)[0]:
                    outs = [_MIXED] * len(outs)
            case Call(_, "for_any"):  # of memopt.reductions, and so saves work alone
                seen |= dict.fromkeys(eqn.outputs, _CLEAN)
                continue
            case Call(_, "layer_now" | "block_now"):  # of cycle_blocks, which is told the layer
                mixed = _MIXED if max(given) == _MIXED else _CLEAN
                seen |= dict.fromkeys(eqn.outputs, mixed)
                continue
            case Call(_, "put_layer"):
                outs = [max(given)]
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
