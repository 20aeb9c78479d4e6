"""Writes the model of a run in Hugging Face's layout, with its tokenizer and a model card."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from memopt import __version__
from memopt.json_lines import read_json_lines
from memopt.models import hugging_face
from memopt.models.config import DType, LlamaConfig
from memopt.models.quantized_tensors import codec_of
from memopt.state.quantized_params import dequantize_params
from memopt.text.tokenizer import TEMPLATE
from memopt.text.tokenizer_files import tokenizer_files
from memopt.training.load import LoadedModel
from memopt.training.phases import describe_phases

#: Size at which a new file is begun.
SHARD_BYTES = 5 * 10**9


def export(
    run: LoadedModel, directory: str | Path, *, dtype: DType | None = None, quantized: bool = False
) -> None:
    """Writes the model of a run to a directory that transformers loads, all or nothing.

    Args:
        run: The run, from `memopt.training.load_run`.
        directory: A new or empty directory.
        dtype: Type of the numbers; None: that of the run's parameters.
        quantized: Write quantised weights as they are, to be read by memopt alone, see
            `memopt.models.quantized_tensors`.

    Raises:
        ValueError: The directory is not empty, or there are no quantised weights.
        OSError: It cannot be written.
    """
    directory, codec = Path(directory), codec_of(run.params)
    if quantized and not codec:
        raise ValueError(
            f"quantized must be left out, since the weights of {str(run.path)!r} are not quantised."
        )
    if quantized and dtype:
        raise ValueError("dtype must be left out with quantized, which writes codes as they are.")
    files = {**tokenizer_files(run.tokenizer.name), "README.md": model_card(run).encode()}
    if (template := run.path / TEMPLATE).is_file():
        files[TEMPLATE] = template.read_bytes()
    hugging_face.write(
        directory,
        _with_token_ids(run),
        run.params,
        SHARD_BYTES,
        quantized=codec if quantized else None,
        dtype=dtype,
        files=files,
    )


def model_card(run: LoadedModel) -> str:
    """Returns the facts of a run in Markdown.

    Args:
        run: The run, from `memopt.training.load_run`.
    """
    dense = jax.eval_shape(dequantize_params, run.params)
    size = sum(leaf.size for leaf in jax.tree.leaves(dense))
    cell = lambda value: f"{value}".replace("|", r"\|")
    rows = "\n".join(f"| {name} | {cell(value)} |" for name, value in _facts(run))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {run.path.resolve().name}

A language model of {size:,} parameters, trained by memopt {__version__}.

| | |
|---|---|
{rows}
"""


def _facts(run: LoadedModel) -> Iterator[tuple[str, Any]]:
    config, step = run.config, run.step
    if config is None or step is None:
        return
    lines = [x for x in read_json_lines(run.path / "metrics.jsonl") if x["step"] <= step]
    architecture, text, options = config.architecture, config.text, config.optimization
    init, grow = config.start.init, config.start.grow
    begun = (
        f"the weights of {init.resolve().name}" if init else f"random weights, seed {options.seed}"
    )
    yield "started from", begun + (f", its layers repeated {grow} times" if grow > 1 else "")
    yield "data", ", ".join(f"`{spec}`" for spec in text.data)
    yield "tokenizer", "bytes" if text.tokenizer == "bytes" else Path(text.tokenizer).name
    yield "steps", f"{step} of {options.steps}"
    yield "tokens", f"{sum(int(line['tokens']) for line in lines):,}"
    yield "rows of a batch, tokens of a row", f"{text.batch_size}, {text.seq_len}"
    if lines and lines[-1]["loss"] is not None:
        yield "training loss of the last step", f"{lines[-1]['loss']:.4f}"
    if run.val_loss is not None:
        yield "validation loss a token", f"{run.val_loss:.4f}"
    yield "optimizer", " ".join((options.optimizer, *options.option))
    yield "its state in", options.state or "full precision"
    yield "highest learning rate", f"{config.highest_learning_rate:g}"
    yield "schedule", describe_phases(config)
    yield "parameters in", architecture.weights or architecture.param_dtype
    yield "computed in", architecture.compute_dtype


def _with_token_ids(run: LoadedModel) -> LlamaConfig:
    """The model's configuration, with the tokens around texts in training among its own."""
    config = dataclasses.replace(run.model_config, eos_ids=run.end_ids)
    if run.config and not run.config.architecture.shape:  # a model that was brought has its own
        return dataclasses.replace(config, bos_id=run.tokenizer.begin_ids[0])
    return config
