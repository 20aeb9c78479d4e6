"""A TPU kernel that computes a gradient's projection and its sums of squares in one pass.

XLA reads a gradient for the product and once more for the sums; the kernel reads it once. On other
platforms the two plain expressions are compiled.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType

from memopt.shapes import Basis, LowRank, Stack
from memopt.state.precision import statistics_dtype
from memopt.transforms.linalg import for_stack, product, replicate_axis

_BLOCK = 512  # rows and columns of the gradient's block in fast memory
_LANES, _SUBLANES = 128, 8  # columns and rows of the tiles in which arrays are stored
_MAX_RESIDENT = 7e6  # bytes of P and two blocks of R in fast memory, which is at least 16 MiB

Pair = tuple[LowRank, Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def project_and_norm(basis: Basis, gradient: Stack, left: bool, split: jax.P | None = None) -> Pair:
    """Projects a gradient and computes the sum of squares of each of its channels.

    On a TPU the gradient is read once, so pass it in its own dtype. If `split` is given, each
    device reads its own part of the gradient and none of it moves. Otherwise, on a mesh of several
    devices, XLA takes two passes.

    Args:
        basis: P, one for the whole stack: ``(m, r)`` if `left`, else ``(n, r)``.
        gradient: G, ``(*stack, m, n)``, of any floating dtype.
        left: whether the rows are projected, or the columns.
        split: the mesh axes that split each axis of G, if they are known.

    Returns:
        PᵀG, ``(*stack, r, n)``, and each column's sum of squares, ``(*stack, 1, n)``; or G P,
        ``(*stack, m, r)``, and each row's, ``(*stack, m, 1)``. The dtype is float32, or as wide as
        G's; products are in full precision.

    References:
        Zhu et al., APOLLO, 2024, https://arxiv.org/abs/2412.05270, Algorithm 1: the two results are
        what a step needs to scale G.

    Example:
        >>> g = jnp.array([[3.0, 1.0], [4.0, 0.0]])
        >>> low, squares = project_and_norm(jnp.eye(2, 1), g, True)
        >>> low.tolist(), squares.tolist()
        ([[3.0, 1.0]], [[25.0, 1.0]])
    """
    plain = functools.partial(_plain, left=left)
    one_pass = _one_pass(basis, gradient, left, split) or plain
    return jax.lax.platform_dependent(basis, gradient, tpu=one_pass, default=plain)


@project_and_norm.defjvp
def _jvp(left: bool, split: jax.P | None, primals: Any, tangents: Any) -> Any:
    _, slopes = jax.jvp(functools.partial(_plain, left=left), primals, tangents)
    return project_and_norm(*primals, left, split), slopes


def _plain(basis: Basis, gradient: Stack, *, left: bool) -> Pair:
    basis, g = replicate_axis(basis, -1), gradient.astype(statistics_dtype(gradient))
    if left:
        low = product("...mr,...mn->...rn", for_stack(basis, g), g)
    else:
        low = product("...mn,...nr->...mr", g, basis)
    low = replicate_axis(low, -2 if left else -1)
    return low, jnp.square(g).sum(-2 if left else -1, keepdims=True)


def _one_pass(
    basis: Basis, gradient: Stack, left: bool, split: jax.P | None
) -> Callable[..., Pair] | None:
    """The kernel for this gradient; None if XLA is as fast or the kernel does not apply."""
    side, r = basis.shape
    if not 1 < r < side / 2:  # for rank 1, XLA takes one pass and need not store R
        return None
    if 4 * r * (side + 2 * _BLOCK) > _MAX_RESIDENT or statistics_dtype(gradient) != jnp.float32:
        return None
    mesh = jax.typeof(gradient).sharding.mesh
    if split is not None and set(mesh.axis_types) == {AxisType.Auto}:
        return functools.partial(_on_shards, left=left, split=split)
    # Without `split` the kernel is for a single device only: the compiler cannot partition it, and
    # JAX's custom_partitioning does not reach TPU kernels (jax-ml/jax#38196).
    alone = jax.device_count() == 1 if mesh.empty else mesh.size == 1
    if alone and AxisType.Manual not in mesh.axis_types:
        return functools.partial(_kernel, left=left)
    return None


def _on_shards(basis: Basis, gradient: Stack, *, left: bool, split: jax.P) -> Pair:
    """Runs the kernel on each device's part of the gradient."""
    side = -2 if left else -1
    projected, kept = split[side], list(split)
    kept[side] = None
    basis_spec, result_spec = jax.P(projected, None), jax.P(*kept)

    def part(basis: Basis, gradient: Stack) -> Pair:
        results = _kernel(basis, gradient, left=left)
        return results if projected is None else jax.lax.psum(results, projected)

    one_pass = jax.shard_map(
        part,
        in_specs=(basis_spec, split),
        out_specs=(result_spec, result_spec),
        check_vma=False,  # the results of a kernel do not declare the axes they vary over
    )
    return one_pass(basis, gradient)


