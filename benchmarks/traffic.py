"""Counts the bytes that a step of each optimizer moves in a TPU's memory, by the TPU's compiler.

    python -m benchmarks.traffic [--optimizer apollo] [--layout list] [--dtype bfloat16] [--explain]

A step is one jitted ``update`` and ``apply_updates`` with donated parameters and state, on the
hidden matrices of four LLaMA-7b blocks (two for SOAP), compiled for one chip. Nothing is run, and
no TPU is needed, only libtpu (the extra `plan`). Its bytes accessed are divided by those of the
parameters.

Only the chip's main memory is counted: its fast memory is reserved for kernels. By default the
compiler also keeps arrays that fit in fast memory, and then counts their bytes twice or more, for
the copy and for reads; ``--cache`` allows this.

Without ``--optimizer`` it measures a list, in both layouts and dtypes, prints tables and writes all
as JSON, with a plot. Each record is saved as it is found, and not measured again with the same
options and compiler.
"""

import itertools
import json
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import Mesh, NamedSharding
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import memopt
from benchmarks.report import COMPILERS, Report, markdown_table, read_results
from benchmarks.step_time import COLORS
from benchmarks.updates import between_refreshes
from memopt.machine import versions
from memopt.optimizers.registry import METHODS
from memopt.planning import hlo
from memopt.planning.chips import devices, only_compile
from memopt.state.quantized_state import QuantizedState
from memopt.training.config import State

LAYERS, D, FF = 4, 4096, 11008
FEWER_LAYERS = {"soap": 2}  # of four blocks its state is larger than a v5e's memory
KERNELS = dict.fromkeys("qkvo", (D, D)) | {"gate": (D, FF), "up": (D, FF), "down": (FF, D)}
BASELINES = ("adamw", "optax_adafactor", "optax_lion")
NO_CACHE: dict[str, str | bool] = {
    "xla_tpu_scoped_vmem_limit_kib": str(2**17)
}  # reserves all of the fast memory for kernels
LEARNING_RATE = 1e-3
Layout = Literal["stacked", "list"]
DType = Literal["float32", "bfloat16"]
EXPLAINED = 40


class Options(NamedTuple):
    """The options of this benchmark.

    Attributes:
        optimizer: a name known to `memopt.optimizer`; by default a list of them, one by one.
        layout: "stacked" for one array per kernel, "list" for one array per kernel and block; by
            default stacked, and both for a list.
        dtype: the dtype of parameters and gradients; by default float32, and both for a list.
        chip: the chip to compile for.
        rank: the rank of methods whose rank is a fraction by default; APOLLO-Mini keeps its own.
        state: how the optimizer's state is stored; by default as in the method.
        cache: let the compiler keep arrays in fast memory, as it does by default.
        json: print one JSON object instead of a table.
        explain: also print the instructions that move the most bytes.
        output: the JSON file of a list; the plot has the same name.
    """

    optimizer: str | None = None
    layout: Layout | None = None
    dtype: DType | None = None
    chip: Literal["v4", "v5e", "v5p", "v6e", "tpu7x"] = "v5e"
    rank: int = 256
    state: State | None = None
    cache: bool = False
    json: bool = False
    explain: bool = False
    output: Path = Path(__file__).parent / "results" / "traffic.json"


def one_chip(chip: str) -> NamedSharding:
    """A sharding of unsplit arrays on a mesh of one chip."""
    return NamedSharding(Mesh(devices(chip), "chip"), jax.P())


def blocks(layout: str, dtype: str, layers: int = LAYERS) -> Any:
    """The hidden matrices of some LLaMA-7b blocks, as shapes."""
    stack = (layers,) if layout == "stacked" else ()
    block = {
        name: {"kernel": jax.ShapeDtypeStruct((*stack, *shape), jnp.dtype(dtype))}
        for name, shape in KERNELS.items()
    }
    return {"blocks": block if stack else [block] * layers}


def compared() -> list[str]:
    """Baselines and memopt's methods, except those that refresh at every step or need the loss."""
    always = [
        name
        for name, method in METHODS.items()
        if method.needs or method.defaults.get("refresh_every") == 1
    ]
    return [*BASELINES, *(name for name in memopt.available("memopt") if name not in always)]


def method_options(name: str, rank: int) -> dict[str, Any]:
    """The rank, for a method of memopt that lets users choose it."""
    return {"rank": rank} if name in METHODS and METHODS[name].has_free_rank else {}


