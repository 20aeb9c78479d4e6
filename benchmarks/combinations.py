"""Combines every optimizer with every wrapper and writes the table of docs/combinations.md.

    python -m benchmarks.combinations [--optimizers adafactor galore ...]

Each combination trains a few steps and is compared with the same optimizer alone: "✓" if it does
what docs/combinations.md says, a letter if it is refused (the sentences stand below the table),
otherwise what happens instead. Every result is saved as it is found; run it again with some names
to replace their rows.
"""

import functools
import os
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = (  # what is compiled runs for milliseconds
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding

import memopt
from benchmarks.extra_arguments import with_extra_arguments
from benchmarks.guarantees import HOLDS, are_close, draw
from benchmarks.report import measure_cells, table_of_cells
from benchmarks.results import write_pages
from memopt import projectors, recombine
from memopt.models import llama
from memopt.optimizers.registry import METHODS
from memopt.training.placement import make_mesh
from memopt.training.setup import abstract_batch, set_up
from memopt.training.step import init_state, train_step

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "combinations.json"
STEPS = 8
CONFIG = llama.LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)


def constant(name: str) -> float:
    """A learning rate at which the optimizer moves visibly in a few steps."""
    rates = {"lars": 1.0, "amsgrad": 1e-3, "came": 1e-4, "mkor": 1e-3, "oasis": 0.1}
    return rates.get(name, 1.0 if METHODS[name].finds_step else 1e-2)


def build(name: str) -> optax.GradientTransformationExtraArgs:
    """The optimizer, refreshing its subspace in time."""
    options: dict[str, Any] = {"rank": 4} if METHODS[name].has_free_rank else {}
    for option in {"refresh_every", "switch_every"} & METHODS[name].defaults.keys():
        options[option] = 3
    return memopt.optimizer(name, constant(name), **options)


