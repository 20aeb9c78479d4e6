"""Every public function refuses arguments of other kinds than its annotations say."""

import dataclasses
import inspect
import typing
from collections.abc import Sequence
from types import NoneType, UnionType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt import codecs, diagnostics, projectors, recombine
from memopt.checked import checked

GOOD = {bool: True, int: 1, float: 0.5, optax.GradientTransformation: optax.sgd(0.1)}
"""A value of each kind of argument that is tested."""

OTHERS = [jnp.ones(2), max, projectors.svd(1), recombine.lift(), codecs.AsIs(), {}, ()]
"""Values of other kinds."""


def stand_in(parameter):
    """A value for a parameter that has no default."""
    known = [GOOD[kind] for kind in GOOD if kind in members(parameter)]
    kinds = [typing.get_origin(kind) or kind for kind in members(parameter)]
    classes = tuple(kind for kind in kinds if kind is not typing.Any)
    return [*known, *(x for x in OTHERS if isinstance(x, classes)), ()][0]


def members(parameter):
    """The members of the union that annotates a parameter."""
    union = typing.get_origin(parameter.annotation) in (typing.Union, UnionType)
    return set(typing.get_args(parameter.annotation) if union else (parameter.annotation,))


def wrong_values(kinds):
    """Values that are of none of these kinds, which must have one of `GOOD`."""
    yield "one"
    numbers = kinds & {int, float}
    yield from (value for value, kind in ((None, NoneType), (True, bool)) if kind not in kinds)
    yield from () if float in kinds else (1.5, 2.0)
    yield from () if numbers else (1,)
    yield from () if float in kinds else (jax.random.key(0), jax.random.PRNGKey(0))


def arguments():
    """The arguments of public functions, and of classes of codecs, that have such kinds."""
    for module in (memopt, projectors, recombine, codecs, diagnostics):
        for _, f in inspect.getmembers(module, callable):
            is_codec = inspect.isclass(f) and issubclass(f, codecs.Codec)
            is_public = f.__module__.startswith(module.__name__) and "schedules" not in f.__module__
            if is_public and (
                (is_codec and not inspect.isabstract(f)) or "Args:" in (f.__doc__ or "")
            ):
                for parameter in inspect.signature(f).parameters.values():
                    if members(parameter) & set(GOOD) and str not in members(parameter):
                        yield f, parameter.name


@pytest.mark.parametrize(
    ("function", "name"), [pytest.param(*a, id=f"{a[0].__name__}-{a[1]}") for a in arguments()]
)
def test_an_argument_of_another_kind_is_named(function, name):
    parameters = inspect.signature(function).parameters
    given = {
        p.name: stand_in(p)
        for p in parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    for value in wrong_values(members(parameters[name])):
        with pytest.raises(TypeError, match=f"(?s)^{name} must be .*, got "):
            function(**{**given, name: value})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"switch_every": 1.5}, r"switch_every must be a whole number, got 1\.5\."),
        ({"embedding": "yes"}, r"embedding must be True or False, got 'yes'\."),
        ({"seed": "a"}, r"seed must be a whole number, got 'a'\."),
        ({"b1": None}, r"b1 must be a number, got None\."),
        ({"learning_rate": "1e-3"}, r"learning_rate must be a number or a function, got '1e-3'\."),
        ({"inner": "adam"}, r"inner must be an Optax transformation or None, got 'adam'\."),
    ],
)
def test_the_sentence_says_what_is_allowed(options, says):
    with pytest.raises(TypeError, match=f"^{says}$"):
        memopt.badam(**{"learning_rate": 1e-3, **options})


def test_what_stands_for_a_number_is_accepted():
    @checked
    def f(
        count: int = 1,
        rate: optax.ScalarOrSchedule = 0.1,
        phases: int | Sequence[int] = 0,
        tx: optax.GradientTransformation | None = None,
    ):
        return count, rate, phases, tx

    for count in (np.int8(2), jnp.int32(2), jnp.float32(2.0)):  # a schedule gives floats
        f(count=count)
    for rate in (1, np.float64(0.1), jnp.ones(()), optax.constant_schedule(0.1)):
        f(rate=rate)
    f(phases=[0, 1], tx=optax.MultiSteps(optax.sgd(0.1), 2))
    assert jax.jit(lambda n: f(n)[0])(3) == 3
    with pytest.raises(TypeError, match=r"phases must be .* or a sequence, got \[0, 'b'\]"):
        f(phases=[0, "b"])
    with pytest.raises(ValueError, match="rate must be float32 or wider"):
        f(rate=jnp.bfloat16(0.1))
    with pytest.raises(TypeError, match="f\\(\\) got an unexpected keyword argument 'steps'"):
        f(steps=3)


def test_numpy_numbers_count_by_their_dtype():
    @checked
    def function(steps: int = 1, decay: float = 0.5, *rest, free=None): ...

    function(np.int64(3), np.float64(0.1), "any", free="thing")
    function(jnp.float32(2.0), np.int32(1))  # as `optax.inject_hyperparams` makes of whole numbers
    with pytest.raises(TypeError, match="steps must be a whole number"):
        function(np.float64(1.5))
    with pytest.raises(ValueError, match="decay must be float32"):
        function(decay=jnp.bfloat16(0.5))


def test_codecs_of_users_check_their_own_fields():
    @dataclasses.dataclass(frozen=True)
    class Mine(codecs.Codec):
        levels: np.ndarray = None

        encode = decode = None

    assert Mine([1, 2]).levels == [1, 2]
