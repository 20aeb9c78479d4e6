"""Inverse factors against the authors' code, against inverses, and what layers report."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from benchmarks.extra_arguments import statistics_of
from memopt.transforms.kronecker import rank_one
from tests.yardstick import yardstick

TABLES = Path(yardstick.HERE, "tables")
LAYERS = ("l1", "l2")


def recorded(name):
    """A recording of the authors' MKOR on an MLP of two layers, and its hyperparameters."""
    info = json.loads((TABLES / "info.json").read_text())[name]
    with np.load(TABLES / f"{name}.npz") as table:
        return dict(table), info["hyperparameters"]


def rows(kind, table, step):
    """A kernel and its bias, of each layer, in one matrix stored as (inputs and one, outputs)."""
    parts = ([table[f"{kind}/{layer}.{x}@{step}"] for x in ("weight", "bias")] for layer in LAYERS)
    return {layer: np.vstack([w.T, b]) for layer, (w, b) in zip(LAYERS, parts, strict=True)}


def seen(table, step, clip):
    """The statistics of both layers; the code bounds them token by token."""
    mean = lambda x: np.clip(x, -clip, clip).mean(0)
    with_ones = lambda x: np.hstack([x, np.ones((len(x), 1))])
    return {
        layer: memopt.LayerStatistics(
            mean(with_ones(table[f"input{i}@{step}"])), mean(table[f"outgrad{i}@{step}"]), 1.0
        )
        for i, layer in enumerate(LAYERS)
    }


def parts_summed(u):
    """The norm of a kernel plus that of its bias, as the code rescales."""
    return np.linalg.norm(u[:-1]) + np.linalg.norm(u[-1])


@pytest.mark.parametrize("name", ["mkor_mlp_inv1", "mkor_mlp_inv3", "mkor_mlp_inv1_large"])
def test_factors_and_updates_are_those_of_the_authors_code(name):
    table, options = recorded(name)
    matrices = lambda name, p: memopt.Matrix()
    tx = memopt.scale_by_kronecker_inverses(
        refresh_every=options["inv_freq"],
        clip_value=options["clipping_value"],
        as_released=True,
        matrices=matrices,
    )
    momentum = optax.trace(options["momentum"])
    weights = rows("w", table, 0)
    state, trace = tx.init(weights), momentum.init(weights)
    update = jax.jit(lambda g, state, seen: tx.update(g, state, statistics=seen))
    steps = sorted({int(key.split("@")[1]) for key in table if key.startswith("x@")})
    for step in steps:
        if (step - 1) % options["inv_freq"] == 0:
            statistics = seen(table, step, options["clipping_value"])
        gradients = rows("grad", table, step)
        updates, state = update(gradients, state, statistics)
        updates = jax.tree.map(
            lambda u, g: u * parts_summed(g) / parts_summed(u), updates, gradients
        )
        moved, trace = momentum.update(updates, trace)
        weights = jax.tree.map(lambda w, u: w - options["lr"] * u, weights, moved)
        pre, after = rows("pre", table, step), rows("w", table, step)
        for i, layer in enumerate(LAYERS):
            for factor, side in ((state.inputs, "A"), (state.outputs, "G")):
                np.testing.assert_allclose(factor[layer], table[f"{side}{i}@{step}"], atol=1e-6)
            for found, expected in ((updates, pre), (weights, after)):
                scale = np.abs(expected[layer]).max()
                np.testing.assert_allclose(found[layer], expected[layer], atol=2e-5 * scale)


@pytest.mark.parametrize("decay", [0.95, 0.5])
def test_the_rank_one_update_is_the_inverse_in_float64(decay):
    rng = np.random.default_rng(0)
    a, v = rng.normal(size=(3, 8, 8)), rng.normal(size=(3, 8))
    factor = a @ a.swapaxes(1, 2) + np.eye(8)
    expected = np.linalg.inv(decay * factor + (1 - decay) * v[:, :, None] * v[:, None])
    with jax.enable_x64(True):
        found = np.asarray(rank_one(jnp.asarray(np.linalg.inv(factor)), jnp.asarray(v), decay))
    assert np.abs(found - expected).max() <= 1e-13 * np.abs(expected).max()


