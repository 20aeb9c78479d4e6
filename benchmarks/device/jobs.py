"""The pieces to measure, in order of importance; each is one or more processes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]


class Job(NamedTuple):
    """Rows that are measured together, in one process.

    Attributes:
        names: the names of the rows.
        measure: maps the requested names, and whether to use tiny shapes, to records. A record
            replaces an earlier one of the same name.
        memory: the bytes of the GPU that the process may use; None for JAX's default.
    """

    names: tuple[str, ...]
    measure: Callable[[Sequence[str], bool], Iterator[Record]]
    memory: int | None = None


def pieces() -> dict[str, tuple[Job, ...]]:
    """The jobs of every piece; uses no device."""
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
    """Formats an error as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]
