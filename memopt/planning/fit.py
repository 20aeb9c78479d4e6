"""Searches for the largest batch, the smallest mesh and the optimizers that fit a chip.

Each plan is a compilation, of seconds to minutes. Compilers' answers are cached: a search that was
stopped continues where it was when it is called again.
"""

import functools
import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, Generic, NamedTuple, TypeVar

import jax

from memopt.errors import check_at_least
from memopt.models.sharding import BATCH_AXES
from memopt.optimizers.registry import available
from memopt.planning.plan import Plan, first_line, plan
from memopt.planning.run_options import inherited
from memopt.training.placement import parse_mesh

PlanStep = Callable[..., Plan]
Report = Callable[[Plan], object]

#: `memopt.plan`, which compiles only what may fit, and answers from the cache if it can.
cached_plan: PlanStep = functools.partial(plan, cache=True, skip_misfits=True)

T = TypeVar("T")


class Edge(NamedTuple, Generic[T]):
    """The two neighbours between which a search found that a step ceases to fit.

    That all smaller batches, or larger meshes, fit as well is assumed, not checked: only the plans
    in `planned` were made.

    Attributes:
        fits: The largest batch or the smallest mesh that fits; None if none does.
        exceeds: The next one, which does not fit; None if none is left to try.
        planned: The plans that were made, by batch size or mesh, in the order they were made.
        failed: The compiler's error for each that it failed on. They count as not fitting.
    """

    fits: T | None
    exceeds: T | None
    planned: Mapping[T, Plan]
    failed: Mapping[T, str]


class _Search(Generic[T]):
    """The plans of a search, as they are made.

    Attributes:
        planned: As in `Edge`.
        failed: As in `Edge`.
    """

    def __init__(self, plan: PlanStep, report: Report):
        self.planned: dict[T, Plan] = {}
        self.failed: dict[T, str] = {}
        self._plan, self._report = plan, report

    def fits(self, name: T, **options: Any) -> bool:
        """Whether the step of these options fits."""
        try:
            found = self._plan(**options)
        except jax.errors.JaxRuntimeError as error:
            self.failed[name] = first_line(error)
            return False
        self.planned[name] = found
        self._report(found)
        return found.fits

    def edge(self, fits: T | None, exceeds: T | None) -> Edge[T]:
        """The result."""
        return Edge(fits, exceeds, self.planned, self.failed)


class Row(NamedTuple):
    """One configuration of `fit_optimizer`.

    Attributes:
        options: The optimizer, how state and weights are stored, and whether it is released.
        plan: Its plan; None if it cannot be planned.
        refused: The reason why it cannot be planned.
    """

    options: Mapping[str, Any]
    plan: Plan | None
    refused: str = ""


