"""How long a step of each optimizer takes, side by side in one process.

    python -m benchmarks.step_time [--model 60m] [--repeats 20] [--optimizers adamw lion ...]

A step is one jitted ``update`` and ``apply_updates`` with donated parameters and state, on the
shapes of a model and fixed gradients; no forward and no backward pass. All optimizers take turns,
round after round, so that whatever else the machine does falls on all of them, and each time is
divided by AdamW's of the same round. Torch's optimizers stand beside where they are installed.

Prints a table and writes it as JSON, with a plot of the same name.
"""

import dataclasses
import importlib.metadata
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import optax
import tyro
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

import memopt
from benchmarks import torch_optimizers
from benchmarks.report import save
from benchmarks.torch_optimizers import TORCH_OPTIMIZERS
from memopt.errors import check_at_least, check_choice
from memopt.models import llama
from memopt.trees import leaf_name

BASELINE = "adamw"
EIGHT_BITS = "_8bit"
DEFAULTS = (
    *("adamw" + EIGHT_BITS, "adafactor", "optax_adafactor", "lion", "optax_lion"),
    *("apollo", "apollo_mini"),
)
LEARNING_RATE = 1e-4
COLORS = {"memopt": "C0", "optax": "C7", "torch": "C1"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      optimizers: names known to `memopt.optimizer`, also with _8bit at their end for a state of
        int8, and torch_adamw, torch_adafactor, torch_lion, torch_apollo, torch_apollo_mini; by
        default the methods of memopt, their baselines, and of torch's what is installed.
      model: the preset whose shapes are taken.
      dtype: of parameters and gradients.
      repeats: rounds that are timed.
      output: the JSON file; the plot stands beside it.
    """

    optimizers: tuple[str, ...] = ()
    model: str = "60m"
    dtype: Literal["float32", "bfloat16"] = "float32"
    repeats: int = 20
    output: Path = Path(__file__).parent / "results" / "step_time.json"


class Contender(NamedTuple):
    """An optimizer ready to step.

    Attributes:
      name: its name.
      library: where it comes from: "memopt", "optax" or "torch".
      step: takes one step and waits for it.
      state_bytes: of its state.
      temp_bytes: that a step allocates beside parameters, state and gradients; None if unknown.
    """

    name: str
    library: str
    step: Callable[[], None]
    state_bytes: int
    temp_bytes: int | None


class Parameters:
    """One set of parameters with fixed gradients; contenders take turns on it.

    Only the optimizers' states add up in memory this way.
    """

    def __init__(self, shapes: Any, places: Any) -> None:
        keys = optax.tree.split_key_like(jax.random.key(0), shapes)

        def normal(scale: float) -> Any:
            one = lambda x, key: scale * jax.random.normal(key, x.shape, x.dtype)
            return jax.jit(lambda: jax.tree.map(one, shapes, keys), out_shardings=places)()

        (self.mesh,) = {place.mesh for place in jax.tree.leaves(places)}
        self.values, self.gradients = normal(0.02), normal(1e-3)

    def contender(self, name: str, library: str, tx: optax.GradientTransformation) -> Contender:
        """Compiles a step, whose state lies where `memopt.state_sharding` says."""

        def apply(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        with jax.set_mesh(self.mesh):
            state = memopt.init_sharded(tx, self.values)
            where = jax.tree.map(lambda x: x.sharding, (self.values, state))
            jitted = jax.jit(apply, donate_argnums=(0, 1), out_shardings=where)
            compiled = jitted.lower(self.values, state, self.gradients).compile()

        def step() -> None:
            nonlocal state
            self.values, state = compiled(self.values, state, self.gradients)
            jax.block_until_ready((self.values, state))

        memory = compiled.memory_analysis()
        temp = None if memory is None else memory.temp_size_in_bytes
        return Contender(name, library, step, memopt.state_bytes(tx, self.values).total, temp)


def contenders(options: Options) -> list[Contender]:
    """Builds all that take part, the baseline first."""
    names = options.optimizers or (*DEFAULTS, *torch_optimizers.installed())
    for name in names:
        method = name.removesuffix(EIGHT_BITS)
        check_choice("optimizer", method, (*memopt.available(), *TORCH_OPTIMIZERS))
    from_torch = [name for name in names if name in TORCH_OPTIMIZERS]
    ours = dict.fromkeys((BASELINE, *(name for name in names if name not in from_torch)))
    shapes = model_shapes(options.model, options.dtype)
    here = NamedSharding(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,)), jax.P())
    parameters = Parameters(shapes, jax.tree.map(lambda _: here, shapes))
    found = [parameters.contender(name, *optimizer(name)) for name in ours]
    return found + torch_contenders(shapes, options.dtype, from_torch)


def optimizer(name: str) -> tuple[str, optax.GradientTransformation]:
    """The library and ``memopt.optimizer(name)``, or that with its state in int8."""
    method = name.removesuffix(EIGHT_BITS)
    tx = memopt.optimizer(method, learning_rate=LEARNING_RATE)
    tx = tx if method == name else memopt.quantize_state(tx)
    is_ours = hasattr(memopt.optimizers, method) or method != name
    return "memopt" if is_ours else "optax", tx


def torch_contenders(shapes: Any, dtype: str, names: Sequence[str]) -> list[Contender]:
    """The same for torch's optimizers."""
    if not names:
        return []
    leaves = [(leaf_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(shapes)]
    hidden = [leaf.shape for name, leaf in leaves if memopt.hidden_matrices(name, leaf)]
    rest = [leaf.shape for name, leaf in leaves if not memopt.hidden_matrices(name, leaf)]
    parameters = torch_optimizers.TorchParameters(hidden, rest, dtype)

    def contender(name: str) -> Contender:
        optimizer = parameters.optimizer(name, LEARNING_RATE)
        size = torch_optimizers.state_bytes(optimizer)
        return Contender(name, "torch", optimizer.step, size, None)

    return [contender(name) for name in names]


def model_shapes(model: str, dtype: Literal["float32", "bfloat16"]) -> Any:
    """The parameters of a preset as shapes."""
    config = dataclasses.replace(llama.preset(model), param_dtype=dtype)
    return nnx.to_pure_dict(nnx.state(llama.abstract_model(config), nnx.Param))


def measure(found: Sequence[Contender], repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of each step, and how they compare with the first contender's, as records."""
    times: list[list[float]] = [[] for _ in found]
    for _ in track(range(repeats + 2), description="rounds", transient=True):
        for contender, taken in zip(found, times, strict=True):
            time.sleep(0.01)  # threads of the one before spin on for a while
            start = time.perf_counter()
            contender.step()
            taken.append(1e3 * (time.perf_counter() - start))
    times = [taken[2:] for taken in times]  # the first rounds warm up
    return [
        {
            "name": contender.name,
            "library": contender.library,
            "milliseconds": spread(taken),
            "ratio": spread([a / b for a, b in zip(taken, times[0], strict=True)]),
            "state_bytes": contender.state_bytes,
            "temp_bytes": contender.temp_bytes,
        }
        for contender, taken in zip(found, times, strict=True)
    ]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def describe(
    benchmark: str, arguments: Sequence[str], shapes: Any, model: str, dtype: str, repeats: int
) -> dict[str, Any]:
    """What was run, where and with which versions."""
    packages = ("memopt", "jax", "jaxlib", "optax", "torch", "apollo-torch", "lion-pytorch")
    leaves = jax.tree.leaves(shapes)
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *arguments]),
        "model": model,
        "dtype": dtype,
        "parameter_bytes": sum(math.prod(p.shape) * p.dtype.itemsize for p in leaves),
        "repeats": repeats,
        "device": jax.devices()[0].device_kind,
        "cpu": cpu_model(),
        "cores": core_count(),
        "versions": {"python": platform.python_version()} | versions(packages),
    }


