"""Writes the figures of README and docs from the result files, and docs/results.md.

    python -m benchmarks.results

Between a line ``<!-- from FILE by FUNCTION WORD … -->`` and the next ``<!-- end -->`` stands what
the function makes of the file; several files are separated by commas, and the words are further
arguments.
Sentences with figures are not written, but checked: `benchmarks.claims`.
"""

import importlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from memopt.comparison.records import read_records

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"

BLOCK = re.compile(
    r"^<!-- from (.+?) by (benchmarks[\w.]+)(.*?) -->\n(.*?)^<!-- end -->$",
    re.MULTILINE | re.DOTALL,
)

#: Older files have versions as entries of their own.
OLD_KEYS = ("jax", "optax", "libtpu")

INTRODUCTION = """\
# Results

Each file in `benchmarks/results`: the command that made it, the machine, the versions of packages
and compiler, its plot, and the pages that show its tables. `python -m benchmarks.results` writes
this page and the tables from the files, and a test compares them. Where no machine or version is
named, the file is from before these were recorded.
"""


class Block(NamedTuple):
    """A part of a page that is made from result files.

    Attributes:
        page: the page.
        files: the result files.
        function: the name of the function that makes the text, in its module.
        words: its further arguments.
    """

    page: Path
    files: tuple[Path, ...]
    function: str
    words: tuple[str, ...]

    def text(self) -> str:
        """The text that the function makes of the files, ending with a line feed."""
        module, name = self.function.rsplit(".", 1)
        make: Callable[..., str] = getattr(importlib.import_module(module), name)
        return make(*map(read, self.files), *self.words).rstrip("\n") + "\n"


def read(path: Path) -> dict[str, Any]:
    """Reads a result file; one of `memopt compare` has a run on each line."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    runs = read_records(path)
    told = lambda values: " and ".join(dict.fromkeys(map(str, values)))
    return {
        "command": told(run["command"] for run in runs),
        "cpu": told(run["machine"]["cpu"] for run in runs),
        "cores": told(run["machine"]["cores"] for run in runs),
        "device": told(run["machine"]["device"] for run in runs),
        "results": runs,
    }


def sources() -> list[Path]:
    """The pages with figures, without the page of results."""
    docs = sorted(path for path in (ROOT / "docs").glob("*.md") if path != PAGE)
    return [ROOT / "README.md", *docs]


def blocks(page: Path) -> Iterator[tuple[re.Match[str], Block]]:
    """The parts of a page that are made from result files, and where they are."""
    for found in BLOCK.finditer(page.read_text()):
        files = tuple(ROOT / name.strip() for name in found[1].split(","))
        yield found, Block(page, files, found[2], tuple(found[3].split()))


def pages() -> dict[Path, str]:
    """The text of every page, as the result files say it must be."""
    texts, shown = {}, []
    for page in sources():
        parts, end, text = [], 0, page.read_text()
        for found, block in blocks(page):
            parts += [text[end : found.start(4)], block.text()]
            shown.append(block)
            end = found.end(4)
        texts[page] = "".join([*parts, text[end:]])
    texts[PAGE] = results_page(shown)
    return texts


def results_page(shown: Sequence[Block]) -> str:
    """The page of all result files, given the parts that other pages show."""
    parts = [INTRODUCTION]
    for path in sorted([*RESULTS.glob("*.json"), *RESULTS.glob("*.jsonl")]):
        parts.append(f"## {path.stem.replace('_', ' ')}\n\n{provenance(path)}\n")
        if path.with_suffix(".png").exists():
            link = f"../benchmarks/results/{path.stem}.png"
            parts.append(f"![{path.stem.replace('_', ' ')}]({link})\n")
        on = dict.fromkeys(block.page for block in shown if path in block.files)
        if on:
            links = (f"[{title(page)}]({os.path.relpath(page, PAGE.parent)})" for page in on)
            parts.append(f"Tables: {', '.join(links)}.\n")
    return "\n".join(parts)


def title(page: Path) -> str:
    """The title of a page: its first heading."""
    return page.read_text().partition("\n")[0].removeprefix("# ")


def provenance(path: Path) -> str:
    """A paragraph on the command, the machine and the versions of a file, and a link to it."""
    report = read(path)
    words = [f"`{report['command']}`", f"[figures](../benchmarks/results/{path.name})"]
    if "cpu" in report:
        words.append(f"{report['cpu']}, {report['cores']} cores")
    if report.get("device", "cpu") != "cpu":
        words.append(report["device"])
    results = report["results"]
    rows = [row for row in results if isinstance(row, dict)] if isinstance(results, list) else []
    compiled = dict.fromkeys(row["compiled_for"] for row in rows if "compiled_for" in row)
    compiled |= dict.fromkeys(row["chip"] for row in rows if "traffic" in row)
    if compiled:
        words.append(f"compiled for {', '.join(compiled)}")
    found: dict[str, dict[str, None]] = {}
    for one in (report, *rows):
        old = {k: one[k] for k in OLD_KEYS if isinstance(one.get(k), str)}
        versions = one.get("versions", {}) | old
        for name, version in versions.items():
            found.setdefault(name, {})[version] = None
    words += [f"{name} {' and '.join(of)}" for name, of in found.items()]
    return "; ".join(words) + "."


def write_pages() -> None:
    """Writes the pages whose figures have changed."""
    for page, text in pages().items():
        if not page.exists() or page.read_text() != text:
            page.write_text(text)
            print(f"{page.relative_to(ROOT)} is rewritten.")


if __name__ == "__main__":
    write_pages()
