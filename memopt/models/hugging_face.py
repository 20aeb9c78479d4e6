"""LLaMA directories in Hugging Face's layout: `config.json` and safetensors, read and written.

Nothing is ever unpickled. Tensors are read one by one, only the part a device needs, straight into
the stacked arrays; Hugging Face stores linear weights `(out, in)`, our kernels are `(in, out)`.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from memopt.models.config import DType, LlamaConfig, RopeScaling

# Our leaf, their tensor ("{}" is the layer), and whether it is stored transposed.
TENSORS = {
    "embed/embedding": ("model.embed_tokens.weight", False),
    "blocks/attention_norm/scale": ("model.layers.{}.input_layernorm.weight", False),
    "blocks/attention/q/kernel": ("model.layers.{}.self_attn.q_proj.weight", True),
    "blocks/attention/k/kernel": ("model.layers.{}.self_attn.k_proj.weight", True),
    "blocks/attention/v/kernel": ("model.layers.{}.self_attn.v_proj.weight", True),
    "blocks/attention/o/kernel": ("model.layers.{}.self_attn.o_proj.weight", True),
    "blocks/mlp_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", False),
    "blocks/mlp/gate/kernel": ("model.layers.{}.mlp.gate_proj.weight", True),
    "blocks/mlp/up/kernel": ("model.layers.{}.mlp.up_proj.weight", True),
    "blocks/mlp/down/kernel": ("model.layers.{}.mlp.down_proj.weight", True),
    "final_norm/scale": ("model.norm.weight", False),
    "head/kernel": ("lm_head.weight", True),
}

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

# What we replace, or would contradict, when writing over an earlier export.
REPLACED = (CONFIG, "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")

STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Tensor(NamedTuple):
    """One tensor of a directory: its name there, and where its values live with us."""

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
    for leaf, (name, transposed) in TENSORS.items():
        if leaf not in shapes:
            continue
        shape = shapes[leaf].shape
        stacked = leaf.startswith("blocks/")
        shape, layers = (shape[1:], range(shape[0])) if stacked else (shape, [None])
        for layer in layers:
            yield Tensor(
                name.format(layer), leaf, layer, transposed, shape[:: -1 if transposed else 1]
            )


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
    raw = _read_json(path)
    _refuse_unsupported(path, raw)
    try:
        heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
        return LlamaConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=hidden,
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or hidden // heads,
            max_seq_len=raw.get("max_position_embeddings", 2048),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tied=raw.get("tie_word_embeddings", False),
            rope_theta=_rope(raw).get("rope_theta") or raw.get("rope_theta") or 10000.0,
            rope_scaling=_rope_scaling(path, _rope(raw)),
        )
    except KeyError as missing:
        raise ValueError(f"{path} lacks {missing}.") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return content


def _refuse_unsupported(path: Path, raw: Mapping[str, Any]) -> None:
    if (architectures := raw.get("architectures") or ["LlamaForCausalLM"]) != ["LlamaForCausalLM"]:
        raise ValueError(f"{path}: architectures {architectures}; only LlamaForCausalLM is known.")
    supported = {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "quantization_config": None,
    }
    for key, value in supported.items():
        if (given := raw.get(key, value)) != value:
            raise ValueError(f"{path}: {key} is {given!r}; only {value!r} is supported.")


def _rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Transformers 5 writes `rope_parameters`, transformers 4 `rope_scaling`."""
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def _rope_scaling(path: Path, rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{path}: rotary type {dict(rope)}; only default and llama3 are known.")
    if kind == "default":
        return None
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_seq_len=rope["original_max_position_embeddings"],
    )


