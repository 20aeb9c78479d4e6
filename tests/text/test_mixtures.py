"""Named sources: how they are parsed, and that batches hold each one's share, exactly."""

import contextlib
import json
import math
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.text.batches import example_batches, fingerprint, train_batches
from memopt.text.chats import CHATS, ChatEncoder
from memopt.text.documents import find_documents
from memopt.text.examples import encode_examples
from memopt.text.mixing import next_source
from memopt.text.mixtures import Mixture, find_mixture, mixture_shares, named_sources
from memopt.text.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
SHAPE = {"batch_size": 8, "seq_len": 16, "seed": 3}


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Small windows, so that short tests cross many of them."""
    monkeypatch.setattr("memopt.text.batches.WINDOW_TOKENS", 320)


# --- names and weights -----------------------------------------------------------------------


def test_sources_are_named_in_front_and_grouped():
    specs = ["web=pages.jsonl#body", "code=python", "web=more/*.txt", "hub=hf:org/name:en"]
    assert named_sources(specs) == {
        "web": ("pages.jsonl#body", "more/*.txt"),
        "code": ("python",),
        "hub": ("hf:org/name:en",),
    }


@pytest.mark.parametrize(
    "spec",
    [
        "python",
        "hf:org/name?revision=main",
        "https://example.org/?page=3",
        "./year=2020/a.txt",
        "year=2020/a.txt",
        "year=2020",
        "year=20*/*.txt",
        "year=2020/b.jsonl#body",
        "year=2020/[c]=d.txt",
    ],
)
def test_what_is_there_or_cannot_be_a_name_has_none(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "year=2020").mkdir()
    for name in ("a.txt", "b.jsonl", "[c]=d.txt"):
        (tmp_path / "year=2020" / name).write_text("text")
    assert named_sources([spec]) == {"": (spec,)}


def test_all_sources_are_named_or_none():
    with pytest.raises(ValueError, match=r"^data must name all .*'web' is a name, 'b\.txt' has"):
        named_sources(["web=a.txt", "b.txt"])
    with pytest.raises(ValueError, match=r"^eval_data must name all"):
        named_sources(["b.txt", "web=a.txt"], "eval_data")


def test_shares_have_the_sum_1_and_are_equal_by_default():
    assert mixture_shares(["a", "b", "c", "d"]) == dict.fromkeys("abcd", 0.25)
    assert mixture_shares(["a", "b"], ["b=6", "a=2"]) == {"a": 0.25, "b": 0.75}
    assert mixture_shares([""]) == {"": 1.0}


@pytest.mark.parametrize(
    ("mixture", "says"),
    [
        (["a=1"], "must give each source of the data one weight; the named sources are a, b"),
        (["a=1", "b=1", "c=1"], "one weight"),
        (["a=1", "b=1", "a=2"], "one weight"),
        (["a=1", "b=0"], "'b=0' must be NAME=WEIGHT with a positive weight"),
        (["a=1", "b=-1"], "positive"),
        (["a=1", "b=nan"], "positive"),
        (["a=1", "b=inf"], "positive"),
        (["a=1", "b"], "NAME=WEIGHT"),
    ],
)
def test_other_weights_are_refused(mixture, says):
    with pytest.raises(ValueError, match=says):
        mixture_shares(["a", "b"], mixture)


def test_weights_without_names_are_refused():
    with pytest.raises(ValueError, match=r"the named sources are none: give each as --data NAME="):
        mixture_shares([""], ["a=1"])


# --- the order of the sources ----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=9))
def test_every_source_has_its_share_to_within_a_row_at_any_time(weights):
    shares = mixture_shares(
        [f"{i}" for i in range(len(weights))], [f"{i}={x}" for i, x in enumerate(weights)]
    )
    owed, counts = dict.fromkeys(shares, 0.0), dict.fromkeys(shares, 0)
    for rows in range(1, 300):
        counts[next_source(shares, owed)] += 1
        for name, share in shares.items():
            assert abs(counts[name] - share * rows) < 1


def test_a_rare_source_is_not_forgotten_when_the_weights_change_all_the_time():
    owed, count, expected = {"a": 0.0, "b": 0.0, "c": 0.0}, 0, 0.0
    for step in range(200):
        rare = 0.02 + 0.01 * math.sin(step)
        weights = {"a": rare, "b": 0.6 - rare, "c": 0.4}
        for _ in range(4):  # of which a share of 0.03 is never a whole row
            count += next_source(weights, owed) == "a"
            expected += rare
            assert abs(count - expected) < 1.5


# --- batches ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="module")
def mixture(home):
    """Three sources whose rows can be told apart by their letters."""
    for name, documents in (("a", 40), ("b", 15), ("c", 150)):
        lines = (json.dumps({"text": f"{name}{i:04d}" * 8}) + "\n" for i in range(documents))
        (home / f"{name}.jsonl").write_text("".join(lines))
    return find_mixture({name: [f"{home / name}.jsonl"] for name in "abc"})


def batches_of(mixture, **options):
    return contextlib.closing(train_batches(mixture, BYTES, **SHAPE, **options))


def letters(batch):
    """The source of each row."""
    return [next(chr(i) for i in row if chr(i) in "abc") for row in batch["inputs"].tolist()]


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(ones, others):
    for one, other in zip(ones, others, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


WEIGHTS = {"a": 0.5, "b": 0.3125, "c": 0.1875}


def test_one_source_without_a_name_is_read_as_ever(mixture):
    alone = mixture.sources["c"]
    with batches_of(alone) as plain, batches_of(Mixture({"": alone})) as batches:
        assert_same(take(plain, 12), take(batches, 12))
        assert plain.get_state() == batches.get_state()
        assert batches.weights == {}
    options = SHAPE | {"documents": alone, "tokenizer": BYTES}
    unnamed = fingerprint(**options | {"documents": Mixture({"": alone})})
    assert unnamed == fingerprint(**options)


def test_rows_of_each_source_are_its_own_stream_and_have_its_share(mixture):
    """Nothing is lost or repeated when the weights change; small sources begin again."""
    rows = {name: [] for name in "abc"}
    with batches_of(mixture, weights=WEIGHTS) as batches:
        for number in range(24):
            if number == 10:
                batches.set_weights({"c": 6, "a": 1, "b": 1})
            batch = next(batches)
            found = letters(batch)
            for name, row in zip(found, batch["inputs"], strict=True):
                rows[name].append(row)
            if number in (9, 23):
                counts = [len(rows[name]) for name in "abc"]
                assert counts == ([40, 25, 15] if number == 9 else [54, 39, 99])
    for name, own in rows.items():
        with batches_of(mixture.sources[name]) as alone:
            stream = np.concatenate([next(alone)["inputs"] for _ in range(13)])
        np.testing.assert_array_equal(own, stream[: len(own)])
    passes = len(rows["b"]) * 16 / (15 * 41)
    assert passes > 1


def test_new_weights_hold_from_the_next_batch_on_whatever_was_made_ahead(mixture):
    with batches_of(mixture) as batches:
        take(batches, 3)  # the thread is ahead by now
        batches.set_weights({"a": 1e-6, "b": 1e-6, "c": 1})
        assert batches.weights == batches.get_state()["weights"]
        assert batches.weights["c"] == 1 / (1 + 2e-6)
        assert [set(letters(batch)) for batch in take(batches, 4)] == [{"c"}] * 4


def test_a_state_continues_exactly_with_the_weights_it_had(mixture):
    with batches_of(mixture, weights=WEIGHTS) as batches:
        take(batches, 5)
        batches.set_weights({"a": 1, "b": 2, "c": 3})
        take(batches, 2)
        state = json.loads(json.dumps(batches.get_state()))
        following = take(batches, 6)
        batches.set_weights({"a": 1, "b": 1, "c": 1})
        changed = take(batches, 4)
    rows = [1, 6]  # as another process has
    part = lambda batch: {name: array[rows] for name, array in batch.items()}
    with batches_of(mixture, rows=rows) as again:
        again.set_state(state)
        again.set_weights({"a": 0.5, "b": 1.0, "c": 1.5})  # those it has: nothing changes
        assert again.get_state() == state
        assert_same(take(again, 6), map(part, following))
        again.set_weights({"a": 1, "b": 1, "c": 1})
        assert_same(take(again, 4), map(part, changed))


def test_rows_of_a_batch_are_in_random_order(mixture):
    """Otherwise one of two micro-batches, or of two devices, could hold one source alone."""
    two = Mixture({name: mixture.sources[name] for name in "ac"})
    with batches_of(two) as batches:
        found = np.array([letters(batch) for batch in take(batches, 30)]) == "a"
    assert (found.sum(axis=1) == 4).all()
    for half in (found[:, ::2], found[:, :4]):
        assert 0.3 < half.mean() < 0.7
        assert len(np.unique(half.sum(axis=1))) >= 3


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"a": 1, "b": 1}, r"weights are for \['a', 'b'\], but the sources are \['a', 'b', 'c'\]"),
        ({"a": 1, "b": 1, "d": 1}, "weights are for"),
        ({"a": 1, "b": 1, "c": 0}, "weights must be positive"),
        ({"a": 1, "b": 1, "c": math.nan}, "weights must be positive"),
    ],
)
def test_new_weights_must_fit_the_sources(mixture, weights, says):
    with batches_of(mixture) as batches, pytest.raises(ValueError, match=says):
        batches.set_weights(weights)


def test_data_without_names_has_no_weights(mixture):
    with (
        batches_of(mixture.sources["a"]) as batches,
        pytest.raises(ValueError, match="data must have named sources"),
    ):
        batches.set_weights({"": 1.0})


def test_a_source_has_its_names_again(mixture, home, tmp_path):
    for name in "abc":
        shutil.copy(home / f"{name}.jsonl", tmp_path / f"{name}2.jsonl")
    moved = find_mixture({name: [f"{tmp_path / name}2.jsonl"] for name in "cab"})
    assert moved.describe() != mixture.describe()
    listing = mixture.listing()
    assert [entry[0] for entry in listing] == ["a=a.jsonl", "b=b.jsonl", "c=c.jsonl"]
    assert moved.renamed([listing, []]).describe() == mixture.describe()
    other = Mixture({"b": moved.sources["b"], "d": moved.sources["a"]})
    assert other.renamed([listing]).listing()[0] == listing[1]
    assert other.renamed([listing]).listing()[1] == other.listing()[1]
    other = Mixture({"b": moved.sources["a"]})  # whose content is not that of `b` there
    assert other.renamed([listing]).listing() == other.listing()


def test_errors_name_the_source(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "alone"}\n')
    with pytest.raises(ValueError, match=r"^source 'web': data .* matches no text file"):
        find_mixture({"web": [str(tmp_path / "b.txt")]})
    with pytest.raises(ValueError, match=r"^source 'web': data is too small to hold out"):
        find_mixture({"web": [str(tmp_path / "a.jsonl")]}).split()


def test_examples_are_mixed_too(tmp_path):
    def examples(name, count):
        path = tmp_path / f"{name}.jsonl"
        rows = ({"prompt": name, "completion": f"{name}{i:05d}"} for i in range(count))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return encode_examples(find_documents([str(path)], records=CHATS), ChatEncoder(BYTES), 16)

    both = {"a": examples("a", 5), "b": examples("b", 50)}
    options = {"batch_size": 4, "seed": 0, "weights": {"a": 3, "b": 1}}
    with contextlib.closing(example_batches(both, **options)) as batches:
        found = [letters(batch) for batch in take(batches, 6)]
    assert [row.count("a") for row in found] == [3] * 6
