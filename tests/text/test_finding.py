"""All that is text is read, and what is left out is said."""

import bz2
import gzip
import json
import lzma
import os
import sys
import tempfile
import types

import pytest

from memopt.text import finding, sources
from memopt.text.chats import CHATS
from memopt.text.documents import find_documents
from memopt.text.files import TEXT
from memopt.text.finding import DataWarning, read_files
from tests.text.corpora import texts

LINES = '{"text": "one"}\n{"text": "two", "other": 3}\n'
ARRAY = json.dumps([{"text": "one"}, {"text": "two", "other": [1]}], indent=1)


def found(tmp_path, name, content, field=""):
    """The texts of a file with this name and content."""
    (tmp_path / name).write_bytes(content)
    return texts(find_documents([f"{tmp_path / name}{field}"]))


# --- kinds of files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.NdJson", "a.json", "a.jsonl.gz", "a.JSONL.GZ"]
)
def test_json_lines_are_known_by_their_names(tmp_path, name):
    assert found(tmp_path, name, LINES.encode()) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.txt", "dump"])
def test_with_a_field_any_file_is_json_lines(tmp_path, name):
    assert found(tmp_path, name, LINES.encode(), "#text") == ["one", "two"]
    assert found(tmp_path, name, LINES.encode()) == [LINES]


def test_a_json_file_holds_lines_an_array_or_one_record(tmp_path):
    assert found(tmp_path, "array.json", ARRAY.encode()) == ["one", "two"]
    assert found(tmp_path, "short.json", b'[{"text": "one"}]') == ["one"]
    pretty = json.dumps({"text": "one", "other": 2}, indent=1)
    assert found(tmp_path, "record.JSON", pretty.encode()) == ["one"]


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be-mark", "utf-32-be-mark"]
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_byte_order_mark_says_how_to_read(tmp_path, name, encoding):
    text = {"a.txt": "né →\r\n𝄞", "a.jsonl": LINES, "a.json": ARRAY}[name]
    big_endian = encoding.endswith("-mark")
    content = f"\ufeff{text}".encode(encoding[:-5]) if big_endian else text.encode(encoding)
    expected = ["né →\r\n𝄞"] if name == "a.txt" else ["one", "two"]
    assert found(tmp_path, name, content) == expected
    assert found(tmp_path, f"{name}.gz", gzip.compress(content)) == expected


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz"])
def test_compressed_files_are_known_by_their_content(tmp_path, monkeypatch, name, compress):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 5)
    content = LINES.encode()
    parts = compress(content[:9]) + compress(content[9:])  # of two parts, as tools append them
    assert found(tmp_path, name, parts) == ([LINES] if name == "a.txt" else ["one", "two"])


def test_a_compressed_book_is_cut_and_read_like_a_plain_one(tmp_path):
    book = "".join(f"line {i}\n" for i in range(20_000)).encode()
    (tmp_path / "0.txt").write_bytes(gzip.compress(b"before\n"))
    (tmp_path / "1.txt").write_bytes(book)
    (tmp_path / "2.txt").write_bytes(lzma.compress(book))
    (tmp_path / "3.txt").write_bytes(gzip.compress(b"after\n"))
    pieces = list(find_documents([str(tmp_path)]))
    assert len(pieces) == 10
    assert pieces[1:5] == pieces[5:9]
    assert [piece.ends for piece in pieces[:5]] == [True, False, False, False, True]


def test_zstd_is_read_with_its_package_and_named_without(tmp_path, monkeypatch):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfdabc")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"zst' is compressed by what .*: pip install zstandard"):
        find_documents([str(path)])

    class Decompressor:
        """Returns what follows the first four bytes."""

        def stream_reader(self, stream, *, read_across_frames):
            assert read_across_frames
            stream.read(4)
            return stream

    fake = types.SimpleNamespace(ZstdDecompressor=Decompressor)
    monkeypatch.setitem(sys.modules, "zstandard", fake)
    assert texts(find_documents([str(path)])) == ["abc"]


def test_no_room_for_decoded_text_is_told_with_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(gzip.compress(b"text"))
    full = os.open("/dev/full", os.O_RDWR)
    monkeypatch.setattr(tempfile, "mkstemp", lambda **_: (full, str(tmp_path / "copy")))
    monkeypatch.setattr(os, "unlink", lambda _: None)
    with pytest.raises(ValueError, match=r"a\.txt' cannot be unpacked .*No space left.* TMPDIR"):
        find_documents([str(tmp_path / "a.txt")])


# --- directories -----------------------------------------------------------------------------


def test_links_to_folders_are_followed_once(tmp_path):
    for name in ("data/sub", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text(name)
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "sub")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data")
    corpus = find_documents([str(tmp_path / "data")])
    assert [file.name for file in corpus.files] == ["linked/a.txt", "sub/a.txt"]


