"""Kinds of parameters by their names, in the libraries that models come from."""

import functools
import re
from collections.abc import Sequence
from fnmatch import translate
from typing import NamedTuple

MATRIX, EMBEDDING, POSITION = "matrix", "embedding", "position"
ROUTER, HEAD, VECTOR = "router", "head", "vector"


class Entry(NamedTuple):
    """A parameter as it is read.

    Attributes:
      name: its keys joined by ``/``.
      shape: of the array.
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
        "position": "pos_emb* posembed*",
        "head": "head *_head logitdense",
        "outer head": "output_layer",
        "query": "query",
        "key and value": "key value",
        "output": "out",
    },
    "memopt": {"query": "q", "key and value": "k v", "output": "o"},
    "Tunix": {
        "norm": "*layernorm",
        "embedding": "embedder *_embedder",
        "router": "router",
        "query": "q_proj q_einsum",
        "key and value": "k_proj v_proj kv_einsum qkv_einsum",
        "output": "o_proj attn_vec_einsum",
    },
    "MaxText": {
        "vector": "*_scale *_bias *_beta sinks hc_base tid2eid a_log",
        "position": "position_embedder",
        "router": "shared_expert_gate",
        "head": "logits_dense",
    },
    "Levanter": {"norm": "norm", "embedding": "embeddings *_embeddings"},
    "Equinox": {
        "position": "pos",
        "embedding": "emb *_emb",
        "head": "unembed* logits *_logits",
        "query": "query_proj",
        "key and value": "key_proj value_proj",
        "output": "output_proj",
    },
    "Haiku": {"vector": "offset", "output": "linear"},
    "Keras": {"norm": "*_normalization", "vector": "gamma beta", "output": "attention_output"},
    "Meta": {"outer head": "output", "query": "wq", "key and value": "wk wv", "output": "wo"},
    "Hugging Face": {
        "norm": "ln ln_* layernorm_*",
        "embedding": "embed_tokens wte",
        "position": "wpe embed_positions *position_embedding* relative_attention_bias",
        "head": "classifier",
        "outer head": "score",
        "key and value": "qkv",
        "output": "out_proj",
    },
}
"""Patterns of names by library and kind, for parts of a path after `words`.

"vector" is matched with the last part of a path, "norm" and "router" with the last two, "position",
"head" and "embedding" with the last three. An "outer head" is a head only at the top of a model.
"query", "key and value" and "output" are the parts of an attention module.
"""

_NOT_A_HEAD = re.compile("(.*_)?(multi|per|each|num|attention|attn|q|k|v|kv|query|key|value)_head")
_AROUND_ALL = {"params", "model", "module", "net", "network", "decoder", "transformer"}


@functools.cache
def _pattern(kind: str) -> re.Pattern[str]:
    patterns = [p for names in LIBRARIES.values() for p in names.get(kind, "").split()]
    return re.compile("|".join(translate(p) for p in dict.fromkeys(patterns)))


@functools.cache
def words(part: str) -> str:
    """A part of a path in snake case, without the number at its end.

    Example:
      >>> words("LayerNorm_0"), words("wi_1"), words("_key_norm"), words("norm1")
      ('layer_norm', 'wi', 'key_norm', 'norm')
    """
    return re.sub(r"_?\d+$", "", snake_case(part)).strip("_")


def snake_case(name: str) -> str:
    """A name in camel case as words joined by underscores.

    Example:
      >>> snake_case("ScaleByAdam"), snake_case("ScaleBySM3")
      ('scale_by_adam', 'scale_by_sm3')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def is_called(kind: str, part: str) -> bool:
    """Whether a part of a path matches a pattern of this kind in any library."""
    return bool(_pattern(kind).fullmatch(words(part)))


@functools.cache
def kind_of(name: str) -> tuple[str, str] | None:
    """The kind that a parameter's name implies, and the part of the name that implies it.

    Args:
      name: its keys joined by ``/``.

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
    for part in parts[-2:]:
        if is_called("norm", part):
            return "vector", part
    for part in parts[-2:]:
        if is_called("router", part):
            return "router", part
    for kind in ("position", "head", "embedding"):
        for part in parts[-3:]:
            if is_called(kind, part) and not _NOT_A_HEAD.fullmatch(words(part)):
                return kind, part
    top = [part for part in parts if words(part) not in _AROUND_ALL][:1]
    if top and is_called("outer head", top[0]) and top[0] in parts[-3:]:
        return "head", top[0]
    return None


def attention_part(name: str) -> tuple[str, str, str] | None:
    """The part of an attention module that a parameter belongs to.

    Returns:
      The name with a ``*`` in place of the part; "query", "key and value" or "output"; and the
      part. None if no part of the name matches.

    Example:
      >>> attention_part("layers/attn/q_proj/kernel")
      ('layers/attn/*/kernel', 'query', 'q_proj')
    """
    parts = name.split("/")
    for i in range(len(parts) - 1, max(len(parts) - 3, -1), -1):
        for kind in ("query", "key and value", "output"):
            if is_called(kind, parts[i]):
                return "/".join([*parts[:i], "*", *parts[i + 1 :]]), kind, parts[i]
    return None


def kinds_of(entries: Sequence[Entry]) -> dict[str, tuple[str, str]]:
    """Kinds of parameters by their names and by the tree around them, each with its reason."""
    found = {}
    names = {e.name for e in entries}
    for e in entries:
        said = kind_of(e.name)
        module, _, last = e.name.rpartition("/")
        if said:
            found[e.name] = (said[0], f"{said[1]!r} in its name")
        elif last == "b" and module and f"{module}/a" not in names:
            found[e.name] = (VECTOR, "'b' in a module is a bias")
        elif (around := re.match("(.*)/gate(/|$)", e.name)) and _has_experts(around[1], names):
            found[e.name] = (ROUTER, "'gate' beside experts")
        elif e.axes and "vocab" in e.axes:
            kind = EMBEDDING if e.axes[0] == "vocab" else HEAD
            found[e.name] = (kind, "'vocab' in the axes of its box")
    embeddings = [e for e in entries if found.get(e.name, ("",))[0] == EMBEDDING]
    if len(embeddings) == 1 and HEAD not in {kind for kind, _ in found.values()}:
        # A head without a telling name is the only other matrix between width and vocabulary.
        embedding = embeddings[0].shape
        is_head = lambda e: e.shape == (embedding if e.name.endswith("weight") else embedding[::-1])
        others = [e for e in entries if e.name not in found and is_head(e)]
        if len(others) == 1 and len(embedding) == 2 and embedding[0] > embedding[1]:
            why = f"no other matrix has the sides of {embeddings[0].name!r}"
            found[others[0].name] = (HEAD, why)
    return found


def _has_experts(module: str, names: set[str]) -> bool:
    """Whether a module is a mixture of experts, by its own name or a name inside it."""
    inside = [name for name in names if name.startswith(f"{module}/")]
    return "moe" in words(module.rpartition("/")[2]) or any("expert" in name for name in inside)
