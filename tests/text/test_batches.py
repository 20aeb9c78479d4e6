"""Batches lose no token, resume exactly and are the same for any number of processes."""

import contextlib
import dataclasses
import gzip
import json
import os
import subprocess
import sys
import threading

import datasets
import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.text.batches import fingerprint, train_batches, validation_batches
from memopt.text.documents import find_documents
from memopt.text.files import TEXT, Piece
from memopt.text.packing import packed
from memopt.text.tokenizer import load_tokenizer
from tests.text.corpora import texts, write_files, write_lines

BYTES = load_tokenizer("bytes")
NAMES = ("inputs", "targets", "segment_ids", "positions", "weights")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Small windows, so that short tests cross many of them."""
    monkeypatch.setattr("memopt.text.batches.WINDOW_TOKENS", 640)
    monkeypatch.setattr("memopt.text.streams.STREAM_WINDOW", 7)


@dataclasses.dataclass
class Given:
    """Documents from a list of pieces."""

    pieces: list[Piece]
    chunk = 3

    def once(self):
        return grain.MapDataset.source(self.pieces)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(ones, others):
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert tuple(sorted(one)) == tuple(sorted(other)) == tuple(sorted(NAMES))
        for name in NAMES:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# --- packing ---------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    contents=st.lists(st.text(max_size=30), min_size=1, max_size=12),
    seq_len=st.integers(2, 24),
    batch_size=st.integers(1, 5),
)
def test_packing_loses_no_token_and_keeps_their_order(contents, seq_len, batch_size):
    corpus = Given([Piece(text, True, True) for text in contents])
    batches = validation_batches(corpus, BYTES, batch_size=batch_size, seq_len=seq_len)
    flat = {name: np.concatenate([b[name].reshape(-1) for b in batches]) for name in NAMES}
    for batch in batches:
        assert all(a.shape == (batch_size, seq_len) for a in batch.values())
        assert all(a.dtype == np.int32 for a in batch.values())

    counts = flat["weights"] == 1
    ids = [np.array([256, *BYTES.encode(text), 256]) for text in contents]
    np.testing.assert_array_equal(flat["inputs"][counts], np.concatenate([i[:-1] for i in ids]))
    np.testing.assert_array_equal(flat["targets"][counts], np.concatenate([i[1:] for i in ids]))
    np.testing.assert_array_equal(counts, np.arange(counts.size) < counts.sum())
    np.testing.assert_array_equal(counts, flat["segment_ids"] > 0)
    for batch in batches:
        for row in range(batch_size):
            check_segments({name: batch[name][row] for name in NAMES})


PIECES = st.builds(Piece, st.text("ab", max_size=9), st.booleans(), st.booleans())


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.lists(PIECES, min_size=1, max_size=12),
    seq_len=st.integers(1, 12),
    chunk=st.integers(2, 5),
    at=st.integers(0, 20),
)
def test_rows_and_states_of_release_0_1_are_those_of_today(pieces, seq_len, chunk, at):
    """Release 0.1 packed with Grain; its rows must come again, and its states must continue."""
    source = grain.MapDataset.source(pieces)

    def pair(piece):
        eos = np.array([256], np.int32)
        tokens = [eos[: piece.begins], BYTES.encode(piece.content), eos[: piece.ends]]
        tokens = np.concatenate(tokens)
        return {"inputs": tokens[:-1], "targets": tokens[1:]}

    pairs = source.map(pair).to_iter_dataset()
    lengths = {"inputs": seq_len, "targets": seq_len}
    theirs = iter(grain.experimental.ConcatThenSplitIterDataset(pairs, length_struct=lengths))
    states, expected = [theirs.get_state()], []
    for row in theirs:
        expected.append(row)
        states.append(theirs.get_state())
    if expected and not expected[-1]["inputs_segment_ids"].any():
        expected.pop()  # of pieces without pairs; they no longer make a row
    ours = iter(packed(source, BYTES, seq_len, chunk=chunk))
    found = list(ours)
    at = min(at, len(expected))
    ours.set_state(json.loads(json.dumps(states[at])))
    for rows, wanted in ((found, expected), (list(ours), expected[at:])):
        assert len(rows) == len(wanted)
        for row, other in zip(rows, wanted, strict=True):
            for name in ("inputs", "targets"):
                np.testing.assert_array_equal(row[name], other[name])
            for name in ("segment_ids", "positions"):
                np.testing.assert_array_equal(row[name], other[f"inputs_{name}"])


def check_segments(row):
    """Segments count 1, 2, 3 …, positions restart at 0, and targets follow inputs."""
    segment_ids, positions = row["segment_ids"], row["positions"]
    used = segment_ids[segment_ids > 0]
    if not len(used):
        return
    assert used[0] == 1
    steps = np.diff(used)
    assert set(steps.tolist()) <= {0, 1}
    starts = np.flatnonzero(np.r_[1, steps])
    np.testing.assert_array_equal(
        positions[: len(used)],
        np.arange(len(used)) - np.repeat(starts, np.diff(np.r_[starts, len(used)])),
    )
    inside = np.flatnonzero(steps == 0)
    np.testing.assert_array_equal(row["targets"][inside], row["inputs"][inside + 1])


def test_an_epoch_of_training_has_every_token_once(tmp_path):
    corpus = find_documents([write_files(tmp_path, 8)])
    expected = np.concatenate([np.r_[BYTES.encode(t), 256] for t in texts(corpus)])
    batches = train_batches(corpus, BYTES, batch_size=1, seq_len=32, seed=0)
    with contextlib.closing(batches):
        # Whole windows of 20 rows only; what is left of the epoch comes with the next.
        rows = take(batches, len(expected) // 640 * 20)
    assert all((row["weights"] == 1).all() for row in rows)
    seen = np.bincount(np.concatenate([row["targets"][0] for row in rows]), minlength=257)
    assert (seen <= np.bincount(expected, minlength=257)).all()
    assert seen.sum() > 0.9 * len(expected)


def test_rows_of_a_batch_come_from_all_over(tmp_path, monkeypatch):
    monkeypatch.setattr("memopt.text.batches.WINDOW_TOKENS", 2**15)
    (tmp_path / "book.txt").write_text("".join(f"{i:07d}\n" for i in range(8_000)))
    batches = train_batches(
        find_documents([str(tmp_path)]), BYTES, batch_size=16, seq_len=64, seed=0
    )
    with contextlib.closing(batches):
        rows = next(batches)["inputs"]
    numbers = sorted(int(BYTES.decode(row).split()[1]) for row in rows)
    assert numbers[-1] - numbers[0] > 1_000
    assert min(np.diff(numbers)) > 0


# --- order, processes, resuming ----------------------------------------------------------------


@pytest.fixture(scope="module", params=["files", "lines", "arrow", "parquet"])
def spec(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    if request.param == "files":
        return write_files(directory, 30)
    if request.param == "lines":
        return write_lines(directory / "a.jsonl", 120)
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"text": [f"example {i} " * (i % 9) for i in range(90)]})
    if request.param == "arrow":
        table.save_to_disk(directory / "saved", num_shards=2)
        return f"hf:{directory / 'saved'}"
    for i in range(3):
        table.shard(3, i).to_parquet(directory / f"train-{i}.parquet")
    return f"hf:{directory}"


def training(spec, **options):
    options = {"batch_size": 4, "seq_len": 32, "seed": 0} | options
    return train_batches(find_documents([spec]).split(0.1)[0], BYTES, **options)


@pytest.mark.parametrize(
    "spec",
    ["files", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lines", "arrow", "parquet"))],
    indirect=True,
)
def test_any_state_continues_exactly(spec):
    with contextlib.closing(training(spec)) as batches:
        states, expected = [batches.get_state()], []
        for _ in range(120):
            expected.append(next(batches))
            states.append(batches.get_state())
    states = [json.loads(json.dumps(state)) for state in states]
    ends = np.cumsum([len(batch["inputs"]) for batch in expected])
    assert ends[-1] * 32 > 2 * 640
    positions = [0, 1, *np.random.default_rng(0).integers(2, 115, 12).tolist()]
    with contextlib.closing(training(spec)) as again:
        for position in positions:
            again.set_state(states[position])
            assert again.get_state() == states[position]
            assert_same(take(again, 5), expected[position : position + 5])


@pytest.mark.parametrize(
    "spec",
    ["parquet", *(pytest.param(n, marks=pytest.mark.slow) for n in ("files", "lines", "arrow"))],
    indirect=True,
)
def test_a_state_continues_in_another_process(spec):
    code = (
        "import json, sys; from memopt.text import batches as text, documents, streams\n"
        "from memopt.text.tokenizer import load_tokenizer\n"
        "spec, state = json.load(sys.stdin)\n"
        "text.WINDOW_TOKENS, streams.STREAM_WINDOW = 640, 7\n"
        "train = documents.find_documents([spec]).split(0.1)[0]\n"
        "batches = text.train_batches("
        "train, load_tokenizer('bytes'), batch_size=4, seq_len=32, seed=0)\n"
        "batches.set_state(state)\n"
        "print(json.dumps([{k: v.tolist() for k, v in next(batches).items()} for _ in range(6)]))\n"
        "batches.close()\n"
    )
    with contextlib.closing(training(spec)) as batches:
        take(batches, 37)
        state = batches.get_state()
        expected = take(batches, 6)
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([spec, state]),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert_same(json.loads(done.stdout), expected)


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_processes_together_see_what_one_sees(spec, count):
    with contextlib.closing(training(spec)) as batches:
        expected = take(batches, 12)
    shares = []
    for index in range(count):
        share = range(index * 4 // count, (index + 1) * 4 // count)
        with contextlib.closing(training(spec, rows=share)) as batches:
            shares.append(take(batches, 12))
        assert shares[-1][0]["inputs"].shape == (4 // count, 32)
    joined = [
        {k: np.concatenate([b[k] for b in share]) for k in NAMES}
        for share in zip(*shares, strict=True)
    ]
    assert_same(joined, expected)


def test_the_seed_decides_the_order(spec):
    first = []
    for seed in (0, 0, 1):
        with contextlib.closing(training(spec, seed=seed)) as batches:
            first.append(take(batches, 3))
    assert_same(first[0], first[1])
    assert any((a["inputs"] != b["inputs"]).any() for a, b in zip(first[0], first[2], strict=True))


def test_training_and_validation_share_no_document(spec):
    train, held = find_documents([spec]).split(0.1)
    assert texts(held)
    if len(texts(train)) + len(texts(held)) > 30:  # else parts of the same files
        assert not set(texts(train)) & set(texts(held)) - {""}
    everything = "".join(sorted("".join(texts(train) + texts(held))))
    assert everything == "".join(sorted("".join(texts(find_documents([spec])))))


def test_an_error_comes_after_the_batches_before_it_whose_position_stays(tmp_path):
    """Batches are made and placed ahead, but fail in their turn."""
    made = []

    def place(batch):
        made.append(batch)
        if len(made) == 4:
            raise OSError("the disk is gone")
        return {name: array.tolist() for name, array in batch.items()}

    spec = write_files(tmp_path, 30)
    with (
        contextlib.closing(training(spec, place=place)) as failing,
        contextlib.closing(training(spec)) as whole,
    ):
        assert_same(take(failing, 3), take(whole, 3))
        with pytest.raises(OSError, match="the disk is gone"):
            next(failing)
        assert failing.get_state() == whole.get_state()


# --- validation ------------------------------------------------------------------------------


def test_validation_is_the_same_whatever_the_batch(spec):
    held = find_documents([spec]).split(0.1)[1]
    rows = []
    for batch_size in (1, 3, 8):
        batches = validation_batches(held, BYTES, batch_size=batch_size, seq_len=16)
        assert all(batch["inputs"].shape == (batch_size, 16) for batch in batches)
        joined = {name: np.concatenate([b[name] for b in batches]) for name in NAMES}
        used = joined["weights"].any(axis=1)
        rows.append({name: array[used] for name, array in joined.items()})
        assert not any(array[~used].any() for array in joined.values())
    assert_same(rows[:1], rows[1:2])
    assert_same(rows[:1], rows[2:])


def test_validation_holds_at_most_the_tokens_asked_for(spec):
    held = find_documents([spec]).split(0.1)[1]
    whole = validation_batches(held, BYTES, batch_size=2, seq_len=16)
    part = validation_batches(held, BYTES, batch_size=2, seq_len=16, max_tokens=100)
    assert len(whole) > len(part) == 3
    assert sum(batch["weights"].sum() for batch in part) == 96
    assert_same(part, whole[:3])


def test_validation_is_split_by_process(spec):
    held = find_documents([spec]).split(0.1)[1]
    whole = validation_batches(held, BYTES, batch_size=4, seq_len=16)
    shares = [
        validation_batches(held, BYTES, batch_size=4, seq_len=16, rows=rows)
        for rows in ([0, 1], [2, 3])
    ]
    joined = [
        {k: np.concatenate([b[k] for b in share]) for k in NAMES}
        for share in zip(*shares, strict=True)
    ]
    assert_same(joined, whole)


def test_an_empty_stream_is_refused_instead_of_waiting_for_ever(tmp_path):
    (tmp_path / "train.csv").write_text("text\n")
    train, held = find_documents([f"hf:{tmp_path}"]).split()
    with pytest.raises(ValueError, match="the validation part of the data holds no text"):
        validation_batches(held, BYTES, batch_size=1, seq_len=4)
    batches = train_batches(train, BYTES, batch_size=1, seq_len=4, seed=0)
    with contextlib.closing(batches), pytest.raises(ValueError, match="holds no documents"):
        next(batches)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "pages.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "fine"}\n')
    corpus = find_documents([str(path)])
    path.write_text('{"text": "fine"}\n{"text":   null}\n')
    message = r"pages\.jsonl has changed since it was found: line 2 has no text in the field 'text'"
    with pytest.raises(ValueError, match=message):
        validation_batches(corpus, BYTES, batch_size=1, seq_len=4)
    path.write_text('{"text": "fine"}\n')
    batches = train_batches(corpus, BYTES, batch_size=2, seq_len=4, seed=0)
    with contextlib.closing(batches), pytest.raises(ValueError, match="has become shorter"):
        take(batches, 50)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_file_is_opened_a_few_times_and_not_once_for_each_document(tmp_path, monkeypatch, name):
    """Opening it takes longer than reading a short document."""
    lines = "".join(f'{{"text": "{i:09d}"}}\n' for i in range(20_000)).encode()
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path) or real(path, *rest))
    train, held = find_documents([str(tmp_path / name)]).split()
    assert validation_batches(held, BYTES, batch_size=8, seq_len=32)
    with contextlib.closing(train_batches(train, BYTES, batch_size=8, seq_len=32, seed=0)) as rows:
        take(rows, 5)
    assert 1 <= len(opened) <= 4


def test_a_line_is_shown_if_the_first_batch_takes_long(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": ["a"] * 99}).save_to_disk(tmp_path / "saved")
    shown, lines = threading.Event(), []

    def progress(line):
        lines.append(line)
        shown.set()

    monkeypatch.setattr("memopt.text.batches.SECONDS_OF_SILENCE", 0)
    slow = TEXT._replace(read=lambda *args: shown.wait(60) and TEXT.read(*args))
    train, held = find_documents([f"hf:{tmp_path / 'saved'}"], records=slow).split()
    options = {"batch_size": 1, "seq_len": 4, "progress": progress}
    validation_batches(held, BYTES, **options)
    shown.clear()
    with contextlib.closing(train_batches(train, BYTES, seed=0, **options)) as batches:
        take(batches, 3)
    assert lines == ["reading the held-out text …", "reading text for the first batch …"]


# --- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "seq_len must be at least 2, got 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"rows": [3, 4]}, r"rows=\[3, 4\] must be some of 0 to 3"),
        ({"rows": []}, r"rows=\[\] must be some of 0 to 3"),
        ({"seed": -1}, "seed=-1 must be between 0 and"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        training(write_files(tmp_path, 3), **options)


def test_too_few_validation_tokens_are_refused(tmp_path):
    corpus = find_documents([write_files(tmp_path, 3)])
    with pytest.raises(ValueError, match="max_tokens must be at least 16, got 10"):
        validation_batches(corpus, BYTES, batch_size=1, seq_len=16, max_tokens=10)


def test_the_fingerprint_differs_where_data_or_options_differ(tmp_path):
    options = {"batch_size": 4, "seq_len": 32, "seed": 0}

    def of(corpus, **changed):
        return fingerprint(corpus, BYTES, **(options | changed))

    corpus = find_documents([write_files(tmp_path, 30)])
    base = of(corpus)
    assert json.loads(json.dumps(base)) == base == of(find_documents([str(tmp_path)]))
    assert {k for k, v in of(corpus, seq_len=64).items() if v != base[k]} == {"seq_len"}
    assert of(corpus.split(0.1)[0])["digest"] != of(corpus.split(0.2)[0])["digest"]
    (tmp_path / "f000.txt").rename(tmp_path / "g000.txt")
    renamed = of(find_documents([str(tmp_path)]))
    assert {k for k, v in renamed.items() if v != base[k]} == {"content", "digest"}
    (tmp_path / "g000.txt").rename(tmp_path / "f000.txt")
    content = (tmp_path / "f001.txt").read_text()
    (tmp_path / "f001.txt").write_text(content.replace("line 0", "LINE 0"))
    changed = of(find_documents([str(tmp_path)]))
    assert {k for k, v in changed.items() if v != base[k]} == {"content"}
