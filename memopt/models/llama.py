"""LLaMA in Flax NNX: embedding, a stack of equal scanned blocks, output head, and its loss.

The architecture is that of Touvron et al. 2023 (arXiv 2302.13971) with the grouped-query attention
and the rotary stretch of Llama 3 (arXiv 2407.21783). Options of `LlamaConfig` make it a Mistral
(arXiv 2310.06825), Qwen2 (arXiv 2407.10671), Qwen3 (arXiv 2505.09388) or Gemma (arXiv 2403.08295).
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from memopt.axis_types import on_auto_axes
from memopt.models import hugging_face
from memopt.models.attention import causal_attention
from memopt.models.config import PRESETS as PRESETS
from memopt.models.config import DType, Remat
from memopt.models.config import LlamaConfig as LlamaConfig
from memopt.models.config import RopeScaling as RopeScaling
from memopt.models.config import preset as preset
from memopt.models.cross_entropy import chunked_cross_entropy
from memopt.models.observed import Linear, set_statistics
from memopt.models.product import dot_general
from memopt.models.rotary import rotary_tables, rotate
from memopt.models.sharding import constrain, partition, shards
from memopt.models.sharding import param_shardings as param_shardings
from memopt.models.stacked import Batch, StackedModel
from memopt.state.quantized_params import dequantize_params, quantize_params, take_rows

INIT = jax.nn.initializers.normal(0.02)

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}  # JAX approximates GELU by tanh

# Float32 logits that one device may hold at a time, in bytes.
LOGITS_BYTES = 2**27


class Context(NamedTuple):
    """The arrays that every block reads beside its input.

    Attributes:
        rotary: Cosines and sines, each float32 `(batch or 1, seq, head_dim // 2)`.
        segment_ids: int32 `(batch, seq)` numbering the documents packed in a row, or None.

    """

    rotary: tuple[Array, Array]
    segment_ids: Array | None = None


def _dtypes(config: LlamaConfig) -> dict[str, Any]:
    return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}


def _linear(
    config: LlamaConfig, rows: str, cols: str, rngs: nnx.Rngs, bias: bool = False
) -> Linear:
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = {"embed": config.hidden_size, "heads": heads, "kv_heads": kv_heads}
    sizes |= {"mlp": config.intermediate_size, "vocab": config.vocab_size}
    options: Any = {"kernel_init": INIT, "kernel_metadata": {"axes": (rows, cols)}}
    options |= {"use_bias": bias, "bias_metadata": {"axes": (cols,)}, "dot_general": dot_general}
    return Linear(sizes[rows], sizes[cols], rngs=rngs, **options, **_dtypes(config))


class OffsetRMSNorm(nnx.RMSNorm):
    """Scales by 1 + its parameter, in float32."""

    def __call__(self, x: Array, mask: Any = None) -> Array:
        """Maps `(..., features)` to the same shape, in the compute dtype."""
        wide = x.astype(jnp.float32)
        scale: Any = self.scale
        mean_square = jnp.mean(wide**2, axis=-1, keepdims=True)
        factor = jax.lax.rsqrt(mean_square + self.epsilon) * (1 + scale[...].astype(jnp.float32))
        return (wide * factor).astype(self.dtype)


def _norm(config: LlamaConfig, size: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    options: Any = {"epsilon": config.norm_eps, "scale_metadata": {"axes": (None,)}}
    options |= _dtypes(config)
    if config.norm_offset:
        return OffsetRMSNorm(size, scale_init=jax.nn.initializers.zeros, rngs=rngs, **options)
    return nnx.RMSNorm(size, rngs=rngs, **options)


class Attention(nnx.Module):
    """Grouped-query attention: `num_heads` queries share `num_kv_heads` keys and values."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        inputs, output = config.attention_bias != "none", config.attention_bias == "qkvo"
        self.q = _linear(config, "embed", "heads", rngs, bias=inputs)
        self.k = _linear(config, "embed", "kv_heads", rngs, bias=inputs)
        self.v = _linear(config, "embed", "kv_heads", rngs, bias=inputs)
        self.o = _linear(config, "heads", "embed", rngs, bias=output)
        if config.qk_norm:
            self.q_norm = _norm(config, config.head_dim, rngs)
            self.k_norm = _norm(config, config.head_dim, rngs)

    def __call__(
        self, x: Array, context: Context, cache: Array | None = None, offset: Any = 0
    ) -> tuple[Array, Array | None]:
        """Maps `(batch, seq, hidden)` to the same shape, and updates a cache; see `Block`."""
        query, key, value = (
            projection(x).reshape(*x.shape[:2], -1, self.config.head_dim)
            for projection in (self.q, self.k, self.v)
        )
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, context.rotary), rotate(key, context.rotary)
        if cache is not None:
            read = jnp.stack([key, value])
            cache = jax.lax.dynamic_update_slice_in_dim(cache, read, offset, axis=2)
            key, value = cache
        window = self.config.sliding_window
        heads = causal_attention(query, key, value, context.segment_ids, offset, window=window)
        return self.o(heads.reshape(*heads.shape[:2], -1)), cache


