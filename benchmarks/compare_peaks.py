"""Plans the peak of the step of each row of `memopt compare --preset cpu`, by the CPU's compiler.

    nice python -m benchmarks.compare_peaks

A row with runs at its tuned setting in `compare.jsonl` is planned with the options of these, and
any other with those that its search starts from; learning rates do not matter. Each row is written
as it is planned. Rows that are in the file with the same options are not planned again.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.progress import track

from benchmarks.report import Report, read_results
from benchmarks.results import RESULTS
from memopt.cli.peaks import plan_peak
from memopt.comparison.analysis import summarize
from memopt.comparison.cells import Program
from memopt.comparison.grid import Grid
from memopt.comparison.protocol import PRESETS
from memopt.comparison.records import Run, program_of, read_records
from memopt.comparison.rows import ROWS, Row, first_rate, tuned_options
from memopt.comparison.tuning import Point

PATH = RESULTS / "compare_peaks.json"

#: A size, a row's name, and what its step is compiled for.
Step = tuple[str, str, Program]


def steps(runs: Sequence[Run]) -> Iterator[Step]:
    """The steps of all rows at all sizes of the preset."""
    tuned = {(s.run["size"], s.method): s.run for group in summarize(runs) for s in group}
    protocol = PRESETS["cpu"]
    grid = Grid(protocol, tuple(map(Row.parse, ROWS)), (protocol.batch_size,))
    for unit in grid.units:
        start = Point(first_rate(unit.row), (0,) * len(tuned_options(unit.row)))
        run = tuned.get((unit.size, unit.row.name))
        program = program_of(run) if run else grid.cell(unit, protocol.steps, start, 0).program
        yield unit.size, unit.row.name, program


def name(step: Step) -> dict[str, Any]:
    """The entries of a result that say which step it is of."""
    size, method, program = step
    options = {n: list(x) if isinstance(x, tuple) else x for n, x in program.options}
    return {"size": size, "method": method, "options": options}


def find(results: Sequence[Mapping[str, Any]], step: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The result of a step, or of a run, by its size, method and options; None if there is none."""
    names = ("size", "method", "options")
    return next((one for one in results if all(one[n] == step[n] for n in names)), None)


def main() -> None:
    """Plans the steps that are not in the file, and drops those that are not wanted any more."""
    results: list[Mapping[str, Any]] = read_results(PATH)
    report = Report("compare_peaks", (), PATH, results)
    wanted = [*steps(read_records(RESULTS / "compare.jsonl"))]
    missing = [step for step in wanted if not find(results, name(step))]
    for step in track(missing, description="peaks"):
        results.append(name(step) | plan_peak(step[2], "cpu")._asdict())
        report.save()
    results[:] = filter(None, (find(results, name(step)) for step in wanted))
    report.save()


if __name__ == "__main__":
    main()
