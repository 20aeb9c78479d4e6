r"""Evaluate the model of a run, or a Hugging Face model, on text.

Shows the loss a token and a byte. Models with different tokenizers are compared by bytes.

Examples:
  memopt evaluate runs/books
  memopt evaluate runs/books --data 'other/*.txt'
  memopt evaluate path/to/SmolLM-135M --data 'other/*.txt' --seq-len 1024
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro import conf

from memopt.cli.errors import fail
from memopt.text.documents import Documents, find_documents
from memopt.training.data import read_history
from memopt.training.evaluation import evaluate_text
from memopt.training.load import LoadedModel, load_model
from memopt.training.open import find_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `memopt evaluate`.

    Attributes:
        run: Directory of a run or of a Hugging Face model.
        data: Text, as in `memopt pretrain`, all of it. Without it, the text that the run held out,
            as much as its own validation reads.
        batch_size: Rows that are evaluated at a time.
        seq_len: Tokens of a row, which is what the model sees before a token, at most; by default
            that of the run, or the model's longest up to 1024.
        step: Of a run: best (by validation loss), last, or the number of a step that has a
            checkpoint.
    """

    run: Annotated[conf.Positional[Path], conf.arg(metavar="RUN")]
    data: Annotated[tuple[str, ...], conf.arg(metavar="SOURCE ...")] = ()
    batch_size: int = 8
    seq_len: Annotated[int | None, conf.arg(metavar="INT")] = None
    step: Annotated[Literal["best", "last"] | int, conf.arg(metavar="{best,last,INT}")] = "best"


def evaluate(arguments: list[str]) -> None:
    """Runs `memopt evaluate` with these arguments."""
    options = tyro.cli(Options, prog="memopt evaluate", description=__doc__, args=arguments)
    try:
        loaded = load_model(options.run, options.step)
        documents, name, max_tokens = _text(loaded, options.data)
        found = evaluate_text(
            loaded,
            documents,
            batch_size=options.batch_size,
            seq_len=options.seq_len,
            max_tokens=max_tokens,
        )
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    at_step = "" if loaded.step is None else f", step {loaded.step}"
    print(f"model      {loaded.path}{at_step}")
    print(f"text       {name}: {found.tokens:,} tokens, {found.bytes:,} bytes")
    print(f"a token    loss {found.loss:.4f}, perplexity {found.perplexity:.3f}")
    print(
        f"a byte     loss {found.loss_per_byte:.4f}, perplexity {found.perplexity_per_byte:.3f}, "
        f"{found.bits_per_byte:.4f} bits"
    )


def _text(loaded: LoadedModel, data: tuple[str, ...]) -> tuple[Documents, str, int | None]:
    """The text to evaluate on, its name, and how many tokens of it."""
    if data:
        return find_documents(data), " ".join(data), None
    if loaded.config is None:
        raise ValueError(f"{str(loaded.path)!r} is a model without text of its own: give --data.")
    _, held_out = find_text(loaded.config, read_history(loaded.path)).split()
    return held_out, "what the run held out", loaded.config.text.eval_tokens
