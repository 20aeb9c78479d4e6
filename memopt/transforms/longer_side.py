"""Where an update is computed: on gradients that are split along their longer side."""

from typing import Any

import jax
import optax
from jax import Array
from jax.sharding import AxisType, NamedSharding

from memopt.matrices import Layout, Matrices, map_matrices
from memopt.state.sharding import Placed, axis_names, part_count, placed_params


def split_longer_side(
    tx: optax.GradientTransformation, params: Any, *, matrices: Matrices = None
) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer on gradients that are split along the longer side of each matrix.

    A subspace of rank r projects a matrix's shorter side, p. Where a mesh splits that one, devices
    sum up projections, r·q numbers a matrix. Split along q instead, each device projects what it
    has. On the way there and back devices exchange (all-to-all) a gradient and an update, each no
    more than its own part of them; the basis, r·p numbers, is gathered, unless it is drawn from a
    seed. The numbers are the same but for the order of sums.

    It pays for optimizers that work in a subspace of more than a few dimensions, see
    `memopt.in_subspace`, but for FRUGAL, which selects, and LDAdam, whose error feedback is a
    full-size array that changes places too. Others, with little to sum up, need nothing of the
    kind.

    Args:
      tx: any Optax transformation; its state is as it was.
      params: arrays, or ``jax.ShapeDtypeStruct`` in their place, each with a `NamedSharding`, as
        for `memopt.state_sharding`. Updates of the same names, of all layers or of one, are taken
        to lie as they do. Of a mesh with Explicit axes, whose types say where arrays are, nothing
        is moved; nor is a matrix whose longer side cannot be split so.
      matrices: which leaves are matrices, and of which axes; see
        `memopt.matrices.hidden_matrices`.

    Raises:
      ValueError: if a parameter has no `NamedSharding`, or they are on several meshes; in an
        update, if it has a matrix that `params` has not.

    Example:
      >>> import memopt, jax.numpy as jnp
      >>> auto = (jax.sharding.AxisType.Auto,)
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=auto)
      >>> rows = NamedSharding(mesh, jax.P("fsdp"))
      >>> params = {"up": {"kernel": jax.device_put(jnp.ones((16, 64)), rows)}}
      >>> tx = split_longer_side(memopt.galore(1e-2, rank=4), params)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    """
    places = {p.name: p for p in placed_params(params)}
    tx = optax.with_extra_args_support(tx)

    def turn(layout: Layout, x: Array, *, back: bool) -> Array:
        """One array in its place and then in the other, or the other way round."""
        if not layout.is_matrix:
            return x
        if layout.name not in places:
            raise ValueError(f"params has no {layout.name!r}, only {sorted(places)}.")
        pair = _places(layout, x, places[layout.name])
        for place in reversed(pair) if back else pair:
            x = jax.lax.with_sharding_constraint(x, place)
        return x

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        there = lambda layout, x: turn(layout, x, back=False)
        back = lambda layout, x: turn(layout, x, back=True)
        updates = map_matrices(there, updates, matrices=matrices)
        updates, state = tx.update(updates, state, params, **extra)
        return map_matrices(back, updates, matrices=matrices), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _places(layout: Layout, x: Array, param: Placed) -> tuple[NamedSharding, ...]:
    """Where an update lies as its parameter does, and where its longer side is split; or nothing.

    The first says what XLA would otherwise take from the second, back into the gradient's making.
    """
    mesh: Any = param.sharding.mesh
    here = param.entries[len(param.entries) - x.ndim :]
    *_, m, n = layout.shape(x)
    shorter, longer = (layout.rows, layout.cols) if m <= n else (layout.cols, layout.rows)
    moved = [name for axis in shorter for name in axis_names(here[axis])]
    both = (*axis_names(here[longer[0]]), *moved)
    fits = x.shape[longer[0]] % part_count(mesh, both) == 0
    if not both or not fits or AxisType.Explicit in mesh.axis_types:
        return ()
    there = [None if axis in shorter else entry for axis, entry in enumerate(here)]
    there[longer[0]] = both
    return NamedSharding(mesh, jax.P(*here)), NamedSharding(mesh, jax.P(*there))
