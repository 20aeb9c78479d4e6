"""Tables of compared optimizers in Markdown, JSON and the terminal."""

import itertools
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from memopt.comparison.analysis import (
    EXPERIMENT,
    EXPERIMENT_TO_TARGET,
    PROBABILITY,
    THRESHOLD,
    TOLERANCE,
    Summary,
    Unfinished,
    Verdict,
    by_experiment,
    summarize,
    tuned_runs,
    unfinished,
)
from memopt.comparison.plots import plot_curves, plot_front, plot_sensitivity
from memopt.comparison.records import RESULTS, RESULTS_TO_TARGET, Run, loss_of, read_records
from memopt.comparison.rows import BASELINE
from memopt.comparison.words import (
    NOTHING,
    experiment_name,
    short_bytes,
    short_count,
    short_number,
)
from memopt.json_lines import finite
from memopt.markdown import markdown_table
from memopt.training.writing import write_whole

#: The paragraph above the tables.
RULE = (
    f"Every method is tuned with the same number of runs and {BASELINE} with half as many again; "
    "the grid of learning rates grows beyond that until the best is inside. The losses are those "
    "at the end of the schedule, means over seeds that were not tuned on, ± their standard "
    f"deviation. A method is better or worse than {BASELINE} if chance alone makes such a "
    f"difference with a probability below {PROBABILITY:g}: |z| ≥ {THRESHOLD:.2f}, where z is "
    "Student's t of the seeds' pooled standard error, turned into the z of the same probability, "
    f"so that few seeds count for less. Steps to the target, {BASELINE}'s loss, are interpolated "
    "on the curve of the tuned runs, whose learning rates have not yet decayed there: a schedule "
    f"that ends there would reach it sooner. Rates within {TOLERANCE:.0%}: the factor between the "
    "lowest and the highest learning rate whose loss is at most "
    f"{TOLERANCE:.0%} above the least; ≥ if it is wider than what was tried."
)


#: Columns of the files alone: a terminal has no room for them.
ONLY_IN_FILES = {"seeds", "perplexity", "z", "speed-up", "tokens to target", "rate ratio"}
ONLY_IN_FILES |= {"ms a step", "CPU ms a step", "settings tried", f"rates within {TOLERANCE:.0%}"}
ONLY_IN_FILES |= {f"− {BASELINE}"}

#: The words for verdicts, where they differ.
VERDICTS: Mapping[Verdict, str] = {"unknown": "too few seeds"}


