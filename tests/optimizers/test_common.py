"""One suite that every optimizer passes; a new method enters by one line of `CASES`."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from orbax.checkpoint import v1 as ocp

import memopt
from benchmarks.extra_arguments import with_extra_arguments
from memopt import projectors, recombine
from memopt.optimizers.registry import METHODS
from memopt.state.codecs import bits_of
from memopt.trees import leaf_name
from tests.optimizers import pairings, test_rederived
from tests.optimizers.kinds import ENTRYWISE, KINDS, STRUCTURES, slow_unless
from tests.optimizers.tasks import on_tasks

RANK = 4


class Case(NamedTuple):
    """An optimizer and what it keeps for a parameter, in numbers of four bytes, from its shape.

    Attributes:
      make: from a learning rate to the optimizer.
      matrix: for a stack of k hidden matrices, from (k, m, n).
      rest: for a matrix that is not hidden, an embedding or head, from (m, n).
      vector: for a vector of n.
      static: arguments that `inject_hyperparams` must leave alone; methods of memopt say it.
    """

    make: Callable[..., optax.GradientTransformation]
    matrix: Callable[[int, int, int], float]
    rest: Callable[[int, int], float]
    vector: Callable[[int], int]
    static: tuple[str, ...] = ()


def variant(method, **fixed):
    """`method` with other defaults, its signature kept for `inject_hyperparams`."""
    return functools.partial(method, **fixed)


none = lambda *shape: 0
once = lambda *shape: math.prod(shape)
twice = lambda *shape: 2 * math.prod(shape)
thrice = lambda *shape: 3 * math.prod(shape)
factors = lambda m, n: m + n
moments = lambda k, m, n: k * (2 * RANK * max(m, n) + 1)
mini_moments = lambda k, m, n: k * (2 * max(m, n) + 1)


def galore_at_random(learning_rate, rank=RANK):
    """Adam in a stored random subspace, lifted; moments begin anew at each refresh."""
    basis = projectors.rademacher(rank, stored=True)
    adam = optax.scale_by_adam()
    return optax.chain(
        memopt.in_subspace(adam, basis, recombine.lift(), 3, "reset"),
        optax.scale_by_learning_rate(learning_rate),
    )


def quantized_adamw(learning_rate, codec="int8"):
    """AdamW whose moments are codes."""
    return optax.chain(
        memopt.quantize_state(optax.scale_by_adam(), codec, min_size=200),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(learning_rate),
    )


def quantized_rmnp(learning_rate):
    """RMNP whose momentum is codes."""
    return memopt.quantize_state(memopt.rmnp(learning_rate), "int8", min_size=200)


def quantized_soap(learning_rate):
    """SOAP of the shorter side, all of whose state is codes."""
    soap = memopt.soap(learning_rate, one_sided=True, refresh_every=3)
    return memopt.quantize_state(soap, "int8", min_size=200)


def quantized_galore(learning_rate, rank=RANK):
    """GaLore whose Adam keeps codes."""
    inner = memopt.quantize_state(optax.scale_by_adam(), min_size=0)
    return memopt.galore(learning_rate, rank=rank, refresh_every=3, inner=inner)


def galore_with_4bit_bases(learning_rate, rank=RANK):
    """GaLore with Q-GaLore's bases: in four bits, and refreshed less often where they stay."""
    tx = memopt.galore(learning_rate, rank=rank, refresh_every=3, projector="lazy_svd")
    codec = {"/projector/0/": memopt.codecs.Asymmetric(bits=4)}
    return memopt.quantize_state(tx, codec, min_size=0)


def tag_on_three_tasks(learning_rate, adam=False, factored=False, weight_decay=0.0):
    """TAG, which returns to the first of its tasks."""
    options = {"adam": adam, "factored": factored, "weight_decay": weight_decay}
    return on_tasks(memopt.tag(learning_rate, tasks=3, **options), [0, 0, 1, 2, 0])


mkor = functools.partial(memopt.mkor, refresh_every=2)
factors_and_momentum = lambda k, m, n: k * (m * m + n * n + m * n)


