"""Chinchilla's law: the loss by parameters and tokens."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Unpack

import numpy as np

from memopt.schedules.laws.fitting import Bootstrap, LossFit, fit_loss, heights

#: Exponents to start from.
EXPONENTS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2)


class TokenLaw(NamedTuple):
    """Loss E + A / N^α + B / D^β, in nats a token.

    Attributes:
        floor: E, of any model on any data.
        model: A.
        alpha: α.
        data: B.
        beta: β.

    Example:
        >>> chinchilla = TokenLaw(1.69, 406.4, 0.34, 410.7, 0.28)
        >>> round(chinchilla(parameters=70e9, tokens=1.4e12), 3)
        1.937
    """

    floor: float
    model: float
    alpha: float
    data: float
    beta: float

    def __call__(self, parameters: float, tokens: float) -> float:
        """Returns the loss of a model of N parameters after D tokens."""
        by_model = self.model / parameters**self.alpha
        return float(self.floor + by_model + self.data / tokens**self.beta)


def fit_token_law(
    parameters: Sequence[float],
    tokens: Sequence[float],
    losses: Sequence[float],
    **bootstrap: Unpack[Bootstrap],
) -> LossFit[TokenLaw]:
    """Fits L(N, D) = E + A / N^α + B / D^β to the last losses of runs.

    Range: sizes between those of the runs; `LossFit.predict` warns outside of them. One tokenizer,
    one data, and each run with a schedule that ends at its D.

    Doubts: with as few as 12 runs, the bootstrap's intervals missed the truth more often than they
    should; with 30 they did not. E and the exponents trade for each other; with runs of a narrow
    range of N or D, only predictions between them mean something, not the constants. The published
    constants (E 1.69, A 406.4, α 0.34, B 410.7, β 0.28) do not fit the paper's own data: a
    replication finds E 1.82, A 482, α 0.35, B 2085, β 0.37, and intervals far wider than the
    paper's.

    Args:
        parameters: N of each run.
        tokens: D of each run.
        losses: Its loss, in nats a token.
        **bootstrap: See `memopt.schedules.laws.Bootstrap`.

    Raises:
        ValueError: There are fewer than 6 runs, or values that are not above 0.

    References:
        Hoffmann et al., Training Compute-Optimal Large Language Models, 2022,
        https://arxiv.org/abs/2203.15556, section 3.3; Besiroglu et al., Chinchilla Scaling: A
        replication attempt, 2024, https://arxiv.org/abs/2404.10102.

    Example:
        >>> law, sizes = TokenLaw(1.7, 400.0, 0.35, 500.0, 0.3), (1e7, 3e7, 1e8)
        >>> runs = [(n, d) for n in sizes for d in (1e8, 1e9, 1e10)]
        >>> losses = [law(*run) for run in runs]
        >>> fit = fit_token_law(*zip(*runs), losses, resamples=10)
        >>> f"{fit.predict(parameters=5e7, tokens=5e9).loss / law(5e7, 5e9):.4f}"
        '1.0000'
    """

    def log_loss(x: np.ndarray, runs: Mapping[str, np.ndarray]) -> np.ndarray:
        e, a, alpha, b, beta = x
        by_model = a - alpha * np.log(runs["parameters"])
        by_data = b - beta * np.log(runs["tokens"])
        return np.logaddexp(np.logaddexp(by_model, by_data), e)

    def starts(runs: Mapping[str, np.ndarray]) -> Iterable[np.ndarray]:
        for alpha, beta in itertools.product(EXPONENTS, EXPONENTS):
            powers = [runs["parameters"] ** -alpha, runs["tokens"] ** -beta]
            terms = np.stack([np.ones_like(runs["loss"]), *powers], axis=1)
            e, a, b = np.log(heights(terms, runs["loss"]))
            yield np.array([e, a, alpha, b, beta])

    def make(x: np.ndarray) -> TokenLaw:
        e, a, alpha, b, beta = map(float, x)
        return TokenLaw(math.exp(e), math.exp(a), alpha, math.exp(b), beta)

    runs = {"parameters": parameters, "tokens": tokens, "loss": losses}
    return fit_loss(make, log_loss, starts, runs, numbers=5, **bootstrap)
