"""Compares planned peaks with those of the same steps when they run.

    nice python -m benchmarks.plan_accuracy               # on this machine's CPU
    python -m benchmarks.plan_accuracy --chip rtx4090     # on a GPU, beside its compiler's plan

Each configuration is planned by `memopt.plan` in one process and run, for two steps, in another.

On the CPU the peak is that of resident memory during the steps, less what is resident before the
state is made, by Linux's account. It counts what no compiler knows, too; conditions leave little of
it. glibc returns freed memory to the system at once. Unless ``--threads all``, the process has one
core, since matrix products of several threads copy their operands in pieces. ``--library eigen``
does without YNNPACK, which copies operands whole, those of attention above all. A mesh's peak is
that of all its devices, which share the process.

On a GPU the peak is ``memory_stats()["peak_bytes_in_use"]`` of JAX's allocator.

Prints a table and writes it as JSON. Rows of the same machine that are in the file are not measured
again.
"""

import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.machine import find_gpu
from benchmarks.report import Report, markdown_table, read_results
from memopt.errors import check_choice
from memopt.machine import core_count, cpu_model, versions
from memopt.planning.chips import GPUS
from memopt.planning.plan import plan
from memopt.planning.run_options import run_config
from memopt.training.describe import describe_run
from memopt.training.placement import parse_mesh

STEPS = 2
RESULTS = Path(__file__).parent / "results" / "plan_accuracy.json"
SMALL: dict[str, Any] = {"model": "60m", "batch_size": 2, "seq_len": 256}
#: Sizes, methods, storages, released or not, accumulation and meshes.
ROWS: dict[str, dict[str, Any]] = {
    "AdamW": SMALL | {"optimizer": "adamw"},
    "AdamW, two micro-batches": SMALL | {"optimizer": "adamw", "batch_size": 4, "accumulation": 2},
    "Lion, 1024 tokens": SMALL | {"optimizer": "lion", "batch_size": 1, "seq_len": 1024},
    "Muon": SMALL | {"optimizer": "muon"},
    "GaLore": SMALL | {"optimizer": "galore"},
    "Adafactor, released": SMALL | {"optimizer": "adafactor", "release": True},
    "APOLLO-Mini, state int8": SMALL | {"optimizer": "apollo_mini", "state": "int8"},
    "APOLLO-Mini, state and weights int8, released": SMALL
    | {"optimizer": "apollo_mini", "state": "int8", "weights": "int8", "release": True},
    "AdamW, fsdp=2": SMALL | {"optimizer": "adamw", "mesh": "fsdp=2"},
    "Adafactor, tiny, 32 rows": {
        "model": "tiny",
        "optimizer": "adafactor",
        "batch_size": 32,
        "seq_len": 512,
    },
}
NO_YNNPACK = {"ynnpack": "", "eigen": "--xla_cpu_experimental_ynn_fusion_type="}
#: Freed memory of any size goes back to the system at once; see mallopt(3).
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Options(NamedTuple):
    """The options of this benchmark.

    Attributes:
        chip: "cpu", or the GPU of this machine by its name for `memopt plan`.
        threads: whether a CPU's run has one core or all of them.
        library: what computes a CPU's matrix products; XLA's default is YNNPACK.
        rows: the names of rows; by default all.
        output: the JSON file.
        only: plan or run the one row in this process, and print the bytes as JSON.
    """

    chip: str = "cpu"
    threads: Literal["one", "all"] = "one"
    library: Literal["ynnpack", "eigen"] = "ynnpack"
    rows: tuple[str, ...] = tuple(ROWS)
    output: Path = RESULTS
    only: Literal["plan", "run"] | None = None


def planned(row: str, chip: str) -> dict[str, Any]:
    """The planned bytes of a row, of all devices if they share this machine's memory."""
    found = plan(chip=chip, **ROWS[row])
    count = found.devices if chip == "cpu" else 1
    return {"planned_bytes": count * found.peak_bytes, "compiler": found.compiler}


def measured(row: str) -> dict[str, Any]:
    """The bytes that a few steps of a row take on this machine's devices."""
    options = dict(ROWS[row])
    model, optimizer = options.pop("model"), options.pop("optimizer")
    on_cpu = jax.default_backend() == "cpu"
    config = run_config(model, optimizer, options, "cpu" if on_cpu else "gpu")
    setup = describe_run(config, trace=False)
    setup.compile()
    with jax.set_mesh(setup.mesh):
        init = setup.jit_init(seed=0).lower().compile()
    numbers = np.random.default_rng(1).integers(0, 256, config.text.seq_len, np.int32)
    kinds = {"segment_ids": 1 + 0 * numbers, "positions": np.arange(config.text.seq_len)}
    kinds |= {"weights": 1 + 0 * numbers}
    batch = setup.place(
        {
            name: np.broadcast_to(kinds.get(name, numbers), like.shape).astype(like.dtype)
            for name, like in setup.batch.items()
        }
    )
    before = _settle() if on_cpu else 0
    state = jax.block_until_ready(init())
    start = _settle() if on_cpu else _peak_of_gpu()
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(STEPS):
        with jax.set_mesh(setup.mesh):
            state, _ = jax.block_until_ready(setup.jitted(state, batch))
    peak = _status("VmHWM") if on_cpu else _peak_of_gpu()
    return {"start_bytes": start - before, "measured_bytes": peak - before}


