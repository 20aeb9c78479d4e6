"""Fifty float64 steps against the algorithm boxes, written again in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

import memopt
from benchmarks.extra_arguments import with_extra_arguments
from memopt import projectors
from tests.optimizers.kinds import slow_unless
from tests.optimizers.recorded_runs import follow
from tests.optimizers.tasks import on_tasks
from tests.yardstick import yardstick

LEARNING_RATE, DECAY, RANK, EVERY = 1e-2, 0.1, 8, 10

# Of each leaf what it is cut from, and its shape. With no more than RANK + 8 rows or columns to
# sketch, the randomised singular vectors that some methods start from are exact.
LEAVES = {
    "tall": ("w_tall", (40, 16)),
    "wide": ("w_wide", (16, 40)),
    "square": ("w_square", (16, 16)),
    "layers": ("big", (3, 14, 24)),
    "experts": ("big", (3, 24, 14)),
    "bias": ("bias", (64,)),
    "norm": ("norm", (32,)),
}
MATRICES = [name for name, (_, shape) in LEAVES.items() if len(shape) > 1]


@functools.cache
def problem():
    """The yardstick's, cut small; the square matrix and one expert have no gradient at step 7."""
    cut = lambda tree: {
        name: np.resize(tree[source], shape).astype(np.float64)
        for name, (source, shape) in LEAVES.items()
    }
    params, gradients = yardstick.make_problem()
    params, gradients = cut(params), list(map(cut, gradients))
    gradients[6]["experts"][1] = 0
    return params, gradients


# How a box that is written for one wide matrix serves every spec.


def stacked(rule):
    """A rule for one matrix, for each of a stack."""

    @functools.wraps(rule)
    def steps(w, gradients, name, **options):
        if w.ndim < 3:
            return rule(w, gradients, name, **options)
        layers = (rule(w[i], [g[i] for g in gradients], name, **options) for i in range(len(w)))
        return map(np.stack, zip(*layers, strict=True))

    return steps


def turned(rule):
    """A rule for m ≤ n, for all matrices."""

    @functools.wraps(rule)
    def steps(w, gradients, name, **options):
        if w.ndim < 2 or w.shape[0] <= w.shape[1]:
            return rule(w, gradients, name, **options)
        return (x.T for x in rule(w.T, [g.T for g in gradients], name, **options))

    return steps


def or_rest(rule, rest=None):
    """A rule for matrices, and another for vectors: AdamW."""

    @functools.wraps(rule)
    def steps(w, gradients, name, **options):
        if w.ndim > 1:
            return rule(w, gradients, name, **options)
        return (rest or adamw)(w, gradients, name)

    return steps


def wide(rule, rest=None):
    return or_rest(stacked(turned(rule)), rest)


# What several boxes share.


class Adam:
    """Adam's updates; the boxes reach for its moments."""

    def __init__(self, b1=0.9, b2=0.999, eps=1e-8):
        self.b1, self.b2, self.eps = b1, b2, eps
        self.m = self.v = 0.0
        self.t = 0

    def __call__(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        m, v = self.corrected()
        return m / (np.sqrt(v) + self.eps)

    def corrected(self):
        return self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)


class Factored:
    """Gradients over the root of Adafactor's second moment."""

    rows = cols = full = 0.0
    t = 0

    def __call__(self, g):
        self.t += 1
        beta = 1 - self.t**-0.8
        square = g**2 + 1e-30
        if g.ndim == 2:
            self.rows = beta * self.rows + (1 - beta) * square.mean(1)
            self.cols = beta * self.cols + (1 - beta) * square.mean(0)
            return g / np.sqrt(np.outer(self.rows, self.cols) / self.rows.mean())
        self.full = beta * self.full + (1 - beta) * square
        return g / np.sqrt(self.full)


def clip_and_scale(u, w):
    """Adafactor's bound on an update, and its step relative to the parameter."""
    rms = lambda x: np.sqrt((x**2).mean())
    return u / max(1, rms(u)) * max(1e-3, rms(w))


def descend(w, u):
    return w - LEARNING_RATE * (u + DECAY * w)


def is_due(t):
    return t % EVERY == 1


def uncorrected_adam(gradients, basis, b1=0.9, b2=0.999, eps=1e-6):
    """For each step G, P, R, N = M / (√V + ε) and what corrects N for its start."""
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        if is_due(t):
            p = basis(g, t)
        r = p.T @ g
        m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r**2
        yield g, p, r, m / (np.sqrt(v) + eps), np.sqrt(1 - b2**t) / (1 - b1**t)


