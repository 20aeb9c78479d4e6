"""Statistics of compared optimizers: losses over seeds, steps to a loss, the Pareto front.

The protocol is that of "Fantastic Pretraining Optimizers and Where to Find Them" (Wen et al. 2025,
https://arxiv.org/abs/2509.02046) and "No Train No Gain" (Kaddour et al. 2023,
https://arxiv.org/abs/2307.06440): a tuned baseline, the same budget of tuning for all, and losses
compared where each schedule ends.
"""

import dataclasses
import functools
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from scipy.special import ndtri, stdtr, stdtrit

from memopt.comparison.records import Run, finite_loss, loss_of
from memopt.comparison.rows import BASELINE
from memopt.comparison.words import short_name

#: Runs that differ in one of these fields are of different experiments, and are not compared.
EXPERIMENT = ("size", "parameters", "batch_size", "seq_len", "steps", "text", "eval_tokens")

#: Those of runs to a target loss, whose number of steps is the result; without the batch size.
EXPERIMENT_TO_TARGET = ("size", "parameters", "seq_len", "target_loss", "text", "eval_tokens")

#: The fields of a method's setting, without the learning rate.
OPTIONS = ("options", "schedule", "warmup", "final_learning_rate", "source")

#: Two losses differ if chance alone makes such a difference with less than this probability. The
#: NanoGPT speed-run accepts a record by the same threshold
#: (https://github.com/KellerJordan/modded-nanogpt).
PROBABILITY = 0.01

#: The z of that probability, both signs together: 2.58.
THRESHOLD = -float(ndtri(PROBABILITY / 2))

#: Learning rates count as equally good whose losses are above the least by at most this share.
TOLERANCE = 0.01

Verdict = Literal["better", "no difference", "worse", "unknown"]


class Difference(NamedTuple):
    """The difference of a method from the baseline.

    Attributes:
        loss: Mean loss minus the baseline's; None if one diverged.
        standard_error: Its standard error; None for one seed, or if one diverged.
        least: The least difference that the z-rule tells from chance; None if there is no
            standard error.
        z: As `z_score`.
        learning_rate_ratio: Tuned learning rate over the baseline's.
        speed_up: The baseline's steps to the target over the method's; None if one never comes to
            it.
    """

    loss: float | None
    standard_error: float | None
    least: float | None
    z: float | None
    learning_rate_ratio: float
    speed_up: float | None


class RateRange(NamedTuple):
    """The learning rates around the best one whose losses are nearly as low.

    Attributes:
        low: The lowest, over the best.
        high: The highest, over the best.
        whole: Whether a lower and a higher rate were tried, so that the range ends where it says.
    """

    low: float
    high: float
    whole: bool


@dataclasses.dataclass(frozen=True)
class Summary:
    """The results of one method in one experiment.

    Attributes:
        run: The first of the runs that count: the method, its setting, and what it was trained on.
        seeds: The seeds of the runs that count.
        losses: Their validation losses in nats at the end; infinite if diverged.
        difference: That from the baseline; None for the baseline, and if it has no tuned runs.
        steps_to_target: Steps after which the loss stays at or below the target; None if never.
        step_seconds: Median time of a step; None if other programs used the processor.
        step_cpu_seconds: Median processor time of a step, of all cores together.
        settings: Settings of learning rate and options that were tried.
        left_out: Tuned runs with an earlier setting, which do not count.
        on_front: True if no other method has less loss with as little state.
        curve: Steps and mean losses over seeds.
        sensitivity: Learning rates and losses with the same options and seed.
    """

    run: Run
    seeds: tuple[int, ...]
    losses: tuple[float, ...]
    difference: Difference | None
    steps_to_target: float | None
    step_seconds: float | None
    step_cpu_seconds: float | None
    settings: int
    left_out: int
    on_front: bool
    curve: tuple[tuple[float, float], ...]
    sensitivity: tuple[tuple[float, float], ...]

    @property
    def method(self) -> str:
        """Name of the row."""
        return self.run["method"]

    @property
    def label(self) -> str:
        """Name of the row in pictures, without the module of a user's function."""
        return short_name(self.method)

    @functools.cached_property
    def loss(self) -> float:
        """The mean of `losses`."""
        return statistics.fmean(self.losses)

    @functools.cached_property
    def spread(self) -> float | None:
        """The sample standard deviation of `losses`; None for one seed, or if one diverged."""
        known = len(self.losses) > 1 and math.isfinite(self.loss)
        return statistics.stdev(self.losses) if known else None

    @property
    def perplexity(self) -> float:
        """The exponential of `loss`."""
        return math.exp(self.loss) if self.loss < 700 else math.inf  # math.exp raises above

    @property
    def is_exact(self) -> bool:
        """Whether it has a tuned setting of its own; rows with fewer bits have that of another."""
        return self.run["tuned_as"] == self.method

    @property
    def state_bytes_per_parameter(self) -> float:
        """Bytes of optimizer state, divided by the parameters."""
        return self.run["state_bytes"] / self.run["parameters"]

    @property
    def verdict(self) -> Verdict:
        """The comparison with the baseline; "unknown" for itself."""
        return decide(self.difference and self.difference.z)

    @property
    def tokens_to_target(self) -> float | None:
        """Tokens of `steps_to_target`."""
        steps = self.steps_to_target
        return steps and steps * self.run["tokens"] / self.run["steps"]

    @property
    def rate_range(self) -> RateRange | None:
        """The learning rates around the best one whose losses are nearly as low."""
        return rate_range(self.sensitivity)