class MLP(nnx.Module):
    """A gated MLP: SwiGLU or GeGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.activation = ACTIVATIONS[config.activation]
        self.gate = _linear(config, "embed", "mlp", rngs)
        self.up = _linear(config, "embed", "mlp", rngs)
        self.down = _linear(config, "mlp", "embed", rngs)

    def __call__(self, x: Array) -> Array:
        """Maps `(batch, seq, hidden)` to the same shape."""
        up = self.up(x)  # first: a v5e's compiler then holds one gathered weight less at fsdp=16
        return self.down(self.activation(self.gate(x)) * up)


class Block(nnx.Module):
    """Attention and MLP, each after a norm and added to what came in."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, config.hidden_size, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config, config.hidden_size, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: Array, context: Context, cache: Array | None = None, offset: Any = 0
    ) -> tuple[Array, Array | None]:
        """Maps the residual stream, `(batch, seq, hidden)`, to the same shape.

        Args:
            x: The residual stream.
            context: What every block reads.
            cache: Keys and values `(2, batch, length, kv_heads, head_dim)` of all positions before
                `offset`, to attend to as well; None if there are none.
            offset: Position of the first token in `cache`.

        Returns:
            The new residual stream, and the cache with keys and values of these tokens.
        """
        x = constrain(x, "batch", None, None)
        heads, cache = self.attention(self.attention_norm(x), context, cache, offset)
        x = x + heads
        return constrain(x + self.mlp(self.mlp_norm(x)), "batch", None, None), cache


def _parts(
    config: LlamaConfig, rngs: nnx.Rngs
) -> tuple[nnx.Embed, Array, nnx.RMSNorm, Linear | None]:
    """Embedding, a key for each block, final norm, and the head unless it is tied."""
    init: Any = {"embedding_init": INIT, "embedding_metadata": {"axes": ("vocab", "embed")}}
    embed = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs, **init, **_dtypes(config))
    keys = jax.random.split(rngs.params(), config.num_layers)
    norm = _norm(config, config.hidden_size, rngs)
    head = None if config.tied else _linear(config, "embed", "vocab", rngs)
    return embed, keys, norm, head


