"""Plans: the memory of a training step by the compiler of a chip, which is not needed itself."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import optax

from memopt.errors import check_choice
from memopt.models.attention import without_cudnn
from memopt.models.stacked import StackedModel
from memopt.planning import cache, chips
from memopt.planning.buffers import Buffer, absolute
from memopt.planning.compiler_report import CompilerReport, Moment, compile_report
from memopt.planning.own_step import own_step
from memopt.planning.run_options import check_options, run_command, run_config
from memopt.planning.step_memory import bytes_here
from memopt.training.config import Config, Optimization
from memopt.training.describe import PLAIN, describe_run
from memopt.training.placement import parse_mesh
from memopt.training.step import Loss, TrainState

Progress = Callable[[str], None]

#: Shows no progress.
silent: Progress = lambda line: None

#: The share of a GPU's memory that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION is set; see
#: docs.jax.dev, "GPU memory allocation".
PREALLOCATED = 0.75

#: The share that it may take; the rest is for the CUDA context and libraries.
ALLOCATABLE = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The memory and traffic that one training step needs of one device.

    The parts `parameter_bytes`, `state_bytes`, `gradient_bytes`, `activation_bytes` and
    `temporary_bytes` add up to `peak_bytes`.

    Attributes:
        model: The model's name.
        optimizer: The optimizer's name.
        chip: The chip that was asked about.
        devices: The number of devices of the mesh.
        compiled_for: The chip that the step was compiled for: another one if the step does not fit
            `chip`, or "cpu" if the compiler of `chip` is not installed.
        compiler: The compiler's name and version; "" if the step was not compiled, since weights
            and state alone exceed the chip: `peak_bytes` is then their sum, the least it can be.
        peak_bytes: The most that is held at any moment: arguments, results and temporaries, less
            what is donated, of `memory_analysis()`.
        parameter_bytes: The parameters.
        state_bytes: The optimizer's state.
        gradient_bytes: Gradients at the moment when temporaries are largest.
        activation_bytes: Other arrays of the forward and backward pass at that moment.
        temporary_bytes: The rest: what the update computes with, the batch, padding and gaps.
        program_bytes: The program, where it is in the chip's memory (TPUs); not in the peak.
        limit_bytes: The memory of the chip that programs may use.
        fits: Whether the compiler accepts the step for the chip, and peak and program are within
            the limit.
        margin_bytes: The limit less peak and program.
        largest: The largest temporary arrays at that moment.
        over_time: Gradients, activations and other temporaries, in bytes, at up to 200 moments of
            the compiled program, in their order; the body of a loop appears once. Weights and
            state are held all the time. Empty if the compiler wrote no record.
        traffic_bytes: Bytes that a step reads and writes in memory, by the compiler's cost
            analysis; None where it has none (GPUs).
        collectives: {kind: {"bytes": bytes moved, "count": number of runs}} of a step between two
            refreshes of a subspace; None if unknown.
        refresh_collectives: Those of a step that refreshes, if the method does.
        notes: Sentences that say what was assumed or done otherwise than asked.
        command: The command that runs this step; "" if no command does.
    """

    model: str
    optimizer: str
    chip: str
    devices: int
    compiled_for: str
    compiler: str
    peak_bytes: int
    parameter_bytes: int
    state_bytes: int
    gradient_bytes: int
    activation_bytes: int
    temporary_bytes: int
    program_bytes: int
    limit_bytes: int
    fits: bool
    margin_bytes: int
    largest: tuple[Buffer, ...]
    over_time: tuple[Moment, ...]
    traffic_bytes: int | None
    collectives: dict[str, dict[str, int]] | None
    refresh_collectives: dict[str, dict[str, int]] | None
    notes: tuple[str, ...]
    command: str

    def to_json(self) -> dict[str, Any]:
        """Returns all fields as JSON-serialisable values."""
        return dataclasses.asdict(self)


class Compilable(Protocol):
    """A step on abstract arrays, such as a `memopt.training.setup.Setup`."""

    @property
    def state(self) -> TrainState:
        """The shapes, dtypes and shardings of the state."""

    def lower(self) -> jax.stages.Lowered:
        """Lowers the step for the devices of its arrays."""


Make = Callable[[Sequence[jax.Device], str], Compilable]
"""Maps devices, and the chip they are of, to a step on them."""


