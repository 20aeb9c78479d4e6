"""Reads and writes of one layer that XLA does in place, without a copy of the stack."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from memopt.state.quantized_params import is_quantized


def pin_layout(x: Any, spec: Any = None) -> Any:
    """Pins an array's layout in memory, so that XLA does not transpose a whole stack for one layer.

    TPUs store the scales of a quantised array by columns: by rows most lanes would be empty.

    Args:
        x: An array, or a quantised one.
        spec: Its `jax.P` on a mesh; that of a quantised array holds one for each of its arrays.
    """
    if not is_quantized(x):
        pin = lambda x: with_layout(x, spec)
        return jax.lax.platform_dependent(x, cpu=lambda x: x, default=pin)
    pin_scales = lambda s, spec: jax.lax.platform_dependent(
        s, tpu=lambda s: with_layout(s, spec, by_columns=True), default=lambda s: s
    )
    scales = tuple(map(pin_scales, x.scales, spec.scales if spec else [None] * len(x.scales)))
    return dataclasses.replace(x, codes=pin_layout(x.codes, spec and spec.codes), scales=scales)


def with_layout(x: Array, spec: jax.P | None, *, by_columns: bool = False) -> Array:
    """Constrains an array's axes to their order in memory, the last axis first if `by_columns`.

    On a mesh each shard is constrained, if `spec` is known: for a constraint on the whole array
    XLA would gather it.
    """
    axes = tuple(range(x.ndim))
    order = axes[-1:] + axes[:-1] if by_columns else axes
    constrain = lambda x: with_layout_constraint(x, Layout(order))
    if jax.sharding.get_abstract_mesh().size <= 1:
        return constrain(x)
    return x if spec is None else jax.shard_map(constrain, in_specs=spec, out_specs=spec)(x)


def reload_after(stored: Any, x: Any, layer: Array | None = None) -> tuple[Any, Array | None]:
    """Reads a parameter, or one layer of it, after `x` is computed.

    The read waits for the scales of quantised parameters, and for the index of a dense layer.
    Dense parameters without a layer may be read at any time.

    Returns:
        The parameter or layer, and the index at which to write the layer back.
    """
    if layer is not None and not is_quantized(stored):
        layer, _ = jax.lax.optimization_barrier((layer, x))
    part = read_layer(stored, layer, 0)
    if is_quantized(part):
        scales, _ = jax.lax.optimization_barrier((part.scales, x))
        part = dataclasses.replace(part, scales=scales)
    return part, layer


def delay_flag(flag: Array, x: Array) -> Array:
    """Returns `flag`; on CPUs XLA does not know it before `x` is computed.

    Without this XLA for CPUs does not see that all reads of a stack come before the write, and
    copies the whole stack: the gradient of a matrix need not depend on the matrix, but the
    cotangent of the block's input does.
    """

    def known(flag: Array, x: Array) -> Array:
        largest = x.max()
        return flag & ((largest <= jnp.inf) | jnp.isnan(largest))  # always true; XLA cannot tell

    return jax.lax.platform_dependent(flag, x, cpu=known, default=lambda flag, x: flag)


def read_layer(tree: Any, layer: Array | None, axis: int | None) -> Any:
    """Slices one layer, as a stack of one; all of it if `layer` or `axis` is None."""
    if layer is None or axis is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, layer, 1, axis), tree)


def write_layer(tree: Any, part: Any, layer: Array | None, axis: int | None) -> Any:
    """Writes a layer that `read_layer` sliced back into its stack."""
    if layer is None or axis is None:
        return part
    write = lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, layer, axis)
    return jax.tree.map(write, tree, part)


def update_in_place(condition: Array, update: Callable[[], Any], old: Any) -> Any:
    """Returns ``update()`` inside a loop; unless `condition` holds, that is `old`.

    XLA for CPUs would fuse reads and writes of several arrays, and copy them whole; under a
    conditional it reads all it needs of one before it writes to it.
    """
    cond = lambda: jax.lax.cond(condition, update, lambda: old)
    return jax.lax.platform_dependent(cpu=cond, default=update)
