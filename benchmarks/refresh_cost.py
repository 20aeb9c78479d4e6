"""Measures the time of refreshing a subspace, and the share of the gradient's energy it captures.

    OPENBLAS_NUM_THREADS=1 taskset -c 0 python -m benchmarks.refresh_cost [--repeats 3]

For the seven matrices of the middle block of a LLaMA with three blocks and 1b's dimensions, and
the gradient of a batch of text, it computes the singular vectors by `jnp.linalg.svd`, as GaLore's
authors do, by `projectors.svd` and by `projectors.randomized_svd`, in turn on each matrix. It
measures processor time, which other processes hardly affect. Run it on one thread, as above, so
that no thread spins while it waits for another. The energy ‖PᵀG‖² is divided by that of the r
largest singular values; white noise of the same shapes is the worst case.

Prints a table and writes it as JSON, with a plot of the same name.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

import memopt
from benchmarks.report import Report, spread
from memopt.errors import check_at_least
from memopt.models import llama
from memopt.text.batches import train_batches
from memopt.text.documents import find_documents
from memopt.text.tokenizer import load_tokenizer
from memopt.transforms.projectors import MatrixSpec, Projector, RefreshClock, randomized_svd, svd

LAPACK = "jnp.linalg.svd"


class Options(NamedTuple):
    """The options of this benchmark.

    Attributes:
        ranks: the ranks of the subspaces.
        iterations: the iterations of `randomized_svd`, with a row for each; its own default is 0.
        oversample: the oversampling of `randomized_svd`; by default its own default.
        steps: steps of AdamW before the gradient is computed, 0 for the gradient at initialization.
        repeats: the number of timed rounds.
        output: the JSON file; the plot has the same name.
    """

    ranks: tuple[int, ...] = (128, 512)
    iterations: tuple[int, ...] = (0, 1, 2)
    oversample: int | None = None
    steps: int = 20
    repeats: int = 3
    output: Path = Path(__file__).parent / "results" / "refresh_cost.json"


def block_gradient(steps: int) -> dict[str, jax.Array]:
    """Gradients of 4096 tokens, for the matrices of the second block of three."""
    tokenizer = load_tokenizer("bytes")
    config = llama.preset("1b")
    config = dataclasses.replace(config, num_layers=3, vocab_size=tokenizer.vocab_size)
    graphdef, initial = nnx.split(llama.Llama(config, rngs=nnx.Rngs(0)), nnx.Param)
    params = nnx.to_pure_dict(initial)
    tx = memopt.optimizer("adamw", learning_rate=optax.linear_schedule(0.0, 1e-4, max(steps, 1)))
    text, _ = find_documents(["python"]).split()

    def gradient(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            total, count = llama.loss(nnx.merge(graphdef, params), batch)
            return total / count

        return jax.grad(loss)(params)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradient(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state: Any = tx.init(params) if steps else ()
    batches = train_batches(text, tokenizer, batch_size=2, seq_len=256, seed=0)
    for _ in track(range(steps), description="warm-up", transient=True):
        params, state = step(params, state, next(batches))
    batches.close()
    batches = train_batches(text, tokenizer, batch_size=16, seq_len=256, seed=1)
    blocks = jax.jit(gradient)(params, next(batches))["blocks"]
    batches.close()
    return {
        name: module["kernel"][1]
        for part in ("attention", "mlp")
        for name, module in blocks[part].items()
    }


def contenders(options: Options) -> dict[tuple[str, int], Projector]:
    """All projectors by name and rank."""
    found: dict[tuple[str, int], Projector] = {}
    for rank in options.ranks:
        found["svd", rank] = svd(rank)
        for i in options.iterations:
            projector = randomized_svd(rank, iterations=i, oversample=options.oversample)
            found[f"randomized_svd, {i} iterations", rank] = projector
    return found


def refresh(projector: Projector) -> Callable[[jax.Array], jax.Array]:
    """Returns a compiled function that computes the projector's basis for one gradient."""

    @jax.jit
    def basis(gradient: jax.Array) -> jax.Array:
        spec = MatrixSpec("w", gradient.shape, gradient.dtype)
        return projector.basis(spec, gradient, RefreshClock.first())

    return basis


