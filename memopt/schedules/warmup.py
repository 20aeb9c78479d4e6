"""Schedules that warm up, hold and decay, by name."""

import optax

from memopt.errors import check_at_least, check_choice

_NAMES = ("constant", "cosine", "linear", "wsd")


def available() -> tuple[str, ...]:
    """The names `schedule` knows."""
    return _NAMES


def schedule(
    name: str,
    peak_value: float,
    steps: int,
    *,
    init_value: float = 0.0,
    warmup_steps: int = 0,
    end_value: float = 0.0,
    decay_steps: int | None = None,
) -> optax.Schedule:
    """A linear warm-up to the peak, then a named decay to the end value.

    Args:
      name: "constant" stays at the peak; "cosine" and "linear" decay until the last step;
        "wsd" (warm-up, stable, decay) stays at the peak and decays linearly at the end.
      peak_value: the highest learning rate, reached after the warm-up.
      steps: length of the whole schedule.
      init_value: the learning rate at the beginning of the warm-up.
      warmup_steps: length of the warm-up.
      end_value: the learning rate at `steps` and after.
      decay_steps: length of the decay of "wsd"; by default a fifth of `steps`.

    Returns:
      A function of the step count, as Optax's schedules are.

    Raises:
      ValueError: if the name is unknown, or the parts are longer than the whole.

    References:
      Hu et al., MiniCPM, 2024, https://arxiv.org/abs/2404.06395, section 4 (wsd).

    Example:
      >>> rate = schedule("wsd", 1e-2, 100, warmup_steps=10, decay_steps=20)
      >>> [round(float(rate(t)), 4) for t in (0, 5, 10, 80, 90, 100)]
      [0.0, 0.005, 0.01, 0.01, 0.005, 0.0]
    """
    check_choice("schedule", name, _NAMES)
    check_at_least("steps", steps, 1)
    check_at_least("warmup_steps", warmup_steps, 0)
    if decay_steps is None:
        decay_steps = max(1, steps // 5) if name == "wsd" else steps - warmup_steps
    if warmup_steps + decay_steps > steps or decay_steps < 1:
        raise ValueError(
            f"warmup_steps={warmup_steps} and decay_steps={decay_steps} must leave room in "
            f"steps={steps}."
        )
    warmup = optax.linear_schedule(init_value, peak_value, warmup_steps)
    stable = optax.constant_schedule(peak_value)
    if name == "constant":
        return optax.join_schedules([warmup, stable], [warmup_steps])
    if name == "cosine":
        alpha = end_value / peak_value if peak_value else 0.0
        decay = optax.cosine_decay_schedule(peak_value, decay_steps, alpha)
    else:
        decay = optax.linear_schedule(peak_value, end_value, decay_steps)
    return optax.join_schedules([warmup, stable, decay], [warmup_steps, steps - decay_steps])
