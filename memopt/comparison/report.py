"""Tables of compared optimizers in Markdown, JSON and the terminal."""

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from memopt.comparison.analysis import (
    PROBABILITY,
    THRESHOLD,
    Run,
    Summary,
    summarize,
    unfinished,
)
from memopt.comparison.plots import (
    plot_curves,
    plot_front,
    plot_sensitivity,
    short_bytes,
    short_count,
)
from memopt.comparison.records import RESULTS, read_records
from memopt.comparison.rows import BASELINE
from memopt.training.writing import write_whole

RULE = (
    f"A method is better or worse than {{baseline}} if chance alone makes such a difference of "
    f"means with a probability below {PROBABILITY:g}: |z| ≥ {THRESHOLD:.2f}, where z is Student's "
    "t of the seeds' pooled standard error, turned into the z of the same probability, so that few "
    "seeds count for less. Otherwise it is the same as far as these seeds can tell. ± is the "
    "standard deviation over seeds. Steps to the target are interpolated on the curve of the "
    "tuned runs, whose learning rates have not yet decayed there: a schedule that ends there "
    "would reach it sooner."
)


def write_report(
    directory: Path,
    *,
    runs: Path | None = None,
    baseline: str = BASELINE,
    target_loss: float | None = None,
    peak_bytes: Callable[[Run], int | None] | None = None,
) -> list[Summary]:
    """Writes the tables and pictures of a comparison.

    Args:
        directory: The directory to write into: `report.md`, `report.json`, and, as soon as there
            are tuned runs, `front.png`, `curves.png` and `sensitivity.png`.
        runs: The file of runs, by default `compare.jsonl` in the directory.
        baseline: The method with which others are compared.
        target_loss: As of `summarize`.
        peak_bytes: As of `summarize`.

    Returns:
        The summaries.

    Raises:
        ValueError: If the file does not exist.
        OSError: If a file cannot be written.
    """
    path = runs or directory / RESULTS
    if not path.is_file():
        raise ValueError(f"{path} is not a file: nothing was compared yet.")
    found = read_records(path)
    summaries = summarize(found, baseline=baseline, target_loss=target_loss, peak_bytes=peak_bytes)
    text = markdown(summaries, baseline=baseline, runs=found)
    write_whole(directory / "report.md", text.encode())
    write_whole(directory / "report.json", to_json(summaries).encode())
    if summaries:
        for plot, name in (
            (plot_front, "front"),
            (plot_curves, "curves"),
            (plot_sensitivity, "sensitivity"),
        ):
            plot(by_size(summaries), directory / f"{name}.png", baseline)
    return summaries


def by_size(summaries: Iterable[Summary]) -> list[list[Summary]]:
    """The summaries of each size and batch size."""
    key = lambda s: (s.size, s.batch_size)
    return [list(group) for _, group in itertools.groupby(summaries, key)]


def markdown(
    summaries: Sequence[Summary], *, baseline: str = BASELINE, runs: Iterable[Run] = ()
) -> str:
    """The tables in Markdown, a heading for each size.

    Args:
        summaries: The results.
        baseline: The method with which others are compared.
        runs: All runs, for their commands, machines and versions, and for what is not finished.
    """
    runs = list(runs)
    parts = ["# Optimizers compared", RULE.format(baseline=baseline)]
    for group in by_size(summaries):
        first = group[0]
        parts.append(
            f"## {first.size} parameters, {first.steps} steps of {first.batch_size} rows, "
            f"{short_count(first.tokens)} tokens"
        )
        columns, rows = cells(group, baseline)
        lines = [f"| {' | '.join(columns)} |", f"|---|{'--:|' * (len(columns) - 1)}"]
        parts.append("\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]))
        if told := [s.least_difference for s in group if s.least_difference is not None]:
            parts.append(
                f"Differences below {statistics.median(told):.3f}, the median over methods, cannot "
                "be told from chance."
            )
    for (size, batch, method), count in unfinished(runs).items():
        parts.append(f"{method} at {size}, batches of {batch}: {count} runs, none tuned yet.")
    parts += provenance(runs)
    return "\n\n".join(parts) + "\n"


def to_json(summaries: Sequence[Summary]) -> str:
    """The summaries as a JSON list; what is not finite is null."""
    return json.dumps([_plain(dataclasses.asdict(s)) for s in summaries], indent=1) + "\n"


def tables(summaries: Sequence[Summary], baseline: str = BASELINE) -> list[Table]:
    """Tables for the terminal, one for each size."""
    shown = []
    for group in by_size(summaries):
        title = f"{group[0].size} parameters, {short_count(group[0].tokens)} tokens"
        table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
        columns, rows = cells(group, baseline)
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        shown.append(table)
    return shown


def cells(
    summaries: Sequence[Summary], baseline: str = BASELINE
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of one size's table; columns without any value are left out."""
    rows = [_row(s, baseline) for s in summaries]
    columns = [c for c in rows[0] if any(row[c] != NOTHING for row in rows)]
    return columns, [[row[c] for c in columns] for row in rows]


NOTHING = "–"


def _row(s: Summary, baseline: str) -> dict[str, str]:
    diverged = sum(not math.isfinite(x) for x in s.losses)
    if diverged:
        loss = f"{diverged} of {len(s.losses)} diverged"
    else:
        loss = f"{s.loss:.3f}" + ("" if s.spread is None else f" ± {s.spread:.3f}")
    reached = s.steps_to_target is not None and s.tokens_to_target is not None
    return {
        "method": s.method,
        "loss": loss,
        "seeds": f"{len(s.losses)}",
        "perplexity": _shown(s.perplexity, ".2f"),
        f"− {baseline}": NOTHING if s.method == baseline else _shown(s.difference, "+.3f"),
        "z": NOTHING if s.method == baseline else _shown(s.z, "+.1f"),
        "verdict": NOTHING if s.method == baseline else s.verdict,
        "steps to target": _shown(s.steps_to_target, ".0f") if reached else "not reached",
        "tokens to target": short_count(s.tokens_to_target or 0) if reached else NOTHING,
        "speed-up": _shown(s.speed_up, ".2f"),
        "state": short_bytes(s.state_bytes),
        "peak": NOTHING if s.peak_bytes is None else short_bytes(s.peak_bytes),
        "ms a step": _shown(s.step_seconds and 1e3 * s.step_seconds, ".1f"),
        "CPU ms a step": _shown(s.step_cpu_seconds and 1e3 * s.step_cpu_seconds, ".1f"),
        "learning rate": f"{s.learning_rate:.3g}",
        "÷ its": NOTHING if s.method == baseline else _shown(s.learning_rate_ratio, ".3g"),
        "settings tried": f"{s.settings}",
    }


def provenance(runs: Iterable[Run]) -> list[str]:
    """Sentences on the commands, machines and versions of runs."""
    found = []
    for field, title in (("command", "Command"), ("machine", "Machine"), ("versions", "Versions")):
        told = dict.fromkeys(_words(run[field]) for run in runs if run.get(field))
        if told:
            found.append(f"{title}: " + "; ".join(f"`{one}`" for one in told) + ".")
    return found


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    return str(value)


def _shown(value: float | None, form: str) -> str:
    return NOTHING if value is None or not math.isfinite(value) else format(value, form)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
