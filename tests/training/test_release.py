"""The released step: the ordinary one's numbers, what it refuses, what it holds."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import memopt
from memopt.models import llama
from memopt.models.stacked import StackedModel
from memopt.optimizers.registry import METHODS
from memopt.training.release import release_step
from memopt.training.step import init_state, train_step
from tests.models.examples import OPTIONS
from tests.optimizers.kinds import KINDS, slow_unless
from tests.training.nano import NANO

VOCAB, DIM, WIDE, LAYERS, ROWS, LENGTH = 11, 8, 12, 3, 8, 5
RATE = optax.linear_schedule(3e-3, 0.0, 40)
CONFIG = dataclasses.replace(NANO, hidden_size=8, num_layers=3, head_dim=4, intermediate_size=12)


def toy(*, tied=False):
    """A model of plain functions, and its parameters."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    normal = lambda *shape: 0.3 * jax.random.normal(next(keys), shape)
    params = {
        "embed": {"embedding": normal(VOCAB, DIM)},
        "blocks": {
            "up": normal(LAYERS, DIM, WIDE),
            "down": normal(LAYERS, WIDE, DIM),
            "norm": jnp.ones((LAYERS, DIM)),
        },
        "norm": jnp.ones(DIM),
    }
    if not tied:
        params["head"] = normal(DIM, VOCAB)

    def embed(rest, batch):
        return rest["embed"]["embedding"][batch["inputs"]]

    def block(layer, x, batch):
        return x + jnp.tanh(x * layer["norm"] @ layer["up"]) @ layer["down"]

    def head(rest, x, batch):
        kernel = rest["embed"]["embedding"].T if tied else rest["head"]
        logits = (x * rest["norm"]) @ kernel
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"])

    return StackedModel(embed, block, head), params


def make_batch(seed):
    first, second = jax.random.split(jax.random.key(seed))
    tokens = jax.random.randint(first, (ROWS, LENGTH + 1), 0, VOCAB)
    weights = jax.random.bernoulli(second, 0.7, (ROWS, LENGTH)).astype(jnp.float32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def run(step, tx, params, batches, **options):
    state = jax.jit(functools.partial(init_state, tx=tx))(params)
    step = functools.partial(step, tx=tx, learning_rate=RATE, **options)
    step = jax.jit(step, donate_argnums=0)
    for batch in batches:
        state, metrics = step(state, batch)
    return state, metrics


def both(tx, steps=20, released=None, tied=False, **options):
    """States and metrics of the ordinary and the released step."""
    model, params = toy(tied=tied)
    batches = [make_batch(seed) for seed in range(steps)]
    ordinary = run(train_step, tx, params, batches, loss=model.loss, **options)
    return ordinary, run(release_step, released or tx, params, batches, model=model, **options)


def assert_same(ordinary, released, atol=1e-6):
    chex.assert_trees_all_equal_structs(*(r[0] for r in (ordinary, released)))
    chex.assert_trees_all_close(ordinary[0].params, released[0].params, rtol=0, atol=atol)
    chex.assert_trees_all_close(ordinary[0], released[0], rtol=1e-4, atol=10 * atol)
    chex.assert_trees_all_close(ordinary[1], released[1], rtol=1e-5)


SHARED = ("adamw", "badam")  # which keep a count, or moments, that all layers share
ALIKE = {"lion", "frugal"}  # adamw works by entries, too, and apollo_mini draws at every refresh


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=slow_unless(name in {*KINDS, *SHARED} - ALIKE))
        for name in ("adamw", *memopt.available("memopt"))
        if not METHODS[name].needs
    ],
)
def test_twenty_steps_are_the_ordinary_ones(name):
    method = METHODS[name]
    options = {"rank": 2} if method.has_free_rank else {}
    options |= {"refresh_every": 7} if "refresh_every" in method.defaults else {}
    options |= {"switch_every": 3} if "switch_every" in method.defaults else {}
    atol = 1e-6
    if name == "soap":  # divides by what rounding alone gives to the weakest directions
        options["max_side"], atol = DIM, 1e-5
    assert_same(*both(memopt.optimizer(name, RATE, **options)), atol=atol)


