r"""Suggest a learning rate and a batch by published laws, and say where they disagree.

Examples:
  memopt suggest --model 130m --tokens 2.2B
  memopt suggest --model 130m --tokens 2.2B --batch-size 256 --seq-len 1024 --optimizer lion
  memopt suggest --tokens 300M --run runs/books
"""

import dataclasses
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.table import Table
from tyro import conf

from memopt.cli import listing
from memopt.cli.arguments import Step
from memopt.cli.errors import fail
from memopt.errors import check_at_least, check_choice
from memopt.models import llama
from memopt.optimizers import available
from memopt.optimizers.registry import METHODS
from memopt.schedules import laws
from memopt.schedules.laws.power_law import POWER_RANGES
from memopt.schedules.laws.ranges import outside
from memopt.schedules.laws.step_law import STEP_LAW_RANGES
from memopt.training.load import LoadedModel, load_run
from memopt.training.noise import MeasuredNoise, measure_noise

#: What a number of tokens may end with.
SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}

#: Optimizers that Step Law was fitted with, and those that surge was derived for or checked with.
STEP_LAW_OPTIMIZERS, SURGE_OPTIMIZERS = ("adamw",), ("adam", "adamw", "lion")

#: Those that the power law holds for.
ADAM = ("adam", "adamw")

#: Two recommendations disagree if they differ by more than this factor.
SAME = 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `memopt suggest`.

    Attributes:
        model: A model, as for `memopt pretrain`; by default that of the run.
        tokens: Tokens to train on, such as 2.2B, 300M or 1e9.
        batch_size: Rows of a batch that is given; by default the laws choose.
        seq_len: Tokens of a row; by default those of the run, or the model's longest up to 2048.
        optimizer: The optimizer to use; by default that of the run, or adamw.
        run: A run in whose data the noise of the gradient is measured, at its parameters.
        json: Print JSON.
    """

    tokens: str
    model: str | None = None
    batch_size: Annotated[int | None, conf.arg(metavar="INT")] = None
    seq_len: Annotated[int | None, conf.arg(metavar="INT")] = None
    optimizer: str | None = None
    run: Annotated[Path | None, conf.arg(metavar="RUN")] = None
    step: Step = "last"
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Recommendation of one law.

    Attributes:
        law: Its name.
        learning_rate: The highest learning rate; None if it says nothing of it.
        batch_tokens: Tokens of a batch; None if it says nothing of it.
        source: What it is computed from.
        range: Where it holds.
        outside: Why this point is outside of its range, "" if it is inside; None if no range is
            known.
        compared: Whether it counts where disagreements are sought.
    """

    law: str
    learning_rate: float | None = None
    batch_tokens: float | None = None
    source: str
    range: str
    outside: str | None = ""
    compared: bool = True


def suggest(arguments: list[str]) -> None:
    """Runs `memopt suggest` with these arguments."""
    config = (conf.FlagCreatePairsOff,)
    options = tyro.cli(
        Options, prog="memopt suggest", description=__doc__, args=arguments, config=config
    )
    try:
        found = suggestions(options)
    except (ValueError, ImportError, OSError) as error:
        fail(error)
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


def count_parameters(model: llama.LlamaConfig) -> int:
    """Counts the parameters of a model without its embedding and head.

    Example:
        >>> count_parameters(llama.preset("130m"))
        84953856
    """
    params = llama.abstract_params(model)
    parts = [part for name, part in params.items() if name not in ("embed", "head")]
    return sum(math.prod(x.shape) for x in jax.tree.leaves(parts))


