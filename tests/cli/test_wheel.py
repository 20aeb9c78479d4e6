"""The command runs from an installed wheel."""

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
def test_every_command_works_from_a_wheel_in_an_environment_of_its_own(tmp_path):
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(
            [str(word) for word in command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    run(sys.executable, "-m", "venv", "environment")
    [wheel] = tmp_path.glob("*.whl")
    programs = tmp_path / "environment" / "bin"
    run(programs / "pip", "install", "-c", ROOT / "constraints.txt", f"{wheel}[train]")
    for command in COMMANDS:
        run(programs / "memopt", *command.split())