def limit_growth(u, before, as_released=False):
    """The norm-growth limiter. What vanishes is not remembered, but by the released code."""
    if before is not None:
        u = u / (max(np.linalg.norm(u) / (before + 1e-8), 1.01) / 1.01)
    norm = np.linalg.norm(u)
    vanished = before is not None and norm <= 1e-3 * before
    return u, before if vanished and not as_released else norm


def ratio(n, r, axis=0):
    return np.linalg.norm(n, axis=axis) / (np.linalg.norm(r, axis=axis) + 1e-8)


def singular(g, t=1):
    """The leading left singular vectors, the largest entry of each positive."""
    u = np.linalg.svd(g)[0][:, :RANK]
    return u * np.sign(u[np.abs(u).argmax(0), range(RANK)])


def given(name, side, r):
    """The same random bases for both sides."""
    draw = np.random.default_rng(len(name) + side)
    return {t: draw.normal(size=(side, r)) / np.sqrt(r) for t in range(1, 51, EVERY)}


def drawn(projector, name, g, t, use=lambda spec, basis: basis):
    """The basis that a random projector draws for step t."""
    spec = projectors.MatrixSpec(name, g.shape, jnp.float64)
    with jax.enable_x64(True):
        clock = projectors.RefreshClock.at(jnp.int32(t - 1), EVERY)
        return np.asarray(use(spec, projector.basis(spec, jnp.asarray(g), clock)))


def drawn_rows(name, g, t, density=0.25):
    """Which rows are chosen, as a column."""
    some = projectors.columns(density)
    ones = jnp.ones(g.shape)
    use = lambda spec, basis: some.up(spec, basis, some.down(spec, basis, ones))
    chosen = drawn(some, name, g, t, use)
    assert set(np.unique(chosen)) <= {0, 1}
    assert (chosen == chosen[:, :1]).all()
    return chosen[:, :1] == 1


# The boxes.


@stacked
def adafactor(w, gradients, name):
    normalize = Factored()
    for g in gradients:
        w = descend(w, clip_and_scale(normalize(g), w))
        yield w


def came(w, gradients, name):
    """Averages as weighted sums over the whole past."""
    past = lambda b, xs: np.tensordot((1 - b) * b ** np.arange(len(xs) - 1, -1, -1), xs, 1)
    us, squares, distances = [], [], []
    for g in gradients:
        squares.append(g**2 + 1e-30)
        v = past(0.999, np.array(squares))
        if w.ndim > 1:
            v = np.outer(v.mean(1), v.mean(0)) / v.mean()
        u = g / np.sqrt(v)
        us.append(u / max(1, np.sqrt((u**2).mean())))
        step = m = past(0.9, np.array(us))
        distances.append((us[-1] - m) ** 2 + 1e-16)
        if w.ndim > 1:
            s = past(0.9999, np.array(distances))
            step = m / np.sqrt(np.outer(s.mean(1), s.mean(0)) / s.mean())
        w = descend(w, step)
        yield w


def adalomo(w, gradients, name):
    """Adafactor's rule on clipped gradients."""
    return adafactor(w, [np.clip(g, -0.05, 0.05) for g in gradients], name)


def lomo(w, gradients, name):
    for g in gradients:
        w = descend(w, np.clip(g, -0.05, 0.05))
        yield w


def lion(w, gradients, name):
    m = np.zeros_like(w)
    for g in gradients:
        w = descend(w, np.sign(0.9 * m + 0.1 * g))
        m = 0.99 * m + 0.01 * g
        yield w


def muon(w, gradients, name, nesterov=True, scale=lambda m, n: np.sqrt(max(1, n / m))):
    """Newton–Schulz as what it does to singular values."""
    momentum = 0.0
    for g in gradients:
        momentum = 0.95 * momentum + g
        u, s, v = np.linalg.svd(g + 0.95 * momentum if nesterov else momentum, full_matrices=False)
        s = s / (np.linalg.norm(s) + 1e-7)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        w = descend(w, scale(*g.shape) * (u * s) @ v)
        yield w


def normuon(w, gradients, name):
    """Steps of a root mean square of 0.2, whatever the size of the orthogonal matrix."""
    momentum, v = 0.0, 0.0
    for g in gradients:
        momentum = 0.95 * momentum + g
        u, s, vt = np.linalg.svd(momentum, full_matrices=False)
        s = s / (np.linalg.norm(s) + 1e-7)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        o = (u * s) @ vt
        v = 0.95 * v + 0.05 * (o**2).mean(0)
        p = o / (np.sqrt(v) + 1e-8)
        w = descend(w, 0.2 * p * np.sqrt(p.size) / np.linalg.norm(p))
        yield w


@stacked
def scale(w, gradients, name):
    """Columns are outputs."""
    for g in gradients:
        w = descend(w, g / np.maximum(np.sqrt((g**2).mean(0)), 1e-8))
        yield w


