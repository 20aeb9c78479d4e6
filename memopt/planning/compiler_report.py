"""Compiles a step, and reads its compiler's records of memory, traffic and collectives."""

import collections
import contextlib
import dataclasses
import functools
import math
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from memopt.models.stacked import BLOCKS
from memopt.planning import hlo
from memopt.planning.buffers import Assignment, Buffer, read_files
from memopt.planning.step_memory import peak_bytes
from memopt.state.quantized_params import is_quantized
from memopt.training.step import UPDATE, WEIGHTS

#: The name of the operation with which `jax.lax.scan` reads a layer of a stack.
LAYER = "jit(dynamic_index_in_dim)"

#: How many of the largest temporary arrays are reported.
LARGEST = 5

#: How many moments of a program are reported.
MOMENTS = 200


class Moment(NamedTuple):
    """Bytes of the temporary arrays that a program holds at a moment.

    Attributes:
        gradient_bytes: Gradients, see `kind_of`.
        activation_bytes: Other arrays of the forward and backward pass.
        temporary_bytes: The rest.
    """

    gradient_bytes: int
    activation_bytes: int
    temporary_bytes: int

    @classmethod
    def of(cls, buffers: Iterable[Buffer], kind: Callable[[Buffer], str]) -> "Moment":
        """Adds up the bytes of arrays by their kind, "gradient", "activation" or "temporary"."""
        sums: dict[str, int] = collections.Counter()
        for buffer in buffers:
            sums[kind(buffer)] += buffer.bytes
        return cls(sums["gradient"], sums["activation"], sums["temporary"])


@dataclasses.dataclass(frozen=True)
class CompilerReport:
    """A compiler's figures of a step, for one device; JSON-serialisable by `dataclasses.asdict`.

    Attributes:
        peak_bytes: The most that is held at any moment, see `memopt.planning.step_memory`.
        program_bytes: The program itself, where it is in the device's memory.
        gradient_bytes: Gradients among the temporaries at the peak, see `kind_of`.
        activation_bytes: Other arrays of the forward and backward pass among them.
        over_time: What is held at moments of the program, in their order; see `Moment`.
        largest: The largest temporaries at the peak; none if the compiler wrote no record of them.
        traffic_bytes: Bytes that the program reads and writes in memory, by the compiler's cost
            analysis; None where it has none, as for GPUs.
        collectives: {kind: {"bytes": bytes moved, "count": number of runs}} of a step between two
            refreshes of a subspace; None if a loop does not tell how often it turns.
        refresh_collectives: Those of a step that refreshes.
    """

    peak_bytes: int
    program_bytes: int = 0
    gradient_bytes: int = 0
    activation_bytes: int = 0
    over_time: tuple[Moment, ...] = ()
    largest: tuple[Buffer, ...] = ()
    traffic_bytes: int | None = None
    collectives: dict[str, dict[str, int]] | None = None
    refresh_collectives: dict[str, dict[str, int]] | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "CompilerReport":
        """Inverts `dataclasses.asdict`, also of values that went through JSON."""
        largest = tuple(Buffer(**one) for one in values["largest"])
        over_time = tuple(Moment(*one) for one in values["over_time"])
        return cls(**values | {"largest": largest, "over_time": over_time})


