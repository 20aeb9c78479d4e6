r"""Train a LLaMA on text.

With no options at all: the tiny model learns, with APOLLO-Mini and in a few minutes, the source of
Python's own standard library, byte by byte.

Examples:
  memopt pretrain --output runs/first
  memopt pretrain --output runs/first --resume
  memopt pretrain --optimizer adamw --learning-rate 3e-3
  memopt pretrain --output runs/first --resume --steps 1200 --schedule cosine --rewarm 0.1
  memopt pretrain --init runs/first --grow 2 --output runs/deeper
  memopt pretrain --init path/to/SmolLM-135M --data 'books/**/*.txt' --learning-rate 1e-4
  memopt tokenizer train --data 'books/**/*.txt' --vocab-size 32000 --output books.json
  memopt pretrain --model 60m --data 'books/**/*.txt' --tokenizer books.json --optimizer apollo \
    --option rank=128
  memopt pretrain --model 1b --data 'books/**/*.txt' --tokenizer books.json \
    --mesh data=2,fsdp=4 --compute-dtype bfloat16 --remat full
  memopt pretrain --model 7b --data 'books/**/*.txt' --tokenizer path/to/llama-2-7b \
    --release --weights int8 --state int8 --compute-dtype bfloat16

The run directory holds config.json, data.jsonl (the data it was trained on), metrics.jsonl (one
step a line), TensorBoard events, loss.png and checkpoints. A run that was killed at any moment
continues with --resume as if nothing had happened; Ctrl-C, SIGTERM and a closed terminal save
first.
"""

import dataclasses
import functools
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import tyro
from jax.experimental import multihost_utils
from jax.stages import Compiled
from rich.console import Console
from rich.table import Table

from memopt.cli.errors import fail
from memopt.json_lines import read_json_lines
from memopt.models.config import preset
from memopt.planning.step_memory import step_memory
from memopt.schedules import SHAPES
from memopt.state.describe import describe
from memopt.state.quantized_params import dequantize_params
from memopt.text.finding import DataWarning
from memopt.training.config import Config, Start, read_options
from memopt.training.describe import describe_run
from memopt.training.directory import choose_directory
from memopt.training.evaluation import perplexity
from memopt.training.loop import Stopped, train
from memopt.training.open import Training, open_run
from memopt.training.phases import describe_phases
from memopt.training.processes import init_distributed, is_main_process
from memopt.training.report import plot_diagnostics, plot_loss, sample_text
from memopt.training.start import inherited_options
from memopt.training.step import TrainState
from memopt.training.writing import why

#: Seconds for which process 0, through which the others hear of a failure, waits before it ends.
SECONDS_TO_SPEAK = 2.0

#: With fewer steps, epochs are too few to learn from, or batches too large.
FEW_STEPS = 20

#: Options of other programs that train, and what they are called here.
HABITS = {
    **dict.fromkeys(("--lr", "--max-lr", "--peak-lr"), "--learning-rate"),
    **dict.fromkeys(("--min-lr", "--final-lr"), "--final-learning-rate, a share of the highest"),
    **dict.fromkeys(("--bs", "--batch", "--per-device-train-batch-size"), "--batch-size"),
    **dict.fromkeys(("--max-steps", "--num-steps", "--iterations", "--iters"), "--steps"),
    **dict.fromkeys(("--num-epochs", "--num-train-epochs"), "--epochs"),
    **dict.fromkeys(("--seq-length", "--max-length", "--max-seq-len", "--context"), "--seq-len"),
    **dict.fromkeys(("--wd", "--weight-decay"), "--option weight_decay=0.1"),
    **dict.fromkeys(("--beta1", "--b1"), "--option b1=0.9"),
    **dict.fromkeys(("--beta2", "--b2"), "--option b2=0.95"),
    "--rank": "--option rank=128",
    **dict.fromkeys(("--grad-accum", "--gradient-accumulation-steps"), "--accumulation"),
    **dict.fromkeys(("--gradient-checkpointing", "--checkpointing"), "--remat full"),
    **dict.fromkeys(("--bf16", "--fp16"), "--compute-dtype bfloat16"),
    **dict.fromkeys(("--lr-scheduler", "--lr-scheduler-type", "--scheduler"), "--schedule"),
    **dict.fromkeys(("--warmup-ratio", "--warmup-steps"), "--warmup, a share of the steps"),
    **dict.fromkeys(("--output-dir", "--out", "--save-dir"), "--output"),
    **dict.fromkeys(("--model-name-or-path", "--pretrained", "--checkpoint"), "--init"),
    **dict.fromkeys(("--dataset", "--train-file"), "--data"),
    **dict.fromkeys(("--mix", "--data-mix", "--data-weights"), "--mixture NAME=WEIGHT"),
    **dict.fromkeys(("--report-to", "--wandb"), "--log wandb"),
}

