"""Compares codecs for Adam's moments and for sums of gradients: errors, bytes, traffic, training.

    nice python -m benchmarks.codecs [--steps 60]

Of each codec it measures

- errors on hard cases: normal gradients times a scale for each entry. The root mean square of the
  updates' errors over that of Adam's in float32, of all entries and of the worst row;
- errors on real moments, of the hidden matrices of a small LLaMA after 80 steps of AdamW on the
  source of Python's standard library: those of what is stored, and those of Adam's updates in the
  last twenty steps;
- the bytes that a step of AdamW moves on a TPU, by its compiler (the extra `plan`), over those of
  the parameters, four stacked matrices of LLaMA-7b;
- the validation loss after training that LLaMA, for each of some seeds.

Sums of gradients are those of `memopt.accumulate` over eight micro-steps, of the same matrices: the
error of the mean that the optimizer receives, over the mean itself. Prints tables and writes them
as JSON.
"""

import dataclasses
import functools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

import memopt
from benchmarks.report import COMPILERS, Report, markdown_table, read_results
from benchmarks.traffic import compile_step, one_chip
from memopt.models import llama
from memopt.models.llama import build_model
from memopt.planning.chips import only_compile
from memopt.state.codecs import Codec, Coded, Integers, named
from memopt.text.batches import train_batches
from memopt.text.documents import find_documents
from memopt.text.tokenizer import load_tokenizer


class Candidate(NamedTuple):
    """How `memopt.quantize_state` stores moments; None stores them in float32."""

    codec: str | tuple[Codec, Codec] | None
    rounding: str = "stochastic"


CANDIDATES = {
    "float32": Candidate(None),
    "int8": Candidate("int8"),
    "flash8": Candidate("flash8"),
    "dynamic8": Candidate("dynamic8"),
    "flash8, nearest": Candidate("flash8", "nearest"),
    "dynamic8, nearest": Candidate("dynamic8", "nearest"),
    "float8": Candidate("float8"),
    "e5m2": Candidate("e5m2"),
    "bfloat16": Candidate("bfloat16"),
    "int4": Candidate("int4"),
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
    "4 bits, a scale for a matrix, α = 1.5": Clipped(alpha=1.5),
    "4 bits, blocks of 128": Integers(bits=4),
    "4 bits, squares, blocks of 128 (int4)": named("int4").signed,
    "4 bits, squares, blocks of 32": Integers(bits=4, power=2, block=32),
}


#: The rows of the docs' table of sums, and their titles there.
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