def plan(
    model: str,
    *,
    optimizer: str | optax.GradientTransformation | None = None,
    chip: str = "v5e",
    mesh: str | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    release: bool = False,
    weights: str | None = None,
    state: str | None = None,
    dtype: str | None = None,
    remat: str | None = None,
    accumulation: int | None = None,
    progress: Progress = silent,
    cache: bool = False,
    skip_misfits: bool = False,
    **options: Any,
) -> Plan:
    """Asks a chip's compiler what one training step needs; allocates no array, runs nothing.

    The step is the one that `memopt pretrain` or `memopt finetune` compiles with these options. For
    a model of your own see `memopt.plan_step`.

    Args:
        model: A preset, such as "7b"; a directory with a Hugging Face model, of which only the
            config is read, or with a run. Options that are None or False are as
            `memopt pretrain` has them that starts from it: of a run, those of the run; the
            defaults below are those of others.
        optimizer: A name in `memopt.available()`; "module:function" of a function that maps
            learning_rate to an Optax transformation, such as "optax:adam"; or any Optax
            transformation. None: apollo_mini.
        chip: A name in `memopt.planning.chips.CHIPS`, or "cpu" for this machine.
        mesh: Axes and their sizes, such as "fsdp=16". None: one device.
        batch_size: Rows of a batch, over all devices and micro-batches. None: one for each part
            that the mesh splits a micro-batch into.
        seq_len: Tokens of a row. None: 2048, or as many as the model accepts.
        release: Whether to update each block while the backward pass runs.
        weights: How matrices are stored, see `memopt.quantize_params`. None: as they are.
        state: How the optimizer's state is stored, see `memopt.quantize_state`. None: as it is.
        dtype: The dtype of parameters and activations. None: "bfloat16", or "float32" on the CPU.
        remat: What the backward pass computes again: "none", "dots" or "full". None: "full", or
            "none" with `release`, which computes each block again anyway.
        accumulation: Micro-batches of a batch. None: 1.
        progress: Called with a line before each compilation, which may take minutes.
        cache: Whether to keep the compiler's answers on disk, and to look there first; see
            `memopt.planning.cache`.
        skip_misfits: Whether to leave a step uncompiled whose weights and state alone exceed the
            chip, as searches do. Its plan then has their sum as the peak.
        **options: Any other option of `memopt pretrain` that the step depends on, such as
            ``num_layers=8`` or ``option=("rank=128",)``.

    Raises:
        ValueError: An option, or a combination of them, cannot work; says what to change.

    Example:
        >>> found = plan("tiny", optimizer="adafactor", chip="cpu", seq_len=32, num_layers=2)
        >>> found.fits, found.compiled_for, found.command
        (True, 'cpu', 'memopt pretrain --model tiny --optimizer adafactor --num-layers 2 ...')
        >>> found.peak_bytes > found.parameter_bytes + found.state_bytes
        True
    """
    check_options(options)
    given = {
        "mesh": mesh,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "release": release,
        "weights": weights,
        "state": state,
        "dtype": dtype,
        "remat": remat,
        "accumulation": accumulation,
        **options,
    }
    tx = optimizer if isinstance(optimizer, optax.GradientTransformation) else None

    def config(compiled_for: str) -> Config:
        instead = {"dtype": "float32"} if compiled_for == "cpu" != chip else {}
        name: Any = optimizer if tx is None else PLAIN
        return run_config(model, name, given | instead, compiled_for)

    def describe(devices: Sequence[jax.Device], compiled_for: str) -> Compilable:
        return describe_run(config(compiled_for), devices=devices, tx=tx)

    asked = config(chip)
    found = plan_compilable(
        describe,
        chip,
        device_count(asked.run.mesh),
        progress,
        cache,
        skip_misfits,
        model=model,
        optimizer=asked.optimization.optimizer if tx is None else "own",
    )
    notes = found.notes
    if found.compiled_for == "cpu" != chip:
        notes += ("For a CPU the step is planned in float32.",)
    if found.compiled_for in chips.GPUS:
        notes += (
            "Attention works through the queries in chunks: a GPU that has cuDNN takes its flash "
            "attention instead, whose memory only cuDNN itself reports.",
        )
    command = run_command(config(found.compiled_for), model) if tx is None else ""
    return dataclasses.replace(found, notes=notes, command=command)


