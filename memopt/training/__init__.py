"""The training step, its compilation, the loop and checkpoints.

`train_step` and `release_step` train any model, see `memopt.models.StackedModel`. Nothing here
imports Flax; `Checkpoints` need Orbax, and `load_run` all that `memopt pretrain` needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

from memopt.training.release import release_step as release_step
from memopt.training.step import TrainState as TrainState
from memopt.training.step import evaluate as evaluate
from memopt.training.step import init_state as init_state
from memopt.training.step import train_step as train_step

if TYPE_CHECKING:
    from memopt.training.checkpoint import Checkpoints as Checkpoints
    from memopt.training.load import load_run as load_run

#: What needs more than JAX and Optax, imported when it is asked for: its module.
_LATE = {"Checkpoints": "memopt.training.checkpoint", "load_run": "memopt.training.load"}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
