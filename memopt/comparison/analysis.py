"""Statistics of compared optimizers: losses over seeds, steps to a loss, the Pareto front.

The protocol is that of "Fantastic Pretraining Optimizers and Where to Find Them" (Wen et al. 2025,
https://arxiv.org/abs/2509.02046) and "No Train No Gain" (Kaddour et al. 2023,
https://arxiv.org/abs/2307.06440): a tuned baseline, the same budget of tuning for all, and losses
compared where each schedule ends.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from scipy.special import ndtri, stdtr, stdtrit

from memopt.comparison.rows import BASELINE

Run = Mapping[str, Any]
"""One run, a line of `compare.jsonl`."""

#: Runs that differ in one of these fields are of different experiments, and are not compared.
EXPERIMENT = ("size", "batch_size", "seq_len", "steps", "text", "eval_tokens")

#: The fields of a method's setting.
SETTING = ("learning_rate", "options", "schedule", "warmup", "final_learning_rate", "source")

#: Two losses differ if chance alone makes such a difference with less than this probability. The
#: NanoGPT speed-run accepts a record by the same threshold
#: (https://github.com/KellerJordan/modded-nanogpt).
PROBABILITY = 0.01

#: The z of that probability, both signs together: 2.58.
THRESHOLD = -float(ndtri(PROBABILITY / 2))

Verdict = Literal["better", "same", "worse", "unknown"]


@dataclasses.dataclass(frozen=True)
class Summary:
    """The results of one method at one size.

    Attributes:
        size: Name of the model's size.
        batch_size: Rows of a batch.
        method: Name of the row.
        optimizer: Name of the optimizer.
        options: Its tuned options.
        learning_rate: The tuned learning rate.
        learning_rate_ratio: It, divided by the baseline's.
        losses: Validation losses in nats at the end, one a seed; infinite if diverged.
        loss: Their mean.
        spread: Their sample standard deviation; None for one seed.
        perplexity: The exponential of `loss`.
        difference: `loss` minus the baseline's; None if one diverged.
        least_difference: The least difference that `verdict` tells from chance.
        z: The difference in standard errors, as by `z_score`.
        verdict: The comparison with the baseline.
        steps: Steps of a run.
        tokens: Tokens of a run.
        steps_to_target: Steps after which the loss stays at or below the target; None if never.
        tokens_to_target: Tokens of these steps.
        speed_up: The baseline's steps to the target over this method's.
        state_bytes: Bytes of the optimizer's state.
        parameter_bytes: Bytes of the parameters.
        peak_bytes: Planned peak of a step's memory.
        step_seconds: Median time of a step; None if other runs shared the machine.
        step_cpu_seconds: Median processor time of a step, of all cores together.
        settings: Settings of learning rate and options that were tried.
        left_out: Tuned runs with an earlier setting, which do not count.
        experiment: The fields of `EXPERIMENT` that the runs have in common, as JSON.
        on_front: True if no other method has less loss with as little state.
        curve: Steps and mean losses over seeds.
        sensitivity: Learning rates and losses with the same options and seed.
    """

    size: str
    batch_size: int
    method: str
    optimizer: str
    options: Mapping[str, Any]
    learning_rate: float
    learning_rate_ratio: float | None
    losses: tuple[float, ...]
    loss: float
    spread: float | None
    perplexity: float
    difference: float | None
    least_difference: float | None
    z: float | None
    verdict: Verdict
    steps: int
    tokens: int
    steps_to_target: float | None
    tokens_to_target: float | None
    speed_up: float | None
    state_bytes: int
    parameter_bytes: int
    peak_bytes: int | None
    step_seconds: float | None
    step_cpu_seconds: float | None
    settings: int
    left_out: int
    experiment: str
    on_front: bool
    curve: tuple[tuple[float, float], ...]
    sensitivity: tuple[tuple[float, float], ...]


def summarize(
    runs: Iterable[Run],
    *,
    baseline: str = BASELINE,
    target_loss: float | None = None,
    peak_bytes: Callable[[Run], int | None] | None = None,
) -> list[Summary]:
    """Summarizes the tuned runs of each method in each experiment.

    Runs that differ in a field of `EXPERIMENT` are not compared. Of a method's tuned runs those
    with the setting of the last one count; its setting may have been another one before.

    A method without tuned runs at a size has no summary there; see `unfinished`.

    Args:
        runs: The runs. Each has `method`, `optimizer`, `options`, `size`, `batch_size`, `seed`,
            `learning_rate`, `tuned`, `steps`, `tokens`, `val_loss` (not finite or None if it
            diverged), `val_losses` (pairs of step and loss), `state_bytes`, `parameter_bytes` and
            `step_seconds` (or None); `peak_bytes` and `step_cpu_seconds` are optional.
        baseline: The method with which others are compared.
        target_loss: The loss, in nats, to which steps are counted; by default the baseline's mean
            at the end.
        peak_bytes: Returns the planned peak of a run's step; by default the runs' `peak_bytes`.

    Returns:
        Summaries in the order of the sizes in `runs`, then of their losses.
    """
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        group = groups.setdefault(_values(run, EXPERIMENT), {})
        group.setdefault(run["method"], []).append(run)
    peak = peak_bytes or (lambda run: run.get("peak_bytes"))
    return [
        summary
        for group in groups.values()
        for summary in _compare(group, baseline, target_loss, peak)
    ]


def unfinished(runs: Iterable[Run]) -> dict[tuple[str, int, str], int]:
    """Counts the runs of methods that have no tuned run yet, by size, batch size and method."""
    found: dict[tuple[str, int, str], list[bool]] = {}
    for run in runs:
        key = (run["size"], run["batch_size"], run["method"])
        found.setdefault(key, []).append(bool(run["tuned"]))
    return {key: len(tuned) for key, tuned in found.items() if not any(tuned)}


def z_score(losses: Sequence[float], baseline: Sequence[float]) -> float | None:
    """The difference of two means in standard errors, corrected for few seeds.

    Student's t of the difference, whose standard error pools the variance over seeds of both, is
    turned into the z of the same probability. So one threshold serves any number of seeds, and few
    seeds count for less: with three seeds each, a z of 2.58 takes a t of 4.6.

    Args:
        losses: The losses of one method.
        baseline: The losses of the other.

    Returns:
        z, negative if `losses` are lower; infinite if only `losses` or only the baseline diverged;
        None if one of them has a single seed, since its spread is not known, or both diverged.

    Example:
        >>> round(z_score([1.0, 1.1, 0.9], [1.2, 1.3, 1.1]), 2)
        -1.81

    """
    if math.inf in losses or math.inf in baseline:
        sign = (math.inf in losses) - (math.inf in baseline)
        return sign * math.inf if sign else None
    if len(losses) < 2 or len(baseline) < 2:
        return None
    difference = statistics.fmean(losses) - statistics.fmean(baseline)
    if not difference:
        return 0.0
    error, freedom = _standard_error(losses, baseline)
    t = abs(difference) / error if error else math.inf
    return math.copysign(-float(ndtri(stdtr(freedom, -t))), difference)


def least_difference(losses: Sequence[float], baseline: Sequence[float]) -> float | None:
    """The least difference of means that the z-rule tells from chance; None if it cannot be known.

    Example:
        >>> round(least_difference([1.0, 1.1, 0.9], [1.2, 1.3, 1.1]), 2)
        0.38

    """
    if min(len(losses), len(baseline)) < 2 or not all(map(math.isfinite, (*losses, *baseline))):
        return None
    error, freedom = _standard_error(losses, baseline)
    return error * -float(stdtrit(freedom, PROBABILITY / 2))


def decide(z: float | None) -> Verdict:
    """The verdict of the z-rule: "same" means that chance alone may make such a difference.

    Example:
        >>> decide(-3.0), decide(1.0), decide(3.0), decide(None)
        ('better', 'same', 'worse', 'unknown')

    """
    if z is None:
        return "unknown"
    return "same" if abs(z) < THRESHOLD else "better" if z < 0 else "worse"


def steps_to_loss(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """The step after which a loss stays at or below a target; None if it ends above.

    Between two points the loss is taken to be linear. A curve that dips below the target and rises
    again has not reached it: optimizers are compared where they end.

    Args:
        curve: Steps and losses.
        target: The loss to reach.

    Example:
        >>> steps_to_loss([(0, 4.0), (10, 3.0), (20, 2.0)], 2.5)
        15.0

    """
    later: tuple[float, float] | None = None
    for step, loss in sorted(curve, reverse=True):
        if not loss <= target:
            if later is None or not math.isfinite(loss):
                return later and later[0]
            share = (loss - target) / (loss - later[1])
            return step + share * (later[0] - step)
        later = step, loss
    return later and later[0]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Marks the points that no other one beats in both coordinates.

    A point is beaten by one that is less in one coordinate and no more in the other; equal points
    are all on the front. Points that are not finite are never on it.

    Args:
        points: Pairs, such as bytes and loss; less is better in both.

    Example:
        >>> pareto_front([(0, 3.0), (1, 2.0), (2, 2.0), (1, 2.0), (3, 1.0)])
        [True, True, False, True, True]

    """

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a != b and a[0] <= b[0] and a[1] <= b[1]

    finite = [point for point in points if all(map(math.isfinite, point))]
    return [p in finite and not any(beats(other, p) for other in finite) for p in points]