@stacked
def rmnp(w, gradients, name):
    m = 0.0
    for g in gradients:
        m = 0.95 * m + 0.05 * g
        w = descend(w, m / np.linalg.norm(m, axis=0))
        yield w


@stacked
def sinkgd(w, gradients, name):
    """Algorithm 3, whose norms are √n and √m, of inputs first."""
    m, n = w.shape[-2:]
    for g in gradients:
        for _ in range(5 * g.any()):
            g = np.sqrt(n) * g / np.linalg.norm(g, axis=1, keepdims=True)
            g = np.sqrt(m) * g / np.linalg.norm(g, axis=0)
        w = descend(w, 0.05 * g)
        yield w


@stacked
def racs(w, gradients, name):
    q_mean, s_mean, before = 0.0, 0.0, None
    for g in gradients:
        q, s = np.zeros(len(g)), np.zeros(g.shape[-1])
        if g.any():
            q = np.ones(len(g))
            for _ in range(5):
                s = (g**2).T @ q / (q @ q)
                q = g**2 @ s / (s @ s)
        q_mean, s_mean = 0.9 * q_mean + 0.1 * q, 0.9 * s_mean + 0.1 * s
        u, before = limit_growth(g / np.sqrt(np.outer(q_mean, s_mean)), before)
        w = descend(w, u)
        yield w


def adamw(w, gradients, name, b1=0.9, b2=0.999):
    adam = Adam(b1, b2)
    for g in gradients:
        w = descend(w, adam(g))
        yield w


def badam(w, gradients, name):
    """Three layers and then all other parameters, from the last block, each with a new Adam."""
    in_layers = name in ("layers", "experts")
    parts = np.array(w if in_layers else [w])
    for t, g in enumerate(gradients):
        turn, at = divmod(t, 5)
        if at == 0:
            adam, now = Adam(), 3 - turn % 4 if in_layers else turn % 4
        if now < len(parts):
            parts[now] = descend(parts[now], adam(g[now] if in_layers else g))
        yield parts.copy() if in_layers else parts[0].copy()


@stacked
def lars(w, gradients, name, ratio=lambda w, g: 1e-3 * w / (g + DECAY * w), nesterov=False):
    """A momentum that has the learning rate in it."""
    momentum = np.zeros_like(w)
    for g in gradients:
        norms = np.linalg.norm(w), np.linalg.norm(g)
        step = LEARNING_RATE * (ratio(*norms) if all(norms) else 1) * (g + DECAY * w)
        momentum = 0.9 * momentum + step
        w = w - (0.9 * momentum + step if nesterov else momentum)
        yield w


@stacked
def lamb(w, gradients, name, decay_inside=True, corrected=True):
    adam = Adam(eps=1e-6)
    for g in gradients:
        inside, outside = (DECAY * w, 0) if decay_inside else (0, DECAY * w)
        u = adam(g)
        u = (u if corrected else adam.m / (np.sqrt(adam.v) + 1e-6)) + inside
        norms = np.linalg.norm(w), np.linalg.norm(u)
        w = w - LEARNING_RATE * ((norms[0] / norms[1] if all(norms) else 1) * u + outside)
        yield w


def amsgrad(w, gradients, name, corrected=False):
    """Weighted sums over the whole past, at every step anew."""
    past, largest = np.array(gradients), 0.0
    weights = lambda b, t: (1 - b) * b ** np.arange(t - 1, -1, -1)
    for t in range(1, len(past) + 1):
        m, v = (np.tensordot(weights(b, t), past[:t] ** p, 1) for b, p in ((0.9, 1), (0.999, 2)))
        largest = np.maximum(largest, v)
        of = lambda b: (1 - b**t) if corrected else 1  # noqa: B023
        w = descend(w, m / of(0.9) / (np.sqrt(largest / of(0.999)) + 1e-8))
        yield w


def adopt(w, gradients, name, bound=lambda t: t**0.25):
    """The second moment as a weighted sum of the squares before; step 0 changes nothing."""
    yield w
    squares, m = np.square(gradients), 0.0
    for t, g in enumerate(gradients[1:], 1):
        weights = np.append(0.9999 ** (t - 1), 1e-4 * 0.9999 ** np.arange(t - 2, -1, -1))
        v = np.tensordot(weights, squares[:t], 1)
        m = 0.9 * m + 0.1 * np.clip(g / np.maximum(np.sqrt(v), 1e-6), -bound(t), bound(t))
        w = descend(w, m)
        yield w


