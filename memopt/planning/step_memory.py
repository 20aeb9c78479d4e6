"""The memory of one training step, as the compiler reports it."""

import dataclasses
import math
from typing import Any

import jax

from memopt.state.codecs import bits_of


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes on one device.

    Attributes:
        parameters: The parameters.
        state: The optimizer's state.
        peak: The most that is held at any moment of a step; None where the compiler does not say.
    """

    parameters: int
    state: int
    peak: int | None


def step_memory(compiled: jax.stages.Compiled, params: Any, opt_state: Any) -> StepMemory:
    """Returns what a compiled step needs.

    Args:
        compiled: The step.
        params: Its parameters, with shardings; arrays or `ShapeDtypeStruct`s.
        opt_state: Its optimizer state, likewise.

    Returns:
        Bytes on one device.
    """
    return StepMemory(bytes_here(params), bytes_here(opt_state), peak_bytes(compiled))


def peak_bytes(compiled: jax.stages.Compiled) -> int | None:
    """The most that is held on a device while a program runs; None if the compiler does not say.

    It is arguments, results and temporaries, less what is donated.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    taken = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return taken - memory.alias_size_in_bytes


def bytes_here(tree: Any) -> int:
    """Bytes of a tree's arrays, or of `ShapeDtypeStruct`s with shardings, on one device."""
    leaves = jax.tree.leaves(tree)
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape))
    return sum(-(-size(x) * bits_of(x.dtype) // 8) for x in leaves)