class Section(NamedTuple):
    """A table with its title.

    Attributes:
        title: The title.
        columns: The names of the columns.
        rows: The rows, from the best to the worst.
        remark: Sentences below it, or "".
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    remark: str = ""


class Peak(NamedTuple):
    """The most memory that is held at any moment of a training step, as a compiler plans it.

    Attributes:
        peak_bytes: Bytes, with parameters and state.
        compiled_for: The chip that the step was compiled for, or "cpu".
        compiler: The compiler's name and version.
    """

    peak_bytes: int
    compiled_for: str
    compiler: str


Peaks = Mapping[str, Peak]
"""Peaks by the keys of runs; a run without one is not known."""


def write_report(
    directory: Path, plan_peaks: Callable[[Sequence[Run]], Peaks] | None = None
) -> list[Section]:
    """Writes the tables and pictures of a comparison.

    Args:
        directory: The directory with `compare.jsonl`, `targets.jsonl` or both. Written into it are
            `report.md`, `report.json` and, as soon as there are tuned runs in `compare.jsonl`,
            `front.png`, `curves.png` and `sensitivity.png`.
        plan_peaks: Maps runs, one of each row of the tables, to the peaks of their steps. None:
            the tables have no peaks.

    Returns:
        The tables.

    Raises:
        FileNotFoundError: There is no file of runs.
        OSError: A file cannot be written.
    """
    paths = directory / RESULTS, directory / RESULTS_TO_TARGET
    if not any(path.is_file() for path in paths):
        raise FileNotFoundError(f"{paths[0]} is not a file: nothing was compared yet.")
    found, to_target = map(read_records, paths)
    groups = summarize(found)
    runs = [s.run for s in itertools.chain.from_iterable(groups)]
    for methods in by_experiment(to_target, (*EXPERIMENT_TO_TARGET, "batch_size")).values():
        runs += [of[0] for of in tuned_runs(methods).values()]
    peaks = plan_peaks(runs) if plan_peaks else {}
    shown = [*sections(groups, peaks), *sections_to_target(to_target, peaks)]
    missing = unfinished(found)
    text = markdown(shown, runs=[*found, *to_target], missing=missing)
    write_whole(directory / "report.md", text.encode())
    write_whole(directory / "report.json", to_json(groups, peaks).encode())
    if groups:
        plot_front(groups, directory / "front.png", missing=missing)
        plot_curves(groups, directory / "curves.png")
        plot_sensitivity(groups, directory / "sensitivity.png")
    return shown


def sections(
    groups: Sequence[Sequence[Summary]], peaks: Peaks = MappingProxyType({})
) -> list[Section]:
    """Returns a table of each experiment.

    Args:
        groups: The summaries, as of `summarize`.
        peaks: The peaks of their runs.
    """
    return [
        Section(
            experiment_name(group[0].run, among=[s.run for of in groups for s in of]),
            *_cells([_row(s, peaks) for s in group]),
            _remark(group, peaks),
        )
        for group in groups
    ]


def _remark(group: Sequence[Summary], peaks: Peaks) -> str:
    """Sentences below the table of an experiment."""
    parts = []
    if told := [s.difference.least for s in group if s.difference and s.difference.least]:
        parts.append(
            f"Differences below {statistics.median(told):.3f}, the median over methods, cannot be "
            "told from chance."
        )
    if left_out := sum(s.left_out for s in group):
        parts.append(f"{left_out} runs of earlier settings are left out.")
    parts += _planned_for([s.run for s in group], peaks)
    return " ".join(parts)


def _planned_for(runs: Iterable[Run], peaks: Peaks) -> list[str]:
    """A sentence on the chips and compilers of the peaks of runs, if there are any."""
    known = [peaks[run["key"]] for run in runs if run["key"] in peaks]
    told = dict.fromkeys(f"{peak.compiled_for} by {peak.compiler}" for peak in known)
    return [f"Peaks are those of one step, planned for {', '.join(told)}."] if told else []


def sections_to_target(runs: Iterable[Run], peaks: Peaks = MappingProxyType({})) -> list[Section]:
    """Returns tables of runs whose number of steps was sought for a loss.

    There is a table of steps at all batch sizes, if there are several, and one of each batch size.

    Args:
        runs: The runs.
        peaks: Their peaks.
    """
    found = []
    for methods in by_experiment(runs, EXPERIMENT_TO_TARGET).values():
        every = [run for of in methods.values() for run in of]
        first = every[0]
        title = f"Fewest steps to a loss of {first['target_loss']:g}, {first['size']} parameters"
        at_batch_sizes = []
        batches: dict[int, dict[str, list[Run]]] = {}
        for batch in sorted({run["batch_size"] for run in every}):
            at = [run for run in every if run["batch_size"] == batch]
            [of] = by_experiment(at, EXPERIMENT_TO_TARGET).values()
            tuned = tuned_runs(of)
            missing = [name for name in of if name not in tuned]
            remark = [f"Not reached or not finished: {', '.join(missing)}."] if missing else []
            remark += _planned_for([of[0] for of in tuned.values()], peaks)
            batches[batch] = tuned
            cells = _cells(_rows_to_target(tuned.values(), peaks))
            at_batch_sizes.append(
                Section(f"{title}, {batch} rows a batch", *cells, " ".join(remark))
            )
        if len(batches) > 1:
            rows = [
                [
                    name,
                    *(
                        str(of[name][0]["steps"]) if name in of else NOTHING
                        for of in batches.values()
                    ),
                ]
                for name in methods
            ]
            columns = ["method", *(f"{batch} rows" for batch in batches)]
            found.append(Section(title, columns, rows))
        found += at_batch_sizes
    return found


def _rows_to_target(methods: Iterable[Sequence[Run]], peaks: Peaks) -> list[dict[str, str]]:
    """The cells of the methods that came to a loss, those with the fewest steps first."""
    rows = []
    for runs in sorted(methods, key=lambda runs: (runs[0]["steps"], runs[0]["method"])):
        first, losses = runs[0], [loss_of(run) for run in runs]
        reached = sum(loss <= first["target_loss"] for loss in losses)
        rows.append(
            {
                "method": first["method"],
                "steps": f"{first['steps']}",
                "tokens": short_count(first["tokens"]),
                "seeds that reach it": f"{reached} of {len(runs)}",
                "mean loss": short_number(statistics.fmean(losses), ".3f"),
                "state": short_bytes(first["state_bytes"]),
                "peak": _peak(first, peaks),
                "learning rate": f"{first['learning_rate']:.3g}",
            }
        )
    return rows


def markdown(
    shown: Sequence[Section],
    *,
    runs: Sequence[Run] = (),
    missing: Sequence[Unfinished] = (),
) -> str:
    """Returns the tables in Markdown, below the rule that they follow.

    Args:
        shown: The tables.
        runs: All runs, for their commands, machines and versions.
        missing: As `unfinished` returns.
    """
    parts = ["# Optimizers compared", RULE]
    for section in shown:
        table = markdown_table(section.columns, section.rows).rstrip()
        parts += [f"## {section.title}", table, *([section.remark] if section.remark else [])]
    if missing:
        lines = [
            f"- {run['method']}, {experiment_name(run, among=[one.run for one in missing])}: "
            f"{tuning} runs to tune it, {seeds or 'none'} at the tuned setting."
            for run, tuning, seeds in missing
        ]
        parts += ["## Not finished", "\n".join(lines)]
    parts += provenance(runs)
    return "\n\n".join(parts) + "\n"


def to_json(groups: Iterable[Iterable[Summary]], peaks: Peaks = MappingProxyType({})) -> str:
    """Returns the summaries as a JSON list; numbers that are not finite are null.

    Args:
        groups: The summaries, as of `summarize`.
        peaks: The peaks of their runs.
    """
    setting = ("method", "optimizer", *EXPERIMENT, "options", "learning_rate", "schedule")
    more = ("tokens", "state_bytes", "parameter_bytes")
    own = [
        *("losses", "loss", "spread", "perplexity", "verdict", "steps_to_target"),
        *("tokens_to_target", "step_seconds", "step_cpu_seconds", "settings", "left_out"),
        *("on_front", "curve", "sensitivity"),
    ]
    found = [
        {name: s.run[name] for name in (*setting, *more)}  # type: ignore[literal-required]
        | {name: getattr(s, name) for name in own}
        | {"peak": peak._asdict() if (peak := peaks.get(s.run["key"])) else None}
        | {"difference": s.difference and s.difference._asdict()}
        | {"rate_range": s.rate_range and s.rate_range._asdict()}
        for s in itertools.chain.from_iterable(groups)
    ]
    return json.dumps(finite(found), indent=1) + "\n"


def tables(shown: Sequence[Section]) -> list[Table]:
    """Returns the tables for the terminal, of the columns that fit 80 characters."""
    found = []
    for section in shown:
        table = Table(title=section.title, caption=section.remark, box=SIMPLE_HEAD, pad_edge=False)
        kept = [i for i, name in enumerate(section.columns) if name not in ONLY_IN_FILES]
        for i in kept:
            width = max(len(row[i]) for row in section.rows)
            name = textwrap.fill(section.columns[i], width, break_long_words=False)
            table.add_column(name, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
        for row in section.rows:
            table.add_row(*(row[i] for i in kept))
        found.append(table)
    return found


def _cells(rows: Sequence[Mapping[str, str]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of one table; columns without any value are left out."""
    columns = [c for c in next(iter(rows), ()) if any(row[c] != NOTHING for row in rows)]
    return columns, [[row[c] for c in columns] for row in rows]


