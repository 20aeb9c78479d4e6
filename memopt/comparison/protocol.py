"""The protocol of a comparison: models, text, steps and runs, the same for all methods.

After "Fantastic Pretraining Optimizers and Where to Find Them" (Wen et al., 2025) and "No Train No
Gain" (Kaddour et al., 2023): every method has the same number of runs to be tuned with, the
baseline more; all are compared at the end of their whole schedules, on held-out tokens, over seeds
that were not tuned on.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from memopt.comparison.rows import BASELINE, SCHEDULES, Row, tuned_options
from memopt.errors import check_at_least, check_choice
from memopt.models.config import DType, LlamaConfig, preset

#: Pieces of equal length that a run is trained in; runs that count are evaluated after each.
PIECES = 20

#: The seed of the runs that tune, which no run that counts may have.
TUNING_SEED = 10_000


@dataclasses.dataclass(frozen=True)
class Protocol:
    """All that the runs of a comparison have in common.

    Attributes:
        models: The models by the name of their size.
        steps: Steps of a run, a multiple of 20.
        batch_size: Rows of a batch.
        seq_len: Tokens of a row.
        data: The text, as `memopt.training.config.Text.data`; read as bytes.
        eval_tokens: Held-out tokens that are evaluated on.
        seeds: Seeds of the runs that count.
        tuning_runs: Runs that each method is tuned with; AdamW, which has one option more to tune,
            with half as many again. When they are used up, the grid of learning rates still grows
            until the best is inside.
        schedule: The schedule's name.
        warmup: Share of the steps in which the learning rate rises from 0.
        final_learning_rate: Learning rate at the end, as a share of the highest.
        batch_sizes: Batch sizes of ``over="batch_size"``.
    """

    models: Mapping[str, LlamaConfig]
    steps: int
    batch_size: int
    seq_len: int
    data: tuple[str, ...] = ("python",)
    eval_tokens: int = 2**14
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_runs: int = 8
    schedule: str = "cosine"
    warmup: float = 0.1
    final_learning_rate: float = 0.0
    batch_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "seq_len": 2, "tuning_runs": 1, "eval_tokens": self.seq_len}
        for name, value in least.items():
            check_at_least(name, getattr(self, name), value)
        for size in self.batch_sizes:
            check_at_least("batch_sizes", size, 1)
        check_at_least("seeds", len(self.seeds), 1)
        if TUNING_SEED in self.seeds:
            raise ValueError(f"seeds must not hold {TUNING_SEED}, which methods are tuned on.")
        for name in ("seeds", "batch_sizes"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must differ, got {' '.join(map(str, values))}.")
        if self.steps % PIECES or self.steps < PIECES:
            raise ValueError(f"steps must be a multiple of {PIECES}, got {self.steps}.")

    def schedule_of(self, row: Row) -> str:
        """Returns the schedule of a row: the protocol's, unless its method has its own."""
        return SCHEDULES.get(row.optimizer, self.schedule)

    def runs_of(self, row: Row) -> int:
        """Returns how many runs a row is tuned with."""
        if row.exact != row:
            return 0
        with_decay = row.optimizer == BASELINE and "weight_decay" in tuned_options(row)
        return self.tuning_runs * 3 // 2 if with_decay else self.tuning_runs


def _byte_model(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    dtype: DType = "float32",
) -> LlamaConfig:
    """A LLaMA that reads bytes, with as many ids as the preset tiny."""
    return dataclasses.replace(
        preset("tiny"),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        dtype=dtype,
    )


PRESETS = {
    # 205,000 tokens, 0.4 and 0.1 for each parameter: what two cores train 500 times in hours.
    "cpu": Protocol(
        models={"0.5M": _byte_model(128, 384, 2, 4), "2M": preset("tiny")},
        steps=400,
        batch_size=8,
        seq_len=64,
        batch_sizes=(2, 4, 8, 16, 32),
    ),
    # 33 million tokens, 3.3, 1.3 and 0.5 for each parameter: minutes a run on one GPU.
    "gpu-small": Protocol(
        models={
            "10M": _byte_model(320, 864, 8, 5, dtype="bfloat16"),
            "25M": _byte_model(512, 1376, 8, 8, dtype="bfloat16"),
            "60M": _byte_model(640, 1728, 12, 10, dtype="bfloat16"),
        },
        steps=2000,
        batch_size=64,
        seq_len=256,
        eval_tokens=2**17,
        batch_sizes=(16, 32, 64, 128, 256),
    ),
}
"""Protocols by name."""


def make_protocol(preset: str = "cpu", *, sizes: Sequence[str] = (), **changes: Any) -> Protocol:
    """Returns a preset with other values of some fields.

    Args:
        preset: A name in `PRESETS`.
        sizes: Sizes of the preset's models; by default all.
        **changes: Fields of `Protocol`.

    Raises:
        ValueError: There is no such preset or size, or a value is not allowed.

    Example:
        >>> protocol = make_protocol("cpu", sizes=["0.5M"], steps=100, seeds=(0,))
        >>> [*protocol.models], protocol.steps, protocol.batch_size
        (['0.5M'], 100, 8)
    """
    check_choice("preset", preset, PRESETS)
    models = PRESETS[preset].models
    for size in sizes:
        check_choice("size", size, models)
    kept = {size: models[size] for size in sizes or models}
    return dataclasses.replace(PRESETS[preset], models=kept, **changes)
