"""Pictures of compared optimizers: loss against state, loss against tokens, learning rates."""

import io
import itertools
import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memopt.comparison.analysis import PROBABILITY, Summary, Unfinished, Verdict, same_experiment
from memopt.comparison.labels import NamedPoint, name_ends, name_points
from memopt.comparison.rows import BASELINE
from memopt.comparison.words import experiment_name, short_count, short_name
from memopt.training.writing import write_whole

#: Okabe and Ito's colours, which colour-blind people can tell apart (https://jfly.uni-koeln.de/color).
COLORS: dict[Verdict, str] = {
    "better": "#0072B2",
    "no difference": "#666666",
    "worse": "#D55E00",
    "unknown": "#CC79A7",
}
MEANING: dict[Verdict, str] = {
    "better": f"less loss than {BASELINE}",
    "no difference": f"no difference from {BASELINE} at p < {PROBABILITY:g}",
    "worse": f"more loss than {BASELINE}",
    "unknown": "too few seeds to decide",
}

#: Less state than so many bytes a parameter is drawn as none.
LEAST_STATE = 0.01

#: Ticks of bytes a parameter: a float32 number has 4.
STATE_TICKS = (0.01, 0.03, 0.1, 0.3, 1, 2, 4, 8, 16, 32, 64)

#: The part of the learning rates' picture that is shown: nats above the least loss, and factors of
#: two from the best rate.
HIGHEST, FARTHEST = 0.2, 3


def plot_front(
    groups: Sequence[Sequence[Summary]],
    image: Path,
    *,
    missing: Sequence[Unfinished] = (),
) -> None:
    """Draws validation loss against bytes of optimizer state, with the Pareto front.

    State of under a hundredth of a byte a parameter stands left of a break in the axis. Bars are
    standard deviations over seeds. Methods far above the others are named below with their loss.

    Args:
        groups: The summaries, as of `summarize`.
        image: The PNG to write.
        missing: Methods that are not finished; they are named below.
    """
    figure, rows = _figure([7.0] * len(groups), width=11)
    named = []
    for axes, summaries in zip(rows, groups, strict=True):
        axes.set_title(_title(summaries, groups), loc="left")
        axes.set_ylabel("validation loss (nats)")
        finite = [s for s in summaries if math.isfinite(s.loss)]
        top = _top_of_front(finite) if finite else math.inf
        shown = [s for s in finite if s.loss <= top]
        notes = {
            "Above this picture": [f"{s.label} {s.loss:.2f}" for s in finite if s.loss > top],
            "Diverged": [s.label for s in summaries if s not in finite],
            "Not finished": [
                short_name(one.run["method"])
                for one in missing
                if same_experiment(one.run, summaries[0].run)
            ],
        }
        lines = ["bytes of optimizer state a parameter"]
        lines += [
            textwrap.fill(f"{word}: {', '.join(names)}.", 130)
            for word, names in notes.items()
            if names
        ]
        axes.set_xlabel("\n".join(lines))
        if shown:
            named.append((axes, _draw_front(axes, shown)))
    _add_legend(figure)
    figure.draw_without_rendering()  # decides where the axes are
    figure.set_layout_engine("none")
    for axes, points in named:
        name_points(axes, points)
    _save(figure, image)


