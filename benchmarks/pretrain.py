"""Runs ``memopt pretrain`` as it is by default: validation loss, memory and time of its step.

    python -m benchmarks.pretrain [--steps 600] [--rounds 30]

The loss depends on the standard library of the Python that runs it, which is the text. The memory
is the compiler's, of the run's step and of the same step with AdamW.

The time is processor time on one core, which other programs on the machine disturb less than they
do a clock, and is measured if torch and transformers are installed: of the run's step, and in the
same round of a step of torch with the same parameters as a LLaMA of transformers and fused AdamW.
A profile says how the run's step divides it.
"""

import collections
import dataclasses
import importlib.util
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from benchmarks.report import Report, markdown_table, spread
from memopt.cli.pretrain import parse
from memopt.json_lines import read_json_lines
from memopt.models import llama
from memopt.planning import hlo
from memopt.planning.step_memory import step_memory
from memopt.training.describe import describe_run
from memopt.training.loop import train
from memopt.training.open import open_run
from memopt.training.setup import Setup

LIBRARIES = ("torch", "transformers")

#: Steps before the timed ones, and steps of the profile.
WARM_UP, PROFILED = 3, 5


class Options(NamedTuple):
    """The options of this benchmark.

    Attributes:
        steps: training steps; by default those of the command.
        rounds: timed steps; 0 for none.
        output: the JSON file.
    """

    steps: int | None = None
    rounds: int = 30
    output: Path = Path(__file__).parent / "results" / "pretrain.json"


def markdown(report: dict[str, Any]) -> str:
    """The table of bytes for the docs."""
    kept = report["results"]["bytes"]
    columns = {"bytes": "", "APOLLO-Mini": "apollo_mini", "optax.adamw": "adamw"}
    names = {"parameters": "parameters", "state": "optimizer state", "peak": "peak of a step"}
    rows = [
        (title, *(f"{kept[optimizer][name]:,}" for optimizer in columns.values() if optimizer))
        for name, title in names.items()
    ]
    return markdown_table([*columns], rows)


def time_table(report: dict[str, Any]) -> str:
    """The table of processor time for the docs."""
    kept = report["results"]["time"]
    rows = [
        (f"`memopt pretrain`: {part}", f"{kept['memopt']['median'] * share:.0f}", f"{share:.2f}")
        for part, share in {"all": 1.0, **kept["profile"]}.items()
    ]
    rows.append(("torch: all", f"{kept['torch']['median']:.0f}", ""))
    return markdown_table(["step", "ms", "share"], rows)


def measure_times(setup: Setup, rounds: int) -> dict[str, Any]:
    """Milliseconds of processor time of a step of ours and of torch's, and how ours divide."""
    state = setup.jit_init(0)()
    tokens = np.random.default_rng(0).integers(0, 256, setup.batch["inputs"].shape)
    # One document in each row, of which every token counts.
    values = {"inputs": tokens, "targets": tokens, "segment_ids": 1, "weights": 1}
    values["positions"] = np.arange(tokens.shape[1])
    batch = {
        name: jnp.asarray(np.broadcast_to(values[name], like.shape), like.dtype)
        for name, like in setup.batch.items()
    }

    def ours() -> None:
        nonlocal state
        state, metrics = setup.jitted(state, batch)
        jax.block_until_ready((state, metrics))

    steps = {"memopt": ours, "torch": torch_step(setup, state.params, tokens)}
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(range(rounds + WARM_UP), description="rounds", transient=True):
        for name, step in steps.items():
            start = time.process_time()
            step()
            found[name].append(1e3 * (time.process_time() - start))
    kept = {name: taken[WARM_UP:] for name, taken in found.items()}
    speeds = [b / a for a, b in zip(kept["memopt"], kept["torch"], strict=True)]
    profile = profiled(ours, setup.compile().as_text() or "")
    return {name: spread(taken) for name, taken in kept.items()} | {
        "speed": spread(speeds),
        "profile": profile,
    }


def torch_step(setup: Setup, params: Any, tokens: np.ndarray) -> Callable[[], None]:
    """A step of torch on one core, of the same parameters and tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        llama.to_hugging_face(setup.model(params), directory)
        model = AutoModelForCausalLM.from_pretrained(directory)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.tensor(tokens)

    def step() -> None:
        logits = model(input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)  # its norm, as ours has
        optimizer.step()
        optimizer.zero_grad()

    return step


def profiled(step: Callable[[], None], text: str) -> dict[str, float]:
    """The shares of a step's time by what the compiler's instructions do."""
    computations, _ = hlo.parse(text)
    parts = {one.name: part(one, computations) for of in computations.values() for one in of}
    totals: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(PROFILED):
                step()
        [path] = Path(directory).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for event in (event for line in plane.lines for event in line.events):
                if kind := parts.get(str(dict(event.stats).get("hlo_op"))):
                    totals[kind] += event.duration_ns
    return {kind: round(ns / totals.total(), 3) for kind, ns in totals.most_common()}


def part(one: hlo.Instruction, computations: dict[str, list[hlo.Instruction]]) -> str | None:
    """Names the kind of an instruction; None if its parts have times of their own."""
    if one.opcode in ("while", "conditional", "call"):
        return None
    inner = [x for name in one.named("calls") for x in computations.get(name, [])]
    opcodes = {x.opcode for x in (one, *inner)}
    if "/update/" in one.source:
        return "update"
    if "dot" in opcodes:
        return "products in attention" if "vmap(" in one.source else "products with weights"
    if "dynamic-update-slice" in opcodes or "dynamic-slice" in opcodes:
        return "keeping arrays and reading kept ones"
    if opcodes & {"copy", "transpose"}:
        return "copies and transposes"
    return "other elementwise operations and sums"


def main(arguments: Sequence[str]) -> None:
    """Trains, asks the compiler, and writes the file."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX starts its threads
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "run"
        steps = [] if options.steps is None else ["--steps", str(options.steps)]
        run = open_run(parse(["--output", str(output), *steps]))
        train(run, Console())
        [*_, last] = [
            line for line in read_json_lines(output / "metrics.jsonl") if "val_loss" in line
        ]
    results: dict[str, Any] = {"steps": last["step"], "val_loss": last["val_loss"], "bytes": {}}
    for name in (run.config.optimization.optimizer, "adamw"):
        optimization = dataclasses.replace(run.config.optimization, optimizer=name, option=())
        setup = describe_run(dataclasses.replace(run.config, optimization=optimization))
        memory = step_memory(setup.compile(), setup.state.params, setup.state.opt_state)
        sizes = zip(("parameters", "state", "peak"), dataclasses.astuple(memory), strict=True)
        results["bytes"][name] = dict(sizes)
    if options.rounds and all(map(importlib.util.find_spec, LIBRARIES)):
        results["time"] = measure_times(run.setup, options.rounds)
    Report("pretrain", arguments, options.output, results, LIBRARIES).save()


if __name__ == "__main__":
    main(sys.argv[1:])