def largest_changes(learning_rate):
    """Gradient descent that returns to where it started, but for the largest changes."""
    keep = memopt.keep_largest_change(None, fraction=0.3, every=2)
    return optax.chain(optax.sgd(learning_rate), keep)


# Two codes a number, and two scales a row for each; of four bits half a code, and half a scale.
int8_moments = lambda *shape: math.prod(shape) / 2 + 4 * math.prod(shape[:-1])
int4_moments = lambda *shape: 3 / 8 * math.prod(shape) + 5 / 2 * math.prod(shape[:-1])
bfloat16_moments = lambda *shape: math.prod(shape)
low_moments = lambda k, m, n: k * (2 * RANK * max(m, n) + RANK * min(m, n))
decays = {"weight_decay": 0.1}
ranks = {"rank": RANK, "refresh_every": 3}
CASES = {
    "adafactor": Case(
        memopt.adafactor, lambda k, m, n: k * (m + n), factors, once
    ),
    "adafactor_momentum": Case(
        variant(memopt.adafactor, b1=0.9, as_released=True, **decays),
        lambda k, m, n: k * (m + n + m * n),
        lambda m, n: m + n + m * n,
        twice,
    ),
    "adalomo": Case(
        variant(memopt.adalomo, clip_value=0.5, **decays),
        lambda k, m, n: k * (m + n),
        factors,
        once,
    ),
    "adalomo_as_released": Case(
        variant(memopt.adalomo, as_released=True, **decays),
        lambda k, m, n: k * (m + n),
        factors,
        once,
    ),
    "adagrad_norm": Case(
        variant(memopt.adagrad_norm, **decays),
        lambda k, m, n: k,
        lambda m, n: 1,
        lambda *shape: math.prod(shape[:-1]),
    ),
    "adagrad_norm_as_released": Case(
        variant(memopt.adagrad_norm, as_released=True, **decays),
        lambda k, m, n: k * n,
        lambda m, n: n,
        once,
    ),
    "adam_atan2": Case(variant(memopt.adam_atan2, **decays), twice, twice, twice),
    "adam_mini": Case(
        variant(memopt.adam_mini, **decays),
        lambda k, m, n: k * (m * n + n),
        lambda m, n: m * n + m,
        lambda *shape: math.prod(shape) + math.prod(shape[:-1]),
    ),
    "apollo": Case(
        variant(memopt.apollo, **ranks, **decays), moments, twice, twice
    ),
    "apollo_as_released": Case(
        variant(memopt.apollo, as_released=True, **ranks, **decays),
        lambda k, m, n: moments(k, m, n) + RANK * min(m, n),
        twice,
        twice,
    ),
    "apollo_mini": Case(
        variant(memopt.apollo_mini, refresh_every=3), mini_moments, twice, twice
    ),
    "apollo_mini_scale_front": Case(
        variant(memopt.apollo_mini, scale_front=True), mini_moments, twice, twice
    ),
    "badam": Case(
        variant(memopt.badam, switch_every=2, **decays),
        lambda k, m, n: 2 * m * n,
        none,
        lambda *shape: 2 * math.prod(shape[1:]) if len(shape) > 1 else 0,
    ),
    "badam_random": Case(
        variant(memopt.badam, switch_every=1, order="random"),
        lambda k, m, n: 2 * m * n,
        none,
        lambda *shape: 2 * math.prod(shape[1:]) if len(shape) > 1 else 0,
    ),
    "adopt": Case(variant(memopt.adopt, **decays), twice, twice, twice),
    "amsgrad": Case(variant(memopt.amsgrad, **decays), thrice, thrice, thrice),
    "lamb": Case(variant(memopt.lamb, **decays), twice, twice, twice),
    "lars": Case(variant(memopt.lars, **decays), once, once, once),
    "slim_adam": Case(
        variant(memopt.slim_adam, **decays),
        lambda k, m, n: k * (m * n + m),
        lambda m, n: m * n + m,
        twice,
    ),
    "came": Case(
        variant(memopt.came, **decays),
        lambda k, m, n: k * (m * n + 2 * m + 2 * n),
        lambda m, n: m * n + 2 * m + 2 * n,
        twice,
    ),
    "sm3": Case(
        variant(memopt.sm3, **decays),
        lambda k, m, n: k * (m * n + m + n),
        lambda m, n: m * n + m + n,
        twice,
    ),
    "ademamix": Case(variant(METHODS["ademamix"].make, **decays), thrice, thrice, thrice),
    "lion": Case(variant(memopt.lion, **decays), once, once, once),
    "lomo": Case(variant(memopt.lomo, clip_value=0.5, **decays), none, none, none),
    "muon": Case(variant(memopt.muon, **decays), once, twice, twice),
    "normuon": Case(
        variant(memopt.normuon, **decays), lambda k, m, n: k * (m * n + n), twice, twice
    ),
    "racs": Case(variant(memopt.racs, **decays), lambda k, m, n: k * (m + n + 1), twice, twice),
    "rmnp": Case(variant(memopt.rmnp, **decays), once, twice, twice),
    "rmnp_8bit": Case(
        quantized_rmnp, lambda *s: math.prod(s) / 4 + 2 * math.prod(s[:-1]), int8_moments, twice
    ),
    "scale": Case(variant(memopt.scale, **decays), none, none, twice),
    "sinkgd": Case(variant(memopt.sinkgd, **decays), none, twice, twice),
    "sinkgd_momentum": Case(variant(memopt.sinkgd, momentum=0.9), once, twice, twice),
    "mkor": Case(variant(mkor, **decays), factors_and_momentum, once, once),
    "mkor_hybrid": Case(variant(mkor, hybrid=True), factors_and_momentum, once, once),
    "mkor_as_released": Case(variant(mkor, as_released=True), factors_and_momentum, once, once),
    "galore": Case(variant(memopt.galore, **ranks, **decays), low_moments, twice, twice),
    "galore_in_turns": Case(
        variant(memopt.galore, projector="svd", refresh_phase=(0, 1), as_released=True, **ranks),
        low_moments,
        twice,
        twice,
    ),
    "oasis": Case(
        variant(memopt.oasis, first_probes=3, **decays),
        twice,
        twice,
        twice,
    ),
    "oasis_momentum": Case(variant(memopt.oasis, adaptive=False), twice, twice, twice),
    "online_subspace_descent": Case(
        variant(memopt.online_subspace_descent, rank=RANK, **decays),
        lambda k, m, n: low_moments(k, m, n) + k * 2 * RANK * min(m, n) + 1,
        twice,
        twice,
    ),
    "fira": Case(
        variant(memopt.fira, **ranks, **decays),
        lambda k, m, n: low_moments(k, m, n) + k,
        twice,
        twice,
    ),
    "subtrack": Case(
        variant(memopt.subtrack, **ranks, **decays),
        lambda k, m, n: low_moments(k, m, n) + k,
        twice,
        twice,
    ),
    "flora": Case(
        variant(memopt.flora, **ranks, **decays),
        lambda k, m, n: k * (RANK * max(m, n) + m + n),
        lambda m, n: m + n + m * n,
        twice,
    ),
    "flora_as_released": Case(
        variant(memopt.flora, as_released=True, **ranks),
        lambda k, m, n: k * (RANK * max(m, n) + m + n),
        lambda m, n: m + n + m * n,
        twice,
    ),
    "frugal": Case(
        variant(memopt.frugal, refresh_every=3, **decays),
        lambda k, m, n: 2 * k * math.ceil(m / 4) * n,
        twice,
        twice,
    ),
    "frugal_orthogonal": Case(
        variant(memopt.frugal, projector="orthogonal", refresh_every=3, on_refresh="carry"),
        lambda k, m, n: k * 2 * RANK * max(m, n) + RANK * min(m, n),
        twice,
        twice,
    ),
    "frugal_blocks": Case(
        variant(memopt.frugal, projector="blocks", refresh_every=3, density=0.5),
        lambda k, m, n: 2 * math.ceil(k / 2) * m * n,
        twice,
        twice,
    ),
    "ldadam": Case(
        variant(memopt.ldadam, rank=RANK, **decays),
        lambda k, m, n: low_moments(k, m, n) + k * m * n,
        twice,
        twice,
    ),
    "soap": Case(
        variant(memopt.soap, refresh_every=3, **decays),
        lambda k, m, n: 2 * k * (m * n + m * m + n * n),
        twice,
        twice,
    ),
    "soap_as_released": Case(
        variant(memopt.soap, as_released=True, refresh_every=3, max_side=20, **decays),
        lambda k, m, n: 2 * k * (m * n + sum(side**2 for side in (m, n) if side <= 20)),
        twice,
        twice,
    ),
    "soap_in_blocks": Case(
        variant(memopt.soap, refresh_every=3, block_size=8, refresh_phase=(0, 1)),
        lambda k, m, n: 2 * k * (m * n + 8 * (m + n)),
        twice,
        twice,
    ),
    "soap_one_sided": Case(
        variant(memopt.soap, refresh_every=3, one_sided=True, **decays),
        lambda k, m, n: 2 * k * (m * n + min(m, n) ** 2),
        twice,
        twice,
    ),
    "soap_8bit": Case(  # factor and basis with a diagonal and two scales a row
        quantized_soap,
        lambda k, m, n: int8_moments(k, m, n) + k * (min(m, n) ** 2 / 2 + 3 * min(m, n)),
        int8_moments,
        twice,
    ),
    "tag": Case(memopt.tag, twice, twice, twice),
    "tag_adam": Case(
        variant(tag_on_three_tasks, adam=True, **decays),
        lambda *shape: 3 * twice(*shape),
        lambda *shape: 3 * twice(*shape),
        lambda *shape: 3 * twice(*shape),
    ),
    "tag_factored": Case(
        variant(tag_on_three_tasks, factored=True),
        lambda k, m, n: 6 * k * (m + n),
        lambda m, n: 6 * (m + n),
        lambda *shape: 3 * twice(*shape),
    ),
    "galore_at_random": Case(
        galore_at_random,
        lambda k, m, n: 2 * RANK * max(m, n) * k + RANK * min(m, n),
        twice,
        twice,
        ("rank",),
    ),
    "largest_changes": Case(largest_changes, once, once, once),
    "adamw_8bit": Case(quantized_adamw, int8_moments, int8_moments, twice),
    "adamw_4bit": Case(variant(quantized_adamw, codec="int4"), int4_moments, int4_moments, twice),
    "adamw_bfloat16": Case(
        variant(quantized_adamw, codec="bfloat16"), bfloat16_moments, bfloat16_moments, twice
    ),
    "galore_8bit": Case(
        quantized_galore,
        lambda k, m, n: int8_moments(*pairings.dense(k, m, n)) + k * RANK * min(m, n),
        twice,
        twice,
        ("rank",),
    ),
    "galore_4bit_basis": Case(
        galore_with_4bit_bases,
        lambda k, m, n: k * (2 * RANK * max(m, n) + (RANK / 8 + 3 / 4) * min(m, n) + 6),
        twice,
        twice,
        ("rank",),
    ),
}  # fmt: skip