#: Half a million parameters, so that a step takes less than 0.1 s.
MODEL = dataclasses.replace(
    llama.preset("tiny"), num_layers=2, hidden_size=128, head_dim=32, intermediate_size=512
)
CHIP = "v5e"
SUM_ERRORS = ("all", "worst_matrix", "largest")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark.

    Attributes:
        steps: steps of Adam on hard cases; errors are averaged from the tenth on.
        shape: the matrix of hard cases.
        training_steps: steps of training.
        seeds: the seeds of initial weights and batches.
        output: the JSON file.
    """

    steps: int = 60
    shape: tuple[int, int] = (64, 512)
    training_steps: int = 120
    seeds: tuple[int, ...] = (0, 1)
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


def quantized(
    candidate: Candidate, inner: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
    """A transformation, by default Adam, whose state is stored as a candidate says."""
    inner = inner or optax.scale_by_adam()
    if candidate.codec is None:
        return inner
    return memopt.quantize_state(inner, candidate.codec, rounding=candidate.rounding)


def errors(candidate: Candidate, options: Options) -> dict[str, dict[str, float]]:
    """For each hard case the error of all updates, and that of the worst row."""
    scales = {case: jnp.asarray(s, jnp.float32) for case, s in cases(options.shape).items()}
    draw = lambda key: jax.random.normal(key, options.shape)
    normal = jax.lax.map(draw, jax.random.split(jax.random.key(0), options.steps))
    off, by = squares(candidate, jax.tree.map(lambda s: s * normal, scales))
    found = {}
    for case in scales:
        rows = off[case].mean(-1), by[case].mean(-1)
        found[case] = {
            "all": float(np.sqrt(rows[0].mean() / rows[1].mean())),
            "worst_row": float(np.sqrt((rows[0].mean(0) / rows[1].mean(0)).max())),
        }
    return found


def squares(candidate: Candidate, gradients: Any, first: int = 10) -> tuple[Any, Any]:
    """The squares of the updates' errors, and of Adam's updates, from step `first` on."""
    exact, tx = optax.scale_by_adam(), quantized(candidate)

    def step(states: Any, g: Any) -> Any:
        (u, state), (v, plain) = tx.update(g, states[0]), exact.update(g, states[1])
        return (state, plain), (jax.tree.map(lambda u, v: jnp.square(u - v), u, v), squared(v))

    squared = lambda tree: jax.tree.map(jnp.square, tree)
    params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), gradients)
    start = tx.init(params), exact.init(params)
    found = jax.jit(lambda g: jax.lax.scan(step, start, g)[1])(gradients)
    return jax.tree.map(lambda x: np.asarray(x[first:], float), found)


def real_errors(candidate: Candidate, gradients: Sequence[Any]) -> dict[str, float]:
    """Errors of moments, and of Adam's updates: of all numbers, and of the worst matrix.

    First moments in 4 bits are stored divided by the root of the second, and measured so.
    """
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *gradients)
    off, by = squares(candidate, stacked, first=len(gradients) - 20)
    # Of each matrix, whose leading axes are step and layer.
    each = [
        np.sqrt(a.mean((0, 2, 3)) / b.mean((0, 2, 3)))
        for a, b in zip(jax.tree.leaves(off), jax.tree.leaves(by), strict=True)
    ]
    found = {"updates": float(np.mean([x.mean() for x in each])), "worst": float(np.max(each))}
    codec: Any = candidate.codec
    if codec is None:
        return found | {"first": 0.0, "second": 0.0}
    adam = optax.scale_by_adam()
    state = adam.init(gradients[0])
    for g in gradients:
        _, state = jax.jit(adam.update)(g, state)
    first = jax.tree.leaves(state.mu)
    second = jax.tree.leaves(state.nu)
    if candidate.codec == "int4":
        first = [m * jax.lax.rsqrt(v) for m, v in zip(first, second, strict=True)]
    key = None if candidate.rounding == "nearest" else jax.random.key(0)
    for kind, arrays in (("signed", first), ("unsigned", second)):
        error = jax.jit(
            functools.partial(memopt.diagnostics.codec_error, codec=codec, key=key, kind=kind)
        )
        found["first" if kind == "signed" else "second"] = float(np.mean([*map(error, arrays)]))
    return found


def bytes_moved(candidate: Candidate) -> float:
    """The bytes that a step of AdamW moves on a TPU, over those of the parameters."""
    params = {"blocks": {"up": {"kernel": jax.ShapeDtypeStruct((4, 4096, 11008), jnp.float32)}}}
    tx = quantized(candidate, memopt.optimizer("adamw", 1e-3))
    cost = compile_step(tx, params, one_chip(CHIP)).cost_analysis()
    assert cost is not None
    return cost["bytes accessed"] / (4 * 4 * 4096 * 11008)


def measure(options: Options, report: Report) -> None:
    """Adds the records of candidates that the report lacks, and saves each, and those of sums."""
    sums = measure_sums()
    Console(width=140).print(table_of_sums(sums))
    params = {"w": jax.ShapeDtypeStruct((1024, 4096), jnp.float32)}
    gradients, known = real_gradients(80), {r["name"] for r in report.results}
    for name, candidate in track(CANDIDATES.items(), transient=True):
        if name in known:
            continue
        record = {
            "name": name,
            "bytes": memopt.state_bytes(quantized(candidate), params).total / (1024 * 4096),
            "errors": errors(candidate, options),
            "real": real_errors(candidate, gradients),
            "losses": losses(candidate, options),
        }
        if candidate.rounding == "stochastic":
            record |= {"traffic": bytes_moved(candidate), "chip": CHIP}
        report.results.append(record)
        report.save(sums=sums)


class Task(NamedTuple):
    """A small LLaMA on the source of Python's standard library, with batches of 8 × 64 tokens."""

    params: Any
    batches: Any
    validation: Any


def task(seed: int, steps: int) -> Task:
    """Initial weights, one batch for each step, and 64 batches of held-out text."""
    tokenizer = load_tokenizer("bytes")
    texts = find_documents(["python"]).split()

    def stacked(text: Any, seed: int, count: int) -> Any:
        batches = train_batches(text, tokenizer, batch_size=8, seq_len=64, seed=seed)
        found = [next(batches) for _ in range(count)]
        batches.close()
        return jax.tree.map(lambda *x: np.stack(x), *found)

    params = llama.init_params(MODEL, seed=seed)
    return Task(params, stacked(texts[0], seed, steps), stacked(texts[1], 0, 64))