def fit_batch_size(
    *,
    plan: PlanStep = cached_plan,
    mesh: str | None = None,
    accumulation: int | None = None,
    most: int = 2**16,
    report: Report = lambda plan: None,
    **options: Any,
) -> Edge[int]:
    """Finds the largest batch whose step fits, by bisection.

    The next batch to try is where a line through the peaks of two others reaches the limit; every
    fourth one halves the range.

    Args:
        plan: A function like `memopt.plan`, which it is by default, with its cache; for a model of
            your own, `memopt.plan_step` with it, by `functools.partial`.
        mesh: The mesh. Batches are multiples of the parts that it splits them into.
        accumulation: Micro-batches of a batch; batches are multiples of it, too.
        most: The largest batch to try.
        report: Called with each plan.
        **options: The other arguments of `plan`.

    Returns:
        Batch sizes that do and do not fit, a multiple apart.

    Raises:
        ValueError: If `most` is less than the smallest batch.

    Example:
        >>> from types import SimpleNamespace
        >>> def plan(*, batch_size, **options):  # 3 GB and 2 GB a row, of 16 GB
        ...     margin = 16 - 3 - 2 * batch_size
        ...     return SimpleNamespace(margin_bytes=margin, fits=margin >= 0)
        >>> edge = fit_batch_size(plan=plan)
        >>> edge.fits, edge.exceeds, list(edge.planned)
        (6, 7, [1, 2, 6, 7])

    """
    there = _inherited(options)
    here = mesh or there.get("mesh")
    sizes = parse_mesh(here) if here else {}
    multiple = (accumulation or there.get("accumulation", 1)) * math.prod(
        sizes.get(axis, 1) for axis in BATCH_AXES
    )
    check_at_least("most", most, multiple)
    search = _Search[int](plan, report)

    def fits(n: int) -> bool:
        size = n * multiple
        return search.fits(size, batch_size=size, mesh=mesh, accumulation=accumulation, **options)

    def guess() -> int | None:
        margins = [(size, found.margin_bytes) for size, found in search.planned.items()]
        if len(margins) < 2 or search.failed:
            return None
        (a, more), (b, less) = sorted(sorted(margins, key=lambda one: abs(one[1]))[:2])
        return int((a + more * (b - a) / (more - less)) / multiple) if more > less else None

    found = _boundary(fits, guess, most // multiple) * multiple
    return search.edge(found or None, found + multiple if found + multiple <= most else None)


def fit_mesh(
    *,
    plan: PlanStep = cached_plan,
    batch_size: int,
    mesh: str | None = None,
    accumulation: int | None = None,
    report: Report = lambda plan: None,
    **options: Any,
) -> Edge[str]:
    """Finds the smallest power of two of chips over which a step, sharded by FSDP, fits.

    After a mesh whose peak is k limits, one of k times as many chips is tried.

    Args:
        plan: A function like `memopt.plan`, which it is by default, with its cache; for a model of
            your own, `memopt.plan_step` with it, by `functools.partial`.
        batch_size: Rows of a batch, over all chips. The mesh must divide them.
        mesh: Other axes of the mesh, such as "tensor=2".
        accumulation: Micro-batches of a batch.
        report: Called with each plan.
        **options: The other arguments of `plan`.

    Returns:
        Meshes that do and do not fit, of which one is twice the other.

    Raises:
        ValueError: If `mesh` has an axis `fsdp`, or does not divide a micro-batch.
    """
    others = parse_mesh(mesh) if mesh else {}
    if "fsdp" in others:
        raise ValueError(f"mesh {mesh!r} must leave out fsdp, whose size is searched for.")
    there = _inherited(options)
    parts = (accumulation or there.get("accumulation", 1)) * others.get("data", 1)
    if batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of {parts} (accumulation × the axis data), got "
            f"{batch_size}."
        )
    rows = batch_size // parts
    most = (rows & -rows).bit_length()  # powers of two, from 1, that divide the rows
    search = _Search[str](plan, report)
    name = lambda n: ",".join([*filter(None, [mesh]), f"fsdp={2 ** (n - 1)}"])

    def exceeds(n: int) -> bool:
        return not search.fits(
            name(n), mesh=name(n), batch_size=batch_size, accumulation=accumulation, **options
        )

    def guess() -> int | None:
        planned = search.planned
        sizes = [n for n in range(1, most + 1) if name(n) in planned]
        large = [n for n in sizes if not planned[name(n)].fits]
        if not large:
            return None
        last = planned[name(large[-1])]
        return large[-1] + math.ceil(math.log2(1 - last.margin_bytes / last.limit_bytes))

    found = _boundary(exceeds, guess, most)
    return search.edge(name(found + 1) if found < most else None, name(found) if found else None)


