"""Tables of compared optimizers in Markdown, JSON and the terminal."""

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from memopt.comparison.records import RESULTS, TARGETS, read_records
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
) -> list["Section"]:
    """Writes the tables and pictures of a comparison.

    Args:
        directory: The directory to write into: `report.md`, `report.json`, and, as soon as there
            are tuned runs, `front.png`, `curves.png` and `sensitivity.png`. Runs to a target loss
            are read from `targets.jsonl` there.
        runs: The file of runs, by default `compare.jsonl` in the directory.
        baseline: The method with which others are compared.
        target_loss: As of `summarize`.
        peak_bytes: As of `summarize`.

    Returns:
        The tables.

    Raises:
        ValueError: If there is no file of runs.
        OSError: If a file cannot be written.
    """
    paths = runs or directory / RESULTS, directory / TARGETS
    if not any(path.is_file() for path in paths):
        raise ValueError(f"{paths[0]} is not a file: nothing was compared yet.")
    found, to_target = map(read_records, paths)
    summaries = summarize(found, baseline=baseline, target_loss=target_loss, peak_bytes=peak_bytes)
    shown = sections(summaries, to_target, baseline)
    text = markdown(shown, baseline=baseline, runs=[*found, *to_target])
    write_whole(directory / "report.md", text.encode())
    write_whole(directory / "report.json", to_json(summaries).encode())
    if summaries:
        for plot, name in (
            (plot_front, "front"),
            (plot_curves, "curves"),
            (plot_sensitivity, "sensitivity"),
        ):
            plot(by_size(summaries), directory / f"{name}.png", baseline)
    return shown


def by_size(summaries: Iterable[Summary]) -> list[list[Summary]]:
    """The summaries of each experiment, such as those of a size and a batch size."""
    return [list(group) for _, group in itertools.groupby(summaries, lambda s: s.experiment)]


class Section(NamedTuple):
    """A table with its title.

    Attributes:
        title: The title.
        columns: The names of the columns.
        rows: The rows, from the best to the worst.
        remark: A sentence below it, or "".
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    remark: str = ""


def sections(
    summaries: Sequence[Summary], to_target: Sequence[Run] = (), baseline: str = BASELINE
) -> list[Section]:
    """The tables of a comparison, one for each size and batch size.

    Args:
        summaries: The losses after a given number of steps.
        to_target: Runs whose number of steps was sought for a loss.
        baseline: The method with which others are compared.
    """
    found = []
    for group in by_size(summaries):
        first, remark = group[0], ""
        if told := [s.least_difference for s in group if s.least_difference is not None]:
            remark = (
                f"Differences below {statistics.median(told):.3f}, the median over methods, cannot "
                "be told from chance."
            )
        if left_out := sum(s.left_out for s in group):
            remark = f"{remark} {left_out} runs of earlier settings are left out.".strip()
        title = (
            f"{first.size} parameters, {first.steps} steps of {first.batch_size} rows, "
            f"{short_count(first.tokens)} tokens"
        )
        found.append(Section(title, *_cells(group, baseline), remark))
    counted = [run for run in to_target if run["tuned"]]
    key = lambda run: (run["size"], run["batch_size"], run["target_loss"])
    for (size, rows, loss), of in itertools.groupby(sorted(counted, key=key), key):
        title = f"Fewest steps to a loss of {loss:g}, {size} parameters, {rows} rows a batch"
        found.append(Section(title, *_cells_to_target(list(of))))
    return found


def _cells_to_target(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the methods that came to a loss, those with the fewest steps first."""
    rows = []
    key = lambda run: (run["steps"], run["method"])
    for (steps, method), of in itertools.groupby(sorted(runs, key=key), key):
        seeds = list(of)
        losses = [math.inf if run["val_loss"] is None else run["val_loss"] for run in seeds]
        reached = sum(loss <= run["target_loss"] for loss, run in zip(losses, seeds, strict=True))
        first = seeds[0]
        rows.append(
            [
                *(method, str(steps), short_count(first["tokens"])),
                f"{reached} of {len(seeds)}",
                short_bytes(first["state_bytes"]),
                f"{first['learning_rate']:.3g}",
            ]
        )
    return ["method", "steps", "tokens", "seeds that reach it", "state", "learning rate"], rows


def markdown(
    shown: Sequence[Section], *, baseline: str = BASELINE, runs: Iterable[Run] = ()
) -> str:
    """The tables in Markdown.

    Args:
        shown: The tables.
        baseline: The method with which others are compared.
        runs: All runs, for their commands, machines and versions, and for what is not finished.
    """
    runs = list(runs)
    parts = ["# Optimizers compared", RULE.format(baseline=baseline)]
    for section in shown:
        head = f"|---|{'--:|' * (len(section.columns) - 1)}"
        first, *rows = (f"| {' | '.join(row)} |" for row in (section.columns, *section.rows))
        parts += [f"## {section.title}", "\n".join([first, head, *rows])]
        parts += [section.remark] if section.remark else []
    for (size, batch, method), count in unfinished(runs).items():
        parts.append(f"{method} at {size}, batches of {batch}: {count} runs, none tuned yet.")
    parts += provenance(runs)
    return "\n\n".join(parts) + "\n"


def to_json(summaries: Sequence[Summary]) -> str:
    """The summaries as a JSON list; what is not finite is null."""
    return json.dumps([_plain(dataclasses.asdict(s)) for s in summaries], indent=1) + "\n"


#: Columns of the files alone: a terminal has no room for them.
ONLY_IN_FILES = {"seeds", "perplexity", "z", "steps to target", "tokens to target", "peak"}
ONLY_IN_FILES |= {"ms a step", "CPU ms a step", "rate ÷ the baseline's", "settings tried"}


def tables(shown: Sequence[Section]) -> list[Table]:
    """The tables for the terminal, of the columns that fit 80 characters."""
    found = []
    for section in shown:
        table = Table(title=section.title, caption=section.remark, box=SIMPLE_HEAD, pad_edge=False)
        kept = [i for i, name in enumerate(section.columns) if name not in ONLY_IN_FILES]
        for i in kept:
            table.add_column(section.columns[i], justify="right" if i else "left", no_wrap=i > 0)
        for row in section.rows:
            table.add_row(*(row[i] for i in kept))
        found.append(table)
    return found


def _cells(summaries: Sequence[Summary], baseline: str) -> tuple[list[str], list[list[str]]]:
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
    tells = s.method == baseline or s.verdict in ("better", "worse")
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
        "speed-up": _shown(s.speed_up, ".2f") if tells else NOTHING,
        "state": short_bytes(s.state_bytes),
        "peak": NOTHING if s.peak_bytes is None else short_bytes(s.peak_bytes),
        "ms a step": _shown(s.step_seconds and 1e3 * s.step_seconds, ".1f"),
        "CPU ms a step": _shown(s.step_cpu_seconds and 1e3 * s.step_cpu_seconds, ".1f"),
        "learning rate": f"{s.learning_rate:.3g}",
        "rate ÷ the baseline's": NOTHING
        if s.method == baseline
        else _shown(s.learning_rate_ratio, ".3g"),
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