class Llama(nnx.Module):
    """A LLaMA whose blocks are one module with stacked parameters.

    Calling it gives logits. Its three parts are `embed_tokens`, the blocks (`block_function`) and
    `unembed`; `nnx.to_pure_dict(nnx.state(model, nnx.Param))` are the parameters as nested dicts:
    `embed/embedding` (vocab, hidden), `blocks/attention/q/kernel` (layers, in, out) ...,
    `final_norm/scale` (hidden,) and, unless tied, `head/kernel` (hidden, vocab). Each parameter
    carries the names of its `axes` as metadata, which `param_shardings` turns into shardings.

    Args:
        config: Shapes and options; see `preset`.
        rngs: Source of the initial values, normal with standard deviation 0.02.

    Example:
        >>> model = Llama(preset("tiny"), rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 8), jnp.int32)).shape
        (1, 8, 264)
        >>> model.blocks.mlp.gate.kernel.shape, model.blocks.mlp.gate.kernel.axes
        ((4, 192, 512), ('layers', 'embed', 'mlp'))

    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed, keys, self.final_norm, head = _parts(config, rngs)

        block = lambda key: Block(config, rngs=nnx.Rngs(key))
        axes = {nnx.PARTITION_NAME: "layers", "axes": "layers"}
        self.blocks = nnx.vmap(block, transform_metadata=axes)(keys)
        if head is not None:
            self.head = head

    def __call__(
        self,
        token_ids: jax.typing.ArrayLike,
        segment_ids: jax.typing.ArrayLike | None = None,
        positions: jax.typing.ArrayLike | None = None,
    ) -> Array:
        """Logits of the next token at every position.

        Args:
            token_ids: Integers `(batch, seq)`.
            segment_ids: Integers `(batch, seq)`; positions attend within their own segment only.
                None: each row is one document.
            positions: Integers `(batch, seq)`, places in the document. None: counted from 0.

        Returns:
            float32 `(batch, seq, vocab)`.

        Raises:
            ValueError: If the sequence is longer than `max_seq_len`.

        """
        inputs = jax.tree.map(jnp.asarray, (token_ids, segment_ids, positions))
        forward = lambda model, *inputs: model.unembed(model.hidden(*inputs))
        spec = partition(inputs[0].shape[:1], ["batch"])
        return on_auto_axes(forward, (self, *inputs), like=spec)

    def context(
        self, length: int, segment_ids: Array | None = None, positions: Array | None = None
    ) -> Context:
        """The arrays that blocks read beside their input, for sequences of `length`."""
        if length > self.config.max_seq_len:
            raise ValueError(
                f"A sequence of {length} tokens is longer than max_seq_len="
                f"{self.config.max_seq_len}; shorten it or raise max_seq_len in the config."
            )
        positions = jnp.arange(length)[None] if positions is None else positions
        return Context(rotary_tables(self.config, positions), segment_ids)

    def embed_tokens(self, token_ids: Array) -> Array:
        """Rows of the embedding, `(batch, seq, hidden)` in the compute dtype.

        The cast follows the look-up so that the embedding's gradient is summed in its own dtype.
        On a mesh each device looks up its columns of the table for all rows of the batch, then the
        devices exchange columns for rows: none holds the whole table, nor its gradient.
        """
        token_ids = constrain(token_ids, "data", None)
        x = take_rows(self.embed.embedding.get_value(), token_ids).astype(self.config.dtype)
        if self.config.scale_embedding:
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        return constrain(constrain(x, "data", None, "embed"), "batch", None, None)

    def block_function(self) -> tuple[Callable[..., Array], Any]:
        """One block as a function, and the stacked parameters to slice its argument from.

        Returns:
            `block(params, x, context, statistics=None) -> x`, without rematerialisation, and the
            parameters of all blocks as nested dicts with a leading axis of layers. Those from
            `memopt.quantize_params` are read one block at a time. The block's matrices report
            their `statistics`, see `memopt.observe`.

        Example:
            >>> model = Llama(preset("tiny"), rngs=nnx.Rngs(0))
            >>> block, stacked = model.block_function()
            >>> first = jax.tree.map(lambda leaf: leaf[0], stacked)
            >>> x = model.embed_tokens(jnp.zeros((1, 8), jnp.int32))
            >>> block(first, x, model.context(8)).shape
            (1, 8, 192)

        """
        graphdef, stacked = nnx.split(self.blocks, nnx.Param)

        def block(params: Any, x: Array, context: Context, statistics: Any = None) -> Array:
            module = nnx.merge(graphdef, dequantize_params(params))
            set_statistics(module, statistics)
            return module(x, context)[0]

        return block, nnx.to_pure_dict(stacked)

    def hidden(
        self,
        token_ids: Array,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        statistics: Any = None,
    ) -> Array:
        """The last block's output, `(batch, seq, hidden)` in the compute dtype.

        The matrices of the blocks report the `statistics` of all blocks, see `memopt.observe`.
        """
        context = self.context(token_ids.shape[1], segment_ids, positions)
        block, stacked = self.block_function()
        if self.config.remat != "none":
            dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            policy = dots if self.config.remat == "dots" else None
            block = jax.checkpoint(block, policy=policy, prevent_cse=False)

        def step(x: Array, layer: Any) -> tuple[Array, None]:
            params, statistics = layer
            return block(params, x, context, statistics), None

        return jax.lax.scan(step, self.embed_tokens(token_ids), (stacked, statistics))[0]

    def unembed(self, x: Array) -> Array:
        """Final norm and head: `(..., hidden)` to float32 logits `(..., vocab)`."""
        x = self.final_norm(x)
        kernel = dequantize_params(self.head_kernel().get_value())
        kernel = kernel.T if self.config.tied else kernel
        return dot_general(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)

    def head_kernel(self) -> nnx.Param:
        """The head's matrix, `(hidden, vocab)`, or the embedding, `(vocab, hidden)`."""
        return self.embed.embedding if self.config.tied else self.head.kernel