def cell(space: pairings.Space, rule: pairings.Rule, inner: pairings.Inner) -> Case:
    """A cell of the table projector × recombination × inner optimizer as a case."""
    return Case(
        lambda learning_rate: optax.chain(
            pairings.transformation(space, rule, inner), optax.scale_by_learning_rate(learning_rate)
        ),
        lambda *shape: inner.matrix(*space.low(*shape)) + space.keeps(*shape) + rule.keeps(*shape),
        lambda m, n: inner.matrix(1, m, n),
        inner.vector,
    )


CELLS = {name: cell(*parts) for name, parts in pairings.cells().items()}
VARIANTS = {  # of methods that stand in the table otherwise, too
    *("adafactor_momentum", "adalomo_as_released", "adamw_4bit", "adamw_bfloat16"),
    *("apollo_as_released",),
    *("apollo_mini_scale_front", "flora_as_released", "frugal_blocks", "frugal_orthogonal"),
    *("galore_8bit", "galore_at_random", "galore_in_turns", "largest_changes"),
    *("soap_8bit", "soap_as_released", "soap_in_blocks", "soap_one_sided"),
    *("badam_random", "galore_4bit_basis", "rmnp_8bit", "sinkgd_momentum"),
    *("oasis_momentum", "mkor_as_released", "mkor_hybrid", "tag_adam", "tag_factored"),
}
CASES |= CELLS
CASES = {name: case._replace(make=with_extra_arguments(case.make)) for name, case in CASES.items()}
every_case = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=slow_unless(name not in VARIANTS | set(CELLS))) for name in CASES],
)
# What wrappers of Optax do depends on the structure of the state only.
every_structure = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=slow_unless(n in {*STRUCTURES, "adamw_8bit"})) for n in CASES]
)
BY_ITSELF = {*memopt.available("memopt"), "adamw_8bit"} - {*test_rederived.METHODS}
LAYERS = 2
SHAPES = {
    "embed": {"embedding": (64, 16)},
    "blocks": {
        "up": {"kernel": (LAYERS, 16, 32)},
        "down": {"kernel": (LAYERS, 32, 16)},
        "square": {"kernel": (LAYERS, 16, 16)},
        "norm": {"scale": (LAYERS, 16)},
    },
    "final_norm": {"scale": (16,)},
}
SPECS = {
    "embed": {"embedding": jax.P("a", "b")},
    "blocks": {
        "up": {"kernel": jax.P(None, "a", "b")},
        "down": {"kernel": jax.P("a", None, "b")},
        "square": {"kernel": jax.P("a", "b", None)},
        "norm": {"scale": jax.P(None, "b")},
    },
    "final_norm": {"scale": jax.P("a")},
}
is_shape = lambda x: isinstance(x, tuple)
STEPS = 5


