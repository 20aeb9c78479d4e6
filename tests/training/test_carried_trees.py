"""Blocks pass on any tree, with keys for dropout and auxiliary losses."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt.models.stacked import StackedModel
from memopt.training import Checkpoints, evaluate, init_state, release_step, train_step

DIM, LAYERS, ROWS = 8, 3, 16
RATE = optax.constant_schedule(1e-2)
RNG = jax.random.key(7)


def embed(rest, batch):
    """A tree of every kind of leaf; "sum" is a Python number, "rng" only there for training."""
    start = {"x": batch["x"] @ rest["in"], "sum": 0.0, "blocks": jnp.int32(0)}
    return start | {"mask": batch["x"] > 0, "rng": batch.get("rng")}


def block(layer, x, batch):
    h = jnp.where(x["mask"], jnp.tanh(x["x"] @ layer["w"]), 0.1 * x["x"])
    new = x | {"sum": x["sum"] + jnp.square(h).mean(), "blocks": x["blocks"] + 1}
    if x["rng"] is not None:
        new["rng"], own = jax.random.split(x["rng"])
        h = jnp.where(jax.random.bernoulli(own, 0.5, h.shape), 2 * h, 0)
    return new | {"x": x["x"] + h @ layer["w"].T + layer["bias"]}


def head(rest, x, batch):
    """The squared error of some rows, and a tenth of the mean of all blocks' auxiliary losses."""
    error = jnp.square(x["x"] @ rest["out"] - batch["y"]) * batch["weights"]
    tokens = batch["weights"].sum()
    return error.sum() + 0.1 * x["sum"] / x["blocks"] * tokens, tokens


MODEL = StackedModel(embed, block, head)


def make_params():
    keys = iter(jax.random.split(jax.random.key(0), 4))
    normal = lambda *shape: 0.3 * jax.random.normal(next(keys), shape)
    blocks = {"w": normal(LAYERS, DIM, DIM), "bias": normal(LAYERS, DIM)}
    return {"in": normal(DIM, DIM), "blocks": blocks, "out": normal(DIM)}


def make_batch(seed):
    x, y, weights = jax.random.split(jax.random.key(seed), 3)
    return {
        "x": jax.random.normal(x, (ROWS, DIM)),
        "y": jax.random.normal(y, (ROWS,)),
        "weights": jax.random.bernoulli(weights, 0.7, (ROWS,)).astype(jnp.float32),
    }


def make_step(release=False, tx=None, model=MODEL, **options):
    """Returns the ordinary or the released step of the same model, jitted."""
    tx = optax.adam(RATE) if tx is None else tx
    step = functools.partial(release_step, model=model) if release else train_step
    options |= {} if release else {"loss": model.loss}
    return jax.jit(functools.partial(step, tx=tx, learning_rate=RATE, **options))


def train(steps=5, params=None, tx=None, **options):
    tx = optax.adam(RATE) if tx is None else tx
    state = init_state(make_params() if params is None else params, tx)
    step = make_step(tx=tx, **options)
    for seed in range(steps):
        state, metrics = step(state, make_batch(seed))
    return state, metrics


def assert_same(a, b):
    chex.assert_trees_all_close(*jax.device_get((a, b)), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(*jax.device_get((a[0].params, b[0].params)), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("rng", "accumulation"),
    [
        pytest.param(None, 1, id="evaluation-1"),
        pytest.param(RNG, 4, id="dropout-4"),
        pytest.param(None, 4, id="evaluation-4", marks=pytest.mark.slow),
        pytest.param(RNG, 1, id="dropout-1", marks=pytest.mark.slow),
    ],
)
def test_released_steps_are_the_ordinary_ones(rng, accumulation):
    ordinary, released = (train(release=r, rng=rng, accumulation=accumulation) for r in (0, 1))
    assert_same(ordinary, released)


def test_dropout_and_the_auxiliary_loss_reach_the_gradient():
    """Else the other tests would show nothing."""
    options = {"release": True, "steps": 1, "tx": optax.sgd(0.1)}
    plain, _ = train(**options)
    dropped, _ = train(rng=RNG, **options)
    without = MODEL._replace(head=lambda rest, x, batch: head(rest, x | {"sum": 0.0}, batch))
    no_aux, _ = train(model=without, **options)
    weights = lambda state: state.params["blocks"]["w"]
    assert abs(weights(dropped) - weights(plain)).max() > 1e-4
    assert abs(weights(no_aux) - weights(plain)).max() > 1e-4


@pytest.mark.parametrize("release", [False, True])
def test_a_sum_that_begins_as_a_python_number_is_float32_whatever_is_added(release):
    def narrow(layer, x, batch):
        return block(layer, x, batch) | {"sum": x["sum"] + jnp.bfloat16(1)}

    model = MODEL._replace(block=narrow, head=lambda rest, x, batch: (x["sum"], 1))
    _, metrics = train(release=release, steps=1, model=model)
    assert metrics["loss"] == LAYERS
    assert metrics["loss"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("kind", "accumulation"),
    [("Auto", 2), pytest.param("Explicit", 1, marks=pytest.mark.slow)],
)
def test_sharded_over_eight_devices(kind, accumulation):
    options = {"release": True, "rng": RNG, "accumulation": accumulation}
    plain = train(**options)
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=types)
    spec = lambda p: jax.P(None, "fsdp") if p.ndim == 3 else jax.P()
    place = lambda p: jax.device_put(p, jax.NamedSharding(mesh, spec(p)))
    with jax.set_mesh(mesh):
        state = init_state(jax.tree.map(place, make_params()), optax.adam(RATE))
        step = make_step(**options)
        for seed in range(5):
            rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
            state, metrics = step(state, jax.device_put(make_batch(seed), rows))
    assert_same(plain, (state, metrics))


