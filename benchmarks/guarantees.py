"""Runs optimizers under unusual conditions and writes the table of docs/guarantees.md.

    python -m benchmarks.guarantees [--optimizers adafactor galore ...]

Each condition is a function from a transformation to a word: "✓" if what docs/guarantees.md says
of the condition holds, otherwise what happens instead. Every result is saved as it is found; run it
again with some names to replace their rows.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding

import memopt
from benchmarks.extra_arguments import with_extra_arguments
from benchmarks.report import measure_cells, table_of_cells
from benchmarks.results import write_pages
from memopt.optimizers.registry import available

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "guarantees.json"
HOLDS = "✓"
RATE, STEPS = 1e-2, 6
SHAPES = {"blocks": {"kernel": (2, 16, 24)}, "bias": (24,)}

Transformation: TypeAlias = optax.GradientTransformationExtraArgs


def draw(seed: int, shapes: Any = None, dtype: Any = jnp.float32) -> Any:
    """A tree of normal numbers: parameters, or the gradients of a step."""
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)
    one = lambda shape: jnp.asarray(rng.normal(size=shape), dtype)
    return jax.tree.map(one, SHAPES if shapes is None else shapes, is_leaf=is_shape)


def step(tx: Transformation, carry: Any, gradients: Any) -> tuple[Any, Any]:
    """A step of training, in the form of a scan's body."""
    params, state = carry
    updates, state = tx.update(gradients, state, params)
    return (optax.apply_updates(params, updates), state), updates


def train(tx: Transformation, params: Any, gradients: list[Any]) -> tuple[Any, Any, Any]:
    """The parameters, the state and the last updates after a step for each of the gradients.

    The updates are the sum of the last three steps', in which methods that take turns move all.
    """
    carry, jitted = (params, jax.jit(tx.init)(params)), jax.jit(functools.partial(step, tx))
    last: list[Any] = []
    for g in gradients:
        carry, updates = jitted(carry, g)
        last = [*last, updates][-3:]
    return *carry, jax.tree.map(lambda *u: functools.reduce(jnp.add, u), *last)


def scan(tx: Transformation, params: Any, gradients: list[Any]) -> Any:
    """The parameters and the state after the same steps in one program."""
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *gradients)
    return jax.lax.scan(functools.partial(step, tx), (params, tx.init(params)), stacked)[0]


def is_finite(tree: Any) -> bool:
    """Whether every number is finite."""
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


def moves(updates: Any) -> bool:
    """Whether every update is finite and, in every array, most are not zero."""
    most = all(bool((x != 0).mean() > 0.1) for x in jax.tree.leaves(updates) if x.size)
    return is_finite(updates) and most


