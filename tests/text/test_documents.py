"""Documents are found, read in pieces and split for good."""

import json
import sys
import warnings

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.text import files
from memopt.text.documents import find_documents
from memopt.text.files import Piece
from memopt.text.finding import DataWarning
from tests.text.corpora import texts, write_files, write_lines

# --- finding ---------------------------------------------------------------------------------


def test_the_standard_library_is_about_the_same_everywhere():
    corpus = find_documents()
    description = corpus.describe()
    assert 7e6 < description["bytes"] < 9e6
    assert 350 < description["files"] < 450
    names = {file.name for file in corpus.files}
    assert {"ast.py", "json/decoder.py", "unittest/case.py"} <= names
    assert not any("test/" in name.replace("unittest/", "") for name in names)
    assert description == find_documents(["python"]).describe()


def test_directories_globs_and_files_find_the_same(tmp_path):
    write_files(tmp_path / "a" / "deep", 3)
    (tmp_path / "a" / ".git").mkdir()
    (tmp_path / "a" / ".git" / "config").write_text("hidden")
    (tmp_path / "a" / "empty.txt").touch()
    by_directory = find_documents([str(tmp_path / "a")])
    by_glob = find_documents([str(tmp_path / "a" / "**" / "*.txt")])
    by_file = find_documents([str(tmp_path / "a" / "deep" / f"f{i:03d}.txt") for i in (0, 1, 2)])
    twice = find_documents([str(tmp_path / "a"), str(tmp_path / "a" / "deep" / "f001.txt")])
    assert texts(by_directory) == texts(by_glob) == texts(by_file) == texts(twice)
    assert [file.name for file in by_directory.files] == [f"deep/f{i:03d}.txt" for i in range(3)]


@pytest.mark.parametrize("field", ["text", "content"])
def test_json_lines(tmp_path, field):
    path = tmp_path / "pages.jsonl"
    path.write_text(f'{{"{field}": "one\\n\\u00e9"}}\n\n  \n{{"{field}": "two", "other": 3}}')
    spec = str(path) if field == "text" else f"{path}#content"
    corpus = find_documents([spec])
    names = [f"{path}, line 1", f"{path}, line 4"]
    pairs = zip(["one\né", "two"], names, strict=True)
    assert list(corpus) == [Piece(text, True, True, name) for text, name in pairs]


def test_bytes_that_are_no_utf8_are_replaced(tmp_path):
    (tmp_path / "latin.txt").write_bytes("né\n".encode("latin-1"))
    assert texts(find_documents([str(tmp_path)])) == ["n\ufffd\n"]


