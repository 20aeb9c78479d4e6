"""The registry of optimizers: memopt's methods, registered where they are defined, and Optax's.

All lists of methods (`memopt.available`, the command line, the site, benchmarks, the tests'
tables) are read from here.
"""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from memopt import renamed
from memopt.checked import check_arguments, checked
from memopt.docstrings import argument_help
from memopt.errors import check_choice
from memopt.functions import call_function, find_function
from memopt.optimizers.by_partition import Common, finish
from memopt.state.precision import with_gradient_dtypes
from memopt.state.quantized_state import StateChoice, store_state

Make = Callable[..., optax.GradientTransformation]
F = TypeVar("F", bound=Make)
P = ParamSpec("P")
R = TypeVar("R")


class Method(NamedTuple):
    """A registered optimizer.

    Attributes:
        make: the function that builds it.
        learning_rate: the highest learning rate of a run that is given none. It suits LLaMAs of a
            few million parameters (docs/convergence.md); larger ones want less. Those of `came`,
            `racs`, `rmnp`, `scale` and `sinkgd` are as published, and not tuned yet.
        state: how many numbers it keeps for an m×n matrix; docs/methods.md explains the symbols.
        when: when to choose it, in a few words.
        library: "memopt", "optax" for a baseline, or "user".
        sums_projections: whether it sums projections of gradients over devices, and so communicates
            less if the shorter sides of matrices are not sharded; see `memopt.unshard_short_side`.
        eval_params: maps its state and the parameters to those to evaluate with, see
            `memopt.eval_params`; None if they are the same.
        needs: the extra argument without which it cannot update, a key of `EXTRA_ARGUMENTS`, or "".
        finds_step: whether it finds the size of its steps itself, so that its learning rate is a
            factor or a bound, which should be 1 at its highest.
    """

    make: Make
    learning_rate: float
    state: str
    when: str
    library: str = "memopt"
    sums_projections: bool = False
    eval_params: Callable[[Any, Any], Any] | None = None
    needs: str = ""
    finds_step: bool = False

    @property
    def defaults(self) -> dict[str, Any]:
        """The options and their default values."""
        parameters = inspect.signature(self.make).parameters
        return {name: p.default for name, p in parameters.items() if name != "learning_rate"}

    @property
    def help(self) -> dict[str, str]:
        """A description of each option, from the docstring."""
        return argument_help(self.make)

    @property
    def has_free_rank(self) -> bool:
        """Whether the default rank is a fraction of each matrix, so that users may choose it."""
        return isinstance(self.defaults.get("rank"), float)


@functools.wraps(optax.sm3)
def _sm3(learning_rate: optax.ScalarOrSchedule, momentum: float = 0.9) -> Any:
    """The same, with a schedule too, as all others have."""
    return optax.chain(optax.scale_by_sm3(momentum), optax.scale_by_learning_rate(learning_rate))


@functools.wraps(optax.contrib.mechanize)
def _mechanic(learning_rate: optax.ScalarOrSchedule, **options: Any) -> Any:
    """The same around AdamW."""
    return optax.contrib.mechanize(optax.adamw(learning_rate), **options)


LEAST_RATE = 1e-6
"""A learning rate as good as 0 for a method that multiplies it by a step that it finds."""


def _above_zero(make: Make) -> Make:
    """Takes a warm-up that begins with a learning rate of 0, of which Optax's methods make 0/0."""

    @functools.wraps(make)
    def build(learning_rate: optax.ScalarOrSchedule = 1.0, **options: Any) -> Any:
        rate: Any = learning_rate
        if callable(learning_rate):
            rate = lambda count: jnp.maximum(learning_rate(count), LEAST_RATE)
        elif isinstance(learning_rate, jax.Array):
            rate = jnp.maximum(learning_rate, LEAST_RATE)
        return make(rate, **options)

    return build


def _of_one_dtype(make: Make) -> Make:
    """Refuses parameters of several dtypes: the sums of Optax's method would change theirs."""

    @functools.wraps(make)
    def build(*args: Any, **options: Any) -> Any:
        tx = optax.with_extra_args_support(make(*args, **options))

        def init(params: Any) -> Any:
            dtypes = sorted({str(x.dtype) for x in jax.tree.leaves(params)})
            if len(dtypes) > 1:
                raise ValueError(
                    f"params must have one dtype for optax.contrib.{make.__name__}, whose sums "
                    f"have it, too; got {' and '.join(dtypes)}."
                )
            return tx.init(params)

        return optax.GradientTransformationExtraArgs(init, tx.update)

    return build


