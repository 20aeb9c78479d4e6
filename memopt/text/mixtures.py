"""Data from several named sources: `web=pages.jsonl code=src` and their shares."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from memopt.text.documents import Documents, find_documents
from memopt.text.files import TEXT, Records

#: A source that has a name: NAME=SOURCE.
_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)


def named_sources(specs: Sequence[str], option: str = "data") -> dict[str, tuple[str, ...]]:
    """Groups specs by the names of their sources.

    Args:
        specs: Specs as `memopt.text.documents.find_documents` takes them, each with a name in
            front, NAME=SOURCE, or none. What is a file or matches files has no name, whatever
            characters it is made of.
        option: The option that they are given by, for errors.

    Returns:
        The specs of each source, without its name, in the order in which the names come first.
        Specs without names are those of one source, "".

    Raises:
        ValueError: Some have names, others have none.

    Example:
        >>> named_sources(["web=pages.jsonl", "code=src", "web=more/*.txt"])
        {'web': ('pages.jsonl', 'more/*.txt'), 'code': ('src',)}
        >>> named_sources(["pages.jsonl", "hf:org/name"])
        {'': ('pages.jsonl', 'hf:org/name')}
    """
    sources: dict[str, tuple[str, ...]] = {} if specs else {"": ()}
    for spec in specs:
        match = _NAMED.fullmatch(spec)
        name, source = match.groups() if match and not _is_there(spec) else ("", spec)
        sources[name] = (*sources.get(name, ()), source)
    if "" in sources and len(sources) > 1:
        named = next(filter(None, sources))
        raise ValueError(
            f"{option} must name all of its sources or none: {named!r} is a name, "
            f"{sources[''][0]!r} has none; give each as NAME=SOURCE."
        )
    return sources


def _is_there(spec: str) -> bool:
    pattern = Path(spec.partition("#")[0]).expanduser()
    return Path(spec).exists() or any(True for _ in glob.iglob(str(pattern), recursive=True))


def mixture_shares(names: Sequence[str], mixture: Sequence[str] = ()) -> dict[str, float]:
    """Returns the share of each source.

    Args:
        names: The names of the sources, in order.
        mixture: NAME=WEIGHT for each of them; none: equal shares.

    Returns:
        Shares of sum 1, in the order of `names`.

    Raises:
        ValueError: A weight is not a positive number, or other sources are given.

    Example:
        >>> mixture_shares(["web", "code"], ["code=1", "web=3"])
        {'web': 0.75, 'code': 0.25}
    """
    weights = {}
    for item in mixture:
        name, equals, text = item.partition("=")
        try:
            weights[name] = float(text)
        except ValueError:
            weights[name] = math.nan
        if not (equals and 0 < weights[name] < math.inf):
            raise ValueError(
                f"mixture {item!r} must be NAME=WEIGHT with a positive weight, such as web=0.7."
            )
    if (mixture and set(weights) != set(names)) or len(weights) < len(mixture):
        known = ", ".join(filter(None, names)) or "none: give each as --data NAME=SOURCE"
        raise ValueError(
            f"mixture {' '.join(mixture)!r} must give each source of the data one weight; the "
            f"named sources are {known}."
        )
    return normalized(weights or dict.fromkeys(names, 1.0), names)


def normalized(weights: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Returns weights in the order of the sources, divided by their sum.

    Raises:
        ValueError: They are not positive numbers, one for each source.
    """
    values = [float(weights[name]) for name in names if name in weights]
    if len(weights) != len(names) or len(values) != len(names):
        raise ValueError(f"weights are for {list(weights)}, but the sources are {list(names)}.")
    if not all(0 < value < math.inf for value in values):
        raise ValueError(f"weights must be positive, got {dict(weights)}.")
    total = math.fsum(values)
    return {name: value / total for name, value in zip(names, values, strict=True)}


@contextlib.contextmanager
def errors_of_source(name: str) -> Iterator[None]:
    """Names the source in errors that are raised in the block, if it has a name."""
    try:
        yield
    except ValueError as error:
        if not name:
            raise
        raise ValueError(f"source {name!r}: {error}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """The documents of each source.

    Attributes:
        sources: Documents by the name of their source; without names, those of one source, "".
    """

    sources: Mapping[str, Documents]

    def split(self) -> tuple[Mixture, Mixture]:
        """Splits each source into its training part and its held-out part."""
        parts = {}
        for name, documents in self.sources.items():
            with errors_of_source(name):
                parts[name] = documents.split()
        training, held_out = (
            Mixture({name: both[i] for name, both in parts.items()}) for i in (0, 1)
        )
        return training, held_out

    def listing(self) -> list[list[Any]]:
        """Returns what the sources list, each name with that of its source before: "web=a.txt"."""
        return [
            [f"{name}={entry[0]}" if name else entry[0], *entry[1:]]
            for name, documents in self.sources.items()
            for entry in documents.listing()
        ]

    def renamed(self, listings: Sequence[Sequence[Sequence[Any]]]) -> Mixture:
        """Returns the same documents, each source with the names that it has in a listing.

        Args:
            listings: What `listing` returned, of whatever mixtures. The last one that has the same
                content of a source counts; without any, the source keeps its names.
        """
        return Mixture(
            {name: _renamed(name, part, listings) for name, part in self.sources.items()}
        )

    def describe(self) -> dict[str, Any]:
        """Returns what identifies the documents, JSON-serialisable."""
        described = {name: documents.describe() for name, documents in self.sources.items()}
        return described.get("", {"sources": described})


def _renamed(
    name: str, documents: Documents, listings: Sequence[Sequence[Sequence[Any]]]
) -> Documents:
    prefix = f"{name}=" if name else ""
    for listing in reversed(listings):
        own = [
            [entry[0].removeprefix(prefix), *entry[1:]]
            for entry in listing
            if entry[0].startswith(prefix)
        ]
        if (renamed := documents.renamed(own)) is not None:
            return renamed
    return documents


def find_mixture(
    sources: Mapping[str, Sequence[str]],
    *,
    records: Records = TEXT,
    bad_records: str = "skip",
    progress: Callable[[str], None] | None = None,
) -> Mixture:
    """Finds the documents of each source.

    Args:
        sources: The specs of each, from `named_sources`.
        records: As in `find_documents`.
        bad_records: As in `find_documents`.
        progress: As in `find_documents`.

    Raises:
        ValueError: As `find_documents`.
        ImportError: As `find_documents`.
    """
    options: Any = {"records": records, "bad_records": bad_records, "progress": progress}
    found = {}
    for name, specs in sources.items():
        with errors_of_source(name):
            found[name] = find_documents(specs, **options)
    return Mixture(found)
