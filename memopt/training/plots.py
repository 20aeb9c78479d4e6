"""Draws curves as PNG files."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from memopt.training.writing import write_whole

#: The x and y of each point of a curve, and how Matplotlib draws it.
Curve = tuple[ArrayLike, ArrayLike, dict[str, Any]]

#: Curves whose legend fits between them; that of more is beside the plot.
FEW, BESIDE = 4, {"loc": "center left", "bbox_to_anchor": (1, 0.5)}


def plot_curves(curves: Mapping[str, Curve], image: Path, *, x: str, y: str) -> None:
    """Draws curves into one plot, as a PNG.

    Args:
        curves: The curves by their labels.
        image: The file to write.
        x: What the x axis shows.
        y: What the y axis shows.

    Raises:
        OSError: It cannot be written; a plot that was there before stays.
    """
    plot_panels({y: curves}, image, x=x)


def plot_panels(
    panels: Mapping[str, Mapping[str, Curve]], image: Path, *, x: str, log: bool = False
) -> None:
    """Draws curves into plots one below the other, as one PNG.

    Args:
        panels: The curves of each plot, by what its y axis shows.
        image: The file to write.
        x: Title of the x axes.
        log: Whether the y axes are logarithmic.

    Raises:
        OSError: It cannot be written; a plot that was there before stays.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(7, 4 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), squeeze=False)
    for (y, curves), axes in zip(panels.items(), rows[:, 0], strict=True):
        for i, (label, (xs, ys, style)) in enumerate(curves.items()):
            axes.plot(xs, ys, label=label, **line_style(i) | style)
        axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
        axes.grid(alpha=0.3)
        axes.legend(**(BESIDE if len(curves) > FEW else {}))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    write_whole(image, drawn.getvalue())


def line_style(i: int) -> dict[str, Any]:
    """Returns color and dashes of the i-th of up to 30 curves, which are told apart by them.

    Example:
        >>> line_style(0), line_style(11)
        ({'color': 'C0', 'linestyle': '-'}, {'color': 'C1', 'linestyle': '--'})
        >>> len({tuple(line_style(i).values()) for i in range(30)})
        30
    """
    return {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
