"""memopt's optimizers in EasyDeL's trainers."""

import dataclasses
import functools
from typing import Any

import optax

from memopt.optimizers.registry import optimizer


@functools.cache
def register_easydel() -> None:
    """Registers "memopt" among EasyDeL's optimizers.

    ``optimizer="memopt"`` of a `TrainingArguments` then takes, in `extra_optimizer_kwargs`,
    `method`, one of `memopt.available`, and `options`, keyword arguments of the method. EasyDeL
    makes the schedule, clips gradients and adds `weight_decay`. A second call changes nothing.

    Raises:
        ImportError: if EasyDeL is not installed.

    Example:
        ::

            register_easydel()
            easydel.TrainingArguments(
                optimizer="memopt",
                extra_optimizer_kwargs={"method": "apollo_mini", "options": {"scale": 1.0}},
                ...,
            )
    """
    from eformer import optimizers

    @dataclasses.dataclass
    class MemoptConfig:
        method: str = "apollo_mini"
        options: dict = dataclasses.field(default_factory=dict)

    @optimizers.register_optimizer("memopt")
    @dataclasses.dataclass
    class MemoptBuilder(optimizers.OptimizerBuilder):
        config: MemoptConfig

        def build(self, scheduler: optax.Schedule) -> optax.GradientTransformation:
            options: dict[str, Any] = self.config.options
            return optimizer(self.config.method, scheduler, **options)