def part(whole: dict, name: str) -> dict:
    """The tree that a case is run on: a cell of the table has one of the hidden matrices."""
    return with_one_kernel(whole, name) if name in CELLS else whole


def with_one_kernel(whole: dict, name: str) -> dict:
    """The tree with one of its hidden matrices, in turns over the cases."""
    blocks = whole["blocks"]
    kernel = [key for key in blocks if "kernel" in blocks[key]][list(CASES).index(name) % 3]
    return whole | {"blocks": {key: blocks[key] for key in (kernel, "norm")}}


def draw(shapes: dict, seed: int, dtype: Any = jnp.float32) -> Any:
    """Parameters, or the gradients of a step."""
    normal = np.random.default_rng(seed).normal
    return jax.tree.map(lambda s: jnp.asarray(normal(size=s), dtype), shapes, is_leaf=is_shape)


@pytest.fixture
def tree(name: str) -> Callable[..., Any]:
    """From a seed, and perhaps a dtype, to a case's parameters or gradients."""
    return functools.partial(draw, part(SHAPES, name))


@pytest.fixture
def small_tree(name: str) -> Callable[..., Any]:
    """The same with one hidden matrix, where what is tested does not depend on its shape."""
    return functools.partial(draw, with_one_kernel(SHAPES, name))


