"""Everything that decides a run: the flags of `memopt pretrain`, and the keys of `config.json`."""

import ast
import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro import conf

DType = Literal["float32", "bfloat16", "float16"]

#: Options that `config.json` does not hold.
NOT_SAVED = (
    *("output", "resume", "config"),
    *("coordinator", "processes", "process", "heartbeat_timeout"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The model."""

    model: str = "tiny"
    """tiny, 60m, 130m, 350m, 1b, 7b, 13b, 70b, llama-2-7b, llama-3-8b or llama-3.2-1b."""
    vocab_size: Annotated[int | None, conf.arg(metavar="INT")] = None
    """Token ids of the model, if not those of its preset."""
    param_dtype: DType = "float32"
    """Type the parameters are stored in. In bfloat16 updates are rounded stochastically."""
    weights: Literal["int8", "int4", "bfloat16+8"] | None = None
    """Store matrices in fewer bits, read block by block; bfloat16+8: with 8 bits more beside it."""
    compute_dtype: DType = "float32"
    """Type the blocks compute in. Norms, softmax and loss are in float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again: nothing, all but matmuls, or all inside a block."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """The text that it is trained on. 5% of the documents are held out for validation."""

    data: Annotated[tuple[str, ...], conf.arg(metavar="SOURCE ...")] = ("python",)
    """Text files, directories, globs; JSON lines, as FILE.jsonl or FILE.jsonl#FIELD; hf:NAME.
    `python` is the source of Python's standard library."""
    tokenizer: str = "bytes"
    """A tokenizer.json, or bytes."""
    batch_size: int = 8
    """Rows of a batch, over all devices and micro-batches."""
    seq_len: int = 128
    """Tokens of a row."""
    eval_tokens: int = 2**16
    """Held-out tokens to evaluate on, at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimization:
    """The optimizer and its schedule."""

    optimizer: str = "apollo_mini"
    """A name that `memopt optimizers` lists."""
    option: Annotated[tuple[str, ...], conf.UseAppendAction, conf.arg(metavar="NAME=VALUE")] = ()
    """Argument of the optimizer, such as rank=128 or weight_decay=0.1."""
    state: Literal["int8", "int4", "float8", "bfloat16"] | None = None
    """Store the optimizer's state in fewer bits."""
    release: bool = False
    """Update each block while the backward pass runs, so that all gradients are never there."""
    learning_rate: float = 5e-3
    """Highest learning rate. The default suits apollo_mini; adamw and lion want less."""
    schedule: str = "cosine"
    """cosine, linear, wsd (warm-up, stable, decay) or constant."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises from 0."""
    decay: float = 0.2
    """Share of the steps in which wsd decays. The others decay from warm-up to end."""
    final_learning_rate: float = 0.1
    """Learning rate at the end, as a share of the highest."""
    steps: int = 600
    """Batches to train on."""
    accumulation: int = 1
    """Micro-batches that a batch is worked through in, to save memory."""
    max_skipped: int = 10
    """Stop after so many steps in a row that were not finite. Such steps change nothing."""
    seed: int = 0
    """Decides the initial parameters and the order of the data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The devices, and the files that are kept."""

    output: Annotated[Path | None, conf.arg(metavar="DIRECTORY")] = None
    """Directory of the run, if not runs/MODEL-OPTIMIZER, with a number added if that is taken."""
    resume: bool = False
    """Continue the run in --output (or the latest) exactly where its last checkpoint is.
    Its options need not be given again."""
    config: Annotated[Path | None, conf.arg(metavar="FILE")] = None
    """Read options from a config.json. Those on the command line win."""
    mesh: Annotated[str | None, conf.arg(metavar="AXIS=SIZE,...")] = None
    """Arrangement of the devices, such as data=2,fsdp=4; if not given, data=DEVICES.
    `data` copies the model, `fsdp` splits its parameters, `tensor` its heads and channels."""
    coordinator: Annotated[str | None, conf.arg(metavar="HOST:PORT")] = None
    """Where process 0 of several is reached. Not needed on TPU pods and under Slurm."""
    processes: Annotated[int | None, conf.arg(metavar="INT")] = None
    """How many processes there are, with --coordinator."""
    process: Annotated[int | None, conf.arg(metavar="INT")] = None
    """Which of them this is, from 0, with --coordinator."""
    heartbeat_timeout: int = 60
    """Seconds of silence after which a process is taken for dead, and all others end."""
    eval_every: int = 200
    """Steps between evaluations."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    keep: int = 3
    """Latest checkpoints to keep. The one with the best validation loss is kept too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All options of a run, in groups; their names are unique over all groups.

    Example:
        >>> config = Config(optimization=Optimization(option=("rank=4", "projector=gaussian")))
        >>> config.optimizer_options
        {'rank': 4, 'projector': 'gaussian'}
    """

    architecture: Architecture = Architecture()
    text: Text = Text()
    optimization: Optimization = Optimization()
    run: Run = Run()

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """The `option`s as keyword arguments; of two with the same name, the later.

        Raises:
            ValueError: One is not of the form NAME=VALUE.
        """
        options = {}
        for option in self.optimization.option:
            name, equals, value = option.partition("=")
            if not (name.isidentifier() and equals):
                raise ValueError(f"option {option!r} must be NAME=VALUE, such as rank=128.")
            options[name] = _value(value)
        return options

    def flat(self) -> dict[str, Any]:
        """All options by name, JSON-serialisable, without those of one invocation only."""
        flat = {name: x for group in dataclasses.asdict(self).values() for name, x in group.items()}
        options = [f"{name}={value}" for name, value in sorted(self.optimizer_options.items())]
        flat |= {"data": list(self.text.data), "option": options}
        return {name: x for name, x in flat.items() if name not in NOT_SAVED}


def _value(text: str) -> Any:
    """A number, a boolean, None or a tuple where the text is one in Python; or the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def read_flags(path: Path) -> list[str]:
    """Reads a `config.json` as the command-line flags it stands for.

    Args:
        path: A JSON object of option names and values; any of them may be missing.

    Returns:
        Flags such as ["--model=tiny", "--data", "a.txt", "b.txt"].

    Raises:
        ValueError: There is no such file, or it holds no JSON object.
    """
    try:
        options = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"config {str(path)!r} cannot be read: {error}.") from error
    if not isinstance(options, dict):
        raise ValueError(f"config {str(path)!r} must hold a JSON object of options.")
    flags = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "option":
            flags += [f"{flag}={item}" for item in value]
        elif isinstance(value, list):
            flags += [flag, *value]
        elif isinstance(value, bool):
            flags += [flag] * value
        elif value is not None:
            flags.append(f"{flag}={value}")
    return flags