def plot_curves(groups: Sequence[Sequence[Summary]], image: Path) -> None:
    """Draws the validation loss of each method against tokens, from a tenth of the run on.

    The baseline is black. Rows at the setting of another one, such as those with fewer bits, are
    left out.

    Args:
        groups: The summaries, as of `summarize`.
        image: The PNG to write.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator

    drawn = [[s for s in group if math.isfinite(s.loss) and s.is_exact] for group in groups]
    figure, rows = _figure([max(5.0, 1.5 + 0.14 * len(group)) for group in drawn], width=10)
    named = []
    for axes, summaries, group in zip(rows, groups, drawn, strict=True):
        ends, starts = [], []
        for i, s in enumerate(group):
            curve = [(at, x) for at, x in s.curve if at >= s.run["steps"] / 10 and x < math.inf]
            is_baseline = s.method == BASELINE
            bright = colormaps["turbo"](0.05 + 0.9 * i / len(group))[:3]
            color = "black" if is_baseline else tuple(0.8 * x for x in bright)
            tokens = [step * s.run["tokens"] / s.run["steps"] for step, _ in curve]
            losses = [x for _, x in curve]
            style = {"linewidth": 2.2, "zorder": 3} if is_baseline else {"linewidth": 1.2}
            axes.plot(tokens, losses, color=color, **style)
            ends.append((losses[-1], s.label, color))
            starts.append(losses[0])
        axes.set_title(_title(summaries, groups), loc="left")
        axes.set(xlabel="tokens", ylabel="validation loss (nats)", xscale="log")
        axes.margins(x=0)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda count, _: short_count(count))
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        if ends:
            low = min(ends)[0]
            whole = [x for x, (_, name, _) in zip(starts, ends, strict=True) if name == BASELINE]
            top = max(statistics.median(starts), *whole, _top_of_front(group))
            margin = 0.03 * (top - low) or 0.05
            axes.set_ylim(low - margin, top + margin)
        named.append((axes, ends))
    figure.draw_without_rendering()
    for axes, ends in named:
        name_ends(axes, ends)
    _save(figure, image)


def plot_sensitivity(groups: Sequence[Sequence[Summary]], image: Path) -> None:
    """Draws the loss above each method's least one against its learning rate over its best one.

    The baseline's curve is pale behind every other one. Methods of which fewer than two rates were
    tried, such as those at the setting of another one, are left out.

    Args:
        groups: The summaries, as of `summarize`.
        image: The PNG to write.
    """
    from matplotlib.figure import Figure

    curves = [
        {s.label: points for s in group if len(points := _relative(s.sensitivity)) > 1}
        for group in groups
    ]
    methods = list(dict.fromkeys(itertools.chain([BASELINE], *curves)))
    columns = min(5, len(methods))
    rows = math.ceil(len(methods) / columns)
    figure = Figure(figsize=(2.2 * columns + 0.6, 1.8 * rows + 1), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
    for method, axes in itertools.zip_longest(methods, grid.flat):
        if method is None:
            axes.set_visible(False)
            continue
        for summaries, of, color in zip(groups, curves, itertools.cycle(colors), strict=False):
            title = _title(summaries, groups)
            behind, points = of.get(BASELINE, []), of.get(method, [])
            if method != BASELINE and behind:
                axes.plot(*zip(*behind, strict=True), color=color, alpha=0.25, linewidth=4)
            style: dict[str, Any] = {"color": color, "markersize": 3, "linewidth": 1.3}
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=title, **style)
            lost = [rate for rate, loss in points if loss == math.inf]
            axes.plot(lost, [0.95 * HIGHEST] * len(lost), "x", color=color, label="diverged")
        axes.set_title(method, fontsize=9)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    first = grid[0, 0]
    first.set_ylim(-0.02 * HIGHEST, HIGHEST)
    first.set_xlim(2.0 ** -(FARTHEST + 0.3), 2.0 ** (FARTHEST + 0.3))
    exponents = range(-FARTHEST, FARTHEST + 1)
    first.set_xticks(
        [2.0**n for n in exponents], [f"1/{2**-n}" if n < 0 else 2**n for n in exponents]
    )
    figure.supxlabel(f"learning rate, divided by the best one (pale: {BASELINE})", fontsize=10)
    figure.supylabel("loss above the least (nats)", fontsize=10)
    _add_legend(figure, columns=1 if columns < 4 else 2)
    _save(figure, image)


def _draw_front(axes: Any, shown: Sequence[Summary]) -> list[NamedPoint]:
    """Draws points and front; returns the names of the points."""
    axes.set_xscale("log")
    state = lambda s: s.state_bytes_per_parameter
    stored = [state(s) for s in shown if state(s) >= LEAST_STATE]
    high = 2.5 * max(stored, default=1.0)
    place, broken = LEAST_STATE / 3, len(stored) < len(shown)  # place of those without state
    low = 0.6 * place if broken else min(stored) / 1.6
    x = lambda s: state(s) if state(s) >= LEAST_STATE else place
    front = sorted((s for s in shown if s.on_front), key=lambda s: (state(s), s.loss))
    axes.step(
        [*map(x, front), high],
        [*(s.loss for s in front), front[-1].loss],
        where="post",
        color="#56B4E9",
        alpha=0.5,
        linewidth=5,
        solid_capstyle="butt",
        zorder=1,
        label="Pareto front",
    )
    points = []
    for s in sorted(shown, key=lambda s: [*COLORS].index(s.verdict)):
        base = s.method == BASELINE
        color = "black" if base else COLORS[s.verdict]
        style: dict[str, Any] = {
            "label": BASELINE if base else MEANING[s.verdict],
            "markerfacecolor": color if s.on_front or base else "white",
        }
        bars = {"elinewidth": 1, "capsize": 2}
        axes.errorbar(x(s), s.loss, s.spread, fmt="o", color=color, ms=6, zorder=3, **bars, **style)
        points.append(NamedPoint(x(s), s.loss, s.label, color, s.on_front or base))
        if base:
            axes.axhline(s.loss, color="black", linewidth=0.8, linestyle=":", zorder=1)
    ticks = [tick for tick in STATE_TICKS if low < tick <= high]
    names = [f"{tick:g}" for tick in ticks]
    if broken:
        ticks, names = [place, *ticks], [f"under {LEAST_STATE:g}", *names]
        gap = {"transform": axes.get_xaxis_transform(), "clip_on": False, "color": "black"}
        for start in (0.6, 0.65):  # two strokes through the axis: it is not to scale here
            ends = [start * LEAST_STATE, 1.1 * start * LEAST_STATE]
            axes.plot(ends, [-0.012, 0.012], linewidth=1, **gap)
    axes.set_xticks(ticks, names)
    axes.minorticks_off()
    axes.set_xlim(low, high)
    axes.grid(alpha=0.25)
    return points


def _top_of_front(shown: Sequence[Summary]) -> float:
    """The highest loss that is shown: not those far above most others."""
    losses = [s.loss for s in shown]
    low, median = min(losses), statistics.median(losses)
    least = [s.loss for s in shown if s.method == BASELINE]
    return max([*least, low + 2.5 * max(median - low, 0.02)])


def _relative(sensitivity: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points with rates over the best rate and losses above the least loss."""
    best, least = min(sensitivity, key=lambda point: point[1])
    return [(rate / best, loss - least) for rate, loss in sensitivity] if least < math.inf else []


def _title(summaries: Sequence[Summary], groups: Sequence[Sequence[Summary]]) -> str:
    return experiment_name(summaries[0].run, among=[s.run for group in groups for s in group])


def _add_legend(figure: Any, columns: int = 3) -> None:
    """Adds one legend for all axes, above them."""
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in handles and len(getattr(handle, "get_xdata", lambda: [0])()):
                handles[label] = handle
    if handles:
        place = {"loc": "outside upper left", "ncols": columns, "fontsize": 8, "frameon": False}
        figure.legend(handles.values(), handles.keys(), **place)


def _figure(heights: Sequence[float], width: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(width, sum(heights)), dpi=150, layout="constrained")
    axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights)
    return figure, axes[:, 0]


def _save(figure: Any, image: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    write_whole(image, drawn.getvalue())
