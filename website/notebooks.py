"""The notebooks as pages of the site, and the gallery of them."""

import base64
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import ROOT

FOLDER = ROOT / "notebooks"

#: The notebooks in the order in which the site and the gallery show them.
ORDER = [
    "compose",
    "channel_scale",
    "subspaces",
    "eight_bits",
    "fits",
    "comparison",
    "geometry",
    "schedules",
    "pod",
]

#: The tag of the cell whose picture the gallery shows; without it, the first picture.
THUMBNAIL = "thumbnail"

#: The beginning of each notebook's first cell of code. The site puts in the address, if it has one.
ADDRESS = "ADDRESS"
SETUP = f"""\
# In Colab, uncomment the next two lines, with the address of memopt's repository.
# !git clone {ADDRESS} memopt && pip install -q './memopt[train]'
# %cd memopt/notebooks
"""

#: The line of a page at which the gallery is shown.
GALLERY = "<!-- gallery -->"

#: A formula between $$ and $$ or $ and $, as notebooks write it, or a block of code.
FORMULA = re.compile(
    r"^```.*?^```|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^\s$](?:[^$\n]*[^\s$])?)\$",
    re.DOTALL | re.MULTILINE,
)


class Notebook(NamedTuple):
    """A notebook as Markdown.

    Attributes:
        name: its file's name, without ending.
        title: its heading.
        summary: the paragraph below the heading.
        text: all of it, with its outputs.
        pictures: the pictures among its outputs, in PNG, by the file's name.
        thumbnail: the name of one of them.
    """

    name: str
    title: str
    summary: str
    text: str
    pictures: Mapping[str, bytes]
    thumbnail: str


def paths() -> list[Path]:
    """The files of all notebooks, in their order; `ValueError` if one is not in it."""
    return sorted(FOLDER.glob("*.ipynb"), key=lambda path: ORDER.index(path.stem))


@functools.cache
def notebook(path: Path) -> Notebook:
    """Reads a notebook.

    Args:
        path: a file that Jupyter wrote.

    Raises:
        ValueError: It does not begin with a heading and a paragraph, or it has no picture.
    """
    cells = json.loads(path.read_text())["cells"]
    start = re.match(r"# ([^\n]+)\s+([^#\s].+?)\s*(?:\n\n|\Z)", _source(cells[0]), re.DOTALL)
    if cells[0]["cell_type"] != "markdown" or start is None:
        raise ValueError(
            f"{path.name} must begin with a heading, # and its title, and a paragraph."
        )
    title, paragraph = start[1], " ".join(start[2].split())
    pictures: dict[str, bytes] = {}
    parts: list[str] = []
    thumbnail = ""
    for cell in cells:
        if cell["cell_type"] == "markdown":
            parts.append(_source(cell))
            continue
        parts.append(f"```python\n{_source(cell)}\n```")
        for kind, content in _outputs(cell):
            if kind == "text":
                parts.append(f"```text\n{content.rstrip()}\n```")
                continue
            name = f"{path.stem}_{len(pictures) + 1}.png"
            parts.append(f"![Figure {len(pictures) + 1}]({name})")
            pictures[name] = base64.b64decode(content)
            if THUMBNAIL in cell["metadata"].get("tags", ()):
                thumbnail = name
    if not pictures:
        raise ValueError(f"{path.name} has no picture: run notebooks/run.py --write.")
    text = "\n\n".join(parts) + "\n"
    return Notebook(path.stem, title, paragraph, text, pictures, thumbnail or next(iter(pictures)))


def _source(cell: Mapping[str, Any]) -> str:
    return "".join(cell["source"])


def _outputs(cell: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The outputs of a cell: "text" or "picture", and its content."""
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            yield "picture", "".join(data["image/png"])
        elif text := "".join(data.get("text/plain", output.get("text", ""))):
            yield "text", text


def page(found: Notebook, repository: str | None) -> str:
    """The page of a notebook, in Markdown, with links to open it.

    Args:
        found: the notebook.
        repository: the address of the repository, if it has one.
    """
    text = found.text.replace("](../docs/", "](../")
    text = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", text)
    links = [f"[Download]({found.name}.ipynb){{ .md-button download }}"]
    if repository:
        text = text.replace(SETUP, SETUP.replace(ADDRESS, repository))
    if address := colab(found.name, repository):
        links.insert(0, f"[Open in Colab]({address}){{ .md-button }}")
    heading, rest = text.split("\n", 1)
    return f"{heading}\n\n{' '.join(links)}\n{rest}"


def colab(name: str, repository: str | None) -> str | None:
    """The address at which Colab opens a notebook; None unless the repository is on GitHub.

    Example:
        >>> colab("compose", "https://github.com/someone/memopt/")
        'https://colab.research.google.com/github/someone/memopt/blob/main/notebooks/compose.ipynb'
    """
    place = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", repository or "")
    base = "https://colab.research.google.com/github"
    return place and f"{base}/{place[1]}/blob/main/notebooks/{name}.ipynb"


def gallery() -> str:
    """All notebooks with a picture, title and first paragraph each, in Markdown."""
    cards = []
    for found in map(notebook, paths()):
        link = f"notebooks/{found.name}.md"
        cards.append(
            f"-   [![{found.title}](notebooks/{found.thumbnail})]({link})\n\n"
            f"    **[{found.title}]({link})**\n\n    {found.summary}\n"
        )
    return '<div class="grid cards gallery" markdown>\n\n' + "\n".join(cards) + "\n</div>\n"