def compiled(tx: Any) -> Any:
    """The transformation's `init`, and a step of ordinary training, jitted."""

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(tx.init), step


@functools.cache
def compiled_case(name: str) -> Any:
    """The same of a case: tests with the same shapes share the programs."""
    return compiled(CASES[name].make(1e-2))


def train(
    programs: Any, params: Any, gradient: Callable[[int], Any], steps: int = STEPS
) -> tuple[Any, Any]:
    """Parameters and state after some steps."""
    init, step = programs
    state = init(params)
    for t in range(steps):
        params, state = step(params, state, gradient(100 + t))
    return params, state


def run(tx: Any, params: Any, gradient: Callable[[int], Any], steps: int = STEPS) -> Any:
    """Parameters and state after some steps of ordinary, jitted training."""
    return train(compiled(tx), params, gradient, steps)


@functools.cache
def plain(name: str) -> Any:
    """The run that most tests compare with."""
    tree = functools.partial(draw, part(SHAPES, name))
    return train(compiled_case(name), tree(0), tree)


@functools.cache
def small_plain(name: str) -> Any:
    """The same with one hidden matrix."""
    tree = functools.partial(draw, with_one_kernel(SHAPES, name))
    return train(compiled_case(name), tree(0), tree)


def close(a: Any, b: Any, rtol: float = 2e-5) -> None:
    (a, codes), (b, others) = apart(a), apart(b)
    chex.assert_trees_all_close(a, b, rtol=rtol, atol=1e-6)
    # What is rounded in another order may, at the edge, have the code beside.
    chex.assert_trees_all_close(codes, others, rtol=0, atol=1)