def loss(params: Any, batch: Any) -> Array:
    """The mean loss of a token."""
    total, tokens = llama.loss(build_model(MODEL, params), batch)
    return total / tokens


def real_gradients(count: int) -> list[Any]:
    """Gradients of the hidden matrices at each step of AdamW."""
    tx = optax.adamw(2e-3)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        g = jax.grad(loss)(params, batch)
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), g["blocks"]

    @jax.jit
    def run(start: Task) -> Any:
        return jax.lax.scan(step, (start.params, tx.init(start.params)), start.batches)[1]

    blocks = run(task(0, count))
    hidden = {"attention": blocks["attention"], "mlp": blocks["mlp"]}
    return [jax.tree.map(lambda g, t=t: g[t], hidden) for t in range(count)]


def losses(candidate: Candidate, options: Options) -> list[float]:
    """The validation loss of AdamW with each seed, at a rate that decays along a cosine."""
    steps = options.training_steps
    schedule = optax.warmup_cosine_decay_schedule(0, 2e-3, steps // 10, steps)
    tx = optax.chain(
        quantized(candidate),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(schedule),
    )

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(start: Task) -> Array:
        carry = start.params, tx.init(start.params)
        (params, _), _ = jax.lax.scan(step, carry, start.batches)
        return jax.lax.map(lambda batch: loss(params, batch), start.validation).mean()

    return [float(run(task(seed, steps))) for seed in options.seeds]


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
    gradients = real_gradients(64)[-24:]
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
    for column in (*results[0]["errors"], "real", "loss", "traffic", "bytes"):
        shown.add_column(column, justify="right")
    for r in results:
        pairs = [f"{e['all']:.3f} ({e['worst_row']:.2f})" for e in r["errors"].values()]
        loss, traffic = f"{statistics.mean(r['losses']):.3f}", f"{r.get('traffic', 0):.2f}"
        shown.add_row(
            r["name"], *pairs, f"{r['real']['updates']:.3f}", loss, traffic, f"{r['bytes']:.3f}"
        )
    return shown


def errors_table(report: dict[str, Any]) -> str:
    """Hard cases of Adam's updates, for the docs; without the last case, which all get wrong."""
    columns = ("normal gradients", "one entry 10⁴ times", "one 10⁶ times", "rows of 10^U(−6, 0)")

    def cell(error: dict[str, float]) -> str:
        form = ".3f" if error["all"] < 1 else ".0f"
        return f"{error['all']:{form}} ({error['worst_row']:{'.2f' if form == '.3f' else form}})"

    rows = [
        (_title(r["name"]), *map(cell, [*r["errors"].values()][:5])) for r in report["results"][1:]
    ]
    return markdown_table(("", *columns, "columns"), rows)


def real_table(report: dict[str, Any]) -> str:
    """Bytes, traffic, errors on real moments and losses, for the docs."""
    columns = ("bytes", "traffic", "first moments", "second moments", "updates (worst matrix)")
    first = report["results"][0]["losses"]

    def row(r: dict[str, Any]) -> Sequence[str]:
        real, is_exact = r["real"], r["name"] == "float32"
        each = [f"{real['first']:.4f}", f"{real['second']:.4f}"]
        each.append(f"{real['updates']:.3f} ({real['worst']:.3f})")
        off = [a - b for a, b in zip(r["losses"], first, strict=True)]
        return (
            _title(r["name"]),
            f"{r['bytes']:.2f}",
            f"{r['traffic']:.2f}" if "traffic" in r else "",
            *([""] * 3 if is_exact else each),
            f"{statistics.mean(r['losses']):.3f}",
            "" if is_exact else f"{min(off):+.3f} to {max(off):+.3f}".replace("-", "−"),
        )

    return markdown_table(
        ("", *columns, "validation loss", "− float32, by seed"), map(row, report["results"])
    )


def _title(name: str) -> str:
    """The name of a candidate, with its codec's in code."""
    codec, *rest = name.split(", ")
    return ", ".join((codec if codec == "float32" else f'`"{codec}"`', *rest))


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
    only_compile()
    settings = {name: getattr(options, name) for name in ("steps", "training_steps")}
    settings["seeds"] = list(options.seeds)
    results = read_results(options.output, settings)
    report = Report("codecs", arguments, options.output, results, COMPILERS, **settings)
    measure(options, report)
    Console(width=140).print(table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
