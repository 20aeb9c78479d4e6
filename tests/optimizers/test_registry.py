"""Optimizers by name."""

import ast
import functools
import inspect
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from benchmarks.extra_arguments import with_extra_arguments
from memopt.optimizers.registry import METHODS, find_method
from tests.optimizers.kinds import SUMS_LIKE_PARAMETERS, slow_unless


def tree():
    return {"up": {"kernel": jnp.ones((8, 16))}, "norm": {"scale": jnp.ones(8)}}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=slow_unless(name in memopt.available("optax")))
        for name in memopt.available()  # memopt's run in the common suite
    ],
)
def test_every_name_builds_and_moves(name):
    tx = with_extra_arguments(memopt.optimizer)(name, 1.0 if METHODS[name].finds_step else 1e-2)
    params = tree()

    def loss(p):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    @jax.jit
    def step(params, state):
        value, g = jax.value_and_grad(loss)(params)
        updates, state = tx.update(g, state, params, obj_fn=loss, value=value)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))
    assert float(loss(params)) < float(loss(tree()))


@pytest.mark.parametrize("name", memopt.available())
def test_every_name_takes_a_schedule(name):
    params = jax.eval_shape(tree)
    tx = with_extra_arguments(memopt.optimizer)(name, optax.linear_schedule(1e-2, 0.0, 10))
    needed = {"obj_fn": lambda p: p["norm"]["scale"].sum(), "value": jnp.ones(())}
    update = lambda g: tx.update(g, tx.init(g), g, **needed)[0]
    assert jax.eval_shape(update, params) == params


@pytest.mark.parametrize("module", [memopt, memopt.optimizers])
def test_the_package_has_each_method_under_its_name(module):
    ours = memopt.available("memopt")
    assert [getattr(module, name) for name in ours] == [METHODS[name].make for name in ours]


def test_type_checkers_read_the_imports_of_every_method():
    """They do not run the registry; the other public names of that package stand beside."""
    tree = ast.parse(Path(memopt.optimizers.__file__).read_text())
    names = [node.names[0] for node in tree.body if isinstance(node, ast.ImportFrom)]
    explicit = {alias.name for alias in names if alias.asname == alias.name}
    others = {"Common", "available", "eval_params", "matrices_and_rest", "optimizer"}
    assert explicit == {*memopt.available("memopt"), *others} == set(memopt.optimizers.__all__)


def test_an_optimizer_is_a_method_of_memopt_or_of_optax():
    libraries = {name: method.library for name, method in METHODS.items()}
    assert set(libraries.values()) == {"memopt", "optax"}
    assert memopt.available() == (*memopt.available("memopt"), *memopt.available("optax"))
    assert {n for n, library in libraries.items() if library == "optax"} == set(
        memopt.available("optax")
    )
    defined = {n: getattr(m.make, "func", m.make) for n, m in METHODS.items()}  # nadamw is partial
    modules = {n: make.__module__.partition(".")[0] for n, make in defined.items()}
    assert modules == libraries


def test_a_users_function_is_an_optimizer_that_stays_out_of_the_registry():
    before = memopt.available()
    params = jnp.ones(3)
    tx, expected = memopt.optimizer("optax:adam", 0.1, b1=0.5), optax.adam(0.1, b1=0.5)
    found, expected = (x.update(params, x.init(params), params)[0] for x in (tx, expected))
    chex.assert_trees_all_equal(found, expected)
    assert find_method("optax:adam").learning_rate == METHODS["adamw"].learning_rate
    assert memopt.available() == before
    with pytest.raises(
        ValueError, match=r"must return an optax\.GradientTransformation, got float"
    ):
        memopt.optimizer("math:sqrt", 4.0)


def test_apollo_mini_is_apollo_with_other_defaults():
    apollo, mini = METHODS["apollo"].defaults, METHODS["apollo_mini"].defaults
    assert mini == apollo | {"rank": 1, "scale": 128.0, "per": "matrix"}


def test_a_name_means_its_function():
    by_name = memopt.optimizer("apollo", learning_rate=1e-2, rank=2, weight_decay=0.1)
    direct = memopt.apollo(1e-2, rank=2, weight_decay=0.1)
    assert jax.tree.structure(by_name.init(tree())) == jax.tree.structure(direct.init(tree()))
    assert memopt.state_bytes(by_name, tree()) == memopt.state_bytes(direct, tree())