def apart(tree: Any) -> tuple[Any, Any]:
    """The arrays of a tree, and those of codes, as int32."""
    is_code = lambda x: x.dtype in (jnp.int4, jnp.int8, jnp.uint8)
    split = lambda this: jax.tree.map(lambda x: x if is_code(x) == this else None, tree)
    return split(False), jax.tree.map(lambda x: x.astype(jnp.int32), split(True))


def test_every_method_of_memopt_is_a_case():
    assert set(memopt.available("memopt")) <= set(CASES)


@every_case
def test_state_bytes_are_the_formula(name, tree):
    case = CASES[name]
    table = memopt.state_bytes(case.make(1e-2), tree(0))
    for path, shape in jax.tree_util.tree_leaves_with_path(part(SHAPES, name), is_leaf=is_shape):
        leaf = leaf_name(path)
        formula = case.matrix if "kernel" in leaf else case.rest if "embed" in leaf else case.vector
        assert table[leaf] == 4 * formula(*shape), leaf
    assert table.shared <= 4 * 8  # step counts
    state = jax.eval_shape(case.make(1e-2).init, tree(0))
    bits = sum(x.size * bits_of(x.dtype) for x in jax.tree.leaves(state))
    assert table.total == bits / 8


# `test_rederived` compares stacks of those it follows with one matrix at a time.
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=slow_unless(n in KINDS or n in BY_ITSELF)) for n in CASES],
)
def test_stacked_layers_are_separate_layers(name, small_tree):
    def unstack(params):
        layers = [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(LAYERS)]
        return params | {"blocks": layers}

    tx, tree = CASES[name].make(1e-2), small_tree
    separate, _ = run(tx, unstack(tree(0)), lambda seed: unstack(tree(seed)))
    close(unstack(small_plain(name)[0]), separate)


@every_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_dtypes_of_state_and_updates_never_change(name, tree, dtype):
    tx = CASES[name].make(1e-2)
    params = jax.eval_shape(lambda: tree(0, dtype))
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    statistics = {str(x.dtype) for x in jax.tree.leaves(after)} - {"int32"}
    if "bit" in name or name == "adamw_bfloat16":
        statistics -= {"int4", "int8", "uint8", "bfloat16"}
    if name == "oasis":
        statistics -= {jnp.dtype(dtype).name}  # a copy of the parameters
    # Statistics of Optax follow the parameter, and so do Lion's momentum and a copy of the
    # parameters; others are float32.
    follows = name in ("lion", "largest_changes", *memopt.available("optax"))
    assert statistics <= {jnp.dtype(dtype if follows else jnp.float32).name}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=slow_unless(n not in VARIANTS | set(CELLS) | ENTRYWISE)) for n in CASES],
)
def test_bfloat16_gradients_keep_float32_statistics(name, small_tree):
    narrow = lambda seed: small_tree(seed, jnp.bfloat16)
    wide = lambda seed: jax.tree.map(lambda x: x.astype(jnp.float32), narrow(seed))
    _, state = train(compiled_case(name), small_tree(0), narrow)
    _, exact = train(compiled_case(name), small_tree(0), wide)
    # The momenta of Adafactor and Flora average updates, which are bfloat16 themselves; Optax
    # multiplies in the gradient's dtype.
    rounds = "adafactor_momentum" in name or "flora" in name or name in memopt.available("optax")
    allowed = 2**-7 if rounds else 1e-3
    for got, expected in zip(jax.tree.leaves(state), jax.tree.leaves(exact), strict=True):
        if got.dtype == jnp.float32:
            assert jnp.abs(got - expected).max() <= allowed * jnp.abs(expected).max()


