"""memopt's optimizers in EasyDeL's trainers."""

import dataclasses
import functools
from typing import Any

import jax
import optax

from memopt.optimizers.registry import optimizer
from memopt.parameters import init_shapes
from memopt.trees import NOTHING, is_box, named_leaves


@functools.cache
def register_easydel() -> None:
    """Registers "memopt" among EasyDeL's optimizers.

    ``optimizer="memopt"`` of a `TrainingArguments` then takes, in `extra_optimizer_kwargs`,
    `method`, one of `memopt.available`, and `options`, keyword arguments of the method. EasyDeL
    makes the schedule, clips gradients and adds `weight_decay`. Arrays of the state that have the
    shape of their parameter are sharded like it; others are whole on each device. A second call
    changes nothing.

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
            return _apart(optimizer(self.config.method, scheduler, **options))


def _apart(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keeps arrays of other shapes than their parameter's, which have no box, under other names.

    EasyDeL shards state by rules for the names of parameters. If the mesh of a rule does not divide
    an array, a new run splits fewer of its axes; but a run that goes on cannot restore the array,
    says so in its log alone, and starts from a new state.
    """
    tx = optax.with_extra_args_support(tx)

    def flatten(state: Any) -> tuple[list[Any], list[bool], Any]:
        named, structure = named_leaves(state)
        stays = [is_box(x) or name.endswith("count") for name, x in named]  # EasyDeL sets counts
        return [x for _, x in named], stays, structure

    def split(state: Any) -> tuple[Any, tuple[jax.Array, ...]]:
        leaves, stays, structure = flatten(state)
        each = list(zip(leaves, stays, strict=True))
        kept = structure.unflatten([x if stay else NOTHING for x, stay in each])
        return kept, tuple(x for x, stay in each if not stay)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        _, stays, structure = flatten(init_shapes(tx.init, params))
        kept, others = iter(flatten(state[0])[0]), iter(state[1])
        joined = structure.unflatten([next(kept if stay else others) for stay in stays])
        updates, joined = tx.update(updates, joined, params, **extra)
        return updates, split(joined)

    return optax.GradientTransformationExtraArgs(lambda params: split(tx.init(params)), update)