def core_count() -> int | None:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of those that are installed; of one that is so twice that which is imported, the first."""
    installed = list(importlib.metadata.distributions())
    found = {d.name: d.version for d in reversed(installed)}
    return {name: found[name] for name in packages if name in found}


def cpu_model() -> str:
    """The processor's name, as Linux knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(report: dict[str, Any], baseline: str = "optax.adamw") -> Table:
    """The records as a table for the terminal."""
    title = f"LLaMA-{report['model']}, {report['dtype']}, {report['cores']} cores"
    shown = Table(
        title=f"{title}: a step ÷ {baseline}'s of the same round", box=SIMPLE_HEAD, pad_edge=False
    )
    shown.add_column("optimizer", no_wrap=True)
    shown.add_column("from", no_wrap=True)
    for column in ("ms", "ratio", "min–max", "state MB", "temp MB"):
        shown.add_column(column, justify="right", no_wrap=True)
    for result in report["results"]:
        ratio, temp = result["ratio"], result["temp_bytes"]
        shown.add_row(
            result["name"],
            result["library"],
            f"{result['milliseconds']['median']:.1f}",
            f"{ratio['median']:.2f}",
            f"{ratio['min']:.2f}–{ratio['max']:.2f}",
            f"{result['state_bytes'] / 1e6:.1f}",
            "" if temp is None else f"{temp / 1e6:.1f}",
        )
    return shown


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of the ratios, whiskers from least to largest, one colour a library."""
    from matplotlib.figure import Figure

    results = report["results"]
    figure = Figure(figsize=(7, 0.8 + 0.32 * len(results)), layout="constrained")
    axes = figure.subplots()
    for library, color in COLORS.items():
        rows = [i for i, result in enumerate(results) if result["library"] == library]
        ratios = [results[i]["ratio"] for i in rows]
        middle = [r["median"] for r in ratios]
        below = [r["median"] - r["min"] for r in ratios]
        above = [r["max"] - r["median"] for r in ratios]
        if rows:
            axes.barh(rows, middle, color=color, label=library, xerr=[below, above])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(results)), [result["name"] for result in results])
    axes.invert_yaxis()
    axes.set_xlabel("time of a step ÷ optax.adamw's")
    axes.set_title(f"LLaMA-{report['model']}, {report['dtype']}, {report['cores']} cores")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str]) -> None:
    """Measures, prints the table and writes the files."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    try:
        check_at_least("repeats", options.repeats, 1)
        found = contenders(options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    shapes = model_shapes(options.model, options.dtype)
    report = describe("step_time", arguments, shapes, options.model, options.dtype, options.repeats)
    report["results"] = measure(found, options.repeats)
    Console().print(table(report))
    save(report, options.output, lambda path: plot(report, path))


if __name__ == "__main__":
    main(sys.argv[1:])
