r"""Suggest a learning rate and a batch by published laws, and say where they disagree.

Each law is a line of the table: the highest learning rate and the batch that it recommends for the
model and the tokens, and whether they are inside of the range in which somebody has checked it. The
lines below say what each is computed from. The choice is yours: a law that is OUTSIDE of its range
is an extrapolation.

Examples:
  memopt suggest --model 130m --tokens 2.2B
  memopt suggest --model 130m --tokens 2.2B --batch-size 256 --seq-len 1024 --optimizer lion
  memopt suggest --tokens 300M --run runs/books
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table
from tyro import conf

from memopt.cli import listing
from memopt.cli.arguments import Step
from memopt.cli.errors import failing
from memopt.errors import check_at_least
from memopt.models import llama
from memopt.optimizers.registry import find_method
from memopt.schedules import laws
from memopt.training.load import LoadedModel, load_run
from memopt.training.noise import MeasuredNoise, measure_noise, summarize_run

#: What a number of tokens may end with.
SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `memopt suggest`.

    Attributes:
        tokens: Tokens to train on, such as 2.2B, 300M or 1e9.
        model: Name of a model, as for `memopt pretrain`, such as 130m; if left out, that of the
            run.
        run: Directory of a run, in whose data the noise of its gradient is measured; from it, more
            laws recommend.
        batch_size: Rows of a batch, if it is decided already; if left out, the laws choose.
        seq_len: Tokens of a row; if left out, those of the run, or the longest of the model up to
            2048.
        optimizer: The optimizer to use; if left out, that of the run, or adamw.
        json: Print JSON.
    """

    tokens: Annotated[str, conf.arg(metavar="TOKENS")]
    model: Annotated[str | None, conf.arg(metavar="NAME", help_behavior_hint="")] = None
    run: Annotated[Path | None, conf.arg(metavar="RUN", help_behavior_hint="")] = None
    step: Step = "last"
    batch_size: Annotated[int | None, conf.arg(metavar="ROWS", help_behavior_hint="")] = None
    seq_len: Annotated[int | None, conf.arg(metavar="TOKENS", help_behavior_hint="")] = None
    optimizer: Annotated[
        str | None, conf.arg(metavar="NAME|MODULE:FUNCTION", help_behavior_hint="")
    ] = None
    json: bool = False


def suggest(arguments: list[str]) -> None:
    """Runs `memopt suggest` with these arguments."""
    config = (conf.FlagCreatePairsOff,)
    options = tyro.cli(
        Options, prog="memopt suggest", description=__doc__, args=arguments, config=config
    )
    with failing():
        found = suggestions(options)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)


def parse_tokens(text: str) -> float:
    """Reads a number of tokens.

    Raises:
        ValueError: It is not a number of at least 1.

    Example:
        >>> parse_tokens("2.2B"), parse_tokens("300m"), parse_tokens("1e9")
        (2200000000.0, 300000000.0, 1000000000.0)
    """
    number, factor = text.strip(), 1.0
    if number[-1:].upper() in SUFFIXES:
        number, factor = number[:-1], SUFFIXES[number[-1].upper()]
    try:
        tokens = float(number) * factor
    except ValueError:
        tokens = math.nan
    if not (1 <= tokens < math.inf):
        raise ValueError(f"tokens must be a number such as 2.2B, 300M or 1e9, got {text!r}.")
    return tokens


