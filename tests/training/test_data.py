"""A run goes on with its data wherever that is, and with other data only if told to."""

import gzip
import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from memopt.cli.pretrain import parse
from memopt.text.batches import train_batches
from memopt.text.documents import find_documents
from memopt.text.finding import DataWarning
from memopt.text.tokenizer import load_tokenizer
from memopt.training import data, processes
from memopt.training.loop import train
from memopt.training.open import open_run
from memopt.training.processes import errors_in_all_processes

FLAGS = ["--model=nano", "--batch-size=4", "--seq-len=32", "--eval-tokens=64", "--mesh=data=1"]
FLAGS += ["--schedule=constant", "--checkpoint-every=2"]
BYTES = load_tokenizer("bytes")


def write_lines(path, count, kind="document"):
    """Writes JSON lines of which so many are documents of a kind."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f'{{"text": "{kind} {i} {"word " * 9}"}}\n' for i in range(count)))
    return path


def opened(directory, *flags):
    """A run with these options, in this directory."""
    return open_run(parse([*FLAGS, f"--output={directory}", *map(str, flags)]))


def batches(directory, *flags):
    """The next two batches of such a run."""
    run = opened(directory, *flags)
    rows = [next(run.batches)["inputs"] for _ in range(2)]
    run.batches.close()
    return np.stack(rows)


def history(directory):
    return [(entry.after, entry.data) for entry in data.read_history(directory)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with data, `old`, and a run of two steps on it, `run`."""
    home = tmp_path_factory.mktemp("home")
    write_lines(home / "old" / "a.jsonl", 120)
    write_lines(home / "old" / "b.jsonl", 60, "other")
    train(opened(home / "run", "--data", home / "old", "--steps=2"), Console(quiet=True))
    return home


@pytest.fixture(scope="module")
def expected(trained):
    """The batches that the run goes on with."""
    return batches(trained / "run", "--resume", "--steps=4")


@pytest.fixture
def begun(trained, tmp_path):
    """The data and the directory of that run, to be resumed."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path / "old", tmp_path / "run"


@pytest.mark.parametrize("how", ["renamed", pytest.param("compressed", marks=pytest.mark.slow)])
def test_the_same_content_in_another_place_goes_on_exactly(begun, expected, how):
    old, directory = begun
    new = old.parent / "new"
    new.mkdir()
    for one, other in (("a.jsonl", "z.JSONL"), ("b.jsonl", "y.ndjson")):
        content = (old / one).read_bytes()
        (new / other).write_bytes(gzip.compress(content) if how == "compressed" else content)
    shutil.rmtree(old)
    flags = ["--accept-data-change"] * (how == "compressed")  # there is none
    found = batches(directory, "--resume", "--steps=4", "--data", new, *flags)
    np.testing.assert_array_equal(found, expected)
    assert [after for after, _ in history(directory)] == [0]
    assert json.loads((directory / "config.json").read_text())["data"] == [str(new)]


def test_other_content_is_refused_until_it_is_accepted_and_then_recorded(begun):
    old, directory = begun
    write_lines(old / "a.jsonl", 130)
    write_lines(old / "c.jsonl", 10)
    (old / "b.jsonl").unlink()
    message = (
        r"has changed: 1 changed \(a\.jsonl\), 1 new \(c\.jsonl\), 1 gone \(b\.jsonl\)\. Resume it "
        r".* add --accept-data-change: then training goes on with a new pass over"
    )
    with pytest.raises(ValueError, match=message):
        opened(directory, "--resume", "--steps=4", "--data", old)
    assert [after for after, _ in history(directory)] == [0]

    found = batches(directory, "--resume", "--steps=4", "--data", old, "--accept-data-change")
    fresh = train_batches(
        find_documents([str(old)]).split()[0], BYTES, batch_size=4, seq_len=32, seed=0
    )
    np.testing.assert_array_equal(found, [next(fresh)["inputs"] for _ in range(2)])
    fresh.close()
    assert history(directory)[1:] == [(2, [str(old)])]
    # Killed before its next checkpoint, it does not ask again; but for other data it does.
    again = opened(directory, "--resume", "--steps=4")
    again.batches.close()
    assert [entry.after for entry in again.history] == [0, 2]
    write_lines(old / "b.jsonl", 60, "other")
    with pytest.raises(ValueError, match=r"has changed: 1 new \(b\.jsonl\)"):
        opened(directory, "--resume", "--steps=4")


def test_a_bad_record_is_skipped_and_its_repair_is_a_change(begun):
    path = begun[0] / "a.jsonl"
    good = path.read_text()
    path.write_text(good + '{"text": null}\n')
    flags = ("--resume", "--steps=4", "--data", begun[0])
    with pytest.warns(DataWarning, match="line 121 has no text in the field 'text'"):
        opened(begun[1], *flags, "--accept-data-change").batches.close()
    with pytest.raises(ValueError, match=r"line 121 has no text .*--bad-records skip"):
        opened(begun[1], *flags, "--bad-records=stop")
    path.write_text(good + '{"text": "repaired"}\n')
    with pytest.raises(ValueError, match=r"1 changed \(a\.jsonl\)\. .*--accept-data-change"):
        opened(begun[1], *flags)


def test_a_run_of_release_0_1_goes_on(begun):
    """It has no data.jsonl, and its checkpoints no hash of the content."""
    old, directory = begun
    record = data.read_history(directory)[0].identity
    (directory / "data.jsonl").unlink()
    before = {name: value for name, value in record.items() if name != "data content"}
    here = data.Data(2, ["a"], record, [])
    options = {"accept": False}
    same, is_same = data.continue_history(directory, [], before, here, **options)
    assert (same, is_same) == ([here._replace(after=0)], True)
    with pytest.raises(ValueError, match=r"has changed: data digest, or it was begun by"):
        data.continue_history(directory, [], before | {"data digest": "x"}, here, **options)
    opened(directory, "--resume", "--steps=4", "--data", old).batches.close()
    assert history(directory) == [(0, [str(old)])]


def test_an_error_of_one_process_is_raised_in_all(monkeypatch):
    def gather(mine):
        theirs = np.frombuffer(b"data 'a.txt' cannot be read.".ljust(len(mine), b"\0"), np.uint8)
        return np.stack([mine, theirs])

    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    with (
        pytest.raises(ValueError, match=r"'a\.txt' cannot be read\. \(process 1 of 2\)"),
        errors_in_all_processes(),
    ):
        pass
    with pytest.raises(ValueError, match=r"^own$"), errors_in_all_processes():
        raise ValueError("own")


def test_the_history_has_only_data_that_was_trained_on(tmp_path):
    def at(step, name):
        return data.Data(step, [name], {"data digest": name}, [])

    def go_on(history, checkpoint, now):
        return data.continue_history(tmp_path, history, checkpoint.identity, now, accept=False)

    first, second = at(0, "first"), at(100, "second")
    # Accepted, but no checkpoint was made on it: the first data again, and the second again.
    assert go_on([first, second], first, at(100, "first")) == ([first], True)
    assert go_on([first, second], first, at(100, "second")) == ([first, second], False)
    # The run falls back to a checkpoint before the change.
    assert go_on([first, second], first, at(40, "second")) == ([first, at(40, "second")], False)
    assert go_on([first, second], second, at(120, "second")) == ([first, second], True)
