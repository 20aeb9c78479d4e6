"""Reports a run that has ended: a plot of the loss and a sample of text."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from memopt.json_lines import read_json_lines
from memopt.training.open import Training
from memopt.training.plots import Curve, plot_curves, plot_panels
from memopt.training.sampling import continuations


def plot_loss(metrics: Path, image: Path) -> None:
    """Draws the training and validation loss of a `metrics.jsonl` as a PNG.

    By steps; of a controlled run by batches, of which a step may use several.

    Args:
        metrics: The file to read.
        image: The file to write.

    Raises:
        OSError: It cannot be written; a plot that was there before stays.
    """
    lines = [line for line in read_json_lines(metrics) if line["loss"] is not None]
    evaluated = [line for line in lines if line.get("val_loss") is not None]
    unit = "batches" if any("batches" in line for line in lines) else "step"
    curve = lambda lines, key: ([line[unit] for line in lines], [line[key] for line in lines])
    curves: dict[str, Curve] = {
        "training": (*curve(lines, "loss"), {"lw": 0.8}),
        "validation": (*curve(evaluated, "val_loss"), {"marker": "o"}),
    }
    plot_curves(curves, image, x=unit, y="loss a token (nats)")


def plot_diagnostics(diagnostics: Path, image: Path) -> None:
    """Draws a `diagnostics.jsonl` as a PNG: a plot for each measure, a curve for each parameter.

    A stack of layers is drawn as its mean.

    Args:
        diagnostics: The file to read.
        image: The file to write.

    Raises:
        ValueError: The file has no lines, as before the first measurement.
        OSError: It cannot be written; a plot that was there before stays.
    """
    lines = read_json_lines(diagnostics)
    if not lines:
        raise ValueError(f"{str(diagnostics)!r} has no line to plot: no step has measured yet.")
    at = [line["step"] for line in lines]
    names = [name for name in lines[-1] if name not in ("step", "updates")]
    mean = lambda values: np.mean(np.array(values, float)) or np.nan  # of zeros there is no log
    panels: dict[str, dict[str, Curve]] = {
        name: {
            parameter: (at, [mean(line[name][parameter]) for line in lines], {"lw": 1.2})
            for parameter in lines[-1][name]
        }
        for name in names
    }
    plot_panels(panels, image, x="step", log=True)


def sample_text(
    run: Training, params: Any, prompt_tokens: int = 64, new_tokens: int = 192
) -> tuple[str, str]:
    """Continues the first held-out text, or answers the first held-out prompt.

    Args:
        run: The run.
        params: The parameters to use.
        prompt_tokens: How much of the text to read; of chats, all before the first answer.
        new_tokens: How much to write, at most.

    Returns:
        The prompt and its continuation.
    """
    held_out = next(iter(run.validation.values()))
    first = {name: array[0] for name, array in held_out[0].items()}
    row = {name: np.asarray(x) for name, x in multihost_utils.broadcast_one_to_all(first).items()}
    longest = run.setup.model_config.max_seq_len
    ends = [run.tokenizer.eos_id, *run.setup.model_config.eos_ids]
    if run.config.text.format == "chats":
        prompt = row["inputs"][: row["weights"].argmax() + 1][: longest - 1]
        last = int(row["targets"][(row["weights"] == 1) & (row["segment_ids"] == 1)][-1])
        # Of an answer that was cut it is any token.
        ends = [last, *ends] if last in run.tokenizer.special_tokens.values() else ends
    else:
        prompt = row["inputs"]
        prompt = prompt[prompt != run.tokenizer.eos_id][:prompt_tokens]
    new_tokens = min(new_tokens, longest - len(prompt))
    with jax.set_mesh(run.setup.mesh):
        options: Any = {"temperature": 0.8, "key": jax.random.key(0), "end_ids": ends}
        [new] = continuations(run.setup.model(params), prompt[None], new_tokens, **options)
    return run.tokenizer.decode(prompt), run.tokenizer.decode(new)
