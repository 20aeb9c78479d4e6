"""The code and the tables of names in docs/libraries.md and docs/trainers.md."""

import collections
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import memopt

DOCS = Path(memopt.__file__).parents[1] / "docs"


def sections(page: str) -> dict[str, dict[str, str]]:
    """The blocks of code of each section, by their titles."""
    block = r'^```(?:python|yaml) title="(.*?)"\n(.*?)^```'
    return {
        section.partition("\n")[0]: dict(re.findall(block, section, re.DOTALL | re.MULTILINE))
        for section in page.split("\n## ")[1:]
    }


PAGE = (DOCS / "libraries.md").read_text()
TRAINERS_PAGE = (DOCS / "trainers.md").read_text()
SECTIONS = sections(PAGE)
FOR_ANY = "For any of them"
LIBRARIES = [name for name in SECTIONS if name != FOR_ANY]
TRAINERS = sections(TRAINERS_PAGE)


def run(names: dict[str, Any], section: str, *titles: str, **more: Any) -> dict[str, Any]:
    """Runs blocks of a section with these names, and adds those that the blocks define."""
    names |= more
    for title in titles:
        where = f"docs, {section}, {title}"
        exec(compile((SECTIONS | TRAINERS)[section][title], where, "exec"), names)
    return names


def model_of(library: str, **names: Any) -> dict[str, Any]:
    """The names that are defined once the model of a library has been made."""
    return run(run({}, FOR_ANY, "optimizers"), library, "model", **names)


def by_column(
    description: memopt.Description, shorten: Callable[[str], str] = str
) -> dict[str, list[str]]:
    """The names of a model's parameters by their column in a page's table."""
    found: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for row in description.rows:
        lower = row.name.lower()
        match row.kind:
            case "matrix":
                column = "attention" if re.search("att|mha", lower) else "other"
            case "vector":
                column = "norms" if "norm" in lower else "biases"
            case "position":
                column = "embedding"
            case kind:
                column = kind
        found[column][shorten(row.name)] = None
    return collections.defaultdict(list, {column: [*names] for column, names in found.items()})


def table_row(library: str, found: Mapping[str, Sequence[str]]) -> str:
    """The row of a page's table that has these names."""
    columns = ("embedding", "head", "attention", "other", "norms")
    return f"| {library} | {' | '.join(braced(found[column]) for column in columns)} |"


def braced(names: Sequence[str]) -> str:
    """Names in Markdown; those that differ in the part before the last share a name with braces."""
    parts: dict[tuple[str, str], list[str]] = {}
    for name in names:
        *around, part, last = ["", *name.split("/")]
        parts.setdefault(("/".join(around).lstrip("/"), last), []).append(part)
    each = {key: p[0] if len(p) == 1 else f"{{{','.join(p)}}}" for key, p in parts.items()}
    return ", ".join(f"`{'/'.join(filter(None, (a, p, z)))}`" for (a, z), p in each.items())
