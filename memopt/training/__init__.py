"""The training step, its compilation, the loop and checkpoints."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memopt.training.load import load_run as load_run

#: What needs more than JAX and Optax, imported when it is asked for: its module.
_LATE = {"load_run": "memopt.training.load"}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