@every_structure
def test_an_injected_learning_rate_follows_its_schedule(name, small_tree):
    case = CASES[name]
    schedule = optax.linear_schedule(1e-2, 0.0, STEPS)
    scheduled, _ = run(case.make(schedule), small_tree(0), small_tree)
    tx = optax.inject_hyperparams(case.make, static_args=case.static)(learning_rate=schedule)
    injected, state = run(tx, small_tree(0), small_tree)
    close(scheduled, injected)
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(1e-2 / STEPS)


@every_structure
def test_masked_and_partition_leave_other_parameters_alone(name, small_tree):
    tx, tree = CASES[name].make(1e-2), small_tree
    mask = {"embed": False, "blocks": True, "final_norm": False}
    masked = optax.masked(tx, mask)
    updates, _ = jax.jit(lambda g, p: masked.update(g, masked.init(p), p))(tree(100), tree(0))
    chex.assert_trees_all_equal(updates["embed"], tree(100)["embed"])
    labels = {"embed": "sgd", "blocks": "ours", "final_norm": "sgd"}
    tx = optax.partition({"ours": tx, "sgd": optax.sgd(0.5)}, labels)
    params, _ = run(tx, tree(0), tree)
    if name != "oasis":  # whose step size depends on all parameters
        close(params["blocks"], small_plain(name)[0]["blocks"])
    moved = sum(0.5 * tree(100 + t)["embed"]["embedding"] for t in range(STEPS))
    close(params["embed"]["embedding"], tree(0)["embed"]["embedding"] - moved)


@every_structure
def test_multi_steps_of_two_halves_equal_one_step_of_their_mean(name, small_tree):
    around = lambda seed: jax.tree.map(lambda x: 0.25 * x, small_tree(seed + 1000))
    halves = lambda seed: jax.tree.map(
        lambda g, d: g + d if seed % 2 else g - d, small_tree(100 + seed // 2), around(seed // 2)
    )
    accumulating = optax.MultiSteps(CASES[name].make(1e-2), 2)
    params, _ = run(accumulating, small_tree(0), lambda seed: halves(seed - 100), 2 * STEPS)
    close(params, small_plain(name)[0], rtol=2e-4)


@every_case
def test_none_leaves_and_empty_trees_change_no_number(name, small_tree):
    """An update is the same program, down to its constants."""
    tx = CASES[name].make(1e-2)

    def program(params):
        state = jax.eval_shape(tx.init, params)
        return jax.make_jaxpr(tx.update)(params, state, params), state

    params = jax.eval_shape(lambda: small_tree(0))
    with_none = params | {"frozen": None, "nothing": {}}
    (found, state), (expected, like) = program(with_none), program(params)
    assert without_addresses(found) == without_addresses(expected)
    jax.tree.map(np.testing.assert_array_equal, found.consts, expected.consts)
    chex.assert_trees_all_equal_shapes_and_dtypes(*map(jax.tree.leaves, (state, like)))
    updates, _ = tx.update({}, tx.init({}), {})
    assert updates == {}


def without_addresses(program: Any) -> str:
    return re.sub(r"0x[0-9a-f]+", "", str(program))


@every_case
def test_tree_map_params_pairs_each_array_with_its_parameter(name, small_tree):
    """A mask stands where nothing is kept."""
    tx, tree = CASES[name].make(1e-2), small_tree
    state = small_plain(name)[1]
    chex.assert_trees_all_equal(optax.tree_map_params(tx, lambda x: x, state), state)

    names = {leaf_name(path): i for i, (path, _) in enumerate(jax.tree.leaves_with_path(tree(0)))}
    numbers = jax.tree.unflatten(jax.tree.structure(tree(0)), list(names.values()))
    is_nothing = lambda x: isinstance(x, optax.MaskedNode)
    number = lambda x, i: x if is_nothing(x) else i
    of_none = {"transform_non_params": lambda x: -1}
    owners = optax.tree_map_params(tx, number, state, numbers, is_leaf=is_nothing, **of_none)
    kept = dict.fromkeys(names.values(), 0)
    for x, owner in zip(jax.tree.leaves(state), jax.tree.leaves(owners), strict=True):
        if owner >= 0:
            kept[owner] += x.size * bits_of(x.dtype) // 8
    table = memopt.state_bytes(tx, tree(0))
    assert kept == {i: table[leaf] for leaf, i in names.items()}


@every_case
def test_init_of_shapes_is_init_of_arrays(name, small_tree):
    shapes = jax.eval_shape(lambda: small_tree(0))
    concrete = small_plain(name)[1]
    tx = CASES[name].make(1e-2)
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(shapes), concrete)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, shapes), concrete)


