"""The file of results, which several processes write and any of them may be killed."""

import json
import re
import threading
from pathlib import Path

import pytest

from memopt.comparison.records import Run, append_record, read_records
from memopt.training.writing import WriteError
from tests.comparison.synthetic import run


@pytest.fixture
def path(tmp_path):
    return tmp_path / "compare.jsonl"


def test_records_are_read_in_the_order_in_which_they_were_added(path):
    assert read_records(path) == []
    for seed in range(3):
        append_record(path, run(seed=seed))
    assert read_records(path) == [run(seed=seed) for seed in range(3)]


@pytest.mark.parametrize("torn", ['{"seed": 1', '{"seed": 1, "text": "' + "x" * 10_000, ""])
def test_a_torn_last_line_is_left_out_and_then_removed(path, torn):
    append_record(path, run(seed=0))
    with path.open("a") as file:
        file.write(torn)
    assert read_records(path) == [run(seed=0)]
    append_record(path, run(seed=2))
    assert path.read_text() == f"{json.dumps(run(seed=0))}\n{json.dumps(run(seed=2))}\n"


def test_a_file_of_nothing_but_a_torn_line(path):
    path.write_text('{"seed"')
    append_record(path, {"seed": 0})
    assert path.read_text() == '{"seed": 0}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"see\x00', "line 2 is damaged"),
        ("{}", "'{}' is no run"),
        ("[1]", "'\\[1\\]' is no run"),
    ],
)
def test_a_line_that_is_no_run_is_left_out_with_a_warning(path, line, message):
    first, last = run(seed=0), run(seed=2)
    path.write_text(f"{json.dumps(first)}\n{line}\n{json.dumps(last)}\n")
    with pytest.warns(UserWarning, match=message):
        assert read_records(path) == [first, last]


def test_writers_at_the_same_time_lose_nothing(path):
    def write(writer):
        for number in range(20):
            append_record(path, {"writer": writer, "number": number, "text": "x" * 5000})

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(x["writer"], x["number"]) for x in found} == {
        (w, n) for w in (0, 1) for n in range(20)
    }
    assert len(found) == 40


def test_the_page_on_comparisons_names_every_field():
    page = (Path(__file__).parents[2] / "docs" / "comparison.md").read_text()
    fields = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)))
    assert {*fields} >= Run.__annotations__.keys()


def test_infinite_numbers_are_refused(path):
    with pytest.raises(ValueError, match="JSON compliant"):
        append_record(path, {"val_loss": float("inf")})
    assert not path.exists()


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(WriteError, match="cannot be written"):
        append_record(tmp_path / "missing" / "compare.jsonl", {})