def loss(
    model: Llama, batch: Batch, *, logits_bytes: int = LOGITS_BYTES, statistics: Any = None
) -> tuple[Array, Array]:
    """Cross-entropy of the next token, summed, and the number of tokens it was summed over.

    Sums rather than means, so that micro-batches, devices and evaluation batches add up exactly.

    Args:
        model: The model.
        batch: int32 arrays `(batch, seq)`: `inputs`, `targets`, and optionally `segment_ids`,
            `positions` and `weights` (1 where a target counts, 0 where not; default 1).
        logits_bytes: Float32 logits a device may hold at a time; if there are more, they are
            computed for a part of the vocabulary at a time, and again by the backward pass.
        statistics: Zeros for the matrices of the blocks to report what they see, from
            `memopt.zero_statistics`; None: they report nothing.

    Returns:
        Two float32 scalars: the sum and the count.

    Raises:
        ValueError: If the sequence is longer than `max_seq_len`.

    Example:
        >>> model = Llama(preset("tiny"), rngs=nnx.Rngs(0))
        >>> tokens = jnp.zeros((2, 8), jnp.int32)
        >>> total, count = loss(model, {"inputs": tokens, "targets": tokens})
        >>> int(count), bool(total / count < 6.0)
        (16, True)

    """

    def forward(model: Llama, batch: Batch, statistics: Any) -> tuple[Array, Array]:
        documents = batch.get("segment_ids"), batch.get("positions")
        x = model.hidden(batch["inputs"], *documents, statistics)
        return head_loss(model, x, batch, logits_bytes=logits_bytes)

    arrays = jax.tree.map(jnp.asarray, dict(batch))
    blocks = statistics and statistics["blocks"]
    return on_auto_axes(forward, (model, arrays, blocks), like=(jax.P(), jax.P()))