@pytest.mark.parametrize("name", ["adamw", *memopt.available("memopt")])
def test_the_state_of_every_method_is_quantised_by_its_name(name):
    """Equals `quantize_state` around the method, except for one whose state begins anew."""
    wide = jax.ShapeDtypeStruct((64, 128), "float32")
    params = {"embed": wide, "blocks": {"up": jax.ShapeDtypeStruct((2, 64, 128), "float32")}}
    by_name = with_extra_arguments(memopt.optimizer)(name, 1e-2, state="int8")
    if name == "badam":
        kept = jax.tree.leaves(by_name.init(params))
        assert sorted(x.size for x in kept if x.dtype in (jnp.int8, jnp.uint8)) == [64 * 128] * 2
        return
    around = memopt.quantize_state(with_extra_arguments(memopt.optimizer)(name, 1e-2), "int8")
    assert jax.eval_shape(by_name.init, params) == jax.eval_shape(around.init, params)


def test_muon_in_8_bits_moves_as_muon_does_and_keeps_a_quarter():
    params = {"blocks": {"up": jax.random.normal(jax.random.key(0), (2, 64, 128))}}
    gradient = lambda t: jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(t), p.shape), params
    )
    exact, stored = memopt.muon(1e-2), memopt.muon(1e-2, state="int8")
    states = exact.init(params), stored.init(params)
    for t in range(1, 6):
        (expected, a), (found, b) = (
            jax.jit(tx.update)(gradient(t), state, params)
            for tx, state in zip((exact, stored), states, strict=True)
        )
        states = a, b
        difference = optax.tree.norm(optax.tree.sub(expected, found))
        assert difference < 0.1 * optax.tree.norm(expected)
    numbers = 2 * 64 * 128
    assert memopt.state_bytes(exact, params)["blocks/up"] == 4 * numbers
    assert (
        memopt.state_bytes(stored, params)["blocks/up"] == numbers + 2 * 64 * 2 * 4
    )  # two scales a row


