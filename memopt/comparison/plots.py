"""Pictures of compared optimizers: loss against state, loss against tokens, learning rates."""

import io
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memopt.comparison.analysis import Summary, Verdict
from memopt.comparison.rows import BASELINE
from memopt.training.writing import write_whole

#: Okabe and Ito's colours, which colour-blind people can tell apart (https://jfly.uni-koeln.de/color).
COLORS: dict[Verdict, str] = {
    "better": "#0072B2",
    "same": "#666666",
    "worse": "#D55E00",
    "unknown": "#CC79A7",
}
#: Left, bottom, right and top in pixels.
Box = tuple[float, float, float, float]

#: The highest loss above the least that the picture of learning rates shows, in nats.
HIGHEST = 0.3

MEANING: dict[Verdict, str] = {
    "better": "less loss than {}",
    "same": "not told apart from {}",
    "worse": "more loss than {}",
    "unknown": "too few seeds to decide",
}


def plot_front(sizes: Sequence[Sequence[Summary]], image: Path, baseline: str = BASELINE) -> None:
    """Draws validation loss against bytes of optimizer state, with the Pareto front.

    State of zero bytes stands left of a break in the logarithmic axis. Points far above the others
    stand at the upper edge with their loss.

    Args:
        sizes: The summaries of each size.
        image: The PNG to write.
        baseline: The method whose loss is marked.
    """
    figure, rows = _figure(len(sizes), width=11, height=6.5)
    labels = []
    for axes, summaries in zip(rows, sizes, strict=True):
        shown = [s for s in summaries if math.isfinite(s.loss)]
        axes.set_title(f"{_title(summaries)}: loss against optimizer state", loc="left")
        axes.set(xlabel="bytes of optimizer state", ylabel="validation loss (nats)")
        if shown:
            labels.append((axes, _draw_front(axes, shown, baseline)))
        _note_diverged(axes, summaries)
    figure.draw_without_rendering()  # decides where the axes are
    figure.set_layout_engine("none")
    for axes, points in labels:
        _place_labels(axes, points)
    _save(figure, image)


def plot_curves(sizes: Sequence[Sequence[Summary]], image: Path, baseline: str = BASELINE) -> None:
    """Draws the validation loss of each method against tokens, from a tenth of the run on.

    Args:
        sizes: The summaries of each size.
        image: The PNG to write.
        baseline: The method drawn in black.
    """
    from matplotlib import colormaps

    figure, rows = _figure(len(sizes), width=10, height=6.5)
    labels = []
    for axes, summaries in zip(rows, sizes, strict=True):
        drawn = [s for s in summaries if math.isfinite(s.loss)]
        ends = []
        for i, s in enumerate(drawn):
            curve = [(step, x) for step, x in s.curve if step >= s.steps / 10 and math.isfinite(x)]
            at_baseline = s.method == baseline
            color = "black" if at_baseline else colormaps["turbo"](0.05 + 0.9 * i / len(drawn))
            style: dict[str, Any] = {"color": color, "linewidth": 2.2 if at_baseline else 1.2}
            tokens = [step * s.tokens / s.steps for step, _ in curve]
            axes.plot(tokens, [x for _, x in curve], **style)
            ends.append((curve[-1][1], s.method, color))
        axes.set_title(f"{_title(summaries)}: loss against tokens", loc="left")
        axes.set(xlabel="tokens", ylabel="validation loss (nats)")
        axes.xaxis.set_major_formatter(lambda count, _: short_count(count))
        axes.grid(alpha=0.25)
        axes.margins(x=0)
        if drawn:
            _crop(axes, [s.loss for s in drawn], [x for s in drawn for _, x in s.curve[-1:]])
        labels.append((axes, ends))
    figure.draw_without_rendering()
    for axes, ends in labels:
        _label_ends(axes, ends)
    _save(figure, image)


