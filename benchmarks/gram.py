"""Compares the time of Muon's step by Gram matrices with that of the plain iteration.

    python -m benchmarks.gram [--model 1b] [--repeats 5]

A step is one jitted ``update`` and ``apply_updates`` of the matrices of one MLP of the model, with
donated parameters and state. Both are timed in turn in each round, and the time of the plain
iteration is divided by the other one's in the same round.

Prints a table and writes it as JSON.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro
from rich.console import Console

import memopt
from benchmarks.report import Report
from benchmarks.step_time import describe, table
from benchmarks.updates import LEARNING_RATE, Contender, measure, model_shapes, on_one_device


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark.

    Attributes:
        model: the preset whose matrices are used.
        repeats: the number of timed rounds.
        output: the JSON file.
    """

    model: str = "1b"
    repeats: int = 5
    output: Path = Path(__file__).parent / "results" / "gram.json"


def one_mlp(model: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the matrices of a model's first MLP."""
    block = model_shapes(model, "float32", "list")["blocks"]["0"]
    return {name: layer["kernel"] for name, layer in block["mlp"].items()}


def contenders(shapes: dict[str, jax.ShapeDtypeStruct]) -> list[Contender]:
    """Muon with both iterations, that by Gram matrices first."""
    parameters = on_one_device(shapes)
    return [
        parameters.contender(name, "memopt", memopt.muon(LEARNING_RATE, gram=gram))
        for name, gram in (("gram", True), ("plain", False))
    ]


def main(arguments: Sequence[str]) -> None:
    """Measures, prints the table and writes the file."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    shapes = one_mlp(options.model)
    settings = describe(shapes, options.model, "float32", options.repeats)
    results = measure(contenders(shapes), options.repeats)
    report = Report("gram", arguments, options.output, results, **settings)
    Console().print(table(report.content(), "gram=True"))
    report.save()


if __name__ == "__main__":
    main(sys.argv[1:])