@pytest.mark.parametrize("name", memopt.available("memopt"))
def test_a_method_documents_all_its_options_and_refuses_others(name):
    make = getattr(memopt, name)
    options = inspect.signature(make).parameters
    assert {"matrices", "rest", "weight_decay", "weight_decay_mask", "state"} <= set(options)
    assert not {p.kind for p in options.values()} & {inspect.Parameter.VAR_KEYWORD}
    if name != "apollo_mini":  # refers to apollo's
        documented = set(re.findall(r"^ {4}(\w+): ", inspect.getdoc(make), re.MULTILINE))
        assert set(options) <= documented
    for as_released in (False, True):
        with pytest.raises(TypeError, match="unexpected keyword argument 'weigth_decay'"):
            make(1e-2, as_released=as_released, weigth_decay=0.1)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'apollo_mini'"):
        memopt.optimizer("apollo-mini", learning_rate=1e-2)
    with pytest.raises(ValueError, match=r"option of apollo: 'rnak'.*did you mean 'rank'"):
        memopt.optimizer("apollo", learning_rate=1e-2, rnak=4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": -3}, "rank must be at least 1, got -3"),
        ({"rank": 1.5}, r"fractional rank must be in \(0, 1\], got 1.5"),
        ({"refresh_every": 0}, "refresh_every must be at least 1, got 0"),
        ({"per": "row"}, "per 'row' is unknown"),
        ({"scale": -1.0}, "scale must be at least 0"),
        ({"projector": "gausian"}, "did you mean 'gaussian'"),
    ],
)
def test_bad_options_are_named(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        memopt.apollo(1e-2, **options)


draws = memopt.projectors.gaussian(4)
UNUSED = [
    ("galore", {"projector": "svd", "seed": 1}, "seed must be left out, since projector 'svd'"),
    ("galore", {"projector": draws, "seed": 1}, "seed must be left out, since the projector"),
    ("galore", {"projector": draws, "rank": 8}, "rank must be left out.*got 8"),
    ("galore", {"inner": optax.identity(), "b2": 0.9}, "b2 must be left out, since inner"),
    ("adafactor", {"scale_by_parameter": False, "min_scale": 5.0}, "min_scale must be left out"),
    ("flora", {"min_scale": 5.0}, "min_scale must be left out, since scale_by_parameter is off"),
    ("apollo", {"growth_limit": None, "scale_front": True}, "scale_front must be left out"),
    ("muon", {"ns_coeffs": [(1.5, -0.5, 0.0)] * 2, "ns_steps": 50}, "ns_steps must be left out"),
    ("online_subspace_descent", {"start": draws, "rank": 8}, "rank must be left out, since start"),
    ("flora", {"projector": "svd", "seed": jnp.array(1)}, "seed must be left out"),
    ("fira", {"projector": "svd", "seed": 1}, "seed must be left out"),
    ("apollo", {"projector": draws, "rank": 0.5}, "rank must be left out.*got 0.5"),
    ("frugal", {"projector": draws, "density": 0.5}, "density must be left out"),
    ("frugal", {"inner": optax.identity(), "eps": 1e-3}, "eps must be left out, since inner"),
    ("ldadam", {"projector": "svd", "rho": 0.5}, "rho must be left out, since projector 'svd'"),
    ("ldadam", {"seed": 1}, "seed must be left out, since projector 'power_iteration'"),
    (
        "online_subspace_descent",
        {"projector_optimizer": optax.sgd(1.0), "projector_learning_rate": 1.0},
        "projector_learning_rate must be left out, since projector_optimizer",
    ),
    ("online_subspace_descent", {"as_released": True, "penalty": 1.0}, "penalty must be left out"),
]


def test_an_unknown_library_is_refused_rather_than_empty():
    with pytest.raises(ValueError, match=r"library 'optx' is unknown; did you mean 'optax'\?"):
        memopt.available("optx")


@pytest.mark.parametrize("option", ["eps", "confidence_eps"])
def test_came_refuses_to_divide_zeros_by_zeros(option):
    with pytest.raises(ValueError, match=r"eps must be above 0, got 0\.0"):
        memopt.came(1e-3, **{option: 0.0})


@pytest.mark.parametrize(("name", "options", "sentence"), UNUSED)
def test_an_option_without_effect_is_refused(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        memopt.optimizer(name, 1e-2, **options)


def test_a_projector_may_be_given_with_its_own_rank():
    memopt.apollo(1e-2, projector=draws, rank=4)
    memopt.apollo_mini(1e-2, projector=draws)
    state = memopt.apollo_mini(1e-2, projector=draws, rest=optax.sgd(1.0)).init(tree())
    assert {x.shape for x in jax.tree.leaves(state)} >= {(4, 16)}
    with pytest.raises(ValueError, match=r"rank must be left out.*got 2"):
        memopt.apollo_mini(1e-2, projector=draws, rank=2)


def test_injected_defaults_are_not_refused():
    make = optax.inject_hyperparams(memopt.galore)
    tx = make(1e-2, projector="svd", inner=optax.scale_by_rms(), rank=2)
    state = jax.jit(tx.init)(tree())
    jax.eval_shape(jax.jit(tx.update), tree(), state, tree())


def test_a_rank_larger_than_a_matrix_names_the_matrix():
    with pytest.raises(ValueError, match=r"between 1 and 8 for 'up/kernel'.*8×16.*got 9"):
        memopt.apollo(1e-2, rank=9).init(tree())


def test_matrices_and_rest_are_replaceable():
    everything = lambda name, leaf: memopt.Matrix() if leaf.ndim > 1 else None
    params = {"embed": jnp.ones((8, 16)), "scale": jnp.ones(8)}
    tx = memopt.apollo_mini(1e-2, matrices=everything, rest=optax.sgd(1e-2))
    table = memopt.state_bytes(tx, params)
    assert (table["embed"], table["scale"]) == (4 * (2 * 16 + 1), 0)
    table = memopt.state_bytes(memopt.lion(1e-2, rest=optax.sgd(1e-2)), tree())
    assert (table["up/kernel"], table["norm/scale"]) == (4 * 128, 0)


def normal(seed):
    """A tree of bfloat16."""
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda x: jnp.asarray(draw(size=x.shape), jnp.bfloat16), tree())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=slow_unless(name in ("lion", "galore")))
        for name in memopt.available("memopt")
    ],
)
def test_injected_hyperparameters_are_float32_whatever_the_parameters_are(name):
    gradients = [normal(seed) for seed in range(1, 4)]

    def train(tx):
        @jax.jit
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            chex.assert_trees_all_equal_dtypes(updates, params)
            return optax.apply_updates(params, updates), state

        params = normal(0)
        return functools.reduce(step, gradients, (params, tx.init(params)))

    make, is_matrix = with_extra_arguments(getattr(memopt, name)), lambda x: x.ndim > 1
    options = {"weight_decay": 0.1, "weight_decay_mask": lambda p: jax.tree.map(is_matrix, p)}
    given, state = train(optax.inject_hyperparams(make)(learning_rate=1e-2, **options))
    expected, _ = train(make(1e-2, **options))
    precision = float(jnp.finfo(jnp.bfloat16).eps)
    chex.assert_trees_all_close(given, expected, rtol=4 * precision, atol=precision)
    found = state.hyperparams
    assert found["learning_rate"].dtype == jnp.float32
    assert not {"rank", "density", "ns_steps"} & found.keys()
    if "b2" in found:
        assert found["b2"] == np.float32(METHODS[name].defaults["b2"])


