"""A run with its files: the directory, the text, the checkpoints, and the state to begin with."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from memopt.errors import check_at_least
from memopt.optimizers.registry import FORMERLY_OPTAX
from memopt.text.batches import (
    Batches,
    example_batches,
    example_validation,
    fingerprint,
    train_batches,
    validation_batches,
)
from memopt.text.chats import CHATS, ChatEncoder
from memopt.text.documents import Documents, find_documents
from memopt.text.examples import Examples, encode_examples
from memopt.text.files import TEXT
from memopt.text.packing import Batch
from memopt.text.tokenizer import TEMPLATE, Tokenizer, load_tokenizer, read_template
from memopt.training.checkpoint import Checkpoints, Record
from memopt.training.config import Config, Start, read_options
from memopt.training.data import (
    COMPLETIONS,
    Data,
    begin_as_before,
    continue_history,
    read_history,
    write_history,
)
from memopt.training.describe import describe_controller, describe_run
from memopt.training.directory import (
    MAY_CHANGE,
    check_same,
    choose_directory,
    keep_tokenizer,
    kept_tokenizer,
    lock_directory,
    write_config,
    write_template,
)
from memopt.training.lock import Lock
from memopt.training.phases import WITH_SCHEDULE, resume
from memopt.training.placement import rows_here
from memopt.training.processes import (
    check_same_on_all_processes,
    errors_in_all_processes,
    is_main_process,
)
from memopt.training.profile import check_profile
from memopt.training.setup import Setup
from memopt.training.start import Origin, read_origin
from memopt.training.steering import Steering, Trials
from memopt.training.step import TrainState
from memopt.training.trackers import check_trackers

#: Embeddings of a model per id of its tokenizer, at most, unless the options give the vocabulary.
#: It leaves room for rounding up and for a few added ids; bytes in a vocabulary of 32000 have 125.
MOST_ROWS_PER_ID = 1.25
#: What decides the order of the data besides its content; it never changes.
PASS = ("data tokenizer", "data eos_id", "data batch_size", "data seq_len", "data seed")


@dataclasses.dataclass
class Training:
    """A run that is ready to be trained.

    Attributes:
        config: Its options.
        setup: Its training step, and the shapes and shardings of its state.
        directory: The directory it writes to.
        tokenizer: Turns text into ids and back.
        batches: The training batches, from the step of `state` on, placed on the devices.
        validation: The held-out batches.
        identity: What identifies the data.
        checkpoints: Its checkpoints.
        lock: The lock of its directory, held until it is trained.
        state: The state to begin with.
        examples: How many examples there are and how they fill the rows, "" for text.
        origin: What it took over from another run, "" for nothing.
        history: What it was trained on so far.
        steering: Its controller, if it has one.
    """

    config: Config
    setup: Setup
    directory: Path
    tokenizer: Tokenizer
    batches: Batches
    validation: list[Batch]
    identity: Record
    checkpoints: Checkpoints
    lock: Lock
    state: TrainState
    examples: str = ""
    origin: str = ""
    history: Sequence[Data] = ()
    steering: Steering | None = None

    @property
    def batches_used(self) -> int:
        """Batches used up so far; without a controller, as many as steps were taken."""
        return self.steering.seen.batches if self.steering else int(self.state.step)

    def save(self, state: TrainState, val_loss: float | None = None) -> None:
        """Starts to save a checkpoint: the state, the position in the data, options, identity."""
        record = {
            "config": self.config.flat(),
            "identity": self.identity,
            "batches": self.batches.get_state(),
        }
        if self.steering:
            record["steering"] = self.steering.record()
        self.lock.check()
        self.checkpoints.save(state, record, val_loss)


def open_run(config: Config, progress: Callable[[str], None] | None = None) -> Training:
    """Opens and checks all that a run needs; writes nothing until every check has passed.

    Args:
        config: The options of the run. With `run.resume`, those it was started with, but for
            `memopt.training.directory.MAY_CHANGE` and, if it names a schedule, the options in
            `memopt.training.phases.WITH_SCHEDULE`.
        progress: Called with a line to show while reading the text takes long.

    Returns:
        The run, at its first step or, resumed, at that of its newest whole checkpoint. One that
        starts from another run, or from a model, has saved its first state, so that it does not
        need that again.

    Raises:
        ValueError: An option, or a combination of them, cannot work, or another process trains the
            run; says what to change.
    """
    with errors_in_all_processes():
        directory, given, there = choose_directory(config), config, None
    if config.run.resume:
        there = Config.from_flat(read_options(directory / "config.json"))
        config = _resumed_options(directory, there, given)
    _check_options(config)
    spec, tokenizer, encoder = _open_tokenizer(config, directory, there)
    checkpoints = Checkpoints(directory / "checkpoints", config.run.keep)
    init = config.start.init if checkpoints.newest() is None else None
    origin = read_origin(init, config) if init else None
    planned = origin.schedule if origin else lambda config: config
    config, unplanned = planned(config), config
    setup = describe_run(config)
    if origin:
        origin.check(config, setup)
    check_vocabulary(tokenizer, config, setup.model_config.vocab_size)
    rows = rows_here(setup.mesh, config.text.batch_size)
    with errors_in_all_processes():
        history = read_history(directory) if config.run.resume else []
        if config.run.resume:
            begin_as_before(tokenizer, history)
        documents = find_text(config, history, progress)
        opened = open_batches(config, documents, encoder or tokenizer, rows, setup.place, progress)
        batches, validation, identity, examples = opened
    if examples and config.optimization.epochs is not None:
        steps = math.ceil(config.optimization.epochs * len(examples) / config.text.batch_size)
        given, config = given.with_steps(steps), planned(unplanned.with_steps(steps))
        setup = describe_run(config)
    check_same_on_all_processes(
        {"output": str(directory), **config.flat(), "content of the data": identity}
        | {name: getattr(config.optimization, name) for name in ("schedule", "rewarm")}
        | {name: getattr(config.run, name) for name in ("resume", "accept_data_change")}
    )

    lock, restored = Lock(directory), None
    data = Data(0, list(config.text.data), identity, documents.listing())
    if config.run.resume:
        with errors_in_all_processes():
            if is_main_process():
                lock_directory(directory, lock, new=False)  # before damaged checkpoints are moved
        restored = _restore(checkpoints, setup)
    state = restored[0] if restored else None
    with errors_in_all_processes():
        history = _continue_data(directory, config, history, data, batches, restored)
        step, updates = (int(state.step), int(state.step - state.skipped)) if state else (0, 0)
        steered = restored[1].get("steering") if restored else None
        if steered:
            step, updates = steered["seen"]["batches"], steered["applied"]
        if there:
            before = there.with_phases(*config.phases)
            config = resume(before, given, step=step, updates=updates)
            setup = describe_run(config) if config.phases != before.phases else setup
        steering = _steering(config, setup, directory, history, restored)
        left = config.optimization.steps - step
        check_profile(config.run.profile, left, resumed=bool(restored))
    with errors_in_all_processes():
        if is_main_process():
            if not config.run.resume:
                lock_directory(directory, lock, new=True)
            _write_files(directory, config, history, spec, encoder)
    run = Training(
        config=config,
        setup=setup,
        directory=directory,
        tokenizer=tokenizer,
        batches=batches,
        validation=validation,
        identity=identity,
        checkpoints=checkpoints,
        lock=lock,
        state=_first_state(config, setup, origin) if state is None else state,
        examples=examples.summary(config.text.batch_size) if examples else "",
        origin=origin.taken_over(config) if origin else "",
        history=history,
        steering=steering,
    )
    if origin:
        run.save(run.state)
    return run


def _resumed_options(directory: Path, there: Config, given: Config) -> Config:
    """The options of a resumed run, with the schedules it had; raises if others have changed."""
    may_change = MAY_CHANGE | (WITH_SCHEDULE if given.optimization.schedule else set())
    check_same(directory, there.flat(), given.flat(), may_change=may_change)
    return given.with_phases(*there.phases)


def _check_options(config: Config) -> None:
    """Raises if options do not go together, before anything is read."""
    if config.optimization.rewarm and not (config.run.resume and config.optimization.schedule):
        raise ValueError("rewarm goes with --resume and --schedule; a new run has --warmup.")
    if config.start.init is None and config.start != Start():
        raise ValueError("grow and carry_state go with --init, the model to start from.")
    with errors_in_all_processes():
        if is_main_process():
            check_trackers(config.run.log)
    check_at_least("eval_tokens", config.text.eval_tokens, config.text.seq_len)
    _check_format(config)


def _open_tokenizer(
    config: Config, directory: Path, there: Config | None
) -> tuple[str, Tokenizer, ChatEncoder | None]:
    """The tokenizer with its name, and for chats their encoder; both a resumed run's own copies.

    Args:
        config: The options of the run.
        directory: Its directory.
        there: The options it was started with, if it is resumed; it has no copy of what is new.
    """
    spec, template = config.text.tokenizer, config.text.chat_template
    if there and spec == there.text.tokenizer:
        spec = kept_tokenizer(directory, spec)
    if there and template == there.text.chat_template:
        template = str(directory / TEMPLATE)
    tokenizer = load_tokenizer(spec)
    if config.text.format != "chats":
        return spec, tokenizer, None
    return spec, tokenizer, ChatEncoder(tokenizer, template and read_template(Path(template)))


def _continue_data(
    directory: Path,
    config: Config,
    history: Sequence[Data],
    data: Data,
    batches: Batches,
    restored: tuple[TrainState, Record] | None,
) -> list[Data]:
    """Moves the batches to where the run was in its data; returns what it is trained on by then."""
    if not restored:
        return [data]
    state, record = restored
    identity, then = data.identity, record["identity"]
    both = identity | then, identity  # release 0.1 knew less of it
    check_same(directory, *({name: x[name] for name in PASS} for x in both))
    data = data._replace(after=int(state.step))
    accept = config.run.accept_data_change
    history, is_same = continue_history(directory, history, then, data, accept=accept)
    if is_same:
        batches.set_state(record["batches"])
    return history


def _steering(
    config: Config,
    setup: Setup,
    directory: Path,
    history: Sequence[Data],
    restored: tuple[TrainState, Record] | None,
) -> Steering | None:
    """The run's controller, where it was at the checkpoint."""
    controller = describe_controller(config)
    if not controller:
        return None
    step = int(restored[0].step) if restored else 0
    trials = Trials(directory / "trials.jsonl", step, keep=not step or history[-1].after < step)
    steering = Steering(controller, setup.learning_rate, trials, controller.init())
    if restored:
        steering.restore(restored[1]["steering"])
    return steering


