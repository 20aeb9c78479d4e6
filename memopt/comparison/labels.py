"""Places the names of points and curves in a picture, so that they cover nothing."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

#: Left, bottom, right and top in pixels.
Box = tuple[float, float, float, float]


class NamedPoint(NamedTuple):
    """A point with its name.

    Attributes:
        x: Where it is, in data coordinates.
        y: Likewise.
        name: The name.
        color: Color of the name.
        strong: Whether the name is bold.
    """

    x: float
    y: float
    name: str
    color: str
    strong: bool


def name_points(axes: Any, points: Sequence[NamedPoint]) -> None:
    """Writes each name near its point, where it covers no other name and no point.

    Args:
        axes: The axes, which must not be laid out again.
        points: The points.
    """
    from matplotlib.patheffects import withStroke

    places = [axes.transData.transform((point.x, point.y)) for point in points]
    scale = axes.figure.dpi / 72
    taken = [(px - 4 * scale, py - 4 * scale, px + 4 * scale, py + 4 * scale) for px, py in places]
    frame = axes.get_window_extent()
    for (px, py), point in sorted(zip(places, points, strict=True), key=lambda item: -item[0][1]):
        style = {
            "color": point.color,
            "fontsize": 8,
            "weight": "bold" if point.strong else "normal",
            "zorder": 4,
        }
        text = axes.text(0, 0, point.name, **style)
        size = text.get_window_extent()
        text.remove()
        half = size.width / 2, size.height / 2

        def box(radius: float, angle: float, at: Any = (px, py), half: Any = half) -> Box:
            cx = at[0] + (radius + half[0]) * math.cos(angle)
            cy = at[1] + (radius + half[1]) * math.sin(angle)
            return cx - half[0], cy - half[1], cx + half[0], cy + half[1]

        def cost(radius: float, angle: float) -> float:
            left, bottom, right, top = candidate = box(radius, angle)
            outside = max(0, frame.x0 - left, right - frame.x1, frame.y0 - bottom, top - frame.y1)
            return radius + 100 * outside + sum(_overlap(candidate, other) for other in taken)

        angles = [math.tau * k / 16 for k in range(16)]
        radius, angle = min(
            itertools.product([6 * scale * k for k in (1, 2, 3, 5, 7, 10, 14, 20)], angles),
            key=lambda place: cost(*place),
        )
        chosen = box(radius, angle)
        taken.append(chosen)
        line = {"arrowstyle": "-", "color": point.color, "alpha": 0.4, "linewidth": 0.7}
        axes.annotate(
            point.name,
            xy=(px, py),
            xytext=((chosen[0] + chosen[2]) / 2, (chosen[1] + chosen[3]) / 2),
            xycoords="figure pixels",
            textcoords="figure pixels",
            ha="center",
            va="center",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops=line if radius > 12 * scale else None,
            **style,
        )


def name_ends(axes: Any, ends: Sequence[tuple[float, str, Any]]) -> None:
    """Writes the names of curves right of the axes, one below the other, in the curves' order.

    Args:
        axes: The axes, which must not be laid out again.
        ends: Height of the end, in data coordinates, name and color of each curve.
    """
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


def _overlap(a: Box, b: Box) -> float:
    """The area, in pixels, that two boxes share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0
