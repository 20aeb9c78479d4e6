"""A file imports only from its own room and from rooms on floors below its own."""

import ast
from pathlib import Path

import pytest

import memopt

ROOT = Path(memopt.__file__).parent
FLOORS = {
    **{"cli": 6, "planning": 5, "comparison": 5, "training": 4, "integrations": 4},
    **{"text": 3, "models": 3, "optimizers": 3, "diagnostics": 3},
    **{"transforms": 2, "schedules": 2, "state": 1},
}


def imported(source):
    """The modules of memopt that a file imports, late imports and those for types included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("memopt."))
        elif isinstance(node, ast.ImportFrom) and node.module == "memopt":
            yield from (f"memopt.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("memopt."):
            yield node.module


def test_every_room_has_a_floor():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(FLOORS)


@pytest.mark.parametrize("room", FLOORS)
def test_imports_go_down(room):
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in ROOT.joinpath(room).rglob("*.py")
        for module in imported(path.read_text())
        if (other := module.split(".")[1]) != room and FLOORS.get(other, 0) >= FLOORS[room]
    ]
    assert wrong == []
