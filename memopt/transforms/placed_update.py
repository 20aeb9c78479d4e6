"""Computes updates under another sharding than that of the parameters."""

import functools
from typing import Any

import jax
import optax
from jax import Array
from jax.sharding import AxisType, NamedSharding

from memopt.checked import checked
from memopt.matrices import Layout, Matrices, map_matrices
from memopt.renamed import keywords
from memopt.state.sharding import Placed, axis_names, dense_like, part_count, placed_params
from memopt.trees import map_named


@keywords(by_layer="one_layer_at_a_time")
@checked
def unshard_short_side(
    params: Any, *, one_layer_at_a_time: bool = False, matrices: Matrices = None
) -> Any:
    """Returns shardings in which no matrix is split along its shorter side.

    A subspace of rank r projects a matrix's shorter side, p. If a mesh splits that side, devices
    sum the projections, r·q numbers per matrix, and gather the lifted updates. Here the mesh axes
    that split p are moved to the stack, if they divide it: each device then has whole matrices,
    with their bases. Otherwise they are moved to the longer side, q: projections need no sum, but
    the basis, r·p numbers, is gathered, unless it is drawn from a seed.

    Pass the result to `reshard_update`, and to `memopt.state_sharding` to shard the state alike.

    Args:
        params: arrays or ``jax.ShapeDtypeStruct``, each with a `NamedSharding`.
        one_layer_at_a_time: whether updates are computed one layer at a time, as by a released
            step; stacks are then not split further.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.hidden_matrices`.

    Returns:
        ``jax.ShapeDtypeStruct`` like `params`. Shardings are unchanged for leaves that are not
        matrices, for matrices whose stack and longer side are not divisible, and under Explicit
        axes, where types fix the shardings.

    Raises:
        ValueError: if a parameter has no `NamedSharding`, or they are on several meshes.

    Example:
        >>> mesh = jax.sharding.AbstractMesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
        >>> rows = NamedSharding(mesh, jax.P(None, "fsdp"))
        >>> params = {"up": jax.ShapeDtypeStruct((8, 16, 64), "float32", sharding=rows)}
        >>> unshard_short_side(params)["up"].sharding.spec
        P('fsdp',)
        >>> unshard_short_side(params, one_layer_at_a_time=True)["up"].sharding.spec
        P(None, None, 'fsdp')
    """
    places = {p.name: p for p in placed_params(params)}

    def place(layout: Layout, like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return like.update(
            sharding=_unshard_short_side(layout, places[layout.name], one_layer_at_a_time)
        )

    return map_matrices(place, dense_like(params), matrices=matrices)


def _unshard_short_side(layout: Layout, param: Placed, one_layer_at_a_time: bool) -> NamedSharding:
    """A sharding that does not split the shorter side; the given one if there is none."""
    mesh: Any = param.sharding.mesh
    if not layout.is_matrix or AxisType.Explicit in mesh.axis_types:
        return param.sharding
    *_, m, n = layout.shape(param.like)
    shorter, longer = (layout.rows, layout.cols) if m <= n else (layout.cols, layout.rows)
    moved = [name for axis in shorter for name in axis_names(param.entries[axis])]
    if not moved:
        return param.sharding
    for axis in (*(() if one_layer_at_a_time else layout.stack), longer[0]):
        names = (*axis_names(param.entries[axis]), *moved)
        if param.like.shape[axis] % part_count(mesh, names) == 0:
            spec = [None if a in shorter else entry for a, entry in enumerate(param.entries)]
            spec[axis] = names
            while spec[-1] is None:
                spec.pop()
            return NamedSharding(mesh, jax.P(*spec))
    return param.sharding


@keywords(places="shardings")
@checked
def reshard_update(
    tx: optax.GradientTransformation, params: Any, shardings: Any
) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer under other shardings: reshards gradients, then updates back.

    Gradients and updates are exchanged by all-to-all; no device holds more than its own part of
    them. The results are the same except for the order of sums. With `unshard_short_side` this
    pays off for optimizers in a subspace of more than a few dimensions, see `memopt.in_subspace`,
    except FRUGAL, which selects entries, and LDAdam, whose full-size error feedback is resharded
    too. Other optimizers have little to sum and do not need it.

    Args:
        tx: any Optax transformation. Its state is unchanged; shard it by
            ``memopt.state_sharding(tx, shardings)``.
        params: arrays or ``jax.ShapeDtypeStruct``, each with a `NamedSharding` over Auto axes.
            Updates with the same names, of all layers or of one, are assumed to be sharded alike.
        shardings: a tree like `params`, of arrays or shapes with the shardings under which the
            update is computed.

    Raises:
        ValueError: if a parameter has no `NamedSharding`, parameters are on several meshes, or the
            leaves of `shardings` are not those of `params`; at an update, if it has a leaf that
            `params` does not have.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
        >>> rows = NamedSharding(mesh, jax.P("fsdp"))
        >>> params = {"up": {"kernel": jax.device_put(jnp.ones((16, 64)), rows)}}
        >>> shardings = unshard_short_side(params)
        >>> tx = reshard_update(memopt.galore(1e-2, rank=4), params, shardings)
        >>> state = jax.jit(tx.init, out_shardings=memopt.state_sharding(tx, shardings))(params)
        >>> updates, state = jax.jit(tx.update)(params, state, params)
    """
    here, there = ({p.name: p for p in placed_params(tree)} for tree in (params, shardings))
    if here.keys() != there.keys():
        odd = sorted(here.keys() ^ there.keys())
        raise ValueError(f"shardings must have the arrays of params; only one of them has {odd}.")
    tx = optax.with_extra_args_support(tx)

    def move(name: str, x: Array, *, back: bool) -> Array:
        """Reshards one array from its own sharding to the other one, or back."""
        if name not in here:
            raise ValueError(f"params has no {name!r}, only {sorted(here)}.")
        pair = here[name], there[name]
        if pair[0].entries == pair[1].entries:
            return x
        # Both shardings are set: with the second alone, XLA would compute the gradient under it.
        for place in reversed(pair) if back else pair:
            spec = jax.P(*place.entries[len(place.entries) - x.ndim :])
            x = jax.lax.with_sharding_constraint(x, NamedSharding(place.sharding.mesh, spec))
        return x

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates = map_named(functools.partial(move, back=False), updates)
        updates, state = tx.update(updates, state, params, **extra)
        return map_named(functools.partial(move, back=True), updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)
