"""Whether a training step fits a chip, by the chip's own compiler; no chip is needed."""

import dataclasses
import functools
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
from memopt.planning.compiler_report import CompilerReport, compile_report
from memopt.planning.own_step import own_step
from memopt.planning.run_options import check_options, run_command, run_config
from memopt.planning.step_memory import bytes_here
from memopt.training.config import Config
from memopt.training.describe import PLAIN, describe_run
from memopt.training.placement import parse_mesh
from memopt.training.step import Loss, TrainState

Progress = Callable[[str], None]

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
        compiler: The compiler's name and version.
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
    model: str | None = None,
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
    params: Any = None,
    loss: Loss | StackedModel | None = None,
    batch: Any = None,
    progress: Progress = lambda line: None,
    cache: bool = False,
    **options: Any,
) -> Plan:
    """Asks a chip's compiler what one training step needs; allocates no array, runs nothing.

    The step is the one that `memopt pretrain` or `memopt finetune` compiles with these options, or
    with a model of your own the one of `memopt.training.train_step` or `release_step`, jitted with
    its state donated.

    Args:
        model: A preset, such as "7b"; a directory with a Hugging Face model, of which only the
            config is read, or with a run. Options that are None or False are as
            `memopt pretrain` has them that starts from it: of a run, those of the run; the
            defaults below are those of others.
        optimizer: A name in `memopt.available()`, or any Optax transformation. None: apollo_mini.
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
        params: The parameters of a model of your own, in place of `model`: a tree of
            `jax.ShapeDtypeStruct` or arrays. A leaf with a `NamedSharding` is split by the same
            axes of `mesh`; others are copied to every device.
        loss: Its loss, a function of (parameters, batch) that returns the summed loss and the
            number of tokens, or its `memopt.models.StackedModel`, which `release` needs.
        batch: A batch of it, likewise; first axes are split over `data` and `fsdp`.
        progress: Is given a line about what the compiler works on, which may take minutes.
        cache: Whether to keep what the compiler says on disk, and look there first; see
            `memopt.planning.cache`.
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
    check_choice("chip", chip, [*chips.CHIPS, "cpu"])
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
    if (model is None) == (params is None):
        raise ValueError("model or params must say what to train: give one of them.")
    tx = optimizer if isinstance(optimizer, optax.GradientTransformation) else None
    if params is not None:
        optimizer = optimizer or Config().optimization.optimizer
        make: Make = own_step(params, loss, batch, optimizer, given)
        name = optimizer if isinstance(optimizer, str) else "own"
        return plan_step(
            make, chip, _device_count(mesh), progress, cache, model="own", optimizer=name
        )
    for name in ("option", "predict_steps"):
        if tx is not None and options.get(name):
            raise ValueError(f"{name} goes with the name of an optimizer.")

    def config(compiled_for: str) -> Config:
        instead = {"dtype": "float32"} if compiled_for == "cpu" != chip else {}
        name: Any = optimizer if tx is None else PLAIN
        return run_config(str(model), name, given | instead, compiled_for)

    def describe(devices: Sequence[jax.Device], compiled_for: str) -> Compilable:
        return describe_run(config(compiled_for), devices=devices, tx=tx)

    asked = config(chip)
    name = asked.optimization.optimizer if tx is None else "own"
    count = _device_count(asked.run.mesh)
    found = plan_step(describe, chip, count, progress, cache, model=str(model), optimizer=name)
    notes = found.notes
    if found.compiled_for in chips.GPUS:
        notes += (
            "Attention works through the queries in chunks: a GPU that has cuDNN takes its flash "
            "attention instead, whose memory only cuDNN itself reports.",
        )
    command = run_command(config(found.compiled_for), str(model)) if tx is None else ""
    return dataclasses.replace(found, notes=notes, command=command)


def _device_count(mesh: str | None) -> int:
    return math.prod(parse_mesh(mesh).values()) if mesh else 1


def plan_step(
    make: Make,
    chip: str,
    count: int,
    progress: Progress = lambda line: None,
    cache: bool = False,
    *,
    model: str,
    optimizer: str,
) -> Plan:
    """Compiles a step for a chip, or for a roomier one that it fits, and reads what it needs.

    Args:
        make: Returns the step on given devices.
        chip: The chip to ask about.
        count: The number of devices.
        progress: As in `plan`.
        cache: As in `plan`.
        model: The model's name, for the record.
        optimizer: The optimizer's name, likewise.
    """
    found = _compile(make, chip, count, progress, cache)
    state, report, notes = found.step.state, found.report, found.notes
    if report is None:
        notes += ("No chip of its kind has the memory: only the sum is known.",)
        report = CompilerReport(temporary_bytes=_needed(found.refused))
    parts = {
        "parameter_bytes": bytes_here(state.params),
        "state_bytes": bytes_here(state.opt_state),
        "gradient_bytes": report.gradient_bytes,
        "activation_bytes": report.activation_bytes,
    }
    peak, limit = report.peak_bytes, memory_of(chip, count)
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
        compiler=chips.compiler(found.compiled_for),
        peak_bytes=peak,
        **parts,
        temporary_bytes=peak - sum(parts.values()),
        program_bytes=report.program_bytes,
        limit_bytes=limit,
        fits=fits,
        margin_bytes=margin,
        largest=report.largest,
        traffic_bytes=report.traffic_bytes,
        collectives=report.collectives,
        refresh_collectives=report.refresh_collectives,
        notes=notes,
        command="",
    )


class _Compiled(NamedTuple):
    """A step, and the words of a compiler on it.

    Attributes:
        step: The step.
        compiled_for: As in `Plan`.
        report: The compiler's report; None if it refuses the step.
        refused: The reason why the compiler of the chip that was asked about refuses the step.
        notes: As in `Plan`.
    """

    step: Compilable
    compiled_for: str
    report: CompilerReport | None
    refused: str
    notes: tuple[str, ...]


def _compile(make: Make, chip: str, count: int, progress: Progress, cache: bool) -> _Compiled:
    """Compiles a step for a chip, or in its place for the CPU or a roomier chip."""
    notes: tuple[str, ...] = ()
    compiled_for = chip
    try:
        chips.compiler(chip)
    except ModuleNotFoundError as error:
        notes += (f"{error} Compiled for this machine's CPU instead, which computes in float32.",)
        compiled_for = "cpu"
    attempt = functools.partial(_try, make, count=count, progress=progress, keep=cache)
    step, report, refused = attempt(compiled_for)
    if report is None:
        notes += (f"The compiler refuses the step for {chip}: {refused}.",)
        compiled_for = roomiest(chip)
        if compiled_for != chip:
            step, report, _ = attempt(compiled_for)
            if report:
                notes += (f"The figures are those of a step compiled for {compiled_for}.",)
    return _Compiled(step, compiled_for, report, refused, notes)


def _try(
    make: Make, chip: str, *, count: int, progress: Progress, keep: bool
) -> tuple[Compilable, CompilerReport | None, str]:
    """Compiles a step for a chip; in place of a report returns why the compiler refuses it."""
    progress(f"tracing the step for {count} × {chip}")
    with without_cudnn():
        step = make(chips.devices(chip, count), chip)
        lowered = step.lower()
    key = cache.key_of(lowered, chip) if keep else ""
    record = cache.load(key) if keep else None
    if record is None:
        progress(f"compiling for {count} × {chip} with {chips.compiler(chip)}")
        record = {"report": None, "refused": ""}
        try:
            record["report"] = dataclasses.asdict(compile_report(lowered, step.state.params))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            record["refused"] = str(error).splitlines()[0].rstrip(".")
        if keep:
            cache.save(key, record, _sources(record["report"]))
    report = record["report"] and CompilerReport.from_json(record["report"])
    return step, report, record["refused"]


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

    Those of "cpu" share this machine's memory; of a GPU's, JAX takes 95% at most.
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