class Unfinished(NamedTuple):
    """A method of an experiment whose runs are not complete.

    Attributes:
        run: One of its runs.
        tuning: How many runs tune it.
        seeds: How many it has at the tuned setting.
    """

    run: Run
    tuning: int
    seeds: int


def summarize(
    runs: Iterable[Run], *, baseline: str = BASELINE, target_loss: float | None = None
) -> list[list[Summary]]:
    """Summarizes the tuned runs of each method in each experiment.

    Runs that differ in a field of `EXPERIMENT` are not compared. If the setting of a method has
    changed, its tuned runs with the last setting count.

    A method without tuned runs in an experiment has no summary there; see `unfinished`.

    Args:
        runs: The runs.
        baseline: The method with which others are compared. Pictures and tables are of the default.
        target_loss: The loss, in nats, to which steps are counted; by default the baseline's mean
            at the end.

    Returns:
        For each experiment with tuned runs, in their order in `runs`: summaries in the order of
        their losses.
    """
    found = (_compare(group, baseline, target_loss) for group in by_experiment(runs).values())
    return [summaries for summaries in found if summaries]


def by_experiment(
    runs: Iterable[Run], fields: Sequence[str] = EXPERIMENT
) -> dict[str, dict[str, list[Run]]]:
    """Returns the runs of each method of each experiment.

    Args:
        runs: The runs.
        fields: The fields that the runs of an experiment have in common.
    """
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        groups.setdefault(_values(run, fields), {}).setdefault(run["method"], []).append(run)
    return groups


def same_experiment(a: Run, b: Run) -> bool:
    """Whether two runs agree in all fields of `EXPERIMENT`."""
    return _values(a, EXPERIMENT) == _values(b, EXPERIMENT)


def unfinished(runs: Iterable[Run]) -> list[Unfinished]:
    """Finds the methods that have fewer tuned runs than most others of their experiment."""
    found = []
    for methods in by_experiment(runs).values():
        tuned = {name: len(of) for name, of in tuned_runs(methods).items()}
        seeds = statistics.mode(tuned.values()) if tuned else 1
        found += [
            Unfinished(of[0], sum(not run["tuned"] for run in of), tuned.get(name, 0))
            for name, of in methods.items()
            if tuned.get(name, 0) < seeds
        ]
    return found


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
    error = standard_error(losses, baseline)
    difference = statistics.fmean(losses) - statistics.fmean(baseline)
    return None if error is None else _z(difference, error, len(losses) + len(baseline) - 2)


def _z(difference: float, error: float, freedom: int) -> float:
    """The z of the same probability as Student's t of a difference."""
    if not difference:
        return 0.0
    t = abs(difference) / error if error else math.inf
    return math.copysign(-float(ndtri(stdtr(freedom, -t))), difference)


class PairedDifference(NamedTuple):
    """The difference of two rows that were trained with the same seeds.

    Attributes:
        loss: Mean over seeds of the difference of the losses in nats.
        standard_error: Its standard error, from the spread of the differences; None for one seed.
        z: As of `z_score`; None for one seed.
    """

    loss: float
    standard_error: float | None
    z: float | None


