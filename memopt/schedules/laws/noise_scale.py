"""Gradient noise scale: the batch whose gradient is as much noise as signal."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memopt.errors import check_at_least


class NoiseScale(NamedTuple):
    """Noise and signal in gradients; `trace` and `square` are unbiased, and may be negative.

    Attributes:
        trace: Trace of the covariance of one row's gradient, tr Σ.
        square: Square of the true gradient, ‖G‖².
        batch: Simple noise scale tr Σ / ‖G‖², in rows: infinite if `square` is not above zero,
            which says that the noise hides the gradient; not a number if `trace` is negative too.
    """

    trace: float
    square: float
    batch: float


def noise_scale(
    micro_square: float, square: float, micro_rows: int, micro_batches: int
) -> NoiseScale:
    """Estimates the noise scale from the gradients of micro-batches and of the whole batch.

    With micro-batches of b rows, k of them, E‖g_j‖² = ‖G‖² + tr Σ / b and
    E‖ḡ‖² = ‖G‖² + tr Σ / (k b), which gives both. Both are linear in the arguments: to average over
    steps, average the arguments, since the mean of ratios is biased. The trace equals the sample
    variance of the micro-batches' gradients, times b.

    Range: no constant is in it. It needs rows that are drawn independently: consecutive rows of one
    long document are alike, which makes the noise of micro-batches of several rows larger. The
    scale is that of SGD in parameters as they are; Adam's is of the same order, not equal
    (McCandlish et al., section 5). One batch says little: average over tens.

    Args:
        micro_square: Mean of the squared norms of the micro-batches' gradients.
        square: Squared norm of the mean of those gradients.
        micro_rows: Rows of a micro-batch.
        micro_batches: How many there are, 2 or more.

    Raises:
        ValueError: There are too few rows or micro-batches.

    References:
        McCandlish et al., An Empirical Model of Large-Batch Training, 2018,
        https://arxiv.org/abs/1812.06162, appendix A.1.

    Example:
        >>> noise_scale(5.0, 2.0, micro_rows=2, micro_batches=4)
        NoiseScale(trace=8.0, square=1.0, batch=8.0)
    """
    check_at_least("micro_rows", micro_rows, 1)
    check_at_least("micro_batches", micro_batches, 2)
    trace = micro_rows * micro_batches * (micro_square - square) / (micro_batches - 1)
    return _noise_scale(trace, (micro_batches * square - micro_square) / (micro_batches - 1))


def noise_scale_by_sizes(rows: Sequence[int], squares: Sequence[float]) -> NoiseScale:
    """Estimates the noise scale from gradients of batches of several sizes.

    E‖g_n‖² = ‖G‖² + tr Σ / n of n rows is a line in 1/n, fitted here by least squares. Means over
    2, 4, 8 … of the micro-batches of one step are such batches. With two sizes it is `noise_scale`;
    with more, an answer far from that one says that the squares are on no line, because rows are
    not independent.

    Args:
        rows: Rows of each batch; two different sizes or more.
        squares: Mean squared norm of the gradients of batches of that size.

    Raises:
        ValueError: There are not two sizes, or not as many squares.

    References:
        McCandlish et al., 2018, https://arxiv.org/abs/1812.06162, equation A.1.

    Example:
        >>> [round(x, 6) for x in noise_scale_by_sizes([2, 8], [5.0, 2.0])]
        [8.0, 1.0, 8.0]
    """
    if len(rows) != len(squares) or len({*rows}) < 2:
        raise ValueError(
            f"rows must have two sizes or more, each with its squared norm, got {len({*rows})} "
            f"sizes in {len(rows)} batches and {len(squares)} squared norms."
        )
    inverse = 1 / np.asarray(rows, float)
    design = np.stack([inverse, np.ones_like(inverse)], axis=1)
    (trace, square), *_ = np.linalg.lstsq(design, np.asarray(squares, float), rcond=None)
    return _noise_scale(float(trace), float(square))


def _noise_scale(trace: float, square: float) -> NoiseScale:
    if square > 0:
        return NoiseScale(trace, square, trace / square)
    return NoiseScale(trace, square, math.nan if trace < 0 else math.inf)
