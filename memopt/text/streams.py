"""Documents of Hugging Face datasets, read as they arrive."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import grain

from memopt import internals
from memopt.text.files import TEXT, OtherKindError, Piece, Records, check_fraction, uniform
from memopt.text.finding import DataWarning

#: Documents of a stream that are held and mixed before they are packed.
STREAM_WINDOW = 1024
#: After so many documents without text, and none with text, the field is taken to be wrong.
MOST_SKIPPED = 100


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Documents of a Hugging Face dataset, read in order as they arrive.

    Attributes:
        dataset: A `datasets.IterableDataset`.
        name: The spec it was opened with.
        field: The column that holds the text.
        records: What its documents hold.
        validation: The dataset's own validation part, if it has one.
        held_out: Whether this is the validation part of `dataset`; None before it is split.
        fraction: The share of the documents that is held out.
        bad_records: Whether to "skip" documents without text, or to "stop".
        known_as: The name that identifies it; `name`, unless it is a moved directory.
        content: A hash of the names and sizes of its files, if it is a local directory.
    """

    chunk: ClassVar[int] = 2

    dataset: Any
    name: str
    field: str
    records: Records = TEXT
    validation: Any = None
    held_out: bool | None = None
    fraction: float = 0.0
    bad_records: str = "skip"
    known_as: str = ""
    content: str | None = None

    def split(self, validation_fraction: float = 0.05) -> tuple[Stream, Stream]:
        """Splits by the dataset's own `validation` part or, without, a hash of the position.

        Args:
            validation_fraction: Share of the documents to hold out, between 0 and 1.

        Returns:
            The (training, validation) documents.

        Raises:
            ValueError: The fraction is not between 0 and 1.
        """
        check_fraction(validation_fraction)
        part = dataclasses.replace(self, validation=None)
        if self.validation is not None:
            return part, dataclasses.replace(part, dataset=self.validation)
        part = dataclasses.replace(part, fraction=validation_fraction)
        return dataclasses.replace(part, held_out=False), dataclasses.replace(part, held_out=True)

    def keeps(self, index: int) -> bool:
        """Whether the document at position `index` of the dataset belongs to this part."""
        held_out = bool(uniform(0, index) < self.fraction)
        return self.held_out is None or self.held_out == held_out

    def epochs(self, seed: int) -> grain.IterDataset:
        """Repeats the documents without end, mixed within windows of 1,024."""
        return internals.shuffled(_StreamDataset(self, endless=True), STREAM_WINDOW, seed)

    def once(self) -> grain.IterDataset:
        """Returns every document once, in the order of the dataset."""
        return _StreamDataset(self, endless=False)

    def listing(self) -> list[list[Any]]:
        """Returns name and content, to be given to `renamed`."""
        return [[self.known_as or self.name, self.content]]

    def renamed(self, listing: list[list[Any]]) -> Stream | None:
        """Returns this dataset by the name in a listing, or None if the content is not the same."""
        if self.content is None or [content for _, *content in listing] != [[self.content]]:
            return None
        return dataclasses.replace(self, known_as=listing[0][0])

    def describe(self) -> dict[str, Any]:
        """Returns name, content if it is local, the field and the share that is held out."""
        name, content = self.known_as or self.name, self.content
        known = {"stream": name, "field": self.field, "validation_fraction": self.fraction}
        return known | {"content": content}


class _StreamDataset(grain.IterDataset[Piece]):
    """The pieces of a `Stream`, once or without end."""

    def __init__(self, stream: Stream, endless: bool):
        super().__init__()
        self._stream, self._endless = stream, endless

    def __iter__(self) -> _StreamIterator:
        return _StreamIterator(self._stream, self._endless)


