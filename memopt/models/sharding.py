"""The mesh axes that split the axes of parameters and batches.

A mesh has axes among `data` (copies of the model), `fsdp` (parameters split, gathered for use) and
`tensor` (heads and MLP channels split); a batch is split over `data` and `fsdp`.
"""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
from flax import nnx
from jax import Array
from jax.sharding import AxisType, NamedSharding

from memopt.errors import check_choice
from memopt.models.config import LlamaConfig

BATCH_AXES = ("data", "fsdp")
# The mesh axes that split each logical axis, of batches and of parameters.
RULES: Mapping[str | None, tuple[str, ...]] = {
    **{"batch": BATCH_AXES, "data": ("data",), "embed": ("fsdp",)},
    **dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), ("tensor",)),
}

log = logging.getLogger(__name__)


class Model(Protocol):
    """A module whose parameters carry logical `axes`."""

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
    for axis in mesh.axis_names:
        check_choice("Mesh axis", axis, dict.fromkeys(itertools.chain(*RULES.values())))
    width = dict.fromkeys(("heads", "kv_heads"), model.config.head_dim)  # a head is never cut

    def sharding(path: tuple[Any, ...], param: nnx.Param) -> NamedSharding:
        axes = zip(param.axes, param.shape, strict=True)
        sizes = {axis: size // width.get(axis, 1) for axis, size in axes}
        return NamedSharding(mesh, _spec("/".join(path), sizes, mesh.shape))

    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return nnx.traversals.unflatten_mapping({p: sharding(p, v) for p, v in params})


def _spec(name: str, sizes: Mapping[str | None, int], mesh: Mapping[str, int]) -> jax.P:
    entries = dict(zip(sizes, _entries([*sizes], mesh), strict=True))
    if "mlp" in sizes and sizes["mlp"] % _size(entries["mlp"], mesh):
        log.warning(
            "%s: mlp=%d does not divide over %s; embed=%d is split there instead.",
            *(name, sizes["mlp"], _describe(entries["mlp"], mesh), sizes["embed"]),
        )
        entries["embed"], entries["mlp"] = entries["embed"] + entries["mlp"], ()
    for axis, entry in entries.items():
        if sizes[axis] % _size(entry, mesh):
            raise ValueError(
                f"{name}: axis {axis} of size {sizes[axis]} does not divide over mesh axis "
                f"{_describe(entry, mesh)}; choose a mesh whose size divides it."
            )
    return jax.P(*entries.values())


def _entries(axes: Sequence[str | None], mesh: Mapping[str, int]) -> list[tuple[str, ...]]:
    """The axes of a mesh that split each logical axis."""
    return [tuple(axis for axis in RULES.get(name, ()) if axis in mesh) for name in axes]


def _size(entry: tuple[str, ...], mesh: Mapping[str, int]) -> int:
    return math.prod(mesh[axis] for axis in entry)


def _describe(entry: tuple[str, ...], mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={mesh[axis]}" for axis in entry)


def partition(shape: Sequence[int], names: Sequence[str | None]) -> jax.P:
    """The sharding of an array on the mesh in scope (`jax.set_mesh`).

    Args:
        shape: Of the array.
        names: For each axis, a key of `RULES`, or None for an axis that is not split.

    Returns:
        A partition by `RULES`, without the mesh axes that are absent or do not divide.

    Example:
        >>> partition((8, 3), ["batch", None]) == jax.P(None, None)  # no mesh in scope
        True

    """
    mesh = _usable_axes()
    sizes = zip(shape, _entries(names, mesh), strict=True)
    return jax.P(*(entry if size % _size(entry, mesh) == 0 else () for size, entry in sizes))


def shards(name: str, size: int) -> int:
    """Number of parts the mesh in scope splits an axis into.

    Args:
        name: A key of `RULES`.
        size: Length of the axis.

    Example:
        >>> shards("batch", 8)  # no mesh in scope
        1

    """
    mesh = _usable_axes()
    parts = _size(_entries([name], mesh)[0], mesh)
    return parts if size % parts == 0 else 1


def constrain(x: Array, *names: str | None) -> Array:
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
    return jax.lax.with_sharding_constraint(x, partition(x.shape, names))


def _usable_axes() -> dict[str, int]:
    """Axes of the mesh in scope that are not the manual ones of a `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes}
