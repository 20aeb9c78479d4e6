"""Linear layers of Flax NNX that report what they see of a batch, see `memopt.observe`."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax import Array

from memopt.transforms.layer_statistics import LayerStatistics, observe


class Linear(nnx.Linear):
    """A `flax.nnx.Linear` that reports its statistics, if `set_statistics` gave it any to fill.

    Attributes:
        statistics: Zeros to differentiate the loss by; None reports nothing.

    """

    statistics: LayerStatistics | None = None

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Maps `(..., in)` to `(..., out)`, as `flax.nnx.Linear` does."""
        return observe(self.statistics, inputs, super().__call__(inputs, out_sharding))


def set_statistics(module: Any, statistics: Any) -> None:
    """Gives every `Linear` in a module its zeros, within the function that is differentiated.

    Args:
        module: The module, such as `flax.nnx.merge` returns.
        statistics: What `memopt.zero_statistics` returns of the module's parameters, or that of a
            part of them; None gives nothing.

    Example:
        >>> import jax, jax.numpy as jnp, memopt
        >>> class MLP(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.up, self.down = Linear(4, 8, rngs=rngs), Linear(8, 4, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.down(nnx.relu(self.up(x)))
        >>> graphdef, params = nnx.split(MLP(nnx.Rngs(0)), nnx.Param)
        >>> def loss(params, statistics, x):
        ...     model = nnx.merge(graphdef, params)
        ...     set_statistics(model, statistics)
        ...     return jnp.square(model(x) - x).mean()
        >>> tx, gradient = memopt.mkor(0.1), jax.grad(loss, argnums=(0, 1))
        >>> g, seen = gradient(params, memopt.zero_statistics(params), jnp.ones((3, 5, 4)))
        >>> updates, state = tx.update(g, tx.init(params), params, statistics=seen)
        >>> int(seen["up"]["kernel"].tokens)
        15

    """
    for name, part in (statistics or {}).items():
        if isinstance(part, Mapping):
            set_statistics(getattr(module, name) if isinstance(name, str) else module[name], part)
        elif isinstance(part, LayerStatistics):
            module.statistics = nnx.data(part)