EXTRA_ARGUMENTS = {
    "value": "the loss",
    "obj_fn": "the loss as a function of the parameters",
    "statistics": "what each layer saw of the batch (memopt.observe)",
}
"""Extra arguments of `update` that some methods need; memopt's training step passes them."""


def _averaged(state: Any, params: Any) -> Any:
    """The parameters that `schedule_free` averages, whatever wraps it."""
    of_average = lambda x: isinstance(x, optax.contrib.ScheduleFreeState)
    found = list(filter(of_average, jax.tree.leaves(state, is_leaf=of_average)))
    if len(found) != 1:
        raise ValueError(
            f"state must hold one optax.contrib.ScheduleFreeState, not quantised, got {len(found)}."
        )
    return optax.contrib.schedule_free_eval_params(found[0], params)


METHODS: dict[str, Method] = {
    "adagrad": Method(optax.adagrad, 2e-2, "mn", "sparse gradients, convex problems", "optax"),
    "adam": Method(optax.adam, 1e-3, "2mn", "the baseline without weight decay", "optax"),
    "adamw": Method(
        optax.adamw, 1e-3, "2mn", "the baseline that others are compared with", "optax"
    ),
    "ademamix": Method(
        optax.contrib.ademamix,
        5e-4,
        "3mn",
        "AdamW with a slow second momentum, for long runs",
        "optax",
    ),
    "cocob": Method(
        optax.contrib.cocob,
        1.0,
        "5mn",
        "no learning rate to find: coin betting",
        "optax",
        finds_step=True,
    ),
    "dadapt_adamw": Method(
        _of_one_dtype(_above_zero(optax.contrib.dadapt_adamw)),
        1.0,
        "3mn",
        "no learning rate to find: estimates AdamW's",
        "optax",
        finds_step=True,
    ),
    "dog": Method(
        _of_one_dtype(optax.contrib.dog),
        1.0,
        "mn",
        "no learning rate to find: SGD by distance over gradients",
        "optax",
        finds_step=True,
    ),
    "dowg": Method(
        _of_one_dtype(optax.contrib.dowg),
        1.0,
        "mn",
        "no learning rate to find: dog with larger steps",
        "optax",
        finds_step=True,
    ),
    "mechanic": Method(
        _of_one_dtype(_mechanic),
        1.0,
        "3mn",
        "no learning rate to find: tunes AdamW's",
        "optax",
        finds_step=True,
    ),
    "momo": Method(
        _of_one_dtype(optax.contrib.momo),
        1.0,
        "mn",
        "no learning rate to find: momentum, steps by the loss",
        "optax",
        needs="value",
        finds_step=True,
    ),
    "momo_adam": Method(
        _of_one_dtype(optax.contrib.momo_adam),
        1e-3,
        "2mn",
        "Adam with steps that the loss bounds",
        "optax",
        needs="value",
    ),
    "nadamw": Method(optax.nadamw, 1e-3, "2mn", "AdamW with Nesterov momentum", "optax"),
    "optax_adafactor": Method(
        optax.adafactor, 5e-2, "m + n", "Optax's, to compare with memopt's", "optax"
    ),
    "optax_adopt": Method(
        optax.contrib.adopt, 1e-3, "2mn", "Optax's, to compare with memopt's", "optax"
    ),
    "optax_amsgrad": Method(
        optax.amsgrad, 2e-4, "3mn", "Optax's, to compare with memopt's", "optax"
    ),
    "optax_lamb": Method(optax.lamb, 1e-2, "2mn", "Optax's, to compare with memopt's", "optax"),
    "optax_lars": Method(optax.lars, 2.0, "mn", "Optax's, to compare with memopt's", "optax"),
    "optax_lion": Method(optax.lion, 2e-4, "mn", "Optax's, to compare with memopt's", "optax"),
    "optax_muon": Method(
        optax.contrib.muon, 2e-2, "mn", "Optax's, to compare with memopt's", "optax"
    ),
    "optax_sm3": Method(_sm3, 2e-2, "mn + m + n", "Optax's, to compare with memopt's", "optax"),
    "prodigy": Method(
        _of_one_dtype(_above_zero(optax.contrib.prodigy)),
        1.0,
        "4mn",
        "no learning rate to find: estimates AdamW's, faster",
        "optax",
        finds_step=True,
    ),
    "schedule_free": Method(
        optax.contrib.schedule_free_adamw,
        2e-3,
        "2mn",
        "AdamW that averages instead of decaying: no end to plan",
        "optax",
        eval_params=_averaged,
    ),
    "sgd": Method(optax.sgd, 1e-1, "0", "no state, for models that plain SGD trains", "optax"),
    "sophia": Method(
        optax.contrib.sophia,
        1e-3,
        "2mn",
        "AdamW's quality with a curvature estimate every ten steps",
        "optax",
        needs="obj_fn",
    ),
}
"""All optimizers by name: Optax's are listed here, memopt's are added by `@method()`."""


