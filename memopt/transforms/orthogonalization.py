"""Orthogonalises updates by Newton–Schulz iterations and scales them by their shape (Muon)."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.typing import DTypeLike

from memopt.axis_types import on_auto_axes
from memopt.checked import checked
from memopt.errors import check_at_least, check_choice, check_static, check_unused
from memopt.matrices import Layout, Matrices, every_matrix, map_matrices
from memopt.renamed import keywords
from memopt.shapes import Stack
from memopt.state.precision import bounded, check_real
from memopt.transforms.linalg import product
from memopt.transforms.per_matrix import per_matrix

Coefficients = str | Sequence[float] | Sequence[Sequence[float]]


def _at(scale: float, polynomials: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """The polynomials of x / scale: the safety factor of a bound that rounding may exceed."""
    return tuple((a / scale, b / scale**3, c / scale**5) for a, b, c in polynomials)


_POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_POLAR_EXPRESS_EXACT = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
NEWTON_SCHULZ_COEFFS: dict[str, tuple[tuple[float, ...], ...] | tuple[float, ...]] = {
    "jordan": (3.4445, -4.7750, 2.0315),
    "polar_express": (*_at(1.02, _POLAR_EXPRESS[:1]), *_POLAR_EXPRESS[1:]),
    "polar_express_1.05": _at(1.05, _POLAR_EXPRESS_EXACT),
    "nvidia": (
        *((8.2051, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8234, 0.5250)),
        *((3.2856, -2.4153, 0.4853), (2.2779, -1.6198, 0.3985), (1.8726, -1.2307, 0.3585)),
        *((1.8564, -1.2132, 0.3568), (1.875, -1.25, 0.375)),
    ),
    "you": (
        *((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037)),
        *((2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)),
    ),
    "deepseek": (*[(3.4445, -4.7750, 2.0315)] * 8, *[(2.0, -1.5, 0.5)] * 2),
}
"""Published polynomials by name, one for all iterations or one for each.

