"""The mesh axes that split the axes of parameters and batches.

A mesh has axes among `data` (copies of the model), `fsdp` (parameters split, gathered for use) and
`tensor` (heads and MLP channels split); a batch is split over `data` and `fsdp`.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from memopt.models.config import LlamaConfig

RULES: Mapping[str, str] = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
BATCH_AXES = ("data", "fsdp")

log = logging.getLogger(__name__)


class Model(Protocol):
    """A module whose parameters carry logical `axes` and whose config knows their sizes."""

    config: LlamaConfig


def param_shardings(model: Model, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Place every parameter on a mesh by the logical names of its axes.

    `embed` is split over `fsdp`; `heads`, `kv_heads`, `mlp` and `vocab` over `tensor`; layers and
    norms are not split. An `mlp` width that does not divide (5461 in the "1b" preset) hands its
    mesh axis to the kernel's `embed` axis, with a warning in the log.

    Args:
        model: A `Llama`, real or from `nnx.eval_shape`.
        mesh: Axes among `data`, `fsdp`, `tensor`, of either axis type.

    Returns:
        Nested dict like the parameters, of `NamedSharding`.

    Raises:
        ValueError: If the mesh has another axis, or splits an axis that it does not divide.

    Example:
        >>> from memopt.models.llama import abstract_model, preset
        >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
        >>> shardings = param_shardings(abstract_model(preset("60m")), mesh)
        >>> shardings["blocks"]["mlp"]["gate"]["kernel"].spec == jax.P(None, "fsdp", "tensor")
        True

    """
    allowed = dict.fromkeys((*BATCH_AXES, *RULES.values()))
    if unknown := [axis for axis in mesh.axis_names if axis not in allowed]:
        raise ValueError(f"Mesh axis {unknown[0]!r} is unknown; use axes among {tuple(allowed)}.")

    def sharding(path: tuple[Any, ...], param: nnx.Param) -> NamedSharding:
        name = "/".join(map(str, path))
        return NamedSharding(mesh, _spec(name, param.axes, model.config.axis_sizes, mesh.shape))

    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return nnx.traversals.unflatten_mapping({p: sharding(p, v) for p, v in params})


def _spec(
    name: str, axes: tuple[str | None, ...], sizes: Mapping[str, int], mesh: Mapping[str, int]
) -> jax.P:
    wanted = [RULES.get(axis or "", "") for axis in axes]
    entries: list[tuple[str, ...]] = [(axis,) if axis in mesh else () for axis in wanted]
    if "mlp" in axes and sizes["mlp"] % _size(entries[axes.index("mlp")], mesh):
        mlp, embed = axes.index("mlp"), axes.index("embed")
        log.warning(
            "%s: mlp=%d does not divide over %s; embed=%d is split there instead.",
            *(name, sizes["mlp"], _describe(entries[mlp], mesh), sizes["embed"]),
        )
        entries[embed], entries[mlp] = entries[embed] + entries[mlp], ()
    for axis, entry in zip(axes, entries, strict=True):
        if axis and sizes[axis] % _size(entry, mesh):
            raise ValueError(
                f"{name}: axis {axis} of size {sizes[axis]} does not divide over mesh axis "
                f"{_describe(entry, mesh)}; choose a mesh whose size divides it."
            )
    return _partition(entries)


def _partition(entries: Iterable[tuple[str, ...]]) -> jax.P:
    return jax.P(*(entry if len(entry) > 1 else entry[0] if entry else None for entry in entries))


def _size(entry: tuple[str, ...], mesh: Mapping[str, int]) -> int:
    return math.prod(mesh[axis] for axis in entry)


def _describe(entry: tuple[str, ...], mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={mesh[axis]}" for axis in entry)


def batch_spec(batch_size: int) -> jax.P:
    """The sharding of a batch on the mesh in scope (`jax.set_mesh`).

    Args:
        batch_size: Rows of the batch.

    Returns:
        A partition of the first axis over `data` and `fsdp`, as far as the mesh has them; of
        nothing where they do not divide the batch.

    Example:
        >>> batch_spec(8) == jax.P(None)  # no mesh in scope
        True

    """
    return _divided((batch_size,), (BATCH_AXES,))


def batch_shards() -> int:
    """Number of parts the mesh in scope splits a batch into.

    Example:
        >>> batch_shards()  # no mesh in scope
        1

    """
    axes = _usable_axes()
    return math.prod(axes.get(axis, 1) for axis in BATCH_AXES)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Tell the compiler how an array is split; it would otherwise guess from the parameters.

    Does nothing outside a mesh and, since types carry the placement there, in an Explicit one.

    Args:
        x: Any array.
        *names: For each axis "batch", "data" for a batch split by copies of the model only, a
            logical axis of the parameters, or None for whole.

    Returns:
        `x`.

    Example:
        >>> constrain(jax.numpy.ones((2, 3)), "batch", None).shape
        (2, 3)

    """
    if not _usable_axes() or AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        return x
    batch = {"batch": BATCH_AXES, "data": ("data",)}
    wanted = tuple(batch.get(n) or (RULES[n],) if n else () for n in names)
    return jax.lax.with_sharding_constraint(x, _divided(x.shape, wanted))


def _divided(shape: tuple[int, ...], wanted: tuple[tuple[str, ...], ...]) -> jax.P:
    """The wanted partition without the mesh axes that are absent or do not divide."""
    mesh = _usable_axes()
    entries = [tuple(axis for axis in axes if axis in mesh) for axes in wanted]
    divides = [size % _size(entry, mesh) == 0 for size, entry in zip(shape, entries, strict=True)]
    return _partition(entry if ok else () for entry, ok in zip(entries, divides, strict=True))


def _usable_axes() -> dict[str, int]:
    """Axes of the mesh in scope that are not the manual ones of a `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {axis: mesh.shape[axis] for axis, kind in types if kind != AxisType.Manual}
