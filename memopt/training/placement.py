"""The mesh of a run, and the shardings of its state and its batches."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding

from memopt.models.sharding import BATCH_AXES
from memopt.optimizers.registry import find_method
from memopt.parameters import init_shapes
from memopt.state.sharding import dense_like, state_sharding
from memopt.training.step import TrainState
from memopt.transforms.placed_update import reshard_update, unshard_short_side


def make_mesh(spec: str | None, rows: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh that `spec` describes, with Auto axes.

    Args:
        spec: Axes and their sizes, such as "data=2,fsdp=4". None: as many devices as `rows` divides
            over, on one axis `data`. Where there are several processes, all devices are needed.
        rows: Rows of a (micro-)batch, to be split over `data` and `fsdp`.
        devices: The devices to choose from, such as those of a compiler. None: all there are.

    Returns:
        The mesh.

    Raises:
        ValueError: `spec` is no list of axes, needs more devices than there are or leaves out some
            of several processes, or does not divide `rows`.

    Example:
        >>> make_mesh("data=1,fsdp=1", rows=4).axis_names
        ('data', 'fsdp')
    """
    count = jax.device_count() if devices is None else len(devices)
    axes = {"data": math.gcd(count, rows)} if spec is None else parse_mesh(spec)
    size, shards = math.prod(axes.values()), math.prod(axes.get(axis, 1) for axis in BATCH_AXES)
    mesh = ",".join(f"{axis}={length}" for axis, length in axes.items())
    if size > count:
        raise ValueError(
            f"mesh {mesh!r} needs {size} devices, but there are {count}: choose sizes whose "
            "product is at most that."
        )
    if size < count and jax.process_count() > 1:
        raise ValueError(
            f"mesh {mesh!r}, for {rows} rows (batch size ÷ accumulation), must take in all "
            f"{count} devices of the {jax.process_count()} processes: change --mesh or "
            "--batch-size."
        )
    if rows % shards:
        raise ValueError(
            f"mesh {mesh!r} splits a batch into {shards} parts, which does not divide its {rows} "
            "rows (batch size ÷ accumulation): change --mesh or --batch-size."
        )
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=devices)


def parse_mesh(spec: str) -> dict[str, int]:
    """The axes that a mesh's description such as "data=2,fsdp=4" names, and their sizes."""
    pairs = [part.partition("=") for part in spec.split(",")]
    sizes = {name.strip(): int(size) for name, _, size in pairs if size.strip().isdecimal()}
    if len(sizes) != len(pairs) or not all(sizes.values()):
        raise ValueError(f"mesh {spec!r} must name axes once and size them, such as data=2,fsdp=4.")
    return sizes


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`, as far as the mesh has them."""
    return NamedSharding(mesh, jax.P(tuple(axis for axis in BATCH_AXES if axis in mesh.shape)))


def rows_here(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that devices of this process hold, in order.

    Example:
        >>> rows_here(make_mesh("data=1", rows=4), batch_size=4)
        [0, 1, 2, 3]
    """
    places: Mapping[Any, Any] = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return sorted({row for (rows,) in places.values() for row in range(batch_size)[rows]})


def place_update(
    tx: optax.GradientTransformation, name: str, params: Any, *, one_layer_at_a_time: bool
) -> tuple[optax.GradientTransformation, Any]:
    """Reshards an optimizer's update if that moves fewer bytes over the mesh.

    Args:
        tx: The optimizer.
        name: Its name, as of `memopt.optimizer`.
        params: The parameters, arrays or `ShapeDtypeStruct`s, with shardings.
        one_layer_at_a_time: Whether a layer is updated at a time.

    Returns:
        The optimizer, on parameters placed by `memopt.unshard_short_side` if it gains by it; and
        the parameters, placed as its state should be. For updates a layer at a time these are
        `params`: of state placed otherwise XLA's loop keeps a second copy (7B on 16 chips:
        3.8 GiB, not 3.1).
    """
    if not find_method(name).sums_projections:
        return tx, params
    places = unshard_short_side(params, one_layer_at_a_time=one_layer_at_a_time)
    return reshard_update(tx, params, places), params if one_layer_at_a_time else places


def abstract_state(
    params: Any, tx: optax.GradientTransformation, mesh: Mesh, places: Any = None
) -> TrainState:
    """Returns shapes and shardings of the state for parameters and an optimizer.

    Args:
        params: The parameters, arrays or `ShapeDtypeStruct`s, with shardings.
        tx: The optimizer. Its state is placed by `memopt.state_sharding`, and spread further over
            an axis `fsdp` that is not Explicit.
        mesh: Where the parameters are.
        places: The parameters placed as their update is computed, if otherwise than `params`.

    Returns:
        The state, of `ShapeDtypeStruct`s with shardings.
    """
    spread = dict(zip(mesh.axis_names, mesh.axis_types, strict=True)).get("fsdp") == AxisType.Auto
    shardings = state_sharding(
        tx, params if places is None else places, spread_over="fsdp" if spread else None
    )
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    count: Any = jax.ShapeDtypeStruct((), "int32", sharding=NamedSharding(mesh, jax.P()))
    params = jax.tree.map(lambda x: place(x, x.sharding), params)
    opt_state = jax.tree.map(place, init_shapes(tx.init, dense_like(params)), shardings)
    return TrainState(params, opt_state, count, count, count)
