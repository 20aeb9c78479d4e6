"""Compares the time of a step of Muon on a mesh with Optax's in one process.

    python -m benchmarks.muon [--model 60m] [--mesh fsdp=8] [--repeats 10]

A step is one jitted ``update`` and ``apply_updates`` of a model's hidden matrices, with donated
parameters and state, on the mesh's number of host devices. Optax's Muon supports only Auto axes; it
is timed with stacked layers (by its dimension numbers) and with separate ones. All are timed in
turn in each round, and each time is divided by memopt's in the same round.

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
from benchmarks.report import Report
from benchmarks.step_time import describe, table
from benchmarks.updates import Contender, Parameters, measure, model_shapes, optax_muon
from memopt.models import llama
from memopt.training.placement import parse_mesh
from memopt.trees import leaf_name

LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark.

    Attributes:
        model: the preset whose hidden matrices are used.
        mesh: the axes of the mesh of this machine's devices.
        repeats: the number of timed rounds.
        output: the JSON file.
    """

    model: str = "60m"
    mesh: str = "fsdp=8"
    repeats: int = 10
    output: Path = Path(__file__).parent / "results" / "muon.json"


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name."""
    return {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def hidden(model: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a model's hidden matrices."""
    leaves = by_name(model_shapes(model, "float32"))
    return {name: leaf for name, leaf in leaves.items() if memopt.hidden_matrices(name, leaf)}


def places(model: str, mesh: jax.sharding.Mesh) -> dict[str, jax.NamedSharding]:
    """The shardings of parameters and state."""
    found = by_name(llama.param_shardings(llama.abstract_model(llama.preset(model)), mesh))
    return {name: found[name] for name in hidden(model)}


def contenders(options: Options) -> list[Contender]:
    """Muon of memopt, and Optax's with stacked and with separate layers."""
    sizes = parse_mesh(options.mesh)
    axes = lambda kind: jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes)
    )
    explicit, auto = axes(AxisType.Explicit), axes(AxisType.Auto)
    stacked = hidden(options.model)

    def layers(tree: Any, of_one: Any) -> dict[str, Any]:
        return {n: [of_one(x) for _ in range(stacked[n].shape[0])] for n, x in tree.items()}

    separate = layers(stacked, lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    ours, theirs = places(options.model, explicit), places(options.model, auto)
    apart = layers(theirs, lambda s: jax.NamedSharding(s.mesh, jax.P(*s.spec[1:])))
    one_by_one = optax.contrib.muon(LEARNING_RATE)
    return [
        Parameters(stacked, ours).contender("memopt_muon", "memopt", memopt.muon(LEARNING_RATE)),
        Parameters(stacked, theirs).contender("optax_stacked", "optax", optax_muon(LEARNING_RATE)),
        Parameters(separate, apart).contender("optax_separate", "optax", one_by_one),
    ]


def main(arguments: Sequence[str]) -> None:
    """Measures, prints the table and writes the file."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    jax.config.update("jax_num_cpu_devices", math.prod(parse_mesh(options.mesh).values()))
    found = contenders(options)
    shapes = hidden(options.model)
    settings = describe(shapes, options.model, "float32", options.repeats) | {"mesh": options.mesh}
    results = measure(found, options.repeats)
    report = Report("muon", arguments, options.output, results, **settings)
    Console().print(table(report.content(), "memopt.muon"))
    report.save()


if __name__ == "__main__":
    main(sys.argv[1:])
