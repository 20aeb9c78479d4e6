"""Recommendations of each law for a run, side by side."""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from memopt.errors import check_above_zero
from memopt.schedules.laws.batch_rules import sqrt_rule
from memopt.schedules.laws.critical_batch import CRITICAL_BATCH_RANGES, critical_batch
from memopt.schedules.laws.power_law import POWER_RANGES, power
from memopt.schedules.laws.ranges import OutsideRangeWarning, outside
from memopt.schedules.laws.step_law import STEP_LAW_RANGES, step_law
from memopt.schedules.laws.surge import surge, surge_peak
from memopt.schedules.laws.time_transfer import time_transfer

#: Optimizers that Step Law was fitted with, and those that surge was derived for or checked with.
STEP_LAW_OPTIMIZERS, SURGE_OPTIMIZERS = ("adamw",), ("adam", "adamw", "lion")

#: Those that the power law holds for, and the width from which its µP counts growth.
ADAM, BASE_WIDTH = ("adam", "adamw"), 256

#: Fewest ids of a vocabulary of subwords, whose losses may be compared with Kaplan et al.'s.
SUBWORDS = 10_000

#: Two recommendations disagree if they differ by more than this factor.
SAME = 1.5


class MeasuredRun(NamedTuple):
    """A run whose noise was measured.

    Attributes:
        loss: Its loss there, in nats a token.
        noise_batch: The noise scale, in tokens; infinite or NaN if the noise hides the gradient.
        batch_tokens: Tokens of its batches.
        tokens_seen: Tokens trained on until then.
        learning_rate: Its highest learning rate.
        optimizer: Its optimizer.
        vocab_size: Ids of its vocabulary.
    """

    loss: float
    noise_batch: float
    batch_tokens: float
    tokens_seen: float
    learning_rate: float
    optimizer: str
    vocab_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Recommendation of one law.

    Attributes:
        law: Its name.
        learning_rate: The highest learning rate; None if it says nothing of it.
        batch_tokens: Tokens of a batch; None if it says nothing of it.
        source: What it is computed from.
        range: Where it holds.
        outside: Why this point is outside of its range, "" if it is inside; None if no range is
            known.
        compared: Whether it counts where disagreements are sought.
    """

    law: str
    learning_rate: float | None = None
    batch_tokens: float | None = None
    source: str
    range: str
    outside: str | None = ""
    compared: bool = True


def suggest(
    parameters: float,
    tokens: float,
    *,
    width: int,
    optimizer: str = "adamw",
    batch_tokens: float | None = None,
    run: MeasuredRun | None = None,
) -> list[Suggestion]:
    """Returns what each law recommends that is for the optimizer.

    Nothing is warned of: each suggestion says whether it is outside of its law's range.

    Args:
        parameters: Parameters of the model, without the embedding and the head.
        tokens: Tokens to train on.
        width: Width of the model, by which µP divides learning rates.
        optimizer: Name of the optimizer.
        batch_tokens: Tokens of a batch that is given; None: the laws choose.
        run: A run whose noise was measured, see `memopt.training.noise.summarize_run`.

    Raises:
        ValueError: A number is not above 0.

    Example:
        >>> for found in suggest(3e8, 1e10, width=1024):
        ...     print(f"{found.law:8} {found.learning_rate:.1e} {found.batch_tokens:,.0f} tokens")
        Step Law 1.9e-03 297,134 tokens
        power    8.2e-04 297,134 tokens
    """
    for name, value in (("width", width), ("batch_tokens", batch_tokens)):
        check_above_zero(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutsideRangeWarning)
        found = _by_size(parameters, tokens, width, optimizer, batch_tokens)
        return found + (_by_noise(run, tokens, optimizer, batch_tokens) if run else [])


def _by_size(
    parameters: float, tokens: float, width: int, optimizer: str, given: float | None
) -> list[Suggestion]:
    """Recommendations that need only the sizes of model and data."""
    found = []
    batch = given
    if optimizer in STEP_LAW_OPTIMIZERS:
        rate, best = step_law(parameters, tokens)
        beyond = "; ".join(outside(STEP_LAW_RANGES, parameters=parameters, tokens=tokens))
        found.append(
            Suggestion(
                law="Step Law",
                learning_rate=rate,
                batch_tokens=best,
                source="N and the tokens",
                range="AdamW, N 60M to 1.1B, 2B to 100B tokens",
                outside=beyond,
            )
        )
        if given:
            factor = given / best
            found.append(
                Suggestion(
                    law="Step Law, √batch",
                    learning_rate=sqrt_rule(rate, factor),
                    batch_tokens=given,
                    source="Step Law and Adam's batch-size invariance: η √k and k (1 − β), "
                    f"k = {factor:.2g}",
                    range="as Step Law, and batches below the critical one",
                    outside=beyond,
                )
            )
        batch = given or best
    if optimizer in ADAM and batch:
        seen = tokens / 2
        growth = width / BASE_WIDTH
        rate = power(seen, batch / 4096)
        why = outside(POWER_RANGES, tokens_seen=seen)
        if growth < 1:
            why = [*why, f"width={width} is below the base width {BASE_WIDTH}"]
        found.append(
            Suggestion(
                law="power",
                learning_rate=rate / growth,
                batch_tokens=batch,
                source=f"half of the tokens seen: {rate:.2g} ÷ {growth:g}, as µP does for matrices",
                range="µP only, 1B to 1.25T tokens seen",
                outside="; ".join(why),
            )
        )
    return found


def _by_noise(
    run: MeasuredRun, tokens: float, optimizer: str, given: float | None
) -> list[Suggestion]:
    """Recommendations from the noise that was measured in a run."""
    at = f"the run at loss {run.loss:.3f}"
    scale = run.noise_batch
    is_clear = math.isfinite(scale) and scale > 0
    found = [
        Suggestion(
            law="noise scale",
            batch_tokens=scale if is_clear else None,
            source=at,
            range="this loss: it grows as the loss falls",
            outside="" if is_clear else "the noise hides the gradient: no finite batch",
        )
    ]
    if is_clear and optimizer in SURGE_OPTIMIZERS and run.optimizer == optimizer:
        peak = surge_peak([run.batch_tokens], [run.learning_rate], scale)
        batch = given or scale
        found.append(
            Suggestion(
                law="surge",
                learning_rate=surge(batch, scale, peak),
                batch_tokens=batch,
                source=f"{at}, if its rate {run.learning_rate:g} is the best for its "
                f"{run.batch_tokens:,.0f} tokens",
                range="batches far below πσ²/2µ²; sign-like updates",
                outside="; ".join(outside({"batch": (0, scale)}, batch=batch)),
            )
        )
    is_subwords = run.vocab_size >= SUBWORDS
    beyond = outside(CRITICAL_BATCH_RANGES, loss=run.loss)
    if not is_subwords:
        beyond = [*beyond, f"a vocabulary of {run.vocab_size} is not of subwords"]
    low, high = CRITICAL_BATCH_RANGES["loss"]
    found.append(
        Suggestion(
            law="critical batch (Kaplan)",
            batch_tokens=critical_batch(run.loss),
            source=at,
            range=f"WebText2 in 50257 subwords, losses {low:g} to {high:g}",
            outside="; ".join(beyond),
            compared=is_subwords,
        )
    )
    if is_clear and run.tokens_seen:
        found.append(
            Suggestion(
                law="Time Transfer (weak)",
                batch_tokens=time_transfer(scale, run.tokens_seen, tokens),
                source=f"the noise scale after {run.tokens_seen:,.0f} tokens, in proportion",
                range="weak evidence, not recommended",
                outside=None,
                compared=False,
            )
        )
    return found


def unused_laws(optimizer: str, batch_tokens: float | None, run_optimizer: str | None) -> list[str]:
    """Says which laws `suggest` does not use, and why.

    Args:
        optimizer: The optimizer.
        batch_tokens: The batch that is given; None: the laws choose.
        run_optimizer: That of the run that was measured; None without one.

    Example:
        >>> unused_laws("adamw", None, None)
        ['Surge, the noise scale and the critical batch need a run: give --run.']
    """
    found = []
    if optimizer not in STEP_LAW_OPTIMIZERS:
        found.append(f"Step Law is not for {optimizer}: it was fitted with AdamW.")
    if optimizer not in ADAM:
        found.append(f"The power law is not for {optimizer}: it was fitted with Adam under µP.")
    elif optimizer not in STEP_LAW_OPTIMIZERS and not batch_tokens:
        found.append("The power law needs a batch: give --batch-size.")
    if run_optimizer is None:
        found.append("Surge, the noise scale and the critical batch need a run: give --run.")
    elif optimizer not in SURGE_OPTIMIZERS:
        found.append(
            f"Surge is not for {optimizer}: it was derived for updates by the sign of the gradient."
        )
    elif run_optimizer != optimizer:
        found.append(
            f"Surge needs a good learning rate of {optimizer}: the run used {run_optimizer}."
        )
    return found


def disagreements(
    suggestions: Sequence[Suggestion], batch_tokens: float | None = None
) -> list[str]:
    """Says where recommendations differ, by which factor.

    Args:
        suggestions: The recommendations.
        batch_tokens: The batch that is given; laws that take it do not recommend it.

    Example:
        >>> disagreements(suggest(3e8, 1e10, width=1024))[0]
        'Learning rates disagree by a factor of 2.4: 8.21e-04 by power and 1.93e-03 by Step Law.'
    """
    found = []
    for field, what, form in (
        ("learning_rate", "Learning rates", "{:.2e}"),
        ("batch_tokens", "Batches", "{:,.0f} tokens"),
    ):
        all_named = {x.law: getattr(x, field) for x in suggestions if x.compared}
        named = {law: x for law, x in all_named.items() if x not in (None, batch_tokens)}
        if field == "batch_tokens" and batch_tokens:
            named["the given batch"] = batch_tokens
        if len({*named.values()}) < 2:  # the power law takes the batch of Step Law
            continue
        low, high = min(named, key=named.__getitem__), max(named, key=named.__getitem__)
        factor = named[high] / named[low]
        if factor <= SAME:
            found.append(f"{what} agree within a factor of {factor:.2f}.")
            continue
        ends = " and ".join(f"{form.format(named[law])} by {law}" for law in (low, high))
        found.append(f"{what} disagree by a factor of {factor:.1f}: {ends}.")
    return found
