"""Examples: whole in their rows, the answers weighted, in an order that can be resumed."""

import contextlib
import json

import datasets
import numpy as np
import pytest

from memopt.text.batches import example_batches, example_validation, fingerprint
from memopt.text.chats import CHATS, ChatEncoder
from memopt.text.documents import find_documents
from memopt.text.examples import encode_examples
from memopt.text.finding import DataWarning
from memopt.text.packing import fitted
from memopt.text.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
EOS = BYTES.eos_id


def pair(i):
    return {"prompt": f"{i}:", "completion": "ab" * (i % 9)}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def find(*specs, **options):
    return find_documents(specs, records=CHATS, **options)


def examples(documents, seq_len=32, **options):
    return encode_examples(documents, ChatEncoder(BYTES), seq_len, **options)


@pytest.fixture
def corpus(tmp_path):
    return find(write(tmp_path / "pairs.jsonl", map(pair, range(120))))


def segments(row):
    """The inputs, targets and weights of the examples in a row."""
    numbers = row["segment_ids"]
    for number in range(1, numbers.max() + 1):
        yield tuple(row[name][numbers == number] for name in ("inputs", "targets", "weights"))


def test_every_example_is_once_and_whole_in_the_rows_and_its_answer_alone_counts(corpus):
    rows = [examples(corpus)[i] for i in range(len(examples(corpus)))]
    found = set()
    for row in rows:
        for inputs, targets, weights in segments(row):
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
            assert (inputs[0], targets[-1]) == (EOS, EOS)
            assert weights.tolist() == sorted(weights.tolist())
            prompt = inputs[: len(inputs) - weights.sum() + 1]
            found.add((BYTES.decode(prompt), BYTES.decode(targets[weights == 1])))
    assert found == {(pair(i)["prompt"], pair(i)["completion"]) for i in range(120)}
    assert sum(len(list(segments(row))) for row in rows) == 120


def test_no_weight_is_on_padding_and_positions_begin_anew_in_each_example(corpus):
    for row in examples(corpus).once():
        padding = row["segment_ids"] == 0
        assert not row["weights"][padding].any()
        starts = np.flatnonzero(np.diff(row["segment_ids"], prepend=0) > 0)
        assert (row["positions"][starts] == 0).all()


def test_rows_are_filled():
    draw = np.random.default_rng(0).integers(1, 100, 2000)
    bins = fitted(draw.tolist(), 128)
    assert sorted(x for contents in bins for x in contents) == list(range(2000))
    assert max(draw[contents].sum() for contents in bins) <= 128
    assert draw.sum() / (128 * len(bins)) > 0.98


@pytest.mark.parametrize("long_examples", ["skip", "truncate"])
def test_long_examples_are_skipped_or_truncated_and_counted(tmp_path, long_examples):
    records = [pair(1), {"prompt": "p" * 9, "completion": "c" * 40}]
    records += [{"prompt": "p" * 40, "completion": "never reached"}]
    documents = find(write(tmp_path / "a.jsonl", records))
    done = "truncated" if long_examples == "truncate" else "skipped"
    with pytest.warns(DataWarning, match=f"{done} 2 of 3 examples, longer than the 17 tokens that"):
        found = examples(documents, 16, long_examples=long_examples)
    assert len(found.ends) == (1 if long_examples == "skip" else 2)
    if long_examples == "truncate":
        assert BYTES.decode(found.ids[found.learned]) == "ab" + "c" * 7


def test_errors_and_warnings_say_which_part_they_are_of(tmp_path):
    documents = find(write(tmp_path / "pairs.jsonl", map(pair, range(9))))
    with pytest.warns(DataWarning, match=r"^eval_data: skipped 2 of 9 examples"):
        examples(documents, 15, name="eval_data")
    with pytest.raises(ValueError, match=r"^eval_data holds no example that can be used: all are"):
        examples(documents, 2, name="eval_data")


def test_the_same_epochs_come_again_from_a_state_and_rows_are_parts_of_them(corpus):
    options = {"batch_size": 4, "seed": 3}
    found = examples(corpus)
    with contextlib.closing(example_batches({"": found}, **options)) as batches:
        before = [next(batches) for _ in range(12)]  # an epoch and two rows more
        state = json.loads(json.dumps(batches.get_state()))
        after = [next(batches) for _ in range(3)]
    seen = np.concatenate([batch["inputs"] for batch in before])[: len(found)]
    assert len(np.unique(seen, axis=0)) == len(found)
    assert not np.array_equal(seen, [row["inputs"] for row in found.once()])
    with contextlib.closing(example_batches({"": examples(corpus)}, **options, rows=[2])) as again:
        np.testing.assert_array_equal(next(again)["inputs"], before[0]["inputs"][2:3])
        again.set_state(state)
        for batch in after:
            np.testing.assert_array_equal(next(again)["weights"], batch["weights"][2:3])


