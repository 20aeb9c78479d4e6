"""The library and its command work from an installed wheel."""

import os
import subprocess
import sys

import pytest

from tests.cli.runs import ROOT

COMMANDS = (
    "--help",
    "--version",
    "optimizers",
    "controllers",
    "schedules",
    "suggest --help",
    "plan --help",
    "compare --help",
    "finetune --help",
    "pretrain --help",
    "tokenizer train --help",
    "pretrain --steps 2 --eval-tokens 2048 --output run",
    "pretrain --resume --steps 4 --output run",
    "sample run --prompt import --max-new-tokens 9",
    "evaluate run",
    "export run model",
    "pretrain --init model --steps 2 --eval-tokens 2048 --output tuned",
    "tokenizer train --vocab-size 300 --output vocabulary.json",
    "pretrain --tokenizer vocabulary.json --vocab-size 300 --steps 2 --eval-tokens 2048",
)


@pytest.mark.slow
def test_examples_and_commands_work_from_a_wheel_in_an_environment_of_its_own(tmp_path):
    programs = tmp_path / "environment" / "bin"
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(
            [str(word) for word in command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    run(sys.executable, "-m", "venv", "environment")
    [wheel] = tmp_path.glob("*.whl")
    install = (programs / "pip", "install", "-c", ROOT / "constraints.txt")
    run(*install, wheel)
    flags = ("-o", "ELLIPSIS", "-o", "NORMALIZE_WHITESPACE")
    run(programs / "python", "-m", "doctest", *flags, ROOT / "README.md")
    run(*install, f"{wheel}[train]")
    for command in COMMANDS:
        run(programs / "memopt", *command.split())
