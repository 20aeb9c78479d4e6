"""Keeps on disk what a compiler said of a program, since asking again takes minutes.

An entry is a JSON file of a few kilobytes, named by all that decides its content: the program, the
chip, the compiler, JAX and the code of this package. It may be deleted at any time. Lines of source
files are no part of the program: an entry that names files is dropped when one of them changes.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import memopt
from memopt.planning.chips import compiler
from memopt.training.writing import why

#: Variables that change what XLA compiles.
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")

#: The files of this package that read a compiler's words, or name what they sort by.
REPORT = ("planning/*.py", "training/step.py", "training/release/*.py", "models/stacked.py")


def directory() -> Path:
    """The directory of the entries: `memopt/plan` in `$XDG_CACHE_HOME`, by default `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path is to be ignored, says the XDG base directory specification.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "memopt" / "plan"


def key_of(program: str, chip: str, patterns: Iterable[str] = REPORT, **options: Any) -> str:
    """Returns the name of a program's entry.

    Args:
        program: The program as text, with its shardings and donated arguments.
        chip: The chip it is compiled for, a name in `memopt.planning.chips.CHIPS` or "cpu".
        patterns: The files of this package that decide the record beside the program.
        **options: What else decides the record, in values of JSON.
    """
    own = hashlib.sha256()
    for path in sources(patterns):
        own.update(path.read_bytes())
    decides = {
        "program": program,
        "chip": chip,
        "compiler": compiler(chip),
        "jaxlib": importlib.metadata.version("jaxlib"),
        "memopt": [memopt.__version__, own.hexdigest()],
        "flags": [os.environ.get(name) for name in _FLAGS],
        "options": options,
    }
    return _digest(decides)


def sources(patterns: Iterable[str] = REPORT) -> list[Path]:
    """The files of this package that match any of the patterns."""
    package = Path(memopt.__file__).parent
    return sorted(path for pattern in patterns for path in package.glob(pattern))


def load(key: str) -> dict[str, Any] | None:
    """Returns what `save` stored; None if there is nothing or source files have changed since.

    A damaged entry is a warning, and nothing.
    """
    path = directory() / f"{key}.json"
    try:
        entry = json.loads(path.read_bytes())
        intact = entry["digest"] == _digest([entry["record"], entry["sources"]])
    except FileNotFoundError:
        return None
    except OSError as error:
        warnings.warn(f"{path} cannot be read ({why(error)}): compiling again.", stacklevel=2)
        return None
    except (ValueError, TypeError, KeyError):
        intact = False
    if not intact:
        warnings.warn(f"{path} is damaged and ignored: compiling again.", stacklevel=2)
        return None
    return entry["record"] if entry["sources"] == _digests(entry["sources"]) else None


def save(key: str, record: dict[str, Any], sources: Iterable[str] = ()) -> None:
    """Stores a record; any number of processes may do so at once.

    A directory that cannot be written is a warning.

    Args:
        key: The name that `key_of` returned.
        record: Values of JSON.
        sources: Files whose lines the record names.
    """
    stored = {"record": record, "sources": _digests(sources)}
    content = json.dumps(stored | {"digest": _digest(list(stored.values()))})
    path = directory() / f"{key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(draft, "w") as file:
                file.write(content)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        warnings.warn(f"{path} cannot be written ({why(error)}); going on without.", stacklevel=2)


def _digests(files: Iterable[str]) -> dict[str, str | None]:
    """The digest of each file's content; None for those that cannot be read."""

    def digest(file: str) -> str | None:
        try:
            return hashlib.sha256(Path(file).read_bytes()).hexdigest()
        except OSError:
            return None

    return {file: digest(file) for file in sorted(set(files))}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