def seen_keys(release, accumulation, rng=RNG, steps=2):
    """The keys that a step's micro-batches see, by step."""
    seen = []

    def watched(rest, batch):
        jax.debug.callback(lambda key: seen.append(tuple(key.tolist())), batch["rng"])
        return embed(rest, batch)

    data = lambda rest, batch: watched(rest, batch | {"rng": jax.random.key_data(batch["rng"])})
    step = make_step(
        release,
        model=StackedModel(data, lambda w, x, b: x, head),
        rng=rng,
        accumulation=accumulation,
    )
    state, found = init_state(make_params(), optax.adam(RATE)), []
    for seed in range(steps):
        state, _ = step(state, make_batch(seed))
        jax.block_until_ready(state)
        jax.effects_barrier()
        found.append(set(seen))
        seen.clear()
    return found


def test_each_step_and_each_micro_batch_has_a_key_of_its_own():
    ordinary, released = seen_keys(False, 2), seen_keys(True, 2)
    assert ordinary == released
    assert [len(keys) for keys in ordinary] == [2, 2]
    assert len(set.union(*ordinary)) == 4


def test_a_key_and_an_array_of_its_name_are_refused():
    batch = make_batch(0) | {"rng": jax.random.split(RNG, ROWS)}
    for release in (False, True):
        state = init_state(make_params(), optax.adam(RATE))
        with pytest.raises(ValueError, match="rng must be left out if the batch has"):
            jax.eval_shape(make_step(release, rng=RNG), state, batch)


def test_a_run_with_dropout_goes_on_from_a_checkpoint_as_if_never_stopped(tmp_path):
    """Its keys come from the number of the step, which is in the state."""
    step, state = make_step(True, rng=RNG), init_state(make_params(), optax.adam(RATE))
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for number in range(4):
            if number == 2:
                checkpoints.save(state, {"read": 2})
                checkpoints.wait()
            state, _ = step(state, make_batch(number))
        resumed, record = checkpoints.restore(init_state(make_params(), optax.adam(RATE)))
    for number in range(record["read"], 4):
        resumed, _ = step(resumed, make_batch(number))
    chex.assert_trees_all_equal(resumed, state)


def test_the_objective_an_optimizer_is_given_has_the_key():
    def update(updates, state, params=None, *, value, obj_fn, **_):
        return updates, value - obj_fn(params)

    tx = optax.GradientTransformationExtraArgs(lambda _: jnp.ones(()), update)
    state, _ = train(steps=1, tx=tx, rng=RNG)
    np.testing.assert_allclose(state.opt_state, 0, atol=1e-6)


def test_a_matrix_whose_gradient_is_not_finite_is_skipped_alone():
    """Its block's auxiliary loss has an infinite slope at zero."""

    def steep(layer, x, batch):
        return block(layer, x, batch) | {"sum": x["sum"] + jnp.sqrt(layer["bias"]).sum()}

    params, tx = make_params(), memopt.skip_nonfinite(optax.adam(RATE))
    params["blocks"]["bias"] = jnp.ones((LAYERS, DIM)).at[1, 0].set(0.0)
    for release in (False, True):
        options = {"release": release, "model": MODEL._replace(block=steep), "steps": 1}
        state, _ = train(params=params, tx=tx, **options)
        assert state.opt_state.skipped["blocks"]["bias"].tolist() == [0, 1, 0]
        moved = jnp.any(state.params["blocks"]["bias"] != params["blocks"]["bias"], 1)
        assert moved.tolist() == [True, False, True]


