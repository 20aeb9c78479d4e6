"""A training step that updates each layer while the backward pass runs."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import AxisType

from memopt.errors import check_choice
from memopt.internals import trace
from memopt.models.stacked import BLOCKS, StackedModel, blocks_of, checked, split_floats
from memopt.state import layouts
from memopt.state.layouts import read_layer, write_layer
from memopt.state.precision import bounded, where_applied
from memopt.state.quantized_params import (
    Deferred,
    apply_rounded_updates,
    dequantize_params,
    is_quantized,
)
from memopt.training.measure import Measure, Measured, check_measure, measured_metrics, sum_measured
from memopt.training.release.per_parameter_update import PerParameterUpdate
from memopt.training.step import (
    UPDATE,
    WEIGHTS,
    Batch,
    Metrics,
    TrainState,
    cut_batch,
    differentiate,
    finish_step,
    mean_gradients,
)
from memopt.transforms.microbatches import sum_microbatches
from memopt.transforms.skip_nonfinite import skips_matrices
from memopt.trees import leaf_name


def release_step(
    state: TrainState,
    batch: Batch,
    *,
    model: StackedModel,
    tx: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    accumulation: int = 1,
    rng: Array | None = None,
    shardings: Any = None,
    measure: Measure | None = None,
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
    already. It and all later gradients are not applied, the step counts as skipped, and the step
    counts of the optimizer stay. A transformation that reads this step's norm
    (`memopt.clip_by_gradient_norm`) has the backward pass run twice, first only for the norm;
    then nothing is updated unless every gradient is finite.

    Args:
        state: The state before the step; its parameters are a dict with ``"blocks"``, arrays with
            a leading axis of layers. Quantised ones are read one block at a time.
        batch: Arrays of shape (batch, ...).
        model: The loss, in three parts.
        tx: The optimizer: every update must depend on its own parameter's gradient only, and in
            ``"blocks"`` on its own layer. It is given `value` and `gradient_norm` as in
            `train_step`, but no `obj_fn`; and `layer`, for `memopt.cycle_blocks`.
        learning_rate: As in `train_step`.
        accumulation: As in `train_step`.
        rng: As in `train_step`; the three functions find the key as ``batch["rng"]``. A block is
            computed twice, with the same key: one for each layer goes in what it is given.
        shardings: The parameters' `NamedSharding`s, a tree like them. On a mesh of Auto axes,
            whose types do not tell, they keep XLA from copying whole stacks to change their
            layout in memory.
        measure: As in `train_step`. Inner products take a second backward pass through each block,
            and the head, for each micro-batch. If the head is tied to the embedding, its gradient
            is computed once more behind the last block, with the embedding's; until then what
            enters the head is kept, as much again as what enters a block.

    Returns:
        As `train_step`.

    Raises:
        ValueError: There is nothing to measure, since `accumulation` is 1. The optimizer needs more
            than one gradient at a time; says what to take instead. Or the model returns what it
            may not, see `StackedModel`.

    Example:
        >>> import functools
        >>> from memopt.training import init_state
        >>> model = StackedModel(
        ...     embed=lambda rest, batch: batch["x"] @ rest["in"],
        ...     block=lambda w, x, batch: x + jnp.tanh(x @ w),
        ...     head=lambda rest, x, batch: (jnp.sum((x @ rest["out"]) ** 2), jnp.asarray(2.0)),
        ... )
        >>> params = {"in": jnp.eye(3), "blocks": jnp.ones((4, 3, 3)), "out": jnp.ones((3, 1))}
        >>> tx = optax.sgd(1e-3)
        >>> step = functools.partial(release_step, model=model, tx=tx, learning_rate=1e-3)
        >>> state, metrics = jax.jit(step)(init_state(params, tx), {"x": jnp.ones((2, 3))})
        >>> int(state.step), state.params["blocks"].shape
        (1, (4, 3, 3))
    """
    check_measure(measure, accumulation)
    state_specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, state)
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    specs = state_specs.params if explicit else jax.tree.map(lambda x: x.spec, shardings)

    def step(state: TrainState, batch: Batch, rng: Array | None) -> tuple[TrainState, Metrics]:
        pieces = cut_batch(batch, accumulation, rng, state.step)
        one = _ReleaseStep(state, pieces, model, tx, accumulation, specs, measure)
        new, applied, metrics = one.run()
        return finish_step(new, applied, learning_rate, metrics)

    return jax.sharding.auto_axes(step, out_sharding=(state_specs, jax.P()))(state, batch, rng)


