"""Batches of rows from several sources, each with its share of them."""

from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from memopt.text.files import uniform
from memopt.text.mixtures import normalized
from memopt.text.packing import Batch


class Mixed(grain.IterDataset[Batch]):
    """Batches whose rows come from several sources.

    As long as the weights stay the same, the rows taken from each source are at any time less than
    one row off its share: each row comes from the source that must be next to keep that true (the
    quota method; M. L. Balinski and H. P. Young, "The quota method of apportionment", 1975). When
    they change, what a source is still owed is kept. The rows of a batch are in random order.

    Args:
        sources: Endless datasets of rows.
        weights: Share of each source.
        batch_size: Rows of a batch.
        seed: Decides the order of the rows in each batch.
    """

    def __init__(
        self,
        sources: Mapping[str, grain.IterDataset],
        weights: Mapping[str, float],
        batch_size: int,
        seed: int,
    ):
        super().__init__()
        self._sources, self._weights = sources, normalized(weights, list(sources))
        self._batch_size, self._seed = batch_size, seed

    def __iter__(self) -> "_MixedIterator":
        sources = {name: iter(rows) for name, rows in self._sources.items()}
        return _MixedIterator(sources, self._weights, self._batch_size, self._seed)


class _MixedIterator(grain.DatasetIterator[Batch]):
    """Its state is the weights, what the sources are owed, and their own states."""

    def __init__(
        self,
        sources: Mapping[str, grain.DatasetIterator],
        weights: dict[str, float],
        batch_size: int,
        seed: int,
    ):
        super().__init__(tuple(sources.values()))
        self._sources, self._batch_size, self._seed = sources, batch_size, seed
        self._weights = weights
        self._owed = dict.fromkeys(sources, 0.0)
        self._batches = 0

    def __next__(self) -> Batch:
        names = [next_source(self._weights, self._owed) for _ in range(self._batch_size)]
        numbers = self._batches * self._batch_size + np.arange(self._batch_size)
        order = np.argsort(uniform(self._seed, numbers), kind="stable")
        self._batches += 1
        rows = [next(self._sources[names[i]]) for i in order]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, Any]:
        return {
            "weights": dict(self._weights),
            "owed": dict(self._owed),
            "batches": self._batches,
            "sources": {name: rows.get_state() for name, rows in self._sources.items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._weights, self._owed = dict(state["weights"]), dict(state["owed"])
        self._batches = state["batches"]
        for name, rows in self._sources.items():
            rows.set_state(state["sources"][name])


def next_source(weights: Mapping[str, float], owed: dict[str, float]) -> str:
    """Chooses the source of the next row.

    Args:
        weights: Share of each source, positive.
        owed: By how many rows each source is behind its share, in all of sum 0; updated.

    Returns:
        Of the sources that are behind, the one that will be a whole row behind first.

    Example:
        >>> weights, owed = {"web": 0.75, "code": 0.25}, {"web": 0.0, "code": 0.0}
        >>> [next_source(weights, owed) for _ in range(4)]
        ['web', 'web', 'web', 'code']
    """
    for name, weight in weights.items():
        owed[name] += weight
    behind = [name for name in weights if owed[name] > 0]
    chosen = min(behind, key=lambda name: (1 - owed[name]) / weights[name])
    owed[chosen] -= 1
    return chosen
