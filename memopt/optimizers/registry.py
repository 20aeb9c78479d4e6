"""The registry of optimizers: memopt's methods, registered where they are defined, and Optax's.

All lists of methods (`memopt.available`, the command line, README's table, benchmarks, the tests'
tables) are read from here.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import optax
import optax.contrib

from memopt import renamed
from memopt.errors import check_choice
from memopt.optimizers.by_partition import Common, finish

Make = Callable[..., optax.GradientTransformation]
F = TypeVar("F", bound=Make)
P = ParamSpec("P")
R = TypeVar("R")


class Method(NamedTuple):
    """A registered optimizer.

    Attributes:
      make: the function that builds it.
      library: "memopt", or "optax" for a baseline.
      sums_projections: whether it sums projections of gradients over devices, and so communicates
        less if the shorter sides of matrices are not sharded; see `memopt.unshard_short_side`.
      needs: the extra argument without which it cannot update, with what it is, or "".
    """

    make: Make
    library: str = "memopt"
    sums_projections: bool = False
    needs: str = ""

    @property
    def defaults(self) -> dict[str, Any]:
        """The options and their default values."""
        parameters = inspect.signature(self.make).parameters
        return {name: p.default for name, p in parameters.items() if name != "learning_rate"}

    @property
    def has_free_rank(self) -> bool:
        """Whether the default rank is a fraction of each matrix, so that users may choose it."""
        return isinstance(self.defaults.get("rank"), float)


METHODS: dict[str, Method] = {
    "adam": Method(optax.adam, "optax"),
    "adamw": Method(optax.adamw, "optax"),
    "ademamix": Method(optax.contrib.ademamix, "optax"),
    "adopt": Method(optax.contrib.adopt, "optax"),
    "amsgrad": Method(optax.amsgrad, "optax"),
    "lamb": Method(optax.lamb, "optax"),
    "lars": Method(optax.lars, "optax"),
    "optax_adafactor": Method(optax.adafactor, "optax"),
    "optax_lion": Method(optax.lion, "optax"),
    "optax_muon": Method(optax.contrib.muon, "optax"),
    "schedule_free": Method(optax.contrib.schedule_free_adamw, "optax"),
    "sgd": Method(optax.sgd, "optax"),
    "sm3": Method(optax.sm3, "optax"),
    "sophia": Method(
        optax.contrib.sophia, "optax", needs="obj_fn, the loss as a function of the parameters"
    ),
}
"""All optimizers by name: Optax's are listed here, memopt's are added by `@method()`."""


def method(*, sums_projections: bool = False) -> Callable[[F], F]:
    """Registers a function in `METHODS` under its own name.

    In its signature and docstring, the options of `Common` replace ``**common``.

    Args:
      sums_projections: see `Method`.
    """

    def enter(make: F) -> F:
        signature, ending = inspect.signature(make), inspect.signature(finish).parameters
        parameters = dict(signature.parameters)
        if parameters.pop("common", None):
            parameters |= {name: ending[name] for name in Common.__annotations__}
        signature = signature.replace(parameters=list(parameters.values()))

        @functools.wraps(make)
        def checked(*args: Any, **options: Any) -> Any:
            options = renamed.current(make, options)
            try:
                signature.bind(*args, **options)
            except TypeError as error:  # an unknown option
                raise TypeError(f"memopt.{make.__name__} {error}.") from None
            return make(*args, **options)

        _set_signature(checked, signature)
        options = (Common.__doc__ or "").partition("Attributes:\n")[2].rstrip()
        line = "      **common: see `memopt.Common`."
        checked.__doc__ = (make.__doc__ or "").replace(line, options)
        METHODS[make.__name__] = Method(checked, sums_projections=sums_projections)
        return cast(F, checked)

    return enter


def _set_signature(function: Callable, signature: inspect.Signature) -> None:
    setattr(function, "__signature__", signature)  # noqa: B010


def options_of(base: Callable[P, R]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Gives a function that passes ``**options`` to `base` the signature of `base`.

    Defaults of the function itself override those of `base`.

    Example:
      >>> def power(x, *, exponent=2, scale=1.0):
      ...     return scale * x**exponent
      >>> @options_of(power)
      ... def cube(x, *, exponent=3, **options):
      ...     return power(x, exponent=exponent, **options)
      >>> inspect.signature(cube)
      <Signature (x, *, exponent=3, scale=1.0)>
    """

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        own, signature = inspect.signature(function).parameters, inspect.signature(base)
        parameters = [own.get(name, p) for name, p in signature.parameters.items()]
        _set_signature(function, signature.replace(parameters=parameters))
        return cast(Callable[P, R], function)

    return decorate


def available(library: str | None = None) -> tuple[str, ...]:
    """Returns the names that `optimizer` accepts, memopt's own first.

    Args:
      library: "memopt" or "optax", to list the names of one library only.

    Example:
      >>> available()[:4]
      ('adafactor', 'adalomo', 'apollo', 'apollo_mini')
      >>> available("optax")[:2]
      ('adam', 'adamw')
    """
    names = sorted(METHODS, key=lambda name: (METHODS[name].library, name))
    return tuple(name for name in names if library in (None, METHODS[name].library))


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
      ValueError: if the name or an option is unknown; the closest name is suggested. The update of
        "sophia" raises it if `obj_fn`, the loss as a function of the parameters, is not given.

    Example:
      >>> tx = optimizer("apollo_mini", learning_rate=1e-2, weight_decay=0.1)
      >>> optimizer("apolo", learning_rate=1e-2)
      Traceback (most recent call last):
      ValueError: optimizer 'apolo' is unknown; did you mean 'apollo'? Allowed: adafactor, ...
    """
    check_choice("optimizer", name, available())
    chosen = METHODS[name]
    options = renamed.current(chosen.make, options)
    for option in options:
        check_choice(f"option of {name}:", option, chosen.defaults)
    tx = optax.with_extra_args_support(chosen.make(learning_rate, **options))
    argument = chosen.needs.partition(",")[0]

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if extra.get(argument) is None:
            raise ValueError(
                f"optimizer {name!r} needs {chosen.needs}: call update(updates, state, params, "
                f"{argument}=…)."
            )
        return tx.update(updates, state, params, **extra)

    return tx._replace(update=update) if argument else tx
