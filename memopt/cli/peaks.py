"""Plans the peaks of compared runs: the most memory that each of their steps holds."""

from collections.abc import Callable, Sequence

import flax
import jax
import optax

from memopt.cli.plan_view import show_progress
from memopt.comparison.cells import Program, set_up_program
from memopt.comparison.records import Run, program_of
from memopt.comparison.report import Peak
from memopt.planning import cache, chips
from memopt.planning.plan import first_line, plan_compilable


def plan_peaks(
    runs: Sequence[Run], *, chip: str | None, tell: Callable[[str], object]
) -> dict[str, Peak]:
    """Plans the peak of the step of each run, and shows the progress on stderr.

    Args:
        runs: The runs; those of the same step are planned once.
        chip: The chip to plan for; None: that which each run was made on.
        tell: Called with sentences on the peaks that are not known, and on other compilers.

    Returns:
        The peaks that are known, by the keys of the runs.
    """
    found: dict[str, Peak] = {}
    unknown: dict[str, list[str]] = {}
    notes: dict[str, None] = {}
    with show_progress(total=len(runs)) as (working, done):
        for run in runs:
            name = f"{run['method']} at {run['size']}"
            working(f"planning the step of {name}")
            try:
                planned_for = chip or _chip_of(run)
                found[run["key"]] = plan_peak(program_of(run), planned_for)
                notes |= dict.fromkeys(chips.compilable(planned_for)[1])
            except (ValueError, TypeError) as error:
                unknown.setdefault(str(error), []).append(name)
            except jax.errors.JaxRuntimeError as error:
                unknown.setdefault(f"the compiler failed: {first_line(error)}", []).append(name)
            done(run)
    for reason, names in unknown.items():
        tell(f"The peak is not known of {'; '.join(names)}: {reason}")
    for note in notes:
        tell(note)
    return found


def plan_peak(program: Program, chip: str) -> Peak:
    """Plans the peak of the step of a run, or reads it if it was planned before.

    Args:
        program: What the step is compiled for.
        chip: The chip to plan for, a name in `memopt.planning.chips.CHIPS` or "cpu".

    Raises:
        ValueError: The chip is unknown, or the step cannot work.
    """
    compiled_for, _ = chips.compilable(chip)
    # A user's optimizer may depend on any file: its step is traced each time.
    key = "" if ":" in program.optimizer else _key(program, compiled_for)
    if key and (record := cache.load(key)):
        return Peak(**record)
    plan = plan_compilable(
        lambda devices, _: set_up_program(program, devices),
        compiled_for,
        count=1,
        cache=True,
        model="",
        optimizer=program.optimizer,
    )
    peak = Peak(plan.peak_bytes, plan.compiled_for, plan.compiler)
    if key:
        cache.save(key, peak._asdict())
    return peak


def _key(program: Program, chip: str) -> str:
    """The name in the cache of the peak of a step, which need not be traced to find it."""
    versions = {package.__name__: package.__version__ for package in (flax, jax, optax)}
    return cache.key_of(repr(program), chip, ["**/*.py"], **versions)


def _chip_of(run: Run) -> str:
    device = run["machine"]["device"]
    if device not in chips.KINDS:
        raise ValueError(f"no compiler is known for {device!r}: name a chip with --chip.")
    return chips.KINDS[device]
