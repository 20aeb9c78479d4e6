"""Times attention alone, cuDNN's and in chunks, and the kernels of a whole training step."""

import collections
import functools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device.jobs import Job, Record
from benchmarks.device.profile import longest_kernels
from benchmarks.device.training import ORDINARY_1B, Run, shrunk
from benchmarks.report import milliseconds, spread
from memopt.models.attention import causal_attention

HEADS, HEAD_DIM = 32, 128
#: Passes in one program, so that the time of a launch is negligible.
REPEATS = 20
#: Flops per query, key and channel: 4, half of them masked; backward has 2.5 times as many.
FLOPS = {"forward": 2.0, "forward and backward": 7.0}
PATHS = {
    "as trained": causal_attention,
    "in chunks": functools.partial(causal_attention, chunked=True),
}
LENGTHS = {"2048 tokens": (2048, 64), "8192 tokens": (8192, 128)}  # full length, tiny length
PROFILE = "profile of a training step"


def measure_attention(names: Sequence[str], small: bool) -> Iterator[Record]:
    """Times both implementations in turn, at one length."""
    for length, sizes in LENGTHS.items():
        wanted = {f"{length}, {path}": run for path, run in PATHS.items()}
        wanted = {name: run for name, run in wanted.items() if name in names}
        if wanted:
            yield from _turns(wanted, sizes[small], small)


def _turns(paths: dict[str, Any], length: int, small: bool) -> Iterator[Record]:
    heads, dtype, repeats = (2, jnp.float32, 2) if small else (HEADS, jnp.bfloat16, REPEATS)
    keys = jax.random.split(jax.random.key(0), 4)
    *qkv, cotangent = (jax.random.normal(key, (1, length, heads, HEAD_DIM), dtype) for key in keys)

    def passes(attention: Any) -> dict[str, Any]:
        """Functions that run the passes several times, each on the result of the previous one."""

        def forward(qkv: Any, _: None) -> Any:
            query, key, value = qkv
            return (attention(query, key, value), key, value), None

        def both(qkv: Any, _: None) -> Any:
            gradients = jax.vjp(attention, *qkv)[1](cotangent)
            return jax.tree.map(lambda x, g: x + 1e-3 * g, tuple(qkv), gradients), None

        repeated = lambda f: jax.jit(lambda qkv: jax.lax.scan(f, qkv, length=repeats)[0])
        functions = {"forward": repeated(forward), "forward and backward": repeated(both)}
        for f in functions.values():
            jax.block_until_ready(f(tuple(qkv)))
        return functions

    functions = {name: passes(attention) for name, attention in paths.items()}
    taken: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for _ in range(3 if small else 10):
        for name, of_one in functions.items():
            for which, f in of_one.items():
                run = lambda f=f: jax.block_until_ready(f(tuple(qkv)))
                taken[name, which].append(milliseconds(run) / repeats)
    for name, of_one in functions.items():
        record: Record = {"name": name, "length": length, "heads": heads, "head_dim": HEAD_DIM}
        for which in of_one:
            each = taken[name, which]
            flops = FLOPS[which] * heads * HEAD_DIM * length**2
            speed = flops / (1e9 * statistics.median(each))
            record[which] = {"milliseconds": spread(each), "tflops": speed}
        yield record


def measure_profile(names: Sequence[str], small: bool) -> Iterator[Record]:
    """Records the kernels of an ordinary step of LLaMA-1b."""
    (name,) = names
    run = Run(shrunk(ORDINARY_1B, small))
    record = run.take(3 if small else 6)
    yield {"name": name, **record, "kernels": longest_kernels(run.one)}


ATTENTION = (
    Job(
        tuple(f"{length}, {path}" for length in LENGTHS for path in PATHS),
        measure_attention,
    ),
    Job((PROFILE,), measure_profile),
)