def _write_files(
    directory: Path,
    config: Config,
    history: Sequence[Data],
    spec: str,
    encoder: ChatEncoder | None,
) -> None:
    """Writes what the run needs to be resumed; its config.json, which makes it a run, last."""
    keep_tokenizer(directory, spec)
    write_history(directory, history)
    if encoder:
        write_template(directory, encoder.template)
    write_config(directory, config)


def _first_state(config: Config, setup: Setup, origin: Origin | None) -> TrainState:
    if origin:
        return origin.start(config, setup)
    with jax.set_mesh(setup.mesh):
        return setup.jit_init(config.optimization.seed)()


def _restore(checkpoints: Checkpoints, setup: Setup) -> tuple[TrainState, Record] | None:
    try:
        return checkpoints.restore(setup.state)
    except ValueError as error:
        if setup.optimizer not in FORMERLY_OPTAX:
            raise
        raise ValueError(
            f"{error} Before release 0.2 {setup.optimizer!r} was Optax's optimizer: to continue "
            f"such a run, write 'optax_{setup.optimizer}' for it in its config.json."
        ) from error


def find_text(
    config: Config,
    history: Sequence[Data] = (),
    progress: Callable[[str], None] | None = None,
) -> Documents:
    """Finds a run's text.

    Args:
        config: The options of the run.
        history: What it was trained on so far: the same content has its names again.
        progress: Called with a line to show, now and then if it takes long.

    Returns:
        The documents.

    Raises:
        ValueError: There is no such text.
    """
    documents = _find(config, config.text.data, progress)
    for entry in reversed(history):
        if (renamed := documents.renamed(entry.files)) is not None:
            return renamed
    return documents