#: Schedules of other programs that train, and what they are called here.
HABITUAL_SCHEDULES = {
    "cosine_with_restarts": "restarts",
    "cosine_with_min_lr": "cosine",
    "constant_with_warmup": "constant",
    "polynomial": "linear",
    **dict.fromkeys(("warmup_stable_decay", "trapezoidal"), "wsd"),
}

#: The options of `memopt pretrain` that is given none.
DEFAULTS = Config()


def pretrain(arguments: list[str]) -> None:
    """Runs `memopt pretrain` with these arguments."""
    train_command("pretrain", lambda: parse(arguments))


def train_command(command: str, read: Callable[[], Config]) -> None:
    """Runs a command that trains, from its options to a sample of what the model writes.

    Args:
        command: Its name, which tells how to continue a run.
        read: Returns its options; raises as `parse` does.
    """
    show = sys.unraisablehook
    try:
        sys.unraisablehook = lambda ignored: _is_of_closed_loop(ignored) or show(ignored)
        _train(command, read)
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized():
            raise
        reason = f"{error}".splitlines()[0]
        _end(f"a process has ended or is out of reach ({reason}): start all again, --resume.", 1)
    finally:
        sys.unraisablehook = show


def _is_of_closed_loop(ignored: Any) -> bool:
    """After a failed save TensorStore may still answer to a loop that Orbax has closed."""
    return str(ignored.exc_value) == "Event loop is closed"


def _train(command: str, read: Callable[[], Config]) -> None:
    try:
        config = read()
        init_distributed(config.run)
        console = Console(quiet=not is_main_process())
        if not is_main_process():
            warnings.simplefilter("ignore", DataWarning)  # all read the same
        say = functools.partial(console.print, markup=False, highlight=False)
        run = open_run(config, progress=say)
    except (ValueError, ImportError, OSError) as error:
        _end(error, 2)
    try:
        _introduce(run, console)
        state, step = train(run, console)
        _conclude(run, state, step, console)
    except Stopped as stopped:
        if not stopped.saved:
            _end(f"{stopped} {_what_is_saved(run, command)}", 1)
        fail(f"{stopped} All is saved; {_how_to_continue(run, command)}", stopped.exit_code)
    except OSError as error:
        _end(f"{error} {_what_is_saved(run, command)}", 1)
    except KeyboardInterrupt:
        _end(f"interrupted. {_what_is_saved(run, command)}", 130)
    # At the exit JAX waits for the heartbeat timeout only.
    multihost_utils.sync_global_devices("memopt")


def _what_is_saved(run: Training, command: str) -> str:
    newest = run.checkpoints.newest()
    saved = "No step is saved yet" if newest is None else f"All up to step {newest} is saved"
    return f"{saved}; {_how_to_continue(run, command)}"


def _how_to_continue(run: Training, command: str) -> str:
    return f"continue with: memopt {command} --resume --output {run.directory}"


def _end(message: object, exit_code: int) -> NoReturn:
    """Ends this process; if it is one of several, without JAX's wait for the others."""
    if not jax.distributed.is_initialized():
        fail(message, exit_code)
    print(f"memopt: process {jax.process_index()}: {message}", file=sys.stderr, flush=True)
    if is_main_process():
        time.sleep(SECONDS_TO_SPEAK)
    os._exit(exit_code)


