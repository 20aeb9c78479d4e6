"""Learning rates and initial scales that transfer from a base model to wider ones (µP and others).

A weight is used as n^-a W, W starts with a standard deviation of n^-b, and its learning rate is
proportional to n^-c, all relative to the base model; n is its number of inputs, or an embedding's
outputs. a, b and c depend on its role in the model.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import optax

from memopt.checked import checked
from memopt.errors import check_choice
from memopt.matrices import Layout, Matrices, Matrix, every_matrix, layout_of, map_matrices
from memopt.names import VECTOR, kind_of
from memopt.parameters import Parameter, read_parameters
from memopt.trees import map_named, named_leaves, open_box

ROLES = EMBEDDING, HIDDEN, READOUT = "embedding", "hidden", "readout"
FIXED = "fixed"


class Exponents(NamedTuple):
    """The exponents of a role: the weight is n^-a W, W starts at n^-b, the learning rate is n^-c.

    Attributes:
        a: of the multiplier in the forward pass.
        b: of the standard deviation of the initial values.
        c: of the learning rate.
    """

    a: float
    b: float
    c: float


PARAMETERIZATIONS = {
    "standard": ((0.0, 0.0), (0.0, 0.5), (0.0, 0.5)),
    "ntk": ((0.0, 0.0), (0.5, 0.0), (0.5, 0.0)),
    "mup": ((-0.5, 0.5), (0.0, 0.5), (0.5, 0.5)),
    "mean_field": ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0)),
}
"""a and b of embeddings, hidden matrices and readouts, as Everett et al. 2024 tabulate them."""

ALIGNMENTS = {"full": (0.0, 1.0, 1.0), "none": (0.0, 0.5, 0.5)}
"""κ = a + c of embeddings, hidden matrices and readouts, for updates of entries of the size of the
learning rate. n inputs that are aligned with the update add up to n of it, others to √n."""

MUP_ADAM_CONSTANTS = (5.303, 1.258, 11.723)
"""γ of embeddings, hidden matrices and readouts that Everett et al. 2024 found for Adam and µP,
quoted from others' accounts of the paper's Table 8. They depend on model and data."""


@checked
def width_exponents(
    parameterization: str, alignment: str = "full", *, multipliers: bool = True
) -> dict[str, Exponents]:
    """Returns the exponents of each role under a parameterisation.

    Args:
        parameterization: "standard", "ntk", "mup" or "mean_field".
        alignment: "full" if the inputs of a matrix are aligned with its updates, which allows for
            the largest effect of a step; "none" if they are as random vectors.
        multipliers: whether the forward pass multiplies weights by (n / n_base)^-a. If not, as in
            `memopt.models.llama`, the exponents are (0, a + b, a + c): for an optimizer whose
            updates do not depend on the scale of gradients, such as Adam, this is the same
            training.

    Returns:
        {"embedding": …, "hidden": …, "readout": …}, each an `Exponents`.

    Raises:
        ValueError: if a name is unknown.

    References:
        Everett et al., Scaling Exponents Across Parameterizations and Optimizers, 2024,
        https://arxiv.org/abs/2407.05872.

    Example:
        >>> width_exponents("mup")["readout"]
        Exponents(a=0.5, b=0.5, c=0.5)
        >>> width_exponents("mup", multipliers=False)["readout"]
        Exponents(a=0.0, b=1.0, c=1.0)
    """
    check_choice("parameterization", parameterization, PARAMETERIZATIONS)
    check_choice("alignment", alignment, ALIGNMENTS)
    found = {}
    rows = zip(ROLES, PARAMETERIZATIONS[parameterization], ALIGNMENTS[alignment], strict=True)
    for role, (a, b), kappa in rows:
        found[role] = Exponents(a, b, kappa - a) if multipliers else Exponents(0.0, a + b, kappa)
    return found


class WidthRole(NamedTuple):
    """The role of a parameter in a model that becomes wider.

    Attributes:
        role: "embedding", "hidden", "readout", or "fixed" if it has the same size at both widths.
        growth: n / n_base: the growth of its inputs, or of its outputs if its inputs do not grow.
    """

    role: str
    growth: float


def width_roles(
    params: Any, base: Any, *, wider: Any = None, matrices: Matrices = None
) -> dict[str, WidthRole]:
    """Finds the role of each parameter by comparing its shape with that at the base width.

    A matrix whose inputs and outputs grow is hidden; one whose outputs alone grow, and every vector
    that grows, is an embedding; one whose inputs alone grow is a readout. Axes of layers or experts
    do not count.

    So keys and values of a fixed number of heads are readouts, too. A readout that shares its
    weights with the embedding is an embedding; see `scale_by_width`.

    Args:
        params: the parameters, or their shapes.
        base: the parameters, or their shapes, of the same model at the base width, by the same
            names, such as ``jax.eval_shape`` of its construction.
        wider: those at any other width, from which the roles are found in place of `params`.
        matrices: which axes of each matrix are its rows, the inputs, and its columns; see
            `memopt.matrices`. By default those that `memopt.every_matrix` finds. Embeddings and
            heads are matrices here.

    Returns:
        {name: role} for each parameter.

    Raises:
        ValueError: if `base` or `wider` lacks a parameter, if one has another number of axes there,
            if one side of a matrix grows while the other shrinks, or if `matrices` excludes a
            matrix that grows.

    Example:
        >>> import jax
        >>> def shapes(d):
        ...     sizes = {"embed": (256, d), "up": (8, d, 4 * d), "norm": (8, d), "head": (d, 256)}
        ...     return {name: jax.ShapeDtypeStruct(s, "float32") for name, s in sizes.items()}
        >>> for name, role in width_roles(shapes(512), base=shapes(128)).items():
        ...     print(name, *role)
        embed embedding 4.0
        head readout 4.0
        norm embedding 4.0
        up hidden 4.0
    """
    at_base, at_other = _shapes(base), None if wider is None else _shapes(wider)
    parameters = {p.name: p for p in read_parameters(params)}
    found: dict[str, WidthRole] = {}

    def find(layout: Layout, leaf: Any) -> None:
        name, shape = layout.name, tuple(leaf.shape)
        narrow = _shape_in("base", at_base, name, shape)
        wide = shape if at_other is None else _shape_in("wider", at_other, name, shape)
        if not layout.is_matrix:
            _check_vector(layout, parameters[name], narrow, wide)
        role, own = _role(layout, narrow, wide), _role(layout, narrow, shape)
        if own not in (FIXED, role):
            raise ValueError(
                f"{name!r} is {_article(own)} in params, {shape} against {narrow} in base, but "
                f"{_article(role)} in wider, {wide}; all three must be of the same model."
            )
        inputs, outputs = _growths(layout, narrow, shape)
        found[name] = WidthRole(role, outputs if role == EMBEDDING else inputs)

    map_matrices(find, params, matrices=matrices, default=_every_side)
    return found


@checked
def scale_by_width(
    parameterization: str,
    base: Any,
    *,
    alignment: str = "full",
    multipliers: bool = True,
    constants: Sequence[float] = (1.0, 1.0, 1.0),
    wider: Any = None,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales each update for the width of its layer, so that one learning rate suits all widths.

    The update of a parameter is multiplied by::

        γ · (n / n_base)^-c

    where c depends on its role: embedding, hidden matrix or readout (`width_exponents`). n / n_base
    is the growth of its inputs, or of an embedding's outputs; growth and roles are found by
    comparing shapes with those of a base model (`width_roles`, which shows them). At the base width
    it is the identity, if `constants` are not given. No state.

    Place it after an optimizer whose updates do not depend on the scale of gradients, such as
    `scale_by_adam_atan2` (Adam's ε would have to be scaled too, or very small), and before the
    learning rate. Decay that comes after it is the same at all widths.

    By default the exponents suit models whose forward pass multiplies weights, vectors included, by
    (n / n_base)^-a, as the parameterisation says; in "standard" a is zero. For a model that does
    not, such as `memopt.models.llama`, say ``multipliers=False``: all parameterisations then have
    the same learning rates, and differ in their initial values, see `scale_initial_by_width`.

    µP also divides attention logits by head_dim, not its root; this matters only if head_dim
    grows, rather than the number of heads. Embeddings that are also the readout have the role of an
    embedding: the model must divide its logits by n / n_base, or ``matrices`` must say that the
    embedding's inputs are the axis that grows, which makes it a readout and slows it down.

    Inside `jax.shard_map`, where arrays are parts, shapes in `base` must be those of parts.

    Args:
        parameterization: "standard", "ntk", "mup" or "mean_field".
        base: the parameters of the same model at the base width, or their shapes, such as
            ``jax.eval_shape`` of its construction. It may have more parameters than are updated.
        alignment: "full" or "none", see `width_exponents`. Everett et al. recommend "standard" with
            full alignment for Adam. Updates relative to the parameter's size, as Adafactor's are by
            default, shrink with n^-b by themselves: without alignment they need no exponents.
        multipliers: whether the forward pass multiplies weights by (n / n_base)^-a.
        constants: γ of embeddings, hidden matrices and readouts, tuned at the base width;
            `memopt.transforms.width.MUP_ADAM_CONSTANTS` are the paper's for Adam and µP.
        wider: the parameters or shapes at any other width, to find roles from in place of the
            updated parameters. Needed with `constants`, which count at the base width too, where
            shapes do not tell roles.
        matrices: which axes of each matrix are its inputs and outputs; see `width_roles`.

    Raises:
        ValueError: if a name is unknown or a constant not above 0; by `init` if `base` lacks a
            parameter; by `update` as `width_roles`, and if `constants` are given at the base width
            without `wider`.

    References:
        Everett et al., Scaling Exponents Across Parameterizations and Optimizers, 2024,
        https://arxiv.org/abs/2407.05872; Yang et al., Tensor Programs V, 2022,
        https://arxiv.org/abs/2203.03466.

    Example:
        >>> import jax, jax.numpy as jnp, memopt
        >>> params = lambda d: {"embed": jnp.ones((256, d)), "up": jnp.ones((d, 4 * d))}
        >>> tx = optax.chain(
        ...     memopt.scale_by_adam_atan2(),
        ...     scale_by_width("standard", base=jax.eval_shape(lambda: params(16))),
        ...     optax.scale_by_learning_rate(1e-2),
        ... )
        >>> updates, _ = tx.update(params(64), tx.init(params(64)))
        >>> jax.tree.map(lambda u: round(float(u[0, 0]), 5), updates)
        {'embed': -0.00997, 'up': -0.00249}
    """
    exponents = width_exponents(parameterization, alignment, multipliers=multipliers)
    if len(constants) != len(ROLES) or not all(gamma > 0 for gamma in constants):
        raise ValueError(
            f"constants must be three numbers above 0, for {', '.join(ROLES)}, got {constants}."
        )
    rates = {role: (gamma, exponents[role].c) for role, gamma in zip(ROLES, constants, strict=True)}

    def factors(updates: Any) -> dict[str, float]:
        roles = width_roles(updates, base, wider=wider, matrices=matrices)
        is_known = wider is not None or any(found.role != FIXED for found in roles.values())
        if roles and not is_known and set(constants) != {1.0}:
            raise ValueError(
                f"wider must be given with constants {tuple(constants)}, got None: at the base "
                "width no shape tells an embedding from a readout."
            )
        return {name: _factor(found, rates) for name, found in roles.items()}

    def init(params: Any) -> optax.EmptyState:
        # Roles are not looked at here: `memopt.state_sharding` changes axes one at a time.
        shapes = _shapes(base)
        for name, shape in _shapes(params).items():
            _shape_in("base", shapes, name, shape)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        by_name = factors(updates)
        return map_named(lambda name, u: u * by_name[name], updates), state

    return optax.GradientTransformationExtraArgs(init, update)


