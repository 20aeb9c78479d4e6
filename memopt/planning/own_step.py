"""The training step of a model that is not memopt's, on abstract arrays."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from memopt.errors import check_at_least
from memopt.models.stacked import StackedModel
from memopt.optimizers import optimizer as named_optimizer
from memopt.state.quantized_params import dequantize_params
from memopt.state.quantized_state import quantize_state
from memopt.training.placement import abstract_state, batch_sharding, make_mesh
from memopt.training.release import release_step
from memopt.training.setup import store_params
from memopt.training.step import Loss, TrainState, cut_batch, train_step


@dataclasses.dataclass(frozen=True, eq=False)
class OwnStep:
    """The step of a model that is no LLaMA, on abstract arrays.

    Attributes:
        step: A function of (state, batch).
        state: The shapes, dtypes and shardings of the state.
        batch: Those of a batch.
        mesh: The devices.
    """

    step: Callable[..., Any]
    state: TrainState
    batch: Any
    mesh: Mesh

    def lower(self) -> jax.stages.Lowered:
        """Lowers the step, jitted with the state donated, for the devices of the mesh."""
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        jitted = jax.jit(self.step, donate_argnums=0, out_shardings=(shardings, None))
        with jax.set_mesh(self.mesh):
            return jitted.lower(self.state, self.batch)


def own_step(
    params: Any,
    loss: Loss | StackedModel | None,
    batch: Any,
    optimizer: str | optax.GradientTransformation,
    given: Mapping[str, Any],
) -> Callable[[Sequence[jax.Device], str], OwnStep]:
    """Returns a function that maps devices, and the chip they are of, to the step on them.

    Args:
        params: As in `memopt.plan`.
        loss: As in `memopt.plan`.
        batch: As in `memopt.plan`.
        optimizer: As in `memopt.plan`.
        given: The other arguments of `memopt.plan`, by name.

    Raises:
        ValueError: The arguments do not go together.
    """
    remat = _check(loss, batch, given)
    rate = optax.constant_schedule(1e-3)
    tx = named_optimizer(optimizer, rate) if isinstance(optimizer, str) else optimizer
    tx = quantize_state(tx, given["state"]) if given["state"] else tx
    accumulation = 1 if given["accumulation"] is None else given["accumulation"]
    check_at_least("accumulation", accumulation, 1)
    options: Any = {"tx": tx, "learning_rate": rate, "accumulation": accumulation}

    def make(devices: Sequence[jax.Device], _: str) -> OwnStep:
        lengths = [x.shape[0] for x in jax.tree.leaves(batch) if x.shape]
        for rows in lengths:
            if rows % accumulation:
                raise ValueError(
                    f"accumulation={accumulation} does not divide batch, which has {rows} rows."
                )
        rows = max(lengths, default=1)
        mesh = make_mesh(given["mesh"], rows // accumulation, devices)
        placed = store_params(_place_params(params, mesh), given["weights"])
        state = abstract_state(placed, tx, mesh)
        step: Any
        if given["release"]:
            shardings = jax.tree.map(lambda x: x.sharding, placed)
            model: Any = loss
            step = functools.partial(release_step, model=model, shardings=shardings, **options)
        else:
            function: Any = loss
            if isinstance(loss, StackedModel):
                function = functools.partial(loss.loss, remat=remat == "full")
            _check_loss(function, placed, batch, accumulation, mesh)
            step = functools.partial(train_step, loss=function, **options)
        return OwnStep(step, state, _place_batch(batch, mesh), mesh)

    return make


def _check(loss: Any, batch: Any, given: Mapping[str, Any]) -> str:
    """Checks the arguments of `own_step`; returns what the backward pass computes again."""
    if loss is None or batch is None:
        raise ValueError("params goes with loss and batch, those of the same model.")
    taken = ("mesh", "release", "weights", "state", "accumulation", "remat")
    for name, value in given.items():
        if name not in taken and value is not None:
            raise ValueError(f"{name} must be left out with params, a model of your own.")
    stacked, release = isinstance(loss, StackedModel), given["release"]
    if release and not stacked:
        raise ValueError("release needs a memopt.models.StackedModel as loss, got a function.")
    remat = given["remat"] or ("none" if release or not stacked else "full")
    if remat != "none" and (not stacked or release or remat != "full"):
        raise ValueError(
            f"remat={remat!r} must be left out: only a StackedModel's ordinary step takes 'full'."
        )
    return remat


def _check_loss(loss: Loss, params: Any, batch: Any, accumulation: int, mesh: Mesh) -> None:
    """Traces a loss on a micro-batch; raises unless it returns two scalars."""

    def of_micro_batch(params: Any, batch: Any) -> Any:
        pieces = cut_batch(batch, accumulation, None, jnp.zeros((), jnp.int32))
        return loss(dequantize_params(params), jax.tree.map(lambda x: x[0], pieces))

    with jax.set_mesh(mesh):
        found = jax.eval_shape(of_micro_batch, params, _place_batch(batch, mesh))
    if not isinstance(found, tuple) or [getattr(x, "shape", None) for x in found] != [(), ()]:
        raise ValueError(
            f"loss must return (summed loss, number of tokens), two scalars, got {found}."
        )


def _place_params(params: Any, mesh: Mesh) -> Any:
    """Abstract parameters on a mesh, split as those that are given."""

    def place(x: Any) -> jax.ShapeDtypeStruct:
        here = getattr(x, "sharding", None)
        spec = here.spec if isinstance(here, NamedSharding) else jax.P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, params)


def _place_batch(batch: Any, mesh: Mesh) -> Any:
    """An abstract batch whose rows are split over a mesh."""

    def place(x: Any) -> jax.ShapeDtypeStruct:
        sharding = batch_sharding(mesh) if x.shape else NamedSharding(mesh, jax.P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, batch)
