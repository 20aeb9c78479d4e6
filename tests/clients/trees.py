"""Small parameter trees as other people's libraries make them: their names, axes and boxes.

A line of a table says of one parameter which axes it has, each by a letter whose length `SIZES`
gives, what it is, and which names its box gives to its axes. ``d h e`` that is ``d -> h e`` takes
vectors of d numbers to h heads of e: rows d, columns h and e; axes not named are the stack. What
is no hidden matrix is one of `OTHERS`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import memopt
from memopt.trees import named_leaves, open_box

SIZES = {
    **{"V": 96, "d": 16, "f": 48, "p": 40, "L": 3, "X": 6},  # vocabulary, width, MLP, positions …
    **{"h": 4, "e": 8, "H": 32, "k": 2, "g": 2, "K": 16},  # heads, their width; those of keys
    **{"D": 16, "r": 4, "n": 5, "1": 1, "2": 2, "3": 3},
    **{"y": 3, "x": 3, "c": 8, "o": 24, "w": 4},  # convolutions: window, channels
    **{"q": 12, "l": 20},  # latent widths
}
OTHERS = {"embedding", "head", "position", "router", "vector"}


class Leaf(NamedTuple):
    """One parameter.

    Attributes:
      shape: its shape.
      what: the matrix it is, or one of `OTHERS`.
      axes: the names its box gives to its axes; None where it names none.
    """

    shape: tuple[int, ...]
    what: memopt.Matrix | str
    axes: tuple[str | None, ...] | None = None


def leaf(shape: str, what: str, axes: str | None = None) -> Leaf:
    """A line of a table; ``-`` is an axis that the box leaves without a name."""
    letters = shape.split()
    if "->" in what:
        rows, cols = (tuple(letters.index(a) for a in side.split()) for side in what.split("->"))
        what = memopt.Matrix(*(side if len(side) > 1 else side[0] for side in (rows, cols)))
    elif what not in OTHERS:
        raise ValueError(f"{what!r} is none of {OTHERS}")
    names = None if axes is None else tuple(None if a == "-" else a for a in axes.split())
    return Leaf(tuple(SIZES[a] for a in letters), what, names)


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of a `NamedArray`."""

    name: str
    size: int


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class NamedArray:
    """The interface of Haliax's NamedArray; unflattening a tree makes one without checks."""

    array: Any
    axes: tuple[Axis, ...]

    def __post_init__(self):
        shape = getattr(self.array, "shape", None)  # placeholders have none
        if shape is not None and shape != tuple(axis.size for axis in self.axes):
            raise ValueError(f"An array of shape {shape} does not have the axes {self.axes}.")

    def tree_flatten(self):
        return (self.array,), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        self = object.__new__(cls)
        object.__setattr__(self, "array", children[0])
        object.__setattr__(self, "axes", axes)
        return self


def named(array: Any, axes: tuple[str, ...]) -> NamedArray:
    """A `NamedArray` in Haliax's way."""
    return NamedArray(array, tuple(map(Axis, axes, array.shape)))


def variable(array: Any, axes: tuple[str | None, ...] | None) -> nnx.Param:
    """A parameter of Flax NNX; no mesh is asked for."""
    metadata = {} if axes is None else {"out_sharding": axes}
    return nnx.Param(array, eager_sharding=False, **metadata)


BOXES: dict[str, Callable[[Any, Any], Any]] = {
    "bare": lambda array, axes: array,
    "nnx": variable,
    "logical": lambda array, axes: array if axes is None else nn.LogicallyPartitioned(array, axes),
    "partitioned": lambda array, axes: array if axes is None else nn.Partitioned(array, axes),
    "haliax": named,
}


NAMES_OF_AXES: dict[str, Callable[[Any], Any]] = {
    "bare": lambda box: None,
    "nnx": lambda box: box.get_metadata().get("out_sharding"),
    "logical": lambda box: box.names if isinstance(box, nn.Partitioned) else None,
    "haliax": lambda box: tuple(axis.name for axis in box.axes),
}