class _StreamIterator(grain.DatasetIterator[Piece]):
    """Reads a `Stream`; its state is an epoch, a position and the state of `datasets`."""

    def __init__(self, stream: Stream, endless: bool):
        super().__init__()
        self._stream, self._endless = stream, endless
        self.set_state({"epoch": 0, "index": 0, "found": False, "source": "null"})

    def __next__(self) -> Piece:
        noun = self._stream.records.noun
        while True:
            for example in self._examples:
                self._index += 1
                if self._stream.keeps(self._index - 1):
                    try:
                        text = self._stream.records.read(example, self._stream.field)
                    except ValueError as error:
                        self._skip(error)
                        continue
                    self._found = True
                    name = f"{self._stream.name}, document {self._index}"
                    return Piece(text, True, True, name)
            if not self._endless:
                raise StopIteration
            if not self._found:
                raise ValueError(f"data {self._stream.name!r} holds no documents with {noun}.")
            self.set_state(
                self.get_state() | {"epoch": self._epoch + 1, "index": 0, "source": "null"}
            )

    def _skip(self, error: ValueError) -> None:
        """Counts a document without text; refuses it if there is no other."""
        self._skipped += 1
        noun = self._stream.records.noun
        what = f"{self._stream.name}, document {self._index} {error}"
        if self._stream.bad_records == "stop":
            raise ValueError(f"data: {what}: leave it out with --bad-records skip.") from error
        if self._skipped == MOST_SKIPPED and not self._found:
            advice = f"; name the field that holds the {noun} after '#', as in 'hf:NAME#content'"
            advice = "" if isinstance(error, OtherKindError) else advice
            raise ValueError(
                f"data: none of {MOST_SKIPPED} documents has {noun}: {what}{advice}."
            ) from error
        if math.log10(self._skipped).is_integer():
            count = f"{self._skipped:,} {'document' if self._skipped == 1 else 'documents'}"
            warnings.warn(f"data: skipped {count} so far: {what}.", DataWarning, stacklevel=2)

    def get_state(self) -> dict[str, Any]:
        # As text: whatever `datasets` keeps survives a round trip through a checkpoint.
        source = json.dumps(self._dataset.state_dict() if self._index else None)
        state = {"epoch": self._epoch, "index": self._index, "found": self._found}
        return state | {"skipped": self._skipped, "source": source}

    def set_state(self, state: dict[str, Any]) -> None:
        self._epoch, self._index, self._found = state["epoch"], state["index"], state["found"]
        self._skipped = state.get("skipped", 0)  # release 0.1 skipped none
        # Each reader takes the only shard, a new object: `datasets` keeps the position in the
        # object, so that readers would share it, and a loaded one would begin every later epoch.
        self._dataset = self._stream.dataset.shard(num_shards=1, index=0)
        source = json.loads(state["source"])
        if source is not None:
            self._dataset.load_state_dict(source)
        self._examples: Iterator[dict[str, Any]] = iter(self._dataset)


def open_stream(spec: str, *, records: Records = TEXT, bad_records: str = "skip") -> Stream:
    """Opens a dataset of the hub, or a local directory, by its spec.

    Args:
        spec: `hf:NAME`, `hf:NAME:CONFIG`, with `#FIELD` for another column than `text`.
        records: What its documents hold.
        bad_records: Whether to "skip" documents without text, or to "stop".

    Raises:
        ValueError: `datasets` cannot open it, or it has no part `train`.
        ImportError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"data {spec!r} needs the package `datasets`: pip install 'memopt[hf]'."
        ) from error
    source, _, field = spec.removeprefix("hf:").partition("#")
    name, _, config = source.partition(":")
    try:
        if any((Path(name) / saved).is_file() for saved in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(name)
            parts = loaded if isinstance(loaded, dict) else {"train": loaded}
            parts = {key: part.to_iterable_dataset() for key, part in parts.items()}
        else:
            parts = datasets.load_dataset(name, config or None, streaming=True)
    except Exception as error:  # many kinds: no such dataset, no network, unknown config …
        raise ValueError(f"data {spec!r} cannot be opened by `datasets`: {error}") from error
    if "train" not in parts:
        raise ValueError(f"data {spec!r} has no part `train`, only {', '.join(parts)}.")
    return Stream(
        parts["train"],
        spec,
        field or records.field,
        records,
        parts.get("validation"),
        bad_records=bad_records,
        content=_names_and_sizes(Path(name)) if Path(name).is_dir() else None,
    )


def _names_and_sizes(directory: Path) -> str:
    """A hash of the names and sizes of all files in a directory but hidden ones."""
    files = (path for path in directory.rglob("*") if path.is_file())
    names = ((path.relative_to(directory).as_posix(), path) for path in files)
    sizes = sorted((name, path.stat().st_size) for name, path in names if "/." not in f"/{name}")
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
