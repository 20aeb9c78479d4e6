"""Dynamic batch loading: sources whose losses lag behind a reference get a larger share."""

import math

from memopt.errors import check_choice
from memopt.training.control import Control, Controller, Plan, Seen, State, Trial


def dynamic_mixture(
    plan: Plan,
    *,
    reference: str = "",
    eta: float = 1.0,
    smoothing: float = 1e-4,
    difference: str = "excess",
) -> Controller:
    """Dynamic batch loading (M. Xia et al., "Sheared LLaMA", 2023, section 2.2).

    After each evaluation the weight w of each source becomes proportional to
    `w·exp(eta·max(loss - reference, 0))`, with its validation loss; then it is mixed with an equal
    share, `(1 - smoothing)·w + smoothing / k` for k sources. The run begins with `--mixture`. The
    factors multiply from evaluation to evaluation: a run that is evaluated more often than others
    wants a smaller `eta`. Losses that are not finite change nothing.

    Args:
        plan: The run.
        reference: NAME=LOSS of each source, separated by commas, in nats a token: what it should
            reach, such as the losses of a separate model with the same tokenizer (`memopt evaluate
            RUN` prints them) or those that a scaling law predicts. It must be given.
        eta: Size of the steps, positive.
        smoothing: Share of an equal mixture, above 0 and below 1; it is that of DoReMi (S. M. Xie
            et al., 2023).
        difference: "excess": sources below their reference count as at it, as in the paper;
            "signed": they lose weight, as in the authors' code.

    Returns:
        A controller whose state is the weights.

    Raises:
        ValueError: The data has fewer than two named sources, or an option is out of range.

    Example:
        >>> plan = Plan(100, 10, 1e-3, 8, 1, {"web": 0.5, "code": 0.5})
        >>> made = dynamic_mixture(plan, reference="web=2.0,code=1.5", smoothing=1e-9)
        >>> seen = Seen(10, 10, {"val_loss web": 2.0 + math.log(3), "val_loss code": 1.4})
        >>> _, control = made.update(made.init(), seen, None)
        >>> {name: round(weight, 6) for name, weight in control.weights.items()}
        {'web': 0.75, 'code': 0.25}
    """
    names = list(filter(None, plan.sources))
    if len(names) < 2:
        raise ValueError(
            "dynamic_mixture needs data of at least two named sources: give each as --data "
            "NAME=SOURCE."
        )
    check_choice("difference", difference, ("excess", "signed"))
    if not 0 < smoothing < 1:
        raise ValueError(f"smoothing must be above 0 and below 1, got {smoothing}.")
    if not 0 < eta < math.inf:
        raise ValueError(f"eta must be positive, got {eta}.")
    aims = _losses(reference, names)
    floor = 0.0 if difference == "excess" else -math.inf

    def update(state: State, seen: Seen, trial: Trial) -> tuple[State, Control]:
        weights = state["weights"]
        losses = [seen.metrics.get(f"val_loss {name}", math.nan) for name in names]
        if all(map(math.isfinite, losses)):
            logits = [
                math.log(weights[name]) + eta * max(loss - aims[name], floor)
                for name, loss in zip(names, losses, strict=True)
            ]
            powers = [math.exp(logit - max(logits)) for logit in logits]
            total = math.fsum(powers)
            weights = {
                name: (1 - smoothing) * power / total + smoothing / len(names)
                for name, power in zip(names, powers, strict=True)
            }
        return {"weights": weights}, Control(weights=weights)

    return Controller(init=lambda: {"weights": dict(plan.sources)}, update=update)


def _losses(reference: str, names: list[str]) -> dict[str, float]:
    given = [item.strip().partition("=") for item in filter(None, reference.split(","))]
    losses = {}
    for name, _, text in given:
        try:
            losses[name] = float(text)
        except ValueError:
            losses[name] = math.nan
    is_each_once = sorted(name for name, *_ in given) == sorted(names)
    if not (is_each_once and all(map(math.isfinite, losses.values()))):
        wanted = ",".join(f"{name}=LOSS" for name in names)
        raise ValueError(
            f"reference must give one loss of each source, {wanted}; got {reference!r}."
        )
    return losses