def loss_of(run: Run) -> float:
    """The final validation loss of a run; infinite if it diverged."""
    return _finite(run["val_loss"])


def _compare(
    methods: Mapping[str, Sequence[Run]],
    baseline: str,
    target: float | None,
    peak_bytes: Callable[[Run], int | None],
) -> list[Summary]:
    tuned = _tuned_runs(methods)
    losses = {method: [loss_of(run) for run in runs] for method, runs in tuned.items()}
    base = losses.get(baseline, [])
    base_loss = statistics.fmean(base) if base else math.inf
    target = base_loss if target is None else target
    curves = {method: mean_curve(runs) for method, runs in tuned.items()}
    reached = {
        method: steps_to_loss(curve, target) if math.isfinite(target) else None
        for method, curve in curves.items()
    }
    front = pareto_front([(tuned[m][0]["state_bytes"], statistics.fmean(losses[m])) for m in tuned])
    summaries = []
    for (method, runs), on_front in zip(tuned.items(), front, strict=True):
        first, of, steps = runs[0], losses[method], reached[method]
        loss = statistics.fmean(of)
        finite = math.isfinite(loss)
        z = z_score(of, base) if base and method != baseline else None
        rate = first["learning_rate"]
        summaries.append(
            Summary(
                size=first["size"],
                batch_size=first["batch_size"],
                method=method,
                optimizer=first["optimizer"],
                options=first["options"],
                learning_rate=rate,
                learning_rate_ratio=rate / tuned[baseline][0]["learning_rate"] if base else None,
                losses=tuple(of),
                loss=loss,
                spread=statistics.stdev(of) if finite and len(of) > 1 else None,
                perplexity=_exp(loss),
                difference=loss - statistics.fmean(base)
                if finite and math.isfinite(base_loss)
                else None,
                least_difference=least_difference(of, base) if method != baseline else None,
                z=z,
                verdict=decide(z),
                steps=first["steps"],
                tokens=first["tokens"],
                steps_to_target=steps,
                tokens_to_target=steps and steps * first["tokens"] / first["steps"],
                speed_up=_ratio(reached.get(baseline), steps),
                state_bytes=first["state_bytes"],
                parameter_bytes=first["parameter_bytes"],
                peak_bytes=peak_bytes(first),
                step_seconds=_median(run["step_seconds"] for run in runs),
                step_cpu_seconds=_median(run.get("step_cpu_seconds") for run in runs),
                settings=len({_values(run, SETTING) for run in methods[method]}),
                left_out=sum(run["tuned"] for run in methods[method]) - len(runs),
                experiment=_values(first, EXPERIMENT),
                on_front=on_front,
                curve=curves[method],
                sensitivity=sensitivity(methods[method]),
            )
        )
    return sorted(summaries, key=lambda summary: summary.loss)