def suggestions(options: Options) -> dict[str, Any]:
    """Returns what each law recommends and where they disagree, JSON-serialisable.

    Args:
        options: Those of the command.

    Raises:
        ValueError: An option cannot work, or the run cannot be measured.
    """
    tokens = parse_tokens(options.tokens)
    if options.optimizer is not None:
        check_choice("optimizer", options.optimizer, available())
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
    parameters = count_parameters(model)
    with warnings.catch_warnings():  # the table says it
        warnings.simplefilter("ignore", laws.OutsideRangeWarning)
        rows = _by_size(model, parameters, tokens, given, optimizer)
        noise = None
        if loaded:
            noise = measure_noise(loaded)
            rows += _by_noise(loaded, noise, tokens, given, optimizer)
    laws_found = []
    for row in rows:
        batch = row.batch_tokens
        sizes: dict[str, int | None] = {"batch_rows": None, "steps": None}
        if batch is not None and math.isfinite(batch):
            batch_rows = max(1, round(batch / seq_len))
            sizes = {
                "batch_rows": batch_rows,
                "steps": max(1, round(tokens / batch_rows / seq_len)),
            }
        shown = {name: _finite(x) for name, x in dataclasses.asdict(row).items()}
        laws_found.append(shown | sizes)
    return {
        "model": options.model or f"that of {options.run}",
        "parameters": parameters,
        "tokens": tokens,
        "seq_len": seq_len,
        "optimizer": optimizer,
        "laws": laws_found,
        "not_used": _not_used(optimizer, given, of_run),
        "noise": None if loaded is None or noise is None else _describe_noise(loaded, noise),
        "disagreements": disagreements(rows, given),
    }


def _by_size(
    model: llama.LlamaConfig, parameters: int, tokens: float, given: float | None, optimizer: str
) -> list[Suggestion]:
    """Recommendations that need only the sizes of model and data."""
    rows = []
    batch = given
    if optimizer in STEP_LAW_OPTIMIZERS:
        rate, best = laws.step_law(parameters, tokens)
        why = outside(STEP_LAW_RANGES, parameters=parameters, tokens=tokens)
        step: dict[str, Any] = {
            "range": "AdamW, N 200M to 1.1B, 2B to 100B tokens",
            "outside": "; ".join(why),
        }
        source = "N and the tokens"
        rows.append(
            Suggestion(law="Step Law", learning_rate=rate, batch_tokens=best, source=source, **step)
        )
        if given:
            factor = given / best
            rows.append(
                Suggestion(
                    law="Step Law, √batch",
                    learning_rate=laws.sqrt_rule(rate, factor),
                    batch_tokens=given,
                    source="Step Law and Adam's batch-size invariance: η √k and k (1 − β), "
                    f"k = {factor:.2g}",
                    range="as Step Law, and batches below the critical one",
                    outside=step["outside"],
                )
            )
        batch = given or best
    if optimizer in ADAM and batch:
        seen = tokens / 2
        width = model.hidden_size / 256
        rate = laws.power(seen, batch / 4096)
        why = outside(POWER_RANGES, tokens_seen=seen)
        if width < 1:
            why = [*why, f"width={model.hidden_size} is below the base width 256"]
        rows.append(
            Suggestion(
                law="power",
                learning_rate=rate / width,
                batch_tokens=batch,
                source=f"half of the tokens seen: {rate:.2g} ÷ {width:g}, as µP does for matrices",
                range="µP only, 1B to 1.25T tokens seen",
                outside="; ".join(why),
            )
        )
    rows.append(
        Suggestion(
            law=f"default of {optimizer}",
            learning_rate=METHODS[optimizer].learning_rate,
            source="memopt optimizers",
            range="tuned on a small LLaMA, docs/convergence.md; no law",
            outside=None,
        )
    )
    return rows


