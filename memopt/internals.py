"""Wrappers of all non-public API of JAX and Grain that memopt uses.

A new release may change any of it; `tests/test_internals.py` shows what has changed.
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
    """Traces a function on arrays or their shapes.

    Args:
        f: any function that JAX can trace; arrays that it closes over become constants.
        *args: trees of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
        A program with flat inputs and outputs, in the order of `jax.tree.leaves`.

    Example:
        >>> program = trace(lambda x, y: (2 * x, x + y), 1.0, 2.0)
        >>> double = program.needed([0])
        >>> double.reads, double(3.0, None)[0].item()
        ([True, False], 6.0)
    """
    return _program(jax.make_jaxpr(f)(*args))


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function with flat inputs and outputs.

    Attributes:
        inputs: the input variables.
        outputs: the output variables, with None for a literal.
    """

    inputs: Sequence[Any]
    outputs: Sequence[Any]
    _jaxpr: Any
    _consts: Sequence[Any]

    def needed(self, outputs: Iterable[int] | None = None) -> Part:
        """Returns the part of the program that computes some outputs, also inside control flow.

        No release of JAX has a public function for this dead-code elimination.

        Args:
            outputs: the indices of the outputs, in ascending order; by default all.

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

    def from_outputs(self, known: Iterable[int]) -> Program:
        """Returns the program that is also given some of its outputs, after its inputs.

        Outputs that are computed from them then depend on these new inputs instead.

        Args:
            known: the indices of the outputs.

        Example:
            >>> program = trace(lambda x: ((y := 2 * x), y + 1), 1.0).from_outputs([0])
            >>> part = program.needed([1])
            >>> part.reads, part(None, 5.0)[0].item()
            ([False, True], 6.0)
        """
        from jax.extend.core import Literal, Var  # imported here because it imports Pallas

        own, inputs = set(self._jaxpr.invars), []
        for v in (self._jaxpr.outvars[i] for i in known):
            # One input each, though it may be a constant, an input, or the same as another.
            is_computed = not isinstance(v, Literal) and v not in own
            inputs.append(v if is_computed else Var(v.aval))
            own.add(inputs[-1])
        unused = lambda v: Var(v.aval) if v in own else v
        equations = [
            eqn.replace(outvars=list(map(unused, eqn.outvars))) for eqn in self._jaxpr.eqns
        ]
        inputs = [*self._jaxpr.invars, *inputs]
        jaxpr = self._jaxpr.replace(invars=inputs, eqns=equations)
        return dataclasses.replace(self, inputs=inputs, _jaxpr=jaxpr)

    def equations(self) -> Iterator[Equation]:
        """Yields the operations of the program in order."""
        for eqn in self._jaxpr.eqns:
            inputs = [_variable(v) for v in eqn.invars]
            yield Equation(eqn.primitive.name, inputs, eqn.outvars, _inner(eqn))


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a program that computes some of its outputs.

    Attributes:
        reads: for each input of the program, whether this part reads it.
    """

    reads: Sequence[bool]
    _jaxpr: Any
    _consts: Sequence[Any]

    def __call__(self, *inputs: Any) -> list[Any]:
        """Computes the outputs from all inputs of the program; unread ones may be None."""
        # JAX's own jaxpr_as_fun disables the check for NaNs too.
        with jax.debug_nans(False):
            return jax.core.eval_jaxpr(self._jaxpr, self._consts, *_where(inputs, self.reads))


class Equation(NamedTuple):
    """One operation of a program.

    Attributes:
        name: the name of the primitive, such as ``"add"``.
        inputs: the input variables, with None for a literal.
        outputs: the output variables; each has an `aval` with a shape.
        inner: the programs that the operation runs.
    """

    name: str
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    inner: Cond | Scan | While | Call | None


class Cond(NamedTuple):
    """Runs one of several programs on all inputs but the first, which is the branch's index."""

    branches: Sequence[Program]


class Scan(NamedTuple):
    """Runs a program in a loop over slices.

    Its inputs are constants, carry and slices, in this order; its outputs are carry and slices.
    """

    body: Program
    constants: int
    carried: int


class While(NamedTuple):
    """Runs a test and a body in a loop.

    The inputs are the constants of the test, the constants of the body, and the carry.
    """

    test: Program
    body: Program
    test_constants: int
    body_constants: int


class Call(NamedTuple):
    """Runs a program once on all inputs, as in `jax.jit`, `jax.checkpoint` or `jax.custom_vjp`.

    Attributes:
        body: the program.
        function: the name of a jitted function, otherwise "".
    """

    body: Program
    function: str


def _inner(eqn: Any) -> Cond | Scan | While | Call | None:
    """The programs that an equation runs; the names of its parameters are not public."""
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
    # The programs of kernels and reductions have other inputs than their operation.
    shapes = lambda inputs: [getattr(v.aval, "shape", None) for v in inputs]
    if shapes(eqn.invars) != shapes(body.inputs):
        return None
    return Call(body, params.get("name", ""))


def _program(traced: Any) -> Program:
    """Wraps a ClosedJaxpr or, since jax 0.11, a Jaxpr with constants."""
    jaxpr = getattr(traced, "jaxpr", traced)
    consts = getattr(traced, "consts", ())
    return Program(jaxpr.invars, [_variable(v) for v in jaxpr.outvars], jaxpr, consts)


def _variable(v: Any) -> Any:
    from jax.extend.core import Literal  # imported here because it imports Pallas

    return None if isinstance(v, Literal) else v


def _where(items: Sequence[Any], chosen: Sequence[bool]) -> list[Any]:
    return [item for item, keep in zip(items, chosen, strict=True) if keep]


def clusters() -> tuple[Any, ...]:
    """The clusters in which `jax.distributed.initialize` finds other processes automatically.

    JAX has no public way to query them without initialising. Kubernetes is excluded, because JAX
    would need permissions there.

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
    """Shuffles a dataset within windows, by `grain.experimental.WindowShuffleIterDataset`.

    Example:
        >>> import grain
        >>> numbers = grain.MapDataset.range(4).to_iter_dataset()
        >>> sorted(shuffled(numbers, window=4, seed=0))
        [0, 1, 2, 3]
    """
    import grain

    return grain.experimental.WindowShuffleIterDataset(dataset, window_size=window, seed=seed)


def prefetched(dataset: grain.IterDataset, count: int) -> grain.IterDataset:
    """Prefetches elements in a thread, by `grain.experimental.ThreadPrefetchIterDataset`.

    Example:
        >>> import grain
        >>> list(prefetched(grain.MapDataset.range(3).to_iter_dataset(), 2))
        [0, 1, 2]
    """
    import grain

    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=count)


def limited(dataset: grain.IterDataset, count: int) -> grain.IterDataset:
    """Limits a dataset to its first elements, by `grain.experimental.LimitIterDataset`.

    Example:
        >>> import grain
        >>> list(limited(grain.MapDataset.range(9).to_iter_dataset(), 2))
        [0, 1]
    """
    import grain

    return grain.experimental.LimitIterDataset(dataset, count)


def is_traced(x: Any) -> bool:
    """Whether an array stands for one in a function that is being traced.

    Example:
        >>> is_traced(jax.numpy.ones(2)), bool(jax.jit(lambda x: is_traced(x))(1.0))
        (False, True)
    """
    return isinstance(x, jax.core.Tracer)
