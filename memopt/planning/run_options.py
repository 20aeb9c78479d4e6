"""The options of the run whose step is planned, and the command that makes this run."""

import dataclasses
import math
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from memopt.errors import check_choice
from memopt.json_files import read_json
from memopt.models import hugging_face
from memopt.models.config import preset
from memopt.models.families import parse_config
from memopt.models.sharding import BATCH_AXES
from memopt.training.config import Config
from memopt.training.directory import is_run
from memopt.training.placement import parse_mesh
from memopt.training.start import inherited_options

#: Tokens of a row unless they are given, or the model accepts fewer.
SEQ_LEN = 2048


#: Options that no step depends on, or that `model` says.
OTHERS = (
    *("init", "grow", "carry_state", "shape", "phases", "format", "chat_template", "eval_data"),
    *("long_examples", "bad_records", "tokenizer", "eval_tokens", "max_skipped", "seed", "log"),
    *("eval_every", "checkpoint_every", "keep"),
)

#: Options whose values on the command line are added to those of the run it starts from.
APPENDED = ("option", "schedule_option", "controller_option")


def check_options(options: Iterable[str]) -> None:
    """Raises unless a step depends on options with these names.

    Raises:
        ValueError: Names the first that no step depends on.
    """
    named = Config().flat() | {"dtype": None}
    for name in options:
        check_choice("option", name, named)
        if name in OTHERS:
            raise ValueError(
                f"option {name} must be left out: the step does not depend on it, or model says it."
            )


def run_config(
    model: str, optimizer: str | None, given: Mapping[str, Any], compiled_for: str
) -> Config:
    """Returns the options of the run whose step is planned.

    Args:
        model: As in `plan`.
        optimizer: Its name; None: that of the run that `model` is, or the default.
        given: The other arguments of `plan`; those that are None or False are not given.
        compiled_for: The chip that it is compiled for.
    """
    options = {name: x for name, x in given.items() if x is not None and x is not False}
    for name, x in options.items():
        if isinstance(x, tuple):
            options[name] = list(x)
    if dtype := options.pop("dtype", None):
        options = {"param_dtype": dtype, "compute_dtype": dtype} | options
    if optimizer is not None:
        options["optimizer"] = optimizer
    there = _replaced(inherited(model), options)
    for name in APPENDED:
        if name in options:
            options[name] = [*there.get(name, []), *options[name]]
    options = there | options
    dtype = "float32" if compiled_for == "cpu" else "bfloat16"
    options = {"param_dtype": dtype, "compute_dtype": dtype} | options
    options.setdefault("remat", "none" if options.get("release") else "full")
    parts = parse_mesh(options["mesh"]) if options.get("mesh") else {}
    shards = math.prod(parts.get(axis, 1) for axis in BATCH_AXES)
    options.setdefault("batch_size", shards * options.get("accumulation", 1))
    config = Config.from_flat(options)
    if "seq_len" not in options:
        longest = (config.architecture.shape or preset(config.architecture.model)).max_seq_len
        text = dataclasses.replace(config.text, seq_len=min(SEQ_LEN, longest))
        config = dataclasses.replace(config, text=text)
    return config


def inherited(model: str) -> dict[str, Any]:
    """Returns the options that `memopt pretrain` has from `--model` or `--init` alone.

    Args:
        model: As in `plan`; of a Hugging Face directory, only the config is read.
    """
    directory = Path(model)
    if _is_preset(model):
        return {"model": model}
    if is_run("model", directory):
        return inherited_options(directory, grow=1)
    if any(directory.glob("*.safetensors")):
        shape = hugging_face.read_config(directory)
    else:
        path = directory / "config.json"
        shape = parse_config(path, read_json(path))
    return {"model": directory.resolve().name, "shape": dataclasses.asdict(shape)}


def _is_preset(model: str) -> bool:
    return not Path(model).is_dir() and len(Path(model).parts) == 1


def _replaced(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """Inherited options without those of an optimizer, schedule or data that others replace."""
    goes = {"optimizer": ("option", "learning_rate"), "schedule": ("schedule_option",)}
    goes |= {"data": ("mixture",)}
    dropped = {
        name
        for chosen, names in goes.items()
        if here.get(chosen, there.get(chosen)) != there.get(chosen)
        for name in names
    }
    return {name: x for name, x in there.items() if name not in dropped}


def run_command(config: Config, model: str) -> str:
    """Returns the command line that runs the step of these options, without where its data is."""
    flat, there = config.flat(), inherited(model)
    words = ["memopt", "pretrain", "--model" if _is_preset(model) else "--init", model]
    if there.get("optimizer") != flat["optimizer"]:
        words += ["--optimizer", flat["optimizer"]]
    options = _replaced(there, flat) | {"optimizer": flat["optimizer"]}
    defaults = Config.from_flat(options).flat()
    for name, value in flat.items():
        if name in OTHERS or value == defaults[name]:
            continue
        flag = f"--{name.replace('_', '-')}"
        if name in APPENDED:
            for one in value:
                words += [flag, one] if one not in defaults[name] else []
        elif isinstance(value, list):
            words += [flag, *value]
        else:
            words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)
