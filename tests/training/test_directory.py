"""Which directory a run gets."""

import os
from pathlib import Path

import pytest

from memopt.training.config import Config, Run, read_options
from memopt.training.directory import choose_directory, lock_directory, write_config
from memopt.training.lock import Lock

FIRST, SECOND = Path("runs/tiny-apollo_mini"), Path("runs/tiny-apollo_mini-2")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def open_directory(directory):
    lock_directory(directory, Lock(directory), new=True)
    write_config(directory, Config())


def test_without_output_each_run_gets_a_directory_of_its_own():
    for expected in (FIRST, SECOND):
        assert choose_directory(Config()) == expected
        open_directory(expected)


def test_without_output_the_latest_run_is_resumed():
    for age, directory in enumerate((FIRST, SECOND)):
        open_directory(directory)
        os.utime(directory / "config.json", (-age, -age))
    assert choose_directory(Config(run=Run(resume=True))) == FIRST


def test_an_empty_directory_is_free_and_one_with_anything_in_it_is_not():
    output = Path("here")
    output.mkdir()
    (output / "config.tmp").touch()  # killed while its first file was being written
    assert choose_directory(Config(run=Run(output=output))) == output
    (output / "notes.txt").touch()
    with pytest.raises(ValueError, match="is taken"):
        choose_directory(Config(run=Run(output=output)))


def test_a_written_config_is_read_back():
    open_directory(FIRST)
    options = read_options(FIRST / "config.json")
    assert Config.from_flat(options).flat() == Config().flat() == options
    assert options.keys().isdisjoint({"resume", "output", "config"})
