"""A training step that updates each layer while the backward pass runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import AxisType

from memopt.internals import trace
from memopt.models.stacked import StackedModel
from memopt.state.quantized_params import apply_rounded_updates, dequantize_params, is_quantized
from memopt.training.release.layouts import (
    delay_flag,
    pin_layout,
    read_layer,
    reload_after,
    update_in_place,
    write_layer,
)
from memopt.training.release.per_parameter_update import PerParameterUpdate
from memopt.training.step import (
    Batch,
    Metrics,
    TrainState,
    finish_step,
    split_microbatches,
    where_applied,
)

BLOCKS = "blocks"


def release_step(
    state: TrainState,
    batch: Batch,
    *,
    model: StackedModel,
    tx: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    accumulation: int = 1,
    shardings: Any = None,
) -> tuple[TrainState, Metrics]:
    """Takes one step without ever holding all gradients; to be jitted with the state donated.

    The forward pass keeps what enters each block. The backward pass walks the stack from its end,
    computes one block again, updates its parameters and their optimizer state in place, and forgets
    its gradient. The result is that of `train_step` for the same loss, optimizer and data, and the
    state is interchangeable with its.

    With micro-batches all of them go through a block before the next one is looked at; the block's
    gradient is summed in float32.

    What differs: a loss that is not finite leaves everything as it was, but a gradient that is not
    finite behind a finite loss is found when the parameters nearer to the head are updated
    already. It and what comes after it are left as they were, the step counts as skipped, and the
    step counts of the optimizer stay. A transformation that reads this step's norm
    (`memopt.clip_by_gradient_norm`) has the backward pass run twice, first only for the norm;
    then nothing is updated unless every gradient is finite.

    Args:
        state: The state before the step; its parameters are a dict with ``"blocks"``, arrays with
            a leading axis of layers. Quantised ones are read one block at a time.
        batch: Arrays of shape (batch, ...).
        model: The loss, in three parts.
        tx: The optimizer: every update must depend on its own parameter's gradient only, and in
            ``"blocks"`` on its own layer. It is given `value` and `gradient_norm` as in
            `train_step`, but no `obj_fn`.
        learning_rate: As in `train_step`.
        accumulation: As in `train_step`.
        shardings: The parameters' `NamedSharding`s, a tree like them. On a mesh of Auto axes,
            whose types do not tell, they keep XLA from copying whole stacks to change their
            layout in memory.

    Returns:
        As `train_step`.

    Raises:
        ValueError: The optimizer needs more than one gradient at a time; says what to take instead.

    Example:
        >>> import functools
        >>> from memopt.training.step import init_state
        >>> model = StackedModel(
        ...     embed=lambda rest, batch: batch["x"] @ rest["in"],
        ...     block=lambda w, x, batch: x + jnp.tanh(x @ w),
        ...     head=lambda rest, x, batch: (jnp.sum((x @ rest["out"]) ** 2), jnp.asarray(2.0)),
        ... )
        >>> params = {"in": jnp.eye(3), "blocks": jnp.ones((4, 3, 3)), "out": jnp.ones((3, 1))}
        >>> tx, rate = optax.sgd(1e-3), optax.constant_schedule(1e-3)
        >>> step = functools.partial(release_step, model=model, tx=tx, learning_rate=rate)
        >>> state, metrics = jax.jit(step)(init_state(params, tx), {"x": jnp.ones((2, 3))})
        >>> int(state.step), state.params["blocks"].shape
        (1, (4, 3, 3))
    """
    state_specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, state)
    specs = jax.tree.map(lambda x: x.spec, shardings) if shardings else None
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        specs = state_specs.params

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        release = _ReleaseStep(state, batch, model, tx, accumulation, specs)
        return finish_step(state, *release.run(), learning_rate)

    return jax.sharding.auto_axes(step, out_sharding=(state_specs, jax.P()))(state, batch)


Leaves = dict[int, Any]
"""Some leaves of the parameters, by their place in ``jax.tree.leaves``."""


class _Sums(NamedTuple):
    """Sums over the gradients so far.

    Attributes:
        finite: Whether the loss and all gradients so far are finite, bool.
        squares: The sum of the gradients' squares, float32.
    """

    finite: Array
    squares: Array

    def add(self, gradients: Leaves) -> tuple[_Sums, Leaves]:
        """Adds gradients, and tells of each whether it and all those before are finite."""
        finite = {i: self.finite & jnp.isfinite(g).all() for i, g in gradients.items()}
        squares = self.squares
        for g in gradients.values():
            squares += jnp.square(g.astype(jnp.float32)).sum()
        return _Sums(jnp.stack(list(finite.values())).all(), squares), finite


class _Carry(NamedTuple):
    """The arrays that a backward pass changes.

    Attributes:
        params: The stored parameters, leaf by leaf.
        state: The arrays of the optimizer's state.
        sums: Over the gradients so far.
    """

    params: list[Any]
    state: list[Array]
    sums: _Sums


class _ReleaseStep:
    """One step: the arrays it starts from, and the order in which leaves are updated."""

    def __init__(
        self,
        start: TrainState,
        batch: Batch,
        model: StackedModel,
        tx: optax.GradientTransformation,
        accumulation: int,
        specs: Any,
    ) -> None:
        self.start, self.model = start, model
        self.accumulation, self.pieces = accumulation, split_microbatches(batch, accumulation)
        dense = jax.eval_shape(dequantize_params, start.params)
        structure: Any = jax.tree.structure(dense)
        self.structure = structure
        self.like = dict(enumerate(jax.tree.leaves(dense)))
        self.specs = structure.flatten_up_to(specs) if specs else [None] * len(self.like)
        paths: Any = jax.tree_util.tree_leaves_with_path(dense)
        stacked = [path[0] == jax.tree_util.DictKey(BLOCKS) for path, _ in paths]
        self.optimizer = PerParameterUpdate(tx, dense, stacked)
        self.blocks = [i for i in self.like if stacked[i]]
        self.layers = self.like[self.blocks[0]].shape[0]

        rest, piece = self._without_blocks(self.like), jax.tree.map(lambda x: x[0], self.pieces)
        x = jax.eval_shape(model.embed, rest, piece)
        self.read_by_head = self._reads(model.head, x, piece)
        embedded = self._reads(model.embed, piece)
        # A leaf that both ends read, a tied head, waits for the embedding's gradient.
        self.first = [i for i in self.read_by_head if i not in embedded]
        self.last = [i for i in self.like if i not in self.blocks and i not in self.first]

    def run(self) -> tuple[Any, Any, Array, Array, Array, Array]:
        """The arguments of `finish_step`."""
        optimizer, start = self.optimizer, self.start
        params = self.structure.flatten_up_to(start.params)
        state = jax.tree.leaves(start.opt_state)
        rest = self._without_blocks(self._load(params, self.last))
        x = self._each(lambda piece: self.model.embed(rest, piece), self.pieces)

        def forward(x: Array, layer: Array) -> tuple[Array, Array]:
            weights = self._one_block(self._load(params, self.blocks, layer))
            return self._each(lambda *xs: self.model.block(weights, *xs), x, self.pieces), x

        x, inputs = jax.lax.scan(forward, x, jnp.arange(self.layers))
        read = {i: reload_after(params[i], x)[0] for i in self.read_by_head}
        gradients, (cotangent, totals, counts) = self._head(x, self._load(read, self.read_by_head))
        self.tokens = jnp.maximum(counts.sum(), 1)
        self.loss = totals.sum() / self.tokens
        back = (inputs, gradients, cotangent)

        sums = _Sums(jnp.isfinite(self.loss), jnp.zeros((), jnp.float32))
        if optimizer.needs_norm:
            only_sums = lambda carry, gradients, _: carry._replace(
                sums=carry.sums.add(gradients)[0]
            )
            sums = self._backward(_Carry(params, state, sums), *back, only_sums).sums
            self.norm = jnp.sqrt(sums.squares)
            sums = sums._replace(squares=jnp.zeros((), jnp.float32))
        else:
            self.norm = jnp.float32(jnp.nan)  # read by nothing
        params, new_state, sums = self._backward(_Carry(params, state, sums), *back, self._update)
        norm = jnp.sqrt(sums.squares)
        scalars = {"value": self.loss, "gradient_norm": norm}
        for i, new in optimizer.update_shared(state, layered=False, **scalars).items():
            new_state[i] = where_applied(sums.finite, new, state[i])
        structure: Any = jax.tree.structure(start.opt_state)
        opt_state = structure.unflatten(new_state)
        params = self.structure.unflatten(params)
        return params, opt_state, sums.finite, self.loss, norm, self.tokens

    def _backward(
        self, carry: _Carry, inputs: Array, gradients: Leaves, cotangent: Array, visit: Any
    ) -> _Carry:
        """Walks from the head to the embedding.

        Args:
            carry: What `visit` changes.
            inputs: What entered each block, (layers, micro-batches, ...).
            gradients: Of what the head reads.
            cotangent: Of what leaves the last block, (micro-batches, ...).
            visit: Maps (carry, gradients, layer) to carry.
        """
        if self.first:
            mine = {i: self._mean(i, gradients[i]) for i in self.first}
            carry = visit(carry, mine, None)

        def block(back: tuple[_Carry, Array], xs: tuple[Array, Array]) -> Any:
            (inside, cotangent), (layer, x) = back, xs
            around = self._with_layers(carry, inside)
            weights = self._load(around.params, self.blocks, layer)
            gradients, cotangent = self._block(weights, pin_layout(x), cotangent)
            mine = {i: self._mean(i, g) for i, g in gradients.items()}
            finite = delay_flag(cotangent, around.sums.finite)
            around = around._replace(sums=around.sums._replace(finite=finite))
            return (self._only_layers(visit(around, mine, layer)), cotangent), None

        back, order = (self._only_layers(carry), cotangent), (jnp.arange(self.layers), inputs)
        (inside, cotangent), _ = jax.lax.scan(block, back, order, reverse=True)
        carry = self._with_layers(carry, inside)
        if self.last:
            # Reloaded after the loop, so that they need not be kept dense through it.
            last = {i: reload_after(carry.params[i], cotangent)[0] for i in self.last}
            weights = self._load(last, self.last)
            mine = self._embed(cotangent, weights)
            for i in set(self.read_by_head) & set(self.last):
                mine[i] += gradients[i]
            mine = {i: self._mean(i, g) for i, g in mine.items()}
            carry = visit(carry, mine, None)
        return carry

    def _only_layers(self, carry: _Carry) -> _Carry:
        """The part that the loop over layers changes: XLA may copy all that a loop is given."""
        params = [carry.params[i] for i in self.blocks]
        state = [
            s for s, axis in zip(carry.state, self.optimizer.axes, strict=True) if axis is not None
        ]
        return _Carry(params, state, carry.sums)

    def _with_layers(self, carry: _Carry, layers: _Carry) -> _Carry:
        """The inverse of `_only_layers`: puts that part back into `carry`."""
        params = dict(enumerate(carry.params)) | dict(zip(self.blocks, layers.params, strict=True))
        state = iter(layers.state)
        pairs = zip(carry.state, self.optimizer.axes, strict=True)
        return _Carry(
            [params[i] for i in self.like],
            [old if axis is None else next(state) for old, axis in pairs],
            layers.sums,
        )

    def _update(self, carry: _Carry, gradients: Leaves, layer: Array | None) -> _Carry:
        """Updates some parameters and their state in place."""
        optimizer, before, layered = self.optimizer, carry.sums.finite, layer is not None
        sums, finite = carry.sums.add(gradients)
        stored, state = list(carry.params), list(carry.state)
        axes = optimizer.axes if layered else [None] * len(state)
        old = [read_layer(s, layer, axis) for s, axis in zip(state, axes, strict=True)]
        scalars = {"value": self.loss, "gradient_norm": self.norm}
        step = self.start.step - self.start.skipped

        for i, gradient in gradients.items():
            # Reloaded, so that it need not be kept since the model computed with it.
            node, at = reload_after(stored[i], finite[i], layer)
            owned = optimizer.state_of(i, layered=layered)

            def update(i: int = i, gradient: Array = gradient, node: Any = node) -> Any:
                weight = dequantize_params(node)
                update, new = optimizer.update(i, gradient, weight, old, **scalars)
                # Nothing added leaves what is stored as it is, without a copy to fall back on.
                update = jnp.where(finite[i], update.astype(jnp.promote_types(update, "f4")), 0)
                written = apply_rounded_updates(
                    self._tree({i: node}), self._tree({i: update}), step
                )
                new = {k: where_applied(finite[i], x, old[k]) for k, x in new.items()}
                return self.structure.flatten_up_to(written)[i], new

            keep = lambda node=node, owned=owned: (node, {k: old[k] for k in owned})
            node, new = update_in_place(finite[i], update, keep) if layered else update()
            stored[i] = pin_layout(write_layer(stored[i], node, at, 0), self.specs[i])
            for k, x in new.items():
                state[k] = write_layer(state[k], x, layer, axes[k])
        if layered:
            for k, x in optimizer.update_shared(old, layered=True, **scalars).items():
                state[k] = write_layer(state[k], where_applied(before, x, old[k]), layer, axes[k])
        return _Carry(stored, state, sums)

    def _head(self, x: Array, weights: Leaves) -> tuple[Leaves, tuple[Array, Array, Array]]:
        """Gradients of what the head reads; and of x, the losses and counts by micro-batch."""

        def one(x: Array, piece: Batch) -> Any:
            def loss(leaves: Leaves, x: Array) -> tuple[Array, Array]:
                return self.model.head(self._without_blocks(leaves), x, piece)

            total, pull, tokens = jax.vjp(loss, weights, x, has_aux=True)
            # Of the mean at once if it is known: no gradient need be scaled into another array.
            mean = jnp.maximum(tokens, 1) if self.accumulation == 1 else jnp.ones(())
            gradients, cotangent = pull((1 / mean).astype(total.dtype))
            return gradients, (cotangent, total, tokens)

        return self._summed(one, x, self.pieces)

    def _block(self, weights: Leaves, x: Array, cotangent: Array) -> tuple[Leaves, Array]:
        """Gradients of one block's parameters, and of what entered it by micro-batch."""

        def one(x: Array, cotangent: Array, piece: Batch) -> Any:
            run = lambda weights, x: self.model.block(self._one_block(weights), x, piece)
            return jax.vjp(run, weights, x)[1](cotangent)

        return self._summed(one, x, cotangent, self.pieces)

    def _embed(self, cotangent: Array, weights: Leaves) -> Leaves:
        """Gradients of what is neither in blocks nor only in the head."""

        def one(cotangent: Array, piece: Batch) -> Any:
            run = lambda leaves: self.model.embed(self._without_blocks(leaves), piece)
            return jax.vjp(run, weights)[1](cotangent)[0], None

        return self._summed(one, cotangent, self.pieces)[0]

    def _mean(self, i: int, gradient: Array) -> Array:
        tokens = 1 if self.accumulation == 1 else self.tokens
        return (gradient / tokens).astype(self.like[i].dtype)

    def _each(self, f: Callable[..., Array], *xs: Any) -> Array:
        """Applies `f` to every micro-batch."""
        if self.accumulation == 1:
            return f(*jax.tree.map(lambda x: x[0], xs))[None]
        return jax.lax.map(lambda xs: f(*xs), xs)

    def _summed(self, f: Callable[..., Any], *xs: Any) -> tuple[Leaves, Any]:
        """Sums the gradients that `f` gives for micro-batches in float32, and stacks the others."""
        first = jax.tree.map(lambda x: x[0], xs)
        if self.accumulation == 1:
            gradients, rest = f(*first)
            return gradients, jax.tree.map(lambda x: x[None], rest)

        def add(sums: Leaves, xs: Any) -> tuple[Leaves, Any]:
            gradients, rest = f(*xs)
            return jax.tree.map(jnp.add, sums, gradients), rest

        like = jax.eval_shape(f, *first)[0]
        zeros = jax.tree.map(lambda g: jnp.zeros(g.shape, jnp.promote_types(g, "float32")), like)
        return jax.lax.scan(add, zeros, xs)

    def _load(
        self, stored: Sequence[Any] | Leaves, leaves: Sequence[int], layer: Any = None
    ) -> Leaves:
        """Dequantises some parameters for the model; a layer as a stack of one."""
        part = {i: read_layer(stored[i], layer, 0) for i in leaves}
        if layer is not None:
            # As matrices: for codes in stacks of one XLA for TPUs would transpose the whole stack.
            part = jax.tree.map(lambda x: x[0], part)
            part = {i: x if is_quantized(x) else pin_layout(x) for i, x in part.items()}
        dense = self.structure.flatten_up_to(dequantize_params(self._tree(part)))
        return {i: dense[i] if layer is None else dense[i][None] for i in leaves}

    def _reads(self, f: Callable[..., Any], *args: Any) -> list[int]:
        """The leaves that a function of the parameters without the blocks reads."""
        leaves = {i: x for i, x in self.like.items() if i not in self.blocks}
        run = lambda leaves, *args: f(self._without_blocks(leaves), *args)
        reads = trace(run, leaves, *args).needed().reads
        return [i for i, read in zip(leaves, reads, strict=False) if read]

    def _tree(self, leaves: Leaves) -> Any:
        """The parameters' tree, None where a leaf is not given."""
        return self.structure.unflatten([leaves.get(i) for i in self.like])

    def _without_blocks(self, leaves: Leaves) -> dict[str, Any]:
        return {k: v for k, v in self._tree(leaves).items() if k != BLOCKS}

    def _one_block(self, leaves: Leaves) -> Any:
        """The parameters of a block, of stacks of one."""
        return self._tree({i: x[0] for i, x in leaves.items()})[BLOCKS]
