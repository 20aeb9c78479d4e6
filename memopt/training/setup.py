"""The training step of a LLaMA and all it is compiled from: shapes, shardings and functions.

Training, benchmarks and planning compile the same step, planning for devices that only a compiler
knows.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from memopt.models import llama
from memopt.optimizers.registry import eval_params, find_method
from memopt.state.quantized_params import dequantize_params, quantize_params
from memopt.training.measure import Measure
from memopt.training.placement import abstract_state, batch_sharding, place_update
from memopt.training.release import release_step
from memopt.training.step import Batch, Metrics, Predict, TrainState, init_state, train_step

Step = Callable[..., tuple[TrainState, Metrics]]
Remake = Callable[[optax.Schedule], tuple[optax.GradientTransformation, Predict | None]]


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """A training step, ready to be compiled. It holds no array.

    Attributes:
        model_config: The model's shapes and options.
        mesh: The devices. On those of a compiler the step can be compiled, but not run.
        tx: The optimizer.
        learning_rate: Its schedule.
        weights: How matrices are stored, see `memopt.quantize_params`; None: as they are.
        state: The shapes, dtypes and shardings of the state.
        batch: The shapes, dtypes and shardings of a batch.
        step: `train_step` or `release_step` with this model and optimizer, a pure function. That of
            a controlled run takes a tuple of batches and the learning rate, in place of a batch.
        optimizer: The optimizer's name, as of `memopt.optimizer`.
        controlled: Whether the run has a controller.
    """

    model_config: llama.LlamaConfig
    mesh: Mesh
    tx: optax.GradientTransformation
    learning_rate: optax.Schedule
    weights: str | None
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    step: Step
    optimizer: str
    controlled: bool = False

    def model(self, params: Any) -> llama.Llama:
        """Returns the model with these parameters, stored as in the state."""
        return llama.build_model(self.model_config, params)

    def loss(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the summed loss of a batch and its number of tokens."""
        return llama.loss(self.model(params), batch)

    def eval_params(self, state: TrainState) -> Any:
        """Returns the parameters to evaluate, sample and export, see `memopt.eval_params`.

        They are those of the state, stored as there, or other ones, which are not quantised.
        """
        if find_method(self.optimizer).eval_params is None:
            return state.params
        return self._eval_params(state.opt_state, state.params)

    @functools.cached_property
    def _eval_params(self) -> Any:
        find = lambda opt_state, params: eval_params(
            self.optimizer, opt_state, dequantize_params(params)
        )
        return jax.jit(find)

    @functools.cached_property
    def jitted(self) -> Any:
        """`step`, jitted, with the state donated and returned with the shardings of `state`."""
        return jax.jit(self.step, donate_argnums=0, out_shardings=(_shardings(self.state), None))

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The shapes and shardings of what `step` takes, with one batch."""
        if not self.controlled:
            return self.state, self.batch
        return self.state, (self.batch,), jax.ShapeDtypeStruct((), "float32")

    def lower(self) -> jax.stages.Lowered:
        """Lowers `jitted` for the devices of the mesh."""
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(*self.arguments)

    def compile(self, compiler_options: dict[str, Any] | None = None) -> jax.stages.Compiled:
        """Compiles `jitted`.

        Calls of `jitted` do not compile again. The result is for its analyses of memory and cost:
        called by itself, it refuses arrays of 4 bits in jax 0.10.

        Args:
            compiler_options: XLA's options.
        """
        return self.lower().compile(compiler_options)

    def jit_init(self, seed: int | jax.Array) -> Any:
        """Returns a jitted function without arguments that makes the first state.

        Its parameters are made, and quantised, a layer at a time.

        Args:
            seed: Decides the parameters: a number, or ``jax.random.key`` of it.
        """

        def init() -> TrainState:
            store = functools.partial(store_params, weights=self.weights)
            params = llama.init_params(self.model_config, seed=seed, store=store)
            return init_state(params, self.tx)

        return jax.jit(init, out_shardings=_shardings(self.state))

    def place(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Puts this process's rows of a batch on its devices."""
        like = next(iter(self.batch.values()))
        return jax.make_array_from_process_local_data(like.sharding, batch, like.shape)


