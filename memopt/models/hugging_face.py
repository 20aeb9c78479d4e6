"""Directories in Hugging Face's layout: `config.json` and safetensors, read and written.

Nothing is ever unpickled, no file's code is run, and an index names only files of its directory;
links are followed, since Hugging Face's cache consists of them. Tensors are read one by one, only
the part a device needs, straight into the stacked arrays; Hugging Face stores linear weights
`(out, in)`, our kernels are `(in, out)`.
"""

import dataclasses
import itertools
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from memopt.errors import check_choice
from memopt.json_files import read_json, shown
from memopt.models.config import DType, LlamaConfig
from memopt.models.families import config_json, parse_config, token_ids, token_keys

# Our leaf and their tensor ("{}" is the layer); kernels are stored transposed.
TENSORS = {
    "embed/embedding": "model.embed_tokens.weight",
    "blocks/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "blocks/attention/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "blocks/attention/q/bias": "model.layers.{}.self_attn.q_proj.bias",
    "blocks/attention/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "blocks/attention/k/bias": "model.layers.{}.self_attn.k_proj.bias",
    "blocks/attention/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "blocks/attention/v/bias": "model.layers.{}.self_attn.v_proj.bias",
    "blocks/attention/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "blocks/attention/o/bias": "model.layers.{}.self_attn.o_proj.bias",
    "blocks/attention/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "blocks/attention/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
    "blocks/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "blocks/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "blocks/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}

EMBEDDING, HEAD = TENSORS["embed/embedding"], TENSORS["head/kernel"]
# A buffer of older exports, which transformers computes anew as well.
BUFFER = "rotary_emb.inv_freq"

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
PICKLED = ("*.bin", "*.pt", "*.pth")

# Files of an earlier export that a new one replaces, or would contradict.
REPLACED = (CONFIG, "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")

log = logging.getLogger(__name__)

STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Tensor(NamedTuple):
    """One tensor of a directory: its name and shape there, and our parameter with its values."""

    name: str
    leaf: str
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]