def given_options(arguments: list[str]) -> list[str]:
    """Returns the options on a command line, without their values.

    Example:
        >>> given_options(["--seq_len=64", "--resume"])
        ['--seq-len', '--resume']
    """
    return [argument.partition("=")[0].replace("_", "-") for argument in arguments]


def parse(
    arguments: list[str],
    *,
    command: str = "pretrain",
    description: str | None = __doc__,
    defaults: Config = DEFAULTS,
    inherits: Collection[str] | None = None,
) -> Config:
    """Returns the options on the command line, over those of a config file or another run.

    Args:
        arguments: The command line, after the command.
        command: The command's name.
        description: Shown by `--help`.
        defaults: The options of a run that is given none.
        inherits: Options that a run has from the one it starts from; None: all.

    Raises:
        ValueError: The config file cannot be read, or there is no run to resume or to start from;
            an option has another name here.

    Example:
        >>> parse(["--lr=3e-3"])
        Traceback (most recent call last):
        ValueError: option --lr is unknown; did you mean --learning-rate?
        >>> parse(["--steps=3"], defaults=Config.from_flat({"optimizer": "lion"})).flat()["steps"]
        3
    """
    given = given_options(arguments)
    for option in given:
        if option in HABITS:
            meant = HABITS[option]
            raise ValueError(f"option {option} is unknown; did you mean {meant}?")
    read = functools.partial(
        tyro.cli,
        Config,
        prog=f"memopt {command}",
        description=description,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    config: Config = read(default=defaults)
    schedule = config.optimization.schedule
    if schedule in HABITUAL_SCHEDULES.keys() - SHAPES.keys():
        meant = HABITUAL_SCHEDULES[schedule]
        raise ValueError(f"schedule {schedule!r} is unknown; did you mean {meant!r}?")
    options: dict[str, Any] = {}
    if config.start != Start() and config.run.resume:
        raise ValueError(
            "init, grow and carry_state start a new run, --resume continues one: leave one out."
        )
    if config.start.init:
        inherited = inherited_options(config.start.init, config.start.grow)
        options |= {k: x for k, x in inherited.items() if inherits is None or k in inherits}
        if "--data" in given:
            options.pop("mixture", None)  # of the other run's sources
    if config.run.config:
        options |= read_options(config.run.config)
    if "--optimizer" in given and config.optimization.optimizer != options.get("optimizer"):
        for name in ("option", "learning_rate"):  # of the optimizer there
            options.pop(name, None)
    if "--format" in given and config.text.format == "text":
        options.pop("chat_template", None)
    if config.run.resume:
        options |= read_options(choose_directory(config) / "config.json")
    if schedule not in (None, options.get("schedule")):
        options.pop("schedule_option", None)  # of the schedule there
    if config.run.resume:
        options.pop("schedule", None)  # which goes on, unless one is given
    options.pop("phases", None)  # those of the other run
    if options:
        there = Config.from_flat(options, defaults)
        config = read(default=there)
        if config.architecture.model != there.architecture.model:
            shapeless = dataclasses.replace(config.architecture, shape=None)  # of the model there
            config = dataclasses.replace(config, architecture=shapeless)
    return config if "--seq-len" in given or "seq_len" in options else _in_context(config)


def _in_context(config: Config) -> Config:
    """Options whose rows, of a length that nobody gave, are no longer than the model accepts."""
    longest = (config.architecture.shape or preset(config.architecture.model)).max_seq_len
    text = dataclasses.replace(config.text, seq_len=min(config.text.seq_len, longest))
    return dataclasses.replace(config, text=text)


def _introduce(run: Training, console: Console) -> None:
    config, own = run.config, run.config.optimization
    dense = jax.eval_shape(dequantize_params, run.state.params)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(dense))
    kinds = describe(run.setup.tx, dense).by_kind()
    mesh = ", ".join(f"{axis}={size}" for axis, size in run.setup.mesh.shape.items())
    lines = (
        f"model      {config.architecture.model}, {parameters:,} parameters",
        f"optimizer  {config.optimization.optimizer} {' '.join(config.optimization.option)}",
        "state      of each kind of parameter: how many, what keeps it, its size",
        *(f"           {line}" for line in kinds),
        f"schedule   {describe_phases(config)}",
        *(
            [f"controller {own.controller} {' '.join(own.controller_option)}"]
            if own.controller
            else []
        ),
        f"text       {' '.join(config.text.data)}, tokenizer {run.tokenizer.name}, "
        f"rows of {config.text.seq_len} tokens",
        *(f"{'mixture' * (not i):11}{line}" for i, line in enumerate(run.mixture)),
        *([f"examples   {run.examples}"] if run.examples else []),
        *(
            f"           since step {entry.after} other data than before, in a new pass over it: "
            f"{' '.join(entry.data)}"
            for entry in run.history
            if entry.after
        ),
        f"mesh       {mesh} of {jax.device_count()} {jax.devices()[0].device_kind} devices",
        *([f"start      {run.origin}"] if run.origin else []),
        f"output     {run.directory}"
        + (f", resumed at {run.unit} {run.batches_used}" if run.batches_used else ""),
    )
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    steps = config.optimization.steps
    if config.optimization.epochs is not None and steps < FEW_STEPS and is_main_process():
        warnings.warn(
            f"only {steps} step{'s' * (steps > 1)}: lower --batch-size or raise --epochs.",
            stacklevel=1,
        )