def test_what_is_left_out_of_a_directory_is_said_in_one_line(tmp_path):
    (tmp_path / "good.txt").write_text("text")
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"abc" * 99)[:-9])
    os.mkfifo(tmp_path / "pipe")
    with pytest.warns(DataWarning) as warned:
        corpus = find_documents([str(tmp_path)])
    assert texts(corpus) == ["text"]
    assert [str(warning.message) for warning in warned] == [
        "data: left out 9 files: 5 without text (0.png, 1.png, 2.png, …), "
        "1 unreadable: Too many levels of symbolic links (loop.txt), "
        "1 without text in the field 'text' (package.json), 1 no regular file (pipe), "
        "1 unreadable: Compressed file ended before the end-of-stream marker was reached (torn.gz)."
    ]


def test_a_file_that_is_named_must_be_readable(tmp_path):
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"abc" * 99)[:-9])
    (tmp_path / "good.txt").write_text("text")
    with pytest.raises(ValueError, match=r"torn\.gz' cannot be read: Compressed file ended"):
        find_documents([str(tmp_path / "torn.gz"), str(tmp_path / "good.txt")])


# --- bad records -----------------------------------------------------------------------------

BAD = [
    (b'{"text": null}', "has no text in the field 'text' (None in it)"),
    (b'{"text": 3}', "has no text in the field 'text' (3 in it)"),
    (b'{"body": "x"}', "has no text in the field 'text' (its fields: body)"),
    (b"[1]", "has no text in the field 'text' (its fields: none)"),
    (b"{torn", "is not JSON ("),
    (b"[" * 100_000, "is not JSON ("),
    (b'{"text": "n\xe9"}', "is not UTF-8 (byte 11 of the line)"),
]


@pytest.mark.parametrize(("line", "why"), BAD, ids=range(len(BAD)))
def test_a_bad_record_far_down_is_skipped_and_named_at_the_start(tmp_path, line, why):
    path = tmp_path / "pages.jsonl"
    good = [b'{"text": "%d"}' % i for i in range(2222)]
    path.write_bytes(b"\n".join([*good, line, b'{"text": "last"}', b""]))
    with pytest.warns(DataWarning) as warned:
        corpus = find_documents([str(path)])
    assert str(warned[0].message).startswith(
        f"data: skipped 1 of 2,224 records: {path}, line 2223 {why}"
    )
    assert texts(corpus) == sorted(["last", *map(str, range(2222))])
    with pytest.raises(ValueError, match=r"pages\.jsonl, line 2223 .*: repair it, or leave it out"):
        find_documents([str(path)], bad_records="stop")


def test_of_many_bad_records_the_first_are_named_and_all_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + "bad\n" * 50)
    with pytest.warns(DataWarning, match=r"skipped 50 of 51 records: .* line 4 .*; …\.$"):
        find_documents([str(tmp_path / "a.jsonl")])


def test_records_of_an_array_are_skipped_by_their_number(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "one"}, {"text": None}], indent=1))
    with pytest.warns(DataWarning, match=r"skipped 1 of 2 records: .*a\.json, line 2 has no text"):
        assert texts(find_documents([str(path)])) == ["one"]


def test_a_choice_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="bad_records 'ignore' is unknown"):
        find_documents(bad_records="ignore")


def test_progress_is_shown_if_reading_takes_long(tmp_path, monkeypatch):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("text")
    lines = []
    find_documents([str(tmp_path)], progress=lines.append)
    assert lines == []
    monkeypatch.setattr(finding, "SECONDS_OF_SILENCE", -1)
    find_documents([str(tmp_path)], progress=lines.append)
    assert lines == ["reading the data: 0 of 3 files, 0 MB"]


ROLES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHARE_GPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("records", "row", "says"),
    [
        (TEXT, {"messages": ROLES}, "line 1 looks like a chat: add --format chats.$"),
        (TEXT, {"conversations": SHARE_GPT}, "line 1 looks like a chat: add --format chats.$"),
        (CHATS, {"conversations": SHARE_GPT}, "assistant\\) and 'conversations' to 'messages'.$"),
        (CHATS, {"messages": SHARE_GPT}, "'role' and 'content'; rename .* gpt → assistant\\).$"),
        (CHATS, {"conversations": ROLES}, "name the field that holds the chat after '#'"),
        (CHATS, {"dialogue": ROLES}, "name the field that holds the chat after '#'"),
    ],
)
def test_records_of_another_kind_are_told_from_those_in_another_field(tmp_path, records, row, says):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=says):
        read_files([str(tmp_path / "rows.jsonl")], records=records)
