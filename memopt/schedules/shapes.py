"""The table of decay shapes: what a learning rate does after its warm-up."""

import dataclasses
import inspect
import itertools
import math
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memopt.choices import Choice
from memopt.errors import check_above_zero, check_at_least, check_between
from memopt.schedules.batch_size import BATCH_SHAPES


class Span(NamedTuple):
    """The rates and lengths that a shape is made for.

    Attributes:
        peak: the highest learning rate.
        end: the learning rate at `steps` and after.
        steps: length of the whole schedule.
        warmup_steps: length of the warm-up.
    """

    peak: float
    end: float
    steps: float
    warmup_steps: float

    @property
    def rest(self) -> float:
        """Steps after the warm-up, at least 1."""
        return self.steps - self.warmup_steps


@dataclasses.dataclass(frozen=True)
class Shape(Choice):
    """A row of the table `SHAPES`.

    Attributes:
        make: maps a `Span`, and options by keyword, to an Optax schedule. It counts from the end of
            the warm-up, and is called with 0 to `Span.rest`; afterwards the last value is kept.
            Each option has a default, and its description is in the docstring.
        when: when to choose it.
        source: where it is from.
        end: the default of `Span.end`, as a share of the peak; None if the shape does not use it.
        starts_at_peak: whether it starts at the peak. If not, the warm-up leads to where it starts.
        extends: whether it depends on `Span.steps` only by a decay in the last `decay_steps`, or
            not at all, so that a run that has not come to its decay may become longer.
    """

    end: float | None = 0.0
    starts_at_peak: bool = True
    extends: bool = False


def as_length(number: float) -> float:
    """A number of steps or tokens that JAX can compare a count with: a float if int32 overflows."""
    return number if number < 2**31 else float(number)


def warn_without_effect(what: str) -> None:
    """Warns that a part of a schedule has too few steps to have an effect."""
    warnings.warn(f"{what} has no effect on any step: it needs more steps.", stacklevel=4)


def _part(count: jax.typing.ArrayLike, length: float) -> jax.Array:
    """The part of a length that a count has covered, from 0 to 1."""
    return jnp.clip(count / length, 0.0, 1.0)


def _cosine(start: float, end: float, length: float) -> optax.Schedule:
    """Half a period of a cosine from start to end, whichever is higher."""

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        return end + (start - end) * (0.5 * (1 + jnp.cos(jnp.pi * _part(count, length))))

    return schedule


def _in_sequence(*parts: tuple[float, Callable[[float], optax.Schedule]]) -> optax.Schedule:
    """Schedules one after another, each made for its length; those of length 0 are left out."""
    parts = tuple((as_length(length), make) for length, make in parts if length > 0)
    ends = list(itertools.accumulate(length for length, _ in parts[:-1]))
    return optax.join_schedules([make(length) for length, make in parts], ends)


def constant(span: Span) -> optax.Schedule:
    """Stays at the peak."""
    return optax.constant_schedule(span.peak)


def linear(span: Span) -> optax.Schedule:
    """Falls along a line."""
    return optax.linear_schedule(span.peak, span.end, span.rest)


def cosine(span: Span) -> optax.Schedule:
    """Falls along half a period of a cosine."""
    alpha = span.end / span.peak if span.peak else 0.0
    return optax.cosine_decay_schedule(span.peak, span.rest, alpha)