class Client(NamedTuple):
    """The parameters of one library's model.

    Attributes:
      leaves: by name, a line each.
      box: what holds an array, one of `BOXES`.
      cut: how a name is cut into the keys of nested nodes: at every slash, at the last, or not.
      oriented: whether it can be seen which side of a matrix is its input: not where libraries
        that store (in, out) and those that store (out, in) give the same names.
    """

    leaves: dict[str, Leaf]
    box: str = "bare"
    cut: str = "every"
    oriented: bool = True

    def one_of_each(self) -> "Client":
        """The same with one leaf of each kind and each arrangement of axes."""
        first = {line.what: name for name, line in reversed(self.leaves.items())}
        return self._replace(leaves={name: self.leaves[name] for name in sorted(first.values())})

    def arrays(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Random numbers for every leaf."""
        normal = np.random.default_rng(seed).normal
        return {name: normal(size=x.shape).astype("float32") for name, x in self.leaves.items()}

    def params(self, seed: int = 0, boxed: bool = True) -> Any:
        """The tree, in the library's boxes or without."""
        box = BOXES[self.box if boxed else "bare"]
        leaves = {n: box(jnp.asarray(x), self.leaves[n].axes) for n, x in self.arrays(seed).items()}
        if self.cut == "every":
            leaves = nest(leaves, lists=self.box != "nnx")
        elif self.cut == "last":
            modules: dict[str, Any] = {}
            for name, x in leaves.items():
                module, _, key = name.rpartition("/")
                modules.setdefault(module, {})[key] = x
            leaves = modules
        return nnx.State(leaves) if self.box == "nnx" else leaves


def nest(leaves: dict[str, Any], lists: bool) -> Any:
    """Nested dicts of what has names; where all keys are numbers a list, or a dict of them."""
    inner: dict[str, Any] = {}
    for name in leaves:
        key, _, rest = name.partition("/")
        inner.setdefault(key, {})[rest] = leaves[name]
    tree = {key: x[""] if "" in x else nest(x, lists) for key, x in inner.items()}
    if not all(key.isdigit() for key in tree):
        return tree
    return [tree[k] for k in sorted(tree, key=int)] if lists else {int(k): tree[k] for k in tree}


def assert_like(client: str, params: Any) -> None:
    """Checks that each array of a library's own tree is in its table, with its axes and names.

    Its name may begin later than in the table, and its axes be of other lengths, of one for each
    length in the table.
    """
    sizes: dict[int, int] = {}
    table = CLIENTS[client].leaves
    found, _ = named_leaves(params)
    for name, leaf in found:
        matching = [n for n in table if n == name or n.endswith("/" + name)]
        assert matching, f"{name} is not in the table"
        line = table[min(matching, key=len)]
        for length, own in zip(line.shape, open_box(leaf).shape, strict=True):
            assert sizes.setdefault(length, own) == own, name
        assert NAMES_OF_AXES[CLIENTS[client].box](leaf) == line.axes, name


def under(prefix: str, lines: dict[str, Leaf]) -> dict[str, Leaf]:
    """The lines of a part of a model."""
    return {prefix + name: line for name, line in lines.items()}


def layers(prefix: str, lines: dict[str, Leaf], count: int = 2) -> dict[str, Leaf]:
    """The lines of a layer, once for each layer."""
    return {k: v for i in range(count) for k, v in under(f"{prefix}{i}/", lines).items()}


TUNIX_LLAMA = {
    "embedder/input_embedding": leaf("V d", "embedding", "tp fsdp"),
    "final_norm/w": leaf("d", "vector", "tp"),
    "lm_head/w": leaf("d V", "head", "fsdp tp"),
    **layers("layers/", {
        "attn/q_proj/w": leaf("d h e", "d -> h e", "fsdp tp -"),
        "attn/k_proj/w": leaf("d k e", "d -> k e", "fsdp tp -"),
        "attn/v_proj/w": leaf("d k e", "d -> k e", "fsdp tp -"),
        "attn/o_proj/w": leaf("h e d", "h e -> d", "tp - fsdp"),
        "input_layernorm/w": leaf("d", "vector", "tp"),
        "post_attention_layernorm/w": leaf("d", "vector", "tp"),
        "mlp/gate_proj/kernel": leaf("d f", "d -> f", "fsdp tp"),
        "mlp/up_proj/kernel": leaf("d f", "d -> f", "fsdp tp"),
        "mlp/down_proj/kernel": leaf("f d", "f -> d", "tp fsdp"),
    }),
}  # fmt: skip
TUNIX_QWEN = {  # of Qwen 2 the biases, of Qwen 3 the norms and the experts
    **TUNIX_LLAMA,
    **layers("layers/", {
        "attn/q_norm/w": leaf("e", "vector", "tp"),
        "attn/k_norm/w": leaf("e", "vector", "tp"),
        "attn/q_bias": leaf("H", "vector", "tp"),
        "attn/k_bias": leaf("K", "vector", "tp"),
        "attn/v_bias": leaf("K", "vector", "tp"),
    }),
    **layers("moe_layers/", {
        "mlp/router/kernel": leaf("d X", "router"),
        "mlp/gate_proj": leaf("X d f", "d -> f", "fsdp - tp"),
        "mlp/up_proj": leaf("X d f", "d -> f", "fsdp - tp"),
        "mlp/down_proj": leaf("X f d", "f -> d", "fsdp tp -"),
    }, 1),
}  # fmt: skip
TUNIX_GEMMA = {
    "embedder/input_embedding": leaf("V d", "embedding", "tp fsdp"),
    "final_norm/scale": leaf("d", "vector", "tp"),
    **layers("layers/", {
        "attn/q_einsum/w": leaf("h d e", "d -> h e", "tp fsdp -"),
        "attn/kv_einsum/w": leaf("2 k d e", "d -> k e", "- - fsdp -"),
        "attn/attn_vec_einsum/w": leaf("h e d", "h e -> d", "tp - fsdp"),
        "attn/_query_norm/scale": leaf("e", "vector", ""),
        "attn/_key_norm/scale": leaf("e", "vector", ""),
        "pre_attention_norm/scale": leaf("d", "vector", "tp"),
        "post_attention_norm/scale": leaf("d", "vector", "tp"),
        "pre_ffw_norm/scale": leaf("d", "vector", "tp"),
        "post_ffw_norm/scale": leaf("d", "vector", "tp"),
        "mlp/gate_proj/kernel": leaf("d f", "d -> f", "fsdp tp"),
        "mlp/up_proj/kernel": leaf("d f", "d -> f", "fsdp tp"),
        "mlp/down_proj/kernel": leaf("f d", "f -> d", "tp fsdp"),
    }),
    "layers/2/attn/qkv_einsum/w": leaf("3 h d e", "d -> h e", "- tp fsdp -"),
}  # fmt: skip
TUNIX_LORA = layers("layers/", {
    "attn/q_proj/w_lora_a": leaf("d r", "d -> r", "fsdp -"),
    "attn/q_proj/w_lora_b": leaf("r h e", "r -> h e", "- tp -"),
    "attn/o_proj/w_lora_a": leaf("h e r", "h e -> r", "tp - -"),
    "attn/o_proj/w_lora_b": leaf("r d", "r -> d", "- fsdp"),
    "mlp/gate_proj/kernel_lora_a": leaf("d r", "d -> r", "fsdp -"),
    "mlp/gate_proj/kernel_lora_b": leaf("r f", "r -> f", "- tp"),
})  # fmt: skip
MAXTEXT_LAYER = {  # scanned: the layers' axis is the second
    "pre_self_attention_layer_norm/scale": leaf("d L", "vector", "norm layers"),
    "post_self_attention_layer_norm/scale": leaf("d L", "vector", "norm layers"),
    **under("self_attention/", {
        "query/kernel": leaf("d L h e", "d -> h e", "embed_attn layers q_heads kv"),
        "key/kernel": leaf("d L k e", "d -> k e", "embed_attn layers kv_heads kv_head_dim"),
        "value/kernel": leaf("d L k e", "d -> k e", "embed_attn layers kv_heads kv_head_dim"),
        "out/kernel": leaf("h L e d", "h e -> d", "heads layers kv embed_attn"),
        "query/bias": leaf("h L e", "vector", "q_heads layers kv"),
        "key_norm/scale": leaf("e L", "vector", "norm layers"),
        "sinks": leaf("h L", "vector", "- layers"),
    }),
    "mlp/wi_0/kernel": leaf("d L f", "d -> f", "embed layers mlp"),
    "mlp/wi_1/kernel": leaf("d L f", "d -> f", "embed layers mlp"),
    "mlp/wo/kernel": leaf("f L d", "f -> d", "mlp layers embed"),
}  # fmt: skip
MAXTEXT = {
    "token_embedder/embedding": leaf("V d", "embedding", "vocab embed_vocab"),
    "decoder/decoder_norm/scale": leaf("d", "vector", "norm"),
    "decoder/logits_dense/kernel": leaf("d V", "head", "embed_vocab vocab"),
    "decoder/position_embedder/embedding": leaf("p d", "position", "vocab embed_vocab"),
    **under("decoder/layers/", MAXTEXT_LAYER),
}  # fmt: skip
MAXTEXT_EXPERTS = {  # Mixtral's experts, DeepSeek's latent attention, Qwen3-Next's gated delta net
    "token_embedder/embedding": leaf("V d", "embedding", "vocab embed_vocab"),
    "decoder/logits_dense/kernel": leaf("d V", "head", "embed_vocab vocab"),
    **under("decoder/layers/MoeBlock_0/", {
        "gate/kernel": leaf("d L X", "router", "embed layers -"),
        "gate/bias": leaf("X L", "vector", "- layers"),
        "wi_0": leaf("X L d f", "d -> f", "exp layers embed_moe mlp_moe"),
        "wi_1": leaf("X L d f", "d -> f", "exp layers embed_moe mlp_moe"),
        "wo": leaf("X L f d", "f -> d", "exp layers mlp_moe embed_moe"),
        "wo_bias": leaf("X L d", "vector", "exp layers activation_embed"),
    }),
    **under("decoder/moe_layers/self_attention/", {
        "wq_a/kernel": leaf("d L q", "d -> q", "embed_attn layers q_lora_up_proj"),
        "wq_b/kernel": leaf("q L h e", "q -> h e", "q_lora layers q_heads kv"),
        "wkv_a/kernel": leaf("d L l", "d -> l", "embed_attn layers kv_lora_up_proj"),
        "wkv_b/kernel": leaf("l L h e", "l -> h e", "kv_lora layers kv_heads kv_head_dim"),
    }),
    "decoder/moe_layers/shared_expert_gate/kernel": leaf("d L 1", "vector", "embed layers -"),
    **under("decoder/moe_layers/attention/", {
        "conv1d/kernel": leaf("w L 1 c", "vector"),
        "A_log": leaf("h L", "vector"),
        "dt_bias": leaf("h L", "vector"),
    }),
}  # fmt: skip
MAXTEXT_UNSCANNED = {
    "token_embedder/embedding": leaf("V d", "embedding", "vocab embed_vocab"),
    "decoder/logits_dense/kernel": leaf("d V", "head", "embed_vocab vocab"),
    **layers("decoder/layers_", {
        "self_attention/query/kernel": leaf("d h e", "d -> h e", "embed_attn q_heads kv"),
        "self_attention/out/kernel": leaf("h e d", "h e -> d", "heads kv embed_attn"),
        "mlp/wi_0/kernel": leaf("d f", "d -> f", "embed mlp"),
        "mlp/wo/kernel": leaf("f d", "f -> d", "mlp embed"),
        "MoeBlock_0/wi_0": leaf("X d f", "d -> f", "exp embed_moe mlp_moe"),
        "MoeBlock_0/gate/kernel": leaf("d X", "router", "embed -"),
    }),
}  # fmt: skip
# Levanter's weights are (out, in) but for its experts, and GPT-2's, which are (in, out).
LEVANTER_LLAMA = {
    "embeddings/token_embeddings/weight": leaf("V d", "embedding", "vocab embed"),
    "lm_head/weight": leaf("V d", "head", "vocab embed"),
    "transformer/norm/weight": leaf("d", "vector", "embed"),
    **under("transformer/layers/stacked/", {
        "self_attn/q_proj/weight": leaf(
            "L k g e d", "d -> k g e", "layer kv_head q_heads_per_group head_size embed"
        ),
        "self_attn/k_proj/weight": leaf("L k e d", "d -> k e", "layer kv_head head_size embed"),
        "self_attn/v_proj/weight": leaf("L k e d", "d -> k e", "layer kv_head head_size embed"),
        "self_attn/o_proj/weight": leaf("L d h e", "h e -> d", "layer embed heads head_size"),
        "self_attn/q_norm/weight": leaf("L e", "vector", "layer head_size"),
        "mlp/gate_proj/weight": leaf("L f d", "d -> f", "layer mlp embed"),
        "mlp/up_proj/weight": leaf("L f d", "d -> f", "layer mlp embed"),
        "mlp/down_proj/weight": leaf("L d f", "f -> d", "layer embed mlp"),
        "input_layernorm/weight": leaf("L d", "vector", "layer embed"),
        "post_attention_layernorm/weight": leaf("L d", "vector", "layer embed"),
    }),
}  # fmt: skip
LEVANTER_MIXTRAL = {
    "embeddings/token_embeddings/weight": leaf("V d", "embedding", "vocab embed"),
    "lm_head/weight": leaf("V d", "head", "vocab embed"),
    **under("transformer/layers/stacked/", {
        "self_attn/o_proj/weight": leaf("L d h e", "h e -> d", "layers embed heads head_size"),
        "block_sparse_moe/gate/weight": leaf("L X d", "router", "layers experts embed"),
        "block_sparse_moe/experts/w1/weight": leaf("L X d f", "d -> f", "layers experts embed mlp"),
        "block_sparse_moe/experts/w3/weight": leaf("L X d f", "d -> f", "layers experts embed mlp"),
        "block_sparse_moe/experts/w2/weight": leaf("L X f d", "f -> d", "layers experts mlp embed"),
    }),
}  # fmt: skip
LEVANTER_GPT2 = {
    "embeddings/token_embeddings/weight": leaf("V d", "embedding", "vocab embed"),
    "embeddings/position_embeddings/weight": leaf("p d", "position", "position embed"),
    "transformer/ln_f/weight": leaf("d", "vector", "embed"),
    "transformer/ln_f/bias": leaf("d", "vector", "embed"),
    **under("transformer/blocks/stacked/", {
        "attn/c_attn/weight": leaf("L d 3 h e", "d -> h e", "layers embed qkv heads head_size"),
        "attn/c_attn/bias": leaf("L 3 h e", "vector", "layers qkv heads head_size"),
        "attn/c_proj/weight": leaf("L h e d", "h e -> d", "layers heads head_size embed"),
        "attn/c_proj/bias": leaf("L d", "vector", "layers embed"),
        "mlp/c_fc/weight": leaf("L d f", "d -> f", "layers embed mlp"),
        "mlp/c_fc/bias": leaf("L f", "vector", "layers mlp"),
        "mlp/c_proj/weight": leaf("L f d", "f -> d", "layers mlp embed"),
        "ln_1/weight": leaf("L d", "vector", "layers embed"),
    }),
}  # fmt: skip
# Flax's example of a language model: its boxes name two axes of attention kernels that have three.
LM1B = {
    "decoder/Embed_0/embedding": leaf("V d", "embedding", "vocab embed"),
    "decoder/posembed_output/pos_embedding": leaf("1 p d", "position"),
    "decoder/encoderdecoder_norm/scale": leaf("d", "vector", "embed"),
    "decoder/encoderdecoder_norm/bias": leaf("d", "vector", "embed"),
    "decoder/logitdense/kernel": leaf("d V", "head", "embed vocab"),
    "decoder/logitdense/bias": leaf("V", "vector", "vocab"),
    **layers("decoder/encoderdecoderblock_", {
        "LayerNorm_0/scale": leaf("d", "vector", "embed"),
        "LayerNorm_0/bias": leaf("d", "vector", "embed"),
        "MultiHeadDotProductAttention_0/query/kernel": leaf("d h e", "d -> h e", "embed kv"),
        "MultiHeadDotProductAttention_0/key/kernel": leaf("d h e", "d -> h e", "embed kv"),
        "MultiHeadDotProductAttention_0/value/kernel": leaf("d h e", "d -> h e", "embed kv"),
        "MultiHeadDotProductAttention_0/out/kernel": leaf("h e d", "h e -> d", "embed kv"),
        "MlpBlock_0/Dense_0/kernel": leaf("d f", "d -> f", "embed mlp"),
        "MlpBlock_0/Dense_0/bias": leaf("f", "vector", "mlp"),
        "MlpBlock_0/Dense_1/kernel": leaf("f d", "f -> d", "mlp embed"),
        "MlpBlock_0/Dense_1/bias": leaf("d", "vector", "embed"),
    }),
}  # fmt: skip
LM1B_SCANNED = {
    "decoder/Embed_0/embedding": leaf("V d", "embedding", "vocab embed"),
    "decoder/logitdense/kernel": leaf("d V", "head", "embed vocab"),
    "decoder/layers/LayerNorm_0/scale": leaf("L d", "vector", "layers embed"),
    **under("decoder/layers/MultiHeadDotProductAttention_0/", {
        "query/kernel": leaf("L d h e", "d -> h e", "layers embed heads kv"),
        "query/bias": leaf("L h e", "vector", "layers heads kv"),
        "out/kernel": leaf("L h e d", "h e -> d", "layers heads kv embed"),
    }),
    "decoder/layers/MlpBlock_0/Dense_0/kernel": leaf("L d f", "d -> f", "layers embed mlp"),
    "decoder/layers/MlpBlock_0/Dense_1/kernel": leaf("L f d", "f -> d", "layers mlp embed"),
}  # fmt: skip
FLAX_NNX = {
    "token_emb/embedding": leaf("V d", "embedding", "vocab embed"),
    "pos_emb/embedding": leaf("p d", "position", "- embed"),
    "output_layer/kernel": leaf("d V", "head", "embed vocab"),
    "output_layer/bias": leaf("V", "vector"),
    **layers("blocks/", {
        "mha/query/kernel": leaf("d h e", "d -> h e", "embed heads kv"),
        "mha/key/kernel": leaf("d h e", "d -> h e", "embed heads kv"),
        "mha/value/kernel": leaf("d h e", "d -> h e", "embed heads kv"),
        "mha/out/kernel": leaf("h e d", "h e -> d", "heads kv embed"),
        "mha/query/bias": leaf("h e", "vector"),
        "mha/key/bias": leaf("h e", "vector"),
        "mha/value/bias": leaf("h e", "vector"),
        "mha/out/bias": leaf("d", "vector"),
        "layer_norm1/scale": leaf("d", "vector"),
        "layer_norm1/bias": leaf("d", "vector"),
        "linear1/kernel": leaf("d f", "d -> f", "embed mlp"),
        "linear1/bias": leaf("f", "vector"),
        "linear2/kernel": leaf("f d", "f -> d", "mlp embed"),
        "linear2/bias": leaf("d", "vector"),
    }),
    "conv/kernel": leaf("y x c o", "y x c -> o"),
    "conv/bias": leaf("o", "vector"),
    "depthwise/kernel": leaf("y x 1 o", "vector"),
}  # fmt: skip
FLAX_NNX_SCANNED = {
    "token_emb/embedding": leaf("V d", "embedding", "vocab embed"),
    "output_layer/kernel": leaf("d V", "head", "embed vocab"),
    **under("blocks/", {
        "mha/query/kernel": leaf("L d h e", "d -> h e", "layers embed heads kv"),
        "mha/query/bias": leaf("L h e", "vector", "layers heads kv"),
        "mha/out/kernel": leaf("L h e d", "h e -> d", "layers heads kv embed"),
        "linear1/kernel": leaf("L d f", "d -> f", "layers embed mlp"),
        "layer_norm1/scale": leaf("L d", "vector", "layers embed"),
    }),
}  # fmt: skip
EQUINOX = {
    "embedding/weight": leaf("V d", "embedding"),
    "pos": leaf("p d", "position"),
    **layers("blocks/", {
        "attention/query_proj/weight": leaf("H d", "d -> H"),
        "attention/key_proj/weight": leaf("H d", "d -> H"),
        "attention/value_proj/weight": leaf("H d", "d -> H"),
        "attention/output_proj/weight": leaf("d H", "H -> d"),
        "attention/output_proj/bias": leaf("d", "vector"),
        "norm1/weight": leaf("d", "vector"),
        "norm1/bias": leaf("d", "vector"),
        "mlp/layers/0/weight": leaf("f d", "d -> f"),
        "mlp/layers/0/bias": leaf("f", "vector"),
        "mlp/layers/1/weight": leaf("d f", "f -> d"),
        "mlp/layers/1/bias": leaf("d", "vector"),
    }),
    "norm/weight": leaf("d", "vector"),
    "unembed/weight": leaf("V d", "head"),
    "conv/weight": leaf("o c y x", "c y x -> o"),
    "conv/bias": leaf("o 1 1", "vector"),
}  # fmt: skip
HAIKU = {
    "transformer/embed/embeddings": leaf("V d", "embedding"),
    "transformer/multi_head_attention/query/w": leaf("d H", "d -> H"),
    "transformer/multi_head_attention/query/b": leaf("H", "vector"),
    "transformer/multi_head_attention/key/w": leaf("d H", "d -> H"),
    "transformer/multi_head_attention/key/b": leaf("H", "vector"),
    "transformer/multi_head_attention/value/b": leaf("H", "vector"),
    "transformer/multi_head_attention/value/w": leaf("d H", "d -> H"),
    "transformer/multi_head_attention/linear/w": leaf("H d", "H -> d"),
    "transformer/multi_head_attention/linear/b": leaf("d", "vector"),
    "transformer/layer_norm/scale": leaf("d", "vector"),
    "transformer/layer_norm/offset": leaf("d", "vector"),
    "transformer/layer_norm_1/scale": leaf("d", "vector"),
    "transformer/linear/w": leaf("d f", "d -> f"),
    "transformer/linear/b": leaf("f", "vector"),
    "transformer/linear_1/w": leaf("f d", "f -> d"),
    "transformer/linear_1/b": leaf("d", "vector"),
    "transformer/linear_2/w": leaf("d V", "head"),
    "transformer/linear_2/b": leaf("V", "vector"),
    "transformer/conv2_d/w": leaf("y x c o", "y x c -> o"),
}
KERAS = {  # by the variables' `path`
    "embedding/embeddings": leaf("V d", "embedding"),
    "position_embedding/embeddings": leaf("p d", "position"),
    "multi_head_attention/query/kernel": leaf("d h e", "d -> h e"),
    "multi_head_attention/query/bias": leaf("h e", "vector"),
    "multi_head_attention/key/kernel": leaf("d h e", "d -> h e"),
    "multi_head_attention/key/bias": leaf("h e", "vector"),
    "multi_head_attention/value/bias": leaf("h e", "vector"),
    "multi_head_attention/value/kernel": leaf("d h e", "d -> h e"),
    "multi_head_attention/attention_output/kernel": leaf("h e d", "h e -> d"),
    "multi_head_attention/attention_output/bias": leaf("d", "vector"),
    "layer_normalization/gamma": leaf("d", "vector"),
    "layer_normalization/beta": leaf("d", "vector"),
    "dense/kernel": leaf("d f", "d -> f"),
    "dense/bias": leaf("f", "vector"),
    "dense_1/kernel": leaf("f d", "f -> d"),
    "dense_1/bias": leaf("d", "vector"),
    "dense_2/kernel": leaf("d V", "head"),
    "dense_2/bias": leaf("V", "vector"),
    "conv2d/kernel": leaf("y x c o", "y x c -> o"),
    "depthwise_conv2d/kernel": leaf("y x c 1", "vector"),
}
META_LLAMA = {
    "tok_embeddings/weight": leaf("V d", "embedding"),
    **layers("layers/", {
        "attention/wq/weight": leaf("H d", "d -> H"),
        "attention/wk/weight": leaf("K d", "d -> K"),
        "attention/wv/weight": leaf("K d", "d -> K"),
        "attention/wo/weight": leaf("d H", "H -> d"),
        "feed_forward/w1/weight": leaf("f d", "d -> f"),
        "feed_forward/w2/weight": leaf("d f", "f -> d"),
        "feed_forward/w3/weight": leaf("f d", "d -> f"),
        "attention_norm/weight": leaf("d", "vector"),
        "ffn_norm/weight": leaf("d", "vector"),
    }),
    "norm/weight": leaf("d", "vector"),
    "output/weight": leaf("V d", "head"),
}  # fmt: skip
HUGGING_FACE = {  # Flax's BERT, ViT, GPT-2, LLaMA and T5
    "bert/embeddings/word_embeddings/embedding": leaf("V d", "embedding"),
    "bert/embeddings/position_embeddings/embedding": leaf("p d", "position"),
    "bert/embeddings/LayerNorm/scale": leaf("d", "vector"),
    **layers("bert/encoder/layer/", {
        "attention/self/query/kernel": leaf("d H", "d -> H"),
        "attention/self/query/bias": leaf("H", "vector"),
        "attention/output/dense/kernel": leaf("H d", "H -> d"),
        "attention/output/LayerNorm/scale": leaf("d", "vector"),
        "intermediate/dense/kernel": leaf("d f", "d -> f"),
        "output/dense/kernel": leaf("f d", "f -> d"),
        "output/LayerNorm/bias": leaf("d", "vector"),
    }),
    "classifier/kernel": leaf("d n", "head"),
    "vit/embeddings/cls_token": leaf("1 1 d", "vector"),
    "vit/embeddings/position_embeddings": leaf("1 p d", "position"),
    "vit/embeddings/patch_embeddings/projection/kernel": leaf("y x 3 d", "embedding"),
    "vit/encoder/layer/0/attention/attention/query/kernel": leaf("d H", "d -> H"),
    "vit/encoder/layer/0/attention/output/dense/kernel": leaf("H d", "H -> d"),
    "vit/encoder/layer/0/layernorm_before/scale": leaf("d", "vector"),
    "transformer/wte/embedding": leaf("V d", "embedding"),
    "transformer/wpe/embedding": leaf("p d", "position"),
    "transformer/h/0/attn/c_attn/kernel": leaf("d f", "d -> f"),
    "transformer/h/0/ln_1/scale": leaf("d", "vector"),
    "model/embed_tokens/embedding": leaf("V d", "embedding"),
    "model/layers/0/self_attn/q_proj/kernel": leaf("d H", "d -> H"),
    "model/layers/0/mlp/gate_proj/kernel": leaf("d f", "d -> f"),
    "lm_head/kernel": leaf("d V", "head"),
    "score/kernel": leaf("d n", "head"),
    **under("encoder/block/0/layer/0/SelfAttention/", {
        "q/kernel": leaf("d H", "d -> H"),
        "relative_attention_bias/embedding": leaf("p h", "position"),
    }),
    "encoder/block/0/layer/1/DenseReluDense/wi_0/kernel": leaf("d f", "d -> f"),
}  # fmt: skip
BIG_VISION = {  # layers scanned
    "embedding/kernel": leaf("y x 3 d", "embedding"),
    "embedding/bias": leaf("d", "vector"),
    "pos_embedding": leaf("1 p d", "position"),
    **under("Transformer/encoderblock/", {
        "LayerNorm_0/scale": leaf("L d", "vector"),
        "MultiHeadDotProductAttention_0/query/kernel": leaf("L d h e", "d -> h e"),
        "MultiHeadDotProductAttention_0/query/bias": leaf("L h e", "vector"),
        "MultiHeadDotProductAttention_0/out/kernel": leaf("L h e d", "h e -> d"),
        "MultiHeadDotProductAttention_0/out/bias": leaf("L d", "vector"),
        "MlpBlock_0/Dense_0/kernel": leaf("L d f", "d -> f"),
        "MlpBlock_0/Dense_1/kernel": leaf("L f d", "f -> d"),
    }),
    "Transformer/encoder_norm/scale": leaf("d", "vector"),
    "head/kernel": leaf("d n", "head"),
}  # fmt: skip
MEMOPT = {
    "embed/embedding": leaf("V d", "embedding"),
    **under("blocks/", {
        "attention/q/kernel": leaf("L d H", "d -> H"),
        "attention/k/kernel": leaf("L d K", "d -> K"),
        "attention/v/kernel": leaf("L d K", "d -> K"),
        "attention/o/kernel": leaf("L H d", "H -> d"),
        "attention_norm/scale": leaf("L d", "vector"),
        "mlp/gate/kernel": leaf("L d f", "d -> f"),
    }),
    "head/kernel": leaf("d V", "head"),
}  # fmt: skip
OTHER_NAMES = {  # of more models of these libraries
    "emb/weight": leaf("V d", "embedding"),
    "vit/patch_embed/proj/kernel": leaf("y x 3 d", "embedding"),
    "encoder/embedding/patchifier/kernel": leaf("y x 3 d", "embedding"),
    "model/decoder/embed_positions/embedding": leaf("p d", "position"),
    "layers/0/attn/out_proj/kernel": leaf("H d", "H -> d"),
    "layers/0/attn/post_beta": leaf("h K", "vector"),
    "layers/0/hc_base": leaf("h K", "vector"),
    "layers/0/tid2eid": leaf("h K", "vector"),
    "decoder/logits/kernel": leaf("d V", "head"),
    "unet/attn/to_q/kernel": leaf("d H", "d -> H"),
    "unet/attn/to_k/kernel": leaf("d H", "d -> H"),
    "unet/attn/to_v/kernel": leaf("d H", "d -> H"),
    "unet/attn/to_out/kernel": leaf("H d", "H -> d"),
    "unet/time_embed/dense_0/kernel": leaf("d f", "d -> f"),
    "unet/conv_in/kernel": leaf("y x c o", "y x c -> o"),
    "resnet/shortcut/kernel": leaf("y x c o", "y x c -> o"),
    "resnet/Conv_0/kernel": leaf("y x 3 c o", "y x 3 c -> o"),
    "swin/attn/relative_position_bias_table": leaf("p h", "position"),
    "sam/attn/rel_pos_h": leaf("p e", "position"),
    "sam/attn/rel_pos": leaf("p e", "position"),
    "pos_encoding": leaf("p d", "position"),
    "positional_encoding": leaf("p d", "position"),
    "shared/weight": leaf("V d", "embedding"),
    "fused/attn/qkv/kernel": leaf("d 3 h e", "d -> h e"),
    "fused/attn/out/kernel": leaf("h e d", "h e -> d"),
    "cross/attn/query/kernel": leaf("d h e", "d -> h e"),
    "cross/attn/kv/kernel": leaf("l 2 k e", "l -> k e"),
    "cross/attn/out/kernel": leaf("h e o", "h e -> o"),
    "latent/attn/query/kernel": leaf("l h e", "l -> h e"),
    "latent/attn/out/kernel": leaf("h w d", "h w -> d"),
    "Conv_blocks/Conv_0/kernel": leaf("L w c o", "w c -> o"),
    "Conv_blocks/LayerNorm_0/scale": leaf("L o", "vector"),
}
MISLEADING = {  # names that say one thing and are another
    "embedder/input_embedding": leaf("V d", "embedding"),
    "block/prenorm_attention/q/kernel": leaf("d H", "d -> H"),
    "block/attention/output/dense/kernel": leaf("H d", "H -> d"),
    "block/positionwise_feedforward/w_1/kernel": leaf("d f", "d -> f"),
    "block/mlp/gate/kernel": leaf("d f", "d -> f"),
    "block/multi_head/proj/kernel": leaf("d H", "d -> H"),
    "block/attn/sinks": leaf("L h", "vector"),
    "block/attn/query_scale": leaf("h K", "vector"),
    "block/attn/qkv/b": leaf("h K", "vector"),
    "block/position_wise_ffn/w1/kernel": leaf("d f", "d -> f"),
    "block/relative_attention/q/kernel": leaf("d H", "d -> H"),
    "block/embed_proj/kernel": leaf("d f", "d -> f"),
    "block/mlp/shared/kernel": leaf("d f", "d -> f"),
    "block/attention/q_head/kernel": leaf("d H", "d -> H"),
    "block/logits_processor/kernel": leaf("d f", "d -> f"),
    "block/conv_proj/kernel": leaf("L d f", "d -> f"),
    "experts/kernel": leaf("3 3 d f", "d -> f"),
    "text_embedder/layers/0/attn/q/kernel": leaf("d H", "d -> H"),
    "mtp_head/layers/0/mlp/up/kernel": leaf("d f", "d -> f"),
    "output/layers/0/mlp/kernel": leaf("d f", "d -> f"),
    "block/ada_norm/kernel": leaf("d f", "d -> f"),
    "MultiHeadAttention_0/Head_0/Dense_0/kernel": leaf("d H", "d -> H"),
    "moe/gate/kernel": leaf("d X", "router"),
    "moe/shared_experts/gate/kernel": leaf("d f", "d -> f"),
    "moe/experts/gate/kernel": leaf("X d f", "d -> f"),
    "moe/experts/up/kernel": leaf("X d f", "d -> f"),
    "moe/experts/gate_proj/kernel": leaf("X d f", "d -> f"),
    "pos": leaf("p d", "position"),
    "to_logits/kernel": leaf("d V", "head"),
    "pre_logits/kernel": leaf("d D", "d -> D"),
}

CLIENTS = {
    "tunix_llama": Client(TUNIX_LLAMA, "nnx"),
    "tunix_qwen": Client(TUNIX_QWEN, "nnx"),
    "tunix_gemma": Client(TUNIX_GEMMA, "nnx"),
    "tunix_lora": Client(TUNIX_LORA, "nnx"),
    "maxtext": Client(MAXTEXT, "nnx"),
    "maxtext_experts": Client(MAXTEXT_EXPERTS, "nnx"),
    "maxtext_unscanned": Client(MAXTEXT_UNSCANNED, "nnx"),
    "maxtext_linen": Client(under("params/", MAXTEXT), "logical"),
    "levanter_llama": Client(LEVANTER_LLAMA, "haliax", oriented=False),
    "levanter_mixtral": Client(LEVANTER_MIXTRAL, "haliax", oriented=False),
    "levanter_gpt2": Client(LEVANTER_GPT2, "haliax", oriented=False),
    "lm1b": Client(LM1B, "logical"),
    "lm1b_scanned": Client(LM1B_SCANNED, "logical"),
    "lm1b_partitioned": Client(LM1B_SCANNED, "partitioned"),
    "flax_nnx": Client(FLAX_NNX, "nnx"),
    "flax_nnx_scanned": Client(FLAX_NNX_SCANNED, "nnx"),
    "flax_nnx_pure": Client(FLAX_NNX),
    "equinox": Client(EQUINOX, oriented=False),
    "haiku": Client(HAIKU, cut="last"),
    "keras": Client(KERAS, cut="none"),
    "meta_llama": Client(META_LLAMA, oriented=False),
    "hugging_face": Client(HUGGING_FACE),
    "big_vision": Client(BIG_VISION),
    "memopt": Client(MEMOPT),
    "other_names": Client(OTHER_NAMES),
    "misleading": Client(MISLEADING),
}