`newton_schulz` divides by the norm of the matrix. The other factors that codes divide by, which
keep singular values below one in spite of rounding, are part of the polynomials here.
"""

SHAPE_SCALES: dict[str, Callable[[int, int], float]] = {
    "jordan": lambda m, n: math.sqrt(max(1, n / m)),
    "moonlight": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "spectral": lambda m, n: math.sqrt(n / m),
}
"""Published factors for orthogonal updates, by name, from the numbers m of inputs and n of outputs.
"""


@keywords(steps="ns_steps", coefficients="ns_coeffs", copied_over="replica_axis")
@checked
def orthogonalize(
    ns_steps: int = 5,
    ns_coeffs: Coefficients = "jordan",
    eps: float = 1e-7,
    *,
    dtype: DTypeLike | None = None,
    gram: bool = False,
    replica_axis: str = "data",
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces each matrix U S Vᵀ by an approximation of U Vᵀ, using only matrix products.

    For an m×n matrix G, m ≤ n (otherwise for its transpose)::

        X = G / (‖G‖ + ε)
        X ← a X + (b A + c A²) X,    A = X Xᵀ        `ns_steps` times

    With the default coefficients singular values end between 0.7 and 1.2. No state.

    Matrices of equal sides form one batch, whatever parameters they belong to. On a mesh they are
    distributed over the devices: each matrix is on one device during the iterations, and data
    moves only before and after them. A vector is a matrix of one row.

    Args:
        ns_steps: the number of iterations.
        ns_coeffs: a, b and c; or three numbers for each step, which then sets the number of steps;
            or the name of a published set. "jordan" is Muon's a, b and c, and the others are sets
            of some steps, which also find small singular values: "polar_express" (5, as in dion
            and nanochat, safety factor 1.02), "polar_express_1.05" (5, with that factor in each
            step, as in Gram Newton–Schulz), "nvidia" (8, Polar Express with 1.01), "you" (5) and
            "deepseek" (10).
        eps: added to the norm.
        dtype: the dtype of the iterations; by default float32, or wider if the updates are.
        gram: iterate on the Gram matrix G Gᵀ, of side m, and multiply by G at the end. The result
            is the same but for rounding; for n > 2m it takes fewer operations. Square matrices are
            iterated on as above.
        replica_axis: the mesh axis over which parameters are replicated, if there is one. It
            affects what is communicated, not the results.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`.

    Returns:
        A transformation whose update takes the extra argument `leaf_by_leaf`. A training step that
        never holds all gradients sets it, so that parameters are not batched.

    Raises:
        ValueError: if `ns_steps` is below 1, `ns_coeffs` are not three numbers per step or no name,
            or `ns_steps` is given although `ns_coeffs` set the number of steps.

    References:
        Jordan et al., Muon, 2024, https://kellerjordan.github.io/posts/muon/; Amsel et al., The
        Polar Express, 2025, https://arxiv.org/abs/2505.16932; Gram Newton–Schulz:
        https://github.com/Dao-AILab/gram-newton-schulz.

    Example:
        >>> g = jnp.array([[3.0, 0.0, 0.0], [0.0, 0.0, -2.0]])
        >>> u, _ = orthogonalize(10, (1.5, -0.5, 0.0)).update({"w": g}, optax.EmptyState())
        >>> print(u["w"].round(3) + 0.0)
        [[ 1.  0.  0.]
         [ 0.  0. -1.]]
    """
    _polynomials(ns_steps, ns_coeffs)
    iterate = functools.partial(
        newton_schulz, ns_steps=ns_steps, ns_coeffs=ns_coeffs, eps=eps, dtype=dtype, gram=gram
    )

    def update(
        updates: Any, state: Any, params: Any = None, *, leaf_by_leaf: bool = False, **_: Any
    ) -> tuple[Any, Any]:
        def orthogonal(updates: Any) -> Any:
            on = functools.partial(map_matrices, matrices=matrices, default=every_matrix)
            structure: Any
            leaves, structure = jax.tree.flatten(on(_to_landscape, updates))
            if leaf_by_leaf:
                done = list(map(iterate, leaves))
            else:
                done = _in_batches(iterate, leaves, replica_axis)
            return on(_from_landscape, updates, structure.unflatten(done))

        return on_auto_axes(jax.jit(orthogonal), (updates,), like=updates), state

    def init(params: Any) -> optax.EmptyState:
        check_real(params)
        return optax.EmptyState()

    return optax.GradientTransformationExtraArgs(init, update)


