"""Whether a training step fits a chip, by the chip's own compiler; no chip is needed."""

import contextlib
import dataclasses
import functools
import math
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import optax
from jax.sharding import Mesh, NamedSharding

from memopt.errors import check_choice
from memopt.json_files import read_json
from memopt.models import hugging_face
from memopt.models.config import preset
from memopt.models.families import parse_config
from memopt.models.sharding import BATCH_AXES
from memopt.models.stacked import StackedModel
from memopt.optimizers import optimizer as named_optimizer
from memopt.planning import cache, chips
from memopt.planning.buffers import Buffer, absolute
from memopt.planning.compiler_report import CompilerReport, compile_report
from memopt.planning.step_memory import bytes_here
from memopt.state.quantized_state import quantize_state
from memopt.training.config import Config, read_options
from memopt.training.describe import describe_run
from memopt.training.directory import is_run
from memopt.training.placement import abstract_state, batch_sharding, make_mesh, parse_mesh
from memopt.training.release import release_step
from memopt.training.setup import store_params
from memopt.training.step import Loss, TrainState, train_step

Progress = Callable[[str], None]

#: Tokens of a row unless they are given, or the model accepts fewer.
SEQ_LEN = 2048

#: The share of a GPU's memory that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION is set; see
#: docs.jax.dev, "GPU memory allocation".
PREALLOCATED = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one training step needs of one device.

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
    optimizer: str | optax.GradientTransformation = "apollo_mini",
    chip: str = "v5e",
    mesh: str | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    release: bool = False,
    weights: str | None = None,
    state: str | None = None,
    dtype: str | None = None,
    remat: str | None = None,
    accumulation: int = 1,
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
            config is read, or with a run.
        optimizer: A name in `memopt.available()`, or any Optax transformation.
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
        accumulation: Micro-batches of a batch.
        params: The parameters of a model of your own, in place of `model`: a tree of
            `jax.ShapeDtypeStruct` or arrays. A leaf with a `NamedSharding` is split by the same
            axes of `mesh`; others are copied to every device.
        loss: Its loss, a function of (parameters, batch) that returns the summed loss and the
            number of tokens, or its `memopt.models.StackedModel`, which `release` needs.
        batch: A batch of it, likewise; first axes are split over `data` and `fsdp`.
        progress: Is given a line about what the compiler works on, which may take minutes.
        cache: Whether to keep what the compiler says on disk, and look there first; see
            `memopt.planning.cache`.
        **options: Any other option of `memopt pretrain`, such as ``num_layers=8`` or
            ``option=("rank=128",)``.

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
    count = math.prod(parse_mesh(mesh).values()) if mesh else 1
    own_name = optimizer if isinstance(optimizer, str) else "own"
    if params is not None:
        make: Make = _own_step(params, loss, batch, optimizer, given)
        return plan_step(make, chip, count, progress, cache, model="own", optimizer=own_name)
    tx = None if isinstance(optimizer, str) else optimizer

    def config(compiled_for: str) -> Config:
        instead = {"dtype": "float32"} if compiled_for == "cpu" != chip else {}
        name = optimizer if isinstance(optimizer, str) else None
        return run_config(str(model), name, given | instead, compiled_for)

    def describe(devices: Sequence[jax.Device], compiled_for: str) -> Compilable:
        return describe_run(config(compiled_for), devices=devices, tx=tx)

    found = plan_step(describe, chip, count, progress, cache, model=str(model), optimizer=own_name)
    notes = found.notes
    if found.compiled_for in chips.GPUS:
        notes += (
            "Attention works through the queries in chunks: a GPU that has cuDNN takes its flash "
            "attention instead, whose memory only cuDNN itself reports.",
        )
    command = run_command(config(found.compiled_for), str(model)) if tx is None else ""
    return dataclasses.replace(found, notes=notes, command=command)