def _by_noise(
    loaded: LoadedModel, noise: MeasuredNoise, tokens: float, given: float | None, optimizer: str
) -> list[Suggestion]:
    """Recommendations from the noise that was measured in a run."""
    assert loaded.config
    assert loaded.step is not None
    text = loaded.config.text
    per_row = noise.tokens_per_row
    scale = noise.by_rows.batch * per_row
    at = f"the run at loss {noise.loss:.3f}"
    is_clear = math.isfinite(scale) and scale > 0
    hidden = "" if is_clear else "the noise hides the gradient: no finite batch"
    rows = [
        Suggestion(
            law="noise scale",
            batch_tokens=scale if is_clear else None,
            source=at,
            range="this loss: it grows as the loss falls",
            outside=hidden,
        )
    ]
    seen = float(loaded.step * text.batch_size * text.seq_len)
    own = float(text.batch_size * per_row)
    if optimizer in SURGE_OPTIMIZERS and loaded.config.optimization.optimizer == optimizer:
        used = loaded.config.highest_learning_rate
        if is_clear:
            peak = laws.surge_peak([own], [used], scale)
            batch = given or scale
            beyond = outside({"batch": (0, scale)}, batch=batch)
            rows.append(
                Suggestion(
                    law="surge",
                    learning_rate=laws.surge(batch, scale, peak),
                    batch_tokens=batch,
                    source=f"{at}, if its rate {used:g} is the best for its {own:,.0f} tokens",
                    range="batches far below πσ²/2µ²; sign-like updates",
                    outside="; ".join(beyond),
                )
            )
    rows.append(
        Suggestion(
            law="critical batch (Kaplan)",
            batch_tokens=laws.critical_batch(noise.loss),
            source=at,
            range="WebText2 in 50257 subwords, losses 2.5 to 7",
            outside=""
            if loaded.model_config.vocab_size >= 10_000 and 2.5 <= noise.loss <= 7
            else f"loss {noise.loss:.3g} with a vocabulary of {loaded.model_config.vocab_size}",
            compared=loaded.model_config.vocab_size >= 10_000,
        )
    )
    if is_clear and seen:
        rows.append(
            Suggestion(
                law="Time Transfer (weak)",
                batch_tokens=laws.time_transfer(scale, seen, tokens),
                source=f"the noise scale after {seen:,.0f} tokens, in proportion",
                range="weak evidence, not recommended",
                outside=None,
                compared=False,
            )
        )
    return rows


def _not_used(optimizer: str, given: float | None, of_run: str | None) -> list[str]:
    """Says which laws do not apply, and why.

    Args:
        optimizer: The optimizer.
        given: The batch that the user gave, in tokens.
        of_run: The optimizer of the run, if there is one.
    """
    found = []
    if optimizer not in STEP_LAW_OPTIMIZERS:
        found.append(f"Step Law is not for {optimizer}: it was fitted with AdamW.")
    if optimizer not in ADAM:
        found.append(f"The power law is not for {optimizer}: it was fitted with Adam under µP.")
    elif optimizer not in STEP_LAW_OPTIMIZERS and not given:
        found.append("The power law needs a batch: give --batch-size.")
    if of_run is None:
        found.append("Surge, the noise scale and the critical batch need a run: give --run.")
    elif optimizer not in SURGE_OPTIMIZERS:
        found.append(
            f"Surge is not for {optimizer}: it was derived for updates by the sign of the gradient."
        )
    elif of_run != optimizer:
        found.append(f"Surge needs a good learning rate of {optimizer}: the run used {of_run}.")
    return found


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


def disagreements(rows: Sequence[Suggestion], given: float | None = None) -> list[str]:
    """Says where recommendations differ, by which factor.

    Args:
        rows: The recommendations.
        given: The batch that the user gave, in tokens; laws that take it do not recommend it.
    """
    found = []
    for field, what, form in (
        ("learning_rate", "Learning rates", "{:.2e}"),
        ("batch_tokens", "Batches", "{:,.0f} tokens"),
    ):
        all_named = {row.law: getattr(row, field) for row in rows if row.compared}
        named = {law: x for law, x in all_named.items() if x not in (None, given)}
        if field == "batch_tokens" and given:
            named["--batch-size"] = given
        if len(named) < 2:
            continue
        low, high = min(named, key=named.__getitem__), max(named, key=named.__getitem__)
        factor = named[high] / named[low]
        if factor <= SAME:
            found.append(f"{what} agree within a factor of {factor:.2f}.")
            continue
        ends = " and ".join(f"{form.format(named[law])} by {law}" for law in (low, high))
        found.append(f"{what} disagree by a factor of {factor:.1f}: {ends}.")
    return found


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
