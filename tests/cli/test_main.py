"""The command itself."""

import subprocess
import sys
import tomllib
from pathlib import Path

import memopt
from memopt import available
from memopt.cli.main import main


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["memopt", *arguments])
    main()
    return capsys.readouterr().out


def test_help_lists_the_commands(monkeypatch, capsys):
    assert run(monkeypatch, capsys) == run(monkeypatch, capsys, "--help")
    assert "pretrain" in run(monkeypatch, capsys)


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
    program = "import sys, memopt.cli.main; print('flax' in sys.modules, 'tyro' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False False\n"
