"""Times optimizer steps on a billion parameters, relative to the memory's bandwidth."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import memopt
from benchmarks import torch_optimizers
from benchmarks.device.jobs import Job, Record, describe
from benchmarks.device.profile import longest_kernels
from benchmarks.report import milliseconds, spread
from benchmarks.updates import (
    LEARNING_RATE,
    Contender,
    measure,
    model_shapes,
    on_one_device,
    optax_muon,
    torch_contenders,
)

#: Methods below this fraction of the copy's bandwidth are profiled.
FAST = 0.85
#: The number of bytes that are copied to measure the bandwidth.
COPIED = 2**32


class Case(NamedTuple):
    """An optimizer, and how parameters are stored.

    Attributes:
        library: its library; updates of memopt's are applied by `memopt.apply_rounded_updates`.
        build: builds the optimizer.
        dtype: the dtype of parameters and gradients.
        weights: how the parameters are stored, see `memopt.quantize_params`; None for not
            quantised.
    """

    library: str
    build: Callable[[], optax.GradientTransformation]
    dtype: Literal["float32", "bfloat16"] = "float32"
    weights: str | None = None


COPY, TORCH = "copy", "torch_adamw"
GALORE, REFRESH = "galore", "galore, a refresh"
BASELINE = "optax.adamw"
CASES = {
    BASELINE: Case("optax", lambda: optax.adamw(LEARNING_RATE)),
    "adamw": Case("memopt", lambda: optax.adamw(LEARNING_RATE)),
    "adamw, bfloat16": Case("memopt", lambda: optax.adamw(LEARNING_RATE), "bfloat16"),
    "adamw, int8 state": Case("memopt", lambda: memopt.quantize_state(optax.adamw(LEARNING_RATE))),
    "adamw, bfloat16+8 weights, int8 state": Case(
        *("memopt", lambda: memopt.quantize_state(optax.adamw(LEARNING_RATE))),
        *("bfloat16", "bfloat16+8"),
    ),
    "adafactor": Case("memopt", lambda: memopt.adafactor(LEARNING_RATE)),
    "lion": Case("memopt", lambda: memopt.lion(LEARNING_RATE)),
    "apollo_mini": Case("memopt", lambda: memopt.apollo_mini(LEARNING_RATE)),
    "apollo": Case("memopt", lambda: memopt.apollo(LEARNING_RATE)),
    "muon": Case("memopt", lambda: memopt.muon(LEARNING_RATE)),
    "optax.contrib.muon": Case("optax", lambda: optax_muon(LEARNING_RATE)),
    GALORE: Case("memopt", lambda: memopt.galore(LEARNING_RATE)),
}
FROM_TORCH = (TORCH,) if TORCH in torch_optimizers.installed() else ()


class _Contenders:
    """Contenders on a model's shapes; those with equal storage share their parameters."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.parameters = functools.cache(
            lambda dtype, weights: on_one_device(model_shapes(model, dtype), weights)
        )

    def build(self, name: str) -> Contender:
        if name == TORCH:
            return self._from_torch()
        case = CASES[name]
        parameters, tx = self.parameters(case.dtype, case.weights), case.build()
        if case.library == "memopt":
            return parameters.contender(name, case.library, tx, memopt.apply_rounded_updates)
        return parameters.contender(name, case.library, tx)

    def _from_torch(self) -> Contender:
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        shapes = model_shapes(self.model, "float32")
        (found,) = torch_contenders(shapes, "float32", [TORCH], device)
        return found


def copy(size: int) -> Contender:
    """A copy of some bytes; it negates them, because XLA would remove a plain copy."""
    negated = jax.jit(lambda x: -x)
    x = jnp.ones((size // 4,), jnp.float32)
    step = lambda: jax.block_until_ready(negated(x))
    return Contender(COPY, COPY, step, 0, None, 2 * size)


def measure_updates(names: Sequence[str], small: bool) -> Iterator[Record]:
    """Times steps, the baseline and a copy in turn in one process; then profiles slow steps."""
    model, repeats = ("tiny", 3) if small else ("1b", 20)
    contenders = _Contenders(model)
    copied = copy(2**20 if small else COPIED)
    found = [contenders.build(BASELINE), copied]
    built = (GALORE if name == REFRESH else name for name in names if name not in (BASELINE, COPY))
    for name in dict.fromkeys(built):
        try:
            found.append(contenders.build(name))
        except Exception as error:  # the others are still measured
            rows_of_one = {name, REFRESH} if name == GALORE else {name}
            yield from ({"name": row, "error": describe(error)} for row in rows_of_one & {*names})
    first = {one.name: milliseconds(one.step) for one in found}
    times = {record["name"]: record for record in measure(found, repeats)}
    bandwidth = copied.least_bytes / times[COPY]["milliseconds"]["median"]

    def row(one: Contender, taken: float) -> Record:
        speed = one.least_bytes / taken
        return {
            "model": model,
            "least_bytes": one.least_bytes,
            "bytes_per_second": 1e3 * speed,
            "share_of_copy": speed / bandwidth,
            "compile_seconds": one.compile_seconds,
        }

    rows = {
        one.name: times[one.name] | row(one, times[one.name]["milliseconds"]["median"])
        for one in found
        if one.name in names
    }
    yield from rows.values()
    for one in found:
        if one.name == GALORE and REFRESH in names:  # the first step refreshes every subspace
            record = {"name": REFRESH, "library": one.library, "state_bytes": one.state_bytes}
            record["milliseconds"] = spread([first[GALORE]])
            yield record | row(one, first[GALORE])
    for one in found:
        slow = one.name in rows and rows[one.name]["share_of_copy"] < FAST
        if slow and one.library == "memopt":
            yield rows[one.name] | {"kernels": longest_kernels(one.step)}


UPDATE = tuple(
    Job(names, measure_updates)
    for names in (
        (COPY, BASELINE, *FROM_TORCH, "adamw", "adamw, bfloat16"),
        ("adamw, int8 state", "adamw, bfloat16+8 weights, int8 state"),
        ("adafactor", "lion", "apollo_mini", "apollo"),
        ("muon", "optax.contrib.muon"),
        (GALORE, REFRESH),
    )
)
