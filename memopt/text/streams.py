"""Documents of Hugging Face datasets, read as they arrive."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain

from memopt import internals
from memopt.text.files import Piece, check_fraction, text_field, uniform

#: Documents of a stream that are held and mixed before they are packed.
STREAM_WINDOW = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Documents of a Hugging Face dataset, read in order as they arrive.

    Attributes:
        dataset: A `datasets.IterableDataset`.
        name: The spec it was opened with.
        field: The column that holds the text.
        validation: The dataset's own validation part, if it has one.
        held_out: Whether this is the validation part of `dataset`; None before it is split.
        fraction: The share of the documents that is held out.
    """

    dataset: Any
    name: str
    field: str
    validation: Any = None
    held_out: bool | None = None
    fraction: float = 0.0

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

    def describe(self) -> dict[str, Any]:
        """Returns the name, the field and the share that is held out."""
        return {"stream": self.name, "field": self.field, "validation_fraction": self.fraction}


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
        while True:
            for example in self._examples:
                self._index += 1
                if self._stream.keeps(self._index - 1):
                    self._found = True
                    where = f"{self._stream.name}, document {self._index}"
                    return Piece(text_field(example, self._stream.field, where), True, True)
            if not self._endless:
                raise StopIteration
            if not self._found:
                raise ValueError(f"data {self._stream.name!r} holds no documents.")
            self.set_state({"epoch": self._epoch + 1, "index": 0, "found": True, "source": "null"})

    def get_state(self) -> dict[str, Any]:
        # As text: whatever `datasets` keeps survives a round trip through a checkpoint.
        source = json.dumps(self._dataset.state_dict() if self._index else None)
        return {"epoch": self._epoch, "index": self._index, "found": self._found, "source": source}

    def set_state(self, state: dict[str, Any]) -> None:
        self._epoch, self._index, self._found = state["epoch"], state["index"], state["found"]
        # Each reader takes the only shard, a new object: `datasets` keeps the position in the
        # object, so that readers would share it, and a loaded one would begin every later epoch.
        self._dataset = self._stream.dataset.shard(num_shards=1, index=0)
        source = json.loads(state["source"])
        if source is not None:
            self._dataset.load_state_dict(source)
        self._examples: Iterator[dict[str, Any]] = iter(self._dataset)


def open_stream(spec: str) -> Stream:
    """Opens a dataset of the hub, or a local directory, by its spec.

    Args:
        spec: `hf:NAME`, `hf:NAME:CONFIG`, with `#FIELD` for another column than `text`.

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
    return Stream(parts["train"], spec, field or "text", parts.get("validation"))
