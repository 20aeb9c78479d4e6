r"""Continue a text, or answer a message, by the model of a run or by a Hugging Face model.

What it writes is printed, without the prompt. It ends at an end token.

Examples:
  memopt sample runs/books --prompt 'Once upon a time'
  memopt sample path/to/SmolLM-135M --prompt 'def fibonacci(' --temperature 0 --stop 'def '
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro import conf

from memopt.cli.arguments import Step
from memopt.cli.errors import failing
from memopt.training.load import load_model
from memopt.training.sampling import continue_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `memopt sample`.

    Attributes:
        run: Directory of a run or of a Hugging Face model.
        prompt: The text to continue, or the message to answer.
        max_new_tokens: Tokens to write, at most; fewer where the model's context ends.
        temperature: Divides the logits: 0 takes the likeliest token, 1 samples from the model.
        top_p: Sample among the likeliest tokens only, as few as have this probability together.
        stop: Text that ends the continuation, without it; not empty.
        seed: Decides the sample.
        format: text continues the prompt, chats answers it as the message of a user, by the chat
            template; by default as the run was trained, and text for a Hugging Face model.
    """

    run: Annotated[conf.Positional[Path], conf.arg(metavar="RUN")]
    prompt: str
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 1.0
    stop: Annotated[tuple[str, ...], conf.UseAppendAction, conf.arg(metavar="TEXT")] = ()
    seed: int = 0
    format: Annotated[Literal["text", "chats"] | None, conf.arg(metavar="{text,chats}")] = None
    step: Step = "best"


def sample(arguments: list[str]) -> None:
    """Runs `memopt sample` with these arguments."""
    options = tyro.cli(Options, prog="memopt sample", description=__doc__, args=arguments)
    with failing():
        loaded = load_model(options.run, options.step)
        text = continue_text(
            loaded,
            options.prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            stop=options.stop,
            seed=options.seed,
            format=options.format,
        )
    if loaded.step is not None:
        print(f"memopt: step {loaded.step} of {loaded.path}", file=sys.stderr)
    if not text:
        print("(the model ended its answer at once)", file=sys.stderr)
    print(text)
