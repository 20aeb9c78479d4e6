"""Finds the second moments in an optimizer's state."""

from typing import Any

import jax

from memopt.trees import is_box, map_named

SECOND_MOMENTS = frozenset(
    {
        *("nu", "nu_max", "sum_of_squares", "e_g", "e_x", "v_row", "v_col"),
        *("exp_avg_sq", "grad_sum_sq"),  # of optax.contrib
        *("rows", "cols"),  # of memopt
    }
)
"""The fields in which Optax, and memopt, keep second moments."""

_OTHER_NAMES: dict[str, frozenset[str]] = {
    "ScaleBySM3State": frozenset({"mu"}),  # nu is the momentum
    "ScaleByAdanState": frozenset({"n"}),
    "FactoredState": frozenset({"v_row", "v_col", "v"}),
}
"""Second moments of states that name their fields otherwise."""


def second_moments(state: Any, params: Any) -> Any:
    """Says of each array of a state whether it is a second moment, by the field that holds it.

    Args:
      state: the state of any Optax transformation.
      params: the parameters; fields of theirs, which stand in the state too, do not count.

    Returns:
      A tree like `state` of bools.

    Example:
      >>> import optax
      >>> from collections import namedtuple
      >>> params = namedtuple("Factors", ("rows", "nu"))(1.0, 2.0)
      >>> marks = second_moments(optax.scale_by_adam().init(params), params)
      >>> marks.mu, marks.nu
      (Factors(rows=False, nu=False), Factors(rows=True, nu=True))
    """
    has_other_names = lambda x: type(x).__name__ in _OTHER_NAMES
    is_leaf = lambda x: has_other_names(x) or is_box(x)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
    params_paths = {(), *(path for path, _ in leaves)}

    def own_fields(path: tuple[Any, ...]) -> list[str]:
        """The fields on the way to an array, or to the tree like the parameters that it is in."""
        inside = next(i for i in range(len(path) + 1) if path[i:] in params_paths)
        return [getattr(key, "name", "") for key in path[:inside]]

    def mark(path: tuple[Any, ...], x: Any) -> Any:
        if not has_other_names(x):
            return not SECOND_MOMENTS.isdisjoint(own_fields(path))
        names = _OTHER_NAMES[type(x).__name__]
        marks = lambda f: map_named(lambda *_: f in names, getattr(x, f))
        return type(x)(*map(marks, x._fields))

    return jax.tree_util.tree_map_with_path(mark, state, is_leaf=is_leaf)
