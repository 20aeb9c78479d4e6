"""A model small enough to train in a test, as a preset, and text for it."""

import dataclasses
import random

from memopt.models.config import PRESETS, preset

NANO = dataclasses.replace(
    preset("tiny"),
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=64,
)


def install() -> None:
    """Adds the preset "nano"."""
    PRESETS["nano"] = NANO


def remove() -> None:
    """Takes it away again."""
    del PRESETS["nano"]


def write_text(path, words=20_000):
    """Writes text with something to learn, and returns its path."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(50)]
    path.write_text("\n".join(" ".join(draw.choices(vocabulary, k=12)) for _ in range(words // 12)))
    return path
