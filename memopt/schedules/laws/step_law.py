"""Step Law: learning rate and batch for a model and a number of tokens."""

from typing import NamedTuple

from memopt.errors import check_above_zero
from memopt.schedules.laws.ranges import warn_outside

#: Sizes the law was fitted to and tested on: 60M to 1B parameters and 2B to 100B tokens, as section
#: 3.4.1 of the paper says.
STEP_LAW_RANGES = {"parameters": (6e7, 1.1e9), "tokens": (2e9, 1e11)}


class StepLaw(NamedTuple):
    """Recommendation of Step Law.

    Attributes:
        learning_rate: The highest learning rate.
        batch_tokens: Tokens of a batch.
    """

    learning_rate: float
    batch_tokens: float


def step_law(parameters: float, tokens: float) -> StepLaw:
    """Returns the best learning rate, 1.797 N^−0.7129 D^0.3075, and batch, 0.5807 D^0.5709 tokens.

    The constants are the means of the authors' 1000 bootstrap fits, recomputed from their data; the
    paper rounds them to 1.79, −0.713, 0.307, 0.58 and 0.571.

    Range: `STEP_LAW_RANGES`; AdamW, a LLaMA-like model, sequences of 2048 tokens, a linear warm-up
    and a cosine to a fixed last learning rate of 1e-5 rather than to a share of the highest.

    Doubts: 1B parameters and 100B tokens are test points, which the fit has not seen. The losses
    that the authors published are of 215M to 1.07B parameters and 4B to 100B tokens, in 17 pairs;
    for smaller ones, there is only the text of the paper. The authors call the optimum broad. An
    independent sweep of 46M to 2.9B parameters on up to 1B tokens
    (https://lucaslingle.substack.com, Scaling laws for optimal LR and batch size) found other
    exponents of D at first. The batch is that of the lowest loss for D tokens, not of the shortest
    time.

    Args:
        parameters: N, without the embedding and the head.
        tokens: D, tokens that are trained on.

    Warns:
        OutsideRangeWarning: N or D is outside of the range.

    Raises:
        ValueError: One is not above 0.

    References:
        Li et al., Predictable Scale: Part I, Step Law, 2025, https://arxiv.org/abs/2503.04715;
        https://github.com/step-law/steplaw.

    Example:
        >>> found = step_law(1e9, 1e11)
        >>> f"{found.learning_rate:.2e}, {found.batch_tokens:.3g} tokens"
        '1.66e-03, 1.11e+06 tokens'
    """
    check_above_zero("parameters", parameters)
    check_above_zero("tokens", tokens)
    warn_outside("Step Law", STEP_LAW_RANGES, parameters=parameters, tokens=tokens)
    return StepLaw(1.797 * parameters**-0.7129 * tokens**0.3075, 0.5807 * tokens**0.5709)
