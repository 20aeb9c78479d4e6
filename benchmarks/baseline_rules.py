"""Rules of optimizers that are in Optax only, written in NumPy from their papers.

Each takes the parameters, as one vector, and the gradients and losses of some steps, and yields the
parameters after each step. Nothing is decayed, and learning rates are constant.
"""

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

Vector: TypeAlias = np.ndarray
Trajectory: TypeAlias = Iterator[Vector]


def sgd(x: Vector, gradients: Sequence[Vector], losses: Sequence[float]) -> Trajectory:
    """Gradient descent."""
    for g in gradients:
        x = x - 1e-2 * g
        yield x


def adagrad(x: Vector, gradients: Sequence[Vector], losses: Sequence[float]) -> Trajectory:
    """Duchi et al. 2011, section 1.1, with a diagonal matrix and a sum that starts from 0.1."""
    squares = np.full_like(x, 0.1)
    for g in gradients:
        squares = squares + g**2
        x = x - 1e-2 * g / np.sqrt(squares + 1e-7)
        yield x


def adam(x: Vector, gradients: Sequence[Vector], losses: Sequence[float]) -> Trajectory:
    """Kingma & Ba 2014, Algorithm 1."""
    m = v = np.zeros_like(x)
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - 1e-2 * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        yield x


def nadamw(x: Vector, gradients: Sequence[Vector], losses: Sequence[float]) -> Trajectory:
    """Dozat 2016, Algorithm 8, with a constant momentum."""
    m = v = np.zeros_like(x)
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        ahead = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
        x = x - 1e-2 * ahead / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        yield x


def ademamix(x: Vector, gradients: Sequence[Vector], losses: Sequence[float]) -> Trajectory:
    """Pagliardini et al. 2024, Algorithm 1, with constant α = 6 and β₃ = 0.9999."""
    fast = slow = v = np.zeros_like(x)
    for t, g in enumerate(gradients, 1):
        fast, slow = 0.9 * fast + 0.1 * g, 0.9999 * slow + 1e-4 * g
        v = 0.999 * v + 0.001 * g**2
        root = np.sqrt(v / (1 - 0.999**t)) + 1e-8
        x = x - 1e-2 * (fast / (1 - 0.9**t) + 6 * slow) / root
        yield x


def dog(x: Vector, gradients: Sequence[Vector], losses: Sequence[float]) -> Trajectory:
    """Ivgi et al. 2023, equation 1, from r = 1e-6 (1 + ‖x‖)."""
    start, squares = x, 0.0
    farthest = 1e-6 * (1 + np.linalg.norm(x))
    for g in gradients:
        farthest = max(farthest, np.linalg.norm(x - start))
        squares += (g**2).sum()
        x = x - farthest / np.sqrt(squares + 1e-8) * g
        yield x


def dowg(x: Vector, gradients: Sequence[Vector], losses: Sequence[float]) -> Trajectory:
    """Khaled et al. 2023, Algorithm 1, from r² = 1e-4."""
    start, farthest, squares = x, 1e-4, 0.0
    for g in gradients:
        farthest = max(farthest, ((x - start) ** 2).sum())
        squares += farthest * (g**2).sum()
        x = x - farthest / np.sqrt(squares) * g
        yield x


def cocob(x: Vector, gradients: Sequence[Vector], losses: Sequence[float]) -> Trajectory:
    """Orabona & Tommasi 2017, Algorithm 2, from L = 1e-8."""
    start, largest = x, np.full_like(x, 1e-8)
    total = reward = theta = np.zeros_like(x)
    for g in gradients:
        largest = np.maximum(largest, np.abs(g))
        total, theta = total + np.abs(g), theta - g
        reward = np.maximum(reward - (x - start) * g, 0)
        bet = theta / (largest * np.maximum(total + largest, 100 * largest))
        x = start + bet * (largest + reward)
        yield x


def prodigy(x: Vector, gradients: Sequence[Vector], losses: Sequence[float]) -> Trajectory:
    """Mishchenko & Defazio 2023, Algorithm 4, with Adam's bias correction as γ."""
    start, d, r = x, 1e-6, 0.0
    m = v = s = np.zeros_like(x)
    root = np.sqrt(0.999)
    for t, g in enumerate(gradients, 1):
        gamma = np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        m, v = 0.9 * m + 0.1 * d * g, 0.999 * v + 0.001 * (d * g) ** 2
        r = root * r + (1 - root) * gamma * d**2 * (g @ (start - x))
        s = root * s + (1 - root) * gamma * d**2 * g
        x = x - gamma * d * m / (np.sqrt(v) + d * 1e-8)
        d = max(d, r / np.abs(s).sum())
        yield x


def momo(x: Vector, gradients: Sequence[Vector], losses: Sequence[float]) -> Trajectory:
    """Schaipp et al. 2023, Algorithm 1, from the first gradient, with a lower bound of zero."""
    direction, mean, product = gradients[0], losses[0], gradients[0] @ x
    for t, (g, loss) in enumerate(zip(gradients, losses, strict=True)):
        if t:
            direction = 0.9 * direction + 0.1 * g
            mean, product = 0.9 * mean + 0.1 * loss, 0.9 * product + 0.1 * (g @ x)
        gap = max(mean + direction @ x - product, 0)
        x = x - min(1.0, gap / (direction @ direction)) * direction
        yield x


def momo_adam(x: Vector, gradients: Sequence[Vector], losses: Sequence[float]) -> Trajectory:
    """Schaipp et al. 2023, Algorithm 2, with a lower bound of zero."""
    m = v = np.zeros_like(x)
    mean = product = 0.0
    for t, (g, loss) in enumerate(zip(gradients, losses, strict=True), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        mean, product = 0.9 * mean + 0.1 * loss, 0.9 * product + 0.1 * (g @ x)
        scale = np.sqrt(v / (1 - 0.999**t)) + 1e-8
        gap = max(mean + m @ x - product, 0)
        x = x - min(1e-2 / (1 - 0.9**t), gap / (m @ (m / scale))) * m / scale
        yield x


def schedule_free(x: Vector, gradients: Sequence[Vector], losses: Sequence[float]) -> Trajectory:
    """Defazio et al. 2024, equations 2 to 4 with Adam's scale; yields where gradients are taken."""
    z, v = x, np.zeros_like(x)
    for t, g in enumerate(gradients, 1):
        v = 0.999 * v + 0.001 * g**2
        z = z - 1e-2 * g / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        x = x + (z - x) / t
        yield 0.1 * z + 0.9 * x


RULES = {
    "adagrad": adagrad,
    "adam": adam,
    "ademamix": ademamix,
    "cocob": cocob,
    "dog": dog,
    "dowg": dowg,
    "momo": momo,
    "momo_adam": momo_adam,
    "nadamw": nadamw,
    "prodigy": prodigy,
    "schedule_free": schedule_free,
    "sgd": sgd,
}
"""The rule of each optimizer, at a learning rate of 1e-2, or 1 if it finds its own steps."""