class Reader:
    """The safetensors of a directory, opened but not read; a context manager.

    Args:
        directory: Holds `model.safetensors`, or an index and the files it names.

    Raises:
        ValueError: If there are none, only pickled weights, or a damaged file.

    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._files = ExitStack()
        self._tensors: dict[str, Any] = {}

    def __enter__(self) -> "Reader":
        from safetensors import SafetensorError, safe_open  # training needs none of it

        with ExitStack() as files:
            for path in self._paths():
                try:
                    file = files.enter_context(safe_open(path, framework="np"))
                except (OSError, SafetensorError) as error:
                    raise ValueError(f"{path} cannot be read as safetensors: {error}.") from None
                names = file.keys()  # not a mapping: it has no iterator of its own
                self._tensors.update((name, file.get_slice(name)) for name in names)
            self._files = files.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def _paths(self) -> list[Path]:
        if (index := self.directory / INDEX).is_file():
            names = sorted(set(_read_json(index).get("weight_map", {}).values()))
            paths = [self.directory / Path(name).name for name in names]
        else:
            paths = [self.directory / WEIGHTS]
        missing = [path.name for path in paths if not path.is_file()]
        if missing and any(self.directory.glob("*.bin")):
            raise ValueError(
                f"{self.directory} holds pickled *.bin weights, which are never loaded; save the "
                "model as safetensors first."
            )
        if missing or not paths:
            raise ValueError(f"{self.directory} lacks {', '.join(missing) or 'any weights'}.")
        return paths

    def dtype(self) -> DType:
        """The narrowest type that holds every tensor exactly."""
        kinds = {slice_.get_dtype(): name for name, slice_ in self._tensors.items()}
        for kind, name in kinds.items():
            if kind not in STORED:
                raise ValueError(
                    f"{self.directory}: tensor {name} is stored as {kind}; only "
                    f"{', '.join(STORED)} are supported."
                )
        return cast(DType, jnp.result_type(*(STORED[kind] for kind in kinds)).name)

    def check(self, expected: list[Tensor]) -> None:
        """Refuse missing, unexpected and misshapen tensors."""
        known = {tensor.name for tensor in expected}
        given = {name for name in self._tensors if not _ignored(name, known)}
        if missing := sorted(known - given):
            raise ValueError(f"{self.directory} lacks {_enumerate(missing)}.")
        if unexpected := sorted(given - known):
            raise ValueError(f"{self.directory} has unexpected {_enumerate(unexpected)}.")
        for tensor in expected:
            if (shape := tuple(self._tensors[tensor.name].get_shape())) != tensor.shape:
                raise ValueError(
                    f"{self.directory}: tensor {tensor.name} has shape {shape}, but {CONFIG} "
                    f"makes it {tensor.shape}."
                )

    def read(self, tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
        """The part of a tensor at `index`, counted along our axes."""
        stored = self._tensors[tensor.name]
        return stored[index[::-1]].T if tensor.transposed else stored[index]


def _ignored(name: str, known: set[str]) -> bool:
    """Buffers older exports carry, and the head's second copy in a tied model."""
    tied_copy = name == "lm_head.weight" and name not in known
    return name.endswith("rotary_emb.inv_freq") or tied_copy


def _enumerate(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor {', '.join(names[:3])}{more}"


def read_params(reader: Reader, shapes: dict[str, Any], shardings: dict[str, Any] | None) -> Any:
    """Parameters of an opened directory, each device reading only its own part.

    Args:
        reader: The opened directory.
        shapes: Nested dict of `jax.ShapeDtypeStruct`: what the model holds.
        shardings: Like `shapes`, of `NamedSharding`; None puts everything on the default device.

    Returns:
        Like `shapes`, of arrays.

    Raises:
        ValueError: If a tensor is missing, unexpected or of another shape.

    """
    flat = flatten_dict(shapes, sep="/")
    placed = flatten_dict(shardings, sep="/") if shardings else {}
    untranspose_tuples: dict[str, list[Tensor]] = {leaf: [] for leaf in flat}
    expected = list(tensors(flat))
    for tensor in expected:
        untranspose_tuples[tensor.leaf].append(tensor)
    reader.check(expected)

    def load(leaf: str) -> jax.Array:
        shape, dtype = flat[leaf].shape, flat[leaf].dtype

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            index = index or (slice(None),) * len(shape)
            parts = untranspose_tuples[leaf]
            if parts[0].layer is None:
                return reader.read(parts[0], index).astype(dtype)
            layers = parts[index[0]]
            sizes = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
            stack = np.empty(sizes, dtype)
            for row, tensor in zip(stack, layers, strict=True):
                row[...] = reader.read(tensor, index[1:])
            return stack

        if leaf in placed:
            return jax.make_array_from_callback(shape, placed[leaf], part, dtype=dtype)
        return jnp.asarray(part(None))

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
    if directory.exists() and (not directory.is_dir() or not _may_replace(directory)):
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


def _may_replace(directory: Path) -> bool:
    return (directory / CONFIG).is_file() or not any(directory.iterdir())


def _write_weights(directory: Path, params: Mapping[str, Any], max_shard_bytes: int) -> None:
    from safetensors.numpy import save_file

    shards: list[list[Tensor]] = [[]]
    filled = total = 0
    for tensor in tensors(params):
        size = int(np.prod(tensor.shape)) * params[tensor.leaf].dtype.itemsize
        total += size
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
        sharded = f"model-{number:05}-of-{len(shards):05}.safetensors"
        name = WEIGHTS if len(shards) == 1 else sharded
        content = {tensor.name: values(tensor) for tensor in shard}
        save_file(content, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(content, name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _config_json(config: LlamaConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": 0.02,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": config.param_dtype,
    }
