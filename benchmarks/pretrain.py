"""Runs ``memopt pretrain`` as it is by default: its validation loss and the memory of its step.

    python -m benchmarks.pretrain [--steps 600]

The loss depends on the standard library of the Python that runs it, which is the text. The memory
is the compiler's, of the run's step and of the same step with AdamW.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from rich.console import Console

from benchmarks.report import Report, markdown_table
from memopt.cli.pretrain import parse
from memopt.planning.step_memory import step_memory
from memopt.training.describe import describe_run
from memopt.training.loop import train
from memopt.training.metrics import read_metrics
from memopt.training.open import open_run


class Options(NamedTuple):
    """The options of this benchmark.

    Attributes:
        steps: training steps; by default those of the command.
        output: the JSON file.
    """

    steps: int | None = None
    output: Path = Path(__file__).parent / "results" / "pretrain.json"


def markdown(report: dict[str, Any]) -> str:
    """The table of bytes for the docs."""
    kept = report["results"]["bytes"]
    columns = {"bytes": "", "APOLLO-Mini": "apollo_mini", "optax.adamw": "adamw"}
    names = {"parameters": "parameters", "state": "optimizer state", "peak": "peak of a step"}
    rows = [
        (title, *(f"{kept[optimizer][name]:,}" for optimizer in columns.values() if optimizer))
        for name, title in names.items()
    ]
    return markdown_table([*columns], rows)


def main(arguments: Sequence[str]) -> None:
    """Trains, asks the compiler, and writes the file."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "run"
        steps = [] if options.steps is None else ["--steps", str(options.steps)]
        run = open_run(parse(["--output", str(output), *steps]))
        train(run, Console())
        [*_, last] = [line for line in read_metrics(output / "metrics.jsonl") if "val_loss" in line]
    results: dict[str, Any] = {"steps": last["step"], "val_loss": last["val_loss"], "bytes": {}}
    for name in (run.config.optimization.optimizer, "adamw"):
        optimization = dataclasses.replace(run.config.optimization, optimizer=name, option=())
        setup = describe_run(dataclasses.replace(run.config, optimization=optimization))
        memory = step_memory(setup.compile(), setup.state.params, setup.state.opt_state)
        sizes = zip(("parameters", "state", "peak"), dataclasses.astuple(memory), strict=True)
        results["bytes"][name] = dict(sizes)
    Report("pretrain", arguments, options.output, results).save()


if __name__ == "__main__":
    main(sys.argv[1:])
