"""Names of experiments, and numbers in few characters."""

import math
from collections.abc import Sequence

from memopt.comparison.records import Run

#: Shown in place of a number that is not known.
NOTHING = "–"


def experiment_name(run: Run, *, among: Sequence[Run]) -> str:
    """Returns what the runs of an experiment have in common, in a few words.

    Args:
        run: A run of the experiment.
        among: Runs of all experiments that are shown: fields which are alike in all are left out,
            except for the most important.

    Example:
        >>> run = {"size": "2M", "steps": 400, "batch_size": 8, "seq_len": 64, "tokens": 204800}
        >>> run |= {"text": "42a9ff", "eval_tokens": 16384, "parameters": 1_900_000}
        >>> experiment_name(run, among=[run])
        '2M parameters, 400 steps of 8×64 tokens, 205k in all'
        >>> experiment_name(run, among=[run, run | {"text": "1fe77a"}])
        '2M parameters, 400 steps of 8×64 tokens, 205k in all, text 42a9ff'
    """
    parts = [f"{run['size']} parameters"]
    parts.append(f"{run['steps']} steps of {run['batch_size']}×{run['seq_len']} tokens")
    parts.append(f"{short_count(run['tokens'])} in all")
    if len({other["text"] for other in among}) > 1:
        parts.append(f"text {run['text'][:6]}")
    if len({other["eval_tokens"] for other in among}) > 1:
        parts.append(f"evaluated on {short_count(run['eval_tokens'])}")
    if len({other["parameters"] for other in among if other["size"] == run["size"]}) > 1:
        parts.append(f"{short_count(run['parameters'])} exactly")
    return ", ".join(parts)


def short_number(value: float | None, form: str) -> str:
    """Returns a number in a format, `NOTHING` for none and for one that is not finite.

    Example:
        >>> short_number(2.5, "+.2f"), short_number(None, "+.2f"), short_number(math.inf, ".1f")
        ('+2.50', '–', '–')
    """
    return NOTHING if value is None or not math.isfinite(value) else format(value, form)


def short_count(count: float) -> str:
    """Returns a count in few characters.

    Example:
        >>> short_count(512), short_count(2_457_600)
        ('512', '2.46M')
    """
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"


def short_bytes(count: float) -> str:
    """Returns bytes in few characters, in decimal units.

    Example:
        >>> short_bytes(0), short_bytes(1e4), short_bytes(1.5e9)
        ('0', '10 kB', '1.5 GB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{float(f'{count / unit:.3g}'):g} {name}"
    return f"{count:.0f} B" if count else "0"


def short_name(method: str) -> str:
    """Returns the name of a row without the module of a user's function.

    Example:
        >>> short_name("mypackage.optimizers:mine, factor=0.1"), short_name("muon, state int8")
        ('mine, factor=0.1', 'muon, state int8')
    """
    optimizer, comma, options = method.partition(", ")
    return optimizer.rpartition(":")[2] + comma + options
