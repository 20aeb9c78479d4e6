"""A LLaMA's ordinary or released training step, on real devices or devices to compile for."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import optax

import memopt
from benchmarks.updates import between_refreshes
from memopt.models import llama
from memopt.training.config import State, Weights
from memopt.training.placement import make_mesh
from memopt.training.setup import Step, abstract_batch, set_up
from memopt.training.step import Metrics, TrainState


class Options(NamedTuple):
    """The options of a training step.

    Attributes:
        model: a preset.
        optimizer: a name known to `memopt.optimizer`.
        release: update each block while the backward pass runs; otherwise blocks are
            rematerialised.
        weights: how the parameters are stored; by default not quantised.
        state: how the optimizer's state is stored; by default as in the method.
        dtype: the dtype of parameters and activations.
        mesh: axes and their sizes, such as "fsdp=16"; by default one device.
        batch_size: rows over all devices.
        seq_len: tokens per row.
        accumulation: the number of micro-batches per batch.
        refresh: whether the step may refresh a subspace.
        learning_rate: the constant learning rate.
    """

    model: str
    optimizer: str
    release: bool = False
    weights: Weights | None = None
    state: State | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    mesh: str | None = None
    batch_size: int = 1
    seq_len: int = 2048
    accumulation: int = 1
    refresh: bool = True
    learning_rate: float = 1e-3


class TrainingStep:
    """The step of `memopt pretrain` with these options.

    A call maps a state, which is donated, and a batch to the new state and metrics.

    Args:
        options: the options of the step.
        devices: at least as many devices as the mesh has.

    Attributes:
        config: the model's shapes and options.
        setup: the step and its inputs for compilation.
        like: the shapes and shardings of its state.
    """

    def __init__(self, options: Options, devices: Sequence[jax.Device]) -> None:
        self.config = dataclasses.replace(
            llama.preset(options.model),
            param_dtype=options.dtype,
            dtype=options.dtype,
            remat="none" if options.release else "full",
        )
        rows = options.batch_size // options.accumulation
        mesh = make_mesh(options.mesh or "data=1", rows, devices)
        tx = memopt.optimizer(options.optimizer, options.learning_rate)
        if options.state is not None:
            tx = memopt.quantize_state(tx, options.state)
        setup = set_up(
            self.config,
            mesh,
            tx,
            abstract_batch(mesh, options.batch_size, options.seq_len),
            optimizer=options.optimizer,
            learning_rate=optax.constant_schedule(options.learning_rate),
            weights=options.weights,
            release=options.release,
            accumulation=options.accumulation,
        )
        if not options.refresh:
            setup = dataclasses.replace(setup, step=without_refresh(setup.step))
        self.setup, self.like = setup, setup.state
        self.compile, self.place = setup.compile, setup.place

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Takes the step. JAX compiles it at the first call, unless `compile` has."""
        with jax.set_mesh(self.setup.mesh):
            return self.setup.jitted(state, batch)

    def compile_init(self, seed: int = 0) -> jax.stages.Compiled:
        """Compiles the function that initializes the state."""
        with jax.set_mesh(self.setup.mesh):
            return self.setup.jit_init(seed).lower().compile()


def without_refresh(step: Step) -> Step:
    """Returns the step as it is between two refreshes of a subspace."""

    def between(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        with between_refreshes(state.opt_state) as opt_state:
            return step(state._replace(opt_state=opt_state), batch)

    return between
