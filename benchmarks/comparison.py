"""Tables of the runs that `memopt compare` made, for the page on which optimizer to choose.

    memopt compare --preset cpu --output DIRECTORY      # makes runs
    python -m benchmarks.compare_peaks                  # plans the peaks of their steps
    python -m benchmarks.comparison                     # draws them, and writes the pages

The runs are in `benchmarks/results/compare.jsonl`, to which more are added as they are made;
methods without runs at the tuned setting have no figures yet, and settings that are not planned yet
no peaks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import compare_peaks
from benchmarks.results import RESULTS, write_pages
from memopt.comparison.analysis import (
    PROBABILITY,
    TOLERANCE,
    Summary,
    decide,
    paired_difference,
    summarize,
    unfinished,
)
from memopt.comparison.plots import plot_front, plot_sensitivity
from memopt.comparison.protocol import PRESETS
from memopt.comparison.records import Run, loss_of, read_records
from memopt.comparison.rows import BASELINE, METHOD_ROWS, ROWS, Row, tuned_options
from memopt.comparison.words import NOTHING, short_bytes, short_number
from memopt.markdown import markdown_table
from memopt.optimizers.registry import METHODS

#: The column of verdicts.
VERDICT = f"p < {PROBABILITY:g}"

#: AdamW with two learning rates, as methods for matrices have.
CONTROL = "benchmarks.controls:adamw_slow_matrices, factor=0.1"

#: Methods whose default rate is not tuned here, and why. Others that are not find their own steps.
OTHER_DEFAULTS = {"oasis": "tuned with adaptive=False", "sgd": "tuned with momentum"}


def by_method(runs: Sequence[Run], baseline: str = BASELINE) -> dict[str, dict[str, Summary]]:
    """The summaries of each method by the size's name; those of the least loss first.

    Raises:
      ValueError: if the runs of a size have two protocols.
    """
    found: dict[str, dict[str, Summary]] = {}
    sizes = set[str]()
    for group in summarize(runs, baseline=baseline):
        size = group[0].run["size"]
        if size in sizes:
            raise ValueError(f"runs must have one protocol, got two of {size} parameters.")
        sizes.add(size)
        for summary in group:
            found.setdefault(summary.method, {})[size] = summary
    return found


def losses(report: dict[str, Any], peaks: dict[str, Any]) -> str:
    """State, loss, difference from AdamW ± its standard error, verdict and peak of each method."""
    return _table(
        report["results"],
        ("loss", f"− {BASELINE}", VERDICT, "steps to its loss", "peak"),
        lambda s: [
            short_number(s.loss, ".3f"),
            *_from_baseline(s),
            NOTHING if s.steps_to_target is None else f"{s.steps_to_target / s.run['steps']:.0%}",
            _peak(peaks, s.run),
        ],
        include=lambda s: s.is_exact,
    )


def against_control(report: dict[str, Any]) -> str:
    """Difference from AdamW with two learning rates, of the methods better than AdamW."""
    runs: list[Run] = report["results"]
    methods = by_method(runs)
    better = [name for name, of in methods.items() if "better" in {s.verdict for s in of.values()}]
    controlled = [run for run in runs if run["size"] in methods.get(CONTROL, {})]
    return _table(
        controlled,
        ("loss", "− control", VERDICT),
        lambda s: [short_number(s.loss, ".3f"), *_from_baseline(s)],
        include=lambda s: s.method in better and s.method != CONTROL,
        baseline=CONTROL,
    )


def rates(report: dict[str, Any]) -> str:
    """Tuned learning rate, its ratio to AdamW's, and the rates within a hundredth of its loss."""
    return _table(
        report["results"],
        ("rate", f"× {BASELINE}'s", f"rates within {TOLERANCE:.0%}"),
        lambda s: [
            f"{s.run['learning_rate']:.2g}",
            short_number(s.difference and s.difference.learning_rate_ratio, ".2g"),
            _range(s),
        ],
        include=lambda s: s.is_exact,
    )


def twins(report: dict[str, Any], peaks: dict[str, Any]) -> str:
    """Difference of rows with fewer bits, or released, from their exact twins; verdict and peaks.

    Both have the same seeds, and are compared seed by seed. Peaks are the row's and its twin's.
    """
    runs: list[Run] = report["results"]
    methods = by_method(runs)
    by_seed = lambda s: dict(zip(s.seeds, s.losses, strict=True))

    def cells(s: Summary) -> list[str]:
        exact = methods.get(s.run["tuned_as"], {}).get(s.run["size"])
        if exact is None:
            return [NOTHING, NOTHING, _peak(peaks, s.run), NOTHING]
        found = paired_difference(by_seed(s), by_seed(exact))
        return [
            _difference(found.loss, found.standard_error) if found else NOTHING,
            decide(found.z) if found else NOTHING,
            _peak(peaks, s.run),
            _peak(peaks, exact.run),
        ]

    columns = ("− exact", VERDICT, "peak", "exact peak")
    return _table(runs, columns, cells, include=lambda s: not s.is_exact)