@stacked
def adagrad_norm(w, gradients, name, per_output=False):
    """Algorithm 1, with the sum of squares of the gradients so far; from 1e-2."""
    for t in range(1, len(gradients) + 1):
        past = np.square(gradients[:t])
        if per_output:
            past = past.sum(axis=(0, 1) if w.ndim > 1 else 0)
        w = descend(w, gradients[t - 1] / np.sqrt(1e-2 + (past if per_output else past.sum())))
        yield w


@stacked
def sm3(w, gradients, name, b1=0.9):
    """Algorithm SM3-II entry by entry: sets of a matrix are its rows and columns."""
    sets = np.ndindex(*w.shape)
    covers = {i: [(axis, k) for axis, k in enumerate(i)] for i in sets}
    largest, m = {}, np.zeros_like(w)
    for g in gradients:
        new, u = {}, np.zeros_like(w)
        for i, cover in covers.items():
            v = min(largest.get(s, 0.0) for s in cover) + g[i] ** 2
            u[i] = g[i] / np.sqrt(v) if v else 0
            for s in cover:
                new[s] = max(new.get(s, 0.0), v)
        largest, m = new, b1 * m + (1 - b1) * u
        w = descend(w, m)
        yield w


def adam_atan2(w, gradients, name):
    """The angle of a complex number."""
    adam = Adam(0.9, 0.99)
    for g in gradients:
        adam(g)
        m, v = adam.corrected()
        w = descend(w, 1.27 * np.angle(np.sqrt(v) + 1j * m))
        yield w


@stacked
def adam_mini(w, gradients, name, axis=0, is_norm=True):
    """Adam with a second moment for each output; a norm has one, unless it is SlimAdam's."""
    m, v = np.zeros_like(w), 0.0
    for t, g in enumerate(gradients, 1):
        squares = np.square(g)
        if w.ndim > 1:
            squares = squares.mean(axis, keepdims=True)
        elif name == "norm" and is_norm:
            squares = squares.mean()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * squares
        w = descend(w, m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8))
        yield w


@wide
def apollo(w, gradients, name, r=RANK, scale=1.0, axis=0):
    bases, before = given(name, len(w), r), None
    for g, _, low, n, correction in uncorrected_adam(gradients, lambda g, t: bases[t]):
        u, before = limit_growth(g * ratio(n, low, axis), before)
        w = descend(w, correction * np.sqrt(scale) * u)
        yield w


@wide
def galore(w, gradients, name, basis=singular):
    adam = Adam(eps=1e-6)
    for t, g in enumerate(gradients, 1):
        if is_due(t):
            p = basis(g)
        w = descend(w, 0.25 * p @ adam(p.T @ g))
        yield w


def largest_cosines(g):
    """The columns of the cosine transform, by SciPy, on which the gradient is largest."""
    size = np.abs(scipy.fft.idct(g, axis=0, norm="ortho")).sum(1)
    chosen = np.sort(np.argsort(-size)[:RANK])
    return scipy.fft.idct(np.eye(len(g)), axis=0, norm="ortho").T[:, chosen]


