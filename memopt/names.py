"""Recognises the kinds of parameters by their names in model libraries."""

import functools
import re
from collections.abc import Sequence
from fnmatch import translate
from typing import NamedTuple

MATRIX, EMBEDDING, POSITION = "matrix", "embedding", "position"
ROUTER, HEAD, VECTOR = "router", "head", "vector"


class Entry(NamedTuple):
    """The name, shape and axis names of a parameter.

    Attributes:
        name: the parameter's keys joined by ``/``.
        shape: the shape of the array.
        axes: the names of its axes, if known.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...] | None


LIBRARIES: dict[str, dict[str, str]] = {
    "Flax": {
        "norm": "*_norm",
        "vector": "bias scale",
        "embedding": "embed embedding *_embed *_embedding",
        "patches": "patch_emb*",
        "position": "pos_emb* posembed* pos_enc*",
        "head": "head *_head logitdense",
        "outer head": "output_layer",
        "query": "query",
        "key": "key",
        "value": "value",
        "output": "out",
    },
    "memopt": {"query": "q", "key": "k", "value": "v", "output": "o"},
    "Tunix": {
        "norm": "*layernorm",
        "embedding": "embedder *_embedder",
        "router": "router",
        "query": "q_proj q_einsum",
        "key": "k_proj",
        "value": "v_proj",
        "key and value": "kv_einsum qkv_einsum",
        "output": "o_proj attn_vec_einsum",
    },
    "MaxText": {
        "vector": "*_scale *_bias *_beta sinks hc_base tid2eid a_log",
        "position": "position_embedder",
        "router": "shared_expert_gate",
        "head": "logits_dense",
    },
    "Kauldron": {"patches": "patchifier", "hidden": "pre_logits"},
    "Levanter": {"norm": "norm", "embedding": "embeddings *_embeddings"},
    "Equinox": {
        "position": "pos",
        "embedding": "emb *_emb",
        "head": "unembed* logits *_logits",
        "query": "query_proj",
        "key": "key_proj",
        "value": "value_proj",
        "output": "output_proj",
    },
    "Haiku": {"vector": "offset", "output": "linear"},
    "Keras": {"norm": "*_normalization", "vector": "gamma beta", "output": "attention_output"},
    "Meta": {"outer head": "output", "query": "wq", "key": "wk", "value": "wv", "output": "wo"},
    "Hugging Face": {
        "norm": "ln ln_* layernorm_*",
        "embedding": "embed_tokens wte",
        "outer embedding": "shared",
        "position": "wpe embed_positions *position_embedding* positional_enc* rel_pos rel_pos_? "
        "relative_attention_bias relative_position*",
        "head": "classifier",
        "outer head": "score",
        "query": "to_q",
        "key": "to_k",
        "value": "to_v",
        "key and value": "qkv kv",
        "output": "out_proj to_out",
    },
}
"""Patterns of names by library and kind, for parts of a path converted by `words`.

"vector" is matched with the last part of a path; "norm", "router" and "embedding" with the last
two; "position", "head" and "patches" with the last three; "outer head" and "outer embedding" with
the first. "patches" are embeddings too; "hidden" are matrices named like a head. "query", "key",
"value", "key and value" (in one array) and "output" are the parts of an attention module.
"""

ATTENTION_INPUTS = ("query", "key", "value", "key and value")
"""The parts of an attention module that read the module's input."""

_AROUND_ALL = {"params", "model", "module", "net", "network", "decoder", "transformer"}


@functools.cache
def _pattern(kind: str) -> re.Pattern[str]:
    patterns = [p for names in LIBRARIES.values() for p in names.get(kind, "").split()]
    return re.compile("|".join(translate(p) for p in dict.fromkeys(patterns)))


@functools.cache
def words(part: str) -> str:
    """Converts a part of a path to snake case, without the number at its end.

    Example:
        >>> words("LayerNorm_0"), words("wi_1"), words("_key_norm"), words("norm1")
        ('layer_norm', 'wi', 'key_norm', 'norm')
    """
    return re.sub(r"_?\d+$", "", snake_case(part)).strip("_")