def compile_report(lowered: jax.stages.Lowered, params: Any) -> CompilerReport:
    """Compiles a lowered training step and reads the compiler's records.

    Args:
        lowered: The step; its devices decide the compiler.
        params: The parameters, with shardings; their shapes tell gradients from activations.

    Raises:
        jax.errors.JaxRuntimeError: The step does not fit the device ("RESOURCE_EXHAUSTED").
    """
    with tempfile.TemporaryDirectory() as directory, _without_cache():
        options: dict[str, Any] = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        device, *_ = jax.tree.leaves(params)[0].sharding.device_set
        if device.platform == "cpu":
            # Machine code is made after arrays have got their places, and is not run.
            options["xla_backend_optimization_level"] = 0
        compiled = lowered.compile(options)
        files = read_files(Path(directory))
    memory, peak = compiled.memory_analysis(), peak_bytes(compiled)
    if memory is None or peak is None:
        raise RuntimeError("the compiler reports no memory.")
    largest: list[Buffer] = []
    over_time: list[list[Buffer]] = []
    if files:
        assignment = Assignment(files)
        largest, over_time = assignment.at_peak(), assignment.over_time(MOMENTS)
    shapes = parameter_shapes(params)
    kind = functools.cache(lambda buffer: kind_of(buffer, shapes))
    at_peak = Moment.of(largest, kind)
    traffic = (compiled.cost_analysis() or {}).get("bytes accessed")
    text = files.text if files else hlo.text(compiled)
    return CompilerReport(
        peak_bytes=peak,
        program_bytes=memory.generated_code_size_in_bytes,
        gradient_bytes=at_peak.gradient_bytes,
        activation_bytes=at_peak.activation_bytes,
        over_time=tuple(Moment.of(buffers, kind) for buffers in over_time),
        largest=tuple(largest[:LARGEST]),
        traffic_bytes=None if traffic is None else int(traffic),
        collectives=_collectives(text, refresh=False),
        refresh_collectives=_collectives(text, refresh=True),
    )


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Compiles anew: a program from JAX's persistent cache comes without records."""
    config: Any = jax.config  # whose types leave this option out
    before = config.jax_enable_compilation_cache
    try:
        config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # or JAX goes by what it found at its first compilation
        yield
    finally:
        config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def parameter_shapes(params: Any) -> set[tuple[int, ...]]:
    """The shapes of parameters, whole and on a device, and those of a layer of them, simplified."""
    found: set[tuple[int, ...]] = set()
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    for path, leaf in leaves:
        stored = leaf.codes if is_quantized(leaf) else leaf
        stacked = getattr(path[0], "key", None) == BLOCKS if path else False
        # A gradient is whole until it is summed over the devices and split.
        for shape in (leaf.shape, stored.sharding.shard_shape(leaf.shape)):
            found |= {simplified(shape)} | ({simplified(shape[1:])} if stacked else set())
    return found


def simplified(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape in any order of its axes, without those of length 1."""
    return tuple(sorted(n for n in shape if n != 1))


def kind_of(one: Buffer, shapes: Collection[tuple[int, ...]]) -> str:
    """Returns "gradient", "activation" or "temporary" for a temporary array of a training step.

    An array that the update makes is temporary, and so are weights as the model reads them. Any
    other array is a gradient if it has the shape of a parameter, or else an activation.

    Args:
        one: The array.
        shapes: `parameter_shapes` of the parameters.

    Example:
        >>> kind = lambda shape, op: kind_of(Buffer(2048, shape, op, ""), {(32, 32)})
        >>> kind("bf16[1,32,32]", "transpose(jvp())/while/body/dot_general")
        'gradient'
        >>> kind("bf16[1,32,64]", "jvp()/while/body/dot_general")
        'activation'
        >>> kind("bf16[1,32,32]", "update/mul")
        'temporary'
    """
    found = re.fullmatch(r"\w+\[([\d,]*)\]", one.shape)
    dims = [int(n) for n in found[1].split(",") if n] if found else []
    is_own = one.op.startswith(("compiler: ", "copy of "))
    if is_own or {UPDATE, WEIGHTS, LAYER} & set(one.op.split("/")):
        return "temporary"
    if math.prod(dims) == 1 or simplified(dims) not in shapes:
        return "activation"
    is_forward = "jvp(" in one.op and "transpose(" not in one.op
    return "temporary" if is_forward else "gradient"


def _collectives(text: str, *, refresh: bool) -> dict[str, dict[str, int]] | None:
    try:
        return hlo.by_kind(hlo.collectives(text, refresh=refresh)) if text else None
    except ValueError:  # a loop does not say how often it turns
        return None
