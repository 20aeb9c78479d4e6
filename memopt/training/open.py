"""A run with its files: the directory, the text, the checkpoints, and the state to begin with."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from memopt.errors import check_at_least
from memopt.optimizers.registry import FORMERLY_OPTAX
from memopt.text.batches import Batches
from memopt.text.chats import ChatEncoder
from memopt.text.examples import Examples
from memopt.text.mixtures import mixture_shares
from memopt.text.packing import Batch
from memopt.text.tokenizer import TEMPLATE, Tokenizer, load_tokenizer, read_template
from memopt.training.batches import (
    check_vocabulary,
    describe_mixture,
    find_text,
    open_batches,
    shares,
)
from memopt.training.checkpoint import Checkpoints, Record
from memopt.training.config import Config, Start, read_options
from memopt.training.data import (
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
        validation: The held-out batches of each source; of one without a name, under "".
        identity: What identifies the data.
        checkpoints: Its checkpoints.
        lock: The lock of its directory, held until it is trained.
        state: The state to begin with.
        shares: The share of each source that its validation loss is weighted by.
        mixture: The share of each named source and how often it is read, in words.
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
    validation: dict[str, list[Batch]]
    identity: Record
    checkpoints: Checkpoints
    lock: Lock
    state: TrainState
    shares: dict[str, float]
    mixture: Sequence[str] = ()
    examples: str = ""
    origin: str = ""
    history: Sequence[Data] = ()
    steering: Steering | None = None

    @property
    def batches_used(self) -> int:
        """Batches used up so far; without a controller, as many as steps were taken."""
        return self.steering.seen.batches if self.steering else int(self.state.step)

    @property
    def unit(self) -> str:
        """The unit of progress: "batch" if a controller lets steps use several, or "step"."""
        return "batch" if self.steering else "step"

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
    weights = shares(config)
    check_vocabulary(tokenizer, config, setup.model_config.vocab_size)
    rows = rows_here(setup.mesh, config.text.batch_size)
    with errors_in_all_processes():
        history = read_history(directory) if config.run.resume else []
        if config.run.resume:
            begin_as_before(tokenizer, history)
        documents = find_text(config, history, progress)
        opened = open_batches(config, documents, encoder or tokenizer, rows, setup.place, progress)
        batches, validation, identity, examples, rows_of_a_pass = opened
    if examples and config.optimization.epochs is not None:
        epoch = sum(map(len, examples.values()))
        steps = math.ceil(config.optimization.epochs * epoch / config.text.batch_size)
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
        steering = _steering(config, setup, directory, identity, restored)
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
        shares=weights,
        mixture=describe_mixture(config, rows_of_a_pass),
        examples=_summary(examples, config.text.batch_size),
        origin=origin.taken_over(config) if origin else "",
        history=history,
        steering=steering,
    )
    if origin:
        run.save(run.state)
    return run


def _summary(examples: Mapping[str, Examples], batch_size: int) -> str:
    summaries = {name: part.summary(batch_size) for name, part in examples.items()}
    return "; ".join(f"{name}: {text}" if name else text for name, text in summaries.items())


def _resumed_options(directory: Path, there: Config, given: Config) -> Config:
    """The options of a resumed run, with the schedules it had; raises if others have changed."""
    may_change = MAY_CHANGE | (WITH_SCHEDULE if given.optimization.schedule else set())
    check_same(directory, there.flat(), given.flat(), may_change=may_change)
    return given.with_phases(*there.phases)


def _check_options(config: Config) -> None:
    """Raises if options do not go together, before anything is read."""
    if config.optimization.rewarm and not (config.run.resume and config.optimization.schedule):
        raise ValueError(
            "rewarm raises the learning rate again for a new schedule of a resumed run: it goes "
            "with --resume and --schedule NAME; a new run has --warmup."
        )
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
    mixture = record["config"].get("mixture", ())
    if config.optimization.controller and tuple(mixture) != config.text.mixture:
        raise ValueError(
            "mixture must stay as it was in a run that has a controller: leave it out, or begin a "
            "new run with --init."
        )
    history, is_same = continue_history(directory, history, then, data, accept=accept)
    if is_same:
        batches.set_state(record["batches"])
        if (now := shares(config)) != mixture_shares(list(now), mixture):
            batches.set_weights(now)
            if is_main_process():
                warnings.warn(
                    "val_loss is the mean of the sources by the new mixture from here on: do not "
                    "compare it with that of earlier steps.",
                    stacklevel=2,
                )
    return history


def _steering(
    config: Config,
    setup: Setup,
    directory: Path,
    identity: Record,
    restored: tuple[TrainState, Record] | None,
) -> Steering | None:
    """The run's controller, where it was at the checkpoint."""
    controller = describe_controller(config)
    if not controller:
        return None
    path, name = directory / "trials.jsonl", f"{config.optimization.controller}"
    make = lambda trials: Steering(
        name, controller, frozenset(shares(config)), setup.learning_rate, trials, controller.init()
    )
    if not restored:
        trials = Trials(path, 0, keep=False)
        return make(trials)
    state, record = restored
    trials = Trials(path, int(state.step), keep=record["identity"].items() <= identity.items())
    steering = make(trials)
    steering.restore(record["steering"])
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


def _check_format(config: Config) -> None:
    """Raises if an option that goes with chats is given without."""
    options = {"chat_template": config.text.chat_template, "epochs": config.optimization.epochs}
    given = [name for name, value in options.items() if value is not None]
    if given and config.text.format != "chats":
        raise ValueError(f"{' and '.join(given)} must be left out with text: see memopt finetune.")
    epochs = config.optimization.epochs
    if epochs is not None and not 0 < epochs < math.inf:
        raise ValueError(f"epochs must be positive, got {epochs}.")