@pytest.mark.parametrize(
    ("name", "tied"), [("adafactor", True), pytest.param("lion", False, marks=pytest.mark.slow)]
)
def test_micro_batches(name, tied):
    assert_same(*both(memopt.optimizer(name, RATE), accumulation=4, tied=tied))


def test_a_tied_head_waits_for_the_embedding():
    assert_same(*both(memopt.adafactor(RATE), tied=True))


def test_masks_partitions_and_injected_hyperparameters():
    """Masks that are trees, not functions, have the shape of the whole of the parameters."""
    _, params = toy()
    matrices = jax.tree.map(lambda p: p.ndim > 1, params)
    labels = jax.tree.map(lambda m: "matrix" if m else "vector", matrices)
    tx = optax.chain(
        optax.masked(optax.clip(1e-2), matrices),
        optax.partition({"matrix": optax.scale_by_adam(), "vector": optax.trace(0.9)}, labels),
        optax.inject_hyperparams(optax.scale_by_learning_rate)(RATE),
    )
    ordinary, released = both(tx)
    assert_same(ordinary, released)
    used = released[0].opt_state[-1].hyperparams["learning_rate"]
    np.testing.assert_allclose(used, RATE(19), rtol=1e-6)


def test_a_state_without_place_for_the_layers_is_refused():
    tx = memopt.frugal(RATE, projector=memopt.projectors.blocks(1 / 3), on_refresh="reset")
    with pytest.raises(ValueError, match="a layer at a time"):
        both(tx, steps=1)


def test_layers_that_share_a_state_in_8_bits_round_it_in_their_own_turns():
    adam = memopt.quantize_state(optax.scale_by_adam(), min_size=0)
    rate = optax.scale_by_learning_rate(RATE)
    assert_same(*both(optax.chain(memopt.cycle_blocks(adam, 2, "random"), rate), steps=5))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda tx: memopt.quantize_state(tx), "would round the state again"),
        (lambda tx: optax.chain(optax.clip_by_block_rms(1.0), tx), "treats its layers together"),
        (lambda tx: optax.chain(tx, optax.clip_by_block_rms(1.0)), "treats its layers together"),
    ],
)
def test_what_mixes_layers_around_a_shared_state_is_refused(wrong, says):
    model, params = toy()
    tx = wrong(memopt.badam(RATE))
    step = functools.partial(release_step, model=model, tx=tx, learning_rate=RATE)
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(step, init_state(params, tx), make_batch(0))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (optax.clip_by_global_norm(1.0), "gradients are never held together.*memopt.clip_by"),
        (optax.apply_if_finite(optax.identity(), 3), "never held together"),
        (memopt.clip_by_fraction(0.1), "never held together"),
        (memopt.scale_by_polyak(optax.scale_by_rms()), "never held together"),
        (optax.clip_by_block_rms(1.0), "treats its layers together"),
        (optax.scale_by_trust_ratio(), "treats its layers together"),
        (optax.add_noise(0.1, 0.5, 0), "treats its layers together"),
    ],
)
def test_what_looks_beyond_its_matrix_is_refused(wrong, says):
    model, params = toy()
    tx = optax.chain(wrong, optax.scale_by_adam(), optax.scale_by_learning_rate(RATE))
    step = functools.partial(release_step, model=model, tx=tx, learning_rate=RATE)
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(step, init_state(params, tx), make_batch(0))


def test_an_optimizer_that_evaluates_the_loss_is_refused():
    model, params = toy()
    update = lambda updates, state, params=None, *, obj_fn, **_: (updates, obj_fn(params))
    evaluating = optax.GradientTransformationExtraArgs(lambda _: jnp.zeros(()), update)
    for tx in (evaluating, memopt.oasis(1.0)):
        step = functools.partial(release_step, model=model, tx=tx, learning_rate=RATE)
        with pytest.raises(ValueError, match="obj_fn"):
            jax.eval_shape(step, init_state(params, tx), make_batch(0))


