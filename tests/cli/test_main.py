"""The command itself."""

import contextlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import memopt
from memopt import available
from memopt.cli.main import COMMANDS, main


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["memopt", *arguments])
    with contextlib.suppress(SystemExit):
        main()
    return capsys.readouterr().out


def test_help_lists_the_commands(monkeypatch, capsys):
    shown = run(monkeypatch, capsys, "--help")
    assert run(monkeypatch, capsys) == shown
    assert all(name in shown for name in COMMANDS)
    group = run(monkeypatch, capsys, "tokenizer")
    assert "Learn a vocabulary" in group
    assert "pretrain" not in group


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_describes_its_options(monkeypatch, capsys, name):
    shown = run(monkeypatch, capsys, *name.split(), "--help")
    assert shown.startswith(f"usage: memopt {name} [-h]")


def test_optimizers_are_listed(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "optimizers").split() == list(available())


def test_the_version_is_the_projects(monkeypatch, capsys):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert memopt.__version__ == project["version"]
    assert run(monkeypatch, capsys, "--version") == f"memopt {project['version']}\n"


def test_python_runs_the_package_as_the_command():
    done = subprocess.run([sys.executable, "-m", "memopt", "--version"], capture_output=True)
    assert done.stdout.decode() == f"memopt {memopt.__version__}\n"


def test_help_does_not_wait_for_what_it_does_not_need():
    """JAX is there already, for `import memopt` needs it."""
    program = (
        "import atexit, sys, memopt.cli.main; sys.argv[1:] = ['--help']; "
        "atexit.register(lambda: print({'flax', 'orbax', 'grain', 'tokenizers'} & {*sys.modules}));"
        "memopt.cli.main.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.endswith("\nset()\n")