@every_structure
def test_the_state_is_carried_through_scan_and_cond(name, small_tree):
    tx, tree = CASES[name].make(1e-2), small_tree

    def step(carry, g):
        params, state = carry
        apply = lambda: tx.update(g, state, params)
        skip = lambda: (jax.tree.map(jnp.zeros_like, params), state)
        updates, state = jax.lax.cond(g["final_norm"]["scale"][0] == 0, skip, apply)
        return (optax.apply_updates(params, updates), state), None

    gradients = jax.tree.map(lambda *g: jnp.stack(g), *(tree(100 + t) for t in range(STEPS)))
    scanned = lambda params: jax.lax.scan(step, (params, tx.init(params)), gradients)[0]
    close(jax.jit(scanned)(tree(0)), small_plain(name))


def on_a_mesh() -> Any:
    """One method of each kind under Explicit axes, the others with -m slow.

    Every method is trained on a mesh of Auto axes by tests/state/test_sharding.py, too.
    """
    for name in CASES:
        for axis_type in (AxisType.Auto, AxisType.Explicit):
            is_quick = name in {*KINDS, "adamw_8bit"} and axis_type == AxisType.Explicit
            marks = slow_unless(is_quick)
            yield pytest.param(name, axis_type, id=f"{name}-{axis_type.name.lower()}", marks=marks)


@pytest.mark.parametrize(("name", "axis_type"), [*on_a_mesh()])
def test_sharded_is_unsharded(name, tree, axis_type):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type, axis_type))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), part(SPECS, name))
    place = lambda seed: jax.device_put(tree(seed), shardings)
    with jax.set_mesh(mesh):
        params, state = run(CASES[name].make(1e-2), place(0), place)
        if axis_type == AxisType.Explicit:
            chex.assert_trees_all_equal(jax.tree.map(lambda x: x.sharding, params), shardings)
    # Relative to an array's largest entry: what rounding does to a singular vector it does to
    # all of its entries, small ones too.
    (arrays, codes), (others, other_codes) = apart((params, state)), apart(plain(name))
    chex.assert_trees_all_close(codes, other_codes, rtol=0, atol=1)
    for got, expected in zip(*map(jax.tree.leaves, (arrays, others)), strict=True):
        assert jnp.abs(got - expected).max() <= 1e-4 * jnp.abs(expected).max(initial=1e-2)


@every_structure
def test_checkpoint_and_resume_bit_for_bit(name, small_tree, tmp_path):
    tree = small_tree
    half = train(compiled_case(name), tree(0), tree, 3)
    ocp.save(tmp_path / "half", half)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), half)
    params, state = ocp.load(tmp_path / "half", like)
    _, step = compiled_case(name)
    for t in range(3, STEPS):
        params, state = step(params, state, tree(100 + t))
    chex.assert_trees_all_equal((params, state), small_plain(name))