def distance(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """The loss of the small problem: the squared distance from a target."""
    squares = jax.tree.map(lambda p, x: jnp.sum(jnp.square(p - x)), params, batch)
    return jax.tree.reduce(jnp.add, squares), jnp.asarray(1.0)


def descend(given: Any, name: str, place: Callable[[Any], Any] = lambda tree: tree) -> Any:
    """The parameters after some steps of the small problem."""
    tx = with_extra_arguments(lambda: given)()
    rate = optax.constant_schedule(constant(name))
    options: dict[str, Any] = {"loss": distance, "tx": tx, "learning_rate": rate}
    step = jax.jit(functools.partial(train_step, **options))
    state = jax.jit(functools.partial(init_state, tx=tx))(place(draw(0)))
    for t in range(STEPS):
        state, _ = step(state, place(draw(100 + t)))
    return state.params


def decrease(params: Any) -> float:
    """By how much these parameters are nearer to the mean target than the first ones."""
    targets = [draw(100 + t) for t in range(STEPS)]
    mean = jax.tree.map(lambda *x: sum(x) / STEPS, *targets)
    return float(distance(draw(0), mean)[0] - distance(params, mean)[0])


@functools.cache
def alone(name: str) -> Any:
    """The small problem's parameters, trained by the optimizer alone."""
    return descend(build(name), name)


def same(name: str, params: Any) -> str:
    """Whether parameters are those of the optimizer alone."""
    return HOLDS if are_close(params, alone(name)) else "differs"


def nearly(name: str, params: Any) -> str:
    """Whether parameters have come at least 0.8 times as far as with the optimizer alone."""
    found, expected = decrease(params), decrease(alone(name))
    return HOLDS if found >= 0.8 * expected > 0 else f"{found / expected:.2f}"


def stored(name: str, codec: str) -> str:
    """The state is stored in fewer bits."""
    return nearly(name, descend(memopt.quantize_state(build(name), codec, min_size=64), name))


def inside_subspace(name: str) -> str:
    """The optimizer runs on projected gradients, and its updates are lifted."""
    inside = memopt.in_subspace(
        build(name), projectors.gaussian(4), recombine.lift(), 3, on_refresh="reset"
    )
    return HOLDS if decrease(descend(inside, name)) > 0 else "does not descend"


def skipping(name: str) -> str:
    """Wrapped in `memopt.skip_nonfinite`, with finite gradients."""
    return same(name, descend(memopt.skip_nonfinite(build(name)), name))


def explicit(name: str) -> str:
    """Parameters split over 2×4 devices with Explicit axes."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    specs = {"blocks": {"kernel": jax.P(None, "a", "b")}, "bias": jax.P("b")}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    with jax.set_mesh(mesh):
        return same(name, descend(build(name), name, lambda x: jax.device_put(x, shardings)))


def pretrain(name: str, mesh: str = "data=1", **options: Any) -> tuple[Any, list[float]]:
    """The parameters and the losses of a tiny LLaMA, trained as `memopt pretrain` does."""
    devices = make_mesh(mesh, rows=8)
    setup = set_up(
        CONFIG,
        devices,
        build(name),
        abstract_batch(devices, batch_size=8, seq_len=8),
        optimizer=name,
        learning_rate=optax.constant_schedule(constant(name)),
        **options,
    )
    with jax.set_mesh(devices):
        state = setup.jit_init(0)()
        losses = []
        for t in range(STEPS):
            tokens = jax.random.randint(jax.random.key(t % 2), (8, 9), 0, 64)
            batch = setup.place({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]})
            state, metrics = setup.jitted(state, batch)
            losses.append(float(metrics["loss"]))
    return jax.device_get(state.params), losses


@functools.cache
def llama_alone(name: str) -> tuple[Any, list[float]]:
    """The same by the ordinary step on one device."""
    return pretrain(name)


def same_llama(name: str, **options: Any) -> str:
    """A LLaMA is trained otherwise, and its parameters end at nearly the same place.

    Where a gradient is nearly zero, Adam's update has the sign that rounding gives it.
    """
    (found, _), (expected, _) = pretrain(name, **options), llama_alone(name)
    apart = float(optax.global_norm(jax.tree.map(jnp.subtract, found, expected)))
    moved = float(optax.global_norm(jax.tree.map(jnp.subtract, expected, start())))
    return HOLDS if apart <= 1e-2 * moved else f"{apart / moved:.1e} apart"


@functools.cache
def start() -> Any:
    """The LLaMA's first parameters."""
    return jax.device_get(llama.init_params(CONFIG, seed=0))


def rounded_llama(name: str) -> str:
    """A LLaMA whose weights are stored in 8 bits learns as fast."""
    (_, found), (_, expected) = pretrain(name, weights="int8"), llama_alone(name)
    gains = [losses[0] - losses[-1] for losses in (found, expected)]
    return HOLDS if gains[0] >= 0.8 * gains[1] > 0 else f"{gains[0] / gains[1]:.2f}"


COMBINATIONS: dict[str, Callable[[str], str]] = {
    "in_subspace": inside_subspace,
    "int8 state": functools.partial(stored, codec="int8"),
    "int4 state": functools.partial(stored, codec="int4"),
    "int8 weights": rounded_llama,
    "skip_nonfinite": skipping,
    "release": functools.partial(same_llama, release=True),
    "mesh": functools.partial(same_llama, mesh="fsdp=4,tensor=2"),
    "released on a mesh": functools.partial(same_llama, mesh="fsdp=4,tensor=2", release=True),
    "Explicit axes": explicit,
}


def rows() -> tuple[str, ...]:
    """The optimizers of the table."""
    return (*memopt.available("memopt"), "adamw")


def found(name: str, combination: str) -> str:
    """The word for a combination, or the sentence with which it is refused."""
    try:
        return COMBINATIONS[combination](name)
    except ValueError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"fails: {type(error).__name__}: {error}"


def table(report: dict[str, Any]) -> str:
    """The table in Markdown, and the sentences of the refusals."""
    letters: dict[str, str] = {}

    def word(result: str) -> str:
        if not result.startswith("refused: "):
            return result
        sentence = result.removeprefix("refused: ").replace("\n", " ")
        return letters.setdefault(sentence, string.ascii_lowercase[len(letters)])

    results = report["results"]
    words = {
        name: {combination: word(result) for combination, result in results[name].items()}
        for name in rows()
        if name in results
    }
    notes = [f"- {letter}: {sentence}" for sentence, letter in letters.items()]
    return "\n".join((table_of_cells("optimizer", rows(), [*COMBINATIONS], words), *notes, ""))


def main() -> None:
    """Measures, and replaces the table in docs/combinations.md."""
    measure_cells(rows(), COMBINATIONS, found, RESULTS, __doc__)
    write_pages()


if __name__ == "__main__":
    main()