def are_close(a: Any, b: Any) -> bool:
    """Whether the trees agree, relative to the largest number of each array."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    host = ((np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs)
    return all(np.abs(x - y).max(initial=0) <= 1e-4 * np.abs(y).max(initial=1e-2) for x, y in host)


def dtypes(tree: Any) -> list[Any]:
    """The dtypes of the arrays."""
    return [x.dtype for x in jax.tree.leaves(tree)]


def gradients_of(steps: int = STEPS, **options: Any) -> list[Any]:
    """The gradients of some steps."""
    return [draw(100 + t, **options) for t in range(steps)]


def zero_gradient(tx: Transformation) -> str:
    """No update while gradients are zero, and ordinary ones afterwards."""
    zeros = jax.tree.map(jnp.zeros_like, draw(0))
    _, _, still = train(tx, draw(0), [zeros])
    _, _, updates = train(tx, draw(0), [zeros] * 2 + gradients_of())
    if any(bool(x.any()) for x in jax.tree.leaves(still)):
        return "moves"
    return HOLDS if moves(updates) else "stands still"


def after(tx: Transformation, value: float) -> str:
    """Checks that a matrix recovers from one gradient with this entry, or names what is lost."""
    first, *others = gradients_of(8)
    bad = first["blocks"]["kernel"].at[0, 0, 0].set(value)
    hit = {"blocks": {"kernel": bad}, "bias": first["bias"]}
    params, _, updates = train(tx, draw(0), [others[0], hit, *others])
    if not is_finite({"bias": params["bias"]}):
        return "all lost"
    if not is_finite(params):
        layers = [is_finite(layer) for layer in params["blocks"]["kernel"]]
        entries = int((~jnp.isfinite(params["blocks"]["kernel"])).sum())
        return "entry lost" if entries == 1 else "matrix lost" if any(layers) else "stack lost"
    return HOLDS if moves(updates) else "stands still"


def with_skip(tx: Transformation) -> str:
    """The same with `memopt.skip_nonfinite`."""
    found = {after(memopt.skip_nonfinite(tx), value) for value in (jnp.inf, jnp.nan)}
    return " / ".join(sorted(found))


def tiny(tx: Transformation) -> str:
    """Gradients of 1e-38 give finite updates, and ordinary ones afterwards give ordinary ones."""
    small = jax.tree.map(lambda g: 1e-38 * g, gradients_of(2))
    _, _, updates = train(tx, draw(0), small + gradients_of())
    return HOLDS if moves(updates) else "lost"


def shaped(tx: Transformation, shapes: Any) -> str:
    """Parameters of these shapes are trained beside the others."""
    shapes = SHAPES | shapes
    params, _, updates = train(tx, draw(0, shapes), gradients_of(shapes=shapes))
    return HOLDS if is_finite(params) and moves(updates) else "stands still"


def complex_numbers(tx: Transformation) -> str:
    """Complex parameters are refused at init, or approach their target as real ones do."""
    target = draw(1, dtype=jnp.complex64)
    params = jax.tree.map(lambda x: x + 0.1j * jnp.ones_like(x), draw(0, dtype=jnp.complex64))
    loss = lambda p: sum(
        jnp.sum(jnp.abs(x - y) ** 2)
        for x, y in zip(jax.tree.leaves(p), jax.tree.leaves(target), strict=True)
    )
    try:
        state = tx.init(params)
    except (TypeError, ValueError):
        return "refused"
    before = loss(params)

    @jax.jit
    def descend(carry: Any) -> Any:
        return step(tx, carry, jax.tree.map(jnp.conj, jax.grad(loss)(carry[0])))[0]

    carry = (params, state)
    for _ in range(100):
        carry = descend(carry)
    return HOLDS if float(loss(carry[0])) < 0.7 * float(before) else "wrong"


def bfloat16(tx: Transformation) -> str:
    """Updates are bfloat16 and statistics float32."""
    gradients = gradients_of(dtype=jnp.bfloat16)
    params, state, updates = train(tx, draw(0, dtype=jnp.bfloat16), gradients)
    if set(dtypes((params, updates))) != {jnp.dtype(jnp.bfloat16)} or not moves(updates):
        return "wrong"
    return "bfloat16 state" if jnp.dtype(jnp.bfloat16) in dtypes(state) else HOLDS


def x64(tx: Transformation) -> str:
    """Under `jax_enable_x64`, no dtype changes and float32 parameters train as without it."""
    expected = jax.jit(functools.partial(scan, tx))(draw(0), gradients_of())
    with jax.enable_x64(True):
        found = jax.jit(functools.partial(scan, tx))(draw(0), gradients_of())
    return HOLDS if are_close(found[0], expected[0]) else "differs"


def none_leaf(tx: Transformation) -> str:
    """A leaf that is None changes nothing."""
    add = lambda tree: tree | {"frozen": None}
    found, *_ = train(tx, add(draw(0)), [add(g) for g in gradients_of()])
    return HOLDS if are_close(found, train(tx, draw(0), gradients_of())[0]) else "differs"


def pairs() -> tuple[Any, list[Any]]:
    """The parameters and gradients of two models, stacked."""
    two = lambda seed: jax.tree.map(lambda *x: jnp.stack(x), draw(seed), draw(seed + 50))
    return two(0), [two(100 + t) for t in range(STEPS)]


def one_by_one(tx: Transformation) -> Any:
    """The two models' parameters and states, trained one after the other and stacked."""
    params, gradients = pairs()
    take = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    found = [train(tx, take(params, i), [take(g, i) for g in gradients])[:2] for i in (0, 1)]
    return jax.tree.map(lambda *x: jnp.stack(x), *found)