@checked
def scale_initial_by_width(
    params: Any,
    base: Any,
    parameterization: str,
    *,
    multipliers: bool = True,
    drawn: tuple[float, float, float] = (0.0, 0.0, 0.0),
    matrices: Matrices = None,
) -> Any:
    """Scales initial matrices by n^-b relative to the base width.

    At the base width it is the identity. Vectors, which do not start at random, stay as they are.

    Args:
        params: the initial parameters, as the model draws them.
        base: those of the same model at the base width, or their shapes.
        parameterization: "standard", "ntk", "mup" or "mean_field".
        multipliers: whether the forward pass multiplies weights by (n / n_base)^-a. If not, as in
            `memopt.models.llama`, the exponent is a + b.
        drawn: the exponents b with which the model draws embeddings, hidden matrices and readouts.
            By default it draws them with the same standard deviation at all widths, as
            `memopt.models.llama`; Flax's Dense and most others draw with n^-½, (0, 0.5, 0.5).
        matrices: which axes of each matrix are its inputs and outputs; see `width_roles`.

    Returns:
        A tree like `params`.

    Raises:
        ValueError: as `width_exponents` and `width_roles`.

    Example:
        >>> import jax.numpy as jnp
        >>> params = lambda d: {"up": jnp.ones((8, d, 4 * d)), "head": jnp.ones((d, 256))}
        >>> found = scale_initial_by_width(params(64), params(16), "mup", multipliers=False)
        >>> {name: float(x.mean()) for name, x in found.items()}          # 4^-½ and 4^-1
        {'head': 0.25, 'up': 0.5}
    """
    exponents = width_exponents(parameterization, multipliers=multipliers)
    scales = {role: (1.0, exponents[role].b - b) for role, b in zip(ROLES, drawn, strict=True)}
    roles = width_roles(params, base, matrices=matrices)

    def scale(layout: Layout, leaf: Any) -> Any:
        return leaf * _factor(roles[layout.name], scales) if layout.is_matrix else leaf

    return map_matrices(scale, params, matrices=matrices, default=_every_side)