@pytest.mark.parametrize("max_norm", [1e-2, pytest.param(1e2, marks=pytest.mark.slow)])
def test_clipping_by_this_steps_norm_is_exact(max_norm):
    """Against Optax's own clipping, in an ordinary step."""
    after = optax.sgd(RATE, momentum=0.9)
    whole = optax.chain(optax.clip_by_global_norm(max_norm), after)
    ours = optax.chain(memopt.clip_by_gradient_norm(max_norm), after)
    assert_same(*both(whole, released=ours))


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_clipping_by_the_norm_of_the_step_before(accumulation):
    clip = memopt.clip_by_gradient_norm(1e-2, previous=True)
    tx = optax.chain(clip, optax.sgd(RATE, momentum=0.9))
    ordinary, released = both(tx, accumulation=accumulation)
    assert_same(ordinary, released)
    np.testing.assert_allclose(released[0].opt_state[0].norm, released[1]["gradient_norm"])


def test_wrappers_of_an_optimizer():
    tx = memopt.cautious_decay(memopt.cautious(optax.sgd(RATE, momentum=0.9)), RATE, 0.1)
    assert_same(*both(memopt.hyperball(tx, 0.01)))


def test_clipping_each_matrix():
    assert_same(*both(optax.chain(memopt.clip_by_matrix_rms(1e-3), optax.sgd(RATE, momentum=0.9))))


@pytest.mark.parametrize("poison", [jnp.nan, pytest.param(jnp.inf, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_changes_nothing_but_the_counters(poison):
    tx, (model, params) = optax.adam(RATE), toy()
    good = [make_batch(seed) for seed in range(3)]
    bad = good[0] | {"weights": jnp.full((ROWS, LENGTH), poison)}
    clean, _ = run(release_step, tx, params, good, model=model)
    holed, metrics = run(release_step, tx, params, [*good[:2], bad, bad, good[2]], model=model)
    chex.assert_trees_all_equal(clean[:2], holed[:2])
    assert (holed.step, holed.skipped, holed.skipped_in_row) == (5, 2, 0)
    _, metrics = run(release_step, tx, params, [*good, bad, bad], model=model)
    assert metrics["skipped_in_row"] == 2


def steep():
    """A toy whose middle block has a gradient that is not finite, behind a finite loss."""
    model, params = toy()

    def block(layer, x, batch):
        return model.block(layer, x, batch) + jnp.sqrt(layer["steep"])

    params["blocks"]["steep"] = jnp.array([1.0, 0.0, 1.0])
    return model._replace(block=block), params


def test_a_gradient_that_is_not_finite_stops_the_updates_behind_it():
    tx, (model, params) = optax.adam(RATE), steep()
    state, metrics = run(release_step, tx, params, [make_batch(0)], model=model)
    assert jnp.isfinite(metrics["loss"])
    assert state.skipped == 1
    chex.assert_tree_all_finite((state.params, state.opt_state))
    moved = lambda new, old: bool(jnp.any(new != old))
    blocks = state.params["blocks"], params["blocks"]
    by_layer = [jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(LAYERS)]
    assert jax.tree.map(moved, *by_layer[2]) == dict.fromkeys(params["blocks"], True)
    assert not moved(state.params["blocks"]["steep"][1], params["blocks"]["steep"][1])
    assert jax.tree.map(moved, *by_layer[0]) == dict.fromkeys(params["blocks"], False)
    chex.assert_trees_all_equal(state.params["embed"], params["embed"])
    assert state.opt_state[0].count == 0  # as the learning rate's: the step is not counted


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(memopt.clip_by_gradient_norm(1.0), optax.adam(RATE)),
        memopt.skip_nonfinite(optax.adam(RATE), per="tree"),
    ],
    ids=["clip_by_gradient_norm", "skip_nonfinite"],
)
def test_with_this_steps_norm_a_gradient_that_is_not_finite_changes_nothing(tx):
    model, params = steep()
    state, _ = run(release_step, tx, params, [make_batch(0)], model=model)
    chex.assert_trees_all_equal(state[:2], init_state(params, tx)[:2])
    assert state.skipped == 1


def test_skipping_matrices_takes_the_place_of_skipping_steps():
    """With clipping by the norm of what is finite, in the ordinary step, too."""
    plain, params = toy()
    params["blocks"]["bias"] = jnp.ones((LAYERS, DIM)).at[1, 0].set(0.0)

    def block(layer, x, batch):
        return plain.block(layer, x, batch) + jnp.sqrt(layer["bias"])

    model = plain._replace(block=block)
    batches = [make_batch(seed) for seed in range(3)]
    adam = memopt.quantize_state(optax.adam(RATE), min_size=16)
    tx = memopt.skip_nonfinite(optax.chain(memopt.clip_by_gradient_norm(1e-1), adam))
    ordinary = run(train_step, tx, params, batches, loss=model.loss)
    released = run(release_step, tx, params, batches, model=model)
    chex.assert_trees_all_close(ordinary[0], released[0], rtol=1e-4, atol=1e-5)
    state, _ = released
    chex.assert_tree_all_finite((state.params, state.opt_state))
    assert (state.skipped, state.opt_state.skipped["blocks"]["bias"].tolist()) == (0, [0, 3, 0])
    bias = state.params["blocks"]["bias"]
    assert jnp.any(bias != params["blocks"]["bias"], 1).tolist() == [True, False, True]
    assert jnp.any(state.params["embed"]["embedding"] != params["embed"]["embedding"])


def llama_run(step, tx, batches, mesh=None, config=CONFIG, store=lambda x: x, **options):
    params = jax.jit(lambda: llama.init_params(config, store=store))()
    if step is train_step:
        graph, _ = nnx.split(llama.abstract_model(config), nnx.Param)
        options |= {"loss": lambda params, batch: llama.loss(nnx.merge(graph, params), batch)}
    else:
        options |= {"model": llama.stacked_model(config)}
    if mesh is None:
        return run(step, tx, params, batches, **options)
    shardings = llama.param_shardings(llama.abstract_model(config), mesh)
    rows = jax.P(tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape))
    with jax.set_mesh(mesh):
        batches = [jax.device_put(b, jax.NamedSharding(mesh, rows)) for b in batches]
        return run(step, tx, jax.device_put(params, shardings), batches, **options)