@pytest.mark.parametrize("as_released", [False, True])
def test_factors_stay_positive_definite_and_bounded(as_released):
    """Ten thousand updates, with large, small and repeated vectors, and none."""
    tx = memopt.scale_by_kronecker_inverses(refresh_every=1, as_released=as_released)
    params = {"w": jnp.zeros((3, 12, 16))}

    def step(state, t):
        key = jax.random.fold_in(jax.random.key(0), t)
        a, b = jax.random.normal(key, (3, 12)), jax.random.normal(key, (3, 16))
        fixed = jnp.array([1.0, 0.0, 0.03])[:, None]  # the part that is the same in all steps
        size = 10.0 ** (jnp.array([6, -6, 0]) * (t % 7 < 4))[:, None]
        a = jnp.where(t % 100 < 50, size * (fixed + a), 0.0)
        seen = memopt.LayerStatistics(a, size * (fixed + b) * (t % 3), jnp.ones(3))
        return tx.update(params, state, statistics={"w": seen})[1], None

    run = jax.jit(lambda: jax.lax.scan(step, tx.init(params), jnp.arange(10_000))[0])
    state = run()
    for factor in (state.inputs["w"], state.outputs["w"]):
        values = np.linalg.eigvalsh(np.asarray(factor, np.float64))
        assert values.min() > 0
        assert values.max() < 2.2 * factor.shape[-1]
        np.testing.assert_array_equal(factor, factor.swapaxes(1, 2))


