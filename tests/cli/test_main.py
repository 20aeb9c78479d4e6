"""The command itself."""

import contextlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

import memopt
from memopt import available
from memopt.cli.main import COMMANDS, main
from memopt.optimizers.registry import METHODS
from memopt.training.controllers import CONTROLLERS


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


def test_optimizers_are_listed_with_tabs_where_there_is_no_terminal(monkeypatch, capsys):
    rows = [line.split("\t") for line in run(monkeypatch, capsys, "optimizers").splitlines()]
    assert [row[0] for row in rows] == list(available())
    assert ["apollo_mini", "2q + 1", "0.005"] in [row[:3] for row in rows]
    assert {len(row) for row in rows} == {4}


def test_optimizers_are_a_table_of_a_hundred_columns_in_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "dumb")
    lines = run(monkeypatch, capsys, "optimizers").splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split() == ["name", "state", "rate", "when", "to", "choose", "it"]
    assert {line.split()[0] for line in lines} >= {*available()}


@pytest.mark.parametrize("name", available())
def test_each_optimizer_is_described(monkeypatch, capsys, name):
    shown = run(monkeypatch, capsys, "optimizers", name)
    assert shown.startswith(f"{name}: {METHODS[name].when}\n")
    found = json.loads(run(monkeypatch, capsys, "optimizers", name, "--json"))
    assert found["learning_rate"] == METHODS[name].learning_rate
    assert found["options"].keys() == METHODS[name].defaults.keys()


def test_all_optimizers_are_described_in_json(monkeypatch, capsys):
    found = json.loads(run(monkeypatch, capsys, "optimizers", "--json"))
    assert list(found) == list(available())
    assert found["soap"]["state"] == "2mn + 2m² + 2n²"


def test_controllers_are_listed_with_tabs_where_there_is_no_terminal(monkeypatch, capsys):
    rows = [line.split("\t") for line in run(monkeypatch, capsys, "controllers").splitlines()]
    assert rows == [[name, CONTROLLERS[name].when] for name in sorted(CONTROLLERS)]


@pytest.mark.parametrize("name", CONTROLLERS)
def test_each_controller_says_when_it_does_not_pay_and_describes_its_options(
    monkeypatch, capsys, name
):
    shown = run(monkeypatch, capsys, "controllers", name)
    assert " ".join(shown.split()).startswith(f"{name}: {CONTROLLERS[name].when}")
    assert "does not pay" in CONTROLLERS[name].when
    found = json.loads(run(monkeypatch, capsys, "controllers", name, "--json"))
    assert found == json.loads(run(monkeypatch, capsys, "controllers", "--json"))[name]
    assert found["options"].keys() == CONTROLLERS[name].defaults.keys()
    assert all(option["help"] for option in found["options"].values())


def test_a_list_that_is_cut_short_ends_quietly():
    """`memopt optimizers | true`."""
    command = [sys.executable, "-m", "memopt", "optimizers"]
    listing = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    listing.stdout.close()
    _, err = listing.communicate()
    assert listing.returncode == 0
    assert err == "memopt: nothing more is shown (Broken pipe)\n"


def test_the_version_is_the_projects(monkeypatch, capsys):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert memopt.__version__ == project["version"]
    assert run(monkeypatch, capsys, "--version") == f"memopt {project['version']}\n"


def test_python_runs_the_package_as_the_command():
    done = subprocess.run([sys.executable, "-m", "memopt", "--version"], capture_output=True)
    assert done.stdout.decode() == f"memopt {memopt.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["optimizers", "--help"], ["controllers"]])
def test_help_does_not_wait_for_what_it_does_not_need(arguments):
    """JAX is there already, for `import memopt` needs it."""
    program = (
        f"import atexit, sys, memopt.cli.main; sys.argv[1:] = {arguments}; "
        "atexit.register(lambda: print({'flax', 'orbax', 'grain', 'tokenizers'} & {*sys.modules}));"
        "memopt.cli.main.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.endswith("\nset()\n")
