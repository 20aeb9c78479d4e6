"""Memory-efficient optimizers for large models in JAX.

usage: memopt COMMAND [OPTIONS]

commands:
  pretrain          train a LLaMA on text, from nothing to a sample of what it writes
  tokenizer train   learn a vocabulary from text
  optimizers        list the optimizers that pretrain knows

`memopt COMMAND --help` describes its options, `memopt --version` prints the version.
"""

import sys
import warnings

from memopt import __version__
from memopt.cli.errors import fail
from memopt.cli.output import lasting_output


def main() -> None:
    """Runs the command that the command line names."""
    warnings.formatwarning = lambda message, *_, **__: f"memopt: {message}\n"
    with lasting_output():
        _run(sys.argv[1:])


def _run(arguments: list[str]) -> None:
    try:
        match arguments:
            case ["pretrain", *rest]:
                from memopt.cli.pretrain import pretrain

                pretrain(rest)
            case ["tokenizer", "train", *rest]:
                from memopt.cli.tokenizer import train

                train(rest)
            case ["optimizers"]:
                from memopt.optimizers import available

                print("\n".join(available()))
            case ["--version"]:
                print(f"memopt {__version__}")
            case [] | ["-h" | "--help"] | ["tokenizer"] | ["tokenizer", "-h" | "--help"]:
                print(__doc__, end="")
            case _:
                fail(f"there is no command {' '.join(arguments[:2])!r}: see memopt --help")
    except ModuleNotFoundError as error:
        fail(f"the package {error.name!r} is missing: pip install 'memopt[train]'")
    except KeyboardInterrupt:
        fail("interrupted before there was anything to save", exit_code=130)
