"""Optimizers of other JAX libraries, beside which `benchmarks.step_time` times memopt's.

Their packages are installed on their own: ``pip install rollfast flashoptim-jax``; rollfast's
subspaces need its release 1.3, and that Python 3.12. Each has the rank of memopt's method, a
quarter of the narrowest side of a matrix. rollfast's GaLore projects the longer side, memopt's the
shorter one.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import memopt
from benchmarks.updates import Apply
from memopt.trees import leaf_name

PACKAGES = ("rollfast", "flashoptim-jax")


class JaxOptimizer(NamedTuple):
    """An optimizer of another library.

    Attributes:
        package: the module that must be installed.
        build: maps a learning rate and a rank to the optimizer.
        apply: maps parameters, updates and the number of previous steps to the new parameters.
    """

    package: str
    build: Callable[[float, int], optax.GradientTransformation]
    apply: Apply = lambda params, updates, _: optax.apply_updates(params, updates)


def _rollfast(module: str, function: str, **options: Any) -> JaxOptimizer:
    def build(learning_rate: float, rank: int) -> optax.GradientTransformation:
        given = options | ({"rank": rank} if options.get("rank", 0) is None else {})
        return getattr(importlib.import_module(module), function)(learning_rate, **given)

    return JaxOptimizer("rollfast", build)


def _flashoptim(function: str) -> JaxOptimizer:
    """FlashOptim's state in 8 bits; its steps return new parameters in place of updates."""

    def build(learning_rate: float, rank: int) -> optax.GradientTransformation:
        import flashoptim_jax

        fused = jax.default_backend() == "gpu"  # its kernels are Triton's
        make = getattr(flashoptim_jax, function)
        made = make(learning_rate, fused=fused, master_weight_bits=None)
        update = lambda gradients, state, params: made.step(params, state, gradients)
        return optax.GradientTransformation(made.init, update)

    return JaxOptimizer("flashoptim_jax", build, lambda params, updates, _: updates)


JAX_OPTIMIZERS = {
    "rollfast_adamw8": _rollfast("rollfast.optim.adam8", "adamw8"),
    "rollfast_apollo": _rollfast("rollfast.optim.apollo", "apollo_adamw", rank=None),
    "rollfast_apollo_mini": _rollfast(
        "rollfast.optim.apollo", "apollo_adamw", rank=1, mini=True, scaling="tensor"
    ),
    "rollfast_galore": _rollfast("rollfast.optim.galore", "galore_adamw", rank=None),
    "rollfast_muon": _rollfast("rollfast", "muon"),
    "flashoptim_adamw": _flashoptim("flash_adamw"),
    "flashoptim_lion": _flashoptim("flash_lion"),
}


def installed() -> tuple[str, ...]:
    """The names in `JAX_OPTIMIZERS` whose packages are installed."""
    return tuple(
        name for name, of in JAX_OPTIMIZERS.items() if importlib.util.find_spec(of.package)
    )


def build(name: str, learning_rate: float, shapes: Any) -> optax.GradientTransformation:
    """Builds the optimizer of that name for parameters of these shapes.

    Raises:
        ValueError: if its package is not installed.
    """
    if name not in installed():
        package = JAX_OPTIMIZERS[name].package.replace("_", "-")
        raise ValueError(f"{name} needs the package {package}: pip install {package}")
    leaves = [(leaf_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(shapes)]
    sides = [min(leaf.shape[-2:]) for name, leaf in leaves if memopt.hidden_matrices(name, leaf)]
    return JAX_OPTIMIZERS[name].build(learning_rate, min(sides) // 4)