def sums_of_four(g):
    sums = np.kron(np.eye(len(g)), np.ones((4, 1)))[: len(g), : -(-len(g) // 4)]
    return sums / np.sqrt(sums.sum(0))


@wide
def fira(w, gradients, name):
    """Algorithm 1 (appendix A.1, third version)."""
    before = None
    for g, p, r, n, correction in uncorrected_adam(gradients, singular):
        n = correction * n
        s, before = limit_growth((g - p @ r) * ratio(n, r), before)
        w = descend(w, 0.25 * (p @ n + s))
        yield w


def decay_after(w, u):
    w = w - LEARNING_RATE * u
    return w - LEARNING_RATE * DECAY * w


def adamw_as_released(w, gradients, name):
    for *_, n, correction in uncorrected_adam(gradients, lambda g, t: np.eye(len(g))):
        w = decay_after(w, correction * n)
        yield w


@functools.partial(wide, rest=adamw_as_released)
def fira_as_released(w, gradients, name):
    """Whatever is lifted is multiplied by α; a gradient of zeros freezes its matrix."""
    before = None
    for g, p, r, n, correction in uncorrected_adam(gradients, singular):
        s, before = limit_growth((g - 0.25 * p @ r) * ratio(n, r), before, as_released=True)
        w = decay_after(w, correction * (0.25 * p @ n + s))
        yield w


@wide
def subtrack(w, gradients, name):
    """Geodesic steps, of the paper, after η is divided by ‖G‖²."""
    p, before, m, v = singular(gradients[0]), None, 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        if is_due(t) and t > 1:
            u, sigma, turn = np.linalg.svd(2 * (g - p @ p.T @ g) @ (p.T @ g).T / (g**2).sum())
            u, angle, turn = u[:, :1], sigma[0], turn[:1].T
            moved = p @ turn * np.cos(angle) + u * np.sin(angle)
            old, p = p, p + (moved - p @ turn) @ turn.T
            change, c1, c2 = p.T @ old, 1 - 0.9 ** (t - 1), 1 - 0.999 ** (t - 1)
            inside = change**2 @ (v / c2 - (m / c1) ** 2) + (change @ m / c1) ** 2
            m, v = change @ m, c2 * np.abs(inside)
        r = p.T @ g
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r**2
        n = np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-6)
        rest, before = limit_growth((g - p @ r) * ratio(n, r), before)
        w = descend(w, 0.25 * (p @ n + rest))
        yield w


@wide
def galore_lazily(w, gradients, name):
    """From 5 steps on, the interval is doubled by the mean of two cosines."""
    adam, cosines, every, p = Adam(eps=1e-6), [], 5, None
    for t, g in enumerate(gradients):
        if t % every == 0:
            if t:
                cosines.append(abs(p[:, 0] @ singular(g)[:, 0]))
            p = singular(g)
            if len(cosines) > 1 and np.mean(cosines[-2:]) > 0.4:
                every *= 2
        w = descend(w, 0.25 * p @ adam(p.T @ g))
        yield w
    assert every == 40


@or_rest
@stacked
def coap(w, gradients, name):
    """In FRUGAL without its signs, where the signs of P's columns do not matter.

    Every other refresh is a step, whose slope is written out.
    """
    is_left = w.shape[0] <= w.shape[1]
    down = lambda p, g: p.T @ g if is_left else g @ p
    up = lambda p, r: p @ r if is_left else r @ p.T
    side = lambda a, b: a @ b.T if is_left else a.T @ b
    adam = Adam()
    for t, g in enumerate(gradients, 1):
        if t == 1:
            p = singular(g if is_left else g.T)
        elif is_due(t) and t % (2 * EVERY) == 1:
            across = np.linalg.qr(down(p, g).T if is_left else down(p, g))[0]
            spanned = (g if is_left else g.T) @ across
            p = np.linalg.svd(spanned, full_matrices=False)[0]
        elif is_due(t):
            unit, m = g / np.sqrt((g**2).mean()), up(p, adam.m)
            missed = up(p, down(p, unit)) - unit
            length = lambda x: np.sqrt((x**2).sum(0))
            cosine = (m * unit).sum(0) / length(m) / length(unit)
            slope_of_m = (unit / length(m) / length(unit) - cosine * m / length(m) ** 2) / m.shape[
                1
            ]
            of_error = 2 * (side(missed, unit) + side(unit, missed)) @ p / g.size
            slope = (1 - cosine.mean()) * of_error
            slope -= (missed**2).mean() * side(slope_of_m, adam.m)
            p = p - 0.1 * slope / max(1, np.linalg.norm(slope))
        if is_due(t):
            adam = Adam()
        w = descend(w, up(p, adam(down(p, g))))
        yield w


@wide
def online_subspace_descent(w, gradients, name):
    adam, adam_of_p, p = Adam(eps=1e-6), Adam(), singular(gradients[0])
    for t, g in enumerate(gradients, 1):
        w = descend(w, p @ adam(p.T @ g))
        yield w
        if t > 1 and not g.any():
            adam_of_p.t += 1  # one count for a stack
        elif t > 1:
            g = g / np.linalg.norm(g)
            miss, excess = p @ p.T @ g - g, p.T @ p - np.eye(RANK)
            slope = 2 * (miss @ g.T + g @ miss.T) @ p + 0.1 * 4 * p @ excess
            p = p - 5e-3 * adam_of_p(slope)


@stacked
@turned
def flora(w, gradients, name, bound=lambda u, w: u):
    """The momentum of a vector is of full size."""
    normalize, p, m = Factored(), np.eye(len(w)), 0.0
    for t, g in enumerate(gradients, 1):
        if w.ndim > 1 and is_due(t):
            old, p = p, drawn(projectors.gaussian(RANK), name, g, t)
            m = p.T @ old @ m if t > 1 else m
        m = 0.9 * m + 0.1 * p.T @ bound(normalize(g), w)
        w = descend(w, p @ m)
        yield w


@or_rest
@stacked
def frugal(w, gradients, name, on_refresh="reset"):
    """Moments of full size, which are zeros outside of the chosen rows.

    Carried, the second moment of a row that is chosen anew begins with the mean of the old ones.
    """
    adam, chosen = Adam(), 0
    for t, g in enumerate(gradients, 1):
        if is_due(t):
            old, chosen = chosen, drawn_rows(name, g, t)
            adam = Adam() if on_refresh == "reset" or t == 1 else adam
            if np.any(adam.v):
                mean = adam.v.sum(0) / old.sum(0)
                adam.m, adam.v = chosen * adam.m, chosen * np.where(old, adam.v, mean)
        w = descend(w, np.where(chosen, adam(chosen * g), np.sign(g)))
        yield w


def ldadam(w, gradients, name, power=2, b1=0.908, b2=0.99, rho=0.908):
    """The signs of P's columns, which neither SVD nor QR says, cancel out of the update."""
    adam, p, error = Adam(b1, b2), singular(gradients[0]), 0.0
    for t, g in enumerate(gradients, 1):
        a, lost = g + error, 0.0
        if t > 1:
            old, m, (mean, square) = p, adam.m, adam.corrected()
            b = rho * old @ mean + (1 - rho) * a
            p = np.linalg.qr(b @ b.T @ old)[0]
            turn = p.T @ old
            variance = turn**power @ (square - mean**2)
            adam.m = turn @ m
            adam.v = (1 - b2 ** (t - 1)) * np.abs(variance + (turn @ mean) ** 2)
            lost = old @ m - p @ turn @ m
        error = a - p @ p.T @ a + b1 / (1 - b1) * lost
        w = descend(w, p @ adam(p.T @ a))
        yield w


class Basis:
    """A factor of SOAP, the average of G Gᵀ, with its basis; None of a side that is too long."""

    def __init__(self, g):
        self.q = np.linalg.svd(g)[0]
        self.factor = 0.05 * g @ g.T

    def learn(self, g, refresh):
        """Averages; at a refresh it also returns the order of the columns."""
        self.factor = 0.95 * self.factor + 0.05 * g @ g.T
        if not refresh:
            return None
        order = np.argsort([-x @ self.factor @ x for x in self.q.T])
        self.q = np.linalg.qr(self.factor @ self.q[:, order])[0]
        return order


@stacked
def soap(
    w, gradients, name, longest=16, blocks=lambda side: [slice(0, side)], after=False, both=True
):
    """The momentum is in the full space, and rotated at each step, as in the paper."""
    sides = [blocks(side) if side <= longest else [] for side in w.shape]
    sides = sides if both else [sides[0], []]
    m = v = 0.0
    bases = []
    for t, g in enumerate(gradients):
        views = [
            (axis, cut, np.moveaxis(g, axis, 0)[cut]) for axis in (0, 1) for cut in sides[axis]
        ]
        bases = bases or [Basis(view) for *_, view in views]
        if t == 0:
            w = w if after else descend(w, 0.0)
            yield w
            continue
        turns = [np.eye(side) for side in w.shape]
        for (axis, cut, _), basis in zip(views, bases, strict=True):
            turns[axis][cut, cut] = basis.q
        left, right = turns
        m, v = 0.95 * m + 0.05 * g, 0.95 * v + 0.05 * (left.T @ g @ right) ** 2
        rotated = left.T @ m @ right
        correction = 1 - 0.95**t
        if after:
            u = rotated / (np.sqrt(v) + 1e-8) / np.sqrt(correction)
            w = decay_after(w, left @ u @ right.T)
        else:
            u = rotated / correction / (np.sqrt(v / correction) + 1e-8)
            w = descend(w, left @ u @ right.T)
        yield w
        for (axis, cut, view), basis in zip(views, bases, strict=True):
            order = basis.learn(view, t % EVERY == 0)
            if order is not None:
                part = np.moveaxis(v, axis, 0)
                part[cut] = part[cut][order]


def equal_blocks(side):
    """The fewest of at most 16."""
    count = next(k for k in range(-(-side // 16), side + 1) if side % k == 0)
    return [slice(i, i + side // count) for i in range(0, side, side // count)]


def adamw_but_at_first(w, gradients, name):
    yield w
    for *_, n, correction in uncorrected_adam(
        gradients[1:], lambda g, t: np.eye(len(g)), 0.95, 0.95, 1e-8
    ):
        w = decay_after(w, correction * n)
        yield w


def momentum(w, gradients, name):
    m = 0.0
    for g in gradients:
        m = 0.9 * m + g
        w = descend(w, m)
        yield w


class Factor:
    """A factor, not its inverse, that every statistic is added to."""

    def __init__(self, size):
        self.whole = self.unit = np.eye(size)

    def __call__(self, v):
        inverse = np.linalg.inv(self.whole)
        if np.abs(inverse).max() > 2:
            self.whole = np.linalg.inv(0.9 * inverse + 0.1 * self.unit)
        v = v / max(1, np.linalg.norm(v) / 100)
        self.whole = 0.95 * self.whole + 0.05 * np.outer(v, v)
        return np.linalg.inv(self.whole)


@functools.partial(or_rest, rest=momentum)
@stacked
def mkor(w, gradients, name):
    """Sums over columns and rows stand for inputs and their gradients."""
    inputs, outputs, m = Factor(w.shape[0]), Factor(w.shape[1]), 0.0
    for g in gradients:
        u = inputs(g.sum(1)) @ g @ outputs(g.sum(0))
        m = 0.9 * m + (u * np.linalg.norm(g) / np.linalg.norm(u) if g.any() else 0)
        w = descend(w, m)
        yield w


TASKS = np.repeat([0, 1, 0], [20, 10, 20])


@stacked
def tag(w, gradients, name):
    """Two tasks, the first of which comes back."""
    moments, cos = {}, lambda a, b: (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())
    for t, g in enumerate(gradients):
        task = TASKS[t]
        m, v = moments.get(task, (0.0, 0.0))
        m, v = moments[task] = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        if t >= 20:
            other, squares = moments[1 - task]
            similar = cos(m, other) if m.any() and other.any() else 0.0
            v = np.exp(-5) * v + np.exp(-5 * similar) * squares
        w = descend(w, g / (np.sqrt(v) + 1e-8))
        yield w


def tag_on_tasks(learning_rate, **options):
    return on_tasks(memopt.tag(learning_rate, tasks=2, **options), TASKS)


def replayed(r):
    sides = {name: min(LEAVES[name][1][-2:]) for name in MATRICES}
    return projectors.replay({name: given(name, side, r) for name, side in sides.items()})


REFRESHED = {"rank": RANK, "refresh_every": EVERY}
BY_SVD = {"projector": "svd", **REFRESHED}
UNBOUNDED = {"clip_threshold": None, "scale_by_parameter": False, **REFRESHED}
BOUNDED = {"clip_threshold": 1.0, "scale_by_parameter": True, **REFRESHED}
consistent = functools.partial(muon, nesterov=False, scale=lambda m, n: 0.2 * np.sqrt(max(m, n)))
mini = functools.partial(apollo, r=1, scale=128.0, axis=None)
bounded = functools.partial(flora, bound=clip_and_scale)
carried = functools.partial(frugal, on_refresh="carry")
fourth_power = wide(
    functools.partial(ldadam, power=4), rest=functools.partial(adamw, b1=0.908, b2=0.99)
)
soap_rest = functools.partial(adamw, b1=0.95, b2=0.95)
soap_in_blocks = functools.partial(soap, longest=99, blocks=equal_blocks)
soap_as_released = functools.partial(soap, after=True)
soap_one_sided = functools.partial(soap, longest=99, both=False)

# Of each method the box, and memopt's with its options.
METHODS = {
    "adafactor": (adafactor, memopt.adafactor, {}),
    "adalomo": (adalomo, memopt.adalomo, {"clip_value": 0.05}),
    "came": (stacked(came), memopt.came, {}),
    "adam_atan2": (adam_atan2, memopt.adam_atan2, {}),
    "adam_mini": (adam_mini, memopt.adam_mini, {}),
    "slim_adam": (
        functools.partial(adam_mini, axis=1, is_norm=False),
        memopt.slim_adam,
        {},
    ),
    "badam": (badam, memopt.badam, {"switch_every": 5, "head": True}),
    "lomo": (lomo, memopt.lomo, {"clip_value": 0.05}),
    "adopt": (adopt, memopt.adopt, {}),
    "adopt_unbounded": (
        functools.partial(adopt, bound=lambda t: np.inf),
        memopt.adopt,
        {"clip_exponent": None},
    ),
    "adagrad_norm": (adagrad_norm, memopt.adagrad_norm, {}),
    "adagrad_norm_as_released": (
        functools.partial(adagrad_norm, per_output=True),
        memopt.adagrad_norm,
        {"as_released": True},
    ),
    "amsgrad": (amsgrad, memopt.amsgrad, {}),
    "amsgrad_as_released": (
        functools.partial(amsgrad, corrected=True),
        memopt.amsgrad,
        {"as_released": True},
    ),
    "lamb": (lamb, memopt.lamb, {}),
    "lamb_as_released": (
        functools.partial(lamb, corrected=False),
        memopt.lamb,
        {"as_released": True},
    ),
    "lamb_decoupled": (
        functools.partial(lamb, decay_inside=False),
        memopt.lamb,
        {"decoupled_decay": True},
    ),
    "lars": (lars, memopt.lars, {}),
    "lars_nesterov": (functools.partial(lars, nesterov=True), memopt.lars, {"nesterov": True}),
    "lion": (lion, memopt.lion, {}),
    "sm3": (sm3, memopt.sm3, {}),
    "sm3_without_momentum": (functools.partial(sm3, b1=0.0), memopt.sm3, {"b1": None}),
    "muon": (or_rest(stacked(muon)), memopt.muon, {}),
    "muon_consistent_rms": (
        or_rest(stacked(consistent)),
        memopt.muon,
        {"nesterov": False, "consistent_rms": 0.2},
    ),
    "muon_gram": (or_rest(stacked(muon)), memopt.muon, {"gram": True}),
    "normuon": (or_rest(stacked(normuon)), memopt.normuon, {}),
    "racs": (or_rest(racs), memopt.racs, {}),
    "rmnp": (or_rest(rmnp), memopt.rmnp, {}),
    "scale": (or_rest(scale), memopt.scale, {}),
    "sinkgd": (or_rest(sinkgd), memopt.sinkgd, {}),
    "apollo": (apollo, memopt.apollo, {"projector": replayed(RANK)}),
    "apollo_mini": (mini, memopt.apollo_mini, {"projector": replayed(1)}),
    "galore": (galore, memopt.galore, BY_SVD),
    "galore_by_dct": (
        functools.partial(galore, basis=largest_cosines),
        memopt.galore,
        {"projector": "dct", **REFRESHED},
    ),
    "galore_by_haar": (
        functools.partial(galore, basis=sums_of_four),
        memopt.galore,
        {"projector": projectors.haar(0.25, side="short")},
    ),
    "galore_lazily": (
        galore_lazily,
        memopt.galore,
        {
            "projector": projectors.lazy_svd(RANK, queue=2, start=projectors.svd(RANK)),
            "refresh_every": 5,
        },
    ),
    "coap": (
        coap,
        memopt.frugal,
        {
            "projector": projectors.coap(RANK, recalibrate_every=2, start=projectors.svd(RANK)),
            "inactive": "sgd",
            "scale": 0.0,
            "refresh_every": EVERY,
        },
    ),
    "subtrack": (subtrack, memopt.subtrack, REFRESHED),
    "fira": (fira, memopt.fira, BY_SVD),
    "fira_as_released": (fira_as_released, memopt.fira, {"as_released": True, **BY_SVD}),
    "online_subspace_descent": (
        online_subspace_descent,
        memopt.online_subspace_descent,
        {"rank": RANK},
    ),
    "flora": (flora, memopt.flora, UNBOUNDED),
    "flora_bounded": (bounded, memopt.flora, BOUNDED),
    "frugal": (frugal, memopt.frugal, {"refresh_every": EVERY}),
    "frugal_carry": (carried, memopt.frugal, {"refresh_every": EVERY, "on_refresh": "carry"}),
    "soap": (or_rest(soap, soap_rest), memopt.soap, {"max_side": 16}),
    "soap_in_blocks": (or_rest(soap_in_blocks, soap_rest), memopt.soap, {"block_size": 16}),
    "soap_one_sided": (wide(soap_one_sided, soap_rest), memopt.soap, {"one_sided": True}),
    "soap_as_released": (
        or_rest(soap_as_released, adamw_but_at_first),
        memopt.soap,
        {"max_side": 16, "as_released": True},
    ),
    "mkor": (mkor, with_extra_arguments(memopt.mkor), {"refresh_every": 1}),
    "tag": (tag, tag_on_tasks, {}),
    "ldadam": (wide(ldadam), memopt.ldadam, {"rank": RANK}),
    "ldadam_as_released": (fourth_power, memopt.ldadam, {"rank": RANK, "as_released": True}),
}


SLOW = {  # which recorded runs follow, too, or share their steps with a quick one
    *("adopt_unbounded", "amsgrad_as_released", "lamb_as_released", "lamb_decoupled"),
    *("lars_nesterov", "sm3_without_momentum", "soap_as_released"),
}


def cases():
    for method in METHODS:
        marks = slow_unless(method not in SLOW)
        for name in LEAVES:
            yield pytest.param(method, name, id=f"{method}-{name}", marks=marks)


@functools.cache
def ours(method):
    _, make, options = METHODS[method]
    with jax.enable_x64(True):
        tx = make(LEARNING_RATE, weight_decay=DECAY, **options)
        return follow(tx, *problem())


@pytest.mark.parametrize(("method", "name"), [*cases()])
def test_equals_the_algorithm_box_in_float64(method, name):
    params, gradients = problem()
    box = METHODS[method][0]
    w = params[name]
    for t, expected in enumerate(box(w, [g[name] for g in gradients], name), 1):
        if t in ours(method):
            found, moved = ours(method)[t][name], np.abs(expected - w).max()
            assert found.dtype == np.float64
            assert np.abs(found - expected).max() <= 1e-10 * moved, t
