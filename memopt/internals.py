"""Non-public API of JAX and Grain, used from this file alone.

A new release may change any of it; `tests/test_internals.py` then says what.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax.interpreters import partial_eval

if TYPE_CHECKING:
    import grain


def trace(f: Callable[..., Any], *args: Any) -> Program:
    """The program of a function, as JAX traces it on arrays or their shapes.

    Args:
      f: any function that JAX can trace; arrays that it closes over are constants of the program.
      *args: trees of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
      A program of flat inputs and outputs, in the order of `jax.tree.leaves`.

    Example:
      >>> program = trace(lambda x, y: (2 * x, x + y), 1.0, 2.0)
      >>> double = program.needed([0])
      >>> double.reads, double(3.0, None)[0].item()
      ([True, False], 6.0)
    """
    return _program(jax.make_jaxpr(f)(*args))


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function of flat inputs and outputs.

    Attributes:
      inputs: its variables.
      outputs: the variables that it returns, None for a number written into the program.
    """

    inputs: Sequence[Any]
    outputs: Sequence[Any]
    _jaxpr: Any
    _consts: Sequence[Any]

    def needed(self, outputs: Iterable[int] | None = None) -> Part:
        """Returns the part of the program that computes some outputs, in scans and branches too.

        Cutting a jaxpr is public API in no release.

        Args:
          outputs: their numbers, in ascending order; all, if not given.

        Example:
          >>> trace(lambda x, y: x, 1.0, 2.0).needed().reads
          [True, False]
        """
        every = range(len(self.outputs))
        wanted = set(every if outputs is None else outputs)
        jaxpr, kept, reads = partial_eval.dce_jaxpr_consts(
            self._jaxpr, [i in wanted for i in every]
        )
        return Part(reads, jaxpr, _where(self._consts, kept))

    def equations(self) -> Iterator[Equation]:
        """The operations of the program, in their order."""
        for eqn in self._jaxpr.eqns:
            inputs = [_variable(v) for v in eqn.invars]
            yield Equation(eqn.primitive.name, inputs, eqn.outvars, _inner(eqn))


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a program that computes some of its outputs.

    Attributes:
      reads: which of the program's inputs it reads.
    """

    reads: Sequence[bool]
    _jaxpr: Any
    _consts: Sequence[Any]

    def __call__(self, *inputs: Any) -> list[Any]:
        """Computes the outputs from all inputs of the program; one that is not read may be None."""
        # JAX's own jaxpr_as_fun disables the check for NaNs, too.
        with jax.debug_nans(False):
            return jax.core.eval_jaxpr(self._jaxpr, self._consts, *_where(inputs, self.reads))


class Equation(NamedTuple):
    """One operation of a program.

    Attributes:
      name: of the primitive, such as ``"add"``.
      inputs: variables, None for a number written into the program.
      outputs: variables; each has an `aval` with a shape.
      inner: the programs that it runs.
    """

    name: str
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    inner: Cond | Scan | While | Call | None


class Cond(NamedTuple):
    """One of several programs, by a number that is the first input; they take the rest."""

    branches: Sequence[Program]


class Scan(NamedTuple):
    """A program run for each slice: of constants, what is carried and slices, in this order.

    It returns what is carried and slices.
    """

    body: Program
    constants: int
    carried: int


class While(NamedTuple):
    """Two programs: of each its constants are inputs, the test's first, then what is carried."""

    test: Program
    body: Program
    test_constants: int
    body_constants: int


class Call(NamedTuple):
    """A program run once on all inputs: a function compiled, rematerialised, or with a rule."""

    body: Program


