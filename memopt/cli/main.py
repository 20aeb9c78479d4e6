"""Memory-efficient optimizers for large models in JAX.

`memopt COMMAND --help` describes the options of a command, `memopt --version` prints the version.
"""

import pkgutil
import sys
import warnings

from memopt import __version__
from memopt.cli.errors import fail, failing
from memopt.cli.output import lasting_output
from memopt.errors import check_choice

#: Where the function of each command is, imported when it is called, and what the command does.
COMMANDS = {
    "pretrain": (
        "memopt.cli.pretrain:pretrain",
        "Train a LLaMA on text, from nothing to a sample of what it writes.",
    ),
    "finetune": (
        "memopt.cli.finetune:finetune",
        "Fine-tune a model on conversations, with the loss of the answers.",
    ),
    "evaluate": (
        "memopt.cli.evaluate:evaluate",
        "Show the loss of a model on text, a token and a byte.",
    ),
    "sample": (
        "memopt.cli.sample:sample",
        "Continue a text by a model.",
    ),
    "export": (
        "memopt.cli.export:export_run",
        "Write the model of a run as a directory that transformers loads.",
    ),
    "tokenizer train": (
        "memopt.cli.tokenizer:train",
        "Learn a vocabulary from text.",
    ),
    "plan": (
        "memopt.cli.plan:plan_command",
        "Ask a chip's compiler whether a training step fits, without the chip.",
    ),
    "suggest": (
        "memopt.cli.suggest:suggest",
        "Suggest a learning rate and a batch by published laws.",
    ),
    "compare": (
        "memopt.cli.compare:compare_command",
        "Compare optimizers, each tuned with the same number of runs.",
    ),
    "optimizers": (
        "memopt.cli.optimizers:optimizers",
        "List the optimizers, or describe one of them.",
    ),
    "schedules": (
        "memopt.cli.schedules:schedules",
        "List the schedules of the learning rate and the batch, or plot them.",
    ),
    "controllers": (
        "memopt.cli.controllers:controllers",
        "List the controllers of a run, or describe one of them.",
    ),
}


def main() -> None:
    """Runs the command that the command line names."""
    warnings.formatwarning = lambda message, *_, **__: f"memopt: {message}\n"
    with lasting_output():
        try:
            _run(sys.argv[1:])
        except ModuleNotFoundError as error:
            fail(f"the package {error.name!r} is missing: pip install 'memopt[train]'")
        except KeyboardInterrupt:
            fail("interrupted before there was anything to save", exit_code=130)


def _run(arguments: list[str]) -> None:
    for name, (function, _) in COMMANDS.items():
        words = name.split()
        if arguments[: len(words)] == words:
            return pkgutil.resolve_name(function)(arguments[len(words) :])
    groups = [[], *(name.split()[:-1] for name in COMMANDS)]
    group = arguments[:-1] if arguments[-1:] in (["-h"], ["--help"]) else arguments
    if group in groups:
        _show_commands(" ".join(group))
    elif arguments == ["--version"]:
        print(f"memopt {__version__}")
    else:
        words = arguments[: 2 if arguments[:1] in groups else 1]
        with failing():
            check_choice("command", " ".join(words), COMMANDS)


def _show_commands(group: str) -> None:
    """Shows the commands, or those of a group, as tyro shows the options of each."""
    from tyro.extras import SubcommandApp

    app = SubcommandApp()
    for name, (_, line) in COMMANDS.items():
        if name.startswith(group):
            app.command(name=name.removeprefix(group).strip(), help=line)(lambda: None)
    app.cli(prog=f"memopt {group}".strip(), description=__doc__, args=["--help"])