def best_rates(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """The best rate of each method's search with default options, by the size's name."""
    found: dict[str, dict[str, float]] = {}
    for name in METHOD_ROWS:
        if METHODS[name].finds_step or name in OTHER_DEFAULTS:
            continue
        first = {option: values[0] for option, values in tuned_options(Row(name)).items()}
        for size in PRESETS["cpu"].models:
            of = [run for run in runs if (run["method"], run["size"]) == (name, size)]
            searched = [
                run
                for run in of
                if not run["tuned"]
                and all(run["options"][option] == value for option, value in first.items())
            ]
            if searched and any(run["tuned"] for run in of):
                best = min(searched, key=loss_of)
                found.setdefault(name, {})[size] = best["learning_rate"]
    return found


def default_rate(best: Mapping[str, float]) -> float:
    """The default learning rate of a method: its best at the largest size, as 1, 2 or 5 · 10ⁿ.

    Args:
        best: the best rate by the size's name, the smaller sizes first.

    Example:
        >>> default_rate({"0.5M": 2.0**-7, "2M": 2.0**-8}), default_rate({"0.5M": 2.0})
        (0.005, 2.0)
    """
    [*_, largest] = best.values()
    rates = [float(f"{digit}e{power}") for digit in (1, 2, 5) for power in range(-8, 3)]
    return min(rates, key=lambda rate: abs(math.log(rate / largest)))


def default_rates(report: dict[str, Any]) -> str:
    """The default learning rate of each method, and its best ones with default options."""
    sizes = list(PRESETS["cpu"].models)
    rows = [
        [name, f"{default_rate(best):g}"]
        + [f"{best[size]:.2g}" if size in best else NOTHING for size in sizes]
        for name, best in best_rates(report["results"]).items()
    ]
    return markdown_table(["method", "default", *(f"{size}: best" for size in sizes)], rows)


def progress(report: dict[str, Any]) -> str:
    """A sentence on how many rows are finished, and one on those with fewer seeds."""
    runs: list[Run] = report["results"]
    done = by_method(runs)
    begun = {(one.run["size"], one.run["method"]) for one in unfinished(runs)}
    parts = []
    for size in PRESETS["cpu"].models:
        there = [name for name in ROWS if size in done.get(name, {})]
        fewer = [name for name in there if (size, name) in begun]
        part = f"With {size} parameters {len(there) - len(fewer)} of {len(ROWS)} rows are finished"
        parts.append(part + f"; fewer seeds: {'; '.join(fewer)}." * bool(fewer) + "." * (not fewer))
    return " ".join(parts) + "\n"


def _table(
    runs: Sequence[Run],
    columns: Sequence[str],
    cells: Callable[[Summary], Sequence[str]],
    *,
    include: Callable[[Summary], bool],
    baseline: str = BASELINE,
) -> str:
    """A row for each method that is included: its state and, for each size, the cells."""
    methods = by_method(runs, baseline)
    sizes = list(dict.fromkeys(size for of in methods.values() for size in of))
    head = ["method", "state, bytes a parameter"]
    head += [f"{size}: {column}" for size in sizes for column in columns]
    rows = []
    for method, of in methods.items():
        first = next(iter(of.values()))
        if include(first):
            found = [cells(of[size]) if size in of else [NOTHING] * len(columns) for size in sizes]
            state = f"{first.state_bytes_per_parameter:.2g}"
            rows.append([method, state, *(cell for part in found for cell in part)])
    return markdown_table(head, rows) if rows else "None is finished yet.\n"


def _from_baseline(s: Summary) -> list[str]:
    """The difference of a method from the baseline, and the verdict."""
    if s.difference is None:
        return [NOTHING, NOTHING]
    return [_difference(s.difference.loss, s.difference.standard_error), s.verdict]


def _peak(peaks: dict[str, Any], run: Run) -> str:
    found = compare_peaks.find(peaks["results"], run)
    return short_bytes(found["peak_bytes"]) if found else NOTHING


def _difference(loss: float | None, error: float | None) -> str:
    return short_number(loss, "+.3f") + ("" if error is None else f" ± {error:.3f}")


def _range(summary: Summary) -> str:
    found = summary.rate_range
    if found is None:
        return NOTHING
    return f"{found.low:.2f}–{found.high:.2f}×" + ("" if found.whole else " or more")


def main() -> None:
    """Draws the runs into PNG files beside theirs, and writes the pages."""
    runs = read_records(RESULTS / "compare.jsonl")
    groups = summarize(runs)
    plot_front(groups, RESULTS / "compare.png", missing=unfinished(runs))
    plot_sensitivity(groups, RESULTS / "compare_sensitivity.png")
    write_pages()


if __name__ == "__main__":
    main()
