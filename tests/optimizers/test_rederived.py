"""Fifty float64 steps against the algorithm boxes, written again in numpy."""

import jax
import numpy as np
import pytest

import memopt
from memopt import projectors
from tests.optimizers.test_recorded_runs import follow
from tests.yardstick import yardstick

LEARNING_RATE, DECAY = 1e-2, 0.1


def adafactor(w, gradients, name):
    rows = cols = full = 0.0
    for t, g in enumerate(gradients, 1):
        beta = 1 - t**-0.8
        square = g**2 + 1e-30
        if g.ndim == 2:
            rows = beta * rows + (1 - beta) * square.mean(1)
            cols = beta * cols + (1 - beta) * square.mean(0)
            u = g / np.sqrt(np.outer(rows, cols) / rows.mean())
        else:
            full = beta * full + (1 - beta) * square
            u = g / np.sqrt(full)
        u /= max(1, np.sqrt((u**2).mean()))
        u *= max(1e-3, np.sqrt((w**2).mean()))
        w = w - LEARNING_RATE * (u + DECAY * w)
        yield w


def adalomo(w, gradients, name):
    """Adafactor's rule on clipped gradients."""
    return adafactor(w, [np.clip(g, -0.05, 0.05) for g in gradients], name)


def lomo(w, gradients, name):
    for g in gradients:
        w = w - LEARNING_RATE * (np.clip(g, -0.05, 0.05) + DECAY * w)
        yield w


def lion(w, gradients, name):
    m = np.zeros_like(w)
    for g in gradients:
        w = w - LEARNING_RATE * (np.sign(0.9 * m + 0.1 * g) + DECAY * w)
        m = 0.99 * m + 0.01 * g
        yield w


def adamw(w, gradients, name):
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        u = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w = w - LEARNING_RATE * (u + DECAY * w)
        yield w


def basis(name, side, r):
    """The same random matrices for both sides, refreshed every ten steps."""
    draw = np.random.default_rng(len(name) + side)
    return {t: draw.normal(size=(side, r)) / np.sqrt(r) for t in range(1, 51, 10)}


def apollo(w, gradients, name, r=8, scale=1.0, channel=True):
    if w.ndim == 1:
        yield from adamw(w, gradients, name)
        return
    wide = w.shape[0] <= w.shape[1]
    bases = basis(name, min(w.shape), r)
    m = v = before = 0.0
    for t, g in enumerate(gradients, 1):
        p = bases[1 + (t - 1) // 10 * 10]
        low = p.T @ g if wide else g @ p
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low**2
        n = m / (np.sqrt(v) + 1e-6)
        axis = (0 if wide else 1) if channel else None
        size = lambda x, axis=axis: np.sqrt((x**2).sum(axis, keepdims=True))
        u = g * size(n) / (size(low) + 1e-8)
        norm = np.sqrt((u**2).sum())
        if before > 0:
            u = u / (max(norm / (before + 1e-8), 1.01) / 1.01)
        norm = np.sqrt((u**2).sum())
        before = norm if norm > 1e-3 * before else before
        u = np.sqrt(scale) * u * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        w = w - LEARNING_RATE * (u + DECAY * w)
        yield w


def apollo_mini(w, gradients, name):
    return apollo(w, gradients, name, r=1, scale=128.0, channel=False)


def projector(r):
    sides = {n: min(s) for n, s in yardstick.SHAPES.items() if len(s) == 2}
    return projectors.replay({n: basis(n, side, r) for n, side in sides.items()})


OURS = {
    adafactor: lambda: memopt.adafactor(LEARNING_RATE, weight_decay=DECAY),
    adalomo: lambda: memopt.adalomo(LEARNING_RATE, clip_value=0.05, weight_decay=DECAY),
    lomo: lambda: memopt.lomo(LEARNING_RATE, clip_value=0.05, weight_decay=DECAY),
    lion: lambda: memopt.lion(LEARNING_RATE, weight_decay=DECAY),
    apollo: lambda: memopt.apollo(LEARNING_RATE, projector=projector(8), weight_decay=DECAY),
    apollo_mini: lambda: memopt.apollo_mini(
        LEARNING_RATE, projector=projector(1), weight_decay=DECAY
    ),
}


@pytest.mark.parametrize("rule", OURS, ids=lambda f: f.__name__)
def test_equals_the_algorithm_box_in_float64(rule):
    params, gradients = yardstick.make_problem()
    wide = lambda tree: {k: v.astype(np.float64) for k, v in tree.items()}
    params, gradients = wide(params), list(map(wide, gradients))
    with jax.enable_x64(True):
        ours = follow(OURS[rule](), params, gradients)
    for name in yardstick.SHAPES:
        steps = rule(params[name], [g[name] for g in gradients], name)
        for t, expected in enumerate(steps, 1):
            if t in ours:
                moved = np.abs(expected - params[name]).max()
                assert ours[t][name].dtype == np.float64
                assert np.abs(ours[t][name] - expected).max() <= 1e-10 * moved, (name, t)
