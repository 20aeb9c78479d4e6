r"""Fine-tune a model on conversations, or on prompts with completions.

All its weights are trained, with the loss of the answers alone. Each line of the data is a JSON
object with `messages`, a list of objects with `role` and `content`, or with `prompt` and
`completion`.

Examples:
  memopt finetune --init path/to/llama --data chats.jsonl --output runs/tuned
  memopt finetune --init runs/first --data chats.jsonl --epochs 1 --seq-len 512
  memopt finetune --init path/to/llama --data chats.jsonl --eval-data held-out.jsonl \
    --weights int8 --release --compute-dtype bfloat16 --remat full
  memopt finetune --output runs/tuned --resume

The run directory is that of memopt pretrain, and holds the chat template, too.
"""

import dataclasses

from memopt.cli.pretrain import given_options, parse, train_command
from memopt.training.config import Architecture, Config, Optimization, Run, Text

#: The options of `memopt finetune` that is given none; docs/fine_tuning.md says why.
DEFAULTS = Config(
    text=Text(data=(), format="chats", batch_size=8, seq_len=512),
    optimization=Optimization(epochs=3.0, warmup=0.03),
    run=Run(eval_every=100),
)

#: Options that are those of a run to start from: its model, tokenizer and chat template.
INHERITED = (
    *("tokenizer", "chat_template"),
    *(field.name for field in dataclasses.fields(Architecture)),
)


def finetune(arguments: list[str]) -> None:
    """Runs `memopt finetune` with these arguments."""
    train_command("finetune", lambda: parse_finetune(arguments))


def parse_finetune(arguments: list[str]) -> Config:
    """Returns the options on the command line; see `memopt.cli.pretrain.parse`.

    Raises:
        ValueError: As there; both steps and epochs are given; or no model is.
    """
    given = set(given_options(arguments))
    if {"--steps", "--epochs"} <= given:
        raise ValueError("steps and epochs both say how long to train: give one.")
    if not given & {"--init", "--model", "--resume", "--config", "--help", "-h"}:
        raise ValueError(
            "init must name the model to fine-tune, a Hugging Face directory or a run; --model NAME"
            " begins with random weights."
        )
    defaults = DEFAULTS
    if given & {"--steps", "--resume", "--config"}:  # of which the others hold steps
        optimization = dataclasses.replace(DEFAULTS.optimization, epochs=None)
        defaults = dataclasses.replace(DEFAULTS, optimization=optimization)
    return parse(
        arguments,
        command="finetune",
        description=__doc__,
        defaults=defaults,
        inherits=INHERITED,
    )