def paired_difference(
    losses: Mapping[int, float], baseline: Mapping[int, float]
) -> PairedDifference | None:
    """Compares two rows seed by seed, whose spread over seeds cancels as far as they share it.

    Fewer degrees of freedom than of `z_score` are left. It is for rows that compute nearly the
    same: in fewer bits, or released.

    Args:
        losses: Losses of one row, by the seed.
        baseline: Those of the other row.

    Returns:
        The difference over the seeds of both; None without any, or if a run diverged.

    Example:
        >>> found = paired_difference({0: 1.2, 1: 2.3, 2: 1.7}, {0: 1.0, 1: 2.0, 2: 1.5})
        >>> round(found.loss, 3), round(found.standard_error, 3), round(found.z, 2)
        (0.233, 0.033, 2.33)
    """
    seeds = sorted(losses.keys() & baseline.keys())
    differences = [losses[seed] - baseline[seed] for seed in seeds]
    if not differences or not all(map(math.isfinite, differences)):
        return None
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return PairedDifference(mean, None, None)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return PairedDifference(mean, error, _z(mean, error, len(differences) - 1))


def least_difference(losses: Sequence[float], baseline: Sequence[float]) -> float | None:
    """The least difference of means that the z-rule tells from chance; None if it cannot be known.

    Example:
        >>> round(least_difference([1.0, 1.1, 0.9], [1.2, 1.3, 1.1]), 2)
        0.38

    """
    error = standard_error(losses, baseline)
    freedom = len(losses) + len(baseline) - 2
    return None if error is None else error * -float(stdtrit(freedom, PROBABILITY / 2))


def decide(z: float | None) -> Verdict:
    """Returns the verdict on a z: "no difference" below `THRESHOLD`, "unknown" without a z.

    Example:
        >>> decide(-3.0), decide(1.0), decide(3.0), decide(None)
        ('better', 'no difference', 'worse', 'unknown')

    """
    if z is None:
        return "unknown"
    return "no difference" if abs(z) < THRESHOLD else "better" if z < 0 else "worse"


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


def _compare(
    methods: Mapping[str, Sequence[Run]], baseline: str, target: float | None
) -> list[Summary]:
    """Summarizes the methods of one experiment."""
    tuned = tuned_runs(methods)
    losses = {method: [loss_of(run) for run in runs] for method, runs in tuned.items()}
    base = losses.get(baseline, [])
    if target is None:
        target = statistics.fmean(base) if base else math.inf
    curves = {method: mean_curve(runs) for method, runs in tuned.items()}
    reached = {
        method: steps_to_loss(curve, target) if math.isfinite(target) else None
        for method, curve in curves.items()
    }
    front = pareto_front([(tuned[m][0]["state_bytes"], statistics.fmean(losses[m])) for m in tuned])

    def difference(method: str) -> Difference | None:
        if not base or method == baseline:
            return None
        loss = statistics.fmean(losses[method]) - statistics.fmean(base)
        rates = [tuned[name][0]["learning_rate"] for name in (method, baseline)]
        return Difference(
            loss=loss if math.isfinite(loss) else None,
            standard_error=standard_error(losses[method], base),
            least=least_difference(losses[method], base),
            z=z_score(losses[method], base),
            learning_rate_ratio=rates[0] / rates[1],
            speed_up=_ratio(reached[baseline], reached[method]),
        )

    summaries = [
        Summary(
            run=runs[0],
            seeds=tuple(run["seed"] for run in runs),
            losses=tuple(losses[method]),
            difference=difference(method),
            steps_to_target=reached[method],
            step_seconds=_median(run["step_seconds"] for run in runs),
            step_cpu_seconds=_median(run["step_cpu_seconds"] for run in runs),
            settings=len({_setting(run) for run in methods[method]}),
            left_out=sum(run["tuned"] for run in methods[method]) - len(runs),
            on_front=on_front,
            curve=curves[method],
            sensitivity=sensitivity(methods[method], like=runs[0]),
        )
        for (method, runs), on_front in zip(tuned.items(), front, strict=True)
    ]
    return sorted(summaries, key=lambda summary: summary.loss)