@checked
def newton_schulz(
    x: Stack,
    ns_steps: int = 5,
    ns_coeffs: Coefficients = "jordan",
    eps: float = 1e-7,
    *,
    dtype: DTypeLike | None = None,
    gram: bool = False,
) -> Stack:
    """Runs the iterations of `orthogonalize` on an array of matrices.

    Args:
        x: ``(*stack, m, n)``.
        ns_steps: as in `orthogonalize`.
        ns_coeffs: as in `orthogonalize`.
        eps: as in `orthogonalize`.
        dtype: as in `orthogonalize`.
        gram: as in `orthogonalize`.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        ValueError: as in `orthogonalize`.

    Example:
        >>> g = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> newton_schulz(g, 20, (1.5, -0.5, 0.0)).round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    polynomials = _polynomials(ns_steps, ns_coeffs)
    x = jnp.asarray(x)
    is_tall, is_square = x.shape[-2] > x.shape[-1], x.shape[-2] == x.shape[-1]

    def step(y: Array, polynomial: Array) -> tuple[Array, None]:
        a, b, c = polynomial
        gram = jnp.einsum("...mn,...pn->...mp", y, y)
        return a * y + (b * gram + c * (gram @ gram)) @ y, None

    def iterate(x: Array) -> Array:
        y = bounded(x.mT if is_tall else x)
        if gram and not is_square:
            y = _by_gram_matrix((y / (_norm(y) + eps)).astype(dtype or y.dtype), polynomials)
        else:
            y = y.astype(dtype or y.dtype)
            y = jax.lax.scan(step, y / (_norm(y) + eps), jnp.asarray(polynomials, y.dtype))[0]
        return (y.mT if is_tall else y).astype(x.dtype)

    return on_auto_axes(iterate, (x,), like=x)


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.square(x).sum((-2, -1), keepdims=True))


def _by_gram_matrix(x: Stack, polynomials: np.ndarray) -> Stack:
    """Computes the iterations on x, wider than tall, as polynomials of its Gram matrix.

    With R = X Xᵀ, a step multiplies X by P = a I + b R + c R², and R by P². Products are in full
    precision, since errors of R grow.
    """
    times = lambda y, z: product("...mp,...pq->...mq", y, z)
    restarts, all_steps = _restarts(polynomials, x.dtype), None
    for i, (a, b, c) in enumerate(polynomials.tolist()):
        if i in restarts:
            x, all_steps = times(all_steps, x), None
        if all_steps is None:
            gram = product("...mn,...pn->...mp", x, x)
        higher = b * gram + c * times(gram, gram)
        step = lambda y, a=a, higher=higher: a * y + times(y, higher)
        if all_steps is None:
            all_steps = a * jnp.eye(x.shape[-2], dtype=x.dtype) + higher
        else:
            all_steps = step(all_steps)
        if i + 1 < len(polynomials) and i + 1 not in restarts:
            gram = step(step(gram))
    return times(all_steps, x)


def _restarts(polynomials: np.ndarray, dtype: Any) -> set[int]:
    """The steps that begin with the Gram matrix of a new X.

    An eigenvalue of R that rounding made negative grows by a² in a step; it must not reach one.
    With the coefficients of Dao-AILab in float16, this is the third step, as published.
    """
    steps: set[int] = set()
    error = float(jnp.finfo(dtype).eps)
    for i, a in enumerate(polynomials[:-1, 0], 1):
        error *= a**2
        if error * polynomials[i, 0] ** 2 > 1:
            steps, error = steps | {i}, float(jnp.finfo(dtype).eps)
    return steps


def _polynomials(ns_steps: int, ns_coeffs: Coefficients) -> np.ndarray:
    """The coefficients of each step."""
    check_static("ns_steps", ns_steps)
    check_at_least("ns_steps", ns_steps, 1)
    if isinstance(ns_coeffs, str):
        check_choice("ns_coeffs", ns_coeffs, NEWTON_SCHULZ_COEFFS)
        polynomials = np.asarray(NEWTON_SCHULZ_COEFFS[ns_coeffs])
    else:
        polynomials = np.asarray(ns_coeffs, float)
    if polynomials.ndim not in (1, 2) or polynomials.shape[-1] != 3:
        raise ValueError(
            f"ns_coeffs must be three numbers, or three for each step, got {ns_coeffs!r}."
        )
    if polynomials.ndim == 2:
        check_unused(newton_schulz, "ns_coeffs has one polynomial per step", ns_steps=ns_steps)
        return polynomials
    return np.tile(polynomials, (ns_steps, 1))


@checked
def scale_by_matrix_shape(
    consistent_rms: float | None = None,
    *,
    shape_scale: str = "jordan",
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales the update of an m×n matrix, with m inputs and n outputs, by its shape.

    The factor is one of those below, or, with `consistent_rms`, consistent_rms · √max(m, n), which
    gives orthogonal updates that root mean square. No state.

    Args:
        consistent_rms: the root mean square of every update; 0.2 is about AdamW's.
        shape_scale: "jordan", √max(1, n/m), as in Muon; "moonlight", 0.2 √max(m, n), which is
            ``consistent_rms=0.2``; or "spectral", √(n/m), with which an update changes outputs as
            much as inputs, whatever the shape.
        matrices: which leaves are matrices, and which axes are their rows and columns; see
            `memopt.matrices`. Rows are inputs, see `memopt.out_in`; a vector is a matrix of one
            row.

    Raises:
        ValueError: if `shape_scale` is unknown, or given beside `consistent_rms`.

    References:
        Jordan et al., Muon, 2024, https://kellerjordan.github.io/posts/muon/; Liu et al., Muon is
        Scalable for LLM Training, 2025, https://arxiv.org/abs/2502.16982, section 2.2; Yang et al.,
        A Spectral Condition for Feature Learning, 2023, https://arxiv.org/abs/2310.17813.

    Example:
        >>> u, _ = scale_by_matrix_shape().update({"w": jnp.ones((2, 8))}, optax.EmptyState())
        >>> float(u["w"][0, 0])
        2.0
    """
    check_choice("shape_scale", shape_scale, SHAPE_SCALES)
    if consistent_rms is not None:
        why = "consistent_rms sets the size of updates"
        check_unused(scale_by_matrix_shape, why, shape_scale=shape_scale)
    factor = SHAPE_SCALES[shape_scale]
    rule = functools.partial(multiply_by_shape, consistent_rms=consistent_rms, factor=factor)
    return per_matrix(rule, matrices=matrices)


