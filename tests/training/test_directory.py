"""Which directory a run gets."""

import os
from pathlib import Path

import pytest

from memopt.text.tokenizer import train_tokenizer
from memopt.training.config import Config, Run, read_options
from memopt.training.directory import (
    choose_directory,
    is_run,
    keep_tokenizer,
    kept_tokenizer,
    lock_directory,
    write_config,
)
from memopt.training.lock import Lock
from memopt.training.writing import WriteError

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


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"steps": NaN}', "NaN is no number"),
        (b"\xff", "not UTF-8"),
        (b"[]", "must hold a JSON object"),
    ],
)
def test_a_config_that_is_none_is_refused(content, says):
    path = Path("config.json")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^config 'config.json' cannot be read: .*{says}"):
        read_options(path)
    with pytest.raises(ValueError, match=r"run '\.' is neither the directory of a run nor"):
        is_run("run", Path())


@pytest.fixture
def kept():
    """A run's copy of a tokenizer, and its files."""
    train_tokenizer(["ab abc"] * 9, 260, "words.json")
    FIRST.mkdir(parents=True)
    keep_tokenizer(FIRST, "words.json")
    copy = FIRST / "tokenizer"
    assert kept_tokenizer(FIRST, "words.json") == str(copy)
    return copy, files_of(copy)


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_run_s_only_tokenizer_survives_under_any_name_of_its_place(kept):
    copy, files = kept
    Path("link").symlink_to(copy, target_is_directory=True)
    for spec in (str(copy), str(copy.absolute()), "link", str(copy / "tokenizer.json")):
        keep_tokenizer(FIRST, spec)
        assert files_of(copy) == files


def test_a_copy_of_a_tokenizer_that_fails_leaves_the_one_before(kept, monkeypatch):
    copy, files = kept
    train_tokenizer(["cd cde"] * 9, 262, "others.json")

    def fail(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", fail)
        with pytest.raises(WriteError, match="cannot be written"):
            keep_tokenizer(FIRST, "others.json")
    assert files_of(copy) == files
    assert choose_directory(Config(run=Run(output=FIRST))) == FIRST  # nothing but its beginnings
    keep_tokenizer(FIRST, "others.json")
    assert files_of(copy)["tokenizer.json"] == Path("others.json").read_bytes()
    assert [path.name for path in FIRST.iterdir()] == ["tokenizer"]


def test_a_name_on_the_hub_that_is_not_downloaded_is_told_from_a_directory(tmp_path):
    with pytest.raises(ValueError, match=r"hf download some-org/Model-1B --local-dir Model-1B\.$"):
        is_run("init", Path("some-org/Model-1B"))
    (tmp_path / "runs").mkdir()
    for name in ("runs/books", "books", "/some-org/Model-1B"):
        with pytest.raises(ValueError, match=f"init: there is no directory '{name}'.$"):
            is_run("init", Path(name))
