"""Runs an optimizer on one block of layers at a time."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.axis_types import on_auto_axes, varying_as
from memopt.checked import checked
from memopt.errors import check_at_least, check_choice
from memopt.matrices import Layout, Matrices, every_matrix, map_matrices
from memopt.names import EMBEDDING, HEAD, POSITION, split_layer
from memopt.parameters import known, read_parameters
from memopt.state.owners import StateArray, is_state_array, owners
from memopt.state.precision import bounded, check_real, statistics_dtype, to_float32
from memopt.transforms.projectors import RefreshClock
from memopt.transforms.subspace import check_keeps_no_values, without_loss
from memopt.trees import NOTHING, map_named, named_leaves, open_box

ORDERS = ("descending", "ascending", "random")


class CycleBlocksState(NamedTuple):
    """State of `cycle_blocks`.

    Attributes:
        count: steps taken, int32.
        inner: the inner optimizer's state for the block that is updated now.
    """

    count: Array  # type: ignore[assignment]
    inner: Any


@checked
def cycle_blocks(
    inner: optax.GradientTransformation,
    switch_every: int = 50,
    order: str = "descending",
    *,
    embedding: bool = False,
    head: bool = False,
    seed: int | Array = 0,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Updates one layer for some steps, then the next; the state is that of one layer.

    At each step, for the gradients G and the parameters W of the layer whose turn it is::

        S ← init(W)                            at the first of `switch_every` steps
        U, S ← inner(G, S, W)
        all other updates are zero

    Layers are recognised by the index in their parameters' names, see `memopt.names.split_layer`;
    without an index the first axis of a stack counts them. A model without layers is one block.
    Layers whose arrays have the same name and shape share the state; the state of parameters that
    only some layers have, and of the embedding and the head, is kept besides.

    All gradients are read, since it is known only at run time whose turn it is; a released training
    step (`memopt.training.release_step`) holds one layer's at a time.

    Args:
        inner: any Optax transformation; it receives float32 arrays, of stacked layers as stacks of
            one. It must not keep parameters in its state. Its updates should include weight decay,
            so that only the layer whose turn it is decays.
        switch_every: K, the steps of one turn.
        order: "descending" from the last layer, "ascending", or "random", in which each cycle has a
            new order, and each layer one turn in it.
        embedding: whether the embedding has a turn, as the first block.
        head: whether the parameters that are in no layer, such as the output head and the last
            norm, have a turn, as the last block.
        seed: the seed of "random".
        matrices: the axes of each parameter, of which those that are no rows or columns count
            layers; see `memopt.matrices`.

    Returns:
        A transformation whose state is a `CycleBlocksState`.

    Raises:
        ValueError: if `switch_every` is below one, or `order` is unknown.
        IncompatiblePairingError: by `init`, if the inner optimizer keeps parameters.

    References:
        Luo et al., BAdam, 2024, https://arxiv.org/abs/2404.02827, Algorithm 1.

    Example:
        >>> tx = cycle_blocks(optax.scale_by_adam(), switch_every=1)
        >>> params = {"blocks": {"up": jnp.ones((3, 4, 8))}}                    # three layers
        >>> state = tx.init(params)
        >>> state.inner.mu["blocks"]["up"].shape
        (1, 4, 8)
        >>> tx.update(params, state, params)[0]["blocks"]["up"][:, 0, 0].round(3).tolist()
        [0.0, 0.0, 1.0]
    """
    check_at_least("switch_every", switch_every, 1)
    check_choice("order", order, ORDERS)
    inner = optax.with_extra_args_support(inner)
    find = functools.partial(_find_blocks, matrices=matrices, embedding=embedding, head=head)

    def init(params: Any) -> CycleBlocksState:
        check_real(params)
        low = find(params, None).zeros(params)
        with known(read_parameters(params)):
            check_keeps_no_values(inner.init, low)
            return CycleBlocksState(jnp.zeros((), jnp.int32), inner.init(low))

    def step(blocks: _Blocks, updates: Any, state: Any, params: Any, extra: Any) -> Any:
        clock = RefreshClock.at(state.count, switch_every)
        now = block_now(clock.refresh, seed, count=blocks.total, order=order)
        low = jax.tree.map(bounded, blocks.take(updates, now))
        choose = functools.partial(jnp.where, clock.refresh_now)
        started = jax.tree.map(choose, inner.init(low), state.inner)
        low_params = None if params is None else blocks.take(params, now)
        low_updates, new = inner.update(low, started, low_params, **extra)
        updates = blocks.put(low_updates, now, updates)
        new = blocks.keep(new, state.inner, now, low)
        return updates, CycleBlocksState(optax.safe_increment(state.count), new)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        blocks = find(updates, extra.pop("layer", None))
        extra = without_loss(extra, OF_BLOCKS)
        with known(read_parameters(updates)):
            run = functools.partial(step, blocks)
            return on_auto_axes(run, (updates, state, params, extra), like=(updates, state))

    return optax.GradientTransformationExtraArgs(init, update)


