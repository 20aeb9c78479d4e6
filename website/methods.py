"""The page of each method, from the registry, its docstring and the committed results."""

import inspect
import io
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from benchmarks import convergence, traffic
from benchmarks.methods import MODELS, source
from benchmarks.results import RESULTS, read
from memopt.comparison.analysis import Summary, summarize
from memopt.comparison.records import read_records
from memopt.optimizers.by_partition import Common
from memopt.optimizers.registry import EXTRA_ARGUMENTS, METHODS
from website.algorithm import with_boxes

BASELINE = "adamw"
COMPARISON = RESULTS / "compare.jsonl"
METHOD, OTHER, GRAY = "#0072B2", "#D55E00", "#808080"  # of Okabe and Ito; gray on light and dark


@cache
def rows(name: str) -> list[dict[str, Any]]:
    """The results in a file of `benchmarks/results`."""
    return read(RESULTS / f"{name}.json")["results"]


@cache
def experiments() -> list[list[Summary]]:
    """Returns the tuned methods of each experiment of the committed comparison."""
    return summarize(read_records(COMPARISON)) if COMPARISON.exists() else []


def table(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, with all columns on the left."""
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sections(name: str) -> dict[str, str]:
    """The sections of a method's docstring: their text by name, under "" what is before them."""
    parts = re.split(r"^(\w+):\n", inspect.getdoc(METHODS[name].make) or "", flags=re.MULTILINE)
    texts = map(textwrap.dedent, parts[2::2])
    return {"": parts[0]} | dict(zip(parts[1::2], texts, strict=True))


def title(name: str) -> str:
    """The method's name as its authors write it."""
    return sections(name)[""].partition(":")[0]


def page(name: str) -> str:
    """The Markdown of a method's page."""
    said = sections(name)
    first, _, more = said[""].partition("\n\n")
    summary = " ".join(first.partition(":")[2].split())
    parts = [
        f"# {title(name)}",
        f"[](){{ #memopt.{name} }}",
        summary[:1].upper() + summary[1:],
        facts(name),
        with_boxes(more),
        f"## Options\n\n{_signature(name)}\n\n{options(name)}",
        f"## Paper and code\n\n{_paper_and_code(name)}",
        f"## Measured\n\n{measured(name)}",
        f"## Example\n\n```pycon\n{said['Example'].strip()}\n```",
    ]
    if "Raises" in said:
        parts.append(f"## Errors\n\n{_entries(said['Raises'])}")
    parts.append(f"## References\n\n{_linked(said['References'])}")
    return "\n\n".join(parts) + "\n"


def facts(name: str) -> str:
    """A table of what to know first."""
    method = METHODS[name]
    found = [
        ("choose it for", method.when),
        ("function", f"`memopt.{name}(learning_rate, …)`"),
        ("state of an m×n matrix", f"{method.state} numbers; p ≤ q are its sides"),
        *((f"state of LLaMA-{model}", size) for model, size in _sizes(name)),
        ("learning rate", f"{method.learning_rate:g} for LLaMAs of a few million parameters"),
        ("source", source(name)),
    ]
    if method.needs:
        needed = f"`{method.needs}`, {EXTRA_ARGUMENTS[method.needs]}"
        found.append(("its update needs", needed))
    return table(("", ""), found)


def _sizes(name: str) -> list[tuple[str, str]]:
    kept = {(r["optimizer"], r["model"]): r["state_bytes"] for r in rows("state_bytes")}
    say = lambda b: f"{b / 1e9:.1f} GB" if b >= 1e9 else f"{b / 1e6:.1f} MB" if b else "none"
    return [
        (model, f"{say(kept[name, model])}, where AdamW keeps {say(kept[BASELINE, model])}")
        for model in MODELS
        if (name, model) in kept
    ]


def _signature(name: str) -> str:
    method = METHODS[name]
    rate = inspect.signature(method.make).parameters["learning_rate"]
    given = [str(rate.replace(annotation=rate.empty)), "*"]
    given += [f"{option}={_default(value)}" for option, value in _own_options(name).items()]
    lines = "".join(f"    {one},\n" for one in [*given, "**common"])
    return f"```python\nmemopt.{name}(\n{lines})\n```"


def _own_options(name: str) -> dict[str, Any]:
    common = Common.__annotations__
    return {key: x for key, x in METHODS[name].defaults.items() if key not in common}


def _default(value: Any) -> str:
    if isinstance(value, tuple | list) or not callable(value):
        return repr(value)
    return str(getattr(value, "__name__", value))


def options(name: str) -> str:
    """A table of the options, those that every method has last."""
    method, own = METHODS[name], _own_options(name)
    default = lambda key: f"`{_default(method.defaults[key])}`" if key in own else ""
    shown = [key for key in method.help if key == "learning_rate" or key in method.defaults]
    shown.sort(key=lambda key: key != "learning_rate" and key not in own)  # stable
    cells = [
        (f"`{key}`", default(key), method.help[key].replace("|", r"\|"))
        for key in shown
        if key != "as_released"
    ]
    return table(("option", "default", "meaning"), cells)


def _paper_and_code(name: str) -> str:
    text = METHODS[name].help["as_released"]
    if text.startswith("has no effect"):
        said = f"`as_released=True` {text}"
    else:
        said = f"The paper is the default. `as_released=True`: {text}"
    runs = [r for r in rows("parity") if r["method"] == name]
    if not runs:
        return said
    errors = table(
        ("recorded run", "of", "largest error"),
        [(f"`{r['run']}`", r["from"], f"{r['error']:.1e}") for r in runs],
    )
    return (
        f"{said}\n\nErrors against runs recorded from others' code, relative to how far the "
        f"parameter has moved (`python -m benchmarks.parity`):\n\n{errors}"
    )


def measured(name: str) -> str:
    """Figures from the result files: loss, traffic, time and errors."""
    found = [*_loss(name), *_traffic(name), *_time(name)]
    found.append(
        "[Guarantees](../guarantees.md) says how it behaves with zeros, NaN, scalars and more; "
        "[Combinations](../combinations.md) which wrappers it works in."
    )
    return "\n\n".join(found)


def _loss(name: str) -> list[str]:
    found = []
    for summary, baseline in _compared(name):
        against = f", AdamW's {baseline.loss:.3f}" if baseline else ""
        found.append(
            f"Validation loss of the LLaMA of {summary.run['size']} parameters, each optimizer "
            f"tuned ([with which budget](../comparison.md#protocol)): {summary.loss:.3f}{against} "
            f"(`memopt compare`, {summary.run['steps']} steps, {len(summary.losses)} seeds). "
            "[Choose an optimizer](../choosing.md#limits) says what follows from it.\n\n"
            f"![Loss over steps and learning rates]({name}-{summary.run['size']}.svg)"
        )
    at = convergence.losses(rows("convergence"), name)
    if at and not found:
        best = min(at, key=lambda rate: at[rate])
        adamw = min(convergence.losses(rows("convergence"), BASELINE).values())
        found.append(
            f"On a small LLaMA ([convergence](../convergence.md)) its best loss is {at[best]:.3f}, "
            f"at a learning rate of {2.0**best:.2g}; AdamW's is {adamw:.3f}."
        )
        found.append(f"![Loss by learning rate]({name}-rates.svg)")
    return found


def _compared(name: str) -> list[tuple[Summary, Summary | None]]:
    """A method's summaries, each with the baseline's of the same experiment."""
    found = []
    for group in experiments():
        named = {s.run["method"]: s for s in group if math.isfinite(s.loss)}
        if name in named:
            found.append((named[name], named.get(BASELINE) if name != BASELINE else None))
    return found


def pictures(name: str) -> dict[str, str]:
    """The pictures of a method's page: SVGs by name."""
    found = {}
    for summary, baseline in _compared(name):
        shown = [one for one in (summary, baseline) if one]
        found[f"{name}-{summary.run['size']}.svg"] = _draw(
            [
                ("steps", {one.run["method"]: one.curve for one in shown}),
                ("learning rate", {one.run["method"]: one.sensitivity for one in shown}),
            ]
        )
    at = convergence.losses(rows("convergence"), name)
    if at and not found:
        curves = {
            one: [(2.0**rate, loss) for rate, loss in sorted(losses.items())]
            for one, losses in (
                (name, at),
                (BASELINE, convergence.losses(rows("convergence"), BASELINE)),
            )
        }
        found[f"{name}-rates.svg"] = _draw([("learning rate", curves)])
    return found


def _draw(panels: Sequence[tuple[str, Mapping[str, Sequence[tuple[float, float]]]]]) -> str:
    """Draws losses as an SVG that can be read on light and on dark pages."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colors: dict[Any, Any] = {"text.color": GRAY, "axes.edgecolor": GRAY, "axes.labelcolor": GRAY}
    colors |= {"xtick.color": GRAY, "ytick.color": GRAY}
    with rc_context(colors | {"svg.hashsalt": "memopt", "font.size": 9}):
        figure = Figure(figsize=(4.2 * len(panels), 2.8), layout="constrained")
        figure.patch.set_alpha(0)
        for axes, (label, curves) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            axes.patch.set_alpha(0)
            for color, (method, points) in zip((METHOD, OTHER), curves.items(), strict=False):
                x, y = zip(*[p for p in points if math.isfinite(p[1])], strict=True)
                axes.plot(x, y, color=color, marker="." if label != "steps" else "", label=method)
            if label == "learning rate":
                axes.set_xscale("log", base=2)
            axes.set(xlabel=label, ylabel="validation loss (nats)")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _traffic(name: str) -> list[str]:
    moved = {r["optimizer"]: r for r in traffic.of_case(rows("traffic"), "stacked", "float32")}
    if name not in moved:
        return []
    return [
        f"A step without a refresh moves {moved[name]['traffic']:.2f} times the bytes of the "
        f"parameters, stacked in float32, in the main memory of a TPU {moved[name]['chip']}, where "
        f"AdamW moves {moved[BASELINE]['traffic']:.2f} (`python -m benchmarks.traffic`, "
        f"[figures](../benchmarks/results/traffic.json))."
    ]


def _time(name: str) -> list[str]:
    for file in ("step_time", "step_time_methods"):
        report = read(RESULTS / f"{file}.json")
        for r in report["results"]:
            if (r["name"], r["library"]) == (name, "memopt"):
                ratio = r["ratio"]
                return [
                    f"The step of all parameters of LLaMA-{report['model']} takes "
                    f"{ratio['median']:.2f} times as long as AdamW's ({ratio['min']:.2f}–"
                    f"{ratio['max']:.2f}) on {report['cores']} cores of a CPU "
                    f"(`{report['command']}`, [figures](../benchmarks/results/{file}.json))."
                ]
    return []


def _entries(text: str) -> str:
    """The entries of a section as a list."""
    found = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    items = (" ".join(one.split()).partition(":") for one in found if one.strip())
    return "\n".join(f"- `{name}`:{said}" for name, _, said in items)


def _linked(text: str) -> str:
    return re.sub(r"https://[^\s,;]+[^\s,;.]", r"<\g<0>>", " ".join(text.split()))