@settings(max_examples=25, deadline=None)
@given(
    content=st.text(st.sampled_from("aé\n→ 𝄞"), min_size=1, max_size=400), piece=st.integers(8, 60)
)
def test_pieces_of_a_long_file_join_to_the_file(tmp_path_factory, content, piece):
    path = tmp_path_factory.mktemp("long") / "book.txt"
    path.write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE_BYTES", piece)
        corpus = find_documents([str(path)])
    pieces = list(corpus)
    assert "".join(piece.content for piece in pieces) == content
    assert [p.begins for p in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [p.ends for p in pieces] == [False] * (len(pieces) - 1) + [True]


def test_long_files_are_cut_at_lines(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"line {i}\n" for i in range(40_000)))
    pieces = list(find_documents([str(tmp_path)]))
    assert len(pieces) == 7
    assert all(
        piece.content.startswith("line ") and piece.content.endswith("\n") for piece in pieces
    )


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "data is empty: name a file"),
        (["nowhere"], "data 'nowhere' matches no text file"),
        (["*.nothing"], r"data '\*.nothing' matches no text file"),
        (["empty.txt"], "data 'empty.txt' holds no text: every file is empty"),
        (["folder"], "data 'folder' names no text: folder/binary is not text: it holds"),
        (["binary"], "data 'binary' is not text: it holds zero bytes"),
        (["broken.jsonl"], r"broken.jsonl, line 2 is not JSON"),
        (
            ["pages.jsonl#body"],
            r"line 1 has no text in .* 'body' \(its fields: text\); name",
        ),
        (["hf:x", "python"], "data 'hf:x' cannot be mixed"),
    ],
)
def test_unreadable_data_is_refused_in_one_sentence(tmp_path, monkeypatch, specs, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    for place in ("binary", "folder/binary"):
        (tmp_path / place).write_bytes(b"a\0b")
    (tmp_path / "broken.jsonl").write_text("\n{nothing\n")
    write_lines(tmp_path / "pages.jsonl", 2)
    with pytest.raises(ValueError, match=message):
        find_documents(specs)


def test_hugging_face_without_datasets_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'memopt\[hf\]'"):
        find_documents(["hf:some/data"])


# --- splitting -------------------------------------------------------------------------------


def test_the_hash_never_changes():
    """Another would move documents between training and validation. SplitMix64 from seed 0."""
    expected = [0xE220A8397B1DCDAF / 2**64, 0x6E789E6AA1B965F4 / 2**64, 0x06C45D188009454F / 2**64]
    np.testing.assert_allclose(files.uniform(0, np.arange(3)), expected, rtol=1e-15)
    many = files.uniform(12345, np.arange(100_000))
    assert 0 <= many.min() < many.max() < 1
    np.testing.assert_allclose(np.histogram(many, 10, (0, 1))[0] / 1e5, 0.1, atol=0.005)


@pytest.mark.parametrize("kind", ["files", "lines"])
def test_adding_documents_moves_no_other(tmp_path, kind):
    def corpus(count):
        if kind == "files":  # what is added comes first
            write_files(tmp_path / "a", count - 150, prefix="a")
            return find_documents([write_files(tmp_path / "a", 150)])
        return find_documents([write_lines(tmp_path / "a.jsonl", count)])

    train, held = map(texts, corpus(150).split(0.1))
    more_train, more_held = map(texts, corpus(300).split(0.1))
    assert 5 <= len(held) <= 25
    assert set(train) < set(more_train)
    assert set(held) < set(more_held)
    assert not set(more_train) & set(more_held)
    assert sorted(more_train + more_held) == texts(corpus(300))


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_few_files_hold_out_their_tails(tmp_path, fraction):
    content = "".join(f"line {i}\n" for i in range(20_000))
    (tmp_path / "book.txt").write_text(content)
    (tmp_path / "tiny.txt").write_text("x")
    train, held = find_documents([str(tmp_path)]).split(fraction)
    book = [piece for piece in train if piece.content != "x"]
    assert len(train) == len(book) + 1
    assert "".join(p.content for p in book) + "".join(p.content for p in held) == content
    assert sum(len(p.content) for p in held) / len(content) == pytest.approx(fraction, abs=0.001)
    assert all(piece.content.startswith("line") for piece in held)
    assert held[len(held) - 1].ends
    assert not any(piece.begins for piece in held)


def test_few_lines_hold_out_the_last(tmp_path):
    train, held = find_documents([write_lines(tmp_path / "a.jsonl", 10)]).split(0.15)
    assert [piece.content.split()[1] for piece in held] == ["8", "9"]
    assert len(train) == 8


@pytest.mark.parametrize("count", [2, 60])
def test_a_few_files_of_one_line_each_are_held_out_whole(tmp_path, count):
    for i in range(count):
        (tmp_path / f"{i:02d}.txt").write_text(f"article {i} " + "word " * 1000 + "\n")
    train, held = find_documents([str(tmp_path)]).split()
    assert len(held) == max(1, count // 20)
    assert len(train) == count - len(held)
    assert all(piece.begins and piece.ends for piece in [*train, *held])
    assert not set(texts(train)) & set(texts(held))
    again = find_documents([str(tmp_path)]).split()[1]
    assert texts(again) == texts(held)


def test_the_end_of_a_single_line_is_held_out_at_a_character(tmp_path):
    (tmp_path / "line.txt").write_text("→" * 500 + "\n")
    train, held = find_documents([str(tmp_path)]).split()
    assert "".join(p.content for p in [*train, *held]) == "→" * 500 + "\n"
    assert 20 <= len(held[0].content) <= 30


def test_too_little_text_to_split_is_refused(tmp_path):
    corpus = find_documents([write_lines(tmp_path / "a.jsonl", 1)])
    with pytest.raises(ValueError, match=r"too small to hold out .*: it is a single document"):
        corpus.split()
    with pytest.raises(ValueError, match=r"validation_fraction=1\.5 must be between 0 and 1"):
        corpus.split(1.5)


def test_every_epoch_has_every_piece_in_a_new_order(tmp_path):
    corpus = find_documents([write_files(tmp_path, 20)])
    pieces = [corpus.epochs(3)[i].content for i in range(40)]
    assert sorted(pieces[:20]) == sorted(pieces[20:]) == texts(corpus)
    assert pieces[:20] != pieces[20:]
    assert pieces != [corpus.epochs(4)[i].content for i in range(40)]


def test_the_same_content_by_other_names_is_split_and_ordered_as_before(tmp_path):
    for place, names in (("old", "abc"), ("new", "zyx")):
        (tmp_path / place).mkdir()
        for seed, name in enumerate(names):
            path = tmp_path / place / f"{name}.jsonl"
            path.write_text("".join(f'{{"text": "{seed} {i}"}}\n' for i in range(60)))
    old, new = (find_documents([str(tmp_path / place)]) for place in ("old", "new"))
    known = new.renamed(old.listing())
    assert known.describe() == old.describe() != new.describe()
    for one, other in zip(known.split(), old.split(), strict=True):
        assert [piece.content for piece in one] == [piece.content for piece in other]
    (tmp_path / "new" / "z.jsonl").write_text('{"text": "other"}\n')
    assert find_documents([str(tmp_path / "new")]).renamed(old.listing()) is None


# --- streams ---------------------------------------------------------------------------------


def test_a_dataset_with_a_validation_part_uses_it(tmp_path):
    datasets.disable_progress_bars()
    parts = {
        name: datasets.Dataset.from_dict({"body": [name] * 5}) for name in ("train", "validation")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    train, held = find_documents([f"hf:{tmp_path / 'saved'}#body"]).split()
    assert texts(train) == ["train"] * 5
    assert texts(held) == ["validation"] * 5


def test_two_readers_of_a_stream_do_not_disturb_each_other(tmp_path):
    """`datasets` keeps a reader's place in the dataset itself."""
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"text": [f"document {i}" for i in range(60)]})
    table.save_to_disk(tmp_path / "saved")
    corpus = find_documents([f"hf:{tmp_path / 'saved'}"])
    alone = [piece.content for piece in corpus.once()]
    one, other = iter(corpus.once()), iter(corpus.once())
    for _ in range(25):
        next(one)
        state = one.get_state()
        next(other, None)
        next(other, None)
    one.set_state(state)
    assert [piece.content for piece in one] == alone[25:]


def test_a_dataset_without_text_in_some_documents_leaves_them_out_wherever_it_continues(tmp_path):
    datasets.disable_progress_bars()
    rows = [None if i % 10 == 3 else f"document {i}" for i in range(60)]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "saved")
    spec = f"hf:{tmp_path / 'saved'}"
    corpus = find_documents([spec])
    reader, states = iter(corpus.once()), []

    def read():
        for _ in range(20):
            states.append(reader.get_state())
            next(reader)

    with pytest.warns(DataWarning, match=r"skipped 1 document so far: .*saved, document 4 has no"):
        read()
    expected = [row for row in rows if row is not None]
    for number in (0, 3, 19):
        reader.set_state(json.loads(json.dumps(states[number])))
        with warnings.catch_warnings(action="ignore"):
            assert [piece.content for piece in reader] == expected[number:]
        assert reader.get_state()["skipped"] == 6
    with pytest.raises(ValueError, match=r"document 4 has no text .*leave it out with --bad-rec"):
        list(find_documents([spec], bad_records="stop").once())


def test_a_dataset_without_such_a_field_is_refused_soon(tmp_path):
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"body": ["x"] * 200})
    table.save_to_disk(tmp_path / "saved")
    corpus = find_documents([f"hf:{tmp_path / 'saved'}"])
    message = r"none of 100 documents has text: .*\(its fields: body\); name the field"
    with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match=message):
        next(iter(corpus.once()))


def test_a_local_dataset_is_the_same_in_another_place_until_it_changes(tmp_path):
    for place in ("old", "new"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "train.csv").write_text("text\na\nb\n")
    old, new = (find_documents([f"hf:{tmp_path / place}"]) for place in ("old", "new"))
    assert new.renamed(old.listing()).describe() == old.describe() != new.describe()
    (tmp_path / "new" / "train.csv").write_text("text\na\nb\nc\n")
    assert find_documents([f"hf:{tmp_path / 'new'}"]).renamed(old.listing()) is None
    assert new.renamed([["a.txt", 5, None, "0a"]]) is None  # files