def snake_case(name: str) -> str:
    """Converts a name from camel case to snake case.

    Example:
        >>> snake_case("ScaleByAdam"), snake_case("ScaleBySM3")
        ('scale_by_adam', 'scale_by_sm3')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def split_layer(name: str) -> tuple[str, int | None]:
    """Splits a parameter's name into the name without its layer's index, and the index.

    The index is a number after "layer", "block" or a similar word, as a part of its own or at the
    end of a part; otherwise the first part that is a number. Other numbers distinguish matrices of
    one layer and are kept. Below "layers", "blocks" or "h" without a number, layers are stacked.

    Returns:
        The name that the parameter has if layers are stacked, and the index of the layer, None if
        the name has none.

    Example:
        >>> split_layer("llama3/layers/12/up/kernel"), split_layer("Block_3/Dense_1/kernel")
        (('llama3/layers/up/kernel', 12), ('Block/Dense_1/kernel', 3))
        >>> split_layer("h/0/w1"), split_layer("stages/2/blocks/5/mlp/layers/1/weight")
        (('h/w1', 0), ('stages/2/blocks/mlp/layers/1/weight', 5))
        >>> split_layer("Dense_1/kernel"), split_layer("blocks/mlp/layers/1/weight")
        (('Dense_1/kernel', None), ('blocks/mlp/layers/1/weight', None))
    """
    parts = name.split("/")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    first = numbers[0] if numbers else len(parts)
    for i, part in enumerate(parts):
        numbered = _NUMBERED.fullmatch(part)
        if numbered and _counts_layers(numbered[1]) and i < first:
            return "/".join([*parts[:i], numbered[1], *parts[i + 1 :]]), int(numbered[2])
        if i in numbers and i and _counts_layers(parts[i - 1]):
            return "/".join([*parts[:i], *parts[i + 1 :]]), int(part)
        if part in ("layers", "blocks", "h") and i + 1 < min(first, len(parts) - 1):
            return name, None
    rest = "/".join([*parts[:first], *parts[first + 1 :]])
    return (rest, int(parts[first])) if numbers and rest else (name, None)


_NUMBERED = re.compile(r"(.*[^\d_])_?(\d+)")


def _counts_layers(part: str) -> bool:
    return snake_case(part).endswith(("layer", "layers", "block", "blocks")) or part == "h"


def is_called(kind: str, part: str) -> bool:
    """Whether a part of a path matches a pattern of this kind in any library."""
    return bool(_pattern(kind).fullmatch(words(part)))


@functools.cache
def kind_of(name: str) -> tuple[str, str] | None:
    """Returns the kind that a parameter's name implies, and the part of the name that implies it.

    Args:
        name: the parameter's keys joined by ``/``.

    Returns:
        "vector" (norms, biases, scales), "embedding", "position", "router" or "head", and the part
        of the name; None if no part matches.

    Example:
        >>> kind_of("decoder/logits_dense/kernel"), kind_of("prenorm_attention/q/kernel")
        (('head', 'logits_dense'), None)
        >>> kind_of("layers/0/attention/output/dense/kernel"), kind_of("output/weight")
        (None, ('head', 'output'))
    """
    parts = [part for part in name.split("/") if not part.isdecimal()]
    for part in parts[-1:]:
        if is_called("vector", part):
            return "vector", part
    for part in () if parts[-1:] == ["kernel"] else parts[-2:]:
        if is_called("norm", part):
            return "vector", part
    is_attention = re.search("attention|multi_?head", name.lower()) or attention_part(name)
    is_hidden = is_attention or any(is_called("hidden", part) for part in parts[-3:])
    for kind, among in {
        "router": 2,
        "position": 3,
        "head": 3,
        "embedding": 2,
        "patches": 3,
    }.items():
        for part in parts[-among:]:
            if is_called(kind, part) and not (kind == "head" and is_hidden):
                return "embedding" if kind == "patches" else kind, part
    top = [part for part in parts if words(part) not in _AROUND_ALL]
    for kind in ("head", "embedding"):
        if len(top) in (1, 2) and is_called(f"outer {kind}", top[0]):
            return kind, top[0]
    return None


def attention_part(name: str) -> tuple[str, str, str] | None:
    """Returns the part of an attention module that a parameter belongs to.

    Returns:
        The name with a ``*`` in place of the part; "query", "key", "value", "key and value" or
        "output"; and the part. None if no part of the name matches.

    Example:
        >>> attention_part("layers/attn/q_proj/kernel")
        ('layers/attn/*/kernel', 'query', 'q_proj')
    """
    parts = name.split("/")
    for i in range(len(parts) - 1, max(len(parts) - 3, -1), -1):
        for kind in (*ATTENTION_INPUTS, "output"):
            if is_called(kind, parts[i]):
                return "/".join([*parts[:i], "*", *parts[i + 1 :]]), kind, parts[i]
    return None


def kinds_of(entries: Sequence[Entry]) -> dict[str, tuple[str, str]]:
    """Finds the kinds of parameters from their names and the other names, each with its reason."""
    found = {}
    names = {e.name for e in entries}
    for e in entries:
        named = kind_of(e.name)
        module, _, last = e.name.rpartition("/")
        if named:
            found[e.name] = (named[0], f"{named[1]!r} in its name")
        elif last == "b" and module and f"{module}/a" not in names:
            found[e.name] = (VECTOR, "'b' in a module is a bias")
        elif (around := re.match("(.*/|)gate(/|$)", e.name)) and _routes(around[1], names):
            found[e.name] = (ROUTER, "'gate' next to experts")
        elif e.axes and "vocab" in e.axes:
            kind = EMBEDDING if e.axes[0] == "vocab" else HEAD
            found[e.name] = (kind, "'vocab' in the axes of its box")
    if HEAD not in {kind for kind, _ in found.values()}:
        # If no name identifies the head, it is the only other matrix between width and vocabulary.
        for embedding in [e for e in entries if found.get(e.name, ("",))[0] == EMBEDDING]:
            sides = embedding.shape
            fits = lambda e, s=sides: e.shape == (s if e.name.endswith("weight") else s[::-1])
            others = [e for e in entries if e.name not in found and fits(e)]
            if len(others) == 1 and len(sides) == 2 and sides[0] > sides[1]:
                why = f"it is the only other matrix with the sides of {embedding.name!r}"
                found[others[0].name] = (HEAD, why)
    return found


def _routes(prefix: str, names: set[str]) -> bool:
    """Whether the gate of a module is a router next to experts, rather than an MLP's kernel."""
    beside = {name.removeprefix(prefix).split("/")[0] for name in names if name.startswith(prefix)}
    if beside & {"up", "down", "up_proj", "down_proj", "router"}:
        return False
    own = words(prefix.rstrip("/").rpartition("/")[2])
    return "moe" in own or any("expert" in part for part in beside)
