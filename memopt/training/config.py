"""Everything that decides a run: the flags of `memopt pretrain`, and the keys of `config.json`."""

import ast
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro import conf

from memopt.errors import check_choice
from memopt.json_files import read_json
from memopt.models.config import LlamaConfig, Remat
from memopt.optimizers.registry import find_method
from memopt.schedules import SHAPES

DType = Annotated[str, conf.arg(metavar="{float32,bfloat16}")]
Weights = Literal["int8", "int4", "bfloat16+8"]
State = Literal["int8", "int4", "flash8", "dynamic8", "float8", "e5m2", "bfloat16"]

#: The schedule of a new run unless one is given.
SCHEDULE = "cosine"

#: Options that `config.json` does not hold.
NOT_SAVED = (
    *("output", "resume", "accept_data_change", "config", "rewarm", "profile", "epochs"),
    *("coordinator", "processes", "process", "heartbeat_timeout"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The model.

    Attributes:
        model: tiny, 60m, 130m, 350m, 1b, 7b, 13b, 70b, llama-2-7b, llama-3-8b or llama-3.2-1b.
        vocab_size: Token ids of the model, if not those of its preset. Must be given if they are
            more than a quarter more than the tokenizer's.
        num_layers: Layers of the model, if not those of its preset.
        param_dtype: Type the parameters are stored in. In bfloat16 updates are rounded
            stochastically.
        weights: Store matrices in fewer bits, read block by block; bfloat16+8: with 8 bits more
            beside it.
        compute_dtype: Type the blocks compute in. Norms, softmax and loss are in float32.
        remat: What the backward pass computes again: nothing, all but matmuls, or all inside a
            block.
        shape: Its sizes, if it is no preset but that of a Hugging Face directory, which `model` is
            then the name of. `config.json` holds them; they are no flag.
    """

    model: str = "tiny"
    vocab_size: Annotated[int | None, conf.arg(metavar="INT")] = None
    num_layers: Annotated[int | None, conf.arg(metavar="INT")] = None
    param_dtype: DType = "float32"
    weights: Weights | None = None
    compute_dtype: DType = "float32"
    remat: Remat = "none"
    shape: conf.SuppressFixed[conf.AvoidSubcommands[conf.Fixed[LlamaConfig | None]]] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """The model to start from, if any: a new run with its own steps and schedule.

    Attributes:
        init: Directory of a Hugging Face model, to start from its weights, shapes and tokenizer; or
            of a run, to start from the parameters of its newest checkpoint, and options that are
            not given are as they were there.
        grow: How often its layers are repeated, to start with a deeper model (G_stack).
        carry_state: Take over the state of the run's optimizer, too. Without it, the optimizer
            starts anew.
    """

    init: Annotated[Path | None, conf.arg(metavar="DIRECTORY")] = None
    grow: int = 1
    carry_state: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """The text or the chats to train on. 5% of the documents are held out for validation.

    Attributes:
        data: Files, directories, globs; JSON lines, as FILE.jsonl or FILE.jsonl#FIELD; hf:NAME.
            `python` is the source of Python's standard library. As NAME=SOURCE, sources with names
            are mixed.
        mixture: The share of each named source in the rows of the batches, positive numbers of any
            sum; equal shares by default.
        format: What the data holds: text, or chats in JSON lines, of which only the answers are
            learned.
        chat_template: A file with a chat template in Jinja, in place of the tokenizer's own.
        long_examples: Skip chats that are longer than a row, with a warning, or truncate them.
        eval_data: What to evaluate on, in place of a part of `data`, as in `data`; of named
            sources, some or all.
        bad_records: Skip records that are not JSON, not UTF-8, or without text or chat, with a
            warning, or stop.
        tokenizer: A tokenizer.json, a directory holding one (a Hugging Face model's), or bytes.
        batch_size: Rows of a batch, over all devices and micro-batches.
        seq_len: Tokens of a row.
        eval_tokens: Held-out tokens of each source to evaluate on, at most.
    """

    data: Annotated[tuple[str, ...], conf.arg(metavar="SOURCE ...")] = ("python",)
    mixture: Annotated[tuple[str, ...], conf.arg(metavar="NAME=WEIGHT ...")] = ()
    format: Literal["text", "chats"] = "text"
    chat_template: Annotated[str | None, conf.arg(metavar="FILE")] = None
    long_examples: Literal["skip", "truncate"] = "skip"
    eval_data: Annotated[tuple[str, ...], conf.arg(metavar="SOURCE ...")] = ()
    bad_records: Literal["skip", "stop"] = "skip"
    tokenizer: str = "bytes"
    batch_size: int = 8
    seq_len: int = 128
    eval_tokens: int = 2**16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run that one schedule applies to; a run has more than one if it was changed.

    Attributes:
        step: Steps of the run taken before it.
        count: Updates that the optimizer's state counts before it.
        schedule: The schedule's name.
        steps: Steps of the schedule; from then on, the final learning rate is kept.
        warmup_steps: Steps in which the learning rate moves from `first` to `highest`.
        decay_steps: Steps in which wsd and others with this option decay; None for the rest.
        first: Learning rate at the beginning of the warm-up.
        highest: Learning rate after the warm-up.
        final: Learning rate at the end.
        options: The schedule's other options: those given, and those that the run decides.
    """

    step: int
    count: int
    schedule: str
    steps: int
    warmup_steps: int
    decay_steps: int | None
    first: float
    highest: float
    final: float
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimization:
    """The optimizer and its schedule.

    Attributes:
        optimizer: A name that `memopt optimizers` lists; or MODULE:FUNCTION of a function that
            maps learning_rate to an Optax transformation, such as optax:adam.
        option: Argument of the optimizer, such as rank=128 or weight_decay=0.1;
            `memopt optimizers NAME` describes them.
        state: Store the optimizer's state in fewer bits.
        release: Update each block while the backward pass runs, so that all gradients are never
            there.
        learning_rate: Highest learning rate; by default that of the optimizer, which
            `memopt optimizers` lists, and AdamW's for a function of yours.
        schedule: A name that `memopt schedules` lists; cosine by default. With --resume, it
            replaces the schedule for the remaining steps, from the learning rate reached, and the
            learning rate's other options may be given, too; without it, the run's schedule goes on.
        schedule_option: Argument of the schedule, such as cycles=3; `memopt schedules NAME`
            describes them.
        rewarm: With --resume and --schedule, share of the remaining steps in which the learning
            rate first moves back to the highest one.
        warmup: Share of the steps in which the learning rate rises from 0.
        decay: Share of the steps in which wsd, wsd_exponential, wsd_sqrt and power decay. The
            others decay from warm-up to end.
        final_learning_rate: Learning rate at the end, as a share of the highest.
        phases: The schedules of a run that was resumed, or that took over a state. `config.json`
            holds them; they are no flag.
        steps: Batches to train on, unless `epochs` is given or has a default, which then decides.
        epochs: Passes over the chats to train for; decides `steps`.
        predict_steps: Take gradients where the weights will be after so many steps, by the
            optimizer's state alone, as XGrad does.
        accumulation: Micro-batches that a batch is worked through in, to save memory.
        controller: Let the run itself choose its learning rate, its batch or its mixture of data,
            as one of those that `memopt controllers` lists.
        controller_option: Argument of the controller; `memopt controllers NAME` describes them.
        max_skipped: Stop after so many steps in a row that were not finite. Such steps change
            nothing.
        seed: Decides the initial parameters and the order of the data.
    """

    optimizer: Annotated[str, conf.arg(metavar="NAME|MODULE:FUNCTION")] = "apollo_mini"
    option: Annotated[tuple[str, ...], conf.UseAppendAction, conf.arg(metavar="NAME=VALUE")] = ()
    state: State | None = None
    release: bool = False
    learning_rate: Annotated[float | None, conf.arg(metavar="FLOAT")] = None
    schedule: Annotated[str | None, conf.arg(metavar="NAME")] = None
    schedule_option: Annotated[
        tuple[str, ...], conf.UseAppendAction, conf.arg(metavar="NAME=VALUE")
    ] = ()
    rewarm: float = 0.0
    warmup: float = 0.1
    decay: float = 0.2
    final_learning_rate: float = 0.1
    phases: conf.SuppressFixed[tuple[Phase, ...]] = ()
    steps: int = 600
    epochs: Annotated[float | None, conf.arg(metavar="FLOAT")] = None
    predict_steps: Annotated[int | None, conf.arg(metavar="INT")] = None
    accumulation: int = 1
    controller: Annotated[str | None, conf.arg(metavar="NAME")] = None
    controller_option: Annotated[
        tuple[str, ...], conf.UseAppendAction, conf.arg(metavar="NAME=VALUE")
    ] = ()
    max_skipped: int = 10
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The devices, and the files that are kept.

    Attributes:
        output: Directory of the run, if not runs/MODEL-OPTIMIZER, with a number added if that is
            taken.
        resume: Continue the run in --output (or the latest) exactly from its last checkpoint.
            Its options need not be given again. --data may name another place of the same text.
        accept_data_change: Resume with other data than before: a new pass over it begins, while
            steps, schedule and optimizer go on.
        config: Read options from a config.json. Those on the command line win.
        mesh: Arrangement of the devices, such as data=2,fsdp=4; if not given, data=DEVICES. `data`
            copies the model, `fsdp` splits its parameters, `tensor` its heads and channels.
        coordinator: Where process 0 of several is reached. Not needed on TPU pods and under Slurm.
        processes: How many processes there are, with --coordinator.
        process: Which of them this is, from 0, with --coordinator.
        heartbeat_timeout: Seconds of silence after which a process is taken for dead, and all
            others end.
        log: Programs to show the run: tensorboard, wandb, mlflow, several or none. Where the last
            two send it to, WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI and the other variables
            of theirs say.
        eval_every: Steps between evaluations.
        checkpoint_every: Steps between checkpoints.
        keep: Latest checkpoints to keep. The one with the best validation loss is kept too.
        profile: Trace so many steps, after the first 3, into OUTPUT/profile, to be opened with
            XProf (TensorBoard) or Perfetto.
        log_diagnostics: Record norms and ranks of each matrix's gradient and update every so many
            steps, into OUTPUT/diagnostics.jsonl. It cannot be changed when the run is resumed.
    """

    output: Annotated[Path | None, conf.arg(metavar="DIRECTORY")] = None
    resume: bool = False
    accept_data_change: bool = False
    config: Annotated[Path | None, conf.arg(metavar="FILE")] = None
    mesh: Annotated[str | None, conf.arg(metavar="AXIS=SIZE,...")] = None
    coordinator: Annotated[str | None, conf.arg(metavar="HOST:PORT")] = None
    processes: Annotated[int | None, conf.arg(metavar="INT")] = None
    process: Annotated[int | None, conf.arg(metavar="INT")] = None
    heartbeat_timeout: int = 60
    log: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    eval_every: int = 200
    checkpoint_every: int = 200
    keep: int = 3
    profile: Annotated[int, conf.arg(metavar="STEPS")] = 0
    log_diagnostics: Annotated[int, conf.arg(metavar="STEPS")] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All options of a run, in groups; their names are unique over all groups.

    Example:
        >>> config = Config(optimization=Optimization(option=("rank=4", "projector=gaussian")))
        >>> config.optimizer_options
        {'rank': 4, 'projector': 'gaussian'}
    """

    architecture: Architecture = Architecture()
    start: Start = Start()
    text: Text = Text()
    optimization: Optimization = Optimization()
    run: Run = Run()

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """The `option`s as keyword arguments; of two with the same name, the later.

        Raises:
            ValueError: One is not of the form NAME=VALUE.
        """
        return _named("option", self.optimization.option, such_as="rank=128")

    @property
    def schedule_options(self) -> dict[str, Any]:
        """The `schedule_option`s as keyword arguments; of two with the same name, the later.

        Raises:
            ValueError: One is not of the form NAME=VALUE.
        """
        return _named("schedule_option", self.optimization.schedule_option, such_as="cycles=3")

    @property
    def controller_options(self) -> dict[str, Any]:
        """The `controller_option`s as keyword arguments; of two with the same name, the later.

        Raises:
            ValueError: One is not of the form NAME=VALUE.
        """
        given = self.optimization.controller_option
        return _named("controller_option", given, such_as="every=10")

    @property
    def highest_learning_rate(self) -> float:
        """The `learning_rate`, or the optimizer's own.

        Raises:
            ValueError: There is no such optimizer.

        Example:
            >>> Config(optimization=Optimization(optimizer="dog")).flat()["learning_rate"]
            1.0
        """
        options = self.optimization
        if options.learning_rate is not None:
            return options.learning_rate
        return find_method(options.optimizer).learning_rate

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The schedules of the run, one after another; of a new run, the one of its options.

        Example:
            >>> [phase] = Config(optimization=Optimization(schedule="linear", steps=50)).phases
            >>> phase.schedule, phase.steps, phase.warmup_steps
            ('linear', 50, 5)
        """
        return self.optimization.phases or (self.first_phase(),)

    def first_phase(self, *, step: int = 0, count: int = 0) -> Phase:
        """Returns the schedule of a new run with these options.

        A schedule's options `tokens_per_step` and `tokens_seen` are those of the run, unless they
        are given.

        Args:
            step: Steps of the run taken before it.
            count: Updates that the optimizer's state counts before it.

        Raises:
            ValueError: There is no such schedule, or an option of it that has a flag of its own.

        Example:
            >>> power = Config(optimization=Optimization(schedule="power"))
            >>> power.first_phase(step=10).options
            {'tokens_per_step': 1024, 'tokens_seen': 10240}
        """
        options, highest, given = (
            self.optimization,
            self.highest_learning_rate,
            self.schedule_options,
        )
        schedule = options.schedule or SCHEDULE
        check_choice("schedule", schedule, SHAPES)
        own = SHAPES[schedule].defaults
        if "decay_steps" in given and "decay_steps" in own:
            raise ValueError(
                "schedule_option decay_steps is given as --decay, a share of the steps."
            )
        tokens = self.text.batch_size * self.text.seq_len
        of_run = {"tokens_per_step": tokens, "tokens_seen": step * tokens}
        return Phase(
            step=step,
            count=count,
            schedule=schedule,
            steps=options.steps,
            warmup_steps=round(options.warmup * options.steps),
            decay_steps=round(options.decay * options.steps) if "decay_steps" in own else None,
            first=0.0,
            highest=highest,
            final=options.final_learning_rate * highest,
            options={name: x for name, x in of_run.items() if name in own} | given,
        )

    def with_phases(self, *phases: Phase) -> "Config":
        """Returns these options with other schedules."""
        return dataclasses.replace(
            self, optimization=dataclasses.replace(self.optimization, phases=phases)
        )

    def with_steps(self, steps: int) -> "Config":
        """Returns these options with another number of steps."""
        return dataclasses.replace(
            self, optimization=dataclasses.replace(self.optimization, steps=steps)
        )

    def flat(self) -> dict[str, Any]:
        """All options by name, JSON-serialisable, without those of one invocation only."""
        flat = {name: x for group in dataclasses.asdict(self).values() for name, x in group.items()}
        flat |= {"learning_rate": self.highest_learning_rate, "schedule": self.phases[-1].schedule}
        named = {
            "option": self.optimizer_options,
            "schedule_option": self.schedule_options,
            "controller_option": self.controller_options,
        }
        flat |= {
            kind: [f"{name}={value}" for name, value in sorted(options.items())]
            for kind, options in named.items()
        }
        flat |= {"phases": list(flat["phases"])}
        flat |= {name: list(flat[name]) for name in ("data", "mixture", "eval_data", "log")}
        flat["init"] = None if self.start.init is None else str(self.start.init)
        return {name: x for name, x in flat.items() if name not in NOT_SAVED}

    @classmethod
    def from_flat(cls, options: Mapping[str, Any], defaults: "Config | None" = None) -> "Config":
        """Inverts `flat`; unknown options are left out.

        Args:
            options: The options by name.
            defaults: Those that are missing; None: the defaults.

        Raises:
            ValueError: One is of another type; names it.

        Example:
            >>> Config.from_flat({"model": "60m", "data": ["a.txt"]}).text.data
            ('a.txt',)
            >>> Config.from_flat({"steps": "many"})
            Traceback (most recent call last):
            ValueError: option steps must be int, got 'many'.
        """
        given: dict[str, Any] = dict(options)
        given |= {name: tuple(x) for name, x in options.items() if isinstance(x, list)}
        if given.get("init") is not None:
            given["init"] = Path(given["init"])
        if isinstance(given.get("shape"), Mapping):
            given["shape"] = LlamaConfig.from_json(given["shape"])
        if "phases" in given:
            given["phases"] = tuple(Phase(**phase) for phase in given["phases"])
        groups: dict[str, Any] = {}
        for name, group in vars(defaults or cls()).items():
            types = get_type_hints(type(group))
            own = {key: x for key, x in given.items() if key in types}
            for key, value in own.items():
                check_type(key, value, types[key])
            groups[name] = dataclasses.replace(group, **own)
        config = cls(**groups)
        if options.get("schedule_start"):  # in which earlier versions kept the first phase's count
            return config.with_phases(config.first_phase(count=options["schedule_start"]))
        return config


def check_type(name: str, value: Any, expected: Any) -> None:
    """Raises unless an option is of the type that it is annotated with.

    Raises:
        ValueError: Names the option, the type and the given value.
    """
    if get_origin(expected) is Literal and isinstance(value, str):
        return check_choice(f"option {name}:", value, get_args(expected))
    if not _is_of_type(value, expected):
        called = expected.__name__ if isinstance(expected, type) else str(expected)
        raise ValueError(f"option {name} must be {called.replace('typing.', '')}, got {value!r}.")


def _is_of_type(value: Any, expected: Any) -> bool:
    """Whether a value may stand in a field; an integer also where a float is expected."""
    origin, arguments = get_origin(expected), get_args(expected)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_of_type(x, arguments[0]) for x in value)
    if arguments:
        return any(_is_of_type(value, choice) for choice in arguments)
    if isinstance(value, bool):
        return expected is bool
    return isinstance(value, (int, float) if expected is float else expected)


def _named(kind: str, options: Iterable[str], *, such_as: str) -> dict[str, Any]:
    """Options of the form NAME=VALUE as keyword arguments."""
    named = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not (name.isidentifier() and equals):
            raise ValueError(f"{kind} {option!r} must be NAME=VALUE, such as {such_as}.")
        named[name] = _value(value)
    return named


def _value(text: str) -> Any:
    """A number, a boolean, None or a tuple where the text is one in Python; or the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def read_options(path: Path) -> dict[str, Any]:
    """Reads the options of a `config.json`, a JSON object; any of them may be missing.

    Raises:
        ValueError: There is no such file, or it holds no JSON object.
    """
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"config {str(path)!r} cannot be read: {error}") from None