FORMERLY_OPTAX = ("adopt", "amsgrad", "lamb", "lars", "sm3")
"""Names that meant Optax's optimizer before release 0.2, which has "optax_" before it now."""

STATIC = {
    *("rank", "density", "iterations", "ns_steps", "ns_coeffs", "mu_dtype", "tasks"),
    *("max_side", "block_size", "axis", "head_dim", "groups"),
    *("on_refresh", "matrices", "weight_decay_mask", "state"),
}
"""Arguments of methods that decide shapes or programs, and functions that are no schedules."""


class _Static(NamedTuple):
    """Hides a number or a function from `optax.inject_hyperparams`, which passes on all else."""

    value: Any


class _Signature(inspect.Signature):
    """The signature of a method, by which `optax.inject_hyperparams` reads its arguments.

    It makes an array of every number and calls every function at each step. Here it binds static
    arguments inside a `_Static`, and other floats as float32 arrays, which it leaves as they are;
    it would round a decay of 0.999 to 1 for parameters in bfloat16.
    """

    def bind(self, *args: Any, **options: Any) -> inspect.BoundArguments:
        bound = super().bind(*args, **options)
        given = bound.arguments
        for name, parameter in self.parameters.items():
            value = given.get(name, parameter.default)
            if name in STATIC:
                given[name] = _Static(value)
            elif isinstance(value, float) and not jax.config.read("jax_enable_x64"):
                with jax.ensure_compile_time_eval():
                    given[name] = jnp.asarray(value, jnp.float32)
        return bound


def method(
    when: str, *, learning_rate: float, sums_projections: bool = False, needs: str = ""
) -> Callable[[F], F]:
    """Registers a function in `METHODS` under its own name.

    In its signature and docstring, the options of `Common` replace ``**common``. Of its arguments,
    `optax.inject_hyperparams` leaves those in `STATIC` alone.

    Args:
        when: see `Method`.
        learning_rate: see `Method`.
        sums_projections: see `Method`.
        needs: see `Method`.
    """

    def enter(make: F) -> F:
        signature, ending = inspect.signature(make), inspect.signature(finish).parameters
        parameters = dict(signature.parameters)
        if parameters.pop("common", None):
            parameters |= {name: ending[name] for name in Common.__annotations__}
        signature, read = (
            kind(list(parameters.values()), return_annotation=signature.return_annotation)
            for kind in (inspect.Signature, _Signature)
        )

        @functools.wraps(make)
        def build(*args: Any, **options: Any) -> Any:
            options = renamed.current(make, options)
            options = {k: x.value if isinstance(x, _Static) else x for k, x in options.items()}
            try:
                given = signature.bind(*args, **options).arguments
            except TypeError as error:  # an unknown option
                raise TypeError(f"memopt.{make.__name__} {error}.") from None
            check_arguments(signature, given)
            tx = make(*args, **options)
            injected = any(isinstance(x, jax.Array) for x in given.values())
            return with_gradient_dtypes(tx) if injected else tx

        _set_signature(build, read)
        options = (inspect.getdoc(Common) or "").partition("Attributes:\n")[2].rstrip()
        line = "    **common: see `memopt.Common`."
        build.__doc__ = (inspect.getdoc(make) or "").replace(line, options)
        described = " ".join(build.__doc__.split())
        state = re.search(r"State: (none\b|.+?(?=(?: float32)? numbers?\b))", described)
        if state is None:
            raise TypeError(
                f"The docstring of {make.__name__} must say 'State: … numbers' or 'State: none'."
            )
        METHODS[make.__name__] = Method(
            build,
            learning_rate,
            "0" if state[1] == "none" else state[1],
            when,
            sums_projections=sums_projections,
            needs=needs,
        )
        return cast(F, build)

    return enter


def _set_signature(function: Callable, signature: inspect.Signature) -> None:
    setattr(function, "__signature__", signature)  # noqa: B010


def _of_learning_rate(base: Callable) -> inspect.Signature:
    """The signature of a wrapper, with a learning rate in place of the wrapped optimizer."""
    signature, parameter = inspect.signature(base), inspect.signature(optax.sgd).parameters
    options = list(signature.parameters.values())[1:]
    return signature.replace(parameters=[parameter["learning_rate"], *options])


_set_signature(_mechanic, _of_learning_rate(optax.contrib.mechanize))


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
        setattr(function, "__options_of__", base)  # noqa: B010
        return cast(Callable[P, R], function)

    return decorate