def _find(
    config: Config, specs: Sequence[str], progress: Callable[[str], None] | None
) -> Documents:
    records = CHATS if config.text.format == "chats" else TEXT
    bad_records = config.text.bad_records
    return find_documents(specs, records=records, bad_records=bad_records, progress=progress)


def _check_format(config: Config) -> None:
    """Raises if an option that goes with chats is given without."""
    options = {"chat_template": config.text.chat_template, "epochs": config.optimization.epochs}
    given = [name for name, value in options.items() if value is not None]
    if given and config.text.format != "chats":
        raise ValueError(f"{' and '.join(given)} must be left out with text: see memopt finetune.")
    epochs = config.optimization.epochs
    if epochs is not None and not 0 < epochs < math.inf:
        raise ValueError(f"epochs must be positive, got {epochs}.")


class Opened(NamedTuple):
    """A run's data.

    Attributes:
        batches: The training batches.
        validation: The held-out batches.
        identity: What identifies the data.
        examples: The examples that the training batches are made of; None for text.
    """

    batches: Batches
    validation: list[Batch]
    identity: Record
    examples: Examples | None


def open_batches(
    config: Config,
    documents: Documents,
    tokenizer: Tokenizer | ChatEncoder,
    rows: Sequence[int],
    place: Callable[[Batch], Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Opened:
    """Cuts a run's text into batches, or packs its examples.

    Args:
        config: The options of the run.
        documents: Its text.
        tokenizer: Makes ids of the text; for examples, a `ChatEncoder`.
        rows: The rows of a batch that this process holds.
        place: Applied to each training batch, ahead of its step.
        progress: Called with a line to show if a part of it takes long.

    Raises:
        ValueError: There is too little text.
    """
    if config.text.eval_data:
        training, held_out = documents, _find(config, config.text.eval_data, progress)
    else:
        training, held_out = documents.split()
    shape: Any = {"batch_size": config.text.batch_size, "seq_len": config.text.seq_len}
    seed, eval_tokens = config.optimization.seed, config.text.eval_tokens
    examples = None
    if isinstance(tokenizer, ChatEncoder):
        encode = functools.partial(
            encode_examples,
            encoder=tokenizer,
            seq_len=config.text.seq_len,
            long_examples=config.text.long_examples,
            bad_records=config.text.bad_records,
            progress=progress,
        )
        other = "eval_data" if config.text.eval_data else "the held-out part of the data"
        examples, others = encode(training), encode(held_out, name=other)
        size: Any = {"batch_size": config.text.batch_size, "rows": rows}
        batches = example_batches(examples, seed=seed, place=place, **size)
        validation = example_validation(others, max_tokens=eval_tokens, **size)
    else:
        here: Any = {**shape, "rows": rows, "progress": progress}
        batches = train_batches(training, tokenizer, seed=seed, place=place, **here)
        validation = validation_batches(held_out, tokenizer, max_tokens=eval_tokens, **here)
    identity = fingerprint(training, tokenizer, **shape, seed=seed)
    known = {f"data {name}": value for name, value in identity.items()}
    if examples and not examples.has_chats:
        known[COMPLETIONS] = True
    return Opened(batches, validation, known, examples)


def check_vocabulary(tokenizer: Tokenizer, config: Config, vocab_size: int) -> None:
    """Raises unless a model's vocabulary fits a tokenizer's.

    A run that was begun with too large a vocabulary, by an earlier version, is warned about only.
    The models of others have what they have.

    Args:
        tokenizer: The tokenizer.
        config: The options of the run.
        vocab_size: The ids that its model has embeddings for.

    Raises:
        ValueError: The tokenizer has more ids; or too few, unless the options give the vocabulary.
    """
    model, ids = config.architecture.model, tokenizer.vocab_size
    if ids > vocab_size:
        advice = f"add --vocab-size {ids}"
        if config.start.init:
            own = Path(config.text.tokenizer) == config.start.init
            advice = "leave out --tokenizer, or give one with fewer ids"
            if own:
                advice = "give another --tokenizer, or resize its embeddings in transformers"
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has {ids} ids, but model {model!r} only {vocab_size}: "
            f"{advice}."
        )
    if config.architecture.shape or config.architecture.vocab_size:
        return
    if vocab_size > MOST_ROWS_PER_ID * ids:
        mismatch = f"model {model!r} has {vocab_size} ids, tokenizer {tokenizer.name!r} only {ids}"
        if not (config.run.resume or config.start.init):
            raise ValueError(
                f"{mismatch}: choose another --tokenizer, such as one from `memopt tokenizer train "
                f"--vocab-size {vocab_size}`, or give --vocab-size {ids}."
            )
        if is_main_process():
            warnings.warn(f"{mismatch}; the other embeddings are never used.", stacklevel=2)
