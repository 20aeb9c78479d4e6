"""The command itself."""

import subprocess
import sys

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


def test_help_does_not_wait_for_what_it_does_not_need():
    program = "import sys, memopt.cli.main; print('flax' in sys.modules, 'tyro' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False False\n"