def _settle() -> int:
    """Waits until freed memory is the system's, and returns what is resident."""
    gc.collect()
    time.sleep(1)  # XLA frees temporaries after it has said that it is ready
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(name: str) -> int:
    """A number of bytes in Linux's status of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _peak_of_gpu() -> int:
    return max(device.memory_stats()["peak_bytes_in_use"] for device in jax.local_devices())


def in_own_process(options: Options, row: str, only: str) -> dict[str, Any]:
    """Plans or runs a row in a new process."""
    environment = dict(os.environ) | {"JAX_PLATFORMS": "cpu"}
    if options.chip == "cpu":
        count = math.prod(parse_mesh(ROWS[row].get("mesh", "data=1")).values())
        flags = f"--xla_force_host_platform_device_count={count} {NO_YNNPACK[options.library]}"
        environment |= RETURN_MEMORY | {"XLA_FLAGS": flags}
    elif only == "run":
        environment["JAX_PLATFORMS"] = "cuda,cpu"
    command = [sys.executable, "-m", "benchmarks.plan_accuracy", "--only", only, "--rows", row]
    command += ["--chip", options.chip, "--threads", options.threads]
    command += ["--library", options.library]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout)


def table(results: Sequence[dict[str, Any]]) -> Table:
    """The records as a table for the terminal."""
    shown = Table(title="Peak of a step", box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("step")
    for column in (
        "device",
        "threads",
        "library",
        "planned MB",
        "measured MB",
        "measured ÷ planned",
    ):
        shown.add_column(column, justify="right")
    for r in results:
        sizes = (f"{r[name] / 1e6:.1f}" for name in ("planned_bytes", "measured_bytes"))
        shown.add_row(r["row"], r["chip"], r["threads"], r["library"], *sizes, f"{r['ratio']:.3f}")
    return shown


def markdown(report: Mapping[str, Any]) -> str:
    """The records as the table of docs/plan.md."""

    def order(r: dict[str, Any]) -> tuple[Any, ...]:
        return r["chip"], r["threads"] == "all", r["library"] == "eigen", list(ROWS).index(r["row"])

    def cells(r: dict[str, Any]) -> Sequence[str]:
        sizes = (f"{r[name] / 1e6:.1f} MB" for name in ("planned_bytes", "measured_bytes"))
        cores = {"one": "1", "all": str(r["cores"])}.get(r["threads"], "")
        return r["row"], r["chip"], cores, r["library"], *sizes, f"{r['ratio']:.3f}"

    columns = ("step", "on", "cores", "matrix products", "planned", "measured", "ratio")
    return markdown_table(columns, map(cells, sorted(report["results"], key=order)))


def main(arguments: Sequence[str]) -> None:
    """Measures, prints the table and writes the file, and the table of the docs."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    try:
        check_choice("chip", options.chip, ["cpu", *GPUS])
        for row in options.rows:
            check_choice("rows", row, ROWS)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if options.only:
        if options.only == "run" and options.chip == "cpu" and options.threads == "one":
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        (row,) = options.rows
        print(json.dumps(planned(row, options.chip) if options.only == "plan" else measured(row)))
        return
    gpu = find_gpu() if options.chip != "cpu" else None
    about = {
        "chip": options.chip,
        "threads": options.threads if options.chip == "cpu" else "",
        "library": options.library if options.chip == "cpu" else "",
        "device": gpu.name if gpu else cpu_model(),
        "cores": core_count(),
        "versions": versions(("memopt", "jax", "jaxlib", "optax", "flax")),
    }
    results = read_results(options.output)
    for row in track(options.rows, transient=True):
        if any(({"row": row} | about).items() <= one.items() for one in results):
            continue
        found = in_own_process(options, row, "plan") | in_own_process(options, row, "run")
        record = {"row": row, "options": ROWS[row], **found, **about}
        record["ratio"] = found["measured_bytes"] / found["planned_bytes"]
        results = [one for one in results if not _same_row(one, record)] + [record]
        Report("plan_accuracy", (), options.output, results).save()
    Console().print(table(results))


def _same_row(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a record replaces another, of older versions perhaps."""
    return all(one[name] == other[name] for name in ("row", "chip", "threads", "library", "device"))


if __name__ == "__main__":
    main(sys.argv[1:])
