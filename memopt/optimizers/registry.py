"""Every optimizer by its name: memopt's, and Optax's as baselines."""

import inspect
from collections.abc import Callable
from typing import Any

import optax
import optax.contrib

from memopt.errors import check_choice
from memopt.optimizers.adafactor import adafactor
from memopt.optimizers.adalomo import adalomo
from memopt.optimizers.apollo import apollo, apollo_mini
from memopt.optimizers.fira import fira
from memopt.optimizers.flora import flora
from memopt.optimizers.frugal import frugal
from memopt.optimizers.galore import galore
from memopt.optimizers.ldadam import ldadam
from memopt.optimizers.lion import lion
from memopt.optimizers.lomo import lomo
from memopt.optimizers.muon import muon
from memopt.optimizers.online_subspace_descent import online_subspace_descent

_OURS: dict[str, Callable[..., optax.GradientTransformation]] = {
    f.__name__: f
    for f in (
        *(adafactor, adalomo, apollo, apollo_mini, fira, flora, frugal, galore),
        *(ldadam, lion, lomo, muon, online_subspace_descent),
    )
}

_BASELINES: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "adopt": optax.contrib.adopt,
    "amsgrad": optax.amsgrad,
    "lamb": optax.lamb,
    "lars": optax.lars,
    "optax_adafactor": optax.adafactor,
    "optax_lion": optax.lion,
    "optax_muon": optax.contrib.muon,
    "schedule_free": optax.contrib.schedule_free_adamw,
    "sgd": optax.sgd,
    "sm3": optax.sm3,
    "sophia": optax.contrib.sophia,
}

SUMS_PROJECTIONS = ("apollo", "fira", "flora", "galore", "online_subspace_descent")
"""Those of memopt that move less over a mesh where `memopt.whole_shorter_sides` says."""


def available() -> tuple[str, ...]:
    """The names `optimizer` knows, memopt's own first.

    Example:
      >>> available()[:4]
      ('adafactor', 'adalomo', 'apollo', 'apollo_mini')
    """
    return (*_OURS, *_BASELINES)


def optimizer(
    name: str, learning_rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Builds an optimizer from its name.

    Args:
      name: one of `available()`: a method of memopt, or a baseline from Optax.
      learning_rate: a number or a schedule.
      **options: keyword arguments of the method.

    Returns:
      The transformation that ``memopt.<name>`` or Optax's function of that name returns.

    Raises:
      ValueError: if the name, or an option, is unknown; the nearest is suggested.

    Example:
      >>> tx = optimizer("apollo_mini", learning_rate=1e-2, weight_decay=0.1)
      >>> optimizer("apolo", learning_rate=1e-2)
      Traceback (most recent call last):
      ValueError: optimizer 'apolo' is unknown; did you mean 'apollo'? Allowed: adafactor, ...
    """
    methods = _OURS | _BASELINES
    check_choice("optimizer", name, methods)
    parameters = inspect.signature(methods[name]).parameters
    for option in options:
        check_choice(f"option of {name}:", option, [p for p in parameters if p != "learning_rate"])
    return optax.with_extra_args_support(methods[name](learning_rate, **options))
