"""Times optimizer steps alone, on a model's parameters and fixed gradients."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import AxisType, NamedSharding
from rich.progress import track

import memopt
from benchmarks import torch_optimizers
from benchmarks.report import milliseconds, spread
from memopt.models import llama
from memopt.planning.step_memory import bytes_here
from memopt.transforms import eigenbasis
from memopt.transforms.projectors import base, tracked
from memopt.trees import leaf_name

LEARNING_RATE = 1e-4

Apply = Callable[[Any, Any, jax.Array], Any]


class Contender(NamedTuple):
    """A compiled optimizer step.

    Attributes:
        name: the optimizer's name.
        library: its library, such as "memopt", "optax" or "torch".
        step: takes one step and waits for it.
        state_bytes: the bytes of its state.
        temp_bytes: the bytes that a step allocates in addition to parameters, state and gradients;
            None if unknown.
        least_bytes: the minimum of bytes that a step moves: gradients read once, parameters and
            state read and written once.
        compile_seconds: seconds for tracing and compiling; None if nothing is compiled.
    """

    name: str
    library: str
    step: Callable[[], None]
    state_bytes: int
    temp_bytes: int | None
    least_bytes: int
    compile_seconds: float | None = None


class Parameters:
    """One set of parameters with fixed gradients, shared by all contenders to save memory.

    Args:
        shapes: the shapes and dtypes of parameters and gradients.
        places: their shardings.
        weights: how the parameters are stored, see `memopt.quantize_params`; None for not
            quantised.
    """

    def __init__(self, shapes: Any, places: Any, weights: str | None = None) -> None:
        keys = optax.tree.split_key_like(jax.random.key(0), shapes)

        def normal(scale: float) -> Any:
            one = lambda x, key: scale * jax.random.normal(key, x.shape, x.dtype)
            return jax.jit(lambda: jax.tree.map(one, shapes, keys), out_shardings=places)()

        (self.mesh,) = {place.mesh for place in jax.tree.leaves(places)}
        self.values, self.gradients = normal(0.02), normal(1e-3)
        if weights:
            store = lambda values: memopt.quantize_params(values, weights)
            like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            stored = store(jax.tree.map(like, self.values))
            where = jax.tree.map(lambda x: x.sharding, stored)
            self.values = jax.jit(store, donate_argnums=0, out_shardings=where)(self.values)

    def contender(
        self,
        name: str,
        library: str,
        tx: optax.GradientTransformation,
        apply: Apply = lambda params, updates, _: optax.apply_updates(params, updates),
        init: Callable[[optax.GradientTransformation, Any], Any] = memopt.init_sharded,
    ) -> Contender:
        """Compiles a step, with its state sharded by `memopt.state_sharding`.

        Args:
            name: the contender's name.
            library: the contender's library.
            tx: the optimizer.
            apply: maps parameters, updates and the number of previous steps to the new parameters.
            init: maps the optimizer and parameters to the first state.
        """

        def one_step(params: Any, state: Any, count: jax.Array, gradients: Any) -> Any:
            updates, state = tx.update(gradients, state, memopt.dequantize_params(params))
            return apply(params, updates, count), state, count + 1

        with jax.set_mesh(self.mesh):
            state = init(tx, self.values)
            where = jax.tree.map(lambda x: x.sharding, (self.values, state))
            count = jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(self.mesh, jax.P()))
            start = time.perf_counter()
            jitted = jax.jit(
                one_step, donate_argnums=(0, 1, 2), out_shardings=(*where, count.sharding)
            )
            compiled = jitted.lower(self.values, state, count, self.gradients).compile()
            seconds = time.perf_counter() - start

        def step() -> None:
            nonlocal state, count
            self.values, state, count = compiled(self.values, state, count, self.gradients)
            jax.block_until_ready((self.values, state))

        memory = compiled.memory_analysis()
        temp = None if memory is None else memory.temp_size_in_bytes
        least = bytes_here(self.gradients) + 2 * bytes_here((self.values, state))
        size = memopt.state_bytes(tx, self.values).total
        return Contender(name, library, step, size, temp, least, seconds)


def on_one_device(shapes: Any, weights: str | None = None) -> Parameters:
    """Returns unsplit parameters on the first device."""
    here = NamedSharding(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,)), jax.P())
    return Parameters(shapes, jax.tree.map(lambda _: here, shapes), weights)


def optax_muon(learning_rate: float) -> optax.GradientTransformation:
    """Optax's Muon with each layer of a stack as a matrix, and AdamW for other parameters."""
    dimensions = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)

    def choose(params: Any) -> Any:
        return jax.tree.map(lambda x: dimensions if x.ndim == 3 else None, params)

    return optax.contrib.muon(learning_rate, muon_weight_dimension_numbers=choose)


