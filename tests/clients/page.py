"""The code of docs/libraries.md, run as its reader would."""

import re
from pathlib import Path
from typing import Any

import memopt

PAGE = (Path(memopt.__file__).parents[1] / "docs/libraries.md").read_text()
SECTIONS = {
    section.partition("\n")[0]: dict(
        re.findall(r'^```python title="(.*?)"\n(.*?)^```', section, re.DOTALL | re.MULTILINE)
    )
    for section in PAGE.split("\n## ")[1:]
}
FOR_ANY = "For any of them"
LIBRARIES = [name for name in SECTIONS if name != FOR_ANY]


def run(names: dict[str, Any], section: str, *titles: str, **more: Any) -> dict[str, Any]:
    """Runs blocks of a section with these names, and adds those that the blocks define."""
    names |= more
    for title in titles:
        where = f"docs/libraries.md, {section}, {title}"
        exec(compile(SECTIONS[section][title], where, "exec"), names)
    return names


def model_of(library: str, **names: Any) -> dict[str, Any]:
    """All that is defined once the model of a library has been made."""
    return run(run({}, FOR_ANY, "optimizers"), library, "model", **names)
