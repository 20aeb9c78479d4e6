"""Finds the parameter that each array of an optimizer's state belongs to, and its kind."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memopt.names import snake_case
from memopt.trees import leaf_name, named_leaves, open_box

FIRST, SECOND, COUNT, OTHER = "first moment", "second moment", "count", "other"

_FIRST = ("mu", "m", "m1", "m2", "trace", "ema", "exp_avg", "momentum")
_SECOND = (
    *("nu", "nu_max", "sum_of_squares", "e_g", "e_x", "v_row", "v_col"),
    *("exp_avg_sq", "grad_sum_sq"),  # optax.contrib
    *("rows", "cols"),  # memopt
)

_FIELDS = dict.fromkeys(_FIRST, FIRST) | dict.fromkeys(_SECOND, SECOND)
"""Fields in which Optax and memopt keep moments. A gradient enters a first moment linearly."""

_FIELDS_OF_STATE: dict[str, dict[str, str]] = {
    "ScaleBySM3State": {"nu": FIRST, "mu": SECOND},  # nu is the momentum
    "ScaleByAdanState": dict.fromkeys("mvg", FIRST) | {"n": SECOND},
    "ScaleBySimplifiedAdEMAMixState": {"m": FIRST, "n": SECOND},
    "SophiaState": {"mu": FIRST},  # nu is an estimate of the Hessian, which may be negative
    "FactoredState": dict.fromkeys(("v_row", "v_col", "v"), SECOND),
}
"""The fields of states that use other names, or these names for something else."""

_SUMS: dict[str, tuple[str, ...]] = {
    "COCOBState": ("init_particles", "cumulative_gradients", "scale", "subgradients", "reward"),
    "DoGState": ("init_params",),
    "DoWGState": ("init_params",),
    "KeepLargestChangeState": ("base",),
    "MadgradState": ("s", "x0"),
    "MechanicState": ("x0",),
    "ProdigyState": ("params0",),
    "ScheduleFreeState": ("z",),
}
"""Fields of copies of the parameters, and of sums without decay, in which errors stay."""

_EXACT: dict[str, tuple[str, ...]] = {
    # Rounded, an inverse is not positive definite, and grows to infinity.
    "ScaleByKroneckerInversesState": ("inputs", "outputs"),
    "ScaleByOasisState": ("previous",),  # a rounded step would have another curvature
    "WithDiagnosticsState": ("values",),  # they are for reading
}
"""Fields that are never rounded."""

_GRAMS: dict[str, tuple[str, ...]] = {"InEigenbasisState": ("left", "right")}
"""Fields of averages of G Gᵀ."""


class StateArray(NamedTuple):
    """The owner and kind of a state array.

    Attributes:
        name: the array's keys in the state, joined by ``/``.
        parameter: the parameter's index among the leaves of its tree; None if it belongs to none.
        kind: "first moment", "second moment", "count" or "other". A first moment has the shape of
            its parameter; a second moment is recognised by the name of its field.
        kept_by: the transformation whose state contains the array.
        is_sum: whether it is a copy of the parameter or a sum without decay, so that errors stay.
        is_exact: whether it must be kept as it is, because the rule fails if it is rounded.
        is_gram: whether it is an average of G Gᵀ, symmetric and positive semidefinite.
        second_moment: for a first moment, known by its field, the name of the second moment of the
            same shape that the same transformation keeps in its place; None if there is none.
    """

    name: str
    parameter: int | None
    kind: str
    kept_by: str
    is_sum: bool
    is_exact: bool
    is_gram: bool
    second_moment: str | None


class Part(NamedTuple):
    """A part of a state: a tree with a node for each parameter, or a single array.

    Attributes:
        path: the part's keys in the state.
        tree: the part.
        has_parameters: whether it is a tree with a node for each parameter.
        state: the class name of the innermost state that contains it, "" if there is none.
        field: the field of that state.
        state_path: the keys of that state.
    """

    path: tuple[Any, ...]
    tree: Any
    has_parameters: bool
    state: str = ""
    field: str = ""
    state_path: tuple[Any, ...] = ()

    @property
    def moment(self) -> str | None:
        """The kind of moment that the field keeps by its name; None if it is no known name."""
        return _FIELDS_OF_STATE.get(self.state, _FIELDS).get(self.field)

    @property
    def is_sum(self) -> bool:
        """Whether the field keeps copies of the parameters, or sums without decay."""
        return self.field in _SUMS.get(self.state, ())

    @property
    def is_exact(self) -> bool:
        """Whether the field must be kept as it is."""
        return self.field in _EXACT.get(self.state, ())

    @property
    def is_gram(self) -> bool:
        """Whether the field keeps averages of G Gᵀ."""
        return self.field in _GRAMS.get(self.state, ())

    @property
    def kept_by(self) -> str:
        """The transformation whose state contains it."""
        return snake_case(self.state.removesuffix("State"))


def parts(state: Any, params: Any) -> Iterator[Part]:
    """Splits a state, in order, into trees with a node for each parameter and other arrays.

    A tree counts as one for the parameters if it has their structure and no node is the state of a
    transformation. Without the second condition, the tuple of states of a chain of two would match
    parameters that are a tuple of two.

    Args:
        state: the state of any Optax transformation.
        params: the parameters, or a tree like them.

    Example:
        >>> params = (jnp.ones(2), jnp.ones(3))
        >>> for part in parts(optax.adam(1e-3).init(params), params):
        ...     print(part.kept_by, part.field, part.has_parameters)
        scale_by_adam count False
        scale_by_adam mu True
        scale_by_adam nu True
    """
    return _parts(Part((), state, False), named_leaves(params)[1])


def _parts(part: Part, structure: Any) -> Iterator[Part]:
    if _has_parameters(part.tree, structure):
        yield part._replace(has_parameters=True)
        return
    children = jax.tree_util.tree_leaves_with_path(part.tree, is_leaf=lambda x: x is not part.tree)
    for (*keys,), child in children:
        if not keys:
            yield part  # an array
        elif isinstance(keys[0], jax.tree_util.GetAttrKey):
            path, state = (*part.path, *keys), type(part.tree).__name__
            inside = Part(path, child, False, state, keys[0].name, part.path)
            yield from _parts(inside, structure)
        else:
            yield from _parts(part._replace(path=(*part.path, *keys), tree=child), structure)


def _has_parameters(tree: Any, structure: Any) -> bool:
    """Whether the tree has this structure, with no state of a transformation as a node."""
    try:
        nodes = structure.flatten_up_to(tree)
    except ValueError:
        return False
    if _is_count(tree):
        return False  # the parameters are one array
    is_state = lambda x: hasattr(x, "_fields") and not isinstance(x, optax.MaskedNode)
    return not any(map(is_state, jax.tree.leaves(nodes, is_leaf=is_state)))


def is_state_array(x: Any) -> bool:
    """Whether a node of a tree is a `StateArray`."""
    return isinstance(x, StateArray)


def owners(state: Any, params: Any) -> Any:
    """Finds the parameter and the kind of each array of a state from the two trees' structures.

    Args:
        state: the state of any Optax transformation, or its shapes.
        params: the parameters, or their shapes.

    Returns:
        A tree like `state` of `StateArray`; a box counts as one array.

    Example:
        >>> params = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
        >>> factored = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
        >>> tx = optax.chain(factored, optax.trace(0.9))
        >>> for x in jax.tree.leaves(owners(tx.init(params), params), is_leaf=is_state_array):
        ...     print(x.name, x.parameter, x.kind)
        0/count None count
        0/v_row/b 0 second moment
        0/v_row/w 1 second moment
        0/v_col/b 0 second moment
        0/v_col/w 1 second moment
        0/v/b 0 second moment
        0/v/w 1 second moment
        1/trace/b 0 first moment
        1/trace/w 1 first moment
    """
    leaves, structure = named_leaves(params)
    shapes = [_shape(x) for _, x in leaves]
    found: list[tuple[int | None, str, Part]] = []
    for part in parts(state, params):
        nodes = structure.flatten_up_to(part.tree) if part.has_parameters else [part.tree]
        for i, node in enumerate(nodes):
            owner, shape = (i, shapes[i]) if part.has_parameters else (None, None)
            arrays = [open_box(x) for _, x in named_leaves(node)[0]]
            found += [(owner, _kind(part, x, shape), part) for x in arrays]
    named, outline = named_leaves(state)

    def place(name: str, x: Any, part: Part) -> tuple[Any, ...]:
        """Its state, its keys below the field, and its shape."""
        return part.state_path, name.removeprefix(leaf_name(part.path)), _shape(x)

    seconds: dict[tuple[Any, ...], str] = {}
    for (name, x), (_, _, part) in zip(named, found, strict=True):
        if part.moment == SECOND:
            seconds.setdefault(place(name, x, part), name)  # of several, as of AMSGrad, the first
    arrays = []
    for (name, x), (owner, kind, part) in zip(named, found, strict=True):
        second = seconds.get(place(name, x, part)) if part.moment == FIRST else None
        about = part.kept_by, part.is_sum, part.is_exact, part.is_gram, second
        arrays.append(StateArray(name, owner, kind, *about))
    return outline.unflatten(arrays)


def _shape(x: Any) -> Any:
    return getattr(open_box(x), "shape", None)


def _kind(part: Part, x: Any, shape: tuple[int, ...] | None) -> str:
    if part.moment == SECOND:
        return SECOND
    if _is_count(x):
        return COUNT
    return FIRST if jnp.issubdtype(x.dtype, jnp.floating) and x.shape == shape else OTHER


def _is_count(x: Any) -> bool:
    return getattr(x, "shape", None) == () and jnp.issubdtype(x.dtype, jnp.integer)