def tensors(shapes: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors of a directory that holds the given parameters, in order of appearance.

    Args:
        shapes: Leaf name to something with a `shape`, with one leading axis of layers in blocks.

    Yields:
        Each tensor once, with its shape in the directory.

    Example:
        >>> next(tensors({"head/kernel": np.zeros((8, 256))})).shape
        (256, 8)

    """
    for leaf in filter(shapes.__contains__, TENSORS):
        shape, transposed = shapes[leaf].shape, leaf.endswith("kernel")
        stacked = leaf.startswith("blocks/")
        shape, layers = (shape[1:], range(shape[0])) if stacked else (shape, [None])
        shape = shape[::-1] if transposed else shape
        for layer in layers:
            yield Tensor(TENSORS[leaf].format(layer), leaf, layer, transposed, shape)


def read_config(directory: Path) -> LlamaConfig:
    """The configuration of a directory: what `config.json` says, and what the weights are.

    A head that differs from the embedding it is said to be tied to makes the model an untied one,
    as in transformers. Where there is a `generation_config.json`, its special tokens count.

    Args:
        directory: Holds `config.json`, of transformers 4 or 5, and safetensors.

    Returns:
        The configuration, with the narrowest `param_dtype` that holds all weights exactly; the
        model computes in float32.

    Raises:
        ValueError: If a file is missing or damaged, or describes a model that no `LlamaConfig`
            does.

    """
    path, generation = directory / CONFIG, directory / GENERATION
    if not path.exists():
        raise ValueError(f"{directory} has no {CONFIG}; give a model directory of Hugging Face.")
    config = parse_config(path, read_json(path))
    if generation.exists():
        config = dataclasses.replace(config, **token_ids(generation, read_json(generation)))
    stored = open_tensors(directory)
    dtype = narrowest_dtype(directory, stored)
    if config.tied and {EMBEDDING, HEAD} <= stored.keys():
        head = stored.pop(HEAD)
        tied = _equal(stored[EMBEDDING], head)
        if tied:
            dtype = narrowest_dtype(directory, stored)
        else:
            log.warning(
                "%s: %s differs from %s: the model is read as untied.", path, HEAD, EMBEDDING
            )
        config = dataclasses.replace(config, tied=tied)
    return dataclasses.replace(config, param_dtype=dtype)


def _equal(first: Any, second: Any) -> bool:
    """Whether two stored matrices hold the same values, read a few megabytes at a time."""
    shape = first.get_shape()
    if second.get_shape() != shape or len(shape) != 2:
        return False
    rows = max(1, 2**22 // max(1, shape[1]))
    parts = [slice(i, min(i + rows, shape[0])) for i in range(0, shape[0], rows)]
    return all(np.array_equal(first[part], second[part]) for part in parts)


def open_tensors(directory: Path) -> dict[str, Any]:
    """Opens the safetensors of a directory, without reading them.

    Args:
        directory: Holds `model.safetensors`, or an index and the files it names.

    Returns:
        Slices of safetensors by name, which read what they are indexed with.

    Raises:
        ValueError: If there are none, only pickled weights, or a damaged file.

    """
    from safetensors import SafetensorError, safe_open  # training needs none of it

    found: dict[str, Any] = {}
    files: dict[str, Path] = {}
    for path in _weight_files(directory):
        try:
            file = safe_open(path, framework="np")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} cannot be read as safetensors: {shown(str(error))}."
            ) from None
        for name in file.keys():  # noqa: SIM118, not a mapping: it has no iterator of its own
            if name in files:
                raise ValueError(
                    f"{path}: tensor {shown(name)} is also in {shown(files[name].name)}."
                )
            files[name] = path
            if not name.endswith(BUFFER):
                found[name] = file.get_slice(name)
    return found


def _weight_files(directory: Path) -> list[Path]:
    """The file `model.safetensors`, or without it those of the index, as in transformers."""
    paths, index = [directory / WEIGHTS], directory / INDEX
    if not paths[0].exists() and index.exists():
        names = read_json(index).get("weight_map")
        if not (isinstance(names, dict) and all(isinstance(x, str) for x in names.values())):
            raise ValueError(f"{index}: weight_map must hold the name of a file for each tensor.")
        paths = [directory / name for name in sorted(set(names.values()))]
        for name, path in zip(sorted(set(names.values())), paths, strict=True):
            if path.parent != directory or "\\" in name or name in (".", ".."):
                raise ValueError(
                    f"{index}: weight_map names {shown(name)}, which must be a file of the "
                    "same directory."
                )
    missing = [path.name for path in paths if not path.is_file()]
    if (missing or not paths) and any(any(directory.glob(pattern)) for pattern in PICKLED):
        raise ValueError(
            f"{directory} holds pickled weights, which are never loaded; save the model as "
            "safetensors first."
        )
    if missing or not paths:
        raise ValueError(
            f"{directory} lacks {', '.join(map(shown, missing[:3])) or 'any weights'}."
        )
    return paths


def narrowest_dtype(directory: Path, stored: Mapping[str, Any]) -> DType:
    """The narrowest type that holds every tensor exactly.

    Args:
        directory: Named in errors.
        stored: From `open_tensors`.

    Raises:
        ValueError: If a tensor is of another type than `STORED` lists.

    """
    for name, tensor in stored.items():
        check_choice(f"{directory}: tensor {shown(name)}: type", tensor.get_dtype(), STORED)
    kinds = {STORED[tensor.get_dtype()] for tensor in stored.values()}
    return cast(DType, jnp.result_type(*kinds).name)


def _check_tensors(directory: Path, stored: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """Refuses missing, unexpected and misshapen tensors, however many a config asks for."""
    absent = (tensor.name for tensor in tensors(shapes) if tensor.name not in stored)
    if missing := list(itertools.islice(absent, 4)):
        raise ValueError(f"{directory} lacks {_enumerate(missing)}.")
    expected = {tensor.name: tensor.shape for tensor in tensors(shapes)}
    # Exports of a tied model may carry a copy of its head.
    if unexpected := sorted(stored.keys() - expected.keys() - {HEAD}):
        raise ValueError(f"{directory} has unexpected {_enumerate(unexpected)}.")
    for name, shape in expected.items():
        if (given := tuple(stored[name].get_shape())) != shape:
            raise ValueError(
                f"{directory}: tensor {name} has shape {given}, but {CONFIG} makes it {shape}."
            )


def _enumerate(names: list[str]) -> str:
    return f"tensor {', '.join(map(shown, names[:3]))}{' and more' if len(names) > 3 else ''}"


def read_params(
    directory: Path, stored: Mapping[str, Any], shapes: dict[str, Any], shardings: Any
) -> Any:
    """Parameters of an opened directory, each device reading only its own part.

    Args:
        directory: Named in errors.
        stored: From `open_tensors`.
        shapes: Nested dict of `jax.ShapeDtypeStruct`: what the model holds.
        shardings: Like `shapes`, of `NamedSharding`; None puts everything on the default device.

    Returns:
        Like `shapes`, of arrays.

    Raises:
        ValueError: If a tensor is missing, unexpected or of another shape.

    """
    flat = flatten_dict(shapes, sep="/")
    placed = flatten_dict(shardings, sep="/") if shardings else {}
    if "head/kernel" not in flat and EMBEDDING not in stored and HEAD in stored:
        stored = {**stored, EMBEDDING: stored[HEAD]}  # a tied model may be stored by its head
    _check_tensors(directory, stored, flat)
    expected = list(tensors(flat))

    def load(leaf: str) -> jax.Array:
        shape, dtype = flat[leaf].shape, flat[leaf].dtype
        parts = [tensor for tensor in expected if tensor.leaf == leaf]

        def read_part(index: Any) -> np.ndarray:
            sizes = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
            part = np.empty(sizes, dtype)
            rows: Any = [(part, parts[0])]
            if leaf.startswith("blocks/"):
                rows, index = zip(part, parts[index[0]], strict=True), index[1:]
            for row, tensor in rows:
                values = stored[tensor.name]
                row[...] = values[index[::-1]].T if tensor.transposed else values[index]
            return part

        if leaf in placed:
            return jax.make_array_from_callback(shape, placed[leaf], read_part, dtype=dtype)
        return jnp.asarray(read_part((slice(None),) * len(shape)))

    return unflatten_dict({leaf: load(leaf) for leaf in flat}, sep="/")


def write(directory: Path, config: LlamaConfig, params: Any, max_shard_bytes: int) -> None:
    """Write the configuration and safetensors to a directory, all or nothing.

    Everything is written to a neighbour, which then takes the directory's place. Other files of an
    earlier export, such as a tokenizer, are kept.

    Args:
        directory: New, empty, or an earlier export.
        config: The model's configuration.
        params: Nested dict of arrays.
        max_shard_bytes: Size at which a new file is begun.

    Raises:
        ValueError: If the directory holds something that is not a model, or if no family of
            Hugging Face has the configuration's options.

    """
    content = config_json(config)
    directory = directory.expanduser().resolve()
    occupied = directory.is_file() or (directory.is_dir() and any(directory.iterdir()))
    if occupied and not (directory / CONFIG).is_file():
        raise ValueError(
            f"{directory} exists and is not a model directory; give a new or an empty one."
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        staged, earlier = Path(scratch, "new"), Path(scratch, "earlier")
        staged.mkdir()
        if directory.exists():
            keep = shutil.ignore_patterns(*REPLACED)
            shutil.copytree(directory, staged, ignore=keep, dirs_exist_ok=True)
        _write_weights(staged, flatten_dict(params, sep="/"), max_shard_bytes)
        _write_json(staged / CONFIG, content)
        _write_generation(staged / GENERATION, config)
        if directory.exists():
            directory.rename(earlier)
        try:
            staged.rename(directory)
        except OSError:
            if earlier.exists():
                earlier.rename(directory)
            raise


def _write_weights(directory: Path, params: Mapping[str, Any], max_shard_bytes: int) -> None:
    from safetensors.numpy import save_file

    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors(params):
        size = math.prod(tensor.shape) * params[tensor.leaf].dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size

    def values(tensor: Tensor) -> np.ndarray:
        leaf = params[tensor.leaf]
        array = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
        return np.ascontiguousarray(array.T if tensor.transposed else array)

    weight_map = {}
    for number, shard in enumerate(shards, 1):
        many = f"model-{number:05}-of-{len(shards):05}.safetensors"
        name = many if len(shards) > 1 else WEIGHTS
        content = {tensor.name: values(tensor) for tensor in shard}
        save_file(content, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(content, name))
    if len(shards) > 1:
        total = sum(leaf.nbytes for leaf in params.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / INDEX, index)


def _write_generation(path: Path, config: LlamaConfig) -> None:
    """Writes the special tokens, and keeps what else the file of an earlier export says."""
    kept = read_json(path) if path.exists() else {}
    ids = token_keys(config)
    content = {key: value for key, value in kept.items() if key not in ids}
    content |= {key: value for key, value in ids.items() if value is not None}
    if content or kept:
        _write_json(path, content)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