def _inner(eqn: Any) -> Cond | Scan | While | Call | None:
    """The programs that an equation runs. The names of its parameters are not public."""
    params = eqn.params
    match eqn.primitive.name:
        case "cond":
            return Cond([_program(branch) for branch in params["branches"]])
        case "scan" if "ft_in" in params:  # since jax 0.11: trees of constants, carried, slices
            constants, carried, _ = (len(tree) for tree in params["ft_in"].unpack())
            return Scan(_program(params["jaxpr"]), constants, carried)
        case "scan":
            return Scan(_program(params["jaxpr"]), params["num_consts"], params["num_carry"])
        case "while":
            test, body = _program(params["cond_jaxpr"]), _program(params["body_jaxpr"])
            return While(test, body, params["cond_nconsts"], params["body_nconsts"])
    called = params.get("jaxpr", params.get("call_jaxpr"))
    if called is None:
        return None
    body = _program(called)
    # A kernel's program, and a reduction's, are of other arrays than the operation's.
    shapes = lambda inputs: [getattr(v.aval, "shape", None) for v in inputs]
    return Call(body) if shapes(eqn.invars) == shapes(body.inputs) else None


def _program(traced: Any) -> Program:
    """Wraps a ClosedJaxpr, or what replaces it since jax 0.11: a Jaxpr with constants."""
    jaxpr = getattr(traced, "jaxpr", traced)
    consts = getattr(traced, "consts", ())
    return Program(jaxpr.invars, [_variable(v) for v in jaxpr.outvars], jaxpr, consts)


def _variable(v: Any) -> Any:
    from jax.extend.core import Literal  # late: it imports Pallas

    return None if isinstance(v, Literal) else v


def _where(items: Sequence[Any], chosen: Sequence[bool]) -> list[Any]:
    return [item for item, keep in zip(items, chosen, strict=True) if keep]


def clusters() -> tuple[Any, ...]:
    """The clusters in which `jax.distributed.initialize` finds other processes by itself.

    JAX has no public way to query them without initialising. Kubernetes is left out, where JAX
    would ask for permissions.

    Returns:
      Classes with `name`, `is_env_present()`, `get_process_count()` and `get_process_id()`.

    Example:
      >>> [cluster.name for cluster in clusters()]
      ['ompi', 'slurm', 'gketpu', 'gcetpu']
    """
    from jax._src import clusters

    return (
        clusters.OmpiCluster,
        clusters.SlurmCluster,
        clusters.GkeTpuCluster,
        clusters.GceTpuCluster,
    )


def shuffled(dataset: grain.IterDataset, window: int, seed: int) -> grain.IterDataset:
    """A dataset mixed within windows; of streams Grain has it in `grain.experimental` only.

    Example:
      >>> import grain
      >>> numbers = grain.MapDataset.range(4).to_iter_dataset()
      >>> sorted(shuffled(numbers, window=4, seed=0))
      [0, 1, 2, 3]
    """
    import grain

    return grain.experimental.WindowShuffleIterDataset(dataset, window_size=window, seed=seed)


def prefetched(dataset: grain.IterDataset, count: int) -> grain.IterDataset:
    """A dataset whose next elements a thread prepares: `grain.experimental.ThreadPrefetch…`.

    Example:
      >>> import grain
      >>> list(prefetched(grain.MapDataset.range(3).to_iter_dataset(), 2))
      [0, 1, 2]
    """
    import grain

    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=count)


def limited(dataset: grain.IterDataset, count: int) -> grain.IterDataset:
    """The first elements of a dataset: `grain.experimental.LimitIterDataset`.

    Example:
      >>> import grain
      >>> list(limited(grain.MapDataset.range(9).to_iter_dataset(), 2))
      [0, 1]
    """
    import grain

    return grain.experimental.LimitIterDataset(dataset, count)


def packed(dataset: grain.IterDataset, lengths: dict[str, int]) -> grain.IterDataset:
    """Rows of given lengths, elements cut where a row ends: `grain.experimental.ConcatThenSplit…`.

    Args:
      dataset: of dicts of vectors.
      lengths: of each entry of a row.

    Example:
      >>> import grain, numpy as np
      >>> pieces = grain.MapDataset.source([{"x": np.arange(3)}, {"x": np.arange(5)}])
      >>> [row["x"].tolist() for row in packed(pieces.to_iter_dataset(), {"x": 4})]
      [[0, 1, 2, 0], [1, 2, 3, 4]]
    """
    import grain

    return grain.experimental.ConcatThenSplitIterDataset(dataset, length_struct=lengths)
