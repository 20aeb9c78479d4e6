"""The options of the run whose step is planned, and the command that makes this run."""

import dataclasses
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memopt.errors import check_choice
from memopt.json_files import read_json
from memopt.models import hugging_face
from memopt.models.config import preset
from memopt.models.families import parse_config
from memopt.models.sharding import BATCH_AXES
from memopt.training.config import Config, read_options
from memopt.training.directory import is_run
from memopt.training.placement import parse_mesh

#: Tokens of a row unless they are given, or the model accepts fewer.
SEQ_LEN = 2048


def run_config(
    model: str, optimizer: str | None, given: Mapping[str, Any], compiled_for: str
) -> Config:
    """Returns the options of the run whose step is planned.

    Args:
        model: As in `plan`.
        optimizer: Its name; None if it has none.
        given: The other arguments of `plan`.
        compiled_for: The chip that it is compiled for.
    """
    named = Config().flat() | {"dtype": None}
    for name in given:
        check_choice("option", name, named)
    options = {name: x for name, x in given.items() if x is not None}
    for name, x in options.items():
        if isinstance(x, tuple):
            options[name] = list(x)
    dtype = options.pop("dtype", "float32" if compiled_for == "cpu" else "bfloat16")
    options = {"param_dtype": dtype, "compute_dtype": dtype} | options
    options.setdefault("remat", "none" if options.get("release") else "full")
    if optimizer is not None:
        options["optimizer"] = optimizer
    elif "option" in options:
        raise ValueError("option goes with the name of an optimizer.")
    options = _model_options(model) | options
    parts = parse_mesh(options["mesh"]) if "mesh" in options else {}
    shards = math.prod(parts.get(axis, 1) for axis in BATCH_AXES)
    options.setdefault("batch_size", shards * options.get("accumulation", 1))
    config = Config.from_flat(options)
    if "seq_len" not in options:
        longest = (config.architecture.shape or preset(config.architecture.model)).max_seq_len
        text = dataclasses.replace(config.text, seq_len=min(SEQ_LEN, longest))
        config = dataclasses.replace(config, text=text)
    return config


def _model_options(model: str) -> dict[str, Any]:
    """The options of a run that name a model and its shapes."""
    directory = Path(model)
    if not directory.is_dir() and len(directory.parts) == 1:
        return {"model": model}
    if is_run("model", directory):
        there = read_options(directory / "config.json")
        names = ("model", "shape", "vocab_size", "num_layers")
        return {name: there[name] for name in names if name in there}
    if any(directory.glob("*.safetensors")):
        shape = hugging_face.read_config(directory)
    else:
        path = directory / "config.json"
        shape = parse_config(path, read_json(path))
    return {"model": directory.resolve().name, "shape": dataclasses.asdict(shape)}


def run_command(config: Config, model: str) -> str:
    """Returns the command line that runs the step of these options, without where its data is."""
    defaults, words = Config().flat(), ["memopt", "pretrain"]
    from_directory = config.architecture.shape or model != config.architecture.model
    words += ["--init" if from_directory else "--model", model]
    words += ["--optimizer", config.optimization.optimizer]
    said = ("model", "optimizer", "shape", "phases", "learning_rate")
    for name, value in config.flat().items():
        if name in said or value == defaults[name]:
            continue
        flag = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            words += [flag] if one is True else [flag, str(one)]
    return shlex.join(words)
