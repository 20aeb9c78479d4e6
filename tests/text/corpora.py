"""Corpora to read: files, JSON lines, and what is in them."""

import json


def write_files(directory, count, prefix="f"):
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        text = "".join(f"{prefix}{i} line {j}\n" for j in range(1 + (i * 7919) % 200))
        (directory / f"{prefix}{i:03d}.txt").write_text(text)
    return str(directory)


def write_lines(path, count, field="text"):
    records = [{field: f"document {i} " + "word " * (i % 13)} for i in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def texts(corpus):
    return sorted(piece.content for piece in corpus.once())
