"""Names that have changed, and still work for one release."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any


def finder(module: str, namespace: Mapping[str, Any], names: Mapping[str, str]) -> Callable:
    """Makes a module's `__getattr__`, which finds old names with a `DeprecationWarning`.

    Args:
      module: the name under which users know it.
      namespace: its `globals()`.
      names: new names by old ones.

    Example:
      >>> getattr_ = finder("library", {"new": 1}, {"old": "new"})
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     getattr_("old"), str(caught[-1].message)
      (1, 'library.old is now library.new.')
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        message = f"{module}.{name} is now {module}.{names[name]}."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return namespace[names[name]]

    return find
