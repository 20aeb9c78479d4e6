"""The code of docs/libraries.md and docs/trainers.md, run as its reader would."""

import re
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
    """All that is defined once the model of a library has been made."""
    return run(run({}, FOR_ANY, "optimizers"), library, "model", **names)