def tuned_runs(methods: Mapping[str, Sequence[Run]]) -> dict[str, list[Run]]:
    """Returns the tuned runs of each method with its last setting, in the order of their seeds."""
    found = {}
    for method, runs in methods.items():
        if tuned := [run for run in runs if run["tuned"]]:
            last = _setting(tuned[-1]), tuned[-1]["steps"]
            counted = [run for run in tuned if (_setting(run), run["steps"]) == last]
            found[method] = sorted(counted, key=lambda run: run["seed"])
    return found


def _setting(run: Run) -> str:
    return _values(run, ("learning_rate", *OPTIONS))


def _values(run: Run, fields: Iterable[str]) -> str:
    return json.dumps([run.get(name) for name in fields], sort_keys=True)


def mean_curve(runs: Sequence[Run]) -> tuple[tuple[float, float], ...]:
    """Steps and mean validation losses of runs, where all of them were evaluated.

    The last point is the mean of their final losses.
    """
    curves = [{step: finite_loss(x) for step, x in run["val_losses"]} for run in runs]
    for curve, run in zip(curves, runs, strict=True):
        curve[run["steps"]] = loss_of(run)
    steps = sorted(set.intersection(*map(set, curves)))
    return tuple((step, statistics.fmean(curve[step] for curve in curves)) for step in steps)


def sensitivity(runs: Sequence[Run], like: Run) -> tuple[tuple[float, float], ...]:
    """Learning rates and losses of runs that differ in nothing else.

    They have the seed and options with which most rates were tried; if several have as many, the
    options of the run `like`.

    Args:
        runs: All runs of a method in an experiment.
        like: A run at the tuned setting.
    """
    groups: dict[str, dict[float, float]] = {}
    for run in sorted(runs, key=lambda run: _values(run, OPTIONS) != _values(like, OPTIONS)):
        key = _values(run, (*OPTIONS, "seed"))
        groups.setdefault(key, {})[run["learning_rate"]] = loss_of(run)
    return tuple(sorted(max(groups.values(), key=len).items()))


def rate_range(points: Sequence[tuple[float, float]]) -> RateRange | None:
    """Finds the learning rates around the best one whose losses are nearly as low.

    Between two rates the loss is taken to be linear in the logarithm of the rate.

    Args:
        points: Learning rates and losses, such as of `sensitivity`.

    Returns:
        The range; None if all runs diverged, or fewer than two rates were tried.

    Example:
        >>> rate_range([(0.5, 2.04), (1, 2.0), (2, 2.01), (4, 2.04)])
        RateRange(low=0.707..., high=2.519..., whole=True)
        >>> rate_range([(1, 2.0), (2, 2.01)]).whole
        False

    """
    points = sorted(points)
    best, least = min(points, key=lambda point: point[1], default=(0.0, math.inf))
    if not math.isfinite(least) or len(points) < 2:
        return None
    limit = least + TOLERANCE * abs(least)
    at = next(i for i, point in enumerate(points) if point[0] == best)
    low, low_ends = _last_within(points[at::-1], limit)
    high, high_ends = _last_within(points[at:], limit)
    return RateRange(low / best, high / best, low_ends and high_ends)


def _last_within(points: Sequence[tuple[float, float]], limit: float) -> tuple[float, bool]:
    """The rate where the loss first comes above a limit, and whether it does."""
    for (rate, loss), (next_rate, next_loss) in itertools.pairwise(points):
        if next_loss > limit:
            share = (limit - loss) / (next_loss - loss)  # 0 if the next one diverged
            return rate * (next_rate / rate) ** share, True
    return points[-1][0], False


def standard_error(losses: Sequence[float], baseline: Sequence[float]) -> float | None:
    """The standard error of the difference of two means; None if it cannot be known.

    The variance over seeds of both is pooled.

    Example:
        >>> round(standard_error([1.0, 1.1, 0.9], [1.2, 1.3, 1.1]), 3)
        0.082

    """
    seeds = len(losses), len(baseline)
    if min(seeds) < 2 or not all(map(math.isfinite, (*losses, *baseline))):
        return None
    squares = sum((len(x) - 1) * statistics.variance(x) for x in (losses, baseline))
    return math.sqrt(squares / (sum(seeds) - 2) * (1 / seeds[0] + 1 / seeds[1]))


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None or not b else a / b


def _median(values: Iterable[float | None]) -> float | None:
    """The median of the values that are known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