def _kernel(basis: Basis, gradient: Stack, *, left: bool) -> Pair:
    """Runs the kernel on axes in the order in which XLA stores them, so that nothing is copied.

    XLA stores the order that wastes least of the tiles: if the number of columns is not a multiple
    of 128 and that of rows is, the two are swapped; if the number of rows is then not a multiple
    of 8, they are swapped with the stack.
    """
    m, n = gradient.shape[-2:]
    is_transposed = n % _LANES != 0 and m % _LANES == 0
    g = gradient.mT if is_transposed else gradient
    rows = left != is_transposed  # whether the rows of g are projected
    if g.ndim > 2 and g.shape[-2] % _SUBLANES != 0:
        if rows:
            return _plain(basis, gradient, left=left)
        g = jnp.moveaxis(g, -2, 0)
        flat = g.reshape(-1, g.shape[-1])
        back = lambda x: jnp.moveaxis(x.reshape(*g.shape[:-1], -1), 0, -2)
    else:
        flat = g.reshape(-1, *g.shape[-2:]) if g.ndim > 3 else g
        back = lambda x: x.reshape(*g.shape[:-2], *x.shape[-2:])
    low, squares = map(back, _call(basis, flat, rows))
    return (low.mT, squares.mT) if is_transposed else (low, squares)


def _call(basis: Array, g: Array, left: bool) -> Pair:
    """Runs the kernel over a grid of blocks of g, ``(stack, m, n)`` or ``(m, n)``."""
    # Imported here because Pallas takes half as long to import as JAX, and few runs need it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (*stack, m, n), (side, r) = g.shape, basis.shape
    free = n if left else m
    depth, width = min(_BLOCK, side), min(_BLOCK, free)
    steps = pl.cdiv(side, depth)
    p = jnp.pad(basis.astype(jnp.float32), ((0, steps * depth - side), (0, 0)))
    p = p.reshape(steps, depth, r)
    matrix = lambda of_side, of_free: (of_side, of_free) if left else (of_free, of_side)
    low = jax.ShapeDtypeStruct((*stack, *matrix(r, free)), jnp.float32)
    squares = jax.ShapeDtypeStruct((*stack, 1, free), jnp.float32)

    def blocks(shape: tuple[int, int], place: Callable[[Any, Any], tuple[Any, Any]]) -> Any:
        index = lambda s, j, k: (s, *place(j, k))[-g.ndim :]
        return pl.BlockSpec((*(None for _ in stack), *shape), index)

    low, squares = pl.pallas_call(
        functools.partial(_block, left=left, side=side),
        grid=(math.prod(stack), pl.cdiv(free, width), steps),
        in_specs=[
            pl.BlockSpec(p.shape, lambda s, j, k: (0, 0, 0), pipeline_mode=pl.Buffered(1)),
            blocks(matrix(depth, width), lambda j, k: matrix(k, j)),
        ],
        out_specs=[
            blocks(matrix(r, width), lambda j, k: matrix(0, j)),
            blocks((1, width), lambda j, k: (0, j)),
        ],
        out_shape=[low, squares],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * (r + 1) * g.size,
            transcendentals=0,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (p, g, low, squares)),
        ),
        name="project_and_norm",
    )(p, g)
    return low, squares if left else squares.mT


def _block(
    p_ref: Any, g_ref: Any, low_ref: Any, squares_ref: Any, *, left: bool, side: int
) -> None:
    """Adds the contribution of one block of g; the last grid axis is the projected side."""
    from jax.experimental import pallas as pl

    step, axis = pl.program_id(2), 0 if left else 1
    g = g_ref[...].astype(jnp.float32)
    depth = g.shape[axis]
    if side % depth:  # entries of the last block beyond g are undefined
        at = step * depth + jax.lax.broadcasted_iota(jnp.int32, g.shape, axis)
        g = jnp.where(at < side, g, 0.0)
    dot = functools.partial(
        jax.lax.dot_general, precision="highest", preferred_element_type=jnp.float32
    )
    p = p_ref[step]
    low = dot(p, g, (((0,), (0,)), ((), ()))) if left else dot(g, p, (((1,), (0,)), ((), ())))
    squares = jnp.square(g).sum(axis, keepdims=True)
    if not left:  # the column of sums is stored as a row
        squares = jnp.broadcast_to(squares, (g.shape[0], _LANES)).T[:1]

    @pl.when(step == 0)
    def _() -> None:
        low_ref[...] = low
        squares_ref[...] = squares

    @pl.when(step > 0)
    def _() -> None:
        low_ref[...] += low
        squares_ref[...] += squares