def _conclude(run: Training, state: TrainState, step: Compiled, console: Console) -> None:
    prompt, continuation = sample_text(run, run.setup.eval_params(state))
    console.rule("sample")
    console.print(prompt, style="dim", markup=False, highlight=False, end="")
    console.print(continuation, markup=False, highlight=False)
    console.rule("memory")
    console.print(_memory_table(run, state, step))
    if not is_main_process():
        return
    _plot(run)
    for line in _losses(run):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"everything is in {run.directory}", markup=False, highlight=False)


def _losses(run: Training) -> Iterator[str]:
    """Says the last validation loss, and the lowest if that is another one."""
    lines = read_json_lines(run.directory / "metrics.jsonl")
    losses = [line["val_loss"] for line in lines if line.get("val_loss")]
    if losses:
        yield f"validation loss {losses[-1]:.4f}, perplexity {perplexity(losses[-1]):.3f} a token"
    best = run.checkpoints.best()
    if best and best.step != run.checkpoints.newest():
        yield (
            f"lowest validation loss {best.val_loss:.4f} at step {best.step}: sample, evaluate "
            "and export take it, unless --step last"
        )


def _plot(run: Training) -> None:
    plots: list[tuple[str, Callable[[Path, Path], None], str]]
    plots = [("metrics.jsonl", plot_loss, "loss.png")]
    if run.config.run.log_diagnostics:
        plots.append(("diagnostics.jsonl", plot_diagnostics, "diagnostics.png"))
    for lines, plot, name in plots:
        image = run.directory / name
        try:
            plot(run.directory / lines, image)
        except OSError as error:
            warnings.warn(f"{str(image)!r} cannot be written ({why(error)}).", stacklevel=1)


def _memory_table(run: Training, state: TrainState, step: Compiled) -> Table:
    """Bytes of this run and of the same run with AdamW, both from the compiler."""
    own = run.config.optimization
    adamw = dataclasses.replace(own, optimizer="adamw", option=(), state=None)
    other = describe_run(dataclasses.replace(run.config, optimization=adamw))
    memories = (
        step_memory(step, state.params, state.opt_state),
        step_memory(other.compile(), other.state.params, other.state.opt_state),
    )
    table = Table("bytes on one device")
    for name in (own.optimizer, "optax.adamw"):
        table.add_column(name, justify="right")
    names = ("parameters", "optimizer state", "peak of a step")
    for name, *sizes in zip(names, *map(dataclasses.astuple, memories), strict=True):
        table.add_row(name, *(f"{size:,}" if size is not None else "unknown" for size in sizes))
    return table