def measure(options: Options) -> list[dict[str, Any]]:
    """Records the seconds of the whole block, and each matrix's share of the best energy."""
    projectors = contenders(options)
    full = jax.jit(lambda g: jnp.linalg.svd(g, full_matrices=False))
    functions = {(LAPACK, None): full} | {key: refresh(p) for key, p in projectors.items()}
    seconds = {key: np.zeros(options.repeats) for key in functions}
    shares: dict[Any, dict[str, dict[str, float]]] = {
        key: {"gradient": {}, "noise": {}} for key in projectors
    }

    def compare(kind: str, name: str, matrix: jax.Array, singular: jax.Array) -> None:
        best = np.cumsum(np.square(singular, dtype=float))
        spec = MatrixSpec(name, matrix.shape, matrix.dtype)
        for (label, rank), projector in projectors.items():
            low = projector.down(spec, functions[label, rank](matrix), matrix)
            captured = np.square(low, dtype=float).sum()
            shares[label, rank][kind][name] = captured / best[rank - 1]

    gradients = block_gradient(options.steps)
    for name, g in track(gradients.items(), description="matrices", transient=True):
        jax.block_until_ready([functions[key](g) for key in projectors])  # compiles
        for i in range(options.repeats):
            for key, f in functions.items():
                time.sleep(0.01)  # threads of the previous one may still be spinning
                start = time.process_time()
                result = jax.block_until_ready(f(g))
                seconds[key][i] += time.process_time() - start
                if key == (LAPACK, None):
                    singular = result[1]
        compare("gradient", name, g, singular)
    for shape in dict.fromkeys(g.shape for g in gradients.values() if g.shape[0] <= g.shape[1]):
        noise = jax.random.normal(jax.random.key(0), shape)
        compare("noise", f"{shape[0]}×{shape[1]}", noise, jnp.linalg.svd(noise, compute_uv=False))
    return [
        {
            "name": label,
            "rank": rank,
            "seconds": spread(taken.tolist()),
            "times_cheaper": spread((seconds[LAPACK, None] / taken).tolist()),
            "energy": shares.get((label, rank), {}),
        }
        for (label, rank), taken in seconds.items()
    ]


def table(report: dict[str, Any]) -> Table:
    """The records as a table for the terminal."""
    shown = Table(title=f"Refresh of a LLaMA-1b block, {report['cores']} cores", box=SIMPLE_HEAD)
    shown.add_column("basis", no_wrap=True)
    for column in ("rank", "CPU s", "times cheaper", "min–max", "energy, least", "of noise"):
        shown.add_column(column, justify="right")
    for r in report["results"]:
        cheaper = r["times_cheaper"]
        shown.add_row(
            r["name"],
            str(r["rank"] or ""),
            f"{r['seconds']['median']:.2f}",
            f"{cheaper['median']:.1f}",
            f"{cheaper['min']:.1f}–{cheaper['max']:.1f}",
            *(f"{min(shares.values()):.4f}" for shares in r["energy"].values()),
        )
    return shown


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws the times as bars with whiskers from minimum to maximum, and the least energy."""
    from matplotlib.figure import Figure

    results = report["results"]
    figure = Figure(figsize=(10, 1 + 0.35 * len(results)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [r["name"] + (f", r = {r['rank']}" if r["rank"] else "") for r in results]
    taken = [r["seconds"] for r in results]
    middle = [t["median"] for t in taken]
    whiskers = [[t["median"] - t["min"] for t in taken], [t["max"] - t["median"] for t in taken]]
    left.barh(names, middle, xerr=whiskers)
    for i, r in enumerate(results):
        label = f"  ÷{r['times_cheaper']['median']:.0f}"
        left.annotate(label, (r["seconds"]["max"], i), va="center", fontsize=8)
    left.set(xlabel="processor seconds for the seven matrices", xscale="log", title="time")
    left.set_xlim(right=3 * max(t["max"] for t in taken))
    for kind, marker in (("gradient", "o"), ("noise", "x")):
        rows = [i for i, r in enumerate(results) if r["energy"]]
        right.plot(
            [min(results[i]["energy"][kind].values()) for i in rows], rows, marker, label=kind
        )
    right.axvline(0.99, color="black", linewidth=1)
    right.set(xlabel="‖PᵀG‖² ÷ the best, least of seven", title="energy captured")
    right.legend()
    left.invert_yaxis()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str]) -> None:
    """Measures, prints the table and writes the files."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    try:
        check_at_least("steps", options.steps, 0)
        check_at_least("repeats", options.repeats, 1)
        contenders(options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    load = os.getloadavg()[0]
    report = Report(
        "refresh_cost",
        arguments,
        options.output,
        measure(options),
        **{name: getattr(options, name) for name in ("steps", "repeats", "oversample")},
        load_before=load,
    )
    Console().print(table(report.content()))
    report.save(lambda path: plot(report.content(), path))


if __name__ == "__main__":
    main(sys.argv[1:])
