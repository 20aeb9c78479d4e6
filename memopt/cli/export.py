r"""Write the model of a run as a directory that Hugging Face's transformers loads.

It holds the weights, the tokenizer, a generation config and a model card with the facts of the run.

Examples:
  memopt export runs/books books-model
  memopt export runs/books books-model --step last --dtype bfloat16
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro import conf

from memopt.cli.arguments import Step
from memopt.cli.errors import failing
from memopt.training.export import export
from memopt.training.load import load_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `memopt export`.

    Attributes:
        run: Directory of a run.
        directory: Where to write: a new or an empty directory.
        dtype: Type of the weights, if not that of the run's parameters.
        quantized: Write weights that the run stores in fewer bits as they are, to be read by memopt
            alone. Without it, they are decoded.
    """

    run: Annotated[conf.Positional[Path], conf.arg(metavar="RUN")]
    directory: Annotated[conf.Positional[Path], conf.arg(metavar="DIRECTORY")]
    step: Step = "best"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantized: conf.FlagCreatePairsOff[bool] = False


def export_run(arguments: list[str]) -> None:
    """Runs `memopt export` with these arguments."""
    options = tyro.cli(Options, prog="memopt export", description=__doc__, args=arguments)
    with failing():
        loaded = load_run(options.run, options.step)
        export(loaded, options.directory, dtype=options.dtype, quantized=options.quantized)
    print(f"step {loaded.step} of {options.run} is in {options.directory}")
