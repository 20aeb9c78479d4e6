"""Continue a prompt token by token, keeping keys and values of what was read."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from memopt.axis_types import on_auto_axes
from memopt.errors import check_at_least
from memopt.models.llama import Llama
from memopt.state.quantized_params import dequantize_params


def generate(
    model: Llama,
    prompt_ids: jax.typing.ArrayLike,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_ids: Sequence[int] = (),
    key: Array | None = None,
) -> Array:
    """Continue each prompt by `max_new_tokens` tokens.

    The prompt is read in one pass; then each token costs one pass over a cache of fixed size, all
    within one compiled loop, which ends when every row has ended.

    Args:
        model: The model.
        prompt_ids: Integers `(batch, seq)`, or `(seq,)` for a single prompt; all of one length.
        max_new_tokens: How many tokens to add.
        temperature: Divides the logits before sampling; 0 takes the most likely token.
        top_p: Samples among the likeliest tokens only, as few as have this probability together.
        eos_ids: Tokens that end a continuation; all positions after one hold the first of these.
        key: Random key for sampling; needed when `temperature` is above 0.

    Returns:
        int32 `(batch, seq + max_new_tokens)` (without `batch` if the prompt had none): prompts and
        continuations.

    Raises:
        ValueError: If the prompt is empty, the result would be longer than `max_seq_len`, the
            temperature is negative, `top_p` is not above 0 and at most 1, or sampling has no key.

    Example:
        >>> from memopt.models.llama import preset
        >>> model = Llama(preset("tiny"), rngs=nnx.Rngs(0))
        >>> generate(model, jnp.array([1, 2, 3]), 5).shape
        (8,)

    """
    prompt = jnp.atleast_2d(jnp.asarray(prompt_ids, jnp.int32))
    check_at_least("the length of prompt_ids", prompt.shape[1], 1)
    check_at_least("max_new_tokens", max_new_tokens, 1)
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(
            f"temperature is {temperature}; it must be 0, or positive with a random key."
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1.")
    keys = jax.random.split(jax.random.key(0) if key is None else key, max_new_tokens)
    ends = jnp.asarray(eos_ids, jnp.int32)
    ids = _generate(model, prompt, keys, jnp.float32(temperature), jnp.float32(top_p), ends)
    return ids.reshape(*jnp.shape(prompt_ids)[:-1], -1)


@nnx.jit
def _generate(model: Llama, *inputs: Array) -> Array:
    return on_auto_axes(_continue, (model, *inputs), like=jax.P())


def _continue(
    model: Llama, prompt: Array, keys: Array, temperature: Array, top_p: Array, eos_ids: Array
) -> Array:
    config, (batch, length), count = model.config, prompt.shape, len(keys)
    shape = (config.num_layers, 2, batch, length + count, config.num_kv_heads, config.head_dim)
    first = read(model, prompt, jnp.zeros(shape, config.dtype), 0)
    after_end = eos_ids[0] if eos_ids.size else 0
    tokens, ended = jnp.full((batch, count), after_end, jnp.int32), jnp.zeros(batch, bool)

    def goes_on(carry: Any) -> Array:
        number, _, ended, _ = carry
        return (number < count) & ~ended.all()

    def step(carry: Any) -> Any:
        number, tokens, ended, (logits, cache) = carry
        token = jnp.where(ended, after_end, _choose(logits, temperature, top_p, keys[number]))
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, number, 1)
        ended |= jnp.isin(token, eos_ids)
        return number + 1, tokens, ended, read(model, token[:, None], cache, length + number)

    _, tokens, _, _ = jax.lax.while_loop(goes_on, step, (jnp.int32(0), tokens, ended, first))
    return jnp.concatenate([prompt, tokens], axis=1)


def _choose(logits: Array, temperature: Array, top_p: Array, key: Array) -> Array:
    """The likeliest token at temperature 0, else a sample; `(batch,)`."""
    greedy = temperature == 0
    logits = logits / jnp.where(greedy, 1.0, temperature)
    logits = jax.lax.cond(top_p < 1, lambda x: _likeliest(x, top_p), lambda x: x, logits)
    sampled = jax.random.categorical(key, logits)
    return jnp.where(greedy, logits.argmax(-1), sampled).astype(jnp.int32)


def _likeliest(logits: Array, top_p: Array) -> Array:
    """Logits, with −∞ for tokens outside of the smallest set of probability `top_p`."""
    descending = jnp.sort(logits, descending=True)
    probabilities = jax.nn.softmax(descending)
    before = jnp.cumsum(probabilities, -1) - probabilities
    least = jnp.where(before < top_p, descending, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def read(model: Llama, token_ids: Array, cache: Array, offset: Array | int) -> tuple[Array, Array]:
    """Read tokens that follow what the cache holds.

    Args:
        model: The model.
        token_ids: Integers `(batch, seq)`.
        cache: Keys and values of the positions before `offset`, in all layers:
            `(layers, 2, batch, length, kv_heads, head_dim)`.
        offset: Position of the first token.

    Returns:
        float32 logits `(batch, vocab)` after the last token, and the cache with the tokens in it.

    Raises:
        ValueError: If the cache is longer than the model's `max_seq_len`.

    """
    positions = offset + jnp.arange(token_ids.shape[1])[None]
    context = model.context(cache.shape[3], positions=positions)
    graphdef, stacked = nnx.split(model.blocks, nnx.Param)

    def step(x: Array, layer: tuple[nnx.State, Array]) -> Any:
        params, cache = layer
        return nnx.merge(graphdef, dequantize_params(params))(x, context, cache, offset)

    x, cache = jax.lax.scan(step, model.embed_tokens(token_ids), (stacked, cache))
    return model.unembed(x[:, -1]), cache
