"""Pieces to measure, in the order of their worth; each is one process or several."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]


class Job(NamedTuple):
    """Rows that are measured together, in one process.

    Attributes:
      names: names of the rows.
      measure: maps the names that are wanted, and whether shapes are to be tiny, to records. A
        record of the same name replaces the one before.
      memory: bytes of the GPU that the process may take; None: JAX's default.
    """

    names: tuple[str, ...]
    measure: Callable[[Sequence[str], bool], Iterator[Record]]
    memory: int | None = None


def pieces() -> dict[str, tuple[Job, ...]]:
    """The jobs of every piece; no device is touched."""
    from benchmarks.device import attention, checks, training, updates

    return {
        "memory": training.MEMORY,
        "update": updates.UPDATE,
        "release": training.RELEASE,
        "attention": attention.ATTENTION,
        "models": training.MODELS,
        "tests": checks.TESTS,
    }


def describe(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]
