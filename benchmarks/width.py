"""Measures whether the best learning rate of a narrow model is that of wider ones.

    nice python -m benchmarks.width [--schemes mup global] [--widths 64 128 256] [--seeds 0]

It trains a small LLaMA by Adam on the source of Python's standard library at several widths, each
with learning rates a factor of two apart, in three ways:

- "global": one learning rate for all parameters, as is usual;
- "standard": `memopt.scale_by_width("standard")`, full alignment;
- "mup": `memopt.scale_by_width("mup")`, full alignment.

The model has no multipliers, so that the last two have the same exponents and differ in the
readout's initial values, n^-½ and n^-1; "global" starts as "standard". At the first width, the
base, all three are one. The head's width is fixed; the number of heads grows.

Every run is saved as soon as it is finished, and not repeated when the command is given again.
Prints a table and writes it as JSON, with a plot of the same name.
"""

import dataclasses
import functools
import itertools
import statistics
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
from rich.progress import track
from rich.table import Table

import memopt
from benchmarks.report import Report, read_results
from memopt.errors import check_choice
from memopt.models import llama
from memopt.models.llama import build_model
from memopt.text.tokenizer import load_tokenizer
from memopt.training.batches import find_text, open_batches
from memopt.training.config import Config, Optimization, Text

SCHEMES = ("mup", "global", "standard")
HEAD_DIM = 16


@dataclasses.dataclass(frozen=True)
class Task:
    """The depth of a small model, and the text that it is trained on.

    Attributes:
        layers: the number of blocks.
        steps: training steps.
        seq_len: tokens per row.
        batch_size: rows per batch.
        eval_tokens: held-out tokens for the validation loss.
    """

    layers: int = 2
    steps: int = 300
    seq_len: int = 64
    batch_size: int = 8
    eval_tokens: int = 2**14

    @property
    def settings(self) -> dict[str, Any]:
        """These options by name, which all runs of a file share."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Task)}


@dataclasses.dataclass(frozen=True)
class Options(Task):
    """The options of this benchmark.

    Attributes:
        schemes: the ways to train, of those above.
        widths: the widths of the model; the first is the base.
        rates: the learning rates, as powers of two.
        seeds: the seeds of initial weights and order of the data.
        output: the JSON file; the plot has the same name.
    """

    schemes: tuple[str, ...] = ("mup", "global")
    widths: tuple[int, ...] = (64, 128, 256)
    rates: tuple[int, ...] = tuple(range(-11, -5))
    seeds: tuple[int, ...] = (0,)
    output: Path = Path(__file__).parent / "results" / "width.json"


def model_config(task: Task, width: int) -> llama.LlamaConfig:
    """The model of some width."""
    return llama.LlamaConfig(
        vocab_size=264,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=task.layers,
        num_heads=width // HEAD_DIM,
        num_kv_heads=width // HEAD_DIM,
        head_dim=HEAD_DIM,
    )


@functools.cache
def data(task: Task, seed: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """All training and validation batches, each a dict of arrays (batches, rows, tokens)."""
    config = Config(
        text=Text(batch_size=task.batch_size, seq_len=task.seq_len, eval_tokens=task.eval_tokens),
        optimization=Optimization(steps=task.steps, seed=seed),
    )
    opened = open_batches(
        config, find_text(config), load_tokenizer("bytes"), range(task.batch_size)
    )
    training = list(itertools.islice(opened.batches, task.steps))
    opened.batches.close()
    stack = lambda parts: jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *parts)
    return stack(training), stack(opened.validation[""])


def optimizer(scheme: str, base: Any) -> optax.GradientTransformation:
    """Adam's updates, scaled for the width."""
    adam = optax.scale_by_adam(0.9, 0.95, eps=1e-15)  # an ε of any effect would have to be scaled
    if scheme == "global":
        return adam
    return optax.chain(adam, memopt.scale_by_width(scheme, base, multipliers=False))


@functools.cache
def program(options: Options, scheme: str, width: int) -> Any:
    """Trains a model: a jitted function of initial parameters, learning rate and batches."""
    config = model_config(options, width)
    tx = optimizer(scheme, llama.abstract_params(model_config(options, options.widths[0])))
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, options.steps // 10, options.steps)

    def loss(params: Any, batch: Any) -> Array:
        total, tokens = llama.loss(build_model(config, params), batch)
        return total / tokens

    @jax.jit
    def train(params: Any, rate: Array, training: Any, validation: Any) -> Array:
        descend = optax.chain(tx, optax.scale_by_learning_rate(lambda count: rate * shape(count)))

        def step(carry: Any, batch: Any) -> tuple[Any, None]:
            params, state = carry
            updates, state = descend.update(jax.grad(loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, descend.init(params)), training)
        return jax.lax.map(lambda batch: loss(params, batch), validation).mean()

    return train