def head_loss(
    model: Llama, x: Array, batch: Batch, *, logits_bytes: int = LOGITS_BYTES
) -> tuple[Array, Array]:
    """The part of `loss` that follows the last block.

    Args:
        model: The model, of which the final norm and the head are used.
        x: `(batch, seq, hidden)`, the last block's output.
        batch: As in `loss`.
        logits_bytes: As in `loss`.

    Returns:
        As `loss`.

    Example:
        >>> model = Llama(preset("tiny"), rngs=nnx.Rngs(0))
        >>> tokens = jnp.zeros((2, 8), jnp.int32)
        >>> batch = {"inputs": tokens, "targets": tokens}
        >>> bool(head_loss(model, model.hidden(tokens), batch)[0] == loss(model, batch)[0])
        True

    """
    targets = batch["targets"]
    weights = batch.get("weights", jnp.ones_like(targets)).astype(jnp.float32)
    x, (rows, length) = constrain(x, "batch", None, None), targets.shape
    devices = shards("batch", rows) * shards("vocab", model.config.vocab_size)
    if 4 * rows * length * model.config.vocab_size <= logits_bytes * devices:
        losses = optax.softmax_cross_entropy_with_integer_labels(model.unembed(x), targets)
        total = (losses * weights).sum()
    else:
        kernel, axis = model.head_kernel().get_value(), 0 if model.config.tied else 1
        x = model.final_norm(x)
        # In quarters: a part of the gradient in float32, too, takes memory.
        total = chunked_cross_entropy(x, kernel, targets, weights, logits_bytes // 4, axis)
    return total, weights.sum()


def init_params(
    config: LlamaConfig,
    *,
    seed: int | Array = 0,
    store: Callable[[Any], Any] = lambda params: params,
) -> dict[str, Any]:
    """The initial parameters, made and stored a layer at a time.

    They are those of `Llama(config, rngs=nnx.Rngs(seed))`. Under `jax.jit` at most one layer, or
    one of embedding and head, exists before `store` has seen it: 7B parameters that are stored in
    int8 never take more than their 6.4 GiB and one layer.

    Args:
        config: Shapes and options.
        seed: Decides the values: a number, or ``jax.random.key`` of it.
        store: Maps parts of the parameters, nested dicts, to the form they are kept in, such as
            `memopt.quantize_params`.

    Returns:
        The parameters as nested dicts, with a leading axis of layers in `"blocks"`.

    Example:
        >>> import memopt
        >>> params = jax.jit(lambda: init_params(preset("tiny"), store=memopt.quantize_params))()
        >>> params["blocks"]["mlp"]["gate"]["kernel"].codes.shape
        (4, 192, 512)

    """
    embed, keys, final_norm, head = _parts(config, nnx.Rngs(seed))
    pure = lambda module: nnx.to_pure_dict(nnx.state(module, nnx.Param))
    parts = {"embed": embed, "final_norm": final_norm, "head": head}
    ends = {name: pure(part) for name, part in parts.items() if part is not None}

    def layer(key: Array) -> Any:
        return store({"blocks": pure(Block(config, rngs=nnx.Rngs(key)))})["blocks"]

    return store(ends) | {"blocks": jax.lax.map(layer, keys)}


def abstract_model(config: LlamaConfig) -> Llama:
    """The model with shapes in place of arrays: costs nothing, whatever the size.

    Args:
        config: Shapes and options.

    Returns:
        A `Llama` whose parameters are `jax.ShapeDtypeStruct`.

    Example:
        >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract_model(preset("7b")))))
        6738415616

    """
    return nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))


def abstract_params(config: LlamaConfig, mesh: jax.sharding.Mesh | None = None) -> dict[str, Any]:
    """The shapes of the parameters.

    Args:
        config: Shapes and options.
        mesh: Places them as `param_shardings` says. None: the shapes have no shardings.

    Returns:
        The parameters as nested dicts, of `jax.ShapeDtypeStruct`.

    Example:
        >>> abstract_params(preset("tiny"))["blocks"]["mlp"]["gate"]["kernel"].shape
        (4, 192, 512)

    """
    model = abstract_model(config)
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if mesh is None:
        return shapes
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(place, shapes, param_shardings(model, mesh))


def count_block_params(config: LlamaConfig) -> int:
    """Counts the parameters without those of the embedding and the head: the N of scaling laws.

    Args:
        config: Shapes and options.

    Example:
        >>> count_block_params(preset("130m"))
        84953856

    """
    parts = [x for name, x in abstract_params(config).items() if name not in ("embed", "head")]
    return sum(x.size for x in jax.tree.leaves(parts))


def build_model(config: LlamaConfig, params: Mapping[str, Any]) -> Llama:
    """The model with given parameters. It reads quantised blocks one at a time.

    Args:
        config: Shapes and options.
        params: Nested dict of arrays or quantised parameters; those outside of the blocks are
            decoded.

    Example:
        >>> build_model(preset("tiny"), init_params(preset("tiny"))).config.num_layers
        4

    """
    graphdef, _ = nnx.split(abstract_model(config), nnx.Param)
    rest = {name: part for name, part in params.items() if name != "blocks"}
    return nnx.merge(graphdef, {**params, **dequantize_params(rest)})