def compile_step(
    tx: optax.GradientTransformation,
    params: Any,
    sharding: NamedSharding,
    *,
    cache: bool = False,
) -> jax.stages.Compiled:
    """Compiles a step without a refresh, on arrays with the given sharding."""
    place = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )
    is_quantized = lambda x: isinstance(x, QuantizedState)

    def with_known_scales(state: Any) -> Any:
        if not is_quantized(state) or not state.scales:
            return state
        *scales, last = state.scales
        known = lambda s: jnp.concatenate([s[..., :-1], jnp.ones_like(s[..., -1:])], -1)
        return state._replace(scales=(*scales, jax.tree.map(known, last)))

    def step(params: Any, state: Any, gradients: Any) -> Any:
        with between_refreshes(state) as state:
            # The next scale of every row is set too, so that none needs to be fitted again.
            state = jax.tree.map(with_known_scales, state, is_leaf=is_quantized)
            updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state, params = place(jax.eval_shape(tx.init, params)), place(params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    return lowered.compile(compiler_options=None if cache else NO_CACHE)


def cases(options: Options) -> list[tuple[str, Options]]:
    """The optimizers to measure, with the layout and dtype of each measurement."""
    names = [options.optimizer] if options.optimizer else compared()
    all_of = lambda given, default: [given] if given else get_args(default)
    pairs = itertools.product(all_of(options.layout, Layout), all_of(options.dtype, DType))
    found = [options._replace(layout=layout, dtype=dtype) for layout, dtype in pairs]
    found = found[:1] if options.optimizer else found
    return [(name, one) for one in found for name in names]


def measure(name: str, options: Options) -> tuple[dict[str, Any], jax.stages.Compiled]:
    """The record of one optimizer, and its compiled step."""
    chosen = method_options(name, options.rank)
    tx = memopt.optimizer(name, LEARNING_RATE, **chosen)
    if options.state:
        tx = memopt.quantize_state(tx, options.state)
    layers = FEWER_LAYERS.get(name, LAYERS)
    params = blocks(options.layout or "stacked", options.dtype or "float32", layers)
    counted = memopt.state_bytes(tx, params)
    compiled = compile_step(tx, params, one_chip(options.chip), cache=options.cache)
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    assert cost is not None
    assert memory is not None
    size = sum(counted.parameters.values())
    record = setting(name, options) | {
        "library": METHODS[name].library,
        "layers": layers,
        "traffic": cost["bytes accessed"] / size,
        "bytes_accessed": cost["bytes accessed"],
        "parameter_bytes": size,
        "state_bytes": counted.total,
        "temp_bytes": memory.temp_size_in_bytes,
    }
    return record, compiled


def setting(name: str, options: Options) -> dict[str, Any]:
    """Names the step that is compiled for one optimizer, and the compiler."""
    return {
        "optimizer": name,
        "layout": options.layout,
        "dtype": options.dtype,
        "chip": options.chip,
        "rank": method_options(name, options.rank).get("rank"),
        "state": options.state,
        "cache": options.cache,
        "versions": versions(("jaxlib", "libtpu")),
    }


_MOVES_NOTHING = {
    *("parameter", "constant", "bitcast", "tuple", "get-tuple-element"),
    *("while", "conditional", "call"),  # only the computations that they call move bytes
}


def movers(text: str | None) -> list[tuple[int, str]]:
    """Lists the bytes that each instruction moves, the largest first, with a description.

    For a fusion, all operands and results in the chip's main memory are counted, which is too much
    if it reads only a part of one. Bodies of loops are ignored.
    """
    computations, entry = hlo.parse(text or "")
    sizes: dict[str, int] = {}
    moved = []
    for one in computations.get(entry, []):
        in_main = lambda layout: "S(" not in layout  # S: fast memories
        sizes[one.name] = hlo.shape_bytes(one.shape, in_main)
        if one.opcode in _MOVES_NOTHING or one.opcode.endswith("-start"):
            continue
        if one.opcode.endswith("-done"):  # a copy between two memories
            size = hlo.shape_bytes(one.shape)
        else:
            size = sizes[one.name] + sum(sizes.get(operand, 0) for operand in one.operands)
        shape = re.sub(r"{[^}]*}|/\*.*?\*/", "", one.shape)
        moved.append((size, f"{one.opcode} {shape}  {one.source or one.name}"))
    return sorted(moved, reverse=True)


def table(results: Sequence[dict[str, Any]]) -> Table:
    """The records as a table for the terminal."""
    shown = Table(title="Bytes a step moves ÷ bytes of parameters", box=SIMPLE_HEAD)
    for column in ("optimizer", "layout", "dtype"):
        shown.add_column(column)
    for column in ("rank", "traffic", "state MB", "temp MB"):
        shown.add_column(column, justify="right")
    for r in results:
        shown.add_row(
            *(r["optimizer"], r["layout"], r["dtype"]),
            str(r["rank"] or ""),
            f"{r['traffic']:.3f}",
            f"{r['state_bytes'] / 1e6:,.1f}",
            f"{r['temp_bytes'] / 1e6:,.1f}",
        )
    return shown


def of_case(records: Iterable[dict[str, Any]], layout: str, dtype: str) -> list[dict[str, Any]]:
    """The records of one layout and dtype."""
    return [r for r in records if (r["layout"], r["dtype"]) == (layout, dtype)]


def plot(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Draws the traffic of stacked layers in float32 as bars, with a colour for each library."""
    from matplotlib.figure import Figure

    results = of_case(records, "stacked", "float32")
    figure = Figure(figsize=(7, 0.9 + 0.32 * len(results)), layout="constrained")
    axes = figure.subplots()
    for library in ("memopt", "optax"):
        rows = [i for i, r in enumerate(results) if r["library"] == library]
        axes.barh(rows, [results[i]["traffic"] for i in rows], color=COLORS[library], label=library)
    for i, r in enumerate(results):
        axes.annotate(f" {r['traffic']:.2f}", (r["traffic"], i), va="center", fontsize=8)
    axes.set_yticks(range(len(results)), [r["optimizer"] for r in results])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("bytes a step moves ÷ bytes of parameters")
    axes.set_title(f"Four LLaMA-7b blocks, {results[0]['dtype']}, one {results[0]['chip']} chip")
    figure.legend(loc="outside lower right", ncols=2)
    figure.savefig(path, dpi=120)


def markdown(report: dict[str, Any]) -> str:
    """The paragraph for the docs: the methods by what they move, Optax's with its name."""
    names = _by_name(report, "stacked", "float32")
    words = [f"{_title(name)} {names[name]:.2f}" for name in sorted(names, key=lambda n: names[n])]
    return textwrap.fill(", ".join(words) + ".", 100, break_on_hyphens=False)


def layouts_table(report: dict[str, Any]) -> str:
    """The traffic in every layout and dtype, as a table in Markdown."""
    pairs = [*itertools.product(get_args(Layout), get_args(DType))]
    columns = [_by_name(report, *pair) for pair in pairs]
    rows = [
        [_title(name), *(f"{column[name]:.2f}" if name in column else "–" for column in columns)]
        for name in columns[0]
    ]
    return markdown_table(["optimizer", *map(", ".join, pairs)], rows)


def _by_name(report: dict[str, Any], layout: str, dtype: str) -> dict[str, float]:
    return {r["optimizer"]: r["traffic"] for r in of_case(report["results"], layout, dtype)}


def _title(name: str) -> str:
    return f"`{METHODS[name].library}.{name.removeprefix('optax_')}`"


def main(arguments: Sequence[str]) -> None:
    """Measures, prints and, for a list, writes the files."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    only_compile()
    chosen = cases(options)
    console = Console()
    report = Report("traffic", arguments, options.output, [], COMPILERS)
    key = lambda r: (r["layout"], r["dtype"], r["optimizer"])
    saved = [] if options.optimizer else read_results(options.output)
    found = {key(r): r for r in saved if r["optimizer"] in compared()}
    results = []
    try:
        for name, one in chosen:
            wanted = setting(name, one)
            record = found.get(key(wanted), {})
            if not wanted.items() <= record.items():
                record, compiled = measure(name, one)
                if options.explain:
                    print(f"{name}: parameter sizes that each instruction moves, at most")
                    for moved, text in movers(compiled.as_text())[:EXPLAINED]:
                        print(f"  {moved / record['parameter_bytes']:.4f}  {text}")
                if not options.optimizer:
                    found[key(record)] = record
                    console.print(f"{name:24} {one.layout:8} {one.dtype:9} {record['traffic']:.3f}")
                    report.results[:] = found.values()
                    report.save()
            results.append(record)
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps(results[0] if options.optimizer else results))
    else:
        console.print(table(results))
    if not options.optimizer:
        report.results[:] = found.values()
        report.save(lambda path: plot(found.values(), path))


if __name__ == "__main__":
    main(sys.argv[1:])
