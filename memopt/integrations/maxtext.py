"""An optimizer of memopt in MaxText."""

import contextlib
from collections.abc import Iterator
from typing import Any

from memopt.optimizers.registry import available, optimizer

#: MaxText makes this type by a function of a rate, a decay and a mask, which can be replaced.
OPT_TYPE = "adam_pax"


@contextlib.contextmanager
def maxtext_optimizer(method: str, **options: Any) -> Iterator[None]:
    """Makes MaxText train with an optimizer of memopt while the context is open.

    MaxText chooses an optimizer by `opt_type`, one of a fixed list, and has no hook for others.
    In this context, ``opt_type=adam_pax`` is the optimizer given here. MaxText still makes the
    schedule, clips gradients, skips steps with spikes and freezes parameters, all by its own
    configuration; `adam_weight_decay` and `adamw_mask` are the decay and the mask of memopt's own
    methods, and are not passed to Optax's.
    MaxText's pre-training, ahead-of-time compilation, SFT, DPO and distillation all make their
    optimizer in this way.

    Args:
        method: one of `memopt.available`.
        **options: keyword arguments of the method; they override those from the configuration.

    Raises:
        ImportError: if MaxText is not installed.
        ValueError: if MaxText's configuration has another `opt_type`.

    Example:
        ::

            from maxtext.trainers.pre_train import train

            with maxtext_optimizer("apollo_mini", scale=1.0):
                train.main(["train.py", "base.yml", "opt_type=adam_pax"])
    """
    from maxtext.optimizers import optimizers

    get_optimizer, adam_pax = optimizers.get_optimizer, optimizers.adam_pax

    def make(learning_rate: Any, *, weight_decay: float, mask: Any, **_: Any) -> Any:
        decay: dict[str, Any] = {}
        if method in available("memopt"):
            decay = {"weight_decay": weight_decay, "weight_decay_mask": mask}
        return optimizer(method, learning_rate, **(decay | options))

    def get(config: Any, *args: Any, **kwargs: Any) -> Any:
        if config.opt_type != OPT_TYPE:
            raise ValueError(
                f"opt_type must be {OPT_TYPE!r}, which means memopt's {method} here, got "
                f"{str(config.opt_type)!r}."
            )
        return get_optimizer(config, *args, **kwargs)

    optimizers.get_optimizer, optimizers.adam_pax = get, make
    try:
        yield
    finally:
        optimizers.get_optimizer, optimizers.adam_pax = get_optimizer, adam_pax