def multiply_by_shape(
    layout: Layout,
    u: Array,
    *,
    consistent_rms: float | None,
    factor: Callable[[int, int], float],
) -> Array:
    """Multiplies the update of each m×n matrix by its factor, or consistent_rms · √max(m, n)."""
    m, n = layout.shape(u)[-2:]
    if consistent_rms is None:
        return u * factor(m, n)
    return (u * (consistent_rms * math.sqrt(max(m, n)))).astype(u.dtype)


def _to_landscape(layout: Layout, u: Array) -> Array:
    """Reshapes an update to a stack of matrices with no more rows than columns."""
    x = layout.to_matrices(u)
    x = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    return x.mT if x.shape[-2] > x.shape[-1] else x


def _from_landscape(layout: Layout, u: Array, x: Array) -> Array:
    """Inverts `_to_landscape`."""
    *_, m, n = shape = layout.shape(u)
    return layout.from_matrices((x.mT if m > n else x).reshape(shape), u)


def _in_batches(
    f: Callable[[Array], Array], stacks: Sequence[Array], replica_axis: str
) -> list[Array]:
    """Applies ``f`` to every stack, in one call for all matrices of the same shape."""
    kinds: dict[Any, list[int]] = {}
    for i, x in enumerate(stacks):
        kinds.setdefault((x.shape[1:], x.dtype), []).append(i)
    done: dict[int, Array] = {}
    for kind in kinds.values():
        batch = _across_devices(f, [stacks[i] for i in kind], replica_axis)
        done.update(zip(kind, batch, strict=True))
    return [done[i] for i in range(len(stacks))]


def _across_devices(
    f: Callable[[Array], Array], stacks: Sequence[Array], replica_axis: str
) -> list[Array]:
    """Applies ``f`` to stacks of matrices of one shape, with the same number on each device.

    The stacks are first resharded to a common layout, rows over the whole mesh, in which they can
    be concatenated. XLA reshards from any layout to it, except that an array that is split over
    two axes and replicated over a third must not change all three at once: XLA would gather it on
    every device. The intermediate layouts avoid that.
    """
    mesh = jax.typeof(stacks[0]).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    names = [name for name, kind in kinds if kind != AxisType.Manual]
    split = tuple(name for name in names if name != replica_axis)
    everywhere = (*split, *(name for name in names if name == replica_axis))
    devices = math.prod(mesh.shape[name] for name in names)

    def place(x: Array, *spec: Any) -> Array:
        if not names or any(n % devices for n, axes in zip(x.shape, spec, strict=False) if axes):
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, jax.P(*spec)))

    x = jnp.concatenate([place(x, None, split) for x in stacks])
    x = place(jnp.pad(x, ((0, -len(x) % devices), (0, 0), (0, 0))), None, everywhere)
    x = place(f(place(x, everywhere)), everywhere)
    x = place(place(x, None, everywhere), None, split)
    ends = itertools.accumulate(map(len, stacks))
    return [place(x[end - len(y) : end], None, split) for y, end in zip(stacks, ends, strict=True)]