def run_config(
    model: str, optimizer: str | None, given: Mapping[str, Any], compiled_for: str
) -> Config:
    """Returns the options of the run whose step is planned.

    Args:
        model: As in `plan`.
        optimizer: Its name; None if it has none.
        given: The other arguments of `plan`.
        compiled_for: The chip that it is compiled for.
    """
    named = Config().flat() | {"dtype": None}
    for name in given:
        check_choice("option", name, named)
    options = {name: x for name, x in given.items() if x is not None}
    for name, x in options.items():
        if isinstance(x, tuple):
            options[name] = list(x)
    dtype = options.pop("dtype", "float32" if compiled_for == "cpu" else "bfloat16")
    options = {"param_dtype": dtype, "compute_dtype": dtype} | options
    options.setdefault("remat", "none" if options.get("release") else "full")
    if optimizer is not None:
        options["optimizer"] = optimizer
    elif "option" in options:
        raise ValueError("option goes with the name of an optimizer.")
    options = _model_options(model) | options
    parts = parse_mesh(options["mesh"]) if "mesh" in options else {}
    shards = math.prod(parts.get(axis, 1) for axis in BATCH_AXES)
    options.setdefault("batch_size", shards * options.get("accumulation", 1))
    config = Config.from_flat(options)
    if "seq_len" not in options:
        longest = (config.architecture.shape or preset(config.architecture.model)).max_seq_len
        text = dataclasses.replace(config.text, seq_len=min(SEQ_LEN, longest))
        config = dataclasses.replace(config, text=text)
    return config


def _model_options(model: str) -> dict[str, Any]:
    """The options of a run that name a model and its shapes."""
    directory = Path(model)
    if not directory.is_dir() and len(directory.parts) == 1:
        return {"model": model}
    if is_run("model", directory):
        there = read_options(directory / "config.json")
        names = ("model", "shape", "vocab_size", "num_layers")
        return {name: there[name] for name in names if name in there}
    if any(directory.glob("*.safetensors")):
        shape = hugging_face.read_config(directory)
    else:
        path = directory / "config.json"
        shape = parse_config(path, read_json(path))
    return {"model": directory.resolve().name, "shape": dataclasses.asdict(shape)}


def run_command(config: Config, model: str) -> str:
    """Returns the command line that runs the step of these options, without where its data is."""
    defaults, words = Config().flat(), ["memopt", "pretrain"]
    from_directory = config.architecture.shape or model != config.architecture.model
    words += ["--init" if from_directory else "--model", model]
    words += ["--optimizer", config.optimization.optimizer]
    said = ("model", "optimizer", "shape", "phases", "learning_rate")
    for name, value in config.flat().items():
        if name in said or value == defaults[name]:
            continue
        flag = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            words += [flag] if one is True else [flag, str(one)]
    return shlex.join(words)


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
    notes = []
    compiled_for = chip
    try:
        chips.compiler(chip)
    except ModuleNotFoundError as error:
        notes.append(f"{error} Compiled for this machine's CPU instead, which computes in float32.")
        compiled_for = "cpu"
    attempt = functools.partial(_try, make, count=count, progress=progress, keep=cache)
    step, report, refused = attempt(compiled_for)
    if report is None:
        compiled_for = roomiest(chip)
        notes.append(f"The compiler refuses the step for {chip}: {refused}.")
        if compiled_for != chip:
            step, report, _ = attempt(compiled_for)
            if report:
                notes.append(f"The figures are those of a step compiled for {compiled_for}.")
    state = step.state
    own = {"parameter_bytes": bytes_here(state.params), "state_bytes": bytes_here(state.opt_state)}
    if report:
        peak = report.peak_bytes
        parts = own | {
            "gradient_bytes": report.gradient_bytes,
            "activation_bytes": report.activation_bytes,
        }
    else:
        notes.append("No chip of its kind has the memory: only the sum is known.")
        peak, parts = (
            _needed(refused),
            own | dict.fromkeys(("gradient_bytes", "activation_bytes"), 0),
        )
    limit = memory_of(chip)
    program = report.program_bytes if report else 0
    fits = not refused and peak + program <= limit
    if fits and chip in chips.GPUS and peak > PREALLOCATED * limit:
        notes.append("JAX takes 75% of a GPU: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 to run it.")
    return Plan(
        model=model,
        optimizer=optimizer,
        chip=chip,
        devices=count,
        compiled_for=compiled_for,
        compiler=chips.compiler(compiled_for),
        peak_bytes=peak,
        **parts,
        temporary_bytes=peak - sum(parts.values()),
        program_bytes=program,
        limit_bytes=limit,
        fits=fits,
        margin_bytes=limit - peak - program,
        largest=report.largest if report else (),
        traffic_bytes=report.traffic_bytes if report else None,
        collectives=report.collectives if report else None,
        refresh_collectives=report.refresh_collectives if report else None,
        notes=tuple(notes),
        command="",
    )