def _tuned_runs(methods: Mapping[str, Sequence[Run]]) -> dict[str, list[Run]]:
    """The tuned runs of each method with its last setting, in the order of their seeds."""
    found = {}
    for method, runs in methods.items():
        if tuned := [run for run in runs if run["tuned"]]:
            last = _values(tuned[-1], SETTING)
            counted = [run for run in tuned if _values(run, SETTING) == last]
            found[method] = sorted(counted, key=lambda run: run["seed"])
    return found


def _values(run: Run, fields: Iterable[str]) -> str:
    return json.dumps([run.get(name) for name in fields], sort_keys=True)


def mean_curve(runs: Sequence[Run]) -> tuple[tuple[float, float], ...]:
    """Steps and mean validation losses of runs, where all of them were evaluated.

    The last point is the mean of their final losses.
    """
    curves = [{step: _finite(x) for step, x in run["val_losses"]} for run in runs]
    for curve, run in zip(curves, runs, strict=True):
        curve[run["steps"]] = loss_of(run)
    steps = sorted(set.intersection(*map(set, curves)))
    return tuple((step, statistics.fmean(curve[step] for curve in curves)) for step in steps)


def sensitivity(runs: Sequence[Run]) -> tuple[tuple[float, float], ...]:
    """Learning rates and losses of runs that differ in nothing else.

    Of all options, seeds and numbers of steps those are taken with which most rates were tried.
    """
    groups: dict[str, dict[float, float]] = {}
    for run in runs:
        key = repr((sorted(run["options"].items()), run["seed"], run["steps"]))
        groups.setdefault(key, {})[run["learning_rate"]] = loss_of(run)
    return tuple(sorted(max(groups.values(), key=len).items()))


def _standard_error(a: Sequence[float], b: Sequence[float]) -> tuple[float, int]:
    """The standard error of the difference of two means, and its degrees of freedom."""
    freedom = len(a) + len(b) - 2
    squares = (len(a) - 1) * statistics.variance(a) + (len(b) - 1) * statistics.variance(b)
    return math.sqrt(squares / freedom * (1 / len(a) + 1 / len(b))), freedom


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None or not b else a / b


def _median(values: Iterable[float | None]) -> float | None:
    """The median of the values that are known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _finite(loss: float | None) -> float:
    return loss if loss is not None and math.isfinite(loss) else math.inf


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf  # math.exp raises above