def test_validation_is_every_held_out_row_once_filled_up_with_weight_0(corpus):
    training, held_out = corpus.split()
    found = examples(held_out)
    batches = example_validation(found, batch_size=4)
    assert sum(int(batch["weights"].sum()) for batch in batches) == found.learned.sum()
    assert len(example_validation(found, batch_size=1, max_tokens=32)) == 1
    assert 1 <= len(found.ends) <= 12
    assert len(found.ends) + len(examples(training).ends) == 120


@pytest.mark.parametrize("count", [2, 100])
def test_a_small_set_has_held_out_examples(tmp_path, count):
    training, held_out = find(write(tmp_path / "a.jsonl", map(pair, range(count)))).split()
    assert 1 <= len(held_out) <= 12
    assert len(held_out) + len(training) == count


def test_the_fingerprint_differs_with_the_template(corpus):
    options = {"batch_size": 4, "seq_len": 32, "seed": 0}
    one, other = (
        fingerprint(corpus, ChatEncoder(BYTES, template), **options)
        for template in (None, "{{ 1 }}")
    )
    assert {name for name in one if one[name] != other[name]} == {"tokenizer"}


def test_bad_records_are_skipped_with_a_warning_that_names_them_or_stop(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records = [
        {"messages": "no"},
        pair(1),
        {"messages": chat},
        {"messages": [{"role": "x"}, *chat]},
    ]
    path = write(tmp_path / "a.jsonl", records)
    with pytest.warns(DataWarning, match=r"skipped 2 of 4 records: .*line 1 has messages that are"):
        documents = find(path)
    refusing = ChatEncoder(BYTES, "{{ raise_exception('not today') }}")
    with pytest.warns(DataWarning, match=r"skipped 1 of 2 examples: .*a\.jsonl, line 3 is refused"):
        found = encode_examples(documents, refusing, 32)
    assert len(found.ends) == 1
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 3 is refused by the chat template: not t"
    ):
        encode_examples(documents, refusing, 32, bad_records="stop")
    with pytest.raises(ValueError, match="line 1 has messages that are no list"):
        find(path, bad_records="stop")


HOSTILE = {
    "binary": (b"\x89PNG\r\n\x1a\n\0\0", "line 1 is not UTF-8"),
    "text": (b"once upon a time", "line 1 is not JSON"),
    "nested": (b'{"messages": ' + b"[" * 100_000, "line 1 is not JSON"),
    "a number of a million digits": (b'{"messages": ' + b"1" * 10**6 + b"}", "line 1 is not JSON"),
    "no chat": (b'{"text": "once"}', "has neither 'messages' nor 'prompt' and 'completion'"),
    "a list": (b"[1, 2, 3]", r"has neither .* \(its fields: none\)"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_data_that_is_no_such_thing_is_refused(tmp_path, name):
    content, reason = HOSTILE[name]
    (tmp_path / "a.jsonl").write_bytes(content + b"\n")
    with pytest.raises(ValueError, match=f"holds no chat, since .*{reason}"):
        find(str(tmp_path / "a.jsonl"))


def test_a_message_nested_deeply_is_skipped(tmp_path):
    """Some releases of Python read what they cannot walk through."""
    deep = "[" * 980 + "]" * 980
    line = '{"messages": [{"role": "user", "content": "a", "x": %s}, %s]}'
    answer = '{"role": "assistant", "content": "b"}'
    (tmp_path / "a.jsonl").write_text(line % (deep, answer) + "\n" + line % ("1", answer) + "\n")
    with pytest.warns(DataWarning, match="skipped 1 of 2 "):
        assert len(examples(find(str(tmp_path / "a.jsonl"))).ends) == 1


def test_chats_of_a_dataset_are_those_of_its_rows(tmp_path):
    datasets.disable_progress_bars()
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": f"{i}"},
            ]
        }
        for i in range(40)
    ]
    datasets.Dataset.from_list(chats).save_to_disk(tmp_path / "saved")
    training, held_out = find(f"hf:{tmp_path / 'saved'}").split()
    streamed = examples(training)
    assert len(streamed.ends) + len(examples(held_out).ends) == 40
    in_file = examples(find(write(tmp_path / "a.jsonl", chats)))
    assert set(BYTES.decode(streamed.ids)) <= set(BYTES.decode(in_file.ids))


def test_files_of_any_name_hold_chats_in_the_field_that_is_named(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chats.txt").write_text(json.dumps({"turns": chat}) + "\n")
    (tmp_path / "chats.json").write_text(json.dumps([{"turns": chat}] * 2))
    documents = find(f"{tmp_path / 'chats.txt'}#turns", f"{tmp_path / 'chats.json'}#turns")
    assert len(examples(documents).ends) == 3