OF_BLOCKS = "is a function of all parameters and not of those of one block"


class _Place(NamedTuple):
    """The blocks that a parameter is in.

    Attributes:
        block: the number of its block, the first one of a stack of layers; None if it has no turn.
        axis: the axis that counts layers; None if it is in one block.
        holder: the name of the parameter with which the state is kept, the first of alike layers.
    """

    block: int | None
    axis: int | None
    holder: str


class _Blocks(NamedTuple):
    """The blocks of a tree of parameters.

    Attributes:
        places: the `_Place` of each parameter by its name.
        total: how many blocks there are.
        layer: the number of the layer that stacks consist of; None for stacks of all layers.
    """

    places: dict[str, _Place]
    total: int
    layer: Any

    def zeros(self, params: Any) -> Any:
        """Zeros in the shape of one block, with `NOTHING` for parameters that keep no state."""

        def zeros(name: str, p: Any) -> Any:
            block, axis, holder = self.places[name]
            if block is None or holder != name:
                return NOTHING
            shape = tuple(1 if i == axis else n for i, n in enumerate(p.shape))
            return varying_as(p, jnp.zeros(shape, statistics_dtype(p)))

        return map_named(zeros, params)

    def take(self, tree: Any, now: Array) -> Any:
        """The arrays of the block whose turn it is, in float32; others if it has none."""
        alike: dict[str, list[tuple[int, Array]]] = {}
        for name, leaf in named_leaves(tree)[0]:
            block, axis, holder = self.places[name]
            if block is not None:
                x = open_box(leaf)
                if axis is not None and self.layer is None:
                    x = layer_now(x, now - block, axis=axis)
                alike.setdefault(holder, []).append((block, x))

        def pick(name: str, _: Array) -> Any:
            if name not in alike:
                return NOTHING
            numbers, arrays = zip(*sorted(alike[name], key=lambda pair: pair[0]), strict=True)
            if len(arrays) == 1:
                return to_float32(arrays[0])
            branches = [lambda *xs, i=i: to_float32(xs[i]) for i in range(len(arrays))]
            return jax.lax.switch(jnp.searchsorted(jnp.asarray(numbers), now), branches, *arrays)

        return map_named(pick, tree)

    def put(self, low: Any, now: Array, like: Any) -> Any:
        """Updates of the whole tree, zero for all blocks but the one whose turn it is."""
        arrays = {name: open_box(x) for name, x in named_leaves(low)[0]}

        def place(name: str, g: Array) -> Array:
            block, axis, holder = self.places[name]
            if block is None:
                return jnp.zeros_like(g)
            if axis is None or self.layer is not None:
                chosen = now == block + (0 if axis is None else self.layer)
                return jnp.where(chosen, arrays[holder], 0).astype(g.dtype)
            return put_layer(g, arrays[holder].astype(g.dtype), now - block, axis=axis)

        return map_named(place, like)

    def keep(self, new: Any, old: Any, now: Array, low: Any) -> Any:
        """The new state; that of stacks of one layer is kept as it was unless it is its turn."""
        if self.layer is None:
            return new
        holders = [self.places[name] for name, _ in named_leaves(low)[0]]

        def choose(array: StateArray, new: Array, old: Array) -> Array:
            place = None if array.parameter is None else holders[array.parameter]
            if place is None or place.axis is None:
                return new
            return jnp.where(now == place.block + self.layer, new, old)

        return jax.tree.map(choose, owners(old, low), new, old, is_leaf=is_state_array)