def plot_sensitivity(
    sizes: Sequence[Sequence[Summary]], image: Path, baseline: str = BASELINE
) -> None:
    """Draws the loss above each method's least one against its learning rate over its best one.

    Args:
        sizes: The summaries of each size.
        image: The PNG to write.
        baseline: The method drawn in grey behind every other one.
    """
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(s.method for summaries in sizes for s in summaries))
    columns = min(6, max(1, len(methods)))
    rows = max(1, math.ceil(len(methods) / columns))
    figure = Figure(figsize=(2.1 * columns + 0.6, 1.7 * rows + 1), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for method, axes in itertools.zip_longest(methods, grid.flat):
        if method is None:
            axes.set_visible(False)
            continue
        for i, summaries in enumerate(sizes):
            for s in summaries:
                points = [p for p in _relative(s.sensitivity) if math.isfinite(p[1])]
                if points and s.method == baseline:
                    axes.plot(*zip(*points, strict=True), color="0.8", linewidth=3, zorder=1)
                if points and s.method == method:
                    style = {"color": ("#0072B2", "#D55E00", "#009E73")[i % 3], "markersize": 3}
                    axes.plot(*zip(*points, strict=True), "o-", label=_title(summaries), **style)
                    lost = [rate for rate, loss in _relative(s.sensitivity) if loss == math.inf]
                    axes.plot(lost, [0.96 * HIGHEST] * len(lost), "x", color=style["color"])
        axes.set_title(method, fontsize=8)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylim(-0.02, HIGHEST)
    figure.supxlabel(f"learning rate / best learning rate (grey: {baseline}; ×: diverged)")
    figure.supylabel("loss above the least (nats)")
    handles = {
        label: h for a in grid.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3)
    _save(figure, image)


def _draw_front(
    axes: Any, shown: Sequence[Summary], baseline: str
) -> list[tuple[float, float, str, str, bool]]:
    """Draws points and front; returns x, y, label, color and weight of the labels."""
    axes.set_xscale("log")
    stored = [s.state_bytes for s in shown if s.state_bytes]
    low, high = min(stored, default=1), max(stored, default=1)
    zero = low / 10  # where no bytes are drawn, one decade left of the fewest
    x = lambda s: s.state_bytes or zero
    top = _crop(axes, [s.loss for s in shown], [s.loss + (s.spread or 0) for s in shown])
    height = top - axes.get_ylim()[0]
    axes.set_xlim(zero / 2 if len(stored) < len(shown) else low / 2, high * 4)

    front = sorted((s for s in shown if s.on_front), key=lambda s: (s.state_bytes, s.loss))
    axes.step(
        [*map(x, front), high * 4],
        [*(s.loss for s in front), front[-1].loss],
        where="post",
        color="#0072B2",
        alpha=0.25,
        linewidth=6,
        solid_capstyle="butt",
        zorder=1,
        label="Pareto front",
    )
    for s in shown:
        if s.method == baseline:
            axes.axhline(s.loss, color="black", linewidth=0.8, linestyle=":", zorder=1)
    labels = []
    for s in shown:
        base = s.method == baseline
        color = "black" if base else COLORS[s.verdict]
        y, marker, name = s.loss, "o", s.method
        if s.loss > top:
            above = sum(
                other.state_bytes == s.state_bytes for other in shown if top < other.loss < s.loss
            )
            y, marker, name = (
                top - (1 + 3 * above) * height / 100,
                "^",
                f"{s.method} ({s.loss:.2f})",
            )
        elif s.spread:
            axes.errorbar(x(s), y, s.spread, color=color, alpha=0.5, linewidth=1, zorder=2)
        face = color if s.on_front or base else "white"
        axes.plot(x(s), y, marker, color=color, markerfacecolor=face, markersize=6, zorder=3)
        labels.append((x(s), y, name, color, s.on_front or base))
    for verdict in dict.fromkeys(s.verdict for s in shown if s.method != baseline):
        axes.plot([], [], "o", color=COLORS[verdict], label=MEANING[verdict].format(baseline))

    weights = shown[0].parameter_bytes
    axes.axvline(weights, color="0.6", linewidth=0.8, linestyle="--", zorder=1)
    note = {"rotation": 90, "va": "top", "ha": "right", "fontsize": 7, "color": "0.4"}
    axes.text(
        weights, 0.985, "as many as the parameters", transform=axes.get_xaxis_transform(), **note
    )
    _set_byte_ticks(axes, low, high, zero if len(stored) < len(shown) else None)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left", fontsize=8, framealpha=0.9)
    return labels


def _set_byte_ticks(axes: Any, low: float, high: float, zero: float | None) -> None:
    """Labels a logarithmic axis of bytes.

    Args:
        axes: The axes.
        low: The fewest bytes above zero.
        high: The most bytes.
        zero: The place of no bytes, left of a break in the axis; None if there is none.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.xaxis.set_major_locator(LogLocator(numticks=20))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda b, _: short_bytes(b) if b >= low / 9 else "")
    )
    axes.minorticks_off()
    if zero is not None:
        ticks = [b for b in axes.get_xticks() if low * 0.3 <= b <= high * 4]
        axes.set_xticks([zero, *ticks], ["0", *map(short_bytes, ticks)])
        gap = {"transform": axes.get_xaxis_transform(), "clip_on": False, "color": "black"}
        for shift in (1, 1.25):  # two strokes through the axis: it is not to scale here
            axes.plot([zero * 2.1 * shift, zero * 2.4 * shift], [-0.012, 0.012], linewidth=1, **gap)


def short_bytes(count: float) -> str:
    """Bytes in few characters, in decimal units.

    Example:
        >>> short_bytes(0), short_bytes(1e4), short_bytes(1.5e9)
        ('0', '10 kB', '1.5 GB')

    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{float(f'{count / unit:.3g}'):g} {name}"
    return f"{count:.0f} B" if count else "0"


def _place_labels(axes: Any, points: Sequence[tuple[float, float, str, str, bool]]) -> None:
    """Writes each label near its point, where it covers no other label and no point."""
    from matplotlib.patheffects import withStroke

    places = [axes.transData.transform(point[:2]) for point in points]
    scale = axes.figure.dpi / 72
    taken = [(px - 4 * scale, py - 4 * scale, px + 4 * scale, py + 4 * scale) for px, py in places]
    frame = axes.get_window_extent()
    legend = axes.get_legend().get_window_extent()
    taken.append((legend.x0, legend.y0, legend.x1, legend.y1))
    for (px, py), (*_, name, color, strong) in sorted(
        zip(places, points, strict=True), key=lambda item: -item[0][1]
    ):
        weight = "bold" if strong else "normal"
        text = axes.text(0, 0, name, color=color, fontsize=8, weight=weight, zorder=4)
        size = text.get_window_extent()
        half = size.width / 2, size.height / 2

        def box(radius: float, angle: float, at: Any = (px, py), half: Any = half) -> Box:
            cx = at[0] + (radius + half[0]) * math.cos(angle)
            cy = at[1] + (radius + half[1]) * math.sin(angle)
            return cx - half[0], cy - half[1], cx + half[0], cy + half[1]

        def cost(radius: float, angle: float) -> float:
            left, bottom, right, top = candidate = box(radius, angle)
            outside = max(0, frame.x0 - left, right - frame.x1, frame.y0 - bottom, top - frame.y1)
            return radius + 10 * outside + sum(_overlap(candidate, other) for other in taken)

        angles = [math.tau * k / 16 for k in range(16)]
        radius, angle = min(
            itertools.product([6 * scale * k for k in (1, 2, 3, 5, 7, 10, 14, 20)], angles),
            key=lambda place: cost(*place),
        )
        chosen = box(radius, angle)
        taken.append(chosen)
        text.remove()
        middle = ((chosen[0] + chosen[2]) / 2, (chosen[1] + chosen[3]) / 2)
        axes.annotate(
            name,
            xy=(px, py),
            xytext=middle,
            xycoords="figure pixels",
            textcoords="figure pixels",
            color=color,
            fontsize=8,
            weight=weight,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            ha="center",
            va="center",
            zorder=4,
            arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.4, "linewidth": 0.7}
            if radius > 12 * scale
            else None,
        )


