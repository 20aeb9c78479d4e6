"""Generation with a cache says what the model without one says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from memopt.models.generate import generate, read
from memopt.models.llama import from_hugging_face
from tests.models.examples import SMALL, init, logits

PROMPT = np.array([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]], np.int32)


def greedy(model, tokens, count):
    """Each token from a pass over all before it; causal, so what is still zero does not matter."""
    start = tokens.shape[1]
    tokens = np.pad(tokens, [(0, 0), (0, count)])
    for end in range(start, start + count):
        tokens[:, end] = logits(model, tokens)[:, end - 1].argmax(-1)
    return tokens


@pytest.mark.parametrize("count", [1, 4])
def test_greedy_continuation_is_the_uncached_one(recorded, count):
    ours = generate(recorded["model"], PROMPT, count)
    np.testing.assert_array_equal(ours, greedy(recorded["model"], PROMPT, count))
    assert len(np.unique(ours[:, 5:])) > 1 or count == 1


def test_windows_and_other_options_hold_in_the_cache(with_options):
    """The window of 3 is shorter than the prompt of 5, and than the 4 tokens that follow."""
    tokens = np.random.default_rng(0).integers(0, 64, (2, 9), dtype=np.int32)
    expected = logits(with_options, tokens)
    config, step = with_options.config, nnx.jit(read)
    shape = (config.num_layers, 2, *tokens.shape, config.num_kv_heads, config.head_dim)
    found, cache = step(with_options, tokens[:, :5], jnp.zeros(shape), 0)
    np.testing.assert_allclose(found, expected[:, 4], atol=1e-5)
    for position in range(5, 9):
        found, cache = step(with_options, tokens[:, position, None], cache, position)
        np.testing.assert_allclose(found, expected[:, position], atol=1e-5)


@pytest.mark.parametrize(
    "axis_type", [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit]
)
def test_a_split_model_generates_the_same(recorded, recorded_directory, axis_type):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(axis_type,) * 3)
    model = from_hugging_face(recorded_directory, mesh=mesh)
    with jax.set_mesh(mesh):
        ours = generate(model, PROMPT, 4)
    np.testing.assert_array_equal(ours, generate(recorded["model"], PROMPT, 4))


def test_a_prompt_without_a_batch(recorded):
    alone = generate(recorded["model"], PROMPT[0], 3)
    np.testing.assert_array_equal(alone, generate(recorded["model"], PROMPT, 3)[0])


def test_samples_follow_the_models_probabilities(model):
    """1500 first tokens against the softmax at that temperature."""
    temperature, prompt = 2.0, np.tile(PROMPT[:1], (1500, 1))
    samples = generate(model, prompt, 1, temperature=temperature, key=jax.random.key(0))[:, -1]
    expected = jax.nn.softmax(logits(model, PROMPT[:1])[0, -1] / temperature)
    counts = np.bincount(samples, minlength=64)
    chi_square = ((counts - 1500 * expected) ** 2 / (1500 * expected)).sum()
    assert chi_square < 63 + 4 * np.sqrt(2 * 63)


def test_top_p_leaves_out_the_unlikely_tokens(model):
    temperature, prompt = 2.0, np.tile(PROMPT[:1], (1500, 1))
    probabilities = np.asarray(jax.nn.softmax(logits(model, PROMPT[:1])[0, -1] / temperature))
    likeliest = np.argsort(-probabilities)
    count = int((np.cumsum(probabilities[likeliest]) < 0.5).sum()) + 1
    options = {"temperature": temperature, "key": jax.random.key(0)}
    samples = generate(model, prompt, 1, top_p=0.5, **options)[:, -1]
    assert 1 < count < 64
    assert set(samples.tolist()) == set(likeliest[:count].tolist())
    expected = probabilities[likeliest[:count]] / probabilities[likeliest[:count]].sum()
    counts = np.bincount(samples, minlength=64)[likeliest[:count]]
    chi_square = ((counts - 1500 * expected) ** 2 / (1500 * expected)).sum()
    assert chi_square < count + 4 * np.sqrt(2 * count)
    least = generate(model, PROMPT, 3, top_p=1e-6, temperature=1.0, key=jax.random.key(0))
    np.testing.assert_array_equal(least, generate(model, PROMPT, 3))


def test_after_an_end_token_there_are_only_end_tokens(model):
    draw = functools.partial(generate, model, PROMPT, 8, temperature=3.0, key=jax.random.key(1))
    free = np.asarray(draw())
    ends = [int(free[0, 7]), int(free[0, 9])]  # of the first row, whose second end is not reached
    assert not set(free[0, 5:7]) & set(ends)
    ended = np.asarray(draw(eos_ids=ends))
    np.testing.assert_array_equal(ended[0], [*free[0, :8], *[ends[0]] * 5])
    other = [*free[1]]
    first = next((i for i in range(5, 13) if other[i] in ends), 13)
    np.testing.assert_array_equal(ended[1], [*other[: first + 1], *[ends[0]] * (12 - first)][:13])


def test_the_key_decides_the_sample(model):
    draw = lambda seed: generate(model, PROMPT, 8, temperature=1.0, key=jax.random.key(seed))
    np.testing.assert_array_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0), draw(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"prompt_ids": np.zeros((1, 0))}, "the length of prompt_ids must be at least 1, got 0"),
        ({"temperature": 1.0}, "temperature is 1.0; it must be 0, or positive with a random key"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 12}, "17 tokens is longer than max_seq_len=16"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    model = init(dataclasses.replace(SMALL, max_seq_len=16))
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompt_ids": jnp.asarray(PROMPT), "max_new_tokens": 2, **arguments})
