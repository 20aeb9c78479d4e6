"""Attention alone, cuDNN's and in chunks, and the kernels of a whole training step."""

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device.jobs import Job, Record
from benchmarks.device.profile import longest_kernels
from benchmarks.device.training import ORDINARY_1B, Run, shrunk
from benchmarks.report import spread
from memopt.models.attention import causal_attention, chunked_attention

HEADS, HEAD_DIM = 32, 128
#: Of matrix products, causal: half of 4 flops a query, key and channel; backward 2.5 times as many.
FLOPS = {"forward": 2.0, "forward and backward": 7.0}
PATHS = {"as trained": causal_attention, "in chunks": chunked_attention}
LENGTHS = {"2048 tokens": (2048, 64), "8192 tokens": (8192, 128)}  # and in small
PROFILE = "profile of a training step"


def measure_attention(names: Sequence[str], small: bool) -> Iterator[Record]:
    """Both paths in turn, at one length."""
    for length, sizes in LENGTHS.items():
        wanted = {f"{length}, {path}": run for path, run in PATHS.items()}
        wanted = {name: run for name, run in wanted.items() if name in names}
        if wanted:
            yield from _turns(wanted, sizes[small], small)


def _turns(paths: dict[str, Any], length: int, small: bool) -> Iterator[Record]:
    heads, dtype = (2, jnp.float32) if small else (HEADS, jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, length, heads, HEAD_DIM), dtype) for key in keys)

    def both(run: Any) -> dict[str, Any]:
        summed = lambda *qkv: run(*qkv).astype(jnp.float32).sum()
        backward = jax.jit(jax.grad(summed, argnums=(0, 1, 2)))
        compiled = {"forward": jax.jit(run), "forward and backward": backward}
        for f in compiled.values():
            jax.block_until_ready(f(q, k, v))
        return compiled

    compiled = {name: both(run) for name, run in paths.items()}
    taken: dict[tuple[str, str], list[float]] = {}
    for _ in range(3 if small else 20):
        for name, passes in compiled.items():
            for which, f in passes.items():
                start = time.perf_counter()
                jax.block_until_ready(f(q, k, v))
                taken.setdefault((name, which), []).append(1e3 * (time.perf_counter() - start))
    for name, passes in compiled.items():
        record: Record = {"name": name, "length": length, "heads": heads, "head_dim": HEAD_DIM}
        for which in passes:
            milliseconds = taken[name, which]
            flops = FLOPS[which] * heads * HEAD_DIM * length**2
            speed = flops / (1e9 * statistics.median(milliseconds))
            record[which] = {"milliseconds": spread(milliseconds), "tflops": speed}
        yield record


def measure_profile(names: Sequence[str], small: bool) -> Iterator[Record]:
    """The kernels of an ordinary step of LLaMA-1b."""
    (name,) = names
    run = Run(shrunk(ORDINARY_1B, small))
    run.start()
    run.take()
    run.take()
    kernels = longest_kernels(run.take)
    yield {"name": name, **run.record(), "kernels": kernels}


ATTENTION = (
    Job(
        tuple(f"{length}, {path}" for length in LENGTHS for path in PATHS),
        measure_attention,
    ),
    Job((PROFILE,), measure_profile),
)
