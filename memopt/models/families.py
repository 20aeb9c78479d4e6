"""`config.json` of the Hugging Face families that one model computes, read and written.

A family is a LLaMA but for a few options of `LlamaConfig`. A key that a file lacks has the value
that transformers gives it, which differs between families.
"""

import math
import reprlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from memopt.models.config import AttentionBias, LlamaConfig, RopeScaling


class Family(NamedTuple):
    """The models of one `model_type`.

    Attributes:
        architecture: Their class in transformers.
        biases: The values of `LlamaConfig.attention_bias` they can have.
        windows: Whether they can have a sliding window.
        fixed: Fields of `LlamaConfig` that are always true.
        defaults: Values of absent keys, from the configuration class of transformers 5.

    """

    architecture: str
    biases: tuple[AttentionBias, ...]
    windows: bool
    fixed: frozenset[str]
    defaults: Mapping[str, Any]


DEFAULTS = {
    "num_key_value_heads": None,  # as many as query heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "sliding_window": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_WINDOWS = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
_QWEN = DEFAULTS | _WINDOWS | {"num_key_value_heads": 32, "max_position_embeddings": 32768}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        biases=("none", "qkvo"),
        windows=False,
        fixed=frozenset(),
        defaults=DEFAULTS | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        biases=("none",),
        windows=True,
        fixed=frozenset(),
        defaults=DEFAULTS
        | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", biases=("qkv",), windows=True, fixed=frozenset(), defaults=_QWEN
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        biases=("none", "qkvo"),
        windows=True,
        fixed=frozenset({"qk_norm"}),
        defaults=_QWEN | {"head_dim": 128},
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        biases=("none", "qkvo"),
        windows=False,
        fixed=frozenset({"norm_offset", "scale_embedding"}),
        defaults=DEFAULTS
        | {"num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192}
        | {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}
        | {"bos_token_id": 2, "eos_token_id": 1},
    ),
}
TRAITS = frozenset().union(*(family.fixed for family in FAMILIES.values()))

Kind = tuple[str, Callable[[Any], bool]]
INTEGER: Kind = ("a whole number from 1 to 2147483647", lambda x: type(x) is int and 0 < x < 2**31)
NUMBER: Kind = (
    "a positive number",
    lambda x: type(x) in (int, float) and 0 < x <= sys.float_info.max,
)
FLAG: Kind = ("true or false", lambda x: type(x) is bool)
OBJECT: Kind = ("an object", lambda x: type(x) is dict)
LIST: Kind = ("a list", lambda x: type(x) is list)

# Our field, their key, and what it holds.
FIELDS = {
    "vocab_size": ("vocab_size", INTEGER),
    "hidden_size": ("hidden_size", INTEGER),
    "intermediate_size": ("intermediate_size", INTEGER),
    "num_layers": ("num_hidden_layers", INTEGER),
    "num_heads": ("num_attention_heads", INTEGER),
    "num_kv_heads": ("num_key_value_heads", INTEGER),
    "head_dim": ("head_dim", INTEGER),
    "max_seq_len": ("max_position_embeddings", INTEGER),
    "rope_theta": ("rope_theta", NUMBER),
    "norm_eps": ("rms_norm_eps", NUMBER),
    "tied": ("tie_word_embeddings", FLAG),
}
# Our activation and their names of it, of which the first is written.
ACTIVATIONS = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",)}
# Refused where a file says otherwise.
ONLY = {
    "quantization_config": None,
    "mlp_bias": False,
    "use_bidirectional_attention": False,
    "partial_rotary_factor": 1.0,
}
ORIGINAL = "original_max_position_embeddings"
MSCALE = ("mscale", "mscale_all_dim")  # two scales, whose ratio is yarn's attention factor
# Their keys by `rope_type`: those a file must have, and those it may have.
ROPE: dict[str, tuple[dict[str, Kind], dict[str, Kind]]] = {
    "linear": ({"factor": NUMBER}, {}),
    "dynamic": ({"factor": NUMBER}, {}),
    "llama3": (
        {"factor": NUMBER, "low_freq_factor": NUMBER, "high_freq_factor": NUMBER}
        | {ORIGINAL: INTEGER},
        {},
    ),
    "yarn": (
        {"factor": NUMBER, ORIGINAL: INTEGER},
        {"attention_factor": NUMBER, "beta_fast": NUMBER, "beta_slow": NUMBER, "truncate": FLAG}
        | dict.fromkeys(MSCALE, NUMBER),
    ),
}
RENAMED = {ORIGINAL: "original_max_seq_len"}


