"""One optimizer step alone, on a billion parameters: its time beside the memory's bandwidth."""

import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import memopt
from benchmarks import torch_optimizers
from benchmarks.device.jobs import Job, Record, describe
from benchmarks.device.profile import longest_kernels
from benchmarks.report import spread
from benchmarks.updates import (
    LEARNING_RATE,
    Contender,
    measure,
    model_shapes,
    on_one_device,
    torch_contenders,
)

#: Methods that are slower than this part of the copy bandwidth are profiled.
FAST = 0.85
#: Bytes that are copied to measure the bandwidth.
COPIED = 2**32


class Case(NamedTuple):
    """An optimizer, and how parameters are stored.

    Attributes:
      library: where it comes from; parameters of memopt's are rounded stochastically.
      tx: the optimizer.
      dtype: of parameters and gradients.
      weights: how the parameters are stored; None: as they are.
    """

    library: str
    tx: optax.GradientTransformation
    dtype: Literal["float32", "bfloat16"] = "float32"
    weights: str | None = None


def _adamw(state: str | None = None) -> optax.GradientTransformation:
    adam = optax.scale_by_adam()
    return optax.chain(
        memopt.quantize_state(adam, state) if state else adam,
        optax.add_decayed_weights(1e-4),
        optax.scale_by_learning_rate(LEARNING_RATE),
    )


def _optax_muon() -> optax.GradientTransformation:
    """Optax's with the layers of a stack as matrices of their own, and AdamW at the ends."""
    dimensions = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)

    def choose(params: Any) -> Any:
        return jax.tree.map(lambda x: dimensions if x.ndim == 3 else None, params)

    return optax.contrib.muon(LEARNING_RATE, muon_weight_dimension_numbers=choose)


COPY, TORCH = "copy", "torch_adamw"
GALORE, REFRESH = "galore", "galore, a refresh"
BASELINE = "optax.adamw"
CASES = {
    BASELINE: Case("optax", optax.adamw(LEARNING_RATE)),
    "adamw": Case("memopt", _adamw()),
    "adamw, bfloat16": Case("memopt", _adamw(), "bfloat16"),
    "adamw, int8 state": Case("memopt", _adamw("int8")),
    "adamw, bfloat16+8 weights, int8 state": Case(
        "memopt", _adamw("int8"), "bfloat16", "bfloat16+8"
    ),
    "adafactor": Case("memopt", memopt.adafactor(LEARNING_RATE)),
    "lion": Case("memopt", memopt.lion(LEARNING_RATE)),
    "apollo_mini": Case("memopt", memopt.apollo_mini(LEARNING_RATE)),
    "apollo": Case("memopt", memopt.apollo(LEARNING_RATE)),
    GALORE: Case("memopt", memopt.galore(LEARNING_RATE)),
    "muon": Case("memopt", memopt.muon(LEARNING_RATE)),
    "optax.contrib.muon": Case("optax", _optax_muon()),
}


class _Contenders:
    """Contenders of a model's shapes; those alike share their parameters."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.parameters = functools.cache(
            lambda dtype, weights: on_one_device(model_shapes(model, dtype), weights)
        )

    def build(self, name: str) -> Contender:
        if name == TORCH:
            return self._from_torch()
        case = CASES[name]
        parameters = self.parameters(case.dtype, case.weights)
        if case.library == "memopt":
            return parameters.contender(name, case.library, case.tx, memopt.apply_updates)
        return parameters.contender(name, case.library, case.tx)

    def _from_torch(self) -> Contender:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        shapes = model_shapes(self.model, "float32")
        (found,) = torch_contenders(shapes, "float32", [TORCH], device)
        return found


def copy_bandwidth(size: int, repeats: int) -> float:
    """Bytes a second that a copy reads and writes."""
    copy = jax.jit(lambda x: -x)  # XLA may leave out what changes nothing
    x = jax.block_until_ready(jnp.ones((size // 4,), jnp.float32))
    copy(x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        copy(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size / statistics.median(seconds)


class _Bench:
    """What a job needs: the model's contenders, and the bandwidth to compare with."""

    def __init__(self, small: bool) -> None:
        model, self.repeats = ("tiny", 3) if small else ("1b", 20)
        self.contenders = _Contenders(model)
        self.bandwidth = copy_bandwidth(2**20 if small else COPIED, self.repeats)

    def measure(self, found: Sequence[Contender], names: Sequence[str]) -> Iterator[Record]:
        """Lets all take turns."""
        records = measure(found, self.repeats)
        for one, record in zip(found, records, strict=True):
            if one.name in names:
                record |= self.speed(one, record["milliseconds"]["median"])
                if one.library == "memopt" and record["share_of_copy"] < FAST:
                    record |= _profile(one)
                yield record

    def speed(self, one: Contender, milliseconds: float) -> Record:
        """What a step's time amounts to."""
        speed = one.least_bytes / (1e-3 * milliseconds)
        return {
            "model": self.contenders.model,
            "least_bytes": one.least_bytes,
            "bytes_per_second": speed,
            "share_of_copy": speed / self.bandwidth,
            "compile_seconds": one.compile_seconds,
        }


def _profile(one: Contender) -> Record:
    """The kernels of a step; its time is worth a row without them, too."""
    try:
        return {"kernels": longest_kernels(one.step)}
    except Exception as error:
        return {"kernels": [], "profile_error": describe(error)}


def measure_updates(names: Sequence[str], small: bool) -> Iterator[Record]:
    """All but GaLore, in turn."""
    bench, found = _Bench(small), []
    if COPY in names:
        yield {"name": COPY, "bytes_per_second": bench.bandwidth}
    for name in dict.fromkeys((BASELINE, *(name for name in names if name != COPY))):
        try:
            found.append(bench.contenders.build(name))
        except Exception as error:  # of one method the others are measured all the same
            yield {"name": name, "error": describe(error)}
    yield from bench.measure(found, names)


def measure_galore(names: Sequence[str], small: bool) -> Iterator[Record]:
    """GaLore's first step, which refreshes every subspace, and those after it."""
    bench = _Bench(small)
    galore = bench.contenders.build(GALORE)
    start = time.perf_counter()
    galore.step()
    milliseconds = 1e3 * (time.perf_counter() - start)
    if REFRESH in names:
        alone = {"name": REFRESH, "library": galore.library, "milliseconds": spread([milliseconds])}
        yield alone | {"state_bytes": galore.state_bytes} | bench.speed(galore, milliseconds)
    yield from bench.measure([bench.contenders.build(BASELINE), galore], names)


FROM_TORCH = {TORCH} & set(torch_optimizers.installed())
UPDATE = (
    Job((COPY, *(name for name in CASES if name != GALORE), *FROM_TORCH), measure_updates),
    Job((GALORE, REFRESH), measure_galore),
)