def _peak(run: Run, peaks: Peaks) -> str:
    peak = peaks.get(run["key"])
    return short_bytes(peak.peak_bytes) if peak else NOTHING


def _row(s: Summary, peaks: Peaks) -> dict[str, str]:
    """All cells of a method by the names of their columns."""
    diverged = sum(not math.isfinite(x) for x in s.losses)
    if diverged:
        loss = f"{diverged} of {len(s.losses)} diverged"
    else:
        loss = f"{s.loss:.3f}" + ("" if s.spread is None else f" ± {s.spread:.3f}")
    other, steps, tokens = s.difference, s.steps_to_target, s.tokens_to_target
    told = other and s.verdict in ("better", "worse")  # others have no speed-up but by chance
    rates = s.rate_range
    return {
        "method": s.method,
        "loss": loss,
        "seeds": f"{len(s.losses)}",
        "perplexity": short_number(s.perplexity, ".2f"),
        f"− {BASELINE}": short_number(other and other.loss, "+.3f"),
        "z": short_number(other and other.z, "+.1f"),
        f"p < {PROBABILITY:g}": VERDICTS.get(s.verdict, s.verdict) if other else NOTHING,
        "steps to target": f"> {s.run['steps']}" if steps is None else f"{steps:.0f}",
        "tokens to target": short_count(tokens)
        if tokens is not None
        else f"> {short_count(s.run['tokens'])}",
        "speed-up": short_number(other and other.speed_up, ".2f") if told else NOTHING,
        "state": short_bytes(s.run["state_bytes"]),
        "peak": _peak(s.run, peaks),
        "ms a step": short_number(s.step_seconds and 1e3 * s.step_seconds, ".1f"),
        "CPU ms a step": short_number(s.step_cpu_seconds and 1e3 * s.step_cpu_seconds, ".1f"),
        "learning rate": f"{s.run['learning_rate']:.3g}",
        "rate ratio": short_number(other and other.learning_rate_ratio, ".3g"),
        f"rates within {TOLERANCE:.0%}": NOTHING
        if rates is None
        else ("" if rates.whole else "≥ ") + f"{rates.high / rates.low:.1f}×",
        "settings tried": f"{s.settings}",
    }


def provenance(runs: Iterable[Run]) -> list[str]:
    """Returns sentences on the commands, machines and versions of runs."""
    found = []
    runs = list(runs)
    for field, title in (("command", "Command"), ("machine", "Machine"), ("versions", "Versions")):
        told = dict.fromkeys(_words(run[field]) for run in runs)  # type: ignore[literal-required]
        if told:
            found.append(f"{title}: " + "; ".join(f"`{one}`" for one in told) + ".")
    return found


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    return str(value)