def suggestions(options: Options) -> dict[str, Any]:
    """Returns what each law recommends and where they disagree, JSON-serialisable.

    Args:
        options: Those of the command.

    Raises:
        ValueError: An option cannot work, or the run cannot be measured.
    """
    tokens = parse_tokens(options.tokens)
    if options.optimizer is not None:
        find_method(options.optimizer)
    for name in ("batch_size", "seq_len"):
        check_at_least(name, getattr(options, name), 1)
    if options.model is None and options.run is None:
        raise ValueError("model must be given, such as --model 130m, unless --run is.")
    model = None if options.model is None else llama.preset(options.model)
    loaded = None if options.run is None else load_run(options.run, options.step, dequantize=True)
    of_run = loaded.config.optimization.optimizer if loaded and loaded.config else None
    optimizer = options.optimizer or of_run or "adamw"
    if loaded and model is None:
        model = loaded.model_config
    assert model
    seq_len = options.seq_len or min(model.max_seq_len, 2048)
    if loaded and loaded.config and not options.seq_len:
        seq_len = loaded.config.text.seq_len
    if seq_len > model.max_seq_len:
        raise ValueError(
            f"seq_len={seq_len} is longer than the {model.max_seq_len} tokens that the model takes."
        )
    given = options.batch_size and float(options.batch_size * seq_len)
    if max(given or 0, seq_len) > tokens:
        raise ValueError(
            f"tokens={options.tokens} is less than one batch of {options.batch_size or 1} rows of "
            f"{seq_len} tokens: give more."
        )
    parameters = llama.count_block_params(model)
    noise = None if loaded is None else measure_noise(loaded)
    found = laws.suggest(
        parameters,
        tokens,
        width=model.hidden_size,
        optimizer=optimizer,
        batch_tokens=given,
        run=summarize_run(loaded, noise) if loaded and noise else None,
    )
    found.append(
        laws.Suggestion(
            law=f"default of {optimizer}",
            learning_rate=find_method(optimizer).learning_rate,
            source="memopt optimizers",
            range="no law; tuned on a small LLaMA, docs/convergence.md",
            outside=None,
        )
    )
    return {
        "model": options.model or f"that of {options.run}",
        "parameters": parameters,
        "tokens": tokens,
        "seq_len": seq_len,
        "optimizer": optimizer,
        "laws": [_describe_law(suggestion, tokens, seq_len) for suggestion in found],
        "not_used": laws.unused_laws(optimizer, given, of_run),
        "noise": _describe_noise(loaded, noise) if loaded and noise else None,
        "disagreements": laws.disagreements(found, given),
    }


def _describe_law(suggestion: laws.Suggestion, tokens: float, seq_len: int) -> dict[str, Any]:
    """A suggestion with its batch in rows and the steps of the run, too."""
    batch = suggestion.batch_tokens
    rows = None if batch is None else max(1, round(batch / seq_len))
    steps = None if rows is None else max(1, round(tokens / rows / seq_len))
    return dataclasses.asdict(suggestion) | {"batch_rows": rows, "steps": steps}


def _describe_noise(loaded: LoadedModel, noise: MeasuredNoise) -> dict[str, Any]:
    return {
        "run": str(loaded.path),
        "step": loaded.step,
        "loss": noise.loss,
        "rows": _finite(noise.by_rows.batch),
        "low": _finite(noise.low),
        "high": _finite(noise.high),
        "rows_by_sizes": _finite(noise.by_sizes.batch),
        "tokens_per_row": noise.tokens_per_row,
        "micro_batches": noise.micro_batches,
    }


def _finite(x: Any) -> Any:
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _show(found: dict[str, Any]) -> None:
    console = listing.make_console()
    console.print(
        f"model {found['model']}: N = {found['parameters']:,} parameters without embedding and "
        f"head; {found['tokens']:,.0f} tokens in rows of {found['seq_len']:,}; {found['optimizer']}"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("law", "rate", "batch: tokens", "rows", "steps", "range"):
        table.add_column(column, no_wrap=True)
    for law in found["laws"]:
        rate = law["learning_rate"]
        sizes = [law["batch_tokens"], law["batch_rows"], law["steps"]]
        table.add_row(
            law["law"],
            "" if rate is None else f"{rate:.2e}",
            *("" if x is None else f"{x:,.0f}" for x in sizes),
            {None: "unknown", "": "inside"}.get(law["outside"], "OUTSIDE"),
        )
    console.print(table)
    for law in found["laws"]:
        line = f"{law['law']}: from {law['source']}. Range: {law['range']}."
        console.print(line + (f" OUTSIDE: {law['outside']}." if law["outside"] else ""))
    for line in found["not_used"]:
        console.print(line)
    if noise := found["noise"]:
        shown = {
            k: "no finite number" if x is None else f"{x:,.1f}"
            for k, x in noise.items()
            if k in ("rows", "rows_by_sizes", "low", "high")
        }
        console.print(
            f"The noise scale of {noise['run']}, step {noise['step']}, at loss {noise['loss']:.4f} "
            f"is {shown['rows']} rows (90%: {shown['low']} to {shown['high']}), "
            f"{shown['rows_by_sizes']} by batches of 1, 4 and 16 rows; measured in "
            f"{noise['micro_batches']} micro-batches of one row of {noise['tokens_per_row']:,.0f} "
            "tokens. It grows as the loss falls: later in training, larger batches pay."
        )
    for line in found["disagreements"]:
        console.print(line)
