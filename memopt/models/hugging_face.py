"""LLaMA directories in Hugging Face's layout: `config.json` and safetensors, read and written.

Nothing is ever unpickled. Tensors are read one by one, only the part a device needs, straight into
the stacked arrays; Hugging Face stores linear weights `(out, in)`, our kernels are `(in, out)`.
"""

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding

from memopt.errors import check_choice
from memopt.models.config import DType, LlamaConfig, RopeScaling
from memopt.models.quantized_tensors import PARTS, SIDE_DATA, join_parts, pack, split_parts, unpack
from memopt.state.quantized_params import dequantize_params

# Our leaf and their tensor ("{}" is the layer); kernels are stored transposed.
TENSORS = {
    "embed/embedding": "model.embed_tokens.weight",
    "blocks/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "blocks/attention/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "blocks/attention/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "blocks/attention/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "blocks/attention/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "blocks/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "blocks/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "blocks/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}

# Our field and their key in config.json. The defaults of `LlamaConfig` are transformers'.
SAME = ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "rope_theta")
FIELDS = {
    **{name: name for name in SAME},
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
ROPE_FIELDS = {
    **{name: name for name in ("factor", "low_freq_factor", "high_freq_factor")},
    "original_max_seq_len": "original_max_position_embeddings",
}
# Written to config.json; refused where it says otherwise.
PLAIN_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

# Files of an earlier export that a new one replaces, or would contradict.
REPLACED = (CONFIG, "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")

STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


#: The method and the arrays' types of quantised weights, as memopt writes them.
QUANTIZED = "memopt"
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
    """Reads `config.json`; the model computes in float32.

    Args:
        directory: Holds `config.json`, of transformers 4 or 5.

    Returns:
        The configuration.

    Raises:
        ValueError: If the file is missing or describes something other than a plain LLaMA.

    """
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"{directory} has no {CONFIG}; give a model directory of Hugging Face.")
    raw = {key: value for key, value in _read_json(path).items() if value is not None}
    for key, value in PLAIN_LLAMA.items():
        if (given := raw.get(key, value)) != value:
            raise ValueError(f"{path}: {key} is {given!r}; only {value!r} is supported.")
    _read_quantization(path, raw)
    # Transformers 5 writes `rope_parameters`, transformers 4 `rope_scaling`.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{path}: rotary type {rope}; only default and llama3 are known.")
    required = {f.name for f in dataclasses.fields(LlamaConfig) if f.default is dataclasses.MISSING}
    try:
        heads = raw["num_attention_heads"]
        raw = {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // heads} | raw
        fields = {o: raw[t] for o, t in FIELDS.items() if t in raw or o in required}
        if "rope_theta" in rope:
            fields["rope_theta"] = rope["rope_theta"]
        if kind == "llama3":
            fields["rope_scaling"] = RopeScaling(**{o: rope[t] for o, t in ROPE_FIELDS.items()})
    except KeyError as missing:
        raise ValueError(f"{path} lacks {missing}.") from None
    return LlamaConfig(**fields)


def read_quantization(directory: Path) -> tuple[str, DType] | None:
    """Reads how the weights of a directory are quantised.

    Args:
        directory: Holds `config.json`.

    Returns:
        The name of the codec, as in `memopt.quantize_params`, and the type of the parameters it
        decodes to; None if they are arrays of numbers.

    Raises:
        ValueError: They are quantised by something else than memopt.

    """
    return _read_quantization(directory / CONFIG, _read_json(directory / CONFIG))


def _read_quantization(path: Path, raw: Mapping[str, Any]) -> tuple[str, DType] | None:
    given = raw.get("quantization_config")
    if given is None:
        return None
    try:
        known = (given["quant_method"], given["codec"], given["dtype"])
    except (TypeError, KeyError):
        known = None, None, None
    method, codec, dtype = known
    if method != QUANTIZED or codec not in SIDE_DATA or dtype not in STORED.values():
        raise ValueError(
            f"{path}: quantization_config is {given!r}; only memopt's own is supported, with "
            f"one of the codecs {', '.join(SIDE_DATA)}."
        )
    return codec, cast(DType, dtype)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return content


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
    for path in _weight_files(directory):
        try:
            file = safe_open(path, framework="np")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}.") from None
        names = file.keys()  # not a mapping: it has no iterator of its own
        found |= {name: file.get_slice(name) for name in names}
    return found


