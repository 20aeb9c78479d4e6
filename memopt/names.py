"""What the names of parameters say they are, in the libraries people bring models from."""

import functools
import re
from fnmatch import translate

LIBRARIES: dict[str, dict[str, str]] = {
    "Flax": {
        "norm": "*_norm *_norm_? layer_norm batch_norm group_norm rms_norm instance_norm",
        "vector": "bias scale",
        "embedding": "embed embedding embedder *_embed *_embedding *_embedder",
        "position": "pos_embed* pos_embedding* *_pos_embed *_pos_embedding posembed*",
        "head": "head lm_head *_head logits* *_logits logitdense",
        "outer head": "output_layer",
        "query": "query",
        "key and value": "key value qkv",
        "output": "out",
    },
    "memopt": {"head": "unembed*", "query": "q", "key and value": "k v", "output": "o"},
    "Tunix": {
        "norm": "*layernorm",
        "embedding": "input_embedding",
        "query": "q_proj q_einsum",
        "key and value": "k_proj v_proj kv_einsum qkv_einsum",
        "output": "o_proj attn_vec_einsum",
    },
    "MaxText": {
        "vector": "*_scale *_bias *_beta sinks hc_base tid2eid a_log dt_bias",
        "router": "shared_expert_gate",
        "head": "logits_dense",
    },
    "Levanter": {"norm": "norm", "embedding": "embeddings *_embeddings", "router": "router"},
    "Equinox": {
        "position": "pos pos_* position position_* positional_*",
        "embedding": "emb *_emb",
        "query": "query_proj",
        "key and value": "key_proj value_proj",
        "output": "output_proj",
    },
    "Haiku": {"vector": "offset", "output": "linear"},
    "Keras": {"norm": "*_normalization", "vector": "gamma beta", "output": "attention_output"},
    "Meta": {
        "norm": "attention_norm ffn_norm",
        "outer head": "output",
        "query": "wq",
        "key and value": "wk wv",
        "output": "wo",
    },
    "Hugging Face": {
        "norm": "ln ln_* *_ln norm?",
        "vector": "sink gain *_gain temperature *_temperature layer_scale *_layer_scale",
        "embedding": "embed_* *_embed_* wte shared",
        "position": "wpe *position_embedding* rel_pos* relative_* *_relative_*",
        "router": "*_router",
        "head": "classifier",
        "outer head": "score",
        "output": "out_proj",
    },
}
"""By library and kind the names it has, as they are after `words`; ``*`` and ``?`` match any.

A norm is what holds a parameter, or is one; a vector is the parameter itself. An embedding, a
position and a head may hold much; an outer head is one only where no layer is around it.
"""

_NOT_A_HEAD = re.compile(r".*(multi|per|each|attention|attn|num)_head")
_AROUND_ALL = {"params", "model", "module", "net", "network", "decoder", "transformer"}


@functools.cache
def _pattern(kind: str) -> re.Pattern[str]:
    patterns = [p for names in LIBRARIES.values() for p in names.get(kind, "").split()]
    return re.compile("|".join(translate(p) for p in dict.fromkeys(patterns)))


@functools.cache
def words(part: str) -> str:
    """A part of a path as lower-case words, less the number that counts it.

    Example:
      >>> words("LayerNorm_0"), words("wi_1"), words("_key_norm"), words("norm1")
      ('layer_norm', 'wi', 'key_norm', 'norm')
    """
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", part).lower()
    return re.sub(r"_?\d+$", "", text).strip("_")


def is_called(kind: str, part: str) -> bool:
    """Whether a part of a path is a name of this kind in any library."""
    return bool(_pattern(kind).fullmatch(words(part)))


@functools.cache
def kind_of(name: str) -> tuple[str, str] | None:
    """What a parameter's name says it is, and which part of the name says so.

    Args:
      name: its keys joined by ``/``.

    Returns:
      "vector" (norms, biases, scales), "embedding", "position", "router" or "head", and the part
      of the name; None if it says nothing.

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
        for part in parts:
            if is_called(kind, part) and not _NOT_A_HEAD.fullmatch(words(part)):
                return kind, part
    for i, part in enumerate(parts[:-1] or parts):
        if is_called("outer head", part) and all(words(p) in _AROUND_ALL for p in parts[:i]):
            return "head", part
    return None


def attention_part(name: str) -> tuple[str, str, str] | None:
    """Where in an attention module a parameter is.

    Returns:
      The name around the part that says so, with a ``*`` in its place; "query", "key and value"
      or "output"; and that part. None if no part says so.

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