def plan_step(
    params: Any,
    loss: Loss | StackedModel,
    batch: Any,
    *,
    optimizer: str | optax.GradientTransformation | None = None,
    chip: str = "v5e",
    mesh: str | None = None,
    batch_size: int | None = None,
    release: bool = False,
    weights: str | None = None,
    state: str | None = None,
    remat: str | None = None,
    accumulation: int | None = None,
    progress: Progress = silent,
    cache: bool = False,
    skip_misfits: bool = False,
) -> Plan:
    """Asks a chip's compiler what one training step of a model of your own needs.

    The step is that of `memopt.training.train_step` or `release_step`, jitted with its state
    donated. As in `memopt.plan`, nothing is allocated and nothing runs.

    Args:
        params: The parameters: a tree of `jax.ShapeDtypeStruct` or arrays. A leaf with a
            `NamedSharding` is split by the same axes of `mesh`; others are copied to every device.
        loss: The loss, a function of (parameters, batch) that returns the summed loss and the
            number of tokens, or a `memopt.models.StackedModel`, which `release` needs.
        batch: A batch, a tree of arrays or `jax.ShapeDtypeStruct`. Their first axes are split over
            `data` and `fsdp`.
        optimizer: As in `memopt.plan`.
        chip: As in `memopt.plan`.
        mesh: As in `memopt.plan`.
        batch_size: Rows of a batch, the length of the first axis of all its arrays. None: as many
            as `batch` has.
        release: As in `memopt.plan`.
        weights: As in `memopt.plan`.
        state: As in `memopt.plan`.
        remat: What the backward pass of a `StackedModel` computes again: "none" or "full". None:
            "full", or "none" with `release`, which computes each block again anyway.
        accumulation: As in `memopt.plan`.
        progress: As in `memopt.plan`.
        cache: As in `memopt.plan`.
        skip_misfits: As in `memopt.plan`.

    Raises:
        ValueError: The arguments do not go together, or the loss fails; says what to change.

    Example:
        >>> shape = lambda *dims: jax.ShapeDtypeStruct(dims, "float32")
        >>> loss = lambda params, batch: (jax.numpy.sum((batch @ params) ** 2), batch.shape[0])
        >>> found = plan_step(shape(64, 8), loss, shape(16, 64), optimizer="lion", chip="cpu")
        >>> found.parameter_bytes, found.command
        (2048, '')
    """
    optimizer = Optimization.optimizer if optimizer is None else optimizer
    make = own_step(
        params,
        loss,
        batch,
        optimizer=optimizer,
        mesh=mesh,
        batch_size=batch_size,
        release=release,
        weights=weights,
        state=state,
        remat=remat,
        accumulation=1 if accumulation is None else accumulation,
    )
    return plan_compilable(
        make,
        chip,
        device_count(mesh),
        progress,
        cache,
        skip_misfits,
        model="own",
        optimizer=optimizer if isinstance(optimizer, str) else "own",
    )


def device_count(mesh: str | None) -> int:
    """The number of devices of a mesh; None is one."""
    return math.prod(parse_mesh(mesh).values()) if mesh else 1


def plan_compilable(
    make: Make,
    chip: str,
    count: int,
    progress: Progress = silent,
    cache: bool = False,
    skip_misfits: bool = False,
    *,
    model: str,
    optimizer: str,
) -> Plan:
    """Plans a step for a chip; see `plan`.

    Args:
        make: Returns the step on given devices.
        chip: The chip to ask about.
        count: The number of devices.
        progress: As in `plan`.
        cache: As in `plan`.
        skip_misfits: As in `plan`.
        model: The model's name, for the record.
        optimizer: The optimizer's name, likewise.

    Raises:
        ValueError: The chip is unknown, or the step cannot work.
    """
    check_choice("chip", chip, [*chips.CHIPS, "cpu"])
    limit = memory_of(chip, count)
    found = _compile(make, chip, count, progress, cache, limit if skip_misfits else None)
    report, notes = found.report, found.notes
    parts = {
        "parameter_bytes": bytes_here(found.step.state.params),
        "state_bytes": bytes_here(found.step.state.opt_state),
        "gradient_bytes": report.gradient_bytes,
        "activation_bytes": report.activation_bytes,
    }
    peak = report.peak_bytes
    margin = limit - peak - report.program_bytes
    fits = not found.refused and margin >= 0
    if fits and chip in chips.GPUS and peak > PREALLOCATED * chips.GPUS[chip].memory:
        notes += (
            "JAX takes 75% of a GPU: set XLA_PYTHON_CLIENT_MEM_FRACTION="
            f"{ALLOCATABLE:g} to run it.",
        )
    return Plan(
        model=model,
        optimizer=optimizer,
        chip=chip,
        devices=count,
        compiled_for=found.compiled_for,
        compiler=found.compiler,
        peak_bytes=peak,
        **parts,
        temporary_bytes=peak - sum(parts.values()),
        program_bytes=report.program_bytes,
        limit_bytes=limit,
        fits=fits,
        margin_bytes=margin,
        largest=report.largest,
        over_time=report.over_time,
        traffic_bytes=report.traffic_bytes,
        collectives=report.collectives,
        refresh_collectives=report.refresh_collectives,
        notes=notes,
        command="",
    )


