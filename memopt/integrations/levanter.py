"""memopt's optimizers in Levanter's configuration."""

import dataclasses
from typing import Any

import jax
import optax

from memopt.matrices import Matrix, Reoriented
from memopt.optimizers.registry import available, optimizer
from memopt.trees import leaf_name


def register_levanter() -> type:
    """Registers ``type: memopt`` among Levanter's optimizers.

    A configuration then has, beside Levanter's own options for the learning rate, its schedule
    and the decay:

    - `method`: one of `memopt.available`; only memopt's own methods take the decay.
    - `options`: keyword arguments of the method.
    - `max_grad_norm`: gradients are clipped to this norm, 1.0 by default as elsewhere in
      Levanter; 0 does not clip.

    Which axes of a kernel are inputs is read from Levanter's layers.

    Returns:
        The configuration's class, for trainers that are configured in Python. A second call
        returns the same.

    Raises:
        ImportError: if Levanter is not installed.

    Example:
        ```yaml
        optimizer:
          type: memopt
          method: apollo_mini
          learning_rate: 0.01
          options: {rank: 4}
        ```
    """
    from levanter.optim.config import OptimizerConfig

    if "memopt" in OptimizerConfig.get_known_choices():
        return OptimizerConfig.get_choice_class("memopt")

    @OptimizerConfig.register_subclass("memopt")
    @dataclasses.dataclass(frozen=True)
    class MemoptConfig(OptimizerConfig):
        method: str = "apollo_mini"
        options: dict = dataclasses.field(default_factory=dict)
        max_grad_norm: float = 1.0

        def build(self, num_train_steps: int) -> optax.GradientTransformationExtraArgs:
            def make(learning_rate: Any, matrices: Any) -> optax.GradientTransformation:
                own: dict[str, Any] = {}
                if self.method in available("memopt"):
                    own = {
                        "matrices": matrices,
                        "weight_decay": self.weight_decay,
                        "weight_decay_mask": self.build_weight_decay_mask(),
                    }
                tx = optimizer(self.method, learning_rate, **(own | self.options))
                if not self.max_grad_norm:
                    return tx
                return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), tx)

            def tx_for(params: Any) -> optax.GradientTransformationExtraArgs:
                # Levanter logs the learning rate that it finds in the state.
                injected = optax.inject_hyperparams(make, static_args="matrices")
                rate = self.lr_scheduler(num_train_steps)
                return injected(learning_rate=rate, matrices=_orientation(params))

            return optax.GradientTransformationExtraArgs(
                lambda params: tx_for(params).init(params),
                lambda updates, state, params, **extra: tx_for(params).update(
                    updates, state, params, **extra
                ),
            )

    return MemoptConfig


def _orientation(params: Any) -> Reoriented:
    """Reads which axes of kernels are inputs, and which outputs, from a model's linear layers."""

    def is_linear(x: Any) -> bool:
        found = all(hasattr(x, name) for name in ("In", "Out", "weight"))
        return found and bool(jax.tree.leaves(x.weight))  # none if it is frozen

    layers, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_linear)
    found = {f"{leaf_name(path)}/weight": _axes(x) for path, x in layers if is_linear(x)}
    return Reoriented(lambda name, matrix: found.get(name, matrix))


def _axes(linear: Any) -> Matrix:
    names = [axis.name for axis in linear.weight.axes]

    def positions(axes: Any) -> tuple[int, ...]:
        axes = axes if isinstance(axes, tuple) else (axes,)
        return tuple(names.index(axis.name) for axis in axes)

    return Matrix(positions(linear.In), positions(linear.Out))