def _try(
    make: Make, chip: str, *, count: int, progress: Progress, keep: bool
) -> tuple[Compilable, CompilerReport | None, str]:
    """Compiles a step for a chip; in place of a report returns why the compiler refuses it."""
    if chip == "cpu" and count > 1:
        with contextlib.suppress(RuntimeError):  # JAX has started: with enough devices, or not
            jax.config.update("jax_num_cpu_devices", count)
    progress(f"tracing the step for {count} × {chip}")
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


def memory_of(chip: str) -> int:
    """The bytes of memory that programs may use on a device; of "cpu", this machine's."""
    if chip == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return chips.CHIPS[chip].memory


def _needed(refused: str) -> int:
    """The bytes that a compiler says a step needs, when it refuses it."""
    found = re.search(r"\((\d+(?:\.\d+)?)([KMGT])\) exceeds", refused)
    if not found:
        raise ValueError(f"the compiler refuses the step and does not say what it needs: {refused}")
    return int(float(found[1]) * 2 ** (10 * ("KMGT".index(found[2]) + 1)))


@dataclasses.dataclass(frozen=True, eq=False)
class OwnStep:
    """The step of a model that is no LLaMA, on abstract arrays.

    Attributes:
        step: A function of (state, batch).
        state: The shapes, dtypes and shardings of the state.
        batch: Those of a batch.
        mesh: The devices.
    """

    step: Callable[..., Any]
    state: TrainState
    batch: Any
    mesh: Mesh

    def lower(self) -> jax.stages.Lowered:
        """Lowers the step, jitted with the state donated, for the devices of the mesh."""
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        jitted = jax.jit(self.step, donate_argnums=0, out_shardings=(shardings, None))
        with jax.set_mesh(self.mesh):
            return jitted.lower(self.state, self.batch)


def _own_step(
    params: Any,
    loss: Loss | StackedModel | None,
    batch: Any,
    optimizer: str | optax.GradientTransformation,
    given: dict[str, Any],
) -> Make:
    """The step of a user's own model; see `plan` for the arguments."""
    if loss is None or batch is None:
        raise ValueError("params goes with loss and batch, those of the same model.")
    taken = ("mesh", "release", "weights", "state", "accumulation", "remat")
    for name, value in given.items():
        if name not in taken and value is not None:
            raise ValueError(f"{name} must be left out with params: the model itself decides it.")
    stacked = loss if isinstance(loss, StackedModel) else None
    if given["release"] and not stacked:
        raise ValueError("release needs a memopt.models.StackedModel as loss, got a function.")
    remat = given["remat"] or ("none" if given["release"] or not stacked else "full")
    if remat != "none" and (not stacked or given["release"] or remat != "full"):
        raise ValueError(
            f"remat={remat!r} must be left out: only a StackedModel's ordinary step takes 'full'."
        )
    rate = optax.constant_schedule(1e-3)
    tx = named_optimizer(optimizer, rate) if isinstance(optimizer, str) else optimizer
    tx = quantize_state(tx, given["state"]) if given["state"] else tx
    options: Any = {"tx": tx, "learning_rate": rate, "accumulation": given["accumulation"]}

    def make(devices: Sequence[jax.Device], _: str) -> OwnStep:
        rows = max((x.shape[0] for x in jax.tree.leaves(batch) if x.shape), default=1)
        mesh = make_mesh(given["mesh"], rows // given["accumulation"], devices)

        def on_mesh(x: Any) -> jax.ShapeDtypeStruct:
            here = getattr(x, "sharding", None)
            spec = here.spec if isinstance(here, NamedSharding) else jax.P()
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

        def rows_on_mesh(x: Any) -> jax.ShapeDtypeStruct:
            place = batch_sharding(mesh) if x.shape else NamedSharding(mesh, jax.P())
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

        placed = store_params(jax.tree.map(on_mesh, params), given["weights"])
        state = abstract_state(placed, tx, mesh)
        if given["release"]:
            shardings = jax.tree.map(lambda x: x.sharding, placed)
            released: Any = stacked
            step: Any = functools.partial(
                release_step, model=released, shardings=shardings, **options
            )
        else:
            function: Any = loss
            if stacked:
                function = functools.partial(stacked.loss, remat=remat == "full")
            step = functools.partial(train_step, loss=function, **options)
        return OwnStep(step, state, jax.tree.map(rows_on_mesh, batch), mesh)

    return make