def test_what_is_injected_otherwise_is_refused_with_the_remedy():
    wide = lambda learning_rate, rank: memopt.galore(learning_rate, rank=rank)
    with pytest.raises(TypeError, match=r"static_args='rank' to optax\.inject"):
        optax.inject_hyperparams(wide)(1e-2, rank=4).init(tree())
    with pytest.raises(TypeError, match=r"static_args='ns_steps' to optax\.inject"):
        optax.inject_hyperparams(memopt.orthogonalize)(ns_steps=4).init(tree())
    narrow = normal(0)
    for make in (memopt.scale_by_uncorrected_adam, memopt.scale_by_sign_momentum):
        with pytest.raises(ValueError, match=r"b1 must be float32.*hyperparam_dtype=jnp\.float32"):
            optax.inject_hyperparams(make)(b1=0.9).init(narrow)
        optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(b1=0.9).init(narrow)
    constant = optax.inject_hyperparams(memopt.lion)(optax.constant_schedule(1e-2))
    with pytest.raises(ValueError, match=r"learning_rate must be float32.*got bfloat16"):
        constant.init(narrow)


def test_lion_refuses_a_momentum_that_forgets_everything():
    with pytest.raises(ValueError, match=r"b2 must be above 0, got 0\.0"):
        memopt.lion(1e-3, b1=0.0, b2=0.0)


@pytest.mark.parametrize(
    ("name", "argument", "given", "sentence"),
    [
        (
            *("sophia", "obj_fn", lambda p: jnp.square(p["norm"]["scale"]).sum()),
            "'sophia' needs obj_fn, the loss as a function",
        ),
        ("momo", "value", jnp.ones(()), "'momo' needs value, the loss: call .* value=…"),
        ("momo_adam", "value", jnp.ones(()), "'momo_adam' needs value, the loss"),
    ],
)
def test_an_optimizer_says_what_its_update_needs(name, argument, given, sentence):
    tx, params = memopt.optimizer(name, 1e-2), tree()
    state = tx.init(params)
    with pytest.raises(ValueError, match=sentence):
        tx.update(params, state, params)
    tx.update(params, state, params, **{argument: given})


@pytest.mark.parametrize("name", [name for name in memopt.available() if METHODS[name].finds_step])
def test_those_that_find_their_step_take_a_warmup_from_a_learning_rate_of_0(name):
    """Optax's Prodigy and D-Adaptation divide 0 by 0 in such a step, and are NaN from then on."""
    tx = optax.with_extra_args_support(
        memopt.optimizer(name, optax.linear_schedule(0.0, METHODS[name].learning_rate, 4))
    )
    params = {"w": jnp.linspace(1.0, 2.0, 6).reshape(2, 3)}
    state, update = tx.init(params), jax.jit(tx.update)
    start = params
    for _ in range(8):
        value = jnp.square(params["w"]).sum()
        updates, state = update({"w": 2 * params["w"]}, state, params, value=value)
        params = optax.apply_updates(params, updates)
    assert jnp.isfinite(params["w"]).all()
    assert (params["w"] < start["w"]).all()


@pytest.mark.parametrize("name", SUMS_LIKE_PARAMETERS)
def test_methods_whose_sums_have_the_dtype_of_parameters_refuse_two(name):
    shape = lambda dtype: jax.ShapeDtypeStruct((4, 4), dtype)
    tx = memopt.optimizer(name, 1.0)
    with pytest.raises(ValueError, match=r"one dtype for optax.contrib.* got bfloat16 and float32"):
        jax.eval_shape(tx.init, {"a": shape("float32"), "b": shape("bfloat16")})
    jax.eval_shape(tx.init, {"a": shape("bfloat16"), "b": shape("bfloat16")})
