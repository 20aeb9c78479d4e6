"""The library and its command work from an installed wheel."""

import os
import re
import subprocess
import sys

import pytest

from tests.cli.runs import ROOT

COMMANDS = (
    "memopt --help",
    "memopt --version",
    "memopt optimizers",
    "memopt controllers",
    "memopt schedules",
    "memopt suggest --help",
    "memopt plan --help",
    "memopt compare --help",
    "memopt finetune --help",
    "memopt pretrain --help",
    "memopt tokenizer train --help",
    "memopt pretrain --steps 2 --eval-tokens 2048 --output run",
    "memopt pretrain --resume --steps 4 --output run",
    "memopt sample run --prompt import --max-new-tokens 9",
    "memopt evaluate run",
    "memopt export run model",
    "memopt pretrain --init model --steps 2 --eval-tokens 2048 --output tuned",
    "memopt tokenizer train --vocab-size 300 --output vocabulary.json",
    "memopt pretrain --tokenizer vocabulary.json --vocab-size 300 --steps 2 --eval-tokens 2048",
)
README = (ROOT / "README.md").read_text()
#: README's commands that name no file and need no extra but `train`.
SHOWN = re.findall(r"^(?:[A-Z_]+=\S+ )?memopt (?!plan )[^/\n]*$", README, re.MULTILINE)


@pytest.mark.slow
def test_examples_and_commands_work_from_a_wheel_in_an_environment_of_its_own(tmp_path):
    programs = tmp_path / "environment" / "bin"
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{programs}:{environment['PATH']}"

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
    assert SHOWN
    for command in (*COMMANDS, *SHOWN):
        run("bash", "-ec", command)