@contextlib.contextmanager
def between_refreshes(state: Any) -> Iterator[Any]:
    """Traces an update between two refreshes of a subspace, from the state that it yields.

    Every count in the optimizer's state is the constant 1, and no matrix waits for its first basis.
    The compiler then knows that the step does not refresh, and removes the conditionals;
    otherwise it would count a branch of each, whether taken or not.
    """
    is_count = lambda x: x.shape == () and x.dtype == jnp.int32
    never = lambda basis: jnp.zeros(basis.shape[:-2], bool)
    with (
        mock.patch.object(base, "is_unchosen", never),
        mock.patch.object(tracked, "is_unchosen", never),
        mock.patch.object(eigenbasis, "is_unchosen", never),
    ):
        yield jax.tree.map(lambda x: jnp.ones_like(x) if is_count(x) else x, state)


def torch_contenders(
    shapes: Any, dtype: str, names: Sequence[str], device: str = "cpu"
) -> list[Contender]:
    """Builds torch's optimizers on the same shapes."""
    if not names:
        return []
    leaves = [(leaf_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(shapes)]
    hidden = [leaf.shape for name, leaf in leaves if memopt.hidden_matrices(name, leaf)]
    rest = [leaf.shape for name, leaf in leaves if not memopt.hidden_matrices(name, leaf)]
    parameters = torch_optimizers.TorchParameters(hidden, rest, dtype, device)
    stored = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for _, leaf in leaves)

    def contender(name: str) -> Contender:
        optimizer = parameters.optimizer(name, LEARNING_RATE)
        size = torch_optimizers.state_bytes(optimizer)

        def step() -> None:
            optimizer.step()
            parameters.wait()

        return Contender(name, "torch", step, size, None, 3 * stored + 2 * size)

    return [contender(name) for name in names]


def model_shapes(
    model: str,
    dtype: Literal["float32", "bfloat16"],
    layout: Literal["stacked", "list"] = "stacked",
) -> Any:
    """The shapes of a preset's parameters, with the blocks stacked or each with its own arrays."""
    config = dataclasses.replace(llama.preset(model), param_dtype=dtype)
    shapes = llama.abstract_params(config)
    if layout == "stacked":
        return shapes
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes["blocks"])
    return shapes | {"blocks": {str(i): one for i in range(config.num_layers)}}


def measure(found: Sequence[Contender], repeats: int) -> list[dict[str, Any]]:
    """Records the milliseconds of each step, and their ratio to the first contender's."""
    times: list[list[float]] = [[] for _ in found]
    for _ in track(range(repeats + 2), description="rounds", transient=True):
        for contender, taken in zip(found, times, strict=True):
            time.sleep(0.01)  # threads of the previous one may still be spinning
            taken.append(milliseconds(contender.step))
    times = [taken[2:] for taken in times]  # the first rounds warm up
    return [
        {
            "name": contender.name,
            "library": contender.library,
            "milliseconds": spread(taken),
            "ratio": spread([a / b for a, b in zip(taken, times[0], strict=True)]),
            "state_bytes": contender.state_bytes,
            "temp_bytes": contender.temp_bytes,
        }
        for contender, taken in zip(found, times, strict=True)
    ]