Leaves = dict[int, Any]
"""Some leaves of the parameters, by their place in ``jax.tree.leaves``."""


class _Carry(NamedTuple):
    """The arrays that a backward pass changes.

    Attributes:
        params: The stored parameters, leaf by leaf.
        state: The arrays of the optimizer's state.
        finite: Whether the loss and all gradients so far that may stop others are finite, bool.
        squares: The sum of the gradients' squares so far, float32.
        measured: The micro-batches' gradients so far, measured; None if they are not.
    """

    params: list[Any]
    state: list[Any]
    finite: Array
    squares: Array
    measured: Measured | None

    def measure(self, new: Measured | None) -> "_Carry":
        """Adds measurements."""
        return self._replace(measured=jax.tree.map(jnp.add, self.measured, new))

    def add(self, gradients: Leaves, *, by_matrix: bool) -> "tuple[_Carry, Leaves]":
        """Adds gradients; also returns for each whether it may be applied.

        Args:
            gradients: The gradients of some leaves.
            by_matrix: Whether the optimizer skips those that are not finite. Otherwise they stop
                all that come after them.
        """
        applied, squares = {}, self.squares
        for i, g in gradients.items():
            own, square = jnp.isfinite(g).all(), jnp.square(bounded(g.astype(jnp.float32))).sum()
            squares += jnp.where(own, square, 0 if by_matrix else jnp.nan)
            applied[i] = self.finite if by_matrix else self.finite & own
        finite = jnp.stack(list(applied.values())).all()
        return self._replace(finite=finite, squares=squares), applied


