"""Measures the processor time of `memopt.state_sharding`.

    python -m benchmarks.sharding_time [--arrays 300] [--optimizers adamw adafactor galore ...]

The parameters are LLaMA-7B with its layers stacked, and a model of many separate matrices, as
shapes on a mesh of two axes that both split every matrix. No array is made and nothing is compiled.
Prints a line for each measurement and writes them as JSON.
"""

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from jax.sharding import NamedSharding
from rich.console import Console

import memopt
from benchmarks.report import Report
from benchmarks.updates import model_shapes


class Options(NamedTuple):
    """The options of this benchmark.

    Attributes:
        optimizers: names known to `memopt.optimizer`; "NAME:int8" keeps the state in 8 bits.
        arrays: the number of separate matrices.
        output: the JSON file.
    """

    optimizers: tuple[str, ...] = ("adamw", "adafactor", "galore", "adamw:int8")
    arrays: int = 300
    output: Path = Path(__file__).parent / "results" / "sharding_time.json"


def placed(params: Any) -> Any:
    """Shapes whose last two axes are split over a mesh of 4×2."""
    mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))

    def place(x: Any) -> jax.ShapeDtypeStruct:
        spec = (None,) * (len(x.shape) - 2) + ("fsdp", "tensor")
        sharding = NamedSharding(mesh, jax.P(*spec[-len(x.shape) :]))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, params)


def seconds(name: str, params: Any) -> float:
    """The processor time of one call, of this process alone."""
    method, _, codec = name.partition(":")
    tx = memopt.optimizer(method, 1e-2)
    tx = memopt.quantize_state(tx, codec) if codec else tx
    start = time.process_time()
    memopt.state_sharding(tx, params)
    return time.process_time() - start


def main() -> None:
    """Runs the benchmark."""
    options = tyro.cli(Options, description=__doc__)
    one = jax.ShapeDtypeStruct((512, 1024), "float32")
    separate = {f"layers/{i}": {"up": {"kernel": one}} for i in range(options.arrays)}
    models = {"llama-7b": model_shapes("7b", "float32"), "separate": separate}
    report = Report("sharding_time", sys.argv[1:], options.output, [])
    for model, shapes in models.items():
        params, count = placed(shapes), len(jax.tree.leaves(shapes))
        for name in options.optimizers:
            found = {"model": model, "arrays": count, "optimizer": name}
            report.results.append(found | {"processor_seconds": round(seconds(name, params), 2)})
            Console().print(report.results[-1])
            report.save()


if __name__ == "__main__":
    main()