def train(options: Options, scheme: str, width: int, rate: int, seed: int) -> float:
    """The validation loss of one run."""
    base = llama.abstract_params(model_config(options, options.widths[0]))
    params = llama.init_params(model_config(options, width), seed=seed)
    start = "standard" if scheme == "global" else scheme
    params = memopt.scale_initial_by_width(params, base, start, multipliers=False)
    run = program(options, scheme, width)
    return float(run(params, jnp.float32(2.0**rate), *data(options, seed)))


Run = tuple[str, int, int, int]


def runs(options: Options) -> list[Run]:
    """All runs: scheme, width, learning rate as a power of two, and seed.

    They are in the order in which they tell most: the base, then learning rates from the middle of
    the grid outwards.
    """
    base, *wider = options.widths
    rates = sorted(options.rates, key=lambda rate: abs(rate - statistics.mean(options.rates)))
    wanted = list(itertools.product(("all",), (base,), rates, options.seeds))
    for seed, rate in itertools.product(options.seeds, rates):
        wanted += list(itertools.product(options.schemes, wider, (rate,), (seed,)))
    return wanted


def losses(results: Sequence[dict[str, Any]]) -> dict[tuple[str, int], dict[int, float]]:
    """For each scheme and width, the mean loss over seeds by learning rate."""
    schemes = {r["scheme"] for r in results} - {"all"}
    kept: dict[tuple[str, int], dict[int, list[float]]] = {}
    for r in results:
        for scheme in schemes if r["scheme"] == "all" else (r["scheme"],):
            at = kept.setdefault((scheme, r["width"]), {})
            at.setdefault(r["rate"], []).append(r["loss"])
    mean = lambda at: {rate: statistics.mean(found) for rate, found in sorted(at.items())}
    return {key: mean(at) for key, at in sorted(kept.items())}


def best(results: Sequence[dict[str, Any]]) -> dict[str, dict[int, int]]:
    """For each scheme and width, the learning rate of the lowest mean loss, as a power of two."""
    found: dict[str, dict[int, int]] = {}
    for (scheme, width), at in losses(results).items():
        found.setdefault(scheme, {})[width] = min(at, key=lambda rate: at[rate])
    return found


def table(report: dict[str, Any]) -> Table:
    """The mean losses as a table for the terminal, the lowest of each row marked."""
    by_row = losses(report["results"])
    rates = sorted({rate for at in by_row.values() for rate in at})
    shown = Table(title="Validation loss by learning rate", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("scheme", "width", *(f"2^{rate}" for rate in rates)):
        shown.add_column(column, justify="right", no_wrap=True)
    for (scheme, width), at in by_row.items():
        cells = [
            f"{at[rate]:.3f}" + ("*" if at[rate] == min(at.values()) else " ") if rate in at else ""
            for rate in rates
        ]
        shown.add_row(scheme, str(width), *cells)
    return shown


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws loss against learning rate: a panel for each scheme, a line for each width."""
    from matplotlib.figure import Figure

    by_row = losses(report["results"])
    schemes = [scheme for scheme in SCHEMES if scheme in {of for of, _ in by_row}]
    figure = Figure(figsize=(1 + 3.5 * len(schemes), 3.5), layout="constrained")
    [panels] = figure.subplots(1, len(schemes), sharey=True, squeeze=False)
    for axes, scheme in zip(panels, schemes, strict=True):
        for (of, width), at in by_row.items():
            if of == scheme:
                lowest = min(at, key=lambda rate: at[rate])
                (line,) = axes.plot([2.0**rate for rate in at], at.values(), label=f"width {width}")
                axes.plot(2.0**lowest, at[lowest], "o", color=line.get_color())
        axes.set_xscale("log", base=2)
        axes.set_xlabel("learning rate")
        axes.set_title(scheme)
    low = min(min(at.values()) for at in by_row.values())
    panels[0].set_ylim(low - 0.05, low + 0.6)
    panels[0].set_ylabel("validation loss")
    panels[0].legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str]) -> None:
    """Trains what is missing, prints the table and writes the files."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    settings = {"base": options.widths[0], **options.settings}
    try:
        for scheme in options.schemes:
            check_choice("scheme", scheme, SCHEMES)
        results = read_results(options.output, settings)
    except ValueError as error:
        sys.exit(f"error: {error}")
    report = Report("width", arguments, options.output, results, **settings)
    done = {tuple(r[k] for k in ("scheme", "width", "rate", "seed")) for r in results}
    for scheme, width, rate, seed in track([run for run in runs(options) if run not in done]):
        of = "mup" if scheme == "all" else scheme
        loss = train(options, of, width, rate, seed)
        results.append({"scheme": scheme, "width": width, "rate": rate, "seed": seed, "loss": loss})
        report.save(best=best(results))
    Console().print(table(report.content()))
    report.save(lambda path: plot(report.content(), path), best=best(results))


if __name__ == "__main__":
    main(sys.argv[1:])