WRONG = {
    "a dtype": (
        {"block": lambda w, x, b: x | {"sum": jnp.bfloat16(0)}},
        r"block .* 'sum' is float32\[\] before and bfloat16\[\] after it",
    ),
    "a shape": (
        {"block": lambda w, x, b: x | {"x": x["x"][:, :2]}},
        rf"block .* 'x' is float32\[{ROWS}, {DIM}\] before and float32\[{ROWS}, 2\] after it",
    ),
    "a leaf": (
        {"block": lambda w, x, b: {"x": x["x"]}},
        r"block .* 'blocks' is int32\[\] before and absent after it",
    ),
    "a node": (
        {
            "embed": lambda rest, b: (b["x"],),
            "block": lambda w, x, b: [*x],
            "head": lambda rest, x, b: (x[0].sum(), 1),
        },
        r"block .* PyTreeDef\(\(\*,\)\) before and PyTreeDef\(\[\*\]\) after it",
    ),
    "an array": (
        {
            "embed": lambda rest, b: b["x"],
            "block": lambda w, x, b: x.sum(-1),
            "head": lambda rest, x, b: (x.sum(), 1),
        },
        rf"block .* 'x' is float32\[{ROWS}, {DIM}\] before",
    ),
    "no floats": (
        {"embed": lambda rest, b: {"ids": jnp.arange(2)}},
        "embed must return a tree with a floating-point array",
    ),
    "a loss of each row": (
        {"head": lambda rest, x, b: (x["x"].sum(-1), 1)},
        rf"head must return .* scalar, got float32\[{ROWS}\], int32\[\]",
    ),
    "a mean": (
        {"head": lambda rest, x, b: x["x"].mean()},
        r"head must return \(summed loss, number of tokens\).*got float32\[\]",
    ),
    "an integer loss": (
        {"head": lambda rest, x, b: (jnp.int32(1), jnp.int32(1))},
        r"head must return .* got int32\[\], int32\[\]",
    ),
}


@pytest.mark.parametrize(("wrong", "says"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("release", [False, True])
def test_functions_that_return_other_trees_are_refused(release, wrong, says):
    step = make_step(release, model=MODEL._replace(**wrong))
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(step, init_state(make_params(), optax.adam(RATE)), make_batch(0))


STACKS = {
    "no blocks": ({"in": jnp.ones(2)}, r"got \['in'\]"),
    "empty blocks": ({"blocks": {}}, r"got \['blocks'\]"),
    "a list": ([jnp.ones(2)], "got list"),
    "a scalar": ({"blocks": {"scale": jnp.ones(())}}, r"got blocks/scale of float32\[\]"),
    "two depths": (
        {"blocks": {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}},
        r"got blocks/a of float32\[3, 2\] and blocks/b of float32\[2\]",
    ),
}


@pytest.mark.parametrize(("params", "says"), STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("release", [False, True])
def test_parameters_that_are_no_stack_are_refused(release, params, says):
    state = init_state(params, optax.sgd(1.0))
    with pytest.raises(ValueError, match=f"params must be a dict with arrays .* {says}"):
        jax.eval_shape(make_step(release, tx=optax.sgd(1.0)), state, make_batch(0))


def test_the_loss_is_evaluated_on_quantised_parameters_one_block_at_a_time():
    params = make_params()
    stored = memopt.quantize_params(params, "int8")
    batches, loss = [make_batch(seed) for seed in range(3)], jax.jit(MODEL.loss)
    expected = evaluate(memopt.dequantize_params(stored), batches, loss)
    assert evaluate(stored, batches, loss) == pytest.approx(expected, rel=1e-6)
    wide, deep = 128, 32
    stack = jax.eval_shape(lambda: memopt.quantize_params({"w": jnp.ones((deep, wide, wide))}))
    model = StackedModel(
        embed=lambda rest, batch: batch["x"],
        block=lambda layer, x, batch: jnp.tanh(x @ layer["w"]),
        head=lambda rest, x, batch: (x.sum(), 1),
    )
    batch = {"x": jax.ShapeDtypeStruct((2, wide), jnp.float32)}
    memory = jax.jit(model.loss).lower({"blocks": stack}, batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * deep * wide * wide / 4


def test_rematerialised_blocks_give_the_same_gradient_from_fewer_arrays():
    params, batch = make_params(), make_batch(0) | {"rng": RNG}
    both = []
    for remat in (False, True):
        loss = lambda params, remat=remat: MODEL.loss(params, batch, remat=remat)[0]
        _, kept = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params), params)
        both.append((jax.grad(loss)(params), len(jax.tree.leaves(kept))))
    chex.assert_trees_all_close(both[0][0], both[1][0], rtol=1e-5, atol=1e-5)
    assert both[0][1] > both[1][1]


def test_no_stack_is_held_twice_though_gradients_flow_by_several_arrays():
    """Each of two matrices is read for one of them only."""
    layers, wide = 16, 256

    def block(layer, x, batch):
        return {"a": x["a"] + jnp.tanh(x["a"] @ layer["a"]), "b": x["b"] @ layer["b"]}

    model = StackedModel(
        embed=lambda rest, batch: {"a": batch["x"] * rest["in"], "b": batch["x"] * rest["in"]},
        block=block,
        head=lambda rest, x, batch: (jnp.sum(x["a"] ** 2 + x["b"] ** 2), 1),
    )
    stacks = {name: jnp.ones((layers, wide, wide)) for name in ("a", "b")}
    tx = optax.sgd(RATE, momentum=0.9)
    state = jax.eval_shape(
        functools.partial(init_state, tx=tx), {"in": jnp.ones(wide), "blocks": stacks}
    )
    step = functools.partial(release_step, model=model, tx=tx, learning_rate=RATE)
    batch = {"x": jax.ShapeDtypeStruct((4, wide), jnp.float32)}
    memory = jax.jit(step, donate_argnums=0).lower(state, batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < layers * wide * wide * 4