def test_a_matrix_without_gradient_or_tokens_is_left_as_it_is():
    tx = memopt.mkor(0.1, refresh_every=1)
    params = {"w": jnp.ones((2, 4, 6))}
    g = {"w": jnp.ones((2, 4, 6)).at[0].set(0)}
    nothing = jax.tree.map(jnp.zeros_like, statistics_of(g))
    state = tx.init(params)
    for statistics in (nothing, statistics_of(g)):
        updates, state = tx.update(g, state, params, statistics=statistics)
        assert not updates["w"][0].any()
        assert jnp.abs(updates["w"][1]).min() > 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_what_is_missing_is_named():
    params = {"up": {"kernel": jnp.ones((4, 6))}, "norm": {"scale": jnp.ones(4)}}
    tx = memopt.mkor(0.1)
    state, seen = tx.init(params), statistics_of(params)
    with pytest.raises(ValueError, match="must have a LayerStatistics for 'up/kernel'"):
        tx.update(params, state, params)
    wrong = jax.tree.map(lambda x: x[..., None], seen)
    with pytest.raises(ValueError, match=r"statistics of 'up/kernel' must have inputs, .* shapes"):
        tx.update(params, state, params, statistics=wrong)
    tx.update(params, state, params, statistics={"up/kernel": seen["up"]["kernel"]})
    by_name = memopt.optimizer("mkor", 0.1)
    with pytest.raises(ValueError, match="'mkor' needs statistics, what each layer saw"):
        by_name.update(params, state, params)
    hybrid = memopt.mkor(0.1, hybrid=True)
    with pytest.raises(ValueError, match="value, the loss of this step, must be given"):
        hybrid.update(params, hybrid.init(params), params, statistics=seen)
    for options in ({"decay": 1.0}, {"blend": 0.0}, {"refresh_every": 0}, {"max_entry": 0.5}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            memopt.mkor(0.1, **options)
    with pytest.raises(ValueError, match="momentum must be left out, since inner"):
        memopt.mkor(0.1, inner=optax.identity(), momentum=0.5)
    with pytest.raises(ValueError, match="blend must be left out, since the released code"):
        memopt.mkor(0.1, as_released=True, blend=0.5)


# Statistics from layers: of plain functions, of a scanned stack, and of modules.


def mlp(params, statistics, x):
    hidden = jnp.tanh(memopt.observe(statistics["l1"], x, x @ params["l1"]))
    return memopt.observe(statistics["l2"], hidden, hidden @ params["l2"])


def test_layers_report_what_the_authors_code_records():
    table, _ = recorded("mkor_mlp_inv1")
    params = {layer: rows("w", table, 0)[layer] for layer in LAYERS}
    kernels = {layer: jnp.asarray(w[:-1]) for layer, w in params.items()}
    matrices = lambda name, p: memopt.Matrix()

    def loss(kernels, zeros):
        x, y = jnp.asarray(table["x@1"]), table["y@1"]
        for i, layer in enumerate(LAYERS):
            out = memopt.observe(zeros[layer], x, x @ kernels[layer] + params[layer][-1])
            x = table["input1@1"] if i == 0 else out  # whatever stands between the layers
            x = out + jax.lax.stop_gradient(x - out) if i == 0 else x
        return jnp.square(x - y).mean()

    zeros = memopt.zero_statistics(kernels, matrices=matrices)
    found = jax.grad(loss, argnums=1)(kernels, zeros)
    for i, layer in enumerate(LAYERS):
        mean = found[layer].inputs / found[layer].tokens
        np.testing.assert_allclose(mean, table[f"input{i}@1"].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        found["l2"].outputs, table["outgrad1@1"].mean(0), rtol=1e-4, atol=1e-6
    )


def test_a_scanned_stack_reports_as_layers_by_themselves():
    keys = jax.random.split(jax.random.key(0), 2)
    stack, x = jax.random.normal(keys[0], (4, 6, 6)) / 3, jax.random.normal(keys[1], (2, 5, 6))

    def layer(x, part):
        w, zeros = part
        return jnp.tanh(memopt.observe(zeros, x, x @ w)), None

    def scanned(params, zeros):
        one = jax.checkpoint(layer)
        return jnp.square(jax.lax.scan(one, x, (params["w"], zeros["w"]))[0]).mean()

    def alone(params, zeros):
        y = x
        for i in range(4):
            y, _ = layer(y, (params[i]["w"], zeros[i]["w"]))
        return jnp.square(y).mean()

    params = {"w": stack}
    layers = [{"w": w} for w in stack]
    gradient = lambda loss, params: jax.jit(jax.grad(loss, (0, 1)))(
        params, memopt.zero_statistics(params)
    )
    g, found = gradient(scanned, params)
    each, expected = gradient(alone, layers)
    for i in range(4):
        np.testing.assert_allclose(g["w"][i], each[i]["w"], rtol=1e-5, atol=1e-7)
        for a, b in zip(found["w"], expected[i]["w"], strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-7)
    assert found["w"].tokens.tolist() == [10] * 4
    # The sum of a layer's output gradients is the gradient of its bias.
    bias = jax.grad(lambda b: jnp.square(jnp.tanh(b + y @ stack[3])).mean())
    y = x
    for w in stack[:3]:
        y = jnp.tanh(y @ w)
    np.testing.assert_allclose(found["w"].outputs[3], bias(jnp.zeros(6)), rtol=1e-4, atol=1e-6)


def test_factors_are_not_rounded_by_quantize_state():
    """In bfloat16 they were infinite after some hundred steps."""
    tx = memopt.quantize_state(memopt.mkor(0.1, refresh_every=1), "int8", min_size=0)
    arrays = jax.tree.leaves(tx.init({"w": jnp.ones((32, 64))}).codes)
    assert {x.shape for x in arrays if x.dtype == jnp.int8} == {(32, 64)}
    shapes = {x.shape for x in arrays if x.dtype == jnp.float32}
    assert shapes == {(32, 32), (64, 64)}


def test_inputs_that_are_not_rows_of_their_matrix_are_refused():
    zeros = memopt.zero_statistics({"hidden": jnp.ones((8, 4))})["hidden"]
    x = jnp.ones((6, 4))  # of a kernel stored as (out, in)
    gradient = jax.grad(lambda zeros: memopt.observe(zeros, x, jnp.ones((6, 8))).sum())
    with pytest.raises(ValueError, match=r"rows and the columns of their matrix, 8 numbers"):
        gradient(zeros)