class _Compiled(NamedTuple):
    """A compiled step.

    Attributes:
        step: The step.
        compiled_for: As in `Plan`.
        compiler: As in `Plan`.
        report: The compiler's report, or what is known without one.
        refused: The reason why the compiler of the chip that was asked about refuses the step.
        notes: As in `Plan`.
    """

    step: Compilable
    compiled_for: str
    compiler: str
    report: CompilerReport
    refused: str
    notes: tuple[str, ...]


def _compile(
    make: Make, chip: str, count: int, progress: Progress, keep: bool, most: int | None
) -> _Compiled:
    """Compiles a step for a chip; failing that, for the CPU or for a chip with more memory.

    Args:
        make: As in `plan_compilable`.
        chip: As in `plan_compilable`.
        count: As in `plan_compilable`.
        progress: As in `plan`.
        keep: `cache` of `plan`.
        most: Bytes of weights and state beyond which nothing is compiled; None: any.
    """
    compiled_for, notes = chips.compilable(chip)

    def described() -> Compilable:
        progress(f"tracing the step for {count} × {compiled_for}")
        with without_cudnn():
            return make(chips.devices(compiled_for, count), compiled_for)

    step = described()
    least = bytes_here(step.state.params) + bytes_here(step.state.opt_state)
    if most is not None and least > most:
        notes += ("Weights and state alone exceed the chip: the step was not compiled.",)
        return _Compiled(step, compiled_for, "", CompilerReport(least), "", notes)
    report, refused = _report(step, compiled_for, count, progress, keep)
    if report is None:
        notes += (f"The compiler refuses the step for {chip}: {refused}.",)
        compiled_for = roomiest(chip)
        if compiled_for != chip:
            step = described()
            report, _ = _report(step, compiled_for, count, progress, keep)
            if report:
                notes += (f"The figures are those of a step compiled for {compiled_for}.",)
    if report is None:
        notes += ("No chip of its kind has the memory: only the sum is known.",)
        report = CompilerReport(_needed(refused))
    return _Compiled(step, compiled_for, chips.compiler(compiled_for), report, refused, notes)


def _report(
    step: Compilable, chip: str, count: int, progress: Progress, keep: bool
) -> tuple[CompilerReport | None, str]:
    """Compiles a step for a chip; in place of a report returns why the compiler refuses it."""
    with without_cudnn():
        lowered = step.lower()
    key = cache.key_of(lowered.as_text(), chip) if keep else ""
    record = cache.load(key) if keep else None
    if record is None:
        progress(f"compiling for {count} × {chip} with {chips.compiler(chip)}")
        record = {"report": None, "refused": ""}
        try:
            record["report"] = dataclasses.asdict(compile_report(lowered, step.state.params))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            record["refused"] = first_line(error).rstrip(".")
        if keep:
            cache.save(key, record, _sources(record["report"]))
    report = record["report"] and CompilerReport.from_json(record["report"])
    return report, record["refused"]


def first_line(error: Exception) -> str:
    """The first line of a compiler's error, which may have pages."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _sources(report: dict[str, Any] | None) -> list[str]:
    """The files whose lines a report names."""
    named = [one["source"].rpartition(":")[0] for one in report["largest"]] if report else []
    return [str(absolute(file)) for file in named if file]


def roomiest(chip: str) -> str:
    """The chip with the most memory among those of the same kind, TPUs or GPUs."""
    kind: Mapping[str, Any] = chips.TPUS if chip in chips.TPUS else chips.GPUS
    return max(kind, key=lambda name: kind[name].memory)


def memory_of(chip: str, count: int) -> int:
    """The bytes of memory that programs may use on one of so many devices.

    Devices of "cpu" share this machine's memory. JAX may take 95% of a GPU's.
    """
    if chip == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count
    memory = chips.CHIPS[chip].memory
    return int(ALLOCATABLE * memory) if chip in chips.GPUS else memory


def _needed(refused: str) -> int:
    """The bytes that a compiler says a step needs, when it refuses it."""
    found = re.search(r"\((\d+(?:\.\d+)?)([KMGT])\) exceeds", refused)
    if not found:
        raise ValueError(f"the compiler refuses the step and does not say what it needs: {refused}")
    return int(float(found[1]) * 2 ** (10 * ("KMGT".index(found[2]) + 1)))