def vmap(tx: Transformation) -> str:
    """Two models under `jax.vmap` train as each does alone."""
    params, gradients = pairs()
    together = jax.vmap(functools.partial(scan, tx), in_axes=(0, 0))
    stacked = jax.jit(lambda p, g: together(p, g))(params, gradients)
    return HOLDS if are_close(stacked[0], one_by_one(tx)[0]) else "differs"


def in_scan(tx: Transformation) -> str:
    """Steps under `jax.lax.scan` are those of a loop."""
    found = jax.jit(functools.partial(scan, tx))(draw(0), gradients_of())
    return HOLDS if are_close(found, train(tx, draw(0), gradients_of())[:2]) else "differs"


def shard_map(tx: Transformation) -> str:
    """One model on each device under `jax.shard_map` trains as it does alone."""
    mesh = jax.make_mesh((2,), ("models",), axis_types=(AxisType.Auto,))
    params, gradients = pairs()

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=jax.P("models"), out_specs=jax.P("models")
    )
    def together(params: Any, gradients: list[Any]) -> Any:
        one = functools.partial(jax.tree.map, lambda x: x[0])
        found, _ = scan(tx, one(params), one(gradients))
        return jax.tree.map(lambda x: x[None], found)

    return HOLDS if are_close(together(params, gradients), one_by_one(tx)[0]) else "differs"


def eight_devices(tx: Transformation) -> str:
    """Parameters split over 2×4 devices train as on one."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    specs = {"blocks": {"kernel": jax.P(None, "a", "b")}, "bias": jax.P("b")}
    place = functools.partial(
        jax.device_put, device=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    )
    expected = train(tx, draw(0), gradients_of())[0]
    with jax.set_mesh(mesh):
        found = train(tx, place(draw(0)), [place(g) for g in gradients_of()])[0]
    return HOLDS if are_close(found, expected) else "differs"


CONDITIONS: dict[str, Callable[[Transformation], str]] = {
    "zero gradient": zero_gradient,
    "inf": functools.partial(after, value=jnp.inf),
    "NaN": functools.partial(after, value=jnp.nan),
    "skip_nonfinite": with_skip,
    "1e20": functools.partial(after, value=1e20),
    "1e-38": tiny,
    "scalar": functools.partial(shaped, shapes={"scale": ()}),
    "empty": functools.partial(shaped, shapes={"none": (0, 4), "nothing": (0,)}),
    "complex": complex_numbers,
    "bfloat16": bfloat16,
    "x64": x64,
    "None": none_leaf,
    "vmap": vmap,
    "scan": in_scan,
    "shard_map": shard_map,
    "8 devices": eight_devices,
}


STORED = {f"adam, {codec} state": codec for codec in ("int8", "flash8", "dynamic8")}
"""Rows of Adam with its state in 8 bits, and their codecs."""


OPTIONS: dict[str, dict[str, Any]] = {"badam": {"switch_every": 1, "head": True}}
"""Options with which a method moves two layers, and all other parameters, in three steps."""


def stored_adam(codec: str, learning_rate: float) -> optax.GradientTransformation:
    """Adam with its state in a codec."""
    adam = memopt.quantize_state(optax.scale_by_adam(), codec, min_size=64)
    return optax.chain(adam, optax.scale_by_learning_rate(learning_rate))


def build(name: str) -> Transformation:
    """The optimizer of a row."""
    if name in STORED:
        return optax.with_extra_args_support(stored_adam(STORED[name], RATE))
    return with_extra_arguments(memopt.optimizer)(name, RATE, **OPTIONS.get(name, {}))


def rows() -> tuple[str, ...]:
    """The optimizers of the table."""
    return (*available("memopt"), *STORED, "adam")


def found(name: str, condition: str) -> str:
    """The word for an optimizer and a condition; a failure is one."""
    try:
        return CONDITIONS[condition](build(name))
    except Exception as error:
        return f"fails: {type(error).__name__}"


def table(report: dict[str, Any]) -> str:
    """The table in Markdown."""
    return table_of_cells("method", rows(), [*CONDITIONS], report["results"])


def main() -> None:
    """Measures, and replaces the table in docs/guarantees.md."""
    measure_cells(rows(), CONDITIONS, found, RESULTS, __doc__)
    write_pages()


if __name__ == "__main__":
    main()