class _Keys:
    """The keys of a JSON object, checked as they are taken."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path = path
        self.values = dict(values)

    def take(self, key: str, kind: Kind, default: Any = None) -> Any:
        """The value, or `default` where it is absent or null; None makes the key necessary."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{self.path} lacks {key!r}.")
        name, accepts = kind
        if not accepts(value):
            raise ValueError(f"{self.path}: {key} is {reprlib.repr(value)}; it must be {name}.")
        return float(value) if kind is NUMBER else value

    def refuse(self, key: str, supported: str) -> ValueError:
        """The error for a value that no `LlamaConfig` has."""
        given = reprlib.repr(self.values.get(key))
        return ValueError(f"{self.path}: {key} is {given}; only {supported} is supported.")


def parse_config(path: Path, raw: Mapping[str, Any]) -> LlamaConfig:
    """The configuration that a `config.json` describes, float32 throughout.

    Args:
        path: The file, named in errors.
        raw: Its content, of transformers 4 or 5.

    Returns:
        The configuration.

    Raises:
        ValueError: If a value is missing, of another type or out of range, or if the file
            describes a model that `LlamaConfig` does not.

    Example:
        >>> sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
        >>> sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        >>> config = parse_config(Path("config.json"), {"model_type": "qwen3"} | sizes)
        >>> config.qk_norm, config.head_dim, config.max_seq_len
        (True, 128, 32768)

    """
    name, family = _family(_Keys(path, raw))
    # Null stands for the default, except where null is a value of its own.
    nullable = [key for key, value in DEFAULTS.items() if value is None]
    given = {key: value for key, value in raw.items() if value is not None or key in nullable}
    keys = _Keys(path, {**family.defaults, **given})
    # Transformers 5 writes `rope_parameters`, 4 `rope_scaling`, which 5 prefers where both are.
    rope = keys.take("rope_scaling", OBJECT, {}) or keys.take("rope_parameters", OBJECT, {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if rope.get(key) is not None:
            keys.values[key] = rope[key]
    for key, value in ONLY.items():
        if keys.values.get(key, value) != value:
            raise keys.refuse(key, repr(value))
    heads = keys.take("num_attention_heads", INTEGER)
    computed = {
        "num_key_value_heads": heads,
        "head_dim": max(1, keys.take("hidden_size", INTEGER) // heads),
    }
    fields = {ours: keys.take(key, kind, computed.get(key)) for ours, (key, kind) in FIELDS.items()}
    biased = keys.take("attention_bias", FLAG) and "qkvo" in family.biases
    options: dict[str, Any] = {
        **dict.fromkeys(family.fixed, True),
        "activation": _activation(keys, name),
        "attention_bias": "qkvo" if biased else family.biases[0],
        "sliding_window": _sliding_window(keys) if family.windows else None,
        **token_ids(path, keys.values),
    }
    try:
        return LlamaConfig(**fields, **options, rope_scaling=_rope_scaling(rope, keys))
    except ValueError as error:
        prefix = "" if str(error).startswith(str(path)) else f"{path}: "
        raise ValueError(f"{prefix}{error}") from None


def _family(keys: _Keys) -> tuple[str, Family]:
    name = keys.values.get("model_type") or "llama"
    if not isinstance(name, str) or name not in FAMILIES:
        raise keys.refuse("model_type", f"one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    if keys.values.get("architectures", [family.architecture]) != [family.architecture]:
        raise keys.refuse("architectures", str([family.architecture]))
    return name, family


def _activation(keys: _Keys, model_type: str) -> str:
    name = keys.values["hidden_act"]
    if (model_type, name) == ("gemma", "gelu"):
        return "gelu_tanh"  # what the first Gemma's files mean by it
    for ours, theirs in ACTIVATIONS.items():
        if name in theirs:
            return ours
    names = [name for theirs in ACTIVATIONS.values() for name in theirs]
    raise keys.refuse("hidden_act", f"one of {', '.join(names)}")


def _sliding_window(keys: _Keys) -> int | None:
    if keys.values["sliding_window"] is None or not keys.take("use_sliding_window", FLAG, True):
        return None
    size, layers = keys.take("sliding_window", INTEGER), keys.take("num_hidden_layers", INTEGER)
    if "max_window_layers" not in keys.values:
        return size
    # Qwen's layers have their types in a list, or windows from one layer on.
    types = keys.take("layer_types", LIST, [])
    first = keys.values["max_window_layers"]
    if not types and not (type(first) is int and first >= 0):
        raise keys.refuse("max_window_layers", "a whole number")
    count = types.count("sliding_attention") if types else max(0, layers - first)
    if count not in (0, layers):
        raise ValueError(
            f"{keys.path}: {count} of {layers} layers have a sliding window; only all or none is "
            "supported."
        )
    return size if count else None


def _rope_scaling(rope: Mapping[str, Any], keys: _Keys) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in ROPE:
        raise _Keys(keys.path, {"rope_type": kind}).refuse(
            "rope_type", f"one of default, {', '.join(ROPE)}"
        )
    # In transformers a length beside the object precedes the one in it.
    length = keys.values.get("original_max_position_embeddings")
    parameters = _Keys(
        keys.path, {**rope, ORIGINAL: rope.get(ORIGINAL) if length is None else length}
    )
    computed = {ORIGINAL: keys.values["max_position_embeddings"]}
    necessary, optional = ROPE[kind]
    kinds = necessary | {key: k for key, k in optional.items() if rope.get(key) is not None}
    fields = {key: parameters.take(key, k, computed.get(key)) for key, k in kinds.items()}
    if "mscale" in fields and "mscale_all_dim" in fields:
        ratio = [0.1 * fields[key] * math.log(max(1.0, fields["factor"])) + 1 for key in MSCALE]
        fields.setdefault("attention_factor", ratio[0] / ratio[1])
    fields = {RENAMED.get(key, key): x for key, x in fields.items() if key not in MSCALE}
    return RopeScaling(kind=kind, **fields)  # type: ignore[arg-type]


def token_ids(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens that a `config.json` or `generation_config.json` names.

    Args:
        path: The file, named in errors.
        values: Its content.

    Returns:
        `bos_id` and `eos_ids` of `LlamaConfig`, as far as the file has their keys.

    Raises:
        ValueError: If one is no id.

    Example:
        >>> token_ids(Path("config.json"), {"bos_token_id": 1, "eos_token_id": [2, 5]})
        {'bos_id': 1, 'eos_ids': (2, 5)}

    """
    found: dict[str, Any] = {}
    for key in {"bos_token_id", "eos_token_id"} & values.keys():
        value = values[key]
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(x) is int and 0 <= x < 2**31 for x in ids):
            raise ValueError(
                f"{path}: {key} is {reprlib.repr(value)}; it must be the id of a token, or a list "
                "of them."
            )
        if key == "bos_token_id":
            found["bos_id"] = ids[0] if ids else None
        else:
            found["eos_ids"] = tuple(ids)
    return dict(sorted(found.items()))


def token_keys(config: LlamaConfig) -> dict[str, Any]:
    """Inverse of `token_ids`.

    Example:
        >>> from memopt.models.config import preset
        >>> token_keys(preset("tiny"))
        {'bos_token_id': None, 'eos_token_id': None}

    """
    ends = list(config.eos_ids)
    return {
        "bos_token_id": config.bos_id,
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
    }


def config_json(config: LlamaConfig) -> dict[str, Any]:
    """The content of `config.json`, inverse of `parse_config`.

    It is that of the first family that has the configuration's options: a Mistral without a window
    is a LLaMA.

    Args:
        config: The configuration.

    Returns:
        Values for JSON.

    Raises:
        ValueError: If no family has this combination of options.

    Example:
        >>> from memopt.models.config import preset
        >>> config_json(preset("llama-3-8b"))["architectures"]
        ['LlamaForCausalLM']

    """

    def holds(family: Family) -> bool:
        same = all(getattr(config, trait) == (trait in family.fixed) for trait in TRAITS)
        window = family.windows or config.sliding_window is None
        return same and window and config.attention_bias in family.biases

    name = next((name for name, family in FAMILIES.items() if holds(family)), None)
    if name is None:
        options = [*sorted(TRAITS), "attention_bias", "sliding_window"]
        given = ", ".join(f"{option}={getattr(config, option)!r}" for option in options)
        raise ValueError(f"No Hugging Face family of {', '.join(FAMILIES)} has {given}.")
    family = FAMILIES[name]
    keys: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": name,
        **{key: getattr(config, ours) for ours, (key, _) in FIELDS.items()},
        "hidden_act": ACTIVATIONS[config.activation][0],
        "rope_scaling": _rope_json(config.rope_scaling),
        **token_keys(config),
        "torch_dtype": config.param_dtype,
    }
    if "qkvo" in family.biases:
        keys["attention_bias"] = config.attention_bias == "qkvo"
    if family.windows:
        keys["sliding_window"] = config.sliding_window
    if "max_window_layers" in family.defaults:
        keys["use_sliding_window"] = config.sliding_window is not None
        keys["max_window_layers"] = 0 if keys["use_sliding_window"] else config.num_layers
    return keys


def _rope_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    names = [key for keys in ROPE[scaling.kind] for key in keys if key not in MSCALE]
    values = {key: getattr(scaling, RENAMED.get(key, key)) for key in names}
    return {"rope_type": scaling.kind} | {k: v for k, v in values.items() if v is not None}
