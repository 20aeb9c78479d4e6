"""The table of docs/methods.md, from the registry, docstrings and the benchmarks' results.

A method's formula of state and its source are taken from its docstring, the bytes for whole models
from `benchmarks.state_bytes`, and the errors from `benchmarks.parity`.
"""

import re
from typing import Any

from memopt.optimizers.registry import METHODS, available

MODELS = ("60m", "7b")
HEAD = (
    "| method | numbers kept for an m×n matrix | LLaMA-60m | LLaMA-7b | error (runs) | source |",
    "|---|---|--:|--:|--:|---|",
)


def source(name: str) -> str:
    """The first reference of a method's docstring, as a link."""
    found = re.search(
        r"References: (.+?), .*?(\d{4}), (https:[^\s,;]+?)[.,;]*(?:\s|$)", _docstring(name)
    )
    if found is None:
        raise ValueError(f"{name}: its docstring has no reference with authors, year and address.")
    return f"[{found[1]} {found[2]}]({found[3]})"


def table(state_bytes: dict[str, Any], parity: dict[str, Any]) -> str:
    """The table, sorted by state at 7B; methods that are not measured yet come last."""
    kept = {(r["optimizer"], r["model"]): r["state_bytes"] for r in state_bytes["results"]}
    errors: dict[str, list[float]] = {}
    for r in parity["results"]:
        errors.setdefault(r["method"], []).append(r["error"])

    def row(called: str, formula: str, where: str) -> str:
        name = called.partition(".")[2]
        sizes = [_size(kept.get((name, model))) for model in MODELS]
        found = errors.get(name)
        error = f"{max(found):.1e} ({len(found)})".replace("e-0", "e-") if found else "–"
        return " | ".join(("| " + f"`{called}`", formula, *sizes, error, f"{where} |"))

    size = lambda name: kept.get((name, MODELS[-1]), float("inf"))
    ours = [
        row(f"memopt.{name}", METHODS[name].state, source(name))
        for name in sorted(available("memopt"), key=size)
    ]
    return "\n".join((*HEAD, *ours, row("optax.adamw", "2mn", "for comparison"), ""))


def _docstring(name: str) -> str:
    return " ".join((METHODS[name].make.__doc__ or "").split())


def _size(b: int | None) -> str:
    if b is None:
        return "–"
    return f"{b / 1e9:.1f} GB" if b >= 1e9 else f"{b / 1e6:.1f} MB" if b else "0"
