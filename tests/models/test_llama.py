"""The model against the recorded Hugging Face run, and its options against each other."""

import dataclasses
from operator import itemgetter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import memopt
from memopt.models.llama import Llama, abstract_model, head_loss, init_params, loss, preset
from tests.models.examples import SMALL, by_name, init, logits, mean_loss, split, value_and_grad


def packed(rows=2, length=12, vocab=64):
    """Two documents a row, then padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (rows, length + 1), dtype=np.int32)
    lengths = [5, length - 7, 2]
    segments = np.repeat([1, 2, 0], lengths)
    row = np.concatenate([np.arange(n) for n in lengths])
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.tile(segments, (rows, 1)).astype(np.int32),
        "positions": np.tile(row, (rows, 1)).astype(np.int32),
        "weights": np.tile(segments > 0, (rows, 1)).astype(np.int32),
    }


def test_logits_and_loss_are_the_recorded_ones(recorded):
    np.testing.assert_allclose(
        logits(recorded["model"], recorded["token_ids"]), recorded["logits"], atol=1e-5
    )
    total, count = nnx.jit(loss)(recorded["model"], recorded["batch"])
    assert int(count) == 62
    np.testing.assert_allclose(total / count, recorded["loss"], rtol=1e-6)


@pytest.mark.parametrize("logits_bytes", [2**27, 2 * 4 * 256 * 7])
def test_every_gradient_is_the_recorded_one(recorded, logits_bytes):
    model = split(recorded["model"])
    ours = by_name(value_and_grad(*model, recorded["batch"], logits_bytes=logits_bytes)[1])
    assert ours.keys() == recorded["gradients"].keys()
    for name, theirs in recorded["gradients"].items():
        error = np.linalg.norm(ours[name] - theirs) / np.linalg.norm(theirs)
        assert error <= 1e-5, name


def test_parameter_names_shapes_and_axes():
    state = nnx.to_flat_state(nnx.state(abstract_model(SMALL), nnx.Param))
    found = {"/".join(path): (param.shape, param.axes) for path, param in state}
    block = {
        "attention_norm/scale": ((2, 32), ("layers", None)),
        "attention/q/kernel": ((2, 32, 32), ("layers", "embed", "heads")),
        "attention/k/kernel": ((2, 32, 16), ("layers", "embed", "kv_heads")),
        "attention/v/kernel": ((2, 32, 16), ("layers", "embed", "kv_heads")),
        "attention/o/kernel": ((2, 32, 32), ("layers", "heads", "embed")),
        "mlp_norm/scale": ((2, 32), ("layers", None)),
        "mlp/gate/kernel": ((2, 32, 48), ("layers", "embed", "mlp")),
        "mlp/up/kernel": ((2, 32, 48), ("layers", "embed", "mlp")),
        "mlp/down/kernel": ((2, 48, 32), ("layers", "mlp", "embed")),
    }
    assert found == {f"blocks/{name}": value for name, value in block.items()} | {
        "embed/embedding": ((64, 32), ("vocab", "embed")),
        "final_norm/scale": ((32,), (None,)),
        "head/kernel": ((32, 64), ("embed", "vocab")),
    }


def test_initial_values_are_normal_and_differ_between_layers():
    params = split(init(preset("tiny")))[1]
    gate = params["blocks"]["mlp"]["gate"]["kernel"]
    assert abs(gate.std() - 0.02) < 1e-4
    assert abs(params["embed"]["embedding"].std() - 0.02) < 5e-4
    assert not np.array_equal(gate[0], gate[1])
    assert (params["final_norm"]["scale"] == 1).all()


@pytest.mark.parametrize("name", ["model", "with_options"])
def test_packed_documents_do_not_see_each_other(request, name):
    batch, model = packed(), request.getfixturevalue(name)
    together = logits(model, batch["inputs"], batch["segment_ids"], batch["positions"])
    for start, stop in ((0, 5), (5, 10)):
        alone = logits(model, batch["inputs"][:, start:stop])
        np.testing.assert_allclose(together[:, start:stop], alone, atol=1e-5)


def test_only_weighted_targets_count(model):
    batch = packed()
    total, count = nnx.jit(loss)(model, batch)
    whole = logits(model, batch["inputs"], batch["segment_ids"], batch["positions"])
    losses = optax.softmax_cross_entropy_with_integer_labels(whole, batch["targets"])
    assert int(count) == 2 * 10
    np.testing.assert_allclose(total, losses[:, :10].sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("tied", "chunk"), [pytest.param(False, 1, marks=pytest.mark.slow), (True, 5)]
)
def test_chunks_change_neither_loss_nor_gradient(tied, chunk):
    model = split(init(dataclasses.replace(SMALL, tied=tied)))
    whole = value_and_grad(*model, packed())
    chunked = value_and_grad(*model, packed(), logits_bytes=2 * 4 * 64 * chunk)
    chex.assert_trees_all_close(chunked, whole, rtol=1e-5, atol=1e-7)


def test_chunked_logits_do_not_dominate_memory():
    config = dataclasses.replace(SMALL, vocab_size=32000)
    graphdef, params = nnx.split(abstract_model(config), nnx.Param)
    tokens = jax.ShapeDtypeStruct((4, 1024), jnp.int32)
    x = jax.ShapeDtypeStruct((4, 1024, 32), jnp.float32)

    def temporary_bytes(logits_bytes):
        def objective(params, x, targets):
            model, batch = nnx.merge(graphdef, params), {"targets": targets}
            return head_loss(model, x, batch, logits_bytes=logits_bytes)[0]

        lowered = jax.jit(jax.grad(objective, (0, 1))).lower(params, x, tokens)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    logits = 4 * 1024 * 32000 * 4
    assert temporary_bytes(2**40) > logits
    assert temporary_bytes(2**24) < 0.15 * logits


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        pytest.param("model", "dots", marks=pytest.mark.slow),
        pytest.param("model", "full", marks=pytest.mark.slow),
        pytest.param("with_options", "dots", marks=pytest.mark.slow),
        ("with_options", "full"),
    ],
)
def test_remat_does_not_change_the_gradient(request, name, remat):
    model = request.getfixturevalue(name)
    graphdef, params = split(model)
    again = split(abstract_model(dataclasses.replace(model.config, remat=remat)))[0]
    plain = value_and_grad(graphdef, params, packed())
    chex.assert_trees_all_close(
        value_and_grad(again, params, packed()), plain, rtol=1e-5, atol=1e-6
    )


def test_remat_policies_are_ordered_by_memory():
    batch = {name: jax.ShapeDtypeStruct((4, 256), jnp.int32) for name in ("inputs", "targets")}

    def temporary_bytes(remat):
        config = dataclasses.replace(preset("tiny"), remat=remat)
        graphdef, params = split(abstract_model(config))
        gradient = jax.grad(lambda params, batch: mean_loss(nnx.merge(graphdef, params), batch))
        compiled = jax.jit(gradient).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    none, dots, full = map(temporary_bytes, ("none", "dots", "full"))
    assert full < 0.9 * dots
    assert dots < 0.5 * none


def test_bfloat16_compute_stays_near_float32(recorded):
    params = split(recorded["model"])[1]
    config = dataclasses.replace(recorded["model"].config, dtype="bfloat16")
    graphdef = split(abstract_model(config))[0]
    half = nnx.merge(graphdef, params)
    ours = logits(half, recorded["token_ids"])
    assert ours.dtype == jnp.float32
    assert jax.eval_shape(half.hidden, recorded["token_ids"]).dtype == jnp.bfloat16
    np.testing.assert_allclose(ours, recorded["logits"], atol=0.1)
    gradient = value_and_grad(graphdef, params, recorded["batch"])[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_a_tied_head_is_the_embedding():
    model = init(dataclasses.replace(SMALL, tied=True))
    params = split(model)[1]
    assert "head" not in params
    untied = nnx.merge(
        split(abstract_model(SMALL))[0],
        params | {"head": {"kernel": params["embed"]["embedding"].T}},
    )
    tokens = packed()["inputs"]
    np.testing.assert_array_equal(logits(model, tokens), logits(untied, tokens))


def test_blocks_one_by_one_are_the_scanned_model(model):
    @nnx.jit
    def one_by_one(model, tokens):
        block, stacked = model.block_function()
        context = model.context(tokens.shape[1])
        x = model.embed_tokens(tokens)
        for layer in range(SMALL.num_layers):
            x = block(jax.tree.map(itemgetter(layer), stacked), x, context)
        return model.unembed(x)

    tokens = packed()["inputs"]
    np.testing.assert_allclose(one_by_one(model, tokens), logits(model, tokens), atol=1e-5)


def test_nnx_optimizer_trains_the_model():
    model, batch = init(SMALL), packed()
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, gradient = nnx.value_and_grad(lambda model: mean_loss(model, batch))(model)
        optimizer.update(model, gradient)
        return value

    values = [float(step(model, optimizer)) for _ in range(20)]
    assert values[-1] < 0.5 * values[0]


def test_a_donated_step_updates_in_place(model):
    graphdef, params = split(model)
    batch = packed()

    def step(params, batch):
        gradient = jax.grad(lambda params: mean_loss(nnx.merge(graphdef, params), batch))(params)
        return jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, params, gradient)

    compiled = jax.jit(step, donate_argnums=0).lower(params, batch).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert compiled.memory_analysis().alias_size_in_bytes == size


def test_a_sequence_longer_than_the_model_is_refused():
    model = init(dataclasses.replace(SMALL, max_seq_len=8))
    with pytest.raises(ValueError, match="9 tokens is longer than max_seq_len=8; shorten it or"):
        model(jnp.zeros((1, 9), jnp.int32))


@pytest.mark.parametrize(
    ("tied", "weights"), [(False, "int8"), pytest.param(True, None, marks=pytest.mark.slow)]
)
def test_parameters_made_by_layer_are_those_of_the_model(tied, weights):
    config = dataclasses.replace(preset("tiny"), tied=tied, param_dtype="bfloat16", num_layers=3)
    store = (lambda x: memopt.quantize_params(x, weights)) if weights else lambda x: x
    whole = lambda: nnx.to_pure_dict(nnx.state(Llama(config, rngs=nnx.Rngs(3)), nnx.Param))
    expected = jax.jit(lambda: store(whole()))()
    found = jax.jit(lambda: init_params(config, seed=3, store=store))()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_parameters_are_never_all_there_before_they_are_stored():
    """Temporaries are those of a few layers, not of all 24."""
    config = dataclasses.replace(preset("tiny"), num_layers=24)
    make = lambda: init_params(config, store=memopt.quantize_params)
    memory = jax.jit(make).lower().compile().memory_analysis()
    layer = 4 * (4 * 192**2 + 3 * 192 * 512)
    assert memory.temp_size_in_bytes < 8 * layer
