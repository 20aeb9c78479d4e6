"""The training step of a model that is not memopt's, on abstract arrays."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from memopt.errors import check_at_least
from memopt.models.stacked import StackedModel
from memopt.optimizers import optimizer as named_optimizer
from memopt.state.quantized_params import dequantize_params
from memopt.state.quantized_state import store_state
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
    loss: Loss | StackedModel,
    batch: Any,
    *,
    optimizer: str | optax.GradientTransformation,
    mesh: str | None,
    batch_size: int | None,
    release: bool,
    weights: str | None,
    state: str | None,
    remat: str | None,
    accumulation: int,
) -> Callable[[Sequence[jax.Device], str], OwnStep]:
    """Returns a function that maps devices, and the chip they are of, to the step on them.

    The arguments are those of `memopt.plan_step`.

    Raises:
        ValueError: The arguments do not go together.
    """
    check_at_least("accumulation", accumulation, 1)
    remat = _check_remat(loss, release, remat)
    batch = batch if batch_size is None else _with_rows(batch, batch_size)
    rate = optax.constant_schedule(1e-3)
    if isinstance(optimizer, str):
        tx: optax.GradientTransformation = named_optimizer(optimizer, rate, state=state)
    else:
        tx = store_state(optimizer, state)
    options: Any = {"tx": tx, "learning_rate": rate, "accumulation": accumulation}

    def make(devices: Sequence[jax.Device], _: str) -> OwnStep:
        lengths = [x.shape[0] for x in jax.tree.leaves(batch) if x.shape]
        for rows in lengths:
            if rows % accumulation:
                raise ValueError(
                    f"accumulation={accumulation} does not divide batch, which has {rows} rows."
                )
        rows = max(lengths, default=1)
        here = make_mesh(mesh, rows // accumulation, devices)
        placed = store_params(_place_params(params, here), weights)
        _check_loss(loss, placed, batch, accumulation, here)
        step: Any
        if release:
            shardings = jax.tree.map(lambda x: x.sharding, placed)
            model: Any = loss
            step = functools.partial(release_step, model=model, shardings=shardings, **options)
        else:
            whole: Any = loss
            if isinstance(loss, StackedModel):
                whole = functools.partial(loss.loss, remat=remat == "full")
            step = functools.partial(train_step, loss=whole, **options)
        return OwnStep(step, abstract_state(placed, tx, here), _place_batch(batch, here), here)

    return make


def _check_remat(loss: Any, release: bool, remat: str | None) -> str:
    """Checks what goes with a kind of loss; returns what the backward pass computes again."""
    stacked = isinstance(loss, StackedModel)
    if release and not stacked:
        raise ValueError("release needs a memopt.models.StackedModel as loss, got a function.")
    remat = remat or ("none" if release or not stacked else "full")
    if remat != "none" and (not stacked or release or remat != "full"):
        raise ValueError(
            f"remat={remat!r} must be left out: only a StackedModel's ordinary step takes 'full'."
        )
    return remat


def _with_rows(batch: Any, rows: int) -> Any:
    """A batch with another number of rows, abstractly."""
    check_at_least("batch_size", rows, 1)
    found = sorted({x.shape[0] for x in jax.tree.leaves(batch) if x.shape})
    if len(found) != 1:
        raise ValueError(
            f"batch_size={rows} needs a batch whose arrays all have the same number of rows, got "
            f"{', '.join(map(str, found)) or 'none'}."
        )
    resize = lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) if x.shape else x
    return jax.tree.map(resize, batch)


def _check_loss(
    loss: Loss | StackedModel, params: Any, batch: Any, accumulation: int, mesh: Mesh
) -> None:
    """Traces a loss on a micro-batch; raises unless it returns two scalars."""
    whole, name = (loss.loss, "head") if isinstance(loss, StackedModel) else (loss, "loss")

    def of_micro_batch(params: Any, batch: Any) -> Any:
        pieces = cut_batch(batch, accumulation, None, jnp.zeros((), jnp.int32))
        return whole(dequantize_params(params), jax.tree.map(lambda x: x[0], pieces))

    try:
        with jax.set_mesh(mesh):
            found = jax.eval_shape(of_micro_batch, params, _place_batch(batch, mesh))
    except Exception as error:
        shapes = ", ".join(str(x.shape) for x in jax.tree.leaves(batch))
        line = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"loss fails on a batch of shapes {shapes} ({type(error).__name__}: {line})."
        ) from error
    if not isinstance(found, tuple) or [getattr(x, "shape", None) for x in found] != [(), ()]:
        raise ValueError(
            f"{name} must return (summed loss, number of tokens), two scalars, got {found}."
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