@pytest.mark.parametrize("weights", [pytest.param(None, marks=pytest.mark.slow), "int8"])
def test_options_of_other_families_are_released(weights):
    shape = {"hidden_size": 8, "num_layers": 3, "num_kv_heads": 1, "head_dim": 4}
    config = dataclasses.replace(OPTIONS, vocab_size=VOCAB, num_heads=2, **shape)
    store = functools.partial(memopt.quantize_params, codec=weights) if weights else lambda x: x
    batches = [make_batch(seed) for seed in range(3)]
    ordinary, released = (
        llama_run(step, optax.sgd(RATE, momentum=0.9), batches, config=config, store=store)
        for step in (train_step, release_step)
    )
    dense = [jax.jit(memopt.dequantize_params)(x[0].params) for x in (ordinary, released)]
    chex.assert_trees_all_close(*dense, rtol=0, atol=1e-6 if weights is None else 2e-3)
    chex.assert_trees_all_close(ordinary[1], released[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        ("Auto", {"data": 2, "fsdp": 4}),
        pytest.param("Explicit", {"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("Explicit", {"data": 2, "fsdp": 4}, marks=pytest.mark.slow),
        pytest.param("Auto", {"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_llama_sharded_over_eight_devices(kind, axes):
    tx = memopt.adafactor(RATE)
    batches = [make_batch(seed) for seed in range(3)]
    types = (getattr(jax.sharding.AxisType, kind),) * len(axes)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)
    ordinary = llama_run(train_step, tx, batches)
    released = llama_run(release_step, tx, batches, mesh)
    assert_same(*jax.device_get((ordinary, released)))
    shardings = llama.param_shardings(llama.abstract_model(CONFIG), mesh)
    stays = lambda p, sharding: p.sharding.is_equivalent_to(sharding, p.ndim)
    assert all(jax.tree.leaves(jax.tree.map(stays, released[0].params, shardings)))


def test_state_is_donated_and_no_stack_is_held_twice():
    """A model of many wide layers, whose temporaries stay below the size of a few of them.

    The gradient of "down" does not depend on it: XLA may read it after it was updated.
    """
    layers, wide = 16, 256
    model = StackedModel(
        embed=lambda rest, batch: batch["x"] * rest["scale"],
        block=lambda w, x, batch: x + jnp.tanh(x @ w["up"]) @ w["down"],
        head=lambda rest, x, batch: (jnp.sum(x**2), jnp.asarray(1.0)),
    )
    stacks = {name: jnp.ones((layers, wide, wide)) for name in ("up", "down")}
    params = {"scale": jnp.ones(wide), "blocks": stacks}
    tx = optax.sgd(RATE, momentum=0.9)
    state, batch = init_state(params, tx), {"x": jnp.ones((4, wide))}
    temporaries = {}
    for step in (
        functools.partial(release_step, model=model),
        functools.partial(train_step, loss=model.loss),
    ):
        step = functools.partial(step, tx=tx, learning_rate=RATE)
        memory = jax.jit(step, donate_argnums=0).lower(state, batch).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(state))
        temporaries[len(temporaries)] = memory.temp_size_in_bytes
    one = stacks["up"].nbytes / layers
    assert temporaries[0] < 8 * one
    assert temporaries[1] > 2 * layers * one


@pytest.mark.parametrize("weights", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_layouts_are_said_of_parts_only(weights):
    """XLA for TPUs may gather whole stacks of a mesh to lay them as it is told."""
    model, params = toy()
    step = functools.partial(release_step, model=model, tx=optax.sgd(RATE), learning_rate=RATE)

    def laid(params, **options):
        """The shapes of what is."""
        params = memopt.quantize_params(params, weights) if weights else params
        if options:
            options = {"shardings": jax.tree.map(lambda x: x.sharding, params)}
        traced = jax.jit(functools.partial(step, **options)).trace(
            init_state(params, optax.sgd(RATE)), make_batch(0)
        )
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        found = re.findall(r"@LayoutConstraint.*-> tensor<([\dx]+)x\w+>", text)
        return {tuple(map(int, shape.split("x"))) for shape in found}

    whole = params["blocks"]["up"].shape
    assert whole in laid(params)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda x: jax.NamedSharding(mesh, jax.P(None, "fsdp") if x.ndim == 3 else jax.P())
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, jax.tree.map(place, params))
        assert not laid(placed)
        parts = laid(placed, shardings=True)
    assert (whole[0], whole[1] // 4, whole[2]) in parts
    assert whole not in parts


@pytest.mark.parametrize("codec", ["int8", pytest.param("flash8", marks=pytest.mark.slow)])
def test_quantised_weights_and_state(codec):
    """The codes of the ordinary step, but for the few at the edge of rounding either way."""
    model, params = toy()
    stored = jax.jit(lambda params: memopt.quantize_params(params, "int8"))(params)
    tx = optax.chain(
        memopt.quantize_state(optax.scale_by_adam(), codec, min_size=16),
        optax.scale_by_learning_rate(RATE),
    )
    batches = [make_batch(seed) for seed in range(5)]
    ordinary, _ = run(train_step, tx, stored, batches, loss=model.loss)
    released, _ = run(release_step, tx, stored, batches, model=model)
    chex.assert_trees_all_equal_shapes_and_dtypes(ordinary, released)
    for a, b in zip(*map(jax.tree.leaves, (ordinary, released)), strict=True):
        if a.dtype in (jnp.int8, jnp.uint8):
            assert (a != b).mean() < 0.02
    dense = [jax.jit(memopt.dequantize_params)(x.params) for x in (ordinary, released)]
    chex.assert_trees_all_close(*dense, atol=0.02)
    moved = jax.tree.map(lambda a, p: jnp.abs(a - p).max(), dense[1], params)
    assert min(jax.tree.leaves(moved)) > 1e-3