def _weight_files(directory: Path) -> list[Path]:
    paths = [directory / WEIGHTS]
    if (index := directory / INDEX).is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        paths = [directory / Path(name).name for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing and any(directory.glob("*.bin")):
        raise ValueError(
            f"{directory} holds pickled *.bin weights, which are never loaded; save the model as "
            "safetensors first."
        )
    if missing or not paths:
        raise ValueError(f"{directory} lacks {', '.join(missing) or 'any weights'}.")
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
        check_choice(f"{directory}: tensor {name}: type", tensor.get_dtype(), STORED)
    kinds = {STORED[tensor.get_dtype()] for tensor in stored.values()}
    return cast(DType, jnp.result_type(*kinds).name)


def check_params(directory: Path, stored: Mapping[str, Any], shapes: dict[str, Any]) -> None:
    """Raises what `read_params` would raise of these arguments, without reading any tensor."""
    _check_tensors(directory, stored, list(tensors(flatten_dict(split_parts(shapes), sep="/"))))


def _check_tensors(directory: Path, stored: Mapping[str, Any], expected: list[Tensor]) -> None:
    """Refuses missing, unexpected and misshapen tensors."""
    known = {tensor.name for tensor in expected}
    if missing := sorted(known - stored.keys()):
        raise ValueError(f"{directory} lacks {_enumerate(missing)}.")
    # Older exports carry buffers, and those of a tied model a copy of its head.
    others = stored.keys() - known - {TENSORS["head/kernel"]}
    if unexpected := sorted(name for name in others if not name.endswith("rotary_emb.inv_freq")):
        raise ValueError(f"{directory} has unexpected {_enumerate(unexpected)}.")
    for tensor in expected:
        if (shape := tuple(stored[tensor.name].get_shape())) != tensor.shape:
            raise ValueError(
                f"{directory}: tensor {tensor.name} has shape {shape}, but {CONFIG} makes it "
                f"{tensor.shape}."
            )
        given = stored[tensor.name].get_dtype()
        if tensor.dtype and given != PART_DTYPES[tensor.dtype]:
            raise ValueError(
                f"{directory}: tensor {tensor.name} has type {given}, but {CONFIG} makes it "
                f"{PART_DTYPES[tensor.dtype]}."
            )


def _enumerate(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor {', '.join(names[:3])}{more}"


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
    expected = list(tensors(flat))
    _check_tensors(directory, stored, expected)

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
) -> None:
    """Write `config.json` and safetensors to a directory, all or nothing.

    Everything is written to a neighbour, which then takes the directory's place. Other files of an
    earlier export, such as a tokenizer, are kept.

    Args:
        directory: New, empty, or an earlier export.
        config: The model's configuration.
        params: Nested dict of arrays or quantised parameters.
        max_shard_bytes: Size at which a new file is begun.
        quantized: The codec whose arrays are written as they are; None: numbers are written.
        dtype: Type to write numbers in; None: their own.
        files: Further files by name.

    Raises:
        ValueError: If the directory holds something that is not a model.

    """
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
        flat = flatten_dict(split_parts(params) if quantized else params, sep="/")
        _write_weights(staged, flat, max_shard_bytes, dtype)
        content = _config_json(dataclasses.replace(config, param_dtype=dtype or config.param_dtype))
        if quantized:
            decoded = {"codec": quantized, "dtype": config.param_dtype}
            content["quantization_config"] = {"quant_method": QUANTIZED, **decoded}
        (staged / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        for name, data in (files or {}).items():
            (staged / name).write_bytes(data)
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
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _config_json(config: LlamaConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    stretch = {theirs: getattr(scaling, ours, None) for ours, theirs in ROPE_FIELDS.items()}
    return {
        **PLAIN_LLAMA,
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
        "rope_scaling": {"rope_type": "llama3", **stretch} if scaling else None,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": config.param_dtype,
    }