def stacked_model(config: LlamaConfig, *, logits_bytes: int = LOGITS_BYTES) -> StackedModel:
    """The model as three functions of its parameters as nested dicts.

    They are to be called with no Explicit mesh in scope; together they compute `loss`. A block is
    not rematerialised, whatever `config.remat` says: whoever walks the blocks decides.

    Args:
        config: Shapes and options.
        logits_bytes: As in `loss`.

    Returns:
        Embedding, block, and head with its loss.

    Example:
        >>> config = preset("tiny")
        >>> params = nnx.to_pure_dict(nnx.state(Llama(config, rngs=nnx.Rngs(0)), nnx.Param))
        >>> tokens = jnp.zeros((1, 8), jnp.int32)
        >>> stacked_model(config).embed(params, {"inputs": tokens}).shape
        (1, 8, 192)

    """
    abstract = abstract_model(config)
    graphdef, params = nnx.split(abstract, nnx.Param)
    run_block, _ = abstract.block_function()
    # Parameters that are not given stay shapes: the embedding needs no head.
    model = lambda rest: nnx.merge(graphdef, nnx.to_pure_dict(params) | rest)

    def block(params: Any, x: Array, batch: Batch) -> Array:
        segments, positions = batch.get("segment_ids"), batch.get("positions")
        return run_block(params, x, abstract.context(x.shape[1], segments, positions))

    embed = lambda rest, batch: model(rest).embed_tokens(batch["inputs"])
    head = lambda rest, x, batch: head_loss(model(rest), x, batch, logits_bytes=logits_bytes)
    in_parts = ("embed/embedding", *([] if config.tied else ["head/kernel"]))
    return StackedModel(embed, block, head, in_parts)


def from_hugging_face(
    directory: str | os.PathLike[str],
    *,
    mesh: jax.sharding.Mesh | None = None,
    param_dtype: DType | None = None,
    dtype: DType = "float32",
    remat: Remat = "none",
) -> Llama:
    """A model from a Hugging Face directory: `config.json` and one or many safetensors.

    LLaMA, Mistral, Qwen2, Qwen3 and Gemma (the first); docs/hugging_face.md has their options.

    Args:
        directory: As written by transformers 4 or 5, or by `to_hugging_face`.
        mesh: Places the parameters as `param_shardings` says, each device reading its own part.
            None: the default device.
        param_dtype: Type to store the parameters in. None: as in the files.
        dtype: Type to compute in.
        remat: See `LlamaConfig`.

    Returns:
        The model. Of weights that `memopt export --quantized` wrote, the blocks stay quantised and
        are read one at a time.

    Raises:
        ValueError: If a file or tensor is missing, unexpected, damaged or of another shape, if the
            weights are pickled, or if no `LlamaConfig` describes the model.

    Example:
        >>> import tempfile
        >>> model = Llama(preset("tiny"), rngs=nnx.Rngs(0))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     to_hugging_face(model, directory)
        ...     loaded = from_hugging_face(directory)
        >>> loaded.config == model.config
        True

    """
    read = read_hugging_face(
        directory, mesh=mesh, param_dtype=param_dtype, dtype=dtype, remat=remat
    )
    return build_model(*read)


def read_hugging_face(
    directory: str | os.PathLike[str],
    *,
    mesh: jax.sharding.Mesh | None = None,
    param_dtype: DType | None = None,
    dtype: DType = "float32",
    remat: Remat = "none",
) -> tuple[LlamaConfig, dict[str, Any]]:
    """The configuration and the parameters that `from_hugging_face` makes a model of.

    Its arguments and errors are those of `from_hugging_face`.

    Returns:
        The configuration; and nested dicts of arrays or, where the directory is quantised, of
        quantised parameters.

    """
    directory = Path(directory)
    config = hugging_face.read_config(directory)
    tensors = hugging_face.open_tensors(directory)
    codec = hugging_face.read_codec(directory)
    stored = param_dtype or config.param_dtype
    config = dataclasses.replace(config, param_dtype=stored, dtype=dtype, remat=remat)
    shapes = abstract_params(config, mesh)
    shapes = quantize_params(shapes, codec) if codec else shapes
    shardings = jax.tree.map(lambda x: x.sharding, shapes) if mesh else None
    return config, hugging_face.read_params(directory, tensors, shapes, shardings)


def to_hugging_face(
    model: Llama, directory: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write `config.json` and safetensors that transformers loads, in the layout of their family.

    The directory appears complete or not at all: an earlier export in its place stays until the
    new one is written, and its other files (a tokenizer) are kept.

    Args:
        model: The model; its parameters are written in their own type.
        directory: New, empty, or an earlier export.
        max_shard_bytes: Size at which a new file is begun; with more than one, an index is added.

    Raises:
        ValueError: If the directory holds something that is not a model, or if no family of
            Hugging Face has the model's options.

    """
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    hugging_face.write(Path(directory), model.config, params, max_shard_bytes, replace=True)
