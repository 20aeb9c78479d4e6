"""The accelerator does what the CPU does; on a CPU these tests compare it with itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import memopt
from benchmarks.training_step import Options, TrainingStep
from memopt.models.attention import causal_attention
from memopt.state.codecs import named
from memopt.state.rounding import rounding_bits
from tests.training import nano

pytestmark = pytest.mark.device

CPU, DEVICE = jax.devices("cpu")[0], jax.devices()[0]
METHODS = ("adafactor", "apollo", "galore", "lion", "muon")


@pytest.fixture(autouse=True)
def exact_products():
    """Matrix products in float32, not in a GPU's tf32."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def nano_preset():
    nano.install()
    yield
    nano.remove()


def on(device, f, *args):
    """Runs a function on a device and returns numpy arrays."""
    with jax.default_device(device):
        return jax.tree.map(np.asarray, jax.jit(f)(*jax.device_put(args, device)))


def on_both(f, *args):
    return on(CPU, f, *args), on(DEVICE, f, *args)


def matrices(seed=0):
    """Parameters, or gradients, of a small model."""
    draw = np.random.default_rng(seed)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    return {"up": normal(3, 64, 128), "down": normal(3, 128, 64), "norm": normal(64)}


@pytest.mark.parametrize("kind", ["signed", "unsigned", "weights"])
@pytest.mark.parametrize("name", ["int8", "int4", "float8", "bfloat16"])
def test_codes_are_those_of_the_cpu_bit_for_bit(name, kind):
    codec = getattr(named(name), kind)
    x = np.exp(4 * matrices()["up"]) if kind == "unsigned" else matrices()["up"]

    def there_and_back(x):
        coded = codec.encode(x, rounding_bits(x.shape, "up", step=3))
        return coded.codes, coded.side_data, codec.decode(coded)

    expected, found = on_both(there_and_back, x)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_random_bits_are_those_of_the_cpu():
    expected, found = on_both(lambda step: rounding_bits((64, 128), "up", step), np.int32(7))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("stored", ["bfloat16", "int8", "bfloat16+8"])
def test_updates_too_small_for_a_code_add_up(stored):
    """A hundred steps of 1e-4 move weights of 1 by 0.01 on average."""
    with jax.default_device(DEVICE):
        w = {"w": jnp.ones((64, 256), jnp.bfloat16 if stored == "bfloat16" else jnp.float32)}
        w["w"] = w["w"].at[:, ::2].set(-1)  # codes of blocks of one number have no width
        start = memopt.dequantize_params(w)["w"].astype(jnp.float32)
        w = w if stored == "bfloat16" else memopt.quantize_params(w, stored)
        add = jax.jit(
            lambda w, i: memopt.apply_rounded_updates(w, {"w": jnp.full((64, 256), 1e-4)}, i)
        )
        for i in range(100):
            w = add(w, i)
        moved = memopt.dequantize_params(w)["w"].astype(jnp.float32) - start
        assert abs(float(moved.mean()) - 0.01) < 2e-4


@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_the_cpu(method, quantized):
    tx = memopt.optimizer(method, learning_rate=1e-2)
    if quantized:
        tx = memopt.quantize_state(tx)

    def train(params, gradients):
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params

    expected, found = on_both(train, matrices(0), matrices(1))
    # A code that is rounded the other way moves a number by an eighth of a step.
    tolerance = 5e-3 if quantized else 2e-5
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


@functools.cache
def trained(**options):
    """The losses of the first four steps of a nano LLaMA, and its last parameters."""
    whole = {"model": "nano", "optimizer": "adafactor", "dtype": "float32", "seq_len": 32}
    step = TrainingStep(Options(**whole | options, batch_size=2), [DEVICE])
    state, draw = step.compile_init()(), np.random.default_rng(0)
    found = []
    for _ in range(4):
        tokens = draw.integers(0, 100, (2, 33), np.int32)
        batch = step.place({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]})
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    return found, memopt.dequantize_params(state.params)


@pytest.mark.usefixtures("nano_preset")
def test_a_released_step_is_the_ordinary_one():
    expected, found = trained(), trained(release=True)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, found[1], expected[1])


@pytest.mark.usefixtures("nano_preset")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_released_step_of_quantized_weights_follows_float32(weights):
    found = trained(release=True, weights=weights, state="int8")
    np.testing.assert_allclose(found[0], trained()[0], rtol=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_a_mesh_of_one_device_changes_nothing(method):
    tx, params = memopt.optimizer(method, learning_rate=1e-2), jax.device_put(matrices(), DEVICE)
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,), devices=[DEVICE])
    here = NamedSharding(mesh, jax.P("fsdp"))
    placed = jax.device_put(params, here)
    states = jax.jit(tx.init)(params), memopt.init_sharded(tx, placed)
    jax.tree.map(np.testing.assert_array_equal, *states)
    expected = jax.jit(tx.update)(params, states[0], params)[0]
    with jax.set_mesh(mesh):
        found = jax.jit(tx.update)(placed, states[1], placed)[0]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("segments", [False, True], ids=["one document", "packed documents"])
def test_attention_as_trained_is_that_in_chunks(segments, window):
    """Runs cuDNN's on a GPU, in bfloat16."""
    draw = np.random.default_rng(0)
    normal = lambda heads: jnp.asarray(draw.normal(size=(2, 640, heads, 64)), jnp.bfloat16)
    query, key, value = jax.device_put((normal(4), normal(2), normal(2)), DEVICE)
    ids = jnp.asarray(np.sort(draw.integers(0, 4, (2, 640))), jnp.int32) if segments else None

    def run(attention):
        weighted = lambda *qkv: (attention(*qkv, ids, window=window).astype(jnp.float32) ** 2).sum()
        f = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2)))
        compiled = f.lower(query, key, value).compile()
        return compiled(query, key, value), compiled.as_text()

    in_chunks = functools.partial(causal_attention, chunked=True)
    (found, program), (expected, _) = run(causal_attention), run(in_chunks)
    assert ("__cudnn$fmha" in program) == (DEVICE.platform == "gpu")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) <= 0.02 * np.linalg.norm(b)