def find_method(name: str) -> Method:
    """Returns an optimizer of the registry, or one that a user's function makes.

    Args:
        name: one of `available()`, or ``module:function`` of a function that maps `learning_rate`
            to an `optax.GradientTransformation`, such as ``optax:adam``; its other arguments are
            its options. By default it has AdamW's learning rate.

    Raises:
        ValueError: if there is no such optimizer or function.

    Example:
        >>> find_method("lion").learning_rate
        0.0002
    """
    if ":" in str(name):
        rate = METHODS["adamw"].learning_rate
        return Method(_users_function(name), rate, state="?", when="", library="user")
    check_choice("optimizer", name, available())
    return METHODS[name]


def _users_function(name: str) -> Make:
    """Returns a user's function that raises `ValueError` if it fails or returns another type."""

    @functools.wraps(find_function(name))
    def make(*args: Any, **options: Any) -> Any:
        tx = call_function(name, *args, **options)
        if not isinstance(tx, optax.GradientTransformation):
            raise ValueError(
                f"optimizer {name!r} must return an optax.GradientTransformation, got "
                f"{type(tx).__name__}."
            )
        return tx

    return make


def available(library: str | None = None) -> tuple[str, ...]:
    """Returns the names that `optimizer` accepts, memopt's own first.

    Args:
        library: "memopt" or "optax", to list the names of one library only.

    Raises:
        ValueError: if there is no such library.

    Example:
        >>> available()[:2]
        ('adafactor', 'adagrad_norm')
        >>> available("optax")[:2]
        ('adagrad', 'adam')
    """
    check_choice("library", library, (None, "memopt", "optax"))
    names = sorted(METHODS, key=lambda name: (METHODS[name].library, name))
    return tuple(name for name in names if library in (None, METHODS[name].library))


@checked
def optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    state: StateChoice = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Builds an optimizer from its name.

    Args:
        name: one of `available()`: a method of memopt, or a baseline from Optax; or
            ``module:function`` of a function that maps a learning rate to a transformation.
        learning_rate: a number or a schedule.
        state: how the state is stored, such as "int8", see `memopt.quantize_state`; None: as it is.
        **options: keyword arguments of the method.

    Returns:
        The transformation that ``memopt.<name>`` or Optax's function of that name returns.

    Raises:
        ValueError: if the name or an option is unknown; the closest name is suggested. The update
            of "sophia" raises it if `obj_fn`, the loss as a function of the parameters, is not
            given, and those of "momo" and "momo_adam" if `value`, the loss, is not.

    Example:
        >>> tx = optimizer("apollo_mini", learning_rate=1e-2, weight_decay=0.1)
        >>> optimizer("apolo", learning_rate=1e-2)
        Traceback (most recent call last):
        ValueError: optimizer 'apolo' is unknown; did you mean 'apollo'? Allowed: adafactor, ...
    """
    chosen = find_method(name)
    options = renamed.current(chosen.make, options)
    for option in options:
        check_choice(f"option of {name}:", option, chosen.defaults)
    if chosen.library == "memopt":
        tx = chosen.make(learning_rate, state=state, **options)
    else:
        tx = store_state(chosen.make(learning_rate, **options), state)
    tx = optax.with_extra_args_support(tx)
    argument = chosen.needs

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if extra.get(argument) is None:
            raise ValueError(
                f"optimizer {name!r} needs {argument}, {EXTRA_ARGUMENTS[argument]}: call "
                f"update(updates, state, params, {argument}=…)."
            )
        return tx.update(updates, state, params, **extra)

    return tx._replace(update=update) if argument else tx


def eval_params(name: str, state: Any, params: Any) -> Any:
    """Returns the parameters to evaluate, sample and export: for most optimizers, those trained.

    Schedule-free optimizers take gradients at one point and average another.

    Args:
        name: one of `available()`.
        state: the state of the optimizer of that name, in wrappers other than `quantize_state`,
            too.
        params: the parameters that it updates.

    Raises:
        ValueError: if the name is unknown.

    References:
        Defazio et al., The Road Less Scheduled, 2024, https://arxiv.org/abs/2405.15682.

    Example:
        >>> params = jnp.ones(2)
        >>> tx = optimizer("schedule_free", learning_rate=0.1)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> x = eval_params("schedule_free", state, params + updates)
        >>> [round(float(value), 3) for value in x]
        [0.9, 0.9]
        >>> eval_params("lion", None, params) is params
        True
    """
    find = find_method(name).eval_params
    return params if find is None else find(state, params)