def set_up(
    model_config: llama.LlamaConfig,
    mesh: Mesh,
    tx: optax.GradientTransformation,
    batch: dict[str, jax.ShapeDtypeStruct],
    *,
    optimizer: str,
    learning_rate: optax.Schedule,
    weights: str | None = None,
    release: bool = False,
    accumulation: int = 1,
    predict: Predict | None = None,
    remake: Remake | None = None,
    measure: Measure | None = None,
) -> Setup:
    """Places parameters and optimizer state on a mesh, abstractly, and puts the step together.

    Args:
        model_config: The model's shapes and options.
        mesh: The devices, with Auto axes; those of a compiler will do.
        tx: The optimizer.
        batch: The shapes and shardings of a batch, as `abstract_batch` returns them.
        optimizer: The optimizer's name, as of `memopt.optimizer`; decides where its update runs.
        learning_rate: The schedule `tx` follows.
        weights: How to store matrices, see `memopt.quantize_params`; None: as they are.
        release: Whether to update each block while the backward pass runs.
        accumulation: In how many micro-batches a batch is worked through.
        predict: Where to take the gradient, see `train_step`; None: at the parameters.
        remake: For a controlled run: returns `tx` and `predict` with another schedule.
        measure: What to measure of the micro-batches' gradients, see `train_step`.

    Returns:
        The step and all that it is compiled from.

    Raises:
        ValueError: `predict` is given with `release`, which never holds all predicted parameters.

    Example:
        >>> import memopt
        >>> from memopt.training.placement import make_mesh
        >>> mesh = make_mesh("data=1", rows=2)
        >>> setup = set_up(
        ...     llama.preset("tiny"),
        ...     mesh,
        ...     memopt.lion(1e-4),
        ...     abstract_batch(mesh, batch_size=2, seq_len=16),
        ...     optimizer="lion",
        ...     learning_rate=optax.constant_schedule(1e-4),
        ... )
        >>> setup.state.params["blocks"]["mlp"]["up"]["kernel"].shape
        (4, 192, 512)
        >>> state, metrics = jax.eval_shape(setup.step, setup.state, setup.batch)
        >>> metrics["loss"].shape
        ()
    """
    if release and predict:
        raise ValueError(
            "predict_steps must be left out with release, whose step never holds a second copy of "
            "all parameters."
        )
    params = store_params(llama.abstract_params(model_config, mesh), weights)
    place = functools.partial(
        place_update, name=optimizer, params=params, one_layer_at_a_time=release
    )
    given: dict[str, Any] = {"measure": measure}
    if release:
        given |= {"model": llama.stacked_model(model_config), "shardings": _shardings(params)}
    else:
        given["observe"] = find_method(optimizer).needs == "statistics"
        given["loss"] = lambda params, batch, **given: llama.loss(
            llama.build_model(model_config, params), batch, **given
        )

    def bind(
        tx: optax.GradientTransformation, rate: optax.Schedule, predict: Predict | None, pieces: int
    ) -> Step:
        options: Any = {"tx": tx, "learning_rate": rate, "accumulation": pieces}
        if release:
            return functools.partial(release_step, **given, **options)
        return functools.partial(train_step, **given, **options, predict=predict)

    def controlled_step(
        state: TrainState, batches: Sequence[Batch], rate: jax.Array, *, remake: Remake
    ) -> tuple[TrainState, Metrics]:
        schedule = lambda _: rate
        tx, predict = remake(schedule)
        step = bind(place(tx)[0], schedule, predict, accumulation * len(batches))
        return step(state, interleave(batches))

    tx, places = place(tx)
    state = abstract_state(params, tx, mesh, places)
    if remake:
        step: Step = functools.partial(controlled_step, remake=remake)
    else:
        step = bind(tx, learning_rate, predict, accumulation)
    return Setup(
        model_config,
        mesh,
        tx,
        learning_rate,
        weights,
        state,
        batch,
        step,
        optimizer,
        controlled=remake is not None,
    )


def interleave(batches: Sequence[Batch]) -> Batch:
    """Returns the rows of all batches in one, those of each device from its own rows.

    Example:
        >>> import numpy as np
        >>> interleave([{"x": np.array([[0], [1]])}, {"x": np.array([[10], [11]])}])["x"].tolist()
        [[0], [10], [1], [11]]
    """
    if len(batches) == 1:
        return batches[0]
    join = lambda *xs: jnp.stack(xs, axis=1).reshape(-1, *xs[0].shape[1:])
    return jax.tree.map(join, *batches)


def store_params(params: Any, weights: str | None) -> Any:
    """Returns parameters as `memopt.quantize_params` stores them, or as they are for None."""
    return quantize_params(params, weights) if weights else params


def abstract_batch(
    mesh: Mesh, batch_size: int, seq_len: int, names: tuple[str, ...] = ("inputs", "targets")
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and shardings of a batch: int32 (batch_size, seq_len) each, rows split.

    Args:
        mesh: The devices.
        batch_size: Rows, of all devices together.
        seq_len: Tokens of a row.
        names: The arrays.

    Example:
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> abstract_batch(mesh, batch_size=2, seq_len=16)["targets"].shape
        (2, 16)
    """
    shape, sharding = (batch_size, seq_len), batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, "int32", sharding=sharding) for name in names}


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