def _inherited(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that plans have from their model."""
    return inherited(str(options["model"])) if options.get("model") else {}


def _boundary(holds: Callable[[int], bool], guess: Callable[[], int | None], most: int) -> int:
    """Returns the largest of 1, ..., `most` for which a condition holds, or 0.

    It is assumed to hold for all smaller numbers.

    Args:
        holds: The condition.
        guess: Returns a number worth trying, or None.
        most: The largest number.
    """
    low, high, turn = 0, most + 1, 0
    while high - low > 1:
        halfway = (low + high) // 2 if high <= most else min(2 * low or 1, most)
        near = guess() if turn % 4 else None  # guesses may be off by one again and again
        n = halfway if near is None else min(max(near, low + 1), high - 1, 16 * low or 16)
        if holds(n):
            low = n
        else:
            high = n
        turn += 1
    return low


#: The storages of state and weights that `fit_optimizer` plans by default; None: unquantised.
STATES: tuple[str | None, ...] = (None, "int8")
STORAGES: tuple[str | None, ...] = (None, "int8")

#: Whether it releases: both, by default.
RELEASES = (False, True)


def fit_optimizer(
    *,
    plan: PlanStep = cached_plan,
    optimizers: Sequence[str] | None = None,
    states: Sequence[str | None] = STATES,
    storages: Sequence[str | None] = STORAGES,
    releases: Sequence[bool] = RELEASES,
    processes: int = 1,
    report: Callable[[Row], object] = lambda row: None,
    **options: Any,
) -> list[Row]:
    """Plans optimizers, each with every storage of its state and the weights, released and not.

    Args:
        plan: A function like `memopt.plan`, which it is by default, with its cache; for a model of
            your own, `memopt.plan_step` with it, by `functools.partial`.
        optimizers: Names in `memopt.available()`; None: all of memopt's own.
        states: How the state is stored, see `memopt.quantize_state`; None: as the method does.
        storages: How weights are stored, see `memopt.quantize_params`; None: in the plan's `dtype`.
        releases: Whether each block is updated while the backward pass runs.
        processes: How many compile at a time. Each compilation of 7B takes gigabytes.
        report: Called with each row when it is planned.
        **options: The other arguments of `plan`.

    Returns:
        The rows: first those that fit, by their peak, then those that do not, then those that
        were not compiled since weights and state alone are too large, then those that cannot be
        planned, such as a method that cannot be released or a step that the compiler fails on.

    Raises:
        ValueError: If none can be planned; with the reason of the first.
    """
    check_at_least("processes", processes, 1)
    there = _inherited(options)
    for name in ("state", "weights", "release"):
        if there.get(name):
            raise ValueError(
                f"model {str(options['model'])!r} must be a run without {name}, or no run, for "
                "optimizers to be planned with and without it."
            )
    chosen = _choices(optimizers, states, storages, releases)
    rows = []
    for row in _all_planned(plan, chosen, options, processes):
        report(row)
        rows.append(row)
    if all(row.plan is None for row in rows):
        raise ValueError(rows[0].refused)
    return sorted(rows, key=_rank)


def count_rows(
    *,
    optimizers: Sequence[str] | None,
    states: Sequence[str | None],
    storages: Sequence[str | None],
    releases: Sequence[bool],
) -> int:
    """Returns the number of rows that `fit_optimizer` plans with these arguments."""
    return len(_choices(optimizers, states, storages, releases))


def _choices(optimizers: Sequence[str] | None, *others: Sequence[Any]) -> list[dict[str, Any]]:
    names = available("memopt") if optimizers is None else optimizers
    keys = ("optimizer", "state", "weights", "release")
    return [dict(zip(keys, row, strict=True)) for row in itertools.product(names, *others)]


def _all_planned(
    plan: PlanStep, chosen: Sequence[Mapping[str, Any]], options: Mapping[str, Any], processes: int
) -> Iterator[Row]:
    """The rows as they are planned."""
    if processes == 1:
        yield from (_row(plan, one, options) for one in chosen)
        return
    # JAX's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(_row, plan, one, options) for one in chosen]
        try:
            yield from (future.result() for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)


def _row(plan: PlanStep, chosen: Mapping[str, Any], options: Mapping[str, Any]) -> Row:
    """Plans one configuration, or says why it cannot be planned."""
    try:
        return Row(chosen, plan(**chosen, **options))
    except ValueError as error:
        return Row(chosen, None, str(error))
    except jax.errors.JaxRuntimeError as error:
        return Row(chosen, None, f"the compiler failed: {first_line(error)}")


def _rank(row: Row) -> tuple[int, int]:
    """The place of a row in the result of `fit_optimizer`."""
    if row.plan is None:
        return 3, 0
    if not row.plan.compiler:
        return 2, row.plan.peak_bytes
    return int(not row.plan.fits), row.plan.peak_bytes
