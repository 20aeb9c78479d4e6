"""Compares codecs for Adam's moments and for sums of gradients: errors, and bytes.

    python -m benchmarks.codecs [--steps 60]

Each case draws normal gradients times a scale for each entry, and takes the root mean square of
the updates' errors over that of Adam's in float32, of all entries and of the worst row.

Sums of gradients are those of `memopt.accumulate` over eight micro-steps of the tiny LLaMA, after
40 steps of AdamW on real text: the error of the mean that the optimizer receives, of hidden
matrices, over the mean itself. Prints tables and writes them as JSON.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import memopt
from benchmarks.report import Report, markdown_table
from memopt.models import llama
from memopt.models.llama import build_model
from memopt.state.codecs import Codec, Coded, Dynamic, Integers, named
from memopt.text.batches import train_batches
from memopt.text.documents import find_documents
from memopt.text.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Rounded(Codec):
    """A codec of fixed values relative to the largest number of a block, rounded to the nearest.

    Attributes:
        values: "softsign" or "square" (FlashOptim's, https://arxiv.org/abs/2602.23349), "signed" or
            "unsigned" (the dynamic map of https://arxiv.org/abs/2110.02861).
        block: the number of values that share a scale.
        apart: store the largest number of a block in its scale, and others relative to the second.
    """

    values: str
    block: int
    apart: bool = False

    @property
    def table(self) -> np.ndarray:
        """The values, in increasing order."""
        c = np.arange(-127, 128) / 127
        if self.values == "softsign":
            return c / (2 - np.abs(c))
        if self.values == "square":
            return (np.arange(256) / 255) ** 2
        signed = self.values == "signed"
        edges = [np.linspace(0.1, 1, 2 ** (i + (not signed)) + 1) for i in range(7)]
        parts = [10.0 ** (i - 6) * (e[1:] + e[:-1]) / 2 for i, e in enumerate(edges)]
        found = np.concatenate([[0, 1], *parts])
        return np.unique(np.concatenate([found, -found[2:]]) if signed else found)

    def encode(self, x: Array, bits: Array, like: Coded | None = None) -> Coded:
        """Finds the nearest value."""
        block = min(self.block, x.shape[-1])
        blocks = x.reshape(*x.shape[:-1], -1, block)
        size = jnp.abs(blocks)
        largest = size.max(-1, keepdims=True)
        scale, side = largest, []
        if self.apart:
            where = size.argmax(-1, keepdims=True)
            scale = jnp.where(jnp.arange(block) == where, 0, size).max(-1, keepdims=True)
            side = [jnp.take_along_axis(blocks, where, -1)[..., 0], where[..., 0].astype(jnp.uint8)]
        table = jnp.asarray(self.table, jnp.float32)
        y = jnp.clip(blocks / jnp.maximum(scale, 1e-30), table[0], table[-1])
        codes = jnp.searchsorted((table[1:] + table[:-1]) / 2, y).astype(jnp.uint8)
        return Coded(codes.reshape(x.shape), (scale[..., 0].astype(jnp.float32), *side))

    def decode(self, coded: Coded) -> Array:
        """Looks the values up."""
        values = jnp.asarray(self.table, jnp.float32)[coded.codes.astype(jnp.int32)]
        scale = coded.side_data[0]
        blocks = values.reshape(*scale.shape, -1) * scale[..., None]
        if self.apart:
            value, where = (s[..., None] for s in coded.side_data[1:])
            blocks = jnp.where(jnp.arange(blocks.shape[-1]) == where, value, blocks)
        return blocks.reshape(values.shape)


CANDIDATES: dict[str, tuple[Codec, Codec]] = {
    "int8": named("int8")[1:],
    "e5m2": named("e5m2")[1:],
    "more mantissa": (Dynamic(3, 4, headroom=1), Dynamic(4, 4, signed=False)),
    "squares, blocks of 128": (Integers(power=2), Integers(power=4, signed=False)),
    "FlashOptim, blocks of 32": (Rounded("softsign", 32), Rounded("square", 32)),
    "dynamic map, blocks of 256": (Rounded("signed", 256), Rounded("unsigned", 256)),
    "dynamic map, largest apart": (Rounded("signed", 128, True), Rounded("unsigned", 128, True)),
}


@dataclasses.dataclass(frozen=True)
class Clipped(Codec):
    """Evenly spaced integers of 4 bits up to γ times the largest number of each matrix.

    γ is moved so that the share of a matrix's large numbers that are clipped is α / (2⁴ − 1), as in
    https://arxiv.org/abs/2407.12637. What counts as large, the step of γ, and stochastic rounding
    are choices made here.

    Attributes:
        alpha: α; with 0 nothing is clipped.
        large: large numbers are beyond this many root mean squares.
        step: γ grows or shrinks by this fraction at each step.
    """

    alpha: float
    large: float = 3.0
    step: float = 0.05

    def encode(self, x: Array, bits: Array, like: Coded | None = None) -> Coded:
        """Clips, and rounds to the code below or above."""
        size, axes = jnp.abs(x), (-2, -1)
        gamma = jnp.ones_like(size.max(axes, keepdims=True))
        if like is not None:
            gamma -= like.side_data[1]  # so that zeros stand for no clipping
        limit = jnp.maximum(gamma * size.max(axes, keepdims=True), 1e-30)
        uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24
        codes = jnp.sign(x) * jnp.floor(jnp.minimum(size / limit, 1) * 7 + uniform)
        large = size > self.large * jnp.sqrt(jnp.square(x).mean(axes, keepdims=True))
        count = lambda chosen: chosen.sum(axes, keepdims=True)
        share = count(large & (size > limit)) / jnp.maximum(count(large), 1)
        move = jnp.where(share < self.alpha / 15, 1 - self.step, 1 + self.step)
        return Coded(codes.astype(jnp.int4), (limit, 1 - jnp.clip(gamma * move, 0.05, 1)))

    def decode(self, coded: Coded) -> Array:
        """Multiplies codes by a seventh of the largest number that is not clipped."""
        return coded.codes.astype(jnp.float32) / 7 * coded.side_data[0]


FOR_SUMS: dict[str, Codec] = {
    "8 bits, int8": named("int8").signed,
    "8 bits, blocks of 128": Integers(),
    "4 bits, a scale for a matrix": Clipped(alpha=0),
    "4 bits, a scale for a matrix, α = 0.15": Clipped(alpha=0.15),
    "4 bits, a scale for a matrix, α = 0.5": Clipped(alpha=0.5),
    "4 bits, a scale for a matrix, α = 1.5": Clipped(alpha=1.5),
    "4 bits, blocks of 128": Integers(bits=4),
    "4 bits, blocks of 32": Integers(bits=4, block=32),
    "4 bits, squares, blocks of 128 (int4)": named("int4").signed,
    "4 bits, squares, blocks of 32": Integers(bits=4, power=2, block=32),
}


#: The rows of the docs' tables, and their titles there.
SHOWN = {
    "int8": '`"int8"`',
    "e5m2": '`"e5m2"`',
    "FlashOptim, blocks of 32": "softsign and squares, blocks of 32 (FlashOptim)",
    "dynamic map, blocks of 256": "dynamic map, blocks of 256",
    "dynamic map, largest apart": "dynamic map, blocks of 128, the largest apart",
}
SHOWN_SUMS = {
    "8 bits, blocks of 128": "8 bits, blocks of 128: `memopt.codecs.Integers()`",
    "8 bits, int8": '8 bits, `"int8"`',
    "4 bits, squares, blocks of 128 (int4)": '4 bits, `"int4"`: squares, blocks of 128',
    "4 bits, squares, blocks of 32": (
        "4 bits, squares, blocks of 32: `Integers(bits=4, power=2, block=32)`"
    ),
    "4 bits, blocks of 128": "4 bits, evenly spaced, blocks of 128: `Integers(bits=4)`",
    "4 bits, a scale for a matrix": "4 bits, evenly spaced, one scale for a matrix",
    "4 bits, a scale for a matrix, α = 1.5": (
        "the same, clipped at an interval that adapts, α = 1.5"
    ),
}
SUM_ERRORS = ("all", "worst_matrix", "largest")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark.

    Attributes:
        steps: steps of Adam; errors are averaged from the tenth on.
        shape: the matrix whose errors are measured.
        output: the JSON file.
    """

    steps: int = 60
    shape: tuple[int, int] = (64, 512)
    output: Path = Path(__file__).parent / "results" / "codecs.json"


def cases(shape: tuple[int, int]) -> dict[str, Any]:
    """The scale of each entry's gradients."""
    draw = np.random.default_rng(0)
    place = np.arange(shape[0] * shape[1]).reshape(shape) == 3 * shape[1] + 100
    one = lambda size: np.where(place, size, 1)
    spread = lambda *shape: 10.0 ** draw.uniform(-6, 0, size=shape)
    return {
        "normal": np.ones(shape),
        "outlier 1e4": one(1e4),
        "outlier 1e6": one(1e6),
        "rows": spread(shape[0], 1),
        "columns": spread(1, shape[1]),
        "entries": spread(*shape),
    }


def quantized(pair: tuple[Codec, Codec]) -> optax.GradientTransformationExtraArgs:
    """Adam with these codecs for its first and second moments."""
    return memopt.quantize_state(optax.scale_by_adam(), {"mu": pair[0], "nu": pair[1]})


def errors(pair: tuple[Codec, Codec], scale: Any, options: Options) -> dict[str, float]:
    """The error of all updates, and that of the worst row."""
    exact, tx = optax.scale_by_adam(), quantized(pair)
    scale = jnp.asarray(scale, jnp.float32)

    def step(states: Any, key: Any) -> Any:
        g = {"w": scale * jax.random.normal(key, options.shape)}
        (u, state), (v, plain) = tx.update(g, states[0]), exact.update(g, states[1])
        off, by = (jnp.square(x).mean(-1) for x in (u["w"] - v["w"], v["w"]))
        return (state, plain), (off, by)

    params = {"w": jnp.zeros(options.shape)}
    keys = jax.random.split(jax.random.key(0), options.steps)
    run = jax.jit(lambda: jax.lax.scan(step, (tx.init(params), exact.init(params)), keys)[1])
    off, by = (np.asarray(x, float)[10:] for x in run())
    return {
        "all": float(np.sqrt(off.mean() / by.mean())),
        "worst_row": float(np.sqrt((off.mean(0) / by.mean(0)).max())),
    }


def measure(options: Options) -> list[dict[str, Any]]:
    """The records of all candidates."""
    params = {"w": jax.ShapeDtypeStruct((1024, 4096), jnp.float32)}
    return [
        {
            "name": name,
            "errors": {case: errors(pair, s, options) for case, s in cases(options.shape).items()},
            "bytes": memopt.state_bytes(quantized(pair), params).total / (1024 * 4096),
        }
        for name, pair in CANDIDATES.items()
    ]


def real_gradients(count: int, steps: int = 40) -> list[Any]:
    """Gradients of the hidden matrices of the tiny LLaMA on real text, of 8 × 128 tokens each."""
    tokenizer = load_tokenizer("bytes")
    text, _ = find_documents(["python"]).split()
    config, tx = llama.preset("tiny"), optax.adamw(2e-3)
    params = llama.init_params(config, seed=0)

    def loss(params: Any, batch: Any) -> Array:
        total, tokens = llama.loss(build_model(config, params), batch)
        return total / tokens

    gradient = jax.jit(jax.grad(loss))
    update = jax.jit(tx.update)
    state, found = tx.init(params), []
    batches = train_batches(text, tokenizer, batch_size=8, seq_len=128, seed=0)
    for t in range(steps + count):
        g = gradient(params, next(batches))
        if t < steps:
            updates, state = update(g, state, params)
            params = optax.apply_updates(params, updates)
        else:
            blocks = g["blocks"]
            found.append({"attention": blocks["attention"], "mlp": blocks["mlp"]})
    batches.close()
    return found


def sum_errors(codec: Codec, gradients: Sequence[Any], micro_steps: int = 8) -> dict[str, float]:
    """Errors of the last cycle's mean: of all numbers, the worst matrix, and the largest 1 %."""
    exact = memopt.accumulate(optax.identity(), micro_steps)
    tx = memopt.quantize_state(exact, {"^sum/": codec})
    means = []
    for method in (tx, exact):
        state, update = method.init(gradients[0]), jax.jit(method.update)
        for g in gradients:
            mean, state = update(g, state)
        means.append([np.asarray(x, float) for stack in jax.tree.leaves(mean) for x in stack])
    ratio = lambda a, b: float(np.sqrt(np.square(a - b).sum() / np.square(b).sum()))
    pairs = list(zip(*means, strict=True))
    each = [ratio(a, b) for a, b in pairs]
    top = [np.abs(b) >= np.quantile(np.abs(b), 0.99) for _, b in pairs]
    large = [ratio(a[t], b[t]) for (a, b), t in zip(pairs, top, strict=True)]
    params = {"w": jax.ShapeDtypeStruct((1024, 4096), jnp.float32)}
    return {
        "all": float(np.mean(each)),
        "worst_matrix": max(each),
        "largest": float(np.mean(large)),
        "bytes": memopt.state_bytes(tx, params)["w"] / (1024 * 4096),
    }


def measure_sums() -> list[dict[str, Any]]:
    """The records of sums of gradients, after three cycles of eight micro-steps."""
    gradients = real_gradients(24)
    return [{"name": name, **sum_errors(codec, gradients)} for name, codec in FOR_SUMS.items()]


def table_of_sums(results: Sequence[dict[str, Any]]) -> Table:
    """The records of sums as a table for the terminal."""
    shown = Table(title="RMS error of the mean of eight gradients", box=SIMPLE_HEAD)
    shown.add_column("codec of the sum")
    for column in ("all", "worst_matrix", "largest", "bytes"):
        shown.add_column(column.replace("_", " "), justify="right")
    for r in results:
        errors = [f"{r[key]:.3f}" for key in ("all", "worst_matrix", "largest", "bytes")]
        shown.add_row(r["name"], *errors)
    return shown


def table(results: Sequence[dict[str, Any]]) -> Table:
    """The records as a table for the terminal."""
    shown = Table(title="RMS error of Adam's updates, all (worst row)", box=SIMPLE_HEAD)
    shown.add_column("codec")
    for column in (*results[0]["errors"], "bytes"):
        shown.add_column(column, justify="right")
    for r in results:
        pairs = [f"{e['all']:.3f} ({e['worst_row']:.2f})" for e in r["errors"].values()]
        shown.add_row(r["name"], *pairs, f"{r['bytes']:.3f}")
    return shown


def errors_table(report: dict[str, Any]) -> str:
    """The table of Adam's updates for the docs; no cell of the last case, which all get wrong."""
    columns = ("normal gradients", "one entry 10⁴ times", "one 10⁶ times", "rows of 10^U(−6, 0)")
    found = {r["name"]: r for r in report["results"]}

    def cell(error: dict[str, float]) -> str:
        form = ".3f" if error["all"] < 1 else ".0f"
        return f"{error['all']:{form}} ({error['worst_row']:{'.2f' if form == '.3f' else form}})"

    rows = [
        (title, *map(cell, [*found[name]["errors"].values()][:5]), f"{found[name]['bytes']:.2f}")
        for name, title in SHOWN.items()
    ]
    return markdown_table(("", *columns, "columns", "bytes"), rows)


def sums_table(report: dict[str, Any]) -> str:
    """The table of sums of gradients for the docs."""
    found = {r["name"]: r for r in report["sums"]}
    rows = [
        (title, *(f"{found[name][k]:.3f}" for k in SUM_ERRORS), f"{found[name]['bytes']:.2f}")
        for name, title in SHOWN_SUMS.items()
    ]
    return markdown_table(("sum in", "all", "worst matrix", "largest", "bytes per number"), rows)


def main(arguments: Sequence[str]) -> None:
    """Measures, prints the table and writes the file."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    results, sums = measure(options), measure_sums()
    report = Report("codecs", arguments, options.output, results, steps=options.steps)
    Console(width=140).print(table(results), table_of_sums(sums))
    report.save(sums=sums)


if __name__ == "__main__":
    main(sys.argv[1:])