def _find_blocks(
    tree: Any, layer: Any, *, matrices: Matrices, embedding: bool, head: bool
) -> _Blocks:
    """Finds the block of each parameter.

    Args:
        tree: parameters, gradients, or their shapes.
        layer: (number, count) of the layer that stacks consist of; None for stacks of all layers.
        matrices: see `cycle_blocks`.
        embedding: see `cycle_blocks`.
        head: see `cycle_blocks`.
    """
    found: dict[str, tuple[Layout, tuple[int, ...]]] = {}

    def note(layout: Layout, x: Any) -> None:
        found[layout.name] = layout, tuple(x.shape)

    map_matrices(note, tree, matrices=matrices, default=every_matrix)
    groups = {name: split_layer(name) for name in found}
    tables = [n for n, (layout, _) in found.items() if layout.kind in (EMBEDDING, POSITION)]
    heads = [n for n, (layout, _) in found.items() if layout.kind == HEAD]
    lengths = {
        name: shape[layout.stack[0]]
        for name, (layout, shape) in found.items()
        if layout.stack and groups[name][1] is None and name not in [*tables, *heads]
    }
    # The first axis of an array of vectors counts layers if that of some matrices is as long.
    counts = {n for name, n in lengths.items() if found[name][0].is_matrix}
    number, count = (None, max(counts, default=0)) if layer is None else layer
    numbers = sorted({*range(count), *(i for _, i in groups.values() if i is not None)})
    first = int(embedding and any(groups[name][1] is None for name in tables))
    places: dict[str, _Place] = {}
    holders: dict[Any, str] = {}
    for name, (layout, shape) in found.items():
        group, index = groups[name]
        if lengths.get(name) in counts:
            places[name] = _Place(first, layout.stack[0], name)
        elif index is not None:
            holder = holders.setdefault((group, shape), name)
            places[name] = _Place(first + numbers.index(index), None, holder)
        elif not numbers:
            places[name] = _Place(0, None, name)
        elif name in tables:
            places[name] = _Place(0 if embedding else None, None, name)
        else:
            places[name] = _Place(first + len(numbers) if head else None, None, name)
    blocks = [first + len(numbers), *(1 + p.block for p in places.values() if p.block is not None)]
    return _Blocks(places, max(1, *blocks), number)


# A released step knows the following three functions by their names.


@functools.partial(jax.jit, static_argnames=("count", "order"))
def block_now(turn: Array, seed: Any, *, count: int, order: str) -> Array:
    """The number of the block whose turn it is.

    Args:
        turn: the number of turns before.
        seed: the seed of "random".
        count: the number of blocks.
        order: one of `ORDERS`.

    Example:
        >>> [int(block_now(t, 0, count=3, order="descending")) for t in range(4)]
        [2, 1, 0, 2]
    """
    place = turn % count
    if order == "random":
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), turn // count)
        return jax.random.permutation(key, count)[place]
    return place if order == "ascending" else count - 1 - place


@functools.partial(jax.jit, static_argnames="axis")
def layer_now(stack: Array, layer: Array, *, axis: int) -> Array:
    """One layer of a stack, as a stack of one; the first or last one if there is none."""
    layer = jnp.clip(layer, 0, stack.shape[axis] - 1)
    return jax.lax.dynamic_slice_in_dim(stack, layer, 1, axis)


@functools.partial(jax.jit, static_argnames="axis")
def put_layer(like: Array, part: Array, layer: Array, *, axis: int) -> Array:
    """Puts one layer in its place in a stack of zeros."""
    numbers = jax.lax.broadcasted_iota(jnp.int32, like.shape, axis)
    return jnp.where(numbers == layer, part, 0)
