"""A training step of a LLaMA, ordinary or released, on any devices: real ones or a compiler's."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh

import memopt
from benchmarks.updates import between_refreshes
from memopt.models import llama
from memopt.training.placement import abstract_state, batch_sharding, parse_mesh, place_update
from memopt.training.release import release_step
from memopt.training.step import Metrics, TrainState, init_state, train_step

Weights = Literal["int8", "int4", "bfloat16+8"]
State = Literal["int8", "int4", "float8", "bfloat16"]


class Options(NamedTuple):
    """The options of a training step.

    Attributes:
      model: a preset.
      optimizer: a name known to `memopt.optimizer`.
      release: update each block while the backward pass runs; otherwise blocks are rematerialised.
      weights: how the parameters are stored; by default as they are.
      state: how the optimizer's state is stored; by default as the method does.
      dtype: of parameters and activations.
      mesh: axes and their sizes, such as "fsdp=16"; by default one device.
      batch_size: rows, of all devices together.
      seq_len: tokens a row.
      accumulation: in how many micro-batches the batch is worked through.
      refresh: whether the step may be one that refreshes a subspace.
      learning_rate: constant.
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

    @property
    def sizes(self) -> dict[str, int]:
        """The axes of the mesh."""
        return parse_mesh(self.mesh) if self.mesh else {"data": 1}


class TrainingStep:
    """A step that `memopt pretrain` would take with these options.

    Called, it maps a state, which is donated, and a batch to a state and metrics.

    Args:
      options: its options.
      devices: at least as many as the mesh has.

    Attributes:
      like: the shapes and shardings of its state.
      shardings: the shardings alone.
    """

    def __init__(self, options: Options, devices: Sequence[jax.Device]) -> None:
        self.options = options
        self.config = dataclasses.replace(
            llama.preset(options.model),
            param_dtype=options.dtype,
            dtype=options.dtype,
            remat="none" if options.release else "full",
        )
        sizes = options.sizes
        self.mesh = Mesh(
            np.array(devices[: math.prod(sizes.values())]).reshape(tuple(sizes.values())),
            tuple(sizes),
            axis_types=(AxisType.Auto,) * len(sizes),
        )
        params = self._store(llama.abstract_params(self.config, self.mesh))
        tx = memopt.optimizer(options.optimizer, options.learning_rate)
        if options.state is not None:
            tx = memopt.quantize_state(tx, options.state)
        by_layer = options.release
        self.tx, places = place_update(tx, options.optimizer, params, by_layer=by_layer)
        self.like: TrainState = abstract_state(params, self.tx, self.mesh, places)
        self.shardings = jax.tree.map(lambda x: x.sharding, self.like)
        out = (self.shardings, None)
        self._jitted = jax.jit(self._step(), donate_argnums=0, out_shardings=out)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Takes the step. JAX compiles it at the first call, unless `compile` has."""
        with jax.set_mesh(self.mesh):
            return self._jitted(state, batch)

    def compile(self, compiler_options: dict[str, Any] | None = None) -> jax.stages.Compiled:
        """The compiled step; called by itself it refuses arrays of 4 bits in jax 0.10."""
        shape = (self.options.batch_size, self.options.seq_len)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(self.mesh))
        with jax.set_mesh(self.mesh):
            lowered = self._jitted.lower(self.like, {"inputs": tokens, "targets": tokens})
            return lowered.compile(compiler_options)

    def compile_init(self, seed: int = 0) -> jax.stages.Compiled:
        """The compiled function that makes the first state, its parameters a layer at a time."""

        def init() -> TrainState:
            params = llama.init_params(self.config, seed=seed, store=self._store)
            return init_state(params, self.tx)

        with jax.set_mesh(self.mesh):
            return jax.jit(init, out_shardings=self.shardings).lower().compile()

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch on the devices."""
        return jax.device_put(batch, batch_sharding(self.mesh))

    def _store(self, params: Any) -> Any:
        weights = self.options.weights
        return memopt.quantize_params(params, weights) if weights else params

    def _step(self) -> Any:
        options = self.options
        if options.release:
            step: Any = functools.partial(
                release_step,
                model=llama.stacked_model(self.config),
                shardings=self.shardings.params,
            )
        else:
            graph, _ = nnx.split(llama.abstract_model(self.config), nnx.Param)
            loss = lambda params, batch: llama.loss(nnx.merge(graph, params), batch)
            step = functools.partial(train_step, loss=loss)
        step = functools.partial(
            step,
            tx=self.tx,
            learning_rate=optax.constant_schedule(options.learning_rate),
            accumulation=options.accumulation,
        )
        if options.refresh:
            return step
        return lambda state, batch: step(
            state._replace(opt_state=between_refreshes(state.opt_state)), batch
        )
