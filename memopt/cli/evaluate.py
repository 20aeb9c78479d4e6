r"""Evaluate the model of a run, or a Hugging Face model, on text.

Shows the loss a token and a byte. Models with different tokenizers are compared by bytes.

Examples:
  memopt evaluate runs/books
  memopt evaluate runs/books --data 'other/*.txt'
  memopt evaluate path/to/SmolLM-135M --data 'other/*.txt' --seq-len 1024
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro import conf

from memopt.cli.arguments import Step
from memopt.cli.errors import fail
from memopt.training.config import Config
from memopt.training.data import read_history
from memopt.training.evaluation import Evaluation, evaluate_chats, evaluate_text
from memopt.training.load import LoadedModel, load_model
from memopt.training.open import find_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `memopt evaluate`.

    Attributes:
        run: Directory of a run or of a Hugging Face model.
        data: Text or chats, as in `memopt pretrain` and `finetune`, all of it. Without it, what the
            run held out, as much as its own validation reads.
        format: What the data holds: text, or chats, of which the answers count; by default as the
            run was trained, and text for a Hugging Face model.
        batch_size: Rows that are evaluated at a time.
        seq_len: Tokens of a row, which is what the model sees before a token, at most; by default
            that of the run, or the model's longest up to 1024.
    """

    run: Annotated[conf.Positional[Path], conf.arg(metavar="RUN")]
    data: Annotated[tuple[str, ...], conf.arg(metavar="SOURCE ...")] = ()
    format: Annotated[Literal["text", "chats"] | None, conf.arg(metavar="{text,chats}")] = None
    batch_size: int = 8
    seq_len: Annotated[int | None, conf.arg(metavar="INT")] = None
    step: Step = "best"


def evaluate(arguments: list[str]) -> None:
    """Runs `memopt evaluate` with these arguments."""
    options = tyro.cli(Options, prog="memopt evaluate", description=__doc__, args=arguments)
    try:
        loaded = load_model(options.run, options.step)
        found, name = _evaluate(loaded, options)
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    at_step = "" if loaded.step is None else f", step {loaded.step}"
    print(f"model      {loaded.path}{at_step}")
    print(f"data       {name}: {found.tokens:,} tokens, {found.bytes:,} bytes")
    print(f"a token    loss {found.loss:.4f}, perplexity {found.perplexity:.3f}")
    print(
        f"a byte     loss {found.loss_per_byte:.4f}, perplexity {found.perplexity_per_byte:.3f}, "
        f"{found.bits_per_byte:.4f} bits"
    )


def _evaluate(loaded: LoadedModel, options: Options) -> tuple[Evaluation, str]:
    """The evaluation, and a name for what it is on."""
    if not (loaded.config or options.data):
        raise ValueError(f"{str(loaded.path)!r} is a model without data of its own: give --data.")
    config = loaded.config or Config()
    text = dataclasses.replace(config.text, format=options.format or config.text.format)
    specs = options.data or text.eval_data
    text = dataclasses.replace(text, data=specs or text.data)
    history = [] if options.data else read_history(loaded.path)  # names of data that has moved
    documents = find_text(dataclasses.replace(config, text=text), history)
    documents = documents if specs else documents.split()[1]
    name = " ".join(options.data) or "what the run held out"
    rows: Any = {"batch_size": options.batch_size, "seq_len": options.seq_len}
    rows |= {"max_tokens": None if options.data else text.eval_tokens}
    if text.format == "text":
        return evaluate_text(loaded, documents, **rows), name
    return evaluate_chats(loaded, documents, long_examples=text.long_examples, **rows), name