class _ReleaseStep:
    """One step: the arrays it starts from, and the order in which leaves are updated."""

    def __init__(
        self,
        start: TrainState,
        pieces: Any,
        model: StackedModel,
        tx: optax.GradientTransformation,
        accumulation: int,
        specs: Any,
        measure: Measure | None,
    ) -> None:
        self.measure = measure
        self.start, self.pieces, self.accumulation = start, pieces, accumulation
        self.model = model = checked(model)
        blocks_of(start.params)
        dense = jax.eval_shape(dequantize_params, start.params)
        structure: Any
        paths, structure = jax.tree_util.tree_flatten_with_path(dense)
        self.structure, self.like = structure, {i: x for i, (_, x) in enumerate(paths)}
        self.specs = structure.flatten_up_to(specs) if specs else [None] * len(paths)
        stacked = [path[0] == jax.tree_util.DictKey(BLOCKS) for path, _ in paths]
        self.optimizer = PerParameterUpdate(tx, dense, stacked)
        self.by_matrix = skips_matrices(start.opt_state)
        self.blocks = [i for i in self.like if stacked[i]]
        self.layers = self.like[self.blocks[0]].shape[0]

        rest, piece = self._without_blocks(self.like), jax.tree.map(lambda x: x[0], pieces)
        x = jax.eval_shape(model.embed, rest, piece)
        self.read_by_head = self._reads(model.head, x, piece)
        names = {leaf_name(path): i for i, (path, _) in enumerate(paths) if not stacked[i]}
        for name in model.in_parts:
            check_choice("in_parts", name, names)
        self.in_parts = [names[name] for name in model.in_parts]
        embedded = self._reads(model.embed, piece)
        # A leaf that both ends read, a tied head, waits for the embedding's gradient.
        self.first = [i for i in self.read_by_head if i not in embedded]
        # To measure it, a micro-batch's two gradients are added before any is summed.
        self.head_again = measure is not None and len(self.first) < len(self.read_by_head)
        if self.head_again:
            self.first = []
        self.last = [i for i in self.like if i not in self.blocks and i not in self.first]

    def run(self) -> tuple[TrainState, Array, Metrics]:
        """Returns the arguments of `finish_step`: the new state, whether it changed, metrics."""
        optimizer, start = self.optimizer, self.start
        params, state = self.structure.flatten_up_to(start.params), jax.tree.leaves(start.opt_state)
        rest = self._without_blocks(self._defer(params, self.last))
        x = _each(lambda piece: self.model.embed(rest, piece), self.pieces)

        def forward(x: Any, layer: Array) -> tuple[Any, Any]:
            weights = self._one_block(self._load(params, self.blocks, layer))
            return _each(lambda *xs: self.model.block(weights, *xs), x, self.pieces), x

        x, inputs = jax.lax.scan(forward, x, jnp.arange(self.layers))
        head = self._head(params, split_floats(x)[0], [] if self.head_again else self.read_by_head)
        gradients, (cotangent, totals, counts), measured = sum_measured(
            head, x, self.pieces, measure=self.measure, gradients_of=self._of_first
        )
        self.tokens = jnp.maximum(counts.sum(), 1)
        self.loss = totals.sum() / self.tokens
        back = (inputs, x if self.head_again else None, gradients, cotangent)

        self.norm = jnp.float32(jnp.nan)  # read by nothing
        finite, zero = jnp.isfinite(self.loss), jnp.zeros((), jnp.float32)
        carry = _Carry(params, state, finite, zero, measured)
        if optimizer.needs_norm:
            add = lambda carry, gradients, _: carry.add(gradients, by_matrix=self.by_matrix)[0]
            sums = self._backward(carry._replace(measured=None), *back, add)
            self.norm = jnp.sqrt(sums.squares)
            carry = carry._replace(finite=sums.finite)
        carry = self._backward(carry, *back, self._update)
        norm = jnp.sqrt(carry.squares)
        scalars = self.loss, norm, None
        for k, x in optimizer.update_shared(state, scalars, layered=False).items():
            carry.state[k] = where_applied(carry.finite, x, state[k])
        opt_state = jax.tree.unflatten(jax.tree.structure(start.opt_state), carry.state)
        new = start._replace(params=self.structure.unflatten(carry.params), opt_state=opt_state)
        metrics = {"loss": self.loss, "gradient_norm": norm, "tokens": self.tokens}
        return new, carry.finite, metrics | measured_metrics(carry.measured, counts)

    def _backward(
        self,
        carry: _Carry,
        inputs: Any,
        last_input: Any,
        gradients: Leaves,
        cotangent: list[Array],
        visit: Any,
    ) -> _Carry:
        """Walks from the head to the embedding.

        Args:
            carry: What `visit` changes.
            inputs: What entered each block, (layers, micro-batches, ...).
            last_input: What entered the head, (micro-batches, ...), if it is needed once more.
            gradients: Of what the head reads.
            cotangent: Of the floating-point arrays that leave the last block, (micro-batches, ...).
            visit: Maps (carry, gradients, layer) to carry.
        """
        measure = None if carry.measured is None else self.measure
        if self.first:
            # The head is updated before the loop, or its gradient would be kept through it.
            carry = visit(carry, self._means(self._of_first(gradients)), None)
            with jax.named_scope(UPDATE):  # its copies are not gradients
                cotangent, carry = jax.lax.optimization_barrier((cotangent, carry))

        def block(back: tuple[_Carry, list[Array]], xs: tuple[Array, Any]) -> Any:
            (inside, cotangent), (layer, x) = back, xs
            around = _fill(inside, carry)
            weights = self._load(around.params, self.blocks, layer)
            floats, join = split_floats(x)
            x = join([layouts.pin_layout(x) for x in floats])
            gradients, cotangent, measured = sum_measured(
                self._block(weights), x, cotangent, self.pieces, measure=measure
            )
            means = self._means(gradients)
            known = [*cotangent, *jax.tree.leaves(measured)]
            finite = functools.reduce(layouts.delay_flag, known, around.finite)
            around = around._replace(finite=finite).measure(measured)
            return (self._only_layers(visit(around, means, layer)), cotangent), None

        back, order = (self._only_layers(carry), cotangent), (jnp.arange(self.layers), inputs)
        (inside, cotangent), _ = jax.lax.scan(block, back, order, reverse=True)
        carry = _fill(inside, carry)
        if self.last:
            # Reloaded after the loop, so that they need not be kept dense through it.
            embed = self._embed(carry.params, cotangent)
            last, _, measured = sum_measured(
                embed, cotangent, last_input, self.pieces, measure=measure
            )
            for i in set(gradients) & set(self.last):
                last[i] += gradients[i]
            carry = visit(carry.measure(measured), self._means(last), None)
        return carry

    def _only_layers(self, carry: _Carry) -> _Carry:
        """Leaves what the loop over layers changes: XLA may copy all that a loop is given."""
        params = [p if i in self.blocks else None for i, p in enumerate(carry.params)]
        pairs = zip(carry.state, self.optimizer.state_in_loop(), strict=True)
        return carry._replace(params=params, state=[s if inside else None for s, inside in pairs])

    @jax.named_scope(UPDATE)
    def _update(self, carry: _Carry, gradients: Leaves, layer: Array | None) -> _Carry:
        """Updates some parameters and their state in place."""
        optimizer, before, layered = self.optimizer, carry.finite, layer is not None
        carry, finite = carry.add(gradients, by_matrix=self.by_matrix)
        stored, state = list(carry.params), list(carry.state)
        axes = optimizer.axes if layered else [None] * len(state)
        old = [read_layer(s, layer, axis) for s, axis in zip(state, axes, strict=True)]
        scalars, step = (self.loss, self.norm, layer), self.start.step - self.start.skipped

        for i, gradient in gradients.items():
            # Reloaded, so that it need not be kept since the model computed with it.
            node, at = layouts.reload_after(stored[i], finite[i], layer)

            def update(i: int = i, gradient: Array = gradient, node: Any = node) -> Any:
                update, new = optimizer.update(i, gradient, dequantize_params(node), old, scalars)
                # Nothing added leaves what is stored as it is, without a copy to fall back on.
                update = jnp.where(finite[i], update.astype(jnp.promote_types(update, "f4")), 0)
                written = apply_rounded_updates(
                    self._tree({i: node}), self._tree({i: update}), step
                )
                new = {k: where_applied(finite[i], x, old[k]) for k, x in new.items()}
                return self.structure.flatten_up_to(written)[i], new

            kept = node, {k: old[k] for k in optimizer.state_of(i)}
            node, new = layouts.update_in_place(finite[i], update, kept) if layered else update()
            stored[i] = layouts.pin_layout(write_layer(stored[i], node, at, 0), self.specs[i])
            for k, x in new.items():
                state[k] = write_layer(state[k], x, layer, axes[k])
        if layered:
            for k, x in optimizer.update_shared(old, scalars, layered=True).items():
                state[k] = write_layer(state[k], where_applied(before, x, old[k]), layer, axes[k])
        return carry._replace(params=stored, state=state)

    def _head(self, stored: Sequence[Any], after: list[Array], leaves: Sequence[int]) -> Any:
        """Returns a function that computes, for a micro-batch, gradients of the head.

        Args:
            stored: The stored parameters.
            after: What is computed before they are read.
            leaves: Those whose gradients are wanted.

        Returns:
            Maps what enters the head, and a micro-batch, to the gradients, and (that of the head's
            input, loss, tokens).
        """
        read = {i: layouts.reload_after(stored[i], after)[0] for i in self.read_by_head}
        given = self._defer(read, self.read_by_head)
        weights = {i: w.change if isinstance(w, Deferred) else w for i, w in given.items()}

        def rest(leaves: Leaves) -> dict[str, Any]:
            deferred = {i: w for i, w in given.items() if isinstance(w, Deferred)}
            changed = {i: dataclasses.replace(w, change=leaves[i]) for i, w in deferred.items()}
            return self._without_blocks(leaves | changed)

        def one(x: Any, piece: Batch) -> Any:
            floats, join = split_floats(x)
            loss = lambda leaves, floats: self.model.head(rest(leaves), join(floats), piece)
            (gradients, cotangent), total, tokens = differentiate(
                loss, weights, floats, of_mean=self.accumulation == 1
            )
            return {i: gradients[i] for i in leaves}, (cotangent, total, tokens)

        return one

    def _block(self, weights: Leaves) -> Any:
        """Returns a function that computes a block's gradients, and that of its input.

        It maps what entered the block, the gradient of what left it, and a micro-batch to these.
        """

        def one(x: Any, cotangent: list[Array], piece: Batch) -> Any:
            floats, join = split_floats(x)

            def run(weights: Leaves, floats: list[Array]) -> list[Array]:
                return split_floats(
                    self.model.block(self._one_block(weights), join(floats), piece)
                )[0]

            return jax.vjp(run, weights, floats)[1](cotangent)

        return one

    def _embed(self, stored: Sequence[Any], after: list[Array]) -> Any:
        """Returns a function that computes the gradients that come last.

        It maps the gradient of what the embedding returned, what entered the head if its gradients
        are computed here too, and a micro-batch to them. Parameters are read after `after`.
        """
        weights = self._reload(stored, self.last, after)
        head = self._head(stored, after, self.read_by_head) if self.head_again else None

        def one(cotangent: list[Array], x: Any, piece: Batch) -> Any:
            run = lambda leaves: self.model.embed(self._without_blocks(leaves), piece)
            floats = lambda leaves: split_floats(run(leaves))[0]
            gradients = jax.vjp(floats, weights)[1](cotangent)[0]
            again = head(x, piece)[0] if head else {}
            return gradients | {i: gradients[i] + g for i, g in again.items()}, None

        return one

    def _of_first(self, gradients: Leaves) -> Leaves:
        """Picks those that are complete behind the head."""
        return {i: gradients[i] for i in self.first}

    def _means(self, gradients: Leaves) -> Leaves:
        """Divides sums of gradients by the tokens, unless `_head` has."""
        tokens = 1 if self.accumulation == 1 else self.tokens
        return mean_gradients(gradients, tokens, {i: self.like[i] for i in gradients})

    @jax.named_scope(WEIGHTS)
    def _load(self, stored: Any, leaves: Sequence[int], layer: Array | None = None) -> Leaves:
        """Dequantises some parameters for the model; a layer as a stack of one."""
        part = {i: read_layer(stored[i], layer, 0) for i in leaves}
        if layer is None:
            return dequantize_params(part)
        # As matrices: for codes in stacks of one XLA for TPUs would transpose the whole stack.
        part = jax.tree.map(lambda x: x[0], part)
        part = {i: x if is_quantized(x) else layouts.pin_layout(x) for i, x in part.items()}
        return jax.tree.map(lambda x: x[None], dequantize_params(part))

    def _defer(self, stored: Any, leaves: Sequence[int]) -> Leaves:
        """Dequantises parameters, but those that the model reads in parts."""
        parts = [i for i in self.in_parts if i in leaves and is_quantized(stored[i])]
        zeros = {i: jnp.zeros(self.like[i].shape, self.like[i].dtype) for i in parts}
        deferred = {i: Deferred(stored[i], zero) for i, zero in zeros.items()}
        return self._load(stored, [i for i in leaves if i not in parts]) | deferred

    def _reload(self, stored: Sequence[Any], leaves: Sequence[int], x: Any) -> Leaves:
        """Does the same, reading the parameters after `x` is computed."""
        return self._load({i: layouts.reload_after(stored[i], x)[0] for i in leaves}, leaves)

    def _reads(self, f: Callable[..., Any], *args: Any) -> list[int]:
        """Finds the leaves that a function of the parameters without the blocks reads."""
        run = lambda leaves, *args: f(self._without_blocks(leaves), *args)
        reads = trace(run, self.like, *args).needed().reads
        return [i for i, read in zip(self.like, reads, strict=False) if read]

    def _tree(self, leaves: Leaves) -> Any:
        """Returns the parameters' tree, None where a leaf is not given."""
        return self.structure.unflatten([leaves.get(i) for i in self.like])

    def _without_blocks(self, leaves: Leaves) -> dict[str, Any]:
        return {k: v for k, v in self._tree(leaves).items() if k != BLOCKS}

    def _one_block(self, leaves: Leaves) -> Any:
        """Returns the parameters of a block from stacks of one."""
        return self._tree({i: x[0] for i, x in leaves.items()})[BLOCKS]


def _each(f: Callable[..., Any], *xs: Any) -> Any:
    """Applies `f` to every micro-batch."""
    return sum_microbatches(lambda *xs: ((), f(*xs)), *xs)[1]


def _fill(part: Any, whole: Any) -> Any:
    """Returns `part` with the nodes of `whole` in place of None."""
    choose = lambda x, old: old if x is None else x
    return jax.tree.map(choose, part, whole, is_leaf=lambda x: x is None)
