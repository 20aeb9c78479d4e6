"""LLaMA directories in Hugging Face's layout: `config.json` and safetensors, read and written.

Nothing is ever unpickled. Tensors are read one by one, only the part a device needs, straight into
the stacked arrays; Hugging Face stores linear weights `(out, in)`, our kernels are `(in, out)`.
"""

import dataclasses
import json
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
from memopt.models.config import DType, LlamaConfig, RopeScaling

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
    for key, value in {**PLAIN_LLAMA, "quantization_config": None}.items():
        if (given := raw.get(key, value)) != value:
            raise ValueError(f"{path}: {key} is {given!r}; only {value!r} is supported.")
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


def _enumerate(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor {', '.join(names[:3])}{more}"


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
    expected = list(tensors(flat))
    _check_tensors(directory, stored, expected)

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
    """Write `config.json` and safetensors to a directory, all or nothing.

    Everything is written to a neighbour, which then takes the directory's place. Other files of an
    earlier export, such as a tokenizer, are kept.

    Args:
        directory: New, empty, or an earlier export.
        config: The model's configuration.
        params: Nested dict of arrays.
        max_shard_bytes: Size at which a new file is begun.

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
        _write_weights(staged, flatten_dict(params, sep="/"), max_shard_bytes)
        (staged / CONFIG).write_text(json.dumps(_config_json(config), indent=2) + "\n")
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
