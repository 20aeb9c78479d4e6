"""Directories in Hugging Face's layout: `config.json` and safetensors, read and written.

Nothing is ever unpickled, no file's code is run, and an index names only files of its directory;
links are followed, since Hugging Face's cache consists of them. Tensors are read one by one, only
the part a device needs, straight into the stacked arrays; Hugging Face stores linear weights
`(out, in)`, our kernels are `(in, out)`.
"""

import dataclasses
import functools
import itertools
import json
import math
import reprlib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding

from memopt.errors import check_choice
from memopt.json_files import read_json, shown
from memopt.models.config import DType, LlamaConfig
from memopt.models.families import config_json, parse_config, token_ids, token_keys
from memopt.models.quantized_tensors import PARTS, SIDE_DATA, join_parts, pack, split_parts, unpack
from memopt.state.quantized_params import dequantize_params

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

STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


#: Types of the arrays of quantised weights.
PART_DTYPES = {"int8": "I8", "uint8": "U8", "bfloat16": "BF16"}


class Tensor(NamedTuple):
    """One tensor of a directory: its name and shape there, and our parameter with its values.

    `dtype` is that of a part of a quantised parameter, None for a whole one of any type.
    """

    name: str
    leaf: str
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]
    dtype: str | None = None


def tensors(shapes: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors of a directory that holds the given parameters, in order of appearance.

    Args:
        shapes: Leaf name to something with a `shape` and a `dtype`, with one leading axis of layers
            in blocks. The name of a quantised parameter's array ends with that of the part.

    Yields:
        Each tensor once, with its shape in the directory.

    Example:
        >>> next(tensors({"head/kernel": np.zeros((8, 256))})).shape
        (256, 8)

    """
    parts = [(base, part) for base in TENSORS for part in ("", *PARTS)]
    for base, part in parts:
        leaf, suffix = (f"{base}/{part}", f".{part}") if part else (base, "")
        if leaf not in shapes:
            continue
        shape, transposed = shapes[leaf].shape, base.endswith("kernel")
        stacked = leaf.startswith("blocks/")
        shape, layers = (shape[1:], range(shape[0])) if stacked else (shape, [None])
        shape = shape[::-1] if transposed else shape
        dtype = shapes[leaf].dtype.name if part else None
        if dtype == "int4":
            shape, dtype = (*shape[:-1], -(-shape[-1] // 2)), "uint8"
        for layer in layers:
            name = TENSORS[base].format(layer) + suffix
            yield Tensor(name, leaf, layer, transposed, shape, dtype)


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
    raw = read_json(path)
    quantized = _read_quantization(path, raw)
    config = parse_config(path, {**raw, "quantization_config": None})
    if generation.exists():
        config = dataclasses.replace(config, **token_ids(generation, read_json(generation)))
    if quantized:
        return dataclasses.replace(config, param_dtype=quantized[1])
    stored = open_tensors(directory)
    dtype = narrowest_dtype(directory, stored)
    if config.tied and {EMBEDDING, HEAD} <= stored.keys():
        stats = [path.stat() for path in _weight_files(directory)]
        files = tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)
        config = dataclasses.replace(config, tied=_has_equal_head(directory, files))
        if config.tied:
            del stored[HEAD]
            dtype = narrowest_dtype(directory, stored)
    return dataclasses.replace(config, param_dtype=dtype)


@functools.lru_cache(maxsize=1)  # a command reads its options and then the model, both large
def _has_equal_head(directory: Path, files: tuple[tuple[int, ...], ...]) -> bool:
    """Whether head and embedding are the same; warns if not. `files` tells changed weights."""
    stored = open_tensors(directory)
    equal = _equal(stored[EMBEDDING], stored[HEAD])
    if not equal:
        path = directory / CONFIG
        warnings.warn(
            f"{path}: {HEAD} differs from {EMBEDDING}: the model is read as untied.", stacklevel=3
        )
    return equal


def _equal(first: Any, second: Any) -> bool:
    """Whether two stored matrices hold the same values, read a few megabytes at a time."""
    shape = first.get_shape()
    if second.get_shape() != shape or len(shape) != 2:
        return False
    rows = max(1, 2**22 // max(1, shape[1]))
    parts = [slice(i, min(i + rows, shape[0])) for i in range(0, shape[0], rows)]
    return all(np.array_equal(first[part], second[part]) for part in parts)


def read_codec(directory: Path) -> str | None:
    """Reads how the weights of a directory are quantised.

    Args:
        directory: Holds `config.json`.

    Returns:
        The name of the codec, as in `memopt.quantize_params`; None if they are not.

    Raises:
        ValueError: They are quantised by something else than memopt.

    """
    path = directory / CONFIG
    codec, _ = _read_quantization(path, read_json(path)) or (None, None)
    return codec


def _read_quantization(path: Path, raw: Mapping[str, Any]) -> tuple[str, DType] | None:
    """The codec, and the type of the decoded parameters."""
    given = raw.get("quantization_config")
    if given is None:
        return None
    for codec, dtype in itertools.product(SIDE_DATA, STORED.values()):
        if given == _quantization(codec, dtype):
            return codec, cast(DType, dtype)
    raise ValueError(
        f"{path}: quantization_config is {reprlib.repr(given)}; only memopt's own is supported, "
        f"with one of the codecs {', '.join(SIDE_DATA)}."
    )


def _quantization(codec: str, dtype: str) -> dict[str, str]:
    return {"quant_method": "memopt", "codec": codec, "dtype": dtype}


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


def check_params(directory: Path, stored: Mapping[str, Any], shapes: dict[str, Any]) -> None:
    """Raises what `read_params` would raise of these arguments, without reading any tensor."""
    flat = flatten_dict(split_parts(shapes), sep="/")
    _check_tensors(directory, _with_embedding(stored, flat), flat)


def _with_embedding(stored: Mapping[str, Any], shapes: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tied model may be stored by its head."""
    if "head/kernel" in shapes or EMBEDDING in stored or HEAD not in stored:
        return stored
    return {**stored, EMBEDDING: stored[HEAD]}


def _check_tensors(directory: Path, stored: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """Refuses missing, unexpected and misshapen tensors, however many a config asks for."""
    absent = (tensor.name for tensor in tensors(shapes) if tensor.name not in stored)
    if missing := list(itertools.islice(absent, 4)):
        raise ValueError(f"{directory} lacks {_enumerate(missing)}.")
    expected = {tensor.name: tensor for tensor in tensors(shapes)}
    # Exports of a tied model may carry a copy of its head.
    if unexpected := sorted(stored.keys() - expected.keys() - {HEAD}):
        raise ValueError(f"{directory} has unexpected {_enumerate(unexpected)}.")
    for name, tensor in expected.items():
        if (shape := tuple(stored[name].get_shape())) != tensor.shape:
            raise ValueError(
                f"{directory}: tensor {name} has shape {shape}, but {CONFIG} makes it "
                f"{tensor.shape}."
            )
        dtype = stored[name].get_dtype()
        if tensor.dtype and dtype != PART_DTYPES[tensor.dtype]:
            raise ValueError(
                f"{directory}: tensor {name} has type {dtype}, but {CONFIG} makes it "
                f"{PART_DTYPES[tensor.dtype]}."
            )


def _enumerate(names: list[str]) -> str:
    return f"tensor {', '.join(map(shown, names[:3]))}{' and more' if len(names) > 3 else ''}"


def read_params(
    directory: Path,
    stored: Mapping[str, Any],
    shapes: dict[str, Any],
    shardings: Any,
    store: Callable[[Any], Any] | None = None,
) -> Any:
    """Parameters of an opened directory, each device reading only its own part.

    Args:
        directory: Named in errors.
        stored: From `open_tensors`.
        shapes: Nested dict of `jax.ShapeDtypeStruct`: what the model holds. Where the directory is
            quantised, as `memopt.quantize_params` makes it of that.
        shardings: Like `shapes`, of `NamedSharding`; None puts everything on the default device.
        store: Maps parts of the parameters, nested dicts, to the form they are kept in, such as
            `memopt.quantize_params`. Never more than one layer of one parameter, or one of
            embedding and head, exists before it has seen it.

    Returns:
        Like `shapes`, of arrays, in the form that `store` gives them.

    Raises:
        ValueError: If a tensor is missing, unexpected or of another shape.

    """
    flat = flatten_dict(split_parts(shapes), sep="/")
    placed = flatten_dict(split_parts(shardings), sep="/") if shardings else {}
    stored = _with_embedding(stored, flat)
    _check_tensors(directory, stored, flat)
    expected = list(tensors(flat))

    def load(leaf: str, layer: int | None = None) -> jax.Array:
        """A leaf, or one layer of it."""
        like, sharding = flat[leaf], placed.get(leaf)
        parts = [tensor for tensor in expected if tensor.leaf == leaf]
        if layer is not None:
            like, parts = jax.ShapeDtypeStruct(like.shape[1:], like.dtype), [parts[layer]]
            sharding = sharding and NamedSharding(sharding.mesh, jax.P(*sharding.spec[1:]))
        stacked = leaf.startswith("blocks/") and layer is None
        read = lambda index: _read_part(stored, parts, like, index, stacked=stacked)
        if sharding:
            return jax.make_array_from_callback(like.shape, sharding, read, dtype=like.dtype)
        return jnp.asarray(read((slice(None),) * len(like.shape)))

    def load_stored(leaf: str, store: Callable[[Any], Any]) -> Any:
        as_kept = lambda x: flatten_dict(store(unflatten_dict({leaf: x}, sep="/")), sep="/")[leaf]
        shape = jax.ShapeDtypeStruct(flat[leaf].shape, flat[leaf].dtype, sharding=placed.get(leaf))
        like = as_kept(shape)
        if like == shape:
            return load(leaf)
        out = jax.tree.map(lambda x: x.sharding, like) if placed else None
        if not leaf.startswith("blocks/"):
            return jax.jit(as_kept, out_shardings=out)(load(leaf))

        def put(kept: Any, x: jax.Array, layer: int) -> Any:
            into = lambda kept, x: jax.lax.dynamic_update_index_in_dim(kept, x, layer, 0)
            return jax.tree.map(into, kept, as_kept(x))

        zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        kept = jax.jit(zeros, out_shardings=out)()
        put = jax.jit(put, donate_argnums=0, out_shardings=out)
        for layer in range(shape.shape[0]):
            kept = put(kept, load(leaf, layer), layer)
        return kept

    if store is None:
        return join_parts(unflatten_dict({leaf: load(leaf) for leaf in flat}, sep="/"), shapes)
    ends_first = sorted(flat, key=lambda leaf: leaf.startswith("blocks/"))
    return unflatten_dict({leaf: load_stored(leaf, store) for leaf in ends_first}, sep="/")


def _read_part(
    stored: Mapping[str, Any], tensors: list[Tensor], like: Any, index: Any, *, stacked: bool
) -> np.ndarray:
    """The part of a parameter that `index` names; of one that is not stacked, of one tensor."""
    bounds = [s.indices(n) for s, n in zip(index, like.shape, strict=True)]
    part = np.empty([len(range(*bound)) for bound in bounds], like.dtype)
    rows: Any = [(part, tensors[0])]
    if stacked:
        rows, index, bounds = zip(part, tensors[index[0]], strict=True), index[1:], bounds[1:]
    for row, tensor in rows:
        index_there, bounds_there = (x[::-1] if tensor.transposed else x for x in (index, bounds))
        if like.dtype == jnp.int4:
            start, stop, _ = bounds_there[-1]
            packed = stored[tensor.name][(*index_there[:-1], slice(start // 2, -(-stop // 2)))]
            values = unpack(packed, start, stop)
        else:
            values = stored[tensor.name][index_there]
        row[...] = values.T if tensor.transposed else values
    return part


def write(
    directory: Path,
    config: LlamaConfig,
    params: Any,
    max_shard_bytes: int,
    *,
    quantized: str | None = None,
    dtype: DType | None = None,
    files: Mapping[str, bytes] | None = None,
    replace: bool = False,
) -> None:
    """Write the configuration and safetensors to a directory, all or nothing.

    Everything is written to a neighbour, which then takes the directory's place.

    Args:
        directory: New or empty.
        config: The model's configuration.
        params: Nested dict of arrays or quantised parameters.
        max_shard_bytes: Size at which a new file is begun.
        quantized: The codec whose arrays are written as they are; None: numbers are written.
        dtype: Type to write numbers in; None: their own.
        files: Further files by name.
        replace: The directory may be an earlier export, whose other files, such as a tokenizer, are
            kept.

    Raises:
        ValueError: If the directory is taken, or if no family of Hugging Face has the
            configuration's options.

    """
    content = config_json(dataclasses.replace(config, param_dtype=dtype or config.param_dtype))
    if quantized:
        content["quantization_config"] = _quantization(quantized, config.param_dtype)
    directory = directory.expanduser().resolve()
    taken = directory.is_file() or (directory.is_dir() and any(directory.iterdir()))
    if taken and not (replace and (directory / CONFIG).is_file()):
        allowed = (
            "a new, an empty or a model directory" if replace else "a new or an empty directory"
        )
        raise ValueError(f"{str(directory)!r} is taken: give {allowed}.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        staged, earlier = Path(scratch, "new"), Path(scratch, "earlier")
        staged.mkdir()
        if directory.exists():
            keep = shutil.ignore_patterns(*REPLACED)
            shutil.copytree(directory, staged, ignore=keep, dirs_exist_ok=True)
        flat = flatten_dict(split_parts(params) if quantized else params, sep="/")
        _write_weights(staged, flat, max_shard_bytes, dtype)
        for name, data in (files or {}).items():
            (staged / name).write_bytes(data)
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


def _write_weights(
    directory: Path, params: Mapping[str, Any], max_shard_bytes: int, dtype: DType | None
) -> None:
    from safetensors.numpy import save_file

    written = lambda x: jnp.dtype((not x.dtype and dtype) or params[x.leaf].dtype)
    shards: list[list[Tensor]] = [[]]
    filled = total = 0
    for tensor in tensors(params):
        size = math.prod(tensor.shape) * jnp.dtype(tensor.dtype or written(tensor)).itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled, total = filled + size, total + size

    def values(tensor: Tensor) -> np.ndarray:
        leaf = params[tensor.leaf]
        part = leaf if tensor.layer is None else jax.tree.map(lambda x: x[tensor.layer], leaf)
        array = np.asarray(dequantize_params(part).astype(written(tensor)))
        array = array.T if tensor.transposed else array
        return np.ascontiguousarray(pack(array) if array.dtype == jnp.int4 else array)

    weight_map = {}
    for number, shard in enumerate(shards, 1):
        many = f"model-{number:05}-of-{len(shards):05}.safetensors"
        name = many if len(shards) > 1 else WEIGHTS
        content = {tensor.name: values(tensor) for tensor in shard}
        save_file(content, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(content, name))
    if len(shards) > 1:
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
