"""How long a step of Muon takes on a mesh, beside Optax's, in one process.

    python -m benchmarks.muon [--model 60m] [--mesh fsdp=8] [--repeats 10]

A step is one jitted ``update`` and ``apply_updates`` of a model's hidden matrices, with donated
parameters and state, on so many host devices; Optax's under Auto axes, which alone it knows, of
stacked layers (by its dimension numbers) and of separate ones. All take turns, round after round,
and each time is divided by memopt's of the same round.

Prints a table and writes it as JSON.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import optax
import optax.contrib
import tyro
from jax.sharding import AxisType
from rich.console import Console

import memopt
from benchmarks.report import save
from benchmarks.step_time import Contender, describe, measure, model_shapes, table
from memopt.matrices import leaf_name
from memopt.models import llama
from memopt.training.placement import parse_mesh

LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      model: the preset whose hidden matrices are taken.
      mesh: the axes of the mesh, all of whose devices are this machine's.
      repeats: rounds that are timed.
      output: the JSON file.
    """

    model: str = "60m"
    mesh: str = "fsdp=8"
    repeats: int = 10
    output: Path = Path(__file__).parent / "results" / "muon.json"


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree."""
    return {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def hidden(model: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a model's hidden matrices."""
    leaves = by_name(model_shapes(model, "float32"))
    return {name: leaf for name, leaf in leaves.items() if memopt.hidden_matrices(name, leaf)}


def places(model: str, mesh: jax.sharding.Mesh) -> dict[str, jax.NamedSharding]:
    """Where they lie."""
    found = by_name(llama.param_shardings(llama.abstract_model(llama.preset(model)), mesh))
    return {name: found[name] for name in hidden(model)}


def contender(
    name: str, tx: optax.GradientTransformation, shapes: Any, shardings: Any, mesh: Any
) -> Contender:
    """Compiles a step on random parameters and gradients in their places."""

    def draw(scale: float) -> Any:
        keys = optax.tree.split_key_like(jax.random.key(0), shapes)
        normal = lambda x, key: scale * jax.random.normal(key, x.shape, x.dtype)
        return jax.jit(lambda: jax.tree.map(normal, shapes, keys), out_shardings=shardings)()

    def apply(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        params, gradients = draw(0.02), draw(1e-3)
        state = memopt.init_sharded(tx, params)
        where = (shardings, memopt.state_sharding(tx, params))
        jitted = jax.jit(apply, donate_argnums=(0, 1), out_shardings=where)
        compiled = jitted.lower(params, state, gradients).compile()

    def step() -> None:
        nonlocal params, state
        params, state = compiled(params, state, gradients)
        jax.block_until_ready((params, state))

    memory = compiled.memory_analysis()
    temp = None if memory is None else memory.temp_size_in_bytes
    size = memopt.state_bytes(tx, params).total
    return Contender(name, name.partition("_")[0], step, size, temp)


def contenders(options: Options) -> list[Contender]:
    """Muon of memopt, and Optax's of stacked and of separate layers."""
    sizes = parse_mesh(options.mesh)
    axes = lambda kind: jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes)
    )
    explicit, auto = axes(AxisType.Explicit), axes(AxisType.Auto)
    stacked = hidden(options.model)
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    optax_stacked = optax.contrib.muon(
        LEARNING_RATE,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: numbers, params),
    )

    def layers(tree: Any, of_one: Any) -> dict[str, Any]:
        return {n: [of_one(x) for _ in range(stacked[n].shape[0])] for n, x in tree.items()}

    separate = layers(stacked, lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    apart = layers(
        places(options.model, auto), lambda s: jax.NamedSharding(s.mesh, jax.P(*s.spec[1:]))
    )
    return [
        contender(
            "memopt_muon",
            memopt.muon(LEARNING_RATE),
            stacked,
            places(options.model, explicit),
            explicit,
        ),
        contender("optax_stacked", optax_stacked, stacked, places(options.model, auto), auto),
        contender("optax_separate", optax.contrib.muon(LEARNING_RATE), separate, apart, auto),
    ]


def main(arguments: Sequence[str]) -> None:
    """Measures, prints the table and writes the file."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    jax.config.update("jax_num_cpu_devices", math.prod(parse_mesh(options.mesh).values()))
    found = contenders(options)
    shapes = hidden(options.model)
    report = describe("muon", arguments, shapes, options.model, "float32", options.repeats)
    report |= {"mesh": options.mesh, "results": measure(found, options.repeats)}
    Console().print(table(report, "memopt.muon"))
    save(report, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