def _overlap(a: Box, b: Box) -> float:
    """The area, in pixels, that two boxes share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _label_ends(axes: Any, ends: Sequence[tuple[float, str, Any]]) -> None:
    """Writes the names of curves right of the axes, one below the other, in the curves' order."""
    low, high = axes.get_ylim()
    height = 9 / 72 * axes.figure.dpi / axes.get_window_extent().height  # of a line of text
    ends = sorted(ends, key=lambda end: end[0])
    at = [min(1.0, (y - low) / (high - low)) for y, *_ in ends]
    upwards = list(itertools.accumulate(at, lambda last, place: max(place, last + height)))
    downwards = itertools.accumulate(at[::-1], lambda last, place: min(place, last - height))
    for (_, name, color), place, up, down in zip(
        ends, at, upwards, [*downwards][::-1], strict=True
    ):
        axes.annotate(
            name,
            xy=(1, place),
            xytext=(1.04, (up + down) / 2),
            xycoords="axes fraction",
            color=color,
            fontsize=7,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7, "relpos": (0, 0.5)},
        )


def _relative(sensitivity: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points with rates over the best rate and losses above the least loss."""
    best, least = min(sensitivity, key=lambda point: point[1])
    return [(rate / best, loss - least) for rate, loss in sensitivity] if least < math.inf else []


def _crop(axes: Any, losses: Sequence[float], highest: Sequence[float]) -> float:
    """Limits the y axis to where most points are; returns the upper limit."""
    low, median = min(losses), statistics.median(losses)
    top = min(max(highest), low + 2.5 * max(median - low, 0.02))
    margin = 0.05 * (top - low) or 0.05
    axes.set_ylim(low - margin, top + margin)
    return top + margin


def _note_diverged(axes: Any, summaries: Sequence[Summary]) -> None:
    diverged = [s.method for s in summaries if not math.isfinite(s.loss)]
    if diverged:
        place = {"transform": axes.transAxes, "ha": "right", "va": "bottom", "fontsize": 8}
        axes.text(1, 1.01, f"diverged: {', '.join(diverged)}", color=COLORS["worse"], **place)


def _title(summaries: Sequence[Summary]) -> str:
    first = summaries[0]
    return f"{first.size} parameters, {short_count(first.tokens)} tokens"


def short_count(count: float) -> str:
    """A count in few characters.

    Example:
        >>> short_count(512), short_count(2_457_600)
        ('512', '2.46M')

    """
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"


def _figure(rows: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(width, height * rows), dpi=150, layout="constrained")
    return figure, figure.subplots(rows, squeeze=False)[:, 0]


def _save(figure: Any, image: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    write_whole(image, drawn.getvalue())