def _factor(found: WidthRole, rates: dict[str, tuple[float, float]]) -> float:
    """γ · growth^-c of a parameter, given γ and c of each role."""
    gamma, exponent = rates.get(found.role, (1.0, 0.0))
    return gamma * found.growth**-exponent


def _every_side(name: str, leaf: Any) -> Matrix | None:
    """Selects `every_matrix`, and matrices of one row or column, such as a readout to a number."""
    matrix = every_matrix(name, leaf)
    if matrix is None and len(leaf.shape) > 1 and (kind_of(name) or ("",))[0] != VECTOR:
        return Matrix()
    return matrix


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(open_box(leaf).shape) for name, leaf in named_leaves(tree)[0]}


def _shape_in(
    where: str, shapes: dict[str, tuple[int, ...]], name: str, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of a parameter in `base` or `wider`."""
    if name not in shapes:
        raise ValueError(
            f"{where} must have every parameter, but it has no {name!r}: give the parameters of "
            "the same model at another width, or their shapes."
        )
    if len(shapes[name]) != len(shape):
        raise ValueError(
            f"{where} must have as many axes for each parameter, but {name!r} has shape "
            f"{shapes[name]} there, and {shape} in params."
        )
    return shapes[name]


def _growths(layout: Layout, narrow: tuple[int, ...], wide: tuple[int, ...]) -> tuple[float, float]:
    """The growth of a matrix's inputs and outputs; a vector has outputs only."""
    size = lambda shape, axes: math.prod(shape[a] for a in axes)
    ratio = lambda axes: size(wide, axes) / size(narrow, axes) if size(narrow, axes) else 1.0
    return ratio(layout.rows), ratio(layout.cols if layout.is_matrix else layout.core)


def _role(layout: Layout, narrow: tuple[int, ...], wide: tuple[int, ...]) -> str:
    """The role of a parameter, from its shapes at two widths.

    Raises:
        ValueError: if one side grows while the other shrinks.
    """
    inputs, outputs = _growths(layout, narrow, wide)
    if (inputs - 1) * (outputs - 1) < 0:
        raise ValueError(
            f"{layout.name!r} must be wider or narrower than in base on all sides, got shape "
            f"{wide} against {narrow}."
        )
    if inputs != 1:
        return READOUT if outputs == 1 else HIDDEN
    return FIXED if outputs == 1 else EMBEDDING


def _check_vector(
    layout: Layout, parameter: Parameter, narrow: tuple[int, ...], wide: tuple[int, ...]
) -> None:
    """Raises if `matrices` excludes a matrix that grows, so that nothing says its inputs."""
    matrix = _every_side(layout.name, parameter)
    default = layout_of(layout.name, parameter, matrix)
    if default.is_matrix and _role(default, narrow, wide) != FIXED:
        raise ValueError(
            f"matrices must give a memopt.Matrix for {layout.name!r} of shape {wide} too, got "
            "None: nothing says which of its axes are inputs. Embeddings have theirs first."
        )


def _article(role: str) -> str:
    names = {EMBEDDING: "an embedding", HIDDEN: "a hidden matrix", READOUT: "a readout"}
    return names.get(role, "of fixed size")