def _then_decay(
    span: Span,
    decay_steps: float | None,
    before: optax.Schedule,
    decay: Callable[[float], optax.Schedule],
) -> optax.Schedule:
    """A schedule that decays in its last steps."""
    if decay_steps is None:
        decay_steps = max(1, min(int(span.steps // 5), int(span.rest)))
    check_at_least("decay_steps", decay_steps, 1)
    if span.warmup_steps + decay_steps > span.steps:
        raise ValueError(
            f"warmup_steps={span.warmup_steps} and decay_steps={decay_steps} must leave room in "
            f"steps={span.steps}."
        )
    if decay_steps < 2:
        warn_without_effect(f"decay_steps={decay_steps:g} at the end of steps={span.steps}")
    length = as_length(decay_steps)
    return optax.join_schedules([before, decay(length)], [span.rest - length])


def wsd(span: Span, *, decay_steps: int | None = None) -> optax.Schedule:
    """Warm-up, stable, decay: stays at the peak, and falls along a line at the end.

    MiniCPM's own decay is that of "wsd_exponential".

    Args:
        span: what it is made for.
        decay_steps: length of the decay; by default a fifth of the steps. A run has --decay
            instead.
    """
    decay = lambda length: optax.linear_schedule(span.peak, span.end, length)
    return _then_decay(span, decay_steps, constant(span), decay)


def wsd_exponential(span: Span, *, decay_steps: int | None = None) -> optax.Schedule:
    """Warm-up, stable, decay as in MiniCPM: each step of the decay takes the same share away.

    In the paper's terms, the peak times 0.5^((s − S) / T) from step S on, with the T by which the
    end is reached at the last step. The end must be above 0.

    Args:
        span: what it is made for.
        decay_steps: length of the decay; by default a fifth of the steps. A run has --decay
            instead.
    """
    if span.peak:
        check_above_zero("end_value of wsd_exponential", span.end)
    share = span.end / span.peak if span.peak else 1.0

    def decay(length: float) -> optax.Schedule:
        return lambda count: span.peak * jnp.power(share, _part(count, length))

    return _then_decay(span, decay_steps, constant(span), decay)


def wsd_sqrt(span: Span, *, decay_steps: int | None = None) -> optax.Schedule:
    """Warm-up, stable, decay by 1 − √z, where z goes from 0 to 1 in the decay.

    Args:
        span: what it is made for.
        decay_steps: length of the decay; by default a fifth of the steps. A run has --decay
            instead.
    """

    def decay(length: float) -> optax.Schedule:
        def schedule(count: jax.typing.ArrayLike) -> jax.Array:
            z = _part(count, length)
            root = jnp.where(z > 0, jnp.sqrt(jnp.where(z > 0, z, 1.0)), 0.0)  # finite gradients
            return span.end + (span.peak - span.end) * (1 - root)

        return schedule

    return _then_decay(span, decay_steps, constant(span), decay)


def rex(span: Span) -> optax.Schedule:
    """Falls slowly at first and fast at the end: by (1 − z) / (1 − z/2), z from 0 to 1."""

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        z = _part(count, span.rest)
        return span.end + (span.peak - span.end) * ((1 - z) / (1 - z / 2))

    return schedule


#: The factor and the exponent of "power" that Shen et al. chose.
POWER_A, POWER_B = 4.0, -0.51


def power_rate(tokens: Any, batch: float, a: float, b: float) -> Any:
    """The power law of "power", before it is capped: batch · a · tokens^b."""
    return batch * a * tokens**b


def power(
    span: Span,
    *,
    a: float = POWER_A,
    b: float = POWER_B,
    tokens_per_step: float = 4096 * 1024,
    batch_sequences: float | None = None,
    tokens_seen: float = 0.0,
    decay_steps: int | None = None,
) -> optax.Schedule:
    """A power law of the tokens seen, with an exponential decay to 0 at the end.

    The learning rate is min(peak, batch · a · n^b), where n is how many tokens were trained on and
    batch how many sequences of 4096 tokens a step takes. The warm-up leads to the law's value at
    its end. The decay multiplies the value at its beginning by (e^(1 − z) − 1) / (e − 1), z from 0
    to 1, as the authors' code does.

    The constants, with a peak of 0.02, hold under the paper's µP only: learning rates of internal
    matrices divided by m, the growth of the width from 256; initial values of 0.1 / √m, embeddings
    multiplied by 12, what each layer adds by 0.22 to 0.28, and logits divided by the width of a
    head. Without these multipliers a peak of 0.02 is far too high. The fit of the best constant
    rate for a planned number of tokens, with a = 4.6, is for another use.

    Args:
        span: what it is made for.
        a: the factor of the law.
        b: its exponent.
        tokens_per_step: tokens of a batch. A run of memopt fills in its own.
        batch_sequences: sequences of a batch; by default `tokens_per_step` / 4096, since the
            constants were fitted with sequences of 4096 tokens.
        tokens_seen: tokens trained on before the first step. A run that changes to this schedule
            fills in those of its steps so far.
        decay_steps: length of the decay; by default a fifth of the steps. A run has --decay
            instead.
    """
    check_above_zero("tokens_per_step", tokens_per_step)
    check_at_least("tokens_seen", tokens_seen, 0)
    batch = tokens_per_step / 4096 if batch_sequences is None else batch_sequences
    check_above_zero("batch_sequences", batch)
    before = float(tokens_seen + span.warmup_steps * tokens_per_step)

    def law(count: jax.typing.ArrayLike) -> jax.Array:
        tokens = before + count * float(tokens_per_step)
        return jnp.minimum(span.peak, power_rate(jnp.maximum(tokens, 1.0), batch, a, b))

    def decay(length: float) -> optax.Schedule:
        def schedule(count: jax.typing.ArrayLike) -> jax.Array:
            return law(span.rest - length) * (jnp.expm1(1 - _part(count, length)) / jnp.expm1(1.0))

        return schedule

    return _then_decay(span, decay_steps, law, decay)


def one_cycle(span: Span, *, pct_start: float = 0.3, div_factor: float = 25.0) -> optax.Schedule:
    """Rises along a cosine to the peak, and falls along another far below where it started.

    It rises by itself: give it no warm-up, or a warm-up leads to the learning rate it starts at.

    Args:
        span: what it is made for.
        pct_start: share of the steps, after a warm-up, in which it rises, rounded down to steps.
        div_factor: the peak divided by the learning rate it starts at.
    """
    check_between("pct_start", pct_start, 0, 1)
    check_above_zero("div_factor", div_factor)
    rise = int(pct_start * span.rest)
    if not rise:
        warn_without_effect(f"the rise in pct_start={pct_start} of {span.rest} steps")
    return _in_sequence(
        (rise, lambda length: _cosine(span.peak / div_factor, span.peak, length)),
        (span.rest - rise, lambda length: _cosine(span.peak, span.end, length)),
    )


def inverse_sqrt(span: Span, *, timescale: float | None = None) -> optax.Schedule:
    """Falls as the inverse square root of the steps: the peak times √(k / (k + t)).

    t counts from the end of the warm-up. If k is the length of the warm-up, as by default, this is
    √(warm-up / step), as in the paper.

    Args:
        span: what it is made for.
        timescale: k, the steps after which the learning rate is divided by √2; by default those of
            the warm-up, or 1 without one.
    """
    k = max(1.0, span.warmup_steps) if timescale is None else timescale
    check_above_zero("timescale", k)
    return lambda count: span.peak * jax.lax.rsqrt(1 + count / k)


def rewarm(span: Span, *, new_steps: int | None = None, rewarm: float = 0.01) -> optax.Schedule:
    """Old data, then new data: falls, rises again when the new data begins, and falls again.

    Both falls are cosines from the peak to the end, and the rise is a line. A run that was trained
    on the old data already is continued by `memopt pretrain --resume --schedule cosine --rewarm`.

    Args:
        span: what it is made for.
        new_steps: steps on the new data; by default half of those after the warm-up.
        rewarm: share of `new_steps` in which the learning rate rises.
    """
    new = int(span.rest // 2) if new_steps is None else new_steps
    check_at_least("new_steps", new, 0)
    if not 0 <= rewarm < 1:
        raise ValueError(f"rewarm must be at least 0 and below 1, got {rewarm}.")
    if new >= span.rest:
        raise ValueError(
            f"warmup_steps={span.warmup_steps} and new_steps={new} must leave room in "
            f"steps={span.steps}."
        )
    if new and 0 < rewarm * new < 1:
        warn_without_effect(f"the rise in rewarm={rewarm} of new_steps={new}")
    fall = lambda length: _cosine(span.peak, span.end, length)
    return _in_sequence(
        (span.rest - new, fall),
        (rewarm * new, lambda length: optax.linear_schedule(span.end, span.peak, length)),
        ((1 - rewarm) * new, fall),
    )


def restarts(
    span: Span, *, cycles: int = 4, length_factor: float = 1.0, peak_factor: float = 1.0
) -> optax.Schedule:
    """Cosines one after another, each of which starts from its peak again.

    Args:
        span: what it is made for.
        cycles: how many there are. Their first steps are rounded; a cycle of less than half a step
            is left out.
        length_factor: length of a cycle divided by that of the one before (T_mult).
        peak_factor: peak of a cycle divided by that of the one before.
    """
    check_at_least("cycles", cycles, 1)
    cycles = int(cycles)
    check_above_zero("length_factor", length_factor)
    check_above_zero("peak_factor", peak_factor)
    try:
        sums = list(itertools.accumulate(length_factor**i for i in range(cycles)))
    except OverflowError:
        sums = [math.inf]
    if not math.isfinite(sums[-1]):
        raise ValueError(f"length_factor={length_factor} is too large for {cycles} cycles.")
    ends = [0, *(max(1, round(part / sums[-1] * span.rest)) for part in sums)]
    if left_out := cycles - len({*ends[1:]}):
        warn_without_effect(f"{left_out} of cycles={cycles} in {span.rest} steps")
    peaks = [span.peak * peak_factor**i for i in range(cycles)]
    return _in_sequence(
        *(
            (end - start, lambda length, peak=peak: _cosine(peak, span.end, length))
            for start, end, peak in zip(ends[:-1], ends[1:], peaks, strict=True)
        )
    )


SHAPES: dict[str, Shape] = {
    "constant": Shape(
        constant,
        "the end is not planned, or the optimizer averages or finds its steps",
        end=None,
        extends=True,
    ),
    "linear": Shape(
        linear,
        "the length is planned; to 0 it is often a little better than cosine",
        "Defazio et al., 2023, https://arxiv.org/abs/2310.07831",
    ),
    "cosine": Shape(
        cosine,
        "the length is planned: the usual choice",
        "Loshchilov and Hutter, SGDR, 2017, https://arxiv.org/abs/1608.03983",
    ),
    "wsd": Shape(
        wsd,
        "the length may change: only the last part depends on it",
        "Hu et al., MiniCPM, 2024, https://arxiv.org/abs/2404.06395, but with a linear decay",
        extends=True,
    ),
    "wsd_exponential": Shape(
        wsd_exponential,
        "as wsd, with MiniCPM's decay, which is fast at first",
        "Hu et al., MiniCPM, 2024, https://arxiv.org/abs/2404.06395, sections 4.2 and 6.2",
        end=0.1,
        extends=True,
    ),
    "wsd_sqrt": Shape(
        wsd_sqrt,
        "as wsd; in its paper better than a linear decay of the same length",
        "Hägele et al., 2024, https://arxiv.org/abs/2405.18392, section 3.2",
        extends=True,
    ),
    "rex": Shape(
        rex,
        "short budgets: the rate stays high for long, and there is nothing to tune",
        "Chen et al., REX, 2021, https://arxiv.org/abs/2107.04197",
    ),
    "power": Shape(
        power,
        "one peak for any batch and length, under µP only, see its description",
        "Shen et al., Power Scheduler, 2024, https://arxiv.org/abs/2408.13359v2, eq. 5 to 8",
        end=None,
        starts_at_peak=False,
        extends=True,
    ),
    "one_cycle": Shape(
        one_cycle,
        "few epochs at a very high peak; give it no warm-up",
        "Smith and Topin, 2017, https://arxiv.org/abs/1708.07120, with cosines as in PyTorch",
        end=1 / 25e4,
        starts_at_peak=False,
    ),
    "inverse_sqrt": Shape(
        inverse_sqrt,
        "the end is not planned, and a constant rate is too noisy",
        "Vaswani et al., 2017, https://arxiv.org/abs/1706.03762, eq. 3",
        end=None,
        extends=True,
    ),
    "rewarm": Shape(
        rewarm,
        "old data, then new data, in one run",
        "Gupta et al., 2023, https://arxiv.org/abs/2308.04014",
        end=0.1,
    ),
    "restarts": Shape(
        restarts,
        "a model to keep at the end of each cycle, for ensembles or to stop early",
        "Loshchilov and Hutter, SGDR, 2017, https://arxiv.org/abs/1608.03983",
    ),
}
"""Every decay shape by name."""


def register(name: str, shape: Shape) -> None:
    '''Adds a shape of your own to `SHAPES`: it is then checked, listed and trained with as ours.

    It is made once for 1000 steps with its defaults, to see whether it works.

    Args:
        name: its name, of letters, digits, "_" and "-"; that of no other schedule.
        shape: its row.

    Raises:
        ValueError: the name is taken or no such word, or `shape` is not a `Shape` whose function
            maps a `Span` and options with defaults, by keyword only, to an Optax schedule.

    Example:
        >>> def staircase(span, *, stairs=4):
        ...     """Falls in equal steps.
        ...
        ...     Args:
        ...       span: what it is made for.
        ...       stairs: how many.
        ...     """
        ...     height = (span.peak - span.end) / stairs
        ...     return lambda count: span.peak - height * jnp.floor(stairs * count / span.rest)
        >>> register("staircase", Shape(staircase, "to see how a run reacts"))
        >>> from memopt.schedules import schedule
        >>> rate = schedule("staircase", 1.0, 100, stairs=2)
        >>> [float(rate(t)) for t in (0, 49, 50, 100, 200)]
        [1.0, 1.0, 0.5, 0.0, 0.0]
        >>> SHAPES.pop("staircase").defaults
        {'stairs': 4}
        >>> register("staircase", staircase)
        Traceback (most recent call last):
        ValueError: shape must be a Shape, as Shape(staircase, "when to choose it"), got function.
    '''
    if not (isinstance(name, str) and re.fullmatch(r"\w[\w-]*", name)):
        raise ValueError(f'name must be a word of letters, digits, "_" and "-", got {name!r}.')
    if name in SHAPES or name in BATCH_SHAPES:
        raise ValueError(f"name {name!r} is that of a schedule already: choose another.")
    if not isinstance(shape, Shape):
        example = f'as Shape({getattr(shape, "__name__", "make")}, "when to choose it")'
        raise ValueError(f"shape must be a Shape, {example}, got {type(shape).__name__}.")
    _check_make(name, shape)
    SHAPES[name] = shape


def _check_make(name: str, shape: Shape) -> None:
    """Raises unless the function of a shape makes Optax schedules."""
    if not callable(shape.make):
        raise ValueError(f"make of {name!r} must be a function, got {shape.make!r}.")
    parameters = [*inspect.signature(shape.make).parameters.values()]
    if not parameters or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        raise ValueError(f"make of {name!r} must take a Span first.")
    for option in parameters[1:]:
        if option.kind is not option.KEYWORD_ONLY or option.default is option.empty:
            raise ValueError(
                f"make of {name!r} must take its options by keyword only, each with a default, as "
                f"(span, *, {option.name}=…), got {option}."
            )
    try:
        made = shape.make(Span(1.0, shape.end or 0.0, 1000, 100))
        rate = np.asarray(made(jnp.int32(0)))
    except Exception as error:
        raise ValueError(f"make of {name!r} fails for 1000 steps: {error}") from error
    if rate.shape or not np.issubdtype(rate.dtype, np.number) or not np.isfinite(rate):
        raise ValueError(
            f"make of {name!r} must make a schedule that maps a step to a finite number, got "
            f"{rate!r} for step 0."
        )
